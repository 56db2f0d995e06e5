//! Opens the object store that a `--store` names.

mod steady;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreScheme};
use url::Url;

use self::steady::Steady;
use crate::exit::{Ended, Exit};
use crate::metered::Metered;

/// What every role takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StoreArgs {
    /// The cluster's object store: a folder, or s3://, gs:// or az:// BUCKET/PREFIX with AWS_*, GOOGLE_* or AZURE_*
    /// variables
    #[arg(long, env = "GLEANER_STORE")]
    pub(crate) store: String,
}

/// Opens the store as [`open`] does, with its requests counted.
pub(crate) fn open_metered(location: &str) -> Result<Arc<dyn ObjectStore>> {
    Ok(Arc::new(Metered(open(location)?)))
}

/// Opens a folder (made if missing, written with fsync) or a bucket. Keys are relative to the URL's path.
///
/// # Errors
/// If the URL's scheme is none of these, or the store cannot be opened with what the environment says.
pub(crate) fn open(location: &str) -> Result<Arc<dyn ObjectStore>> {
    open_with(location, true)
}

/// Likewise, but a folder that is not there is not made.
///
/// # Errors
/// As [`open`], and if there is no such folder.
pub(crate) fn open_existing(location: &str) -> Result<Arc<dyn ObjectStore>> {
    if let Some(folder) = folder(location)?
        && !folder.is_dir()
    {
        return Err(Ended::error(Exit::NotFound, format!("--store {location}: there is no such folder")));
    }
    open(location)
}

/// Likewise, for what can be written again: a folder is written without fsync.
///
/// # Errors
/// As [`open`].
pub(crate) fn open_scratch(location: &str) -> Result<Arc<dyn ObjectStore>> {
    open_with(location, false)
}

/// Opens a bucket by one of the builders, which have nothing in common but their methods' names: as object_store's
/// `parse_url_opts` does, which does not say what it has built.
macro_rules! of_bucket {
    ($builder:ty, $url:expr, $variables:expr) => {{
        let options = std::env::vars().filter(|(name, _)| name.starts_with($variables));
        let known = options.filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value)));
        let builder = <$builder>::new().with_url($url.to_string());
        let builder = known.fold(builder, |builder, (key, value)| builder.with_config(key, value));
        prefix($url).and_then(|prefix| Ok(Steady::bucket(builder.build()?, prefix)))
    }};
}

/// What comes before all keys in a bucket.
fn prefix(url: &Url) -> object_store::Result<Key> {
    let (_, path) = ObjectStoreScheme::parse(url)?;
    Ok(Key::parse(path)?)
}

fn open_with(location: &str, fsync: bool) -> Result<Arc<dyn ObjectStore>> {
    if let Some(folder) = folder(location)? {
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make the store's folder {}", folder.display()))?;
        let store = LocalFileSystem::new_with_prefix(&folder)
            .with_context(|| format!("cannot open the store's folder {}", folder.display()))?;
        return Ok(Arc::new(Steady::folder(store, fsync)));
    }
    let url = Url::parse(location).map_err(|e| Ended::usage(format!("--store {location}: {e}")))?;
    let (opened, variables) = match url.scheme() {
        "s3" => (of_bucket!(AmazonS3Builder, &url, "AWS_"), "AWS_"),
        "gs" => (of_bucket!(GoogleCloudStorageBuilder, &url, "GOOGLE_"), "GOOGLE_"),
        "az" => (of_bucket!(MicrosoftAzureBuilder, &url, "AZURE_"), "AZURE_"),
        scheme => {
            let message =
                format!("--store {location}: {scheme}:// is no store; use a folder, file://, s3://, gs:// or az://");
            return Err(Ended::usage(message));
        }
    };
    let steady = opened
        .with_context(|| format!("cannot open the store {location}; its options come from {variables}* variables"))?;
    Ok(Arc::new(steady))
}

/// The folder that `location` names, if it names one.
pub(crate) fn folder(location: &str) -> Result<Option<PathBuf>> {
    if !location.contains("://") {
        return match location {
            "" => Err(Ended::usage("--store is empty")),
            path => Ok(Some(Path::new(path).to_owned())),
        };
    }
    match Url::parse(location) {
        Ok(url) if url.scheme() == "file" => {
            let path = url.to_file_path();
            path.map(Some).map_err(|()| Ended::usage(format!("--store {location}: write file:///an/absolute/path")))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::{ObjectStoreExt, PutPayload};

    #[tokio::test]
    async fn a_folder_is_made_and_its_path_and_file_url_are_the_same_store() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("a/b");
        let key = Key::from("x/y");
        open(&path.display().to_string()).expect("path").put(&key, PutPayload::from("1")).await.expect("put");
        let same = open(&format!("file://{}", path.display())).expect("url");
        assert_eq!(same.get(&key).await.expect("get").bytes().await.expect("bytes"), "1");
    }

    #[test]
    fn other_schemes_are_refused_with_the_ones_that_are_not() {
        for location in ["memory:///", "http://x/y", "ftp://x", "file://host/relative", ""] {
            let error = open(location).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.contains("--store"), "{location}: {error}");
        }
    }
}
