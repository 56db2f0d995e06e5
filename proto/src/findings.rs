//! What sealing found out about the samples of one shard, as Parquet: one row for each sample that is skipped, or that looks
//! like another one.

use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::record::{Field, RecordWriter, Row};
use parquet_derive::ParquetRecordWriter;

use crate::shard::FormatError;

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

impl Finding {
    fn read(row: &Row) -> Self {
        let mut out = Self::default();
        for (name, field) in row.get_column_iter() {
            match (name.as_str(), field) {
                ("ordinal", Field::Int(value)) => out.ordinal = *value,
                ("key", Field::Long(value)) => out.key = *value,
                ("skipped", Field::Str(value)) => out.skipped = Some(value.clone()),
                ("like", Field::Long(value)) => out.like = Some(*value),
                ("bits", Field::Int(value)) => out.bits = Some(*value),
                _ => {}
            }
        }
        out
    }
}

/// The findings of one shard as a Parquet file.
///
/// # Errors
/// Only if the rows cannot be encoded at all.
pub fn write(rows: &[Finding]) -> Result<Vec<u8>, FormatError> {
    let encode = || -> Result<Vec<u8>, ParquetError> {
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?)).build();
        let mut writer = SerializedFileWriter::new(Vec::new(), rows.schema()?, Arc::new(properties))?;
        let mut group = writer.next_row_group()?;
        rows.write_to_row_group(&mut group)?;
        group.close()?;
        writer.into_inner()
    };
    encode().map_err(|e| FormatError(format!("findings: {e}")))
}

/// The rows of a file that [`write`] made, in order.
///
/// # Errors
/// If the bytes are no Parquet file, or a cut one.
pub fn read(file: Bytes) -> Result<Vec<Finding>, FormatError> {
    let decode = || -> Result<Vec<Finding>, ParquetError> {
        SerializedFileReader::new(file)?.get_row_iter(None)?.map(|row| Ok(Finding::read(&row?))).collect()
    };
    decode().map_err(|e| FormatError(format!("findings: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_read_back() {
        let skipped = Finding { ordinal: 3, key: 70, skipped: Some("duplicate".into()), like: Some(7), bits: Some(0) };
        let near = Finding { ordinal: 4, key: 71, skipped: None, like: Some(9), bits: Some(2) };
        let rows = [skipped, near];
        assert_eq!(read(write(&rows).expect("encodes").into()).expect("own output"), rows);
    }
}
