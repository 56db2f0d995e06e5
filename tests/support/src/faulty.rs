//! A store that fails on purpose.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
    UploadPart,
};

/// What goes wrong, and how often. By default nothing does.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// Only requests for keys under this prefix go wrong; the empty one is above all.
    pub under: Path,
    /// The share of requests that fail and have had no effect.
    pub failed: f64,
    /// The share of requests whose answer is lost: they fail and have had their effect.
    pub lost: f64,
    /// The share of listings that break off, with an error, after some of their entries.
    pub torn: f64,
    /// Requests are answered after up to so long.
    pub delay: Duration,
    /// Nothing can be written: the disk is full.
    pub full: bool,
    /// Objects of which one bit comes back flipped, the same one each time.
    pub damaged: BTreeSet<Path>,
}

/// How often something went wrong so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Injected {
    /// Requests that failed without an effect.
    pub failed: u64,
    /// Requests that had an effect and failed.
    pub lost: u64,
    /// Listings that broke off.
    pub torn: u64,
    /// Writes that were refused because the disk is full.
    pub refused: u64,
    /// Times that a damaged byte was read.
    pub damaged: u64,
}

/// Why a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    #[error("failed on purpose")]
    Failed,
    #[error("the answer is lost on purpose")]
    Lost,
    #[error("the listing breaks off on purpose")]
    Torn,
    #[error("no space is left, on purpose")]
    Full,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::Generic { store: "faulty", source: Box::new(fault) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    List,
    Write,
    Delete,
}

/// What goes wrong in stores, to be changed at any time. The same seed and requests in the same order give the same
/// faults.
#[derive(Debug, Clone)]
pub struct Faults(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    rules: Rules,
    random: fastrand::Rng,
    injected: Injected,
}

impl Faults {
    /// Nothing goes wrong yet.
    pub fn new(seed: u64) -> Self {
        let random = fastrand::Rng::with_seed(seed);
        Self(Arc::new(Mutex::new(State { rules: Rules::default(), random, injected: Injected::default() })))
    }

    /// From now on these rules hold.
    pub fn set(&self, rules: Rules) {
        self.state().rules = rules;
    }

    /// How often something went wrong so far.
    pub fn injected(&self) -> Injected {
        self.state().injected
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long one request takes, and what is wrong with it.
    fn decide(&self, kind: Kind, key: &Path) -> (Duration, Option<Fault>) {
        let State { rules, random, injected } = &mut *self.state();
        if !key.prefix_matches(&rules.under) {
            return (Duration::ZERO, None);
        }
        let delay = rules.delay.mul_f64(random.f64());
        let (fails, loses, tears) = (random.f64() < rules.failed, random.f64() < rules.lost, random.f64() < rules.torn);
        let fault = if rules.full && kind == Kind::Write {
            injected.refused += 1;
            Some(Fault::Full)
        } else if fails {
            injected.failed += 1;
            Some(Fault::Failed)
        } else if loses && matches!(kind, Kind::Write | Kind::Delete) {
            injected.lost += 1;
            Some(Fault::Lost)
        } else if tears && kind == Kind::List {
            injected.torn += 1;
            Some(Fault::Torn)
        } else {
            None
        };
        (delay, fault)
    }

    /// Lets `work` happen, or not.
    async fn request<T>(&self, kind: Kind, key: &Path, work: impl Future<Output = Result<T>>) -> Result<T> {
        let (delay, fault) = self.decide(kind, key);
        tokio::time::sleep(delay).await;
        match fault {
            None => work.await,
            Some(Fault::Lost) => {
                // Whatever came of it, nobody hears.
                let _ = work.await;
                Err(Fault::Lost.into())
            }
            Some(fault) => Err(fault.into()),
        }
    }

    /// Bytes of a damaged object, of which `range` was read.
    fn damage(&self, meta: &ObjectMeta, range: &Range<u64>, bytes: Bytes) -> Bytes {
        let at = meta.size / 2;
        if !range.contains(&at) {
            return bytes;
        }
        self.state().injected.damaged += 1;
        let mut bytes = BytesMut::from(bytes);
        bytes[(at - range.start) as usize] ^= 1;
        bytes.freeze()
    }

    fn listing<T: Send + 'static>(
        &self,
        prefix: Option<&Path>,
        entries: BoxStream<'static, Result<T>>,
    ) -> BoxStream<'static, Result<T>> {
        let (delay, fault) = self.decide(Kind::List, &prefix.cloned().unwrap_or_default());
        let entries = match fault {
            None => entries,
            Some(fault) => {
                let some = if fault == Fault::Torn { self.state().random.usize(..10) } else { 0 };
                entries.take(some).chain(stream::iter([Err(fault.into())])).boxed()
            }
        };
        tokio::time::sleep(delay).map(|()| entries).flatten_stream().boxed()
    }
}

/// Another store whose requests go wrong as its [`Faults`] say.
#[derive(Debug, Clone)]
pub struct FaultyStore {
    store: Arc<dyn ObjectStore>,
    faults: Faults,
}

impl FaultyStore {
    /// Hands all requests that do not fail on to `store`.
    pub fn new(store: Arc<dyn ObjectStore>, faults: Faults) -> Self {
        Self { store, faults }
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with faults", self.store)
    }
}

