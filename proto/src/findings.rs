//! What sealing found out about the samples of one shard, as Parquet: one row for each sample that is skipped, or that
//! looks like another one.

use parquet_derive::ParquetRecordWriter;

use crate::table::{Row, Value};

/// One finding. The fields are the file's columns, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq, ParquetRecordWriter)]
pub struct Finding {
    /// The sample's place in the shard: that of its bit in the bitmap of skips.
    pub ordinal: i32,
    /// The URL's ordinal in the catalog.
    pub key: i64,
    /// The name of the [`crate::manifest::Skip`]; null: the sample counts.
    pub skipped: Option<String>,
    /// Key of the sample whose picture it is or looks like, where there is one: the lowest such key.
    pub like: Option<i64>,
    /// Bits in which the perceptual hashes differ; 0 for the same bytes.
    pub bits: Option<i32>,
}

impl Row for Finding {
    const NAME: &'static str = "findings";

    fn set(&mut self, column: &str, value: Value<'_>) {
        match column {
            "ordinal" => self.ordinal = value.int().unwrap_or_default(),
            "key" => self.key = value.long().unwrap_or_default(),
            "skipped" => self.skipped = value.text(),
            "like" => self.like = value.long(),
            "bits" => self.bits = value.int(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table;

    #[test]
    fn findings_are_read_back() {
        let skipped = Finding { ordinal: 3, key: 70, skipped: Some("duplicate".into()), like: Some(7), bits: Some(0) };
        let near = Finding { ordinal: 4, key: 71, skipped: None, like: Some(9), bits: Some(2) };
        let rows = [skipped, near];
        let file = table::write(&rows).expect("encodes");
        assert_eq!(table::read::<Finding>(file.into()).expect("own output"), rows);
    }
}
