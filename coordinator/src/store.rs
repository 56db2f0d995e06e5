//! The object store as the coordinator uses it: whole small objects, put-if-absent with a nonce, listings; each with
//! retries.

use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use futures::future::ready;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    Error as Cause, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, WriteMultipart,
};
use proto::StoredOnce;
use sha2::{Digest, Sha256};
use tracing::warn;

/// Further tries of one operation, with growing pauses: about three seconds in all, beside the client's own retries.
const RETRIES: usize = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 100 });

/// Bytes of a part of a large object, and how many of them are written at once.
const PART: usize = 8 << 20;
const PARTS_AT_ONCE: usize = 4;

/// Objects that are read at the same time.
const PARALLEL: usize = 32;

/// Objects that are deleted by one request, where the store takes so many.
const DELETED_AT_ONCE: usize = 1000;

/// No single request to the store takes longer in earnest.
const REQUEST_DEADLINE: Duration = Duration::from_secs(120);

/// An operation that the store did not do, even when asked again.
#[derive(Debug, thiserror::Error)]
#[error("store: {operation} {key}: {cause}")]
pub(crate) struct StoreError {
    operation: &'static str,
    key: String,
    cause: String,
}

impl StoreError {
    pub(crate) fn new(operation: &'static str, key: &str, cause: impl std::fmt::Display) -> Self {
        Self { operation, key: key.to_owned(), cause: cause.to_string() }
    }
}

/// The result of a put-if-absent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Created {
    /// The object is ours.
    Won,
    /// Somebody else's object, with these bytes, is there.
    Lost(Bytes),
}

/// A handle; clones share the connection.
#[derive(Debug, Clone)]
pub(crate) struct Store(Arc<dyn ObjectStore>);

/// 128 random bits: tells the writer of an object that its put won although its answer was lost.
pub(crate) fn nonce() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// Milliseconds since 1970, for people.
#[allow(clippy::disallowed_methods, reason = "nothing is decided by it; it is shown to people")]
pub(crate) fn wall_millis() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// A large object that is being written; it is there once it is finished.
pub(crate) struct Upload {
    key: String,
    parts: WriteMultipart,
}

impl Upload {
    /// Adds bytes, as fast as the store takes them.
    pub(crate) async fn push(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.parts.wait_for_capacity(PARTS_AT_ONCE).await.map_err(|error| StoreError::new("put", &self.key, error))?;
        self.parts.put(bytes);
        Ok(())
    }

    pub(crate) async fn finish(self) -> Result<(), StoreError> {
        self.parts.finish().await.map(drop).map_err(|error| StoreError::new("put", &self.key, error))
    }

    /// Nothing is left of it, unless the store fails.
    pub(crate) async fn abort(self) {
        if let Err(error) = self.parts.abort().await {
            warn!(key = self.key, %error, "what was written of an object cannot be removed");
        }
    }
}

