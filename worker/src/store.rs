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

/// A worker for which the store has failed for so long is not ready.
const LONG: Duration = Duration::from_secs(30);

/// Operations under way that have failed so far, by their keys. A worker has one store.
static FAILING: Mutex<BTreeMap<String, Failing>> = Mutex::new(BTreeMap::new());

/// Why, and since when.
struct Failing {
    error: String,
    since: Instant,
}

/// An operation that is tried again.
struct Retrying<'a>(&'a str);

impl Retrying<'_> {
    fn because(&self, error: &Error) {
        let (error, now) = (error.to_string(), Instant::now());
        failing(|all| {
            let since = all.get(self.0).map_or(now, |before| before.since);
            all.insert(self.0.to_owned(), Failing { error, since });
        });
    }
}

impl Drop for Retrying<'_> {
    fn drop(&mut self) {
        failing(|all| drop(all.remove(self.0)));
    }
}

fn failing<T>(look: impl FnOnce(&mut BTreeMap<String, Failing>) -> T) -> T {
    look(&mut FAILING.lock().unwrap_or_else(PoisonError::into_inner))
}

/// What the store does not do at present, although it is tried again and again.
pub(crate) fn trouble() -> Option<String> {
    failing(|all| all.first_key_value().map(|(key, failing)| format!("{key}: {}", failing.error)))
}

/// Whether the store has not done something for long, although it was tried again and again.
pub(crate) fn fails() -> bool {
    let now = Instant::now();
    failing(|all| all.values().any(|failing| now.duration_since(failing.since) >= LONG))
}

/// Reads an object whole.
pub(crate) async fn read(store: &dyn ObjectStore, key: &str) -> Result<Bytes> {
    let path = Path::from(key);
    with_retries(key, || async { store.get(&path).await?.bytes().await }).await
}

/// What `operation` upon the store returns once it succeeds, or its failure when that stays or has lasted for minutes.
/// Meanwhile it is told to the coordinator.
///
/// # Errors
/// If the operation's failure stays.
pub async fn with_retries<T, F>(key: &str, mut operation: impl FnMut() -> F) -> Result<T>
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_fails_for_long_is_told_of_until_what_failed_has_ended() {
        let error = || Error::Generic { store: "test", source: "full".into() };
        let retrying = Retrying("tests/a_store_that_fails");
        retrying.because(&error());
        assert!(!fails() && trouble().is_some(), "it may pass");
        let long_ago = Instant::now().checked_sub(LONG).expect("the machine runs for longer");
        failing(|all| all.values_mut().for_each(|failing| failing.since = long_ago));
        retrying.because(&error());
        assert!(fails(), "a further try that fails is the same failure");
        drop(retrying);
        assert!(!fails());
    }
}
