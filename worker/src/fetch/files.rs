//! Pictures that are there already: files below the folders that this worker's operator named, objects of the store's
//! own folder for them, and parts of both.
//!
//! A path comes from whoever made the dataset. It is opened one name after the other, and none of them may be a link or
//! lead upwards: so nothing outside these folders is read, whatever happens to them meanwhile.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader};
use proto::files::Part;
use proto::{Rejection, keys, table};
use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::Errno;

use crate::store;

/// What may be read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Roots {
    /// Files below these.
    folders: Vec<PathBuf>,
    /// What is below [`keys::IMPORTS`] in it.
    store: Option<Arc<dyn ObjectStore>>,
}

/// An object that may be read.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) key: object_store::path::Path,
}

/// What of a file is to be read.
#[derive(Debug)]
pub(crate) struct Extent {
    file: File,
    offset: u64,
    pub(crate) length: u64,
}

impl Roots {
    /// # Errors
    /// If one of them is not there, or is no folder.
    pub(crate) fn new(folders: &[PathBuf]) -> anyhow::Result<Self> {
        let root = |folder: &PathBuf| {
            let what = || format!("--import-root {}", folder.display());
            let whole = folder.canonicalize().with_context(what)?;
            ensure!(whole.is_dir(), "{} is no folder", what());
            Ok(whole)
        };
        let folders = folders.iter().map(root).collect::<anyhow::Result<_>>()?;
        Ok(Self { folders, store: None })
    }

    /// And the pictures in this store.
    pub(crate) fn and_in(self, store: Arc<dyn ObjectStore>) -> Self {
        Self { store: Some(store), ..self }
    }

    /// An object, if it may be read. The key comes from whoever made the dataset.
    pub(crate) fn object(&self, key: &str) -> Result<Object, Rejection> {
        let store = self.store.clone().ok_or(Rejection::BlockedAddress)?;
        let key = object_store::path::Path::parse(key).map_err(|_| Rejection::BlockedAddress)?;
        let may = key.parts().next().is_some_and(|first| first.as_ref() == keys::IMPORTS);
        if may { Ok(Object { store, key }) } else { Err(Rejection::BlockedAddress) }
    }

    /// Opens a file. Blocks, as all that follows.
    pub(crate) fn open(&self, path: &Path) -> Result<File, Rejection> {
        let below = |root: &'_ PathBuf| Some((root.clone(), path.strip_prefix(root).ok()?));
        let (root, below) = self.folders.iter().find_map(below).ok_or(Rejection::BlockedAddress)?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut at = open(&root, flags | OFlags::DIRECTORY, Mode::empty()).map_err(refused)?;
        let mut names = below.components().peekable();
        while let Some(name) = names.next() {
            let Component::Normal(name) = name else { return Err(Rejection::BlockedAddress) };
            // Whoever opens a pipe would wait for its other end.
            let kind = if names.peek().is_some() { OFlags::DIRECTORY } else { OFlags::NONBLOCK };
            at = openat(&at, name, flags | kind, Mode::empty()).map_err(refused)?;
        }
        let file = File::from(at);
        match file.metadata() {
            Ok(about) if about.is_file() => Ok(file),
            Ok(_) => Err(Rejection::NotAnImage),
            Err(_) => Err(Rejection::Unreadable),
        }
    }

    /// Opens what an address names. A row of a Parquet file is none: [`rows`] reads several.
    pub(crate) fn extent(&self, path: &Path, part: &Part<'_>) -> Result<Extent, Rejection> {
        let file = self.open(path)?;
        match part {
            Part::Whole => match file.metadata() {
                Ok(about) => Ok(Extent { file, offset: 0, length: about.len() }),
                Err(_) => Err(Rejection::Unreadable),
            },
            Part::Bytes { offset, length, .. } => Ok(Extent { file, offset: *offset, length: *length }),
            Part::Row { .. } => Err(Rejection::BadUrl),
        }
    }
}

impl Object {
    pub(crate) async fn length(&self) -> Result<u64, Rejection> {
        let about = store::with_retries(self.key.as_ref(), || self.store.head(&self.key)).await;
        about.map(|about| about.size).map_err(absent)
    }

    /// Some of its bytes.
    pub(crate) async fn read(&self, range: Range<u64>) -> Result<Bytes, Rejection> {
        let range = &range;
        let read = || async {
            match self.store.get_range(&self.key, range.clone()).await {
                Ok(bytes) => Ok(Some(bytes)),
                // It is shorter than it was, which does not pass.
                Err(error) => match self.store.head(&self.key).await {
                    Ok(about) if about.size < range.end => Ok(None),
                    _ => Err(error),
                },
            }
        };
        let bytes = store::with_retries(self.key.as_ref(), read).await.map_err(absent)?;
        bytes.filter(|bytes| bytes.len() as u64 == range.end - range.start).ok_or(Rejection::Truncated)
    }
}

