//! Parquet files that are elsewhere: of them only those pieces are here that the wanted rows need.

use std::ops::Range;

use bytes::Buf;
use bytes::Bytes;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use proto::Rejection;
use proto::caught::caught;

/// The end of a file, which says where everything is, is looked for in so many bytes first.
const END: u64 = 64 << 10;
/// Ends that are longer are none.
const LONGEST_END: u64 = 64 << 20;
/// What a column has in one row group is held whole.
pub(crate) const LONGEST_PIECE: u64 = 256 << 20;

/// A file with some of its bytes.
#[derive(Debug, Clone)]
pub(crate) struct Sparse {
    length: u64,
    /// Each with its place.
    pieces: Vec<(u64, Bytes)>,
}

/// What a file's end needs to be understood.
#[derive(Debug)]
pub(crate) enum End {
    /// These bytes, up to the file's own end.
    Missing(Range<u64>),
    /// Nothing more.
    Read(Box<ParquetMetaData>),
}

impl Sparse {
    /// A file of which nothing is here.
    pub(crate) fn new(length: u64) -> Self {
        Self { length, pieces: Vec::new() }
    }

    /// The same file, with this piece as well.
    pub(crate) fn with(&self, at: u64, bytes: Bytes) -> Self {
        let mut pieces = self.pieces.clone();
        pieces.push((at, bytes));
        Self { pieces, ..*self }
    }

    /// The file's end, from the last piece that was put in.
    pub(crate) fn end(&self) -> Result<End, Rejection> {
        let last = |bytes: u64| End::Missing(self.length.saturating_sub(bytes)..self.length);
        let Some((_, tail)) = self.pieces.last() else { return Ok(last(END)) };
        let mut reader = ParquetMetaDataReader::new();
        match reader.try_parse_sized(tail, self.length) {
            Ok(()) => reader.finish().map(|read| End::Read(read.into())).map_err(|_| Rejection::Unreadable),
            Err(ParquetError::NeedMoreData(more)) if (tail.len()..LONGEST_END as usize).contains(&more) => {
                Ok(last(more as u64))
            }
            Err(_) => Err(Rejection::Unreadable),
        }
    }
}

/// What a column has in one row group, by its bytes' place, and the rows that are wanted of it.
type OfGroup = (Range<u64>, Vec<u64>);

/// Of each row group that has any of the `wanted` rows, which count up: where a column's bytes are, and these rows.
pub(crate) fn groups(file: &ParquetMetaData, column: &str, mut wanted: &[u64]) -> Result<Vec<OfGroup>, Rejection> {
    let columns = file.file_metadata().schema_descr().columns().iter();
    let leaf = columns.into_iter().position(|leaf| leaf.path().string() == column).ok_or(Rejection::Unreadable)?;
    let (mut groups, mut end) = (Vec::new(), 0);
    for group in file.row_groups() {
        end += group.num_rows().max(0) as u64;
        let (here, later) = wanted.split_at(wanted.partition_point(|row| *row < end));
        if !here.is_empty() {
            let (start, length) = caught(|| group.column(leaf).byte_range()).map_err(|_| Rejection::Unreadable)?;
            if length > LONGEST_PIECE {
                return Err(Rejection::TooLarge);
            }
            groups.push((start..start + length, here.to_vec()));
        }
        wanted = later;
    }
    Ok(groups)
}

impl Length for Sparse {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Sparse {
    type T = bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        let from = |(at, bytes): &(u64, Bytes)| {
            let skipped = usize::try_from(start.checked_sub(*at)?).ok()?;
            (skipped < bytes.len()).then(|| bytes.slice(skipped..))
        };
        let found = self.pieces.iter().find_map(from);
        found.map(Buf::reader).ok_or_else(|| ParquetError::EOF(format!("byte {start} is not here")))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        let bytes = self.get_read(start)?.into_inner();
        match bytes.len() >= length {
            true => Ok(bytes.slice(..length)),
            false => Err(ParquetError::EOF(format!("{length} bytes from byte {start} on are not here"))),
        }
    }
}

