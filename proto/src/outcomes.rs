//! The outcomes of one shard as Parquet: one row per URL, readable by DuckDB, pandas and polars as is.

use parquet_derive::ParquetRecordWriter;

use crate::format::FormatError;
use crate::rejection::{outcome_name, parse_outcome};
use crate::shard::Moments;
use crate::table::{Row, Value};
use crate::{Outcome, Split, slice};

/// A URL of more bytes than this is bad in a list, and not followed in a redirect: workers hold all those of a slice,
/// with their rows.
pub const LONGEST_URL: usize = 8 << 10;

/// What became of one URL. The fields are the file's columns, in this order; what was never learned is null.
#[derive(Debug, Clone, Default, PartialEq, ParquetRecordWriter)]
pub struct OutcomeRow {
    /// The URL's ordinal in the catalog.
    pub key: i64,
    /// Its class.
    pub synset: String,
    /// As in the list.
    pub url: String,
    /// Where its redirects ended.
    pub final_url: Option<String>,
    /// `kept` or a rejection's name.
    pub outcome: String,
    /// Of the last answer; of `unfetched`, with which its site said that it is to be asked for later (429, 503).
    pub http_status: Option<i32>,
    /// Of the body, after decompression.
    pub bytes: Option<i64>,
    /// Pixels of the image as fetched, upright.
    pub width: Option<i32>,
    /// Likewise.
    pub height: Option<i32>,
    /// Of the body, in hex.
    pub sha256: Option<String>,
    /// 64-bit perceptual hash of the stored image, in hex.
    pub phash: Option<String>,
    /// `train`, `validation` or `test`; kept rows only, as all that follows up to the moments.
    pub split: Option<String>,
    /// Object key of the tar that holds it.
    pub tar: Option<String>,
    /// Of the stored image in the tar.
    pub offset: Option<i64>,
    /// Of the stored image.
    pub length: Option<i64>,
    /// Pixels of the stored image.
    pub pixels: Option<i64>,
    /// Over the stored image's pixels (0 to 255).
    pub sum_red: Option<i64>,
    /// Likewise.
    pub sum_green: Option<i64>,
    /// Likewise.
    pub sum_blue: Option<i64>,
    /// Of the values' squares.
    pub sum_of_squares_red: Option<i64>,
    /// Likewise.
    pub sum_of_squares_green: Option<i64>,
    /// Likewise.
    pub sum_of_squares_blue: Option<i64>,
    /// When the fetch ended, in milliseconds since 1970, by the worker's clock.
    pub fetched_at: i64,
    /// Milliseconds from the URL's first request to its outcome.
    pub millis: i64,
    /// What of the list travels with the picture: a JSON object.
    pub columns: Option<String>,
    /// More about the outcome, in a word: the format that is not supported.
    pub detail: Option<String>,
    /// A small picture of what was rejected, as a JPEG: of a few in each shard.
    pub thumbnail: Option<Vec<u8>>,
}

impl OutcomeRow {
    /// The outcome as a value.
    ///
    /// # Errors
    /// If the column names no outcome that this program knows.
    pub fn outcome(&self) -> Result<Outcome, FormatError> {
        parse_outcome(&self.outcome).map_err(|error| FormatError(format!("outcomes: row {}: {error}", self.key)))
    }

    /// The stored image's moments; zero if it was not kept.
    pub fn moments(&self) -> Moments {
        let n = |value: Option<i64>| value.unwrap_or(0).max(0) as u64;
        Moments {
            pixels: n(self.pixels),
            sum: [n(self.sum_red), n(self.sum_green), n(self.sum_blue)],
            sum_of_squares: [n(self.sum_of_squares_red), n(self.sum_of_squares_green), n(self.sum_of_squares_blue)],
        }
    }

    /// Fills the columns of the moments.
    pub fn set_moments(&mut self, moments: &Moments) {
        let n = |value: u64| Some(value as i64);
        self.pixels = Some(moments.pixels as i64);
        [self.sum_red, self.sum_green, self.sum_blue] = moments.sum.map(n);
        [self.sum_of_squares_red, self.sum_of_squares_green, self.sum_of_squares_blue] = moments.sum_of_squares.map(n);
    }

