//! The simulated store: objects in memory, requests that fail before or after they have had their effect, and processes
//! that die in the middle of what they write.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::Hasher;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use twox_hash::XxHash64;

/// Of a hundred requests so many fail and have no effect, and so many have their effect and fail.
const FAILED: u64 = 3;
const LOST: u64 = 3;

/// What all processes share.
#[derive(Debug)]
pub(super) struct Disk {
    objects: InMemory,
    seed: u64,
    /// A planted bug: puts that must not overwrite do.
    overwrites: bool,
    faulty: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Requests by key.
    requests: BTreeMap<String, u64>,
    /// What each index said first.
    indexes: BTreeMap<String, u64>,
    /// Indexes that were overwritten.
    overwritten: u64,
}

/// One process's way to the store.
#[derive(Debug, Clone)]
pub(super) struct View(Arc<Process>);

#[derive(Debug)]
struct Process {
    disk: Arc<Disk>,
    /// Writes until it dies.
    left: AtomicI64,
}

enum Fault {
    Failed,
    Lost,
}

impl Disk {
    pub(super) fn new(seed: u64, overwrites: bool) -> Arc<Self> {
        let (objects, faulty, seen) = (InMemory::new(), AtomicBool::new(true), Mutex::default());
        Arc::new(Self { objects, seed, overwrites, faulty, seen })
    }

    /// From now on no request fails.
    pub(super) fn mend(&self) {
        self.faulty.store(false, Ordering::Relaxed);
    }

    pub(super) fn overwritten(&self) -> u64 {
        self.seen().overwritten
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What goes wrong hangs on the seed, the key, and how often it was asked for: not on what else happens.
    fn fault(&self, key: &Path) -> Option<Fault> {
        let mut seen = self.seen();
        let requests = seen.requests.entry(key.to_string()).or_default();
        *requests += 1;
        let dice = digest(self.seed, &[key.as_ref().as_bytes(), &requests.to_le_bytes()]) % 100;
        match self.faulty.load(Ordering::Relaxed) {
            true if dice < FAILED => Some(Fault::Failed),
            true if dice < FAILED + LOST => Some(Fault::Lost),
            _ => None,
        }
    }
}

impl View {
    pub(super) fn new(disk: &Arc<Disk>) -> Self {
        Self(Arc::new(Process { disk: Arc::clone(disk), left: AtomicI64::new(i64::MAX) }))
    }

    /// The process dies with its so manieth write from now on.
    pub(super) fn dies_after(&self, writes: i64) {
        self.0.left.store(writes, Ordering::Relaxed);
    }

    pub(super) fn is_dead(&self) -> bool {
        self.0.left.load(Ordering::Relaxed) <= 0
    }

    async fn request<T>(&self, writes: bool, key: &Path, work: impl Future<Output = Result<T>>) -> Result<T> {
        // Whoever is dead must not wait until it may try again: this error is final.
        let dead = || Error::PermissionDenied { path: key.to_string(), source: "the process is dead".into() };
        let fault = self.0.disk.fault(key);
        if self.is_dead() {
            return Err(dead());
        }
        if writes && self.0.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            // Half of those that die have had their last effect.
            if self.0.disk.seed.is_multiple_of(2) {
                let _ = work.await;
            }
            return Err(dead());
        }
        let failed = |what: &'static str| Error::Generic { store: "simulated", source: what.into() };
        match fault {
            None => work.await,
            Some(Fault::Lost) if writes => {
                let _ = work.await;
                Err(failed("the answer is lost"))
            }
            Some(_) => Err(failed("it failed")),
        }
    }
}

/// Of bytes, under a seed.
pub(super) fn digest(seed: u64, parts: &[&[u8]]) -> u64 {
    let mut hasher = XxHash64::with_seed(seed);
    parts.iter().for_each(|part| hasher.write(part));
    hasher.finish()
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated")
    }
}

#[tonic::async_trait]
impl ObjectStore for View {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let disk = &self.0.disk;
        let options = if disk.overwrites { PutOptions::default() } else { options };
        let pieces: Vec<&[u8]> = payload.iter().map(|piece| &piece[..]).collect();
        let said = digest(0, &pieces);
        self.request(true, location, async {
            let put = disk.objects.put_opts(location, payload, options).await?;
            if location.as_ref().contains("/index/") {
                let mut seen = disk.seen();
                let first = *seen.indexes.entry(location.to_string()).or_insert(said);
                seen.overwritten += u64::from(first != said);
            }
            Ok(put)
        })
        .await
    }

    async fn put_multipart_opts(&self, at: &Path, how: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.0.disk.objects.put_multipart_opts(at, how).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.request(false, location, self.0.disk.objects.get_opts(location, options)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let delete = move |location: Result<Path>| {
            let this = this.clone();
            async move {
                let location = location?;
                let one = stream::iter([Ok(location.clone())]).boxed();
                let deleted = async { this.0.disk.objects.delete_stream(one).collect::<Vec<_>>().await.remove(0) };
                this.request(true, &location, deleted).await
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned());
        let listed = async move {
            let all = async { Ok(this.0.disk.objects.list(prefix.as_ref()).collect::<Vec<_>>().await) };
            this.request(false, &prefix.clone().unwrap_or_default(), all).await
        };
        let entries = stream::once(listed).map(|listed| match listed {
            Ok(entries) => stream::iter(entries),
            Err(error) => stream::iter(vec![Err(error)]),
        });
        entries.flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let key = prefix.cloned().unwrap_or_default();
        self.request(false, &key, self.0.disk.objects.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.request(true, from, self.0.disk.objects.copy_opts(from, to, options)).await
    }
}