/// Every column of a file is read, piece by piece.
#[cfg(fuzzing)]
pub(crate) fn fuzz_sparse(bytes: &[u8]) {
    let whole = Bytes::copy_from_slice(bytes);
    let piece = |range: &Range<u64>| whole.slice(range.start as usize..range.end as usize);
    let mut file = Sparse::new(whole.len() as u64);
    let about = loop {
        match caught(|| file.end()).unwrap_or(Err(Rejection::Unreadable)) {
            // What is asked for lies in the file, and is more each time.
            Ok(End::Missing(range)) => file = Sparse::new(whole.len() as u64).with(range.start, piece(&range)),
            Ok(End::Read(about)) => break about,
            Err(_) => return,
        }
    };
    let columns = about.file_metadata().schema_descr().columns().iter();
    for column in columns.map(|column| column.path().string()).collect::<Vec<_>>() {
        let Ok(groups) = groups(&about, &column, &[0, 1, 5, u64::MAX]) else { continue };
        for (range, wanted) in groups {
            // Whoever is asked for bytes behind the end of a file answers that there are none.
            if range.start <= range.end && range.end <= whole.len() as u64 {
                let file = file.with(range.start, piece(&range));
                let _ = caught(|| super::rows(file, &column, &wanted, |_, _| true));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::column::writer::ColumnWriter;
    use parquet::data_type::ByteArray;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;
    use crate::fetch::rows;

    /// Three row groups of five rows of two columns; the first has the longer values.
    fn file() -> Bytes {
        let schema = "message m { required binary image; required binary text; }";
        let schema = Arc::new(parse_message_type(schema).expect("a schema"));
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::default()).expect("a writer");
        for group in 0..3u8 {
            let mut rows = writer.next_row_group().expect("a group");
            for length in [40_000, 3] {
                let mut column = rows.next_column().expect("a column").expect("a column");
                let ColumnWriter::ByteArrayColumnWriter(typed) = column.untyped() else { panic!("bytes") };
                let values: Vec<ByteArray> = (0..5).map(|row| vec![group * 5 + row; length].into()).collect();
                typed.write_batch(&values, None, None).expect("written");
                column.close().expect("written");
            }
            rows.close().expect("written");
        }
        writer.close().expect("written");
        bytes.into()
    }

    #[test]
    fn a_row_is_read_from_the_files_end_and_its_own_row_group_alone() {
        let whole = file();
        let piece = |range: &Range<u64>| whole.slice(range.start as usize..range.end as usize);
        let mut sparse = Sparse::new(whole.len() as u64);
        let mut read = 0;
        let about = loop {
            match sparse.end().expect("Parquet") {
                End::Missing(range) => {
                    read += range.end - range.start;
                    sparse = Sparse::new(whole.len() as u64).with(range.start, piece(&range));
                }
                End::Read(about) => break about,
            }
        };
        let groups = groups(&about, "image", &[1, 6, 8, 77]).expect("a column of bytes");
        let wanted: Vec<_> = groups.iter().map(|(_, rows)| rows.clone()).collect();
        assert_eq!(wanted, [vec![1], vec![6, 8]], "none has the last one");
        let mut found = Vec::new();
        for (range, wanted) in groups {
            read += range.end - range.start;
            let file = sparse.with(range.start, piece(&range));
            let each = |row, value: Result<ByteArray, Rejection>| {
                found.push((row, value.expect("it is there").data()[0]));
                true
            };
            rows(file, "image", &wanted, each).expect("Parquet");
        }
        assert_eq!(found, [(1, 1), (6, 6), (8, 8)]);
        assert!(read < 500_000 && whole.len() > 600_000, "{read} of {} bytes", whole.len());
        assert!(super::groups(&about, "picture", &[1]).is_err());
        // What is not there is no row, and what is no Parquet file has no end.
        assert!(rows(sparse, "image", &[1], |_, _| true).is_err());
        let text = Bytes::from(vec![b'x'; 70_000]);
        assert!(Sparse::new(70_000).with(70_000 - END, text.slice(..END as usize)).end().is_err());
        // An end that is longer than what was looked at is asked for as a whole.
        let short = whole.slice(whole.len() - 9..);
        let Ok(End::Missing(more)) = Sparse::new(whole.len() as u64).with(whole.len() as u64 - 9, short).end() else {
            panic!("nine bytes are no end")
        };
        assert!(more.end == whole.len() as u64 && more.start < more.end - 100);
    }
}