    /// The split, if it was kept.
    pub fn split(&self) -> Option<Split> {
        self.split.as_deref().and_then(|name| name.parse().ok())
    }
}

impl Row for OutcomeRow {
    const NAME: &'static str = "outcomes";

    fn set(&mut self, column: &str, value: Value<'_>) {
        match column {
            "key" => self.key = value.long().unwrap_or_default(),
            "synset" => self.synset = value.text().unwrap_or_default(),
            "url" => self.url = value.text().unwrap_or_default(),
            "final_url" => self.final_url = value.text(),
            "outcome" => self.outcome = value.text().unwrap_or_default(),
            "http_status" => self.http_status = value.int(),
            "bytes" => self.bytes = value.long(),
            "width" => self.width = value.int(),
            "height" => self.height = value.int(),
            "sha256" => self.sha256 = value.text(),
            "phash" => self.phash = value.text(),
            "split" => self.split = value.text(),
            "tar" => self.tar = value.text(),
            "offset" => self.offset = value.long(),
            "length" => self.length = value.long(),
            "pixels" => self.pixels = value.long(),
            "sum_red" => self.sum_red = value.long(),
            "sum_green" => self.sum_green = value.long(),
            "sum_blue" => self.sum_blue = value.long(),
            "sum_of_squares_red" => self.sum_of_squares_red = value.long(),
            "sum_of_squares_green" => self.sum_of_squares_green = value.long(),
            "sum_of_squares_blue" => self.sum_of_squares_blue = value.long(),
            "fetched_at" => self.fetched_at = value.long().unwrap_or_default(),
            "millis" => self.millis = value.long().unwrap_or_default(),
            "columns" => self.columns = value.text(),
            "detail" => self.detail = value.text(),
            "thumbnail" => self.thumbnail = value.bytes(),
            _ => {}
        }
    }
}

/// The rows of a shard that the coordinator has closed, which has no file of them: each of its slice's URLs with the
/// same outcome. `slice` is the stored form.
///
/// # Errors
/// If the bytes are no slice.
pub fn closed_rows(slice: &[u8], outcome: Outcome) -> Result<Vec<OutcomeRow>, FormatError> {
    let row = |entry: slice::Entry<'_>| OutcomeRow {
        key: entry.key as i64,
        synset: entry.synset.to_owned(),
        url: entry.url.to_owned(),
        columns: Some(entry.columns.to_owned()).filter(|columns| !columns.is_empty()),
        outcome: outcome_name(outcome).to_owned(),
        ..OutcomeRow::default()
    };
    slice::entries(&slice::unpack(slice)?).map(|entry| entry.map(row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rejection, table};
    use bytes::Bytes;

    #[test]
    fn rows_are_read_back_and_a_cut_file_is_refused() {
        let mut kept = OutcomeRow {
            key: 7,
            synset: "n02084071".into(),
            url: "http://a/".into(),
            outcome: crate::rejection::KEPT.into(),
            http_status: Some(200),
            sha256: Some("00ff".into()),
            split: Some("test".into()),
            columns: Some(r#"{"caption":"a dog"}"#.into()),
            ..OutcomeRow::default()
        };
        kept.set_moments(&Moments { pixels: 1, sum: [2, 3, 4], sum_of_squares: [5, 6, 7] });
        let detail = Some("heic".to_owned());
        let (outcome, thumbnail) = (Rejection::Dns.name().to_owned(), Some(vec![0xFF, 0xD8, 0]));
        let dead = OutcomeRow { key: 8, outcome, detail, thumbnail, ..OutcomeRow::default() };
        let rows = [kept, dead];
        let file = Bytes::from(table::write(&rows).expect("encodes"));
        let back = table::read::<OutcomeRow>(file.clone()).expect("own output");
        assert_eq!(back, rows);
        assert_eq!(back[0].moments().sum_of_squares, [5, 6, 7]);
        assert_eq!(back[1].outcome().expect("a known name"), Err(Rejection::Dns));
        assert!(table::read::<OutcomeRow>(file.slice(..file.len() - 9)).is_err());
    }
}