#[async_trait::async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let put = self.store.put_opts(location, payload, options);
        self.faults.request(Kind::Write, location, put).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let begin = self.store.put_multipart_opts(location, options);
        let upload = self.faults.request(Kind::Write, location, begin).await?;
        Ok(Box::new(FaultyUpload { upload, location: location.clone(), faults: self.faults.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let result = self.faults.request(Kind::Read, location, self.store.get_opts(location, options)).await?;
        if head || !self.faults.state().rules.damaged.contains(location) {
            return Ok(result);
        }
        let (meta, range, attributes) = (result.meta.clone(), result.range.clone(), result.attributes.clone());
        let extensions = result.extensions.clone();
        let bytes = self.faults.damage(&meta, &range, result.bytes().await?);
        let payload = GetResultPayload::Stream(stream::iter([Ok(bytes)]).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let mut found = Vec::new();
        for range in ranges {
            let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
            found.push(self.get_opts(location, options).await?.bytes().await?);
        }
        Ok(found)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let delete = move |location: Result<Path>| {
            let this = this.clone();
            async move {
                let location = location?;
                this.faults.request(Kind::Delete, &location, this.store.delete(&location)).await?;
                Ok(location)
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.faults.listing(prefix, self.store.list(prefix))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.faults.listing(prefix, self.store.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let list = self.store.list_with_delimiter(prefix);
        self.faults.request(Kind::List, &prefix.cloned().unwrap_or_default(), list).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.faults.request(Kind::Write, to, self.store.copy_opts(from, to, options)).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.faults.request(Kind::Write, to, self.store.rename_opts(from, to, options)).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    upload: Box<dyn MultipartUpload>,
    location: Path,
    faults: Faults,
}

#[async_trait::async_trait]
#[deny(clippy::missing_trait_methods)]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (faults, location, part) = (self.faults.clone(), self.location.clone(), self.upload.put_part(data));
        Box::pin(async move { faults.request(Kind::Write, &location, part).await })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.faults.request(Kind::Write, &self.location, self.upload.complete()).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.faults.request(Kind::Delete, &self.location, self.upload.abort()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;

    fn faulty() -> (Arc<InMemory>, FaultyStore, Faults) {
        let (store, faults) = (Arc::new(InMemory::new()), Faults::new(1));
        (Arc::clone(&store), FaultyStore::new(store, faults.clone()), faults)
    }

    fn fault<T: fmt::Debug>(result: Result<T>) -> Fault {
        match result.expect_err("it must fail") {
            Error::Generic { source, .. } => *source.downcast_ref().expect("a fault"),
            other => panic!("{other}"),
        }
    }

    #[tokio::test]
    async fn requests_fail_before_and_after_their_effect() {
        let (store, faulty, faults) = faulty();
        let key = Path::from("a/b");
        faults.set(Rules { failed: 1.0, ..Rules::default() });
        assert_eq!(fault(faulty.put(&key, "1".into()).await), Fault::Failed);
        assert!(store.head(&key).await.is_err(), "it had no effect");
        faults.set(Rules { lost: 1.0, ..Rules::default() });
        assert_eq!(fault(faulty.put(&key, "1".into()).await), Fault::Lost);
        assert!(store.head(&key).await.is_ok(), "it had its effect");
        assert!(faulty.get(&key).await.is_ok(), "an answer that is lost was to a write");
        assert_eq!(fault(faulty.delete(&key).await), Fault::Lost);
        assert!(store.head(&key).await.is_err(), "it had its effect");
        faults.set(Rules { failed: 1.0, under: Path::from("c"), ..Rules::default() });
        faulty.put(&key, "1".into()).await.expect("another prefix");
        assert_eq!(faults.injected(), Injected { failed: 1, lost: 2, ..Injected::default() });
    }

    #[tokio::test]
    async fn a_full_store_takes_nothing_and_gives_what_it_has() {
        let (_, faulty, faults) = faulty();
        let key = Path::from("a");
        faulty.put(&key, "1".into()).await.expect("there is room");
        faults.set(Rules { full: true, ..Rules::default() });
        assert_eq!(fault(faulty.put(&key, "2".into()).await), Fault::Full);
        assert_eq!(faulty.get(&key).await.expect("it is there").bytes().await.expect("bytes"), "1");
        faults.set(Rules::default());
        faulty.put(&key, "2".into()).await.expect("there is room again");
    }

    #[tokio::test]
    async fn a_damaged_object_has_the_same_wrong_bit_however_it_is_read() {
        let (_, faulty, faults) = faulty();
        let key = Path::from("a");
        faulty.put(&key, "0123456789".into()).await.expect("a store");
        faults.set(Rules { damaged: [key.clone()].into(), ..Rules::default() });
        for _ in 0..2 {
            assert_eq!(faulty.get(&key).await.expect("it is there").bytes().await.expect("bytes"), "0123446789");
        }
        assert_eq!(faulty.get_range(&key, 4..7).await.expect("bytes"), "446");
        assert_eq!(faulty.get_ranges(&key, &[0..3, 5..6]).await.expect("bytes"), ["012", "4"]);
        assert_eq!(faults.injected().damaged, 4);
    }

    #[tokio::test]
    async fn listings_break_off_and_the_same_seed_does_the_same() {
        let run = async || {
            let (_, faulty, faults) = faulty();
            for n in 0..20 {
                faulty.put(&Path::from(format!("a/{n}")), "1".into()).await.expect("a store");
            }
            faults.set(Rules { torn: 0.5, failed: 0.1, ..Rules::default() });
            let mut seen = Vec::new();
            for _ in 0..20 {
                let entries: Vec<Result<ObjectMeta>> = faulty.list(None).collect().await;
                let found = entries.iter().filter(|entry| entry.is_ok()).count();
                assert_eq!(found == entries.len(), found == 20, "one that broke off says so");
                seen.push(found);
            }
            (seen, faults.injected())
        };
        let (seen, injected) = run().await;
        assert!(injected.torn > 0 && injected.failed > 0 && seen.contains(&20), "{seen:?} {injected:?}");
        assert_eq!(run().await, (seen, injected));
    }
}
