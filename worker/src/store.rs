//! Operations on the store, which are tried again while their failure may pass.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use backon::BackoffBuilder;
use bytes::Bytes;
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt, Result};
use tokio::time::Instant;

use crate::backoff::backoff;

/// No try begins later than this after the first one. A store's own retries (S3 has some) are within it.
const RETRY_TIME: Duration = Duration::from_secs(300);

/// Why operations under way have failed so far, by their keys. A worker has one store.
static FAILING: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());

/// An operation that is tried again.
struct Retrying<'a>(&'a str);

impl Retrying<'_> {
    fn because(&self, error: &Error) {
        failing(|all| drop(all.insert(self.0.to_owned(), error.to_string())));
    }
}

impl Drop for Retrying<'_> {
    fn drop(&mut self) {
        failing(|all| drop(all.remove(self.0)));
    }
}

fn failing<T>(look: impl FnOnce(&mut BTreeMap<String, String>) -> T) -> T {
    look(&mut FAILING.lock().unwrap_or_else(PoisonError::into_inner))
}

/// What the store does not do at present, although it is tried again and again.
pub(crate) fn trouble() -> Option<String> {
    failing(|all| all.first_key_value().map(|(key, error)| format!("{key}: {error}")))
}

/// Reads an object whole.
pub(crate) async fn read(store: &dyn ObjectStore, key: &str) -> Result<Bytes> {
    let path = Path::from(key);
    with_retries(key, || async { store.get(&path).await?.bytes().await }).await
}

/// What `operation` returns once it succeeds, or its failure when that stays or has lasted for minutes.
pub(crate) async fn with_retries<T, F>(key: &str, mut operation: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let end = Instant::now() + RETRY_TIME;
    let mut delays = backoff(Duration::from_millis(250), Duration::from_secs(15)).build();
    let retrying = Retrying(key);
    loop {
        match (operation().await, delays.next()) {
            (Err(error), Some(delay)) if may_pass(&error) && Instant::now() + delay < end => {
                tracing::warn!(key, %error, ?delay, "the store failed; trying again");
                retrying.because(&error);
                tokio::time::sleep(delay).await;
            }
            (result, _) => return result,
        }
    }
}

/// Whether the same operation may succeed later: all but what the store refuses for its own good reasons.
fn may_pass(error: &Error) -> bool {
    !matches!(
        error,
        Error::NotFound { .. }
            | Error::InvalidPath { .. }
            | Error::NotSupported { .. }
            | Error::NotImplemented { .. }
            | Error::PermissionDenied { .. }
            | Error::Unauthenticated { .. }
            | Error::UnknownConfigurationKey { .. }
    )
}
