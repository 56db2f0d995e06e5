//! Rows of one type as a Parquet file, and back. Readable by DuckDB, pandas and polars as is.

use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{ChunkReader, FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::record::{Field, RecordWriter, Row as ParquetRow};
use parquet::schema::types::Type as SchemaType;

use crate::caught::caught;
use crate::format::FormatError;

/// A row. What is written is derived from its fields (`ParquetRecordWriter`); what is read is set column by column.
pub trait Row: Default {
    /// What the file is, for errors.
    const NAME: &'static str;

    /// Takes in the value of a column that is not null. Columns that a later version adds are passed over; rows that
    /// are only written take in none.
    fn set(&mut self, _column: &str, _value: Value<'_>) {}
}

/// The value of one column of one row, as long as it has the type that is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Value<'a>(&'a Field);

impl Value<'_> {
    /// Of 64 bits.
    pub fn long(self) -> Option<i64> {
        if let Field::Long(value) = self.0 { Some(*value) } else { None }
    }

    /// Of 32 bits.
    pub fn int(self) -> Option<i32> {
        if let Field::Int(value) = self.0 { Some(*value) } else { None }
    }

    /// A text.
    pub fn text(self) -> Option<String> {
        if let Field::Str(value) = self.0 { Some(value.clone()) } else { None }
    }

    /// Bytes.
    pub fn bytes(self) -> Option<Vec<u8>> {
        if let Field::Bytes(value) = self.0 { Some(value.data().to_vec()) } else { None }
    }
}

/// The rows as a Parquet file.
///
/// # Errors
/// Only if they cannot be encoded at all.
pub fn write<T: Row>(rows: &[T]) -> Result<Vec<u8>, FormatError>
where
    for<'a> &'a [T]: RecordWriter<T>,
{
    let encode = || -> Result<Vec<u8>, ParquetError> {
        let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?)).build();
        let mut writer = SerializedFileWriter::new(Vec::new(), rows.schema()?, Arc::new(properties))?;
        let mut group = writer.next_row_group()?;
        rows.write_to_row_group(&mut group)?;
        group.close()?;
        writer.into_inner()
    };
    encode().map_err(|error| FormatError(format!("{}: {error}", T::NAME)))
}

/// Opens a Parquet file, whoever has written it.
///
/// # Errors
/// If it is none, or a damaged one.
pub fn open<R: ChunkReader + 'static>(file: R) -> Result<SerializedFileReader<R>, ParquetError> {
    caught(|| SerializedFileReader::new(file)).unwrap_or_else(damaged)
}

/// The rows of a Parquet file, of all columns or of some of them, up to the first one that cannot be read.
///
/// # Errors
/// If the columns cannot be read.
pub fn rows(
    file: &dyn FileReader,
    columns: Option<SchemaType>,
) -> Result<impl Iterator<Item = Result<ParquetRow, ParquetError>>, ParquetError> {
    let mut rows = caught(|| file.get_row_iter(columns)).unwrap_or_else(damaged)?;
    let mut is_read = false;
    Ok(std::iter::from_fn(move || {
        let row = if is_read { None } else { caught(|| rows.next()).unwrap_or_else(|panic| Some(damaged(panic))) };
        is_read |= !matches!(row, Some(Ok(_)));
        row
    }))
}

fn damaged<T>(panic: String) -> Result<T, ParquetError> {
    Err(ParquetError::General(panic))
}

/// The rows of a file that [`write`] made, in order.
///
/// # Errors
/// If the bytes are no Parquet file, or a cut one.
pub fn read<T: Row>(file: Bytes) -> Result<Vec<T>, FormatError> {
    let decode = || -> Result<Vec<T>, ParquetError> {
        let row = |row: Result<ParquetRow, ParquetError>| {
            let (row, mut out) = (row?, T::default());
            for (column, field) in row.get_column_iter() {
                out.set(column, Value(field));
            }
            Ok(out)
        };
        rows(&open(file)?, None)?.map(row).collect()
    };
    decode().map_err(|error| FormatError(format!("{}: {error}", T::NAME)))
}
