//! Where pictures are that are there already: what people write, and the files that it leads to.

use std::fmt;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use futures::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use parquet::file::reader::FileReader;
use proto::files::Place;
use proto::{keys, table};
use url::Url;

use super::remote::{Remote, Source, wait};
use super::{Kind, kind, listed};
use crate::exit::Ended;
use crate::store;

/// What an address in the cluster's own store begins with.
const STORE: &str = "store:";

/// Names, classes and texts stand between the pictures of a tar: of a tar elsewhere everything is read.
const TAR_WINDOW: u64 = 4 << 20;
/// Of a Parquet file elsewhere only the columns are read that are wanted.
const PARQUET_WINDOW: u64 = 64 << 10;

/// Where a folder or a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Location {
    /// On disk; the whole path.
    Path(PathBuf),
    /// In the cluster's own store.
    Store {
        /// The store.
        store: String,
        /// An object's key, or what those of a folder begin with.
        key: String,
    },
    /// A file on the web.
    Web(Url),
}

/// A file that is there.
#[derive(Debug)]
pub(super) enum File {
    Path(PathBuf),
    Elsewhere { source: Source, length: u64 },
}

/// What a tar is read from.
pub(super) trait ReadSeek: Read + Seek {}

impl<T: Read + Seek> ReadSeek for T {}

impl Location {
    /// A path, `store:imports/...` if it is known which store that is, or an http(s) address.
    ///
    /// # Errors
    /// If it leads nowhere.
    pub(crate) fn parse(text: &str, store: Option<&str>) -> Result<Self> {
        let refused = |why: String| Ended::usage(format!("{text}: {why}"));
        if let Some(key) = text.strip_prefix(STORE) {
            let key = key.trim_matches('/');
            let folder = keys::IMPORTS;
            if key != folder && !key.starts_with(&format!("{folder}/")) {
                return Err(refused(format!("what is imported from the store is below {STORE}{folder}/")));
            }
            let missing = || refused("--store says which store that is, as the coordinator's does".to_owned());
            return Ok(Self::Store { store: store.ok_or_else(missing)?.to_owned(), key: key.to_owned() });
        }
        if text.starts_with("http://") || text.starts_with("https://") {
            let mut url = Url::parse(text).map_err(|e| refused(e.to_string()))?;
            url.set_fragment(None);
            return Ok(Self::Web(url));
        }
        Path::new(text).canonicalize().map(Self::Path).map_err(|e| refused(e.to_string()))
    }

    /// The last part of its name.
    pub(super) fn name(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.file_name().unwrap_or_default().into(),
            Self::Store { key, .. } => key.rsplit('/').next().unwrap_or_default().into(),
            Self::Web(url) => url.path().rsplit('/').next().unwrap_or_default().into(),
        }
    }

    /// The file itself. Blocks, as all that follows.
    pub(super) fn file(&self) -> Result<File> {
        let source = match self {
            Self::Path(path) => return Ok(File::Path(path.clone())),
            Self::Store { store, key } => Source::Object(store::open_existing(store)?, Key::parse(key)?),
            Self::Web(url) => Source::web(url.clone())?,
        };
        let length = wait(source.length())?;
        Ok(File::Elsewhere { source, length })
    }

    /// The store and the folder of it, if it is one.
    pub(super) fn stored_folder(&self) -> Result<Option<(Arc<dyn ObjectStore>, Key)>> {
        let Self::Store { store, key } = self else { return Ok(None) };
        let (store, key) = (store::open_existing(store)?, Key::parse(key)?);
        match wait(store.head(&key)) {
            Ok(_) => Ok(None),
            Err(object_store::Error::NotFound { .. }) => Ok(Some((store, key))),
            Err(error) => Err(error).with_context(|| self.to_string()),
        }
    }

    /// The first Parquet file of it.
    pub(super) fn first_parquet(&self) -> Result<Option<File>> {
        if let Self::Path(path) = self {
            return Ok(first_parquet(path)?.map(File::Path));
        }
        let Some((store, folder)) = self.stored_folder()? else {
            return if kind(&self.name()) == Kind::Parquet { self.file().map(Some) } else { Ok(None) };
        };
        let mut first = None::<ObjectMeta>;
        let mut listed = store.list(Some(&folder));
        while let Some(object) = wait(listed.try_next()).with_context(|| self.to_string())? {
            let earlier = first.as_ref().is_none_or(|first| object.location < first.location);
            if earlier && kind(Path::new(object.location.as_ref())) == Kind::Parquet {
                first = Some(object);
            }
        }
        drop(listed);
        Ok(first.map(|object| File::object(&store, object)))
    }
}

/// The first Parquet file of a folder, or the file itself if it is one.
fn first_parquet(path: &Path) -> Result<Option<PathBuf>> {
    if !path.is_dir() {
        return Ok(Some(path.to_owned()).filter(|path| kind(path) == Kind::Parquet));
    }
    let mut folders = Vec::new();
    for (path, of) in listed(path)? {
        if of.is_dir() {
            folders.push(path);
        } else if of.is_file() && kind(&path) == Kind::Parquet {
            return Ok(Some(path));
        }
    }
    for folder in folders {
        if let Some(found) = first_parquet(&folder)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Store { key, .. } => write!(f, "{STORE}{key}"),
            Self::Web(url) => url.fmt(f),
        }
    }
}

impl File {
    pub(super) fn object(store: &Arc<dyn ObjectStore>, object: ObjectMeta) -> Self {
        Self::Elsewhere { source: Source::Object(Arc::clone(store), object.location), length: object.size }
    }

    /// As workers find it.
    pub(super) fn place(&self) -> Place<'_> {
        match self {
            Self::Path(path) => Place::Path(path.into()),
            Self::Elsewhere { source: Source::Object(_, key), .. } => Place::Stored(key.as_ref().into()),
            Self::Elsewhere { source: Source::Web(_, url), .. } => Place::Web(url.as_str().into()),
        }
    }

    /// Its length, if it is elsewhere.
    pub(super) fn length(&self) -> Option<u64> {
        match self {
            Self::Path(_) => None,
            Self::Elsewhere { length, .. } => Some(*length),
        }
    }

    /// All of its bytes.
    pub(super) fn bytes(&self) -> Result<u64> {
        match self {
            Self::Path(path) => Ok(path.metadata().with_context(|| format!("cannot read {self}"))?.len()),
            Self::Elsewhere { length, .. } => Ok(*length),
        }
    }

    pub(super) fn tar(&self) -> Result<Box<dyn ReadSeek>> {
        Ok(match self {
            Self::Path(path) => Box::new(std::fs::File::open(path)?),
            Self::Elsewhere { source, length } => Box::new(Remote::new(source.clone(), *length, TAR_WINDOW)),
        })
    }

    pub(super) fn parquet(&self) -> Result<Box<dyn FileReader>> {
        let cannot = || format!("cannot read {self} as Parquet");
        Ok(match self {
            Self::Path(path) => {
                let file = std::fs::File::open(path).with_context(cannot)?;
                Box::new(table::open(file).with_context(cannot)?)
            }
            Self::Elsewhere { source, length } => {
                let file = Remote::new(source.clone(), *length, PARQUET_WINDOW);
                Box::new(table::open(file).with_context(cannot)?)
            }
        })
    }
}

impl fmt::Display for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Elsewhere { source: Source::Object(_, key), .. } => write!(f, "{STORE}{key}"),
            Self::Elsewhere { source: Source::Web(_, url), .. } => url.fmt(f),
        }
    }
}