fn absent(error: object_store::Error) -> Rejection {
    match error {
        object_store::Error::NotFound { .. } => Rejection::NotFound,
        _ => Rejection::Unreadable,
    }
}

impl Extent {
    /// Reads all of it behind what is in `into`.
    pub(crate) fn read(mut self, into: &mut Vec<u8>) -> Result<(), Rejection> {
        let unreadable = |_| Rejection::Unreadable;
        self.file.seek(SeekFrom::Start(self.offset)).map_err(unreadable)?;
        let read = self.file.take(self.length).read_to_end(into).map_err(unreadable)?;
        if (read as u64) < self.length { Err(Rejection::Truncated) } else { Ok(()) }
    }
}

/// What the system says of a name that cannot be opened.
fn refused(error: Errno) -> Rejection {
    match error {
        Errno::NOENT | Errno::NAMETOOLONG => Rejection::NotFound,
        // A link, or something else in the place of a folder; or a file of somebody who does not want it read.
        Errno::LOOP | Errno::NOTDIR | Errno::ACCESS | Errno::PERM => Rejection::BlockedAddress,
        Errno::NXIO => Rejection::NotAnImage,
        _ => Rejection::Unreadable,
    }
}

/// Hands each of the `wanted` rows' value to `each` until that says false. `wanted` counts up.
///
/// # Errors
/// If the file cannot be read as Parquet, or has no such column of bytes.
pub(crate) fn rows(
    file: impl ChunkReader + 'static,
    column: &str,
    wanted: &[u64],
    mut each: impl FnMut(u64, Result<ByteArray, Rejection>) -> bool,
) -> Result<(), Rejection> {
    let unreadable = |_: ParquetError| Rejection::Unreadable;
    let reader = table::open(file).map_err(unreadable)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let leaf = schema.columns().iter().position(|leaf| leaf.path().string() == column);
    // A list has several pictures in a row.
    let leaf = leaf.filter(|leaf| schema.column(*leaf).max_rep_level() == 0).ok_or(Rejection::Unreadable)?;
    let mut wanted = wanted.iter().copied().peekable();
    let mut first = 0;
    for (n, group) in reader.metadata().row_groups().iter().enumerate() {
        let end = first + group.num_rows().max(0) as u64;
        if wanted.peek().is_some_and(|row| *row < end) {
            let group = reader.get_row_group(n).map_err(unreadable)?;
            let ColumnReader::ByteArrayColumnReader(mut values) = group.get_column_reader(leaf).map_err(unreadable)?
            else {
                return Err(Rejection::Unreadable);
            };
            let mut at = first;
            while let Some(row) = wanted.next_if(|row| *row < end) {
                let (mut value, mut defined) = (Vec::with_capacity(1), Vec::with_capacity(1));
                values.skip_records((row - at) as usize).map_err(unreadable)?;
                values.read_records(1, Some(&mut defined), None, &mut value).map_err(unreadable)?;
                at = row + 1;
                // Nothing stands there: the picture is elsewhere, if anywhere.
                if !each(row, value.pop().ok_or(Rejection::NotFound)) {
                    return Ok(());
                }
            }
        }
        first = end;
    }
    for row in wanted {
        if !each(row, Err(Rejection::NotFound)) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::sync::Arc;

    #[test]
    fn nothing_is_read_but_files_below_the_roots_whatever_a_path_says() {
        let folder = tempfile::tempdir().expect("a folder");
        let base = folder.path().canonicalize().expect("a folder");
        let at = |name: &str| base.join(name);
        for dir in ["root/a", "root-2", "secret"] {
            std::fs::create_dir_all(at(dir)).expect("writable");
        }
        for file in ["root/a/1.jpg", "root-2/1.jpg", "secret/1.jpg", "root/top.jpg"] {
            std::fs::write(at(file), file).expect("writable");
        }
        symlink(at("secret"), at("root/link")).expect("writable");
        symlink(at("secret/1.jpg"), at("root/a/link.jpg")).expect("writable");
        symlink(at("root/a/1.jpg"), at("root/a/own-link.jpg")).expect("writable");
        symlink(at("root"), at("entry")).expect("writable");
        // The operator's own word may be a link.
        let roots = Roots::new(&[at("entry")]).expect("a folder");
        let read = |name: &str| {
            let mut bytes = Vec::new();
            roots.extent(&at(name), &Part::Whole)?.read(&mut bytes)?;
            Ok::<_, Rejection>(String::from_utf8(bytes).expect("text"))
        };
        for good in ["root/a/1.jpg", "root/top.jpg", "root/./a//1.jpg"] {
            assert_eq!(read(good), Ok(good.replace("./", "").replace("//", "/")), "{good}");
        }
        for (bad, why) in [
            ("secret/1.jpg", Rejection::BlockedAddress),
            ("root-2/1.jpg", Rejection::BlockedAddress),
            ("root/../secret/1.jpg", Rejection::BlockedAddress),
            ("root/a/../top.jpg", Rejection::BlockedAddress),
            ("root/link/1.jpg", Rejection::BlockedAddress),
            ("root/a/link.jpg", Rejection::BlockedAddress),
            ("root/a/own-link.jpg", Rejection::BlockedAddress),
            ("root/top.jpg/1.jpg", Rejection::BlockedAddress),
            ("entry/a/1.jpg", Rejection::BlockedAddress),
            ("root/none.jpg", Rejection::NotFound),
            ("root/a", Rejection::NotAnImage),
            ("root", Rejection::NotAnImage),
        ] {
            assert_eq!(read(bad), Err(why), "{bad}");
        }
        assert_eq!(Roots::default().open(&at("root/top.jpg")).map(drop), Err(Rejection::BlockedAddress));
        assert!(Roots::new(&[at("none")]).is_err() && Roots::new(&[at("root/top.jpg")]).is_err());
    }

    #[test]
    fn of_the_store_nothing_is_read_but_the_folder_for_pictures() {
        let roots = Roots::default().and_in(Arc::new(object_store::memory::InMemory::new()));
        let object = |key: &str| roots.object(key).map(|object| object.key.to_string());
        assert_eq!(object("imports/birds/a b.tar"), Ok("imports/birds/a b.tar".to_owned()));
        for bad in ["", "datasets/x/spec.json", "imports/../runs/x", "imports-2/a.tar", "imports//a.tar", "/"] {
            assert_eq!(object(bad), Err(Rejection::BlockedAddress), "{bad}");
        }
        assert!(Roots::default().object("imports/a.tar").is_err());
    }

    #[test]
    fn a_part_of_a_file_is_read_alone_and_one_beyond_its_end_is_cut() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().canonicalize().expect("a folder");
        std::fs::write(root.join("a.tar"), b"0123456789").expect("writable");
        let roots = Roots::new(std::slice::from_ref(&root)).expect("a folder");
        let read = |offset, length| {
            let part = Part::Bytes { name: "1.jpg".into(), offset, length };
            let mut bytes = Vec::new();
            roots.extent(&root.join("a.tar"), &part)?.read(&mut bytes).map(|()| bytes)
        };
        assert_eq!(read(2, 3), Ok(b"234".to_vec()));
        assert_eq!([read(8, 3), read(1 << 40, 1)], [Err(Rejection::Truncated), Err(Rejection::Truncated)]);
    }

    #[test]
    fn rows_are_read_across_groups_and_what_is_not_there_is_said() {
        use parquet::column::writer::ColumnWriter;
        use parquet::file::writer::SerializedFileWriter;
        use parquet::schema::parser::parse_message_type;

        let schema = "message m { optional group image { optional binary bytes; optional binary path (UTF8); } }";
        let schema = Arc::new(parse_message_type(schema).expect("a schema"));
        let mut file = tempfile::tempfile().expect("a file");
        let mut writer = SerializedFileWriter::new(&mut file, schema, Arc::default()).expect("a writer");
        for group in 0..3u8 {
            let mut rows = writer.next_row_group().expect("a group");
            while let Some(mut column) = rows.next_column().expect("a column") {
                let ColumnWriter::ByteArrayColumnWriter(typed) = column.untyped() else { panic!("bytes") };
                // The third of each group has none.
                let values: Vec<ByteArray> = (0..3).map(|n| vec![group * 4 + n].into()).collect();
                typed.write_batch(&values, Some(&[2, 2, 1, 2]), None).expect("written");
                column.close().expect("written");
            }
            rows.close().expect("written");
        }
        writer.close().expect("written");
        let read = |column: &str, wanted: &[u64]| {
            let mut found = Vec::new();
            rows(file.try_clone().expect("a file"), column, wanted, |row, value| {
                found.push((row, value.map(|value| value.data().to_vec())));
                found.len() < 6
            })
            .map(|()| found)
        };
        let expected = [
            (1, Ok(vec![1])),
            (2, Err(Rejection::NotFound)),
            (3, Ok(vec![2])),
            (8, Ok(vec![8])),
            (99, Err(Rejection::NotFound)),
        ];
        assert_eq!(read("image.bytes", &[1, 2, 3, 8, 99]).expect("Parquet"), expected);
        assert_eq!(read("image.bytes", &[0, 1, 2, 3, 4, 5, 6, 7]).expect("Parquet").len(), 6);
        for none in ["image", "bytes", "label"] {
            assert_eq!(read(none, &[0]), Err(Rejection::Unreadable), "{none}");
        }
        let mut text = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut text, b"no Parquet file, whatever it is called").expect("writable");
        assert_eq!(rows(text, "image", &[0], |_, _| true), Err(Rejection::Unreadable));
    }
}
