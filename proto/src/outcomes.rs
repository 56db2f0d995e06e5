//! The outcomes of one shard as Parquet: one row per URL, readable by DuckDB, pandas and polars as is.

use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::record::{Field, RecordWriter, Row};
use parquet_derive::ParquetRecordWriter;

use crate::shard::{FormatError, Moments};
use crate::{Outcome, Rejection, Split, rejection};

/// A URL of more bytes than this is bad in a list, and not followed in a redirect: workers hold all those of a slice, with their rows.
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
    /// Of the last answer.
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
}

impl OutcomeRow {
    /// The outcome as a value.
    ///
    /// # Errors
    /// If the column names no outcome that this program knows.
    pub fn outcome(&self) -> Result<Outcome, FormatError> {
        match self.outcome.as_str() {
            rejection::KEPT => Ok(Ok(())),
            name => Rejection::from_str(name).map(Err).map_err(|e| FormatError(format!("outcomes: {e}"))),
        }
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

    fn read(row: &Row) -> Self {
        let mut out = Self::default();
        for (name, field) in row.get_column_iter() {
            match name.as_str() {
                "key" => out.key = long(field).unwrap_or_default(),
                "synset" => out.synset = text(field).unwrap_or_default(),
                "url" => out.url = text(field).unwrap_or_default(),
                "final_url" => out.final_url = text(field),
                "outcome" => out.outcome = text(field).unwrap_or_default(),
                "http_status" => out.http_status = int(field),
                "bytes" => out.bytes = long(field),
                "width" => out.width = int(field),
                "height" => out.height = int(field),
                "sha256" => out.sha256 = text(field),
                "phash" => out.phash = text(field),
                "split" => out.split = text(field),
                "tar" => out.tar = text(field),
                "offset" => out.offset = long(field),
                "length" => out.length = long(field),
                "pixels" => out.pixels = long(field),
                "sum_red" => out.sum_red = long(field),
                "sum_green" => out.sum_green = long(field),
                "sum_blue" => out.sum_blue = long(field),
                "sum_of_squares_red" => out.sum_of_squares_red = long(field),
                "sum_of_squares_green" => out.sum_of_squares_green = long(field),
                "sum_of_squares_blue" => out.sum_of_squares_blue = long(field),
                "fetched_at" => out.fetched_at = long(field).unwrap_or_default(),
                "millis" => out.millis = long(field).unwrap_or_default(),
                // A column that a later version adds.
                _ => {}
            }
        }
        out
    }
}

fn long(field: &Field) -> Option<i64> {
    match field {
        Field::Long(value) => Some(*value),
        _ => None,
    }
}

fn int(field: &Field) -> Option<i32> {
    match field {
        Field::Int(value) => Some(*value),
        _ => None,
    }
}

fn text(field: &Field) -> Option<String> {
    match field {
        Field::Str(value) => Some(value.clone()),
        _ => None,
    }
}

/// The rows of one shard as a Parquet file.
///
/// # Errors
/// Only if the rows cannot be encoded at all.
pub fn write(rows: &[OutcomeRow]) -> Result<Vec<u8>, FormatError> {
    let encode = || -> Result<Vec<u8>, ParquetError> {
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?)).build();
        let mut writer = SerializedFileWriter::new(Vec::new(), rows.schema()?, Arc::new(properties))?;
        let mut group = writer.next_row_group()?;
        rows.write_to_row_group(&mut group)?;
        group.close()?;
        writer.into_inner()
    };
    encode().map_err(|e| FormatError(format!("outcomes: {e}")))
}

/// The rows of a Parquet file that [`write`] made, in order.
///
/// # Errors
/// If the bytes are no Parquet file, or a cut one.
pub fn read(file: Bytes) -> Result<Vec<OutcomeRow>, FormatError> {
    let decode = || -> Result<Vec<OutcomeRow>, ParquetError> {
        SerializedFileReader::new(file)?.get_row_iter(None)?.map(|row| Ok(OutcomeRow::read(&row?))).collect()
    };
    decode().map_err(|e| FormatError(format!("outcomes: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_back_and_a_cut_file_is_refused() {
        let mut kept = OutcomeRow {
            key: 7,
            synset: "n02084071".into(),
            url: "http://a/".into(),
            outcome: rejection::KEPT.into(),
            http_status: Some(200),
            sha256: Some("00ff".into()),
            split: Some("test".into()),
            ..OutcomeRow::default()
        };
        kept.set_moments(&Moments { pixels: 1, sum: [2, 3, 4], sum_of_squares: [5, 6, 7] });
        let dead = OutcomeRow { key: 8, outcome: Rejection::Dns.name().into(), ..OutcomeRow::default() };
        let rows = [kept, dead];
        let file = Bytes::from(write(&rows).expect("encodes"));
        let back = read(file.clone()).expect("own output");
        assert_eq!(back, rows);
        assert_eq!(back[0].moments().sum_of_squares, [5, 6, 7]);
        assert_eq!(back[1].outcome().expect("a known name"), Err(Rejection::Dns));
        assert!(read(file.slice(..file.len() - 9)).is_err());
    }
}
