//! Access to the object store: whole objects, checked by digest, with retries.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::shard::sha256_hex;
use tracing::warn;

/// A request fails after this many attempts ...
const ATTEMPTS: u32 = 5;
/// ... with this pause after the first, and four times as long a one after each later ...
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 100 });
/// ... each of which may take this long for a block ...
pub(super) const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);
/// ... and for a whole object, such as a checkpoint of a GB.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(600);

/// The whole object, if its bytes have this SHA-256.
pub(crate) async fn get_checked(store: &Arc<dyn ObjectStore>, key: &str, sha256: &str) -> Result<Bytes> {
    let get = || {
        let (store, path) = (store.clone(), Path::from(key));
        async move { store.get(&path).await?.bytes().await }
    };
    let bytes = retried(key, WHOLE_TIMEOUT, get).await.with_context(|| format!("failed to read {key}"))?;
    let found = sha256_hex(&bytes);
    if found != sha256 {
        return Err(Damaged { key: key.to_owned(), found, expected: sha256.to_owned() }.into());
    }
    Ok(bytes)
}

/// An object that is not what was written.
#[derive(Debug, thiserror::Error)]
#[error("{key} is damaged: its SHA-256 is {found}, it should be {expected}")]
struct Damaged {
    key: String,
    found: String,
    expected: String,
}

/// Whether the error means that an object is damaged or gone, so that reading it again does not help.
pub(crate) fn is_damage(error: &anyhow::Error) -> bool {
    let gone = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(object_store::Error::NotFound { .. }))
    };
    error.chain().any(|cause| cause.is::<Damaged>() || gone(cause))
}

/// Writes an object, and replaces an existing one.
pub(crate) async fn put(store: &Arc<dyn ObjectStore>, key: &str, bytes: Bytes) -> Result<()> {
    let put = || {
        let (store, path, bytes) = (store.clone(), Path::from(key), bytes.clone());
        async move { store.put(&path, bytes.into()).await.map(drop) }
    };
    retried(key, WHOLE_TIMEOUT, put).await.with_context(|| format!("failed to write {key}"))
}

/// Puts files into a folder; returns their digests.
pub(crate) async fn put_files<const N: usize>(
    store: &Arc<dyn ObjectStore>,
    folder: &str,
    files: [(impl AsRef<str>, Vec<u8>); N],
) -> Result<HashMap<String, String>> {
    let mut digests = HashMap::new();
    for (name, bytes) in files {
        let name = name.as_ref();
        let bytes = Bytes::from(bytes);
        let copy = bytes.clone();
        let digest = tokio::task::spawn_blocking(move || sha256_hex(&copy)).await?;
        digests.insert(name.to_owned(), digest);
        put(store, &format!("{folder}/{name}"), bytes).await?;
    }
    Ok(digests)
}

/// Retries with exponential backoff, also if an object is missing, since stores may be eventually consistent.
pub(super) async fn retried<T, F>(key: &str, timeout: Duration, attempt: impl Fn() -> F) -> Result<T>
where
    F: Future<Output = object_store::Result<T>>,
{
    let mut tried = 1;
    loop {
        let error = match tokio::time::timeout(timeout, attempt()).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => anyhow::Error::from(error),
            Err(_) => anyhow::anyhow!("no answer within {} s", timeout.as_secs()),
        };
        if tried == ATTEMPTS {
            return Err(error.context(format!("given up after {ATTEMPTS} attempts")));
        }
        warn!(key, attempt = tried, error = format!("{error:#}"), "store failed; trying again");
        tokio::time::sleep(PAUSE * 4u32.pow(tried - 1)).await;
        tried += 1;
    }
}