impl Store {
    pub(crate) fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self(store)
    }

    /// What the store calls itself.
    pub(crate) fn name(&self) -> String {
        self.0.to_string()
    }

    /// The whole object, or None if there is none.
    pub(crate) async fn get(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        let path = Path::from(key);
        retry("get", key, || async {
            let read = async { self.0.get(&path).await?.bytes().await };
            match read.await {
                Ok(bytes) => Ok(Some(bytes)),
                Err(Cause::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// What a listing says of an object; None if there is none.
    pub(crate) async fn head(&self, key: &str) -> Result<Option<ObjectMeta>, StoreError> {
        let path = Path::from(key);
        retry("head", key, || async {
            match self.0.head(&path).await {
                Ok(object) => Ok(Some(object)),
                Err(Cause::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// SHA-256 of an object, in hex; None if there is none.
    pub(crate) async fn digest(&self, key: &str) -> Result<Option<String>, StoreError> {
        let Some(mut stream) = self.stream(key, None).await? else { return Ok(None) };
        let mut hasher = Sha256::new();
        while let Some(bytes) = stream.next().await {
            hasher.update(&bytes.map_err(|cause| StoreError::new("get", key, cause))?);
        }
        Ok(Some(hex::encode(hasher.finalize())))
    }

    /// An object that must exist.
    pub(crate) async fn need(&self, key: &str) -> Result<Bytes, StoreError> {
        let gone = || StoreError::new("get", key, "it is named by another object but does not exist");
        self.get(key).await?.ok_or_else(gone)
    }

    /// The object, or a range of it, as a stream of its bytes.
    pub(crate) async fn stream(
        &self,
        key: &str,
        range: Option<GetRange>,
    ) -> Result<Option<futures::stream::BoxStream<'static, Result<Bytes, Cause>>>, StoreError> {
        let path = Path::from(key);
        retry("get", key, || async {
            let options = GetOptions { range: range.clone(), ..GetOptions::default() };
            match self.0.get_opts(&path, options).await {
                Ok(found) => Ok(Some(found.into_stream())),
                Err(Cause::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Writes an object whatever is there; for keys that nobody else writes.
    pub(crate) async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        let path = Path::from(key);
        retry("put", key, || async { self.0.put(&path, bytes.clone().into()).await.map(drop) }).await
    }

    /// Begins to write a large object, whatever is there, for a key that nobody else writes.
    pub(crate) async fn upload(&self, key: &str) -> Result<Upload, StoreError> {
        let path = Path::from(key);
        let upload = retry("put", key, || self.0.put_multipart(&path)).await?;
        Ok(Upload { key: key.to_owned(), parts: WriteMultipart::new_with_chunk_size(upload, PART) })
    }

    /// Put-if-absent.
    pub(crate) async fn create(&self, key: &str, object: &impl StoredOnce) -> Result<Created, StoreError> {
        self.create_bytes(key, object.to_json().into(), object.nonce()).await
    }

    /// Put-if-absent. `nonce` must occur in `bytes`: after an error, or if the object turns out to be there already, it
    /// is read back, and our own nonce in it says that an earlier try of ours had won.
    async fn create_bytes(&self, key: &str, bytes: Bytes, nonce: &str) -> Result<Created, StoreError> {
        let path = Path::from(key);
        retry("create", key, || async {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let Err(error) = self.0.put_opts(&path, bytes.clone().into(), options).await else {
                return Ok(Created::Won);
            };
            let read = async { self.0.get(&path).await?.bytes().await };
            match read.await {
                Ok(found) if contains(&found, nonce) => Ok(Created::Won),
                Ok(found) => Ok(Created::Lost(found)),
                Err(_) => Err(error),
            }
        })
        .await
    }

    /// Put-if-absent of bytes that are the same whoever writes them. False: other bytes are there.
    pub(crate) async fn create_same(&self, key: &str, bytes: Bytes) -> Result<bool, StoreError> {
        Ok(match self.create_bytes(key, bytes.clone(), &nonce()).await? {
            Created::Won => true,
            Created::Lost(found) => found == bytes,
        })
    }

    /// Keys under a folder, at any depth, in order.
    pub(crate) async fn list(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let path = Path::from(folder);
        let mut keys: Vec<String> = retry("list", folder, || async {
            self.0.list(Some(&path)).map_ok(|meta| meta.location.to_string()).try_collect().await
        })
        .await?;
        keys.sort_unstable();
        Ok(keys)
    }

    /// The objects under a folder, at any depth, with their lengths and times.
    pub(crate) async fn objects(&self, folder: &str) -> Result<Vec<ObjectMeta>, StoreError> {
        let path = Path::from(folder);
        retry("list", folder, || async { self.0.list(Some(&path)).try_collect().await }).await
    }

    /// That no listing has an object which was not found.
    pub(crate) async fn confirm_gone(&self, key: &str) -> Result<(), StoreError> {
        let folder = key.rsplit_once('/').map_or("", |(folder, _)| folder);
        match self.list(folder).await?.iter().any(|there| there == key) {
            true => Err(StoreError::new("get", key, "it is listed, but cannot be found")),
            false => Ok(()),
        }
    }

    /// Names of a folder's folders, in order.
    pub(crate) async fn folders(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let path = Path::from(folder);
        let listed = retry("list", folder, || async { self.0.list_with_delimiter(Some(&path)).await }).await?;
        let mut names: Vec<String> =
            listed.common_prefixes.iter().filter_map(|p| p.filename().map(str::to_owned)).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Keys of the objects that are in a folder itself, in order.
    pub(crate) async fn files(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let path = Path::from(folder);
        let listed = retry("list", folder, || async { self.0.list_with_delimiter(Some(&path)).await }).await?;
        let mut keys: Vec<String> = listed.objects.iter().map(|meta| meta.location.to_string()).collect();
        keys.sort_unstable();
        Ok(keys)
    }

    /// Reads objects in the order of their keys, some ahead of what is taken; those that do not exist are left out.
    pub(crate) fn get_each(&self, keys: Vec<String>) -> impl Stream<Item = Result<(String, Bytes), StoreError>> {
        futures::stream::iter(keys)
            .map(move |key| async move { Ok(self.get(&key).await?.map(|bytes| (key, bytes))) })
            .buffered(PARALLEL)
            .try_filter_map(|found| async move { Ok(found) })
    }

    /// Reads a few objects at once; those that do not exist are left out.
    pub(crate) async fn get_all(&self, keys: Vec<String>) -> Result<Vec<(String, Bytes)>, StoreError> {
        self.get_each(keys).try_collect().await
    }

    /// Copies an object that must exist, whatever is there.
    pub(crate) async fn copy(&self, from: &str, to: &str) -> Result<(), StoreError> {
        let (source, target) = (Path::from(from), Path::from(to));
        retry("copy", from, || self.0.copy(&source, &target)).await
    }

    /// Removes objects; those that do not exist are no error.
    pub(crate) async fn delete_all(&self, keys: Vec<String>) -> Result<(), StoreError> {
        for keys in keys.chunks(DELETED_AT_ONCE) {
            retry("delete", &keys[0], || {
                let paths = futures::stream::iter(keys.to_vec()).map(|key| Ok(Path::from(key))).boxed();
                let there = |done: &Result<_, Cause>| ready(!matches!(done, Err(Cause::NotFound { .. })));
                self.0.delete_stream(paths).filter(there).try_for_each(|_| ready(Ok(())))
            })
            .await?;
        }
        Ok(())
    }

    /// Proves that this store has put-if-absent: of 16 racing puts exactly one may win. Some stores ignore the
    /// condition silently, and every decision of the cluster would be lost on them.
    pub(crate) async fn check(&self) -> anyhow::Result<()> {
        const RACERS: usize = 16;
        let path = Path::from(format!("coordinator/check/{}", nonce()));
        let race = futures::future::join_all((0..RACERS).map(|racer| {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let payload = Bytes::from(racer.to_string());
            async { self.0.put_opts(&path, payload.into(), options).await }
        }));
        let results = tokio::time::timeout(REQUEST_DEADLINE, race)
            .await
            .map_err(|_| anyhow::anyhow!("the store {self_} does not answer", self_ = self.name()))?;
        let winners = results.iter().filter(|result| result.is_ok()).count();
        // The winner's answer may be lost: it tries again, and is told that somebody, itself, was first.
        let has_one = winners == 1 || winners == 0 && self.get(path.as_ref()).await?.is_some();
        let cleaned = self.delete_all(vec![path.to_string()]).await;
        let broken = results.into_iter().filter_map(Result::err).find(|e| !lost(e));
        match (winners, broken) {
            (_, None) if has_one => Ok(cleaned?),
            (2.., _) => anyhow::bail!(
                "the store {} has no put-if-absent: {winners} of {RACERS} racing puts of one key won, where one must. \
                 Use a store that honours `If-None-Match: *` (S3, GCS, Azure, a local folder)",
                self.name()
            ),
            (_, Some(error)) => anyhow::bail!("the store {} cannot be used: {error}", self.name()),
            (_, None) => {
                anyhow::bail!("the store {} has no put-if-absent: none of {RACERS} racing puts won", self.name())
            }
        }
    }
}

/// Whether a put-if-absent was refused because somebody else was first. S3 answers 409 (conflict) while a race is
/// undecided.
fn lost(error: &Cause) -> bool {
    matches!(error, Cause::AlreadyExists { .. } | Cause::Precondition { .. }) || error.to_string().contains("Conflict")
}

fn contains(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|window| window == word.as_bytes())
}

/// Asks again after errors that another try may mend.
async fn retry<T, F: Future<Output = Result<T, Cause>>>(
    operation: &'static str,
    key: &str,
    attempt: impl Fn() -> F,
) -> Result<T, StoreError> {
    let once = || async {
        let silent = |_| Cause::Generic { store: "coordinator", source: "no answer in time".into() };
        tokio::time::timeout(REQUEST_DEADLINE, attempt()).await.map_err(silent)?
    };
    let pauses = ExponentialBuilder::new().with_min_delay(FIRST_PAUSE).with_factor(2.0).with_max_times(RETRIES);
    let warn = |cause: &Cause, pause| warn!(operation, key, %cause, ?pause, "store error, trying again");
    let done = once.retry(pauses).when(|cause| !is_hopeless(cause)).notify(warn).await;
    done.map_err(|cause| StoreError::new(operation, key, cause))
}

fn is_hopeless(error: &Cause) -> bool {
    matches!(
        error,
        Cause::InvalidPath { .. }
            | Cause::NotSupported { .. }
            | Cause::NotImplemented { .. }
            | Cause::PermissionDenied { .. }
            | Cause::Unauthenticated { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream::BoxStream;
    use object_store::memory::InMemory;
    use object_store::{
        CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, PutMultipartOptions, PutPayload, PutResult,
        Result,
    };

    /// What a store answers to a put-if-absent.
    #[derive(Debug)]
    enum Odd {
        /// Takes every put, whatever its condition: what some S3 servers do.
        Careless(InMemory),
        /// Tells the winner that somebody was first: what a client hears that tries again, since the first answer was
        /// lost.
        Deaf(InMemory),
    }

    impl Odd {
        fn store(&self) -> &InMemory {
            let (Self::Careless(store) | Self::Deaf(store)) = self;
            store
        }
    }

    impl std::fmt::Display for Odd {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Odd")
        }
    }

    #[tonic::async_trait]
    impl ObjectStore for Odd {
        async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
            match self {
                Self::Careless(store) => store.put_opts(location, payload, PutOptions::default()).await,
                Self::Deaf(store) => {
                    store.put_opts(location, payload, options).await?;
                    Err(Cause::AlreadyExists { path: location.to_string(), source: "it is there".into() })
                }
            }
        }

        async fn put_multipart_opts(&self, at: &Path, how: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
            self.store().put_multipart_opts(at, how).await
        }

        async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
            self.store().get_opts(location, options).await
        }

        fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
            self.store().delete_stream(locations)
        }

        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            self.store().list(prefix)
        }

        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
            self.store().list_with_delimiter(prefix).await
        }

        async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
            self.store().copy_opts(from, to, options).await
        }
    }

    #[tokio::test]
    async fn a_store_that_ignores_put_if_absent_is_refused_with_the_way_out() {
        let refusal = Store::new(Arc::new(Odd::Careless(InMemory::new()))).check().await.expect_err("all puts win");
        let said = refusal.to_string();
        assert!(said.contains("16 of 16 racing puts") && said.contains("If-None-Match"), "{said}");
    }

    #[tokio::test]
    async fn a_race_whose_winner_hears_that_it_has_lost_proves_as_much() {
        let store = Store::new(Arc::new(Odd::Deaf(InMemory::new())));
        store.check().await.expect("one of them is there");
        assert!(store.list("coordinator").await.expect("lists").is_empty());
    }

    #[tokio::test]
    async fn a_put_that_is_retried_after_it_won_has_won() {
        let store = Store::new(Arc::new(InMemory::new()));
        assert_eq!(store.create_bytes("a/1", Bytes::from("x mine"), "mine").await.expect("works"), Created::Won);
        assert_eq!(store.create_bytes("a/1", Bytes::from("y mine"), "mine").await.expect("works"), Created::Won);
        let lost = store.create_bytes("a/1", Bytes::from("other"), "other").await.expect("works");
        assert_eq!(lost, Created::Lost(Bytes::from("x mine")));
    }

    #[tokio::test]
    async fn a_store_with_put_if_absent_passes_the_check_and_is_left_clean() {
        let store = Store::new(Arc::new(InMemory::new()));
        store.check().await.expect("memory has put-if-absent");
        assert!(store.list("coordinator").await.expect("lists").is_empty());
    }
}
