//! The datasets: what is known of each, and the work on them (creation, commits, sealing, removal).
//!
//! The state is behind one lock that is never held over an await. All of it comes from the store: [`Datasets::recover`]
//! rebuilds it by listing.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use proto::manifest::Manifest;
use proto::{Attempt, DatasetSpec, Rejection, ShardIndex, Split, keys};
use serde::Serialize;
use tokio::sync::{Notify, OwnedMutexGuard, Semaphore};
use tracing::{error, info, warn};

use crate::catalog::Round;
use crate::error::Error;
use crate::ledger::{Counts, Ledger, Now, Settled, ShardId};
use crate::manifest::{SealError, Sealing, seal};
use crate::store::{Created, Store, nonce, wall_millis};
use crate::term::Term;

/// Datasets, and slices of one dataset, that are worked on at the same time.
const PARALLEL: usize = 8;

/// A worker that has not been heard of for so long is not shown any more.
const WORKER_FORGOTTEN: Duration = Duration::from_secs(60);

/// Between two tries to seal, when the store fails.
const SEAL_PAUSE: Duration = Duration::from_secs(5);

/// All datasets of the store.
pub(crate) struct Datasets {
    pub(crate) store: Store,
    pub(crate) term: Arc<Term>,
    /// For temporary files.
    pub(crate) folder: Option<PathBuf>,
    started: Instant,
    state: Mutex<State>,
    /// Told when a shard may have become free.
    free: Notify,
    /// Held while a dataset of that name is created.
    names: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Sealing reads whole datasets: not all at once.
    sealing: Semaphore,
}

struct State {
    ledger: Ledger,
    live: BTreeMap<Arc<str>, Dataset>,
    workers: HashMap<String, Instant>,
}

/// One live dataset.
#[derive(Debug, Clone)]
pub(crate) struct Dataset {
    /// `<name>-<uid>`.
    pub(crate) id: Arc<str>,
    pub(crate) name: String,
    pub(crate) spec: Arc<DatasetSpec>,
    pub(crate) spec_json: String,
    pub(crate) rounds: Arc<Vec<Round>>,
    /// URLs by outcome, of the committed shards.
    pub(crate) outcomes: BTreeMap<String, u64>,
    /// The same of the leased ones, as far as workers have told.
    progress: BTreeMap<u32, BTreeMap<String, u64>>,
    pub(crate) stage: Stage,
    /// Grows with each change.
    pub(crate) revision: u64,
}

/// How far a dataset is.
#[derive(Debug, Clone)]
pub(crate) enum Stage {
    /// Shards are missing.
    Fetching,
    /// The manifest is being made.
    Sealing,
    /// A manifest names all.
    Ready(Arc<Manifest>),
    /// The manifest cannot be made.
    Failed(String),
}

impl Dataset {
    pub(crate) fn urls(&self) -> u64 {
        self.rounds.iter().map(|round| round.urls).sum()
    }

    pub(crate) fn shards(&self) -> Vec<u32> {
        self.rounds.iter().flat_map(|round| (round.first_slice..).take(round.slices.len())).collect()
    }

    /// URLs by outcome, the workers' progress included.
    pub(crate) fn outcomes_so_far(&self) -> BTreeMap<String, u64> {
        let mut all = self.outcomes.clone();
        for (outcome, urls) in self.progress.values().flatten() {
            *all.entry(outcome.clone()).or_default() += urls;
        }
        all
    }

    pub(crate) fn urls_per_class(&self) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for (synset, urls) in self.rounds.iter().flat_map(|round| &round.urls_per_class) {
            *all.entry(synset.clone()).or_default() += urls;
        }
        all
    }

    fn urls_of(&self, shard: u32) -> u64 {
        let of = |round: &Round| Some(round.slices.get(shard.checked_sub(round.first_slice)? as usize)?.urls);
        self.rounds.iter().find_map(of).unwrap_or(0).into()
    }
}

/// `tombstone.json`.
#[derive(Serialize)]
struct Tombstone {
    nonce: String,
    /// For people only.
    at_millis: u64,
}

/// The lease of one shard, as a worker gets it.
#[derive(Debug, Clone)]
pub(crate) struct Grant {
    pub(crate) id: ShardId,
    pub(crate) attempt: Attempt,
    pub(crate) duration: Duration,
    pub(crate) spec_json: String,
}

impl Datasets {
    /// Without any dataset; see [`Datasets::recover`].
    pub(crate) fn new(store: Store, term: Arc<Term>, lease: Duration, folder: Option<PathBuf>) -> Arc<Self> {
        let ledger = Ledger::new(term.number, lease);
        Arc::new(Self {
            store,
            term,
            folder,
            started: Instant::now(),
            state: Mutex::new(State { ledger, live: BTreeMap::new(), workers: HashMap::new() }),
            free: Notify::new(),
            names: Mutex::default(),
            sealing: Semaphore::new(2),
        })
    }

    fn now(&self) -> Now {
        self.started.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rebuilds the state from the store, and goes on with what an earlier coordinator had begun.
    pub(crate) async fn recover(self: &Arc<Self>) -> anyhow::Result<()> {
        let ids = self.store.folders(keys::DATASETS).await?;
        let found: Vec<Option<(Dataset, Vec<u32>)>> = futures::stream::iter(ids)
            .map(|id| {
                let this = Arc::clone(self);
                async move { this.recover_one(id).await }
            })
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        for (dataset, open) in found.into_iter().flatten() {
            info!(dataset = &*dataset.id, open = open.len(), stage = stage_name(&dataset.stage), "dataset recovered");
            self.admit(dataset, open, false);
        }
        Ok(())
    }

    /// One dataset and its uncommitted shards; None if there is nothing to go on with.
    async fn recover_one(self: &Arc<Self>, id: String) -> anyhow::Result<Option<(Dataset, Vec<u32>)>> {
        let rounds = self.store.get_all(self.store.list(&keys::rounds(&id)).await?).await?;
        let dead = self.store.get(&keys::tombstone(&id)).await?.is_some();
        if dead || rounds.is_empty() {
            // A list that was never read to its end. The tombstone first, so that whoever still works on it comes too late.
            let this = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = this.remove(&id).await {
                    warn!(dataset = id, %error, "cannot remove a dead dataset; the next coordinator will try again");
                }
            });
            return Ok(None);
        }
        let recovered = async {
            let rounds = rounds.iter().map(|(_, json)| Round::from_json(json)).collect::<Result<Vec<_>, _>>()?;
            let spec_json = String::from_utf8(self.store.need(&keys::dataset_spec(&id)).await?.to_vec())?;
            let spec = DatasetSpec::from_json(&spec_json)?;
            let mut dataset = Dataset::new(&id, spec, rounds)?;
            let mut open = dataset.shards();
            for (key, json) in self.store.get_all(self.store.list(&keys::indexes(&id)).await?).await? {
                let index = ShardIndex::from_json(&json).map_err(|e| anyhow::anyhow!("{key}: {e}"))?;
                dataset.count(&index);
                if let Ok(at) = open.binary_search(&index.shard) {
                    open.remove(at);
                }
            }
            if open.is_empty() {
                dataset.stage = match self.latest_manifest(&id).await? {
                    Some(manifest) if manifest.rounds as usize >= dataset.rounds.len() => Stage::Ready(manifest.into()),
                    _ => Stage::Sealing,
                };
            }
            anyhow::Ok((dataset, open))
        };
        match recovered.await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is::<crate::store::StoreError>() => Err(error),
            // One broken dataset must not keep the cluster from starting.
            Err(error) => {
                error!(dataset = id, error = format!("{error:#}"), "dataset cannot be read; it is left out");
                Ok(None)
            }
        }
    }

    async fn latest_manifest(&self, id: &str) -> anyhow::Result<Option<Manifest>> {
        match self.latest_version(id).await? {
            0 => Ok(None),
            version => {
                let json = self.store.need(&keys::manifest(id, version)).await?;
                Ok(Some(Manifest::from_json(&json)?))
            }
        }
    }

    async fn latest_version(&self, id: &str) -> Result<u32, crate::store::StoreError> {
        let keys = self.store.list(&keys::manifests(id)).await?;
        let versions = keys.iter().filter(|key| key.ends_with(".json")).filter_map(|key| keys::number(key).ok());
        Ok(versions.max().and_then(|version| u32::try_from(version).ok()).unwrap_or(0))
    }

    /// Lets no second dataset of that name be created until the guard is dropped.
    pub(crate) async fn lock_name(&self, name: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
            names.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(names.entry(name.to_owned()).or_default())
        };
        lock.lock_owned().await
    }

    /// Commits a new dataset: its slices are in the store; its spec and round are put here. `fresh` leases at once.
    pub(crate) async fn commit(self: &Arc<Self>, id: &str, spec: DatasetSpec, round: Round) -> Result<(), Error> {
        self.term.look(&self.store).await?;
        self.store.put(&keys::dataset_spec(id), spec.to_json().into()).await?;
        let json = serde_json::to_vec_pretty(&round).map_err(|e| Error::Local(e.to_string()))?;
        if let Created::Lost(_) = self.store.create(&keys::round(id, round.round), json.into(), &round.nonce).await? {
            return Err(Error::Local(format!("somebody else wrote the catalog of {id}")));
        }
        // A later coordinator buries whatever has no round yet when it begins.
        if self.store.get(&keys::tombstone(id)).await?.is_some() {
            return Err(Error::Aborted(format!("a later coordinator has removed {id} before it was complete")));
        }
        let dataset = Dataset::new(id, spec, vec![round]).map_err(|e| Error::Local(e.to_string()))?;
        let open = dataset.shards();
        info!(dataset = id, urls = dataset.urls(), shards = open.len(), "dataset created");
        self.admit(dataset, open, true);
        Ok(())
    }

    fn admit(self: &Arc<Self>, dataset: Dataset, open: Vec<u32>, fresh: bool) {
        let id = Arc::clone(&dataset.id);
        let seal = matches!(dataset.stage, Stage::Sealing);
        {
            let mut state = self.state();
            let now = self.now();
            state.ledger.add(now, &id, open, fresh);
            state.live.insert(Arc::clone(&id), dataset);
        }
        self.free.notify_waiters();
        if seal {
            self.spawn_seal(id);
        }
    }

    /// All live datasets, in order of their ids.
    pub(crate) fn all(&self) -> Vec<(Dataset, Counts)> {
        let state = self.state();
        state.live.values().map(|dataset| (dataset.clone(), state.ledger.counts(&dataset.id))).collect()
    }

    /// The live dataset of that name (or `<name>-<uid>`).
    pub(crate) fn find(&self, name: &str) -> Result<(Dataset, Counts), Error> {
        let state = self.state();
        let found = state.live.values().find(|dataset| dataset.name == name || &*dataset.id == name);
        let dataset = found.ok_or_else(|| Error::NotFound(format!("no dataset is called {name:?}")))?;
        Ok((dataset.clone(), state.ledger.counts(&dataset.id)))
    }

    /// The revision of a live dataset; a cheap question whether anything has changed.
    pub(crate) fn revision(&self, id: &str) -> Option<u64> {
        self.state().live.get(id).map(|dataset| dataset.revision)
    }

    /// The dataset that a request created.
    pub(crate) fn by_request(&self, request_id: &str) -> Option<Dataset> {
        let by = |dataset: &&Dataset| dataset.rounds.first().is_some_and(|round| round.request_id == request_id);
        self.state().live.values().find(by).cloned()
    }

    /// Waits for a shard to make, at most so long.
    pub(crate) async fn lease(&self, worker: &str, wait: Duration) -> Option<Grant> {
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let freed = self.free.notified();
            tokio::pin!(freed);
            // Listens before it looks, so that nothing is missed in between.
            freed.as_mut().enable();
            if let Some(grant) = self.grant(worker) {
                return Some(grant);
            }
            if tokio::time::timeout_at(deadline, freed).await.is_err() {
                return None;
            }
        }
    }

    fn grant(&self, worker: &str) -> Option<Grant> {
        let now = self.now();
        let mut state = self.state();
        let state = &mut *state;
        state.workers.insert(worker.to_owned(), Instant::now());
        let (id, attempt) = state.ledger.grant(now, worker)?;
        let dataset = state.live.get_mut(&id.dataset)?;
        dataset.revision += 1;
        info!(dataset = &*id.dataset, shard = id.shard, %attempt, worker, "lease granted");
        Some(Grant { id, attempt, duration: state.ledger.lease(), spec_json: dataset.spec_json.clone() })
    }

    /// Prolongs a lease; None: it is over.
    pub(crate) fn renew(
        &self,
        worker: &str,
        id: (&str, u32),
        attempt: Attempt,
        outcomes: BTreeMap<String, u64>,
    ) -> Option<Duration> {
        let now = self.now();
        let mut state = self.state();
        state.workers.insert(worker.to_owned(), Instant::now());
        if !state.ledger.renew(now, id.0, id.1, attempt, worker) {
            return None;
        }
        let dataset = state.live.get_mut(id.0)?;
        dataset.progress.insert(id.1, outcomes);
        dataset.revision += 1;
        Some(state.ledger.lease())
    }

    /// Takes a lease back.
    pub(crate) fn release(&self, worker: &str, id: (&str, u32), attempt: Attempt, failure: &str) {
        let failed = !failure.is_empty();
        if failed {
            warn!(dataset = id.0, shard = id.1, %attempt, worker, failure, "attempt failed");
        }
        {
            let now = self.now();
            let mut state = self.state();
            state.workers.insert(worker.to_owned(), Instant::now());
            state.ledger.release(now, id.0, id.1, attempt, failed);
            if let Some(dataset) = state.live.get_mut(id.0) {
                dataset.progress.remove(&id.1);
                dataset.revision += 1;
            }
        }
        self.free.notify_waiters();
    }

    /// Reads the index of a shard that a worker says is committed, and returns the attempt that stands in it.
    pub(crate) async fn complete(self: &Arc<Self>, worker: &str, id: (&str, u32)) -> Result<String, Error> {
        let dataset = {
            let mut state = self.state();
            state.workers.insert(worker.to_owned(), Instant::now());
            let dataset = state.live.get(id.0).map(|dataset| Arc::clone(&dataset.id));
            dataset.ok_or_else(|| Error::NotFound(format!("no dataset {:?}", id.0)))?
        };
        let key = keys::index(id.0, id.1);
        let json = self.store.get(&key).await?;
        let json = json.ok_or_else(|| Error::Precondition(format!("{key} does not exist: put it first")))?;
        let index = ShardIndex::from_json(&json).map_err(|e| Error::Local(format!("{key}: {e}")))?;
        self.committed(&dataset, &index);
        Ok(index.attempt)
    }

    /// Takes note of a shard's index.
    fn committed(self: &Arc<Self>, id: &Arc<str>, index: &ShardIndex) {
        let all = {
            let mut state = self.state();
            if !state.ledger.commit(id, index.shard) {
                return;
            }
            let counts = state.ledger.counts(id);
            let Some(dataset) = state.live.get_mut(id) else { return };
            dataset.count(index);
            info!(
                dataset = &**id,
                shard = index.shard,
                attempt = index.attempt,
                writer = index.writer,
                "shard committed"
            );
            let all = counts == Counts::default();
            if all {
                dataset.stage = Stage::Sealing;
            }
            all
        };
        if all {
            self.spawn_seal(Arc::clone(id));
        }
    }

    /// Reads whether the last attempt at a shard has left an index, and decides what becomes of the shard.
    async fn check(self: &Arc<Self>, id: ShardId) -> Result<(), Error> {
        let key = keys::index(&id.dataset, id.shard);
        let read = self.store.get(&key).await;
        let json = read.inspect_err(|_| self.state().ledger.postpone(self.now(), &id))?;
        if let Some(json) = json {
            match ShardIndex::from_json(&json) {
                Ok(index) => self.committed(&id.dataset, &index),
                Err(error) => {
                    error!(key, %error, "index cannot be read; its shard stays open");
                    self.state().ledger.postpone(self.now(), &id);
                }
            }
            return Ok(());
        }
        let settled = self.state().ledger.settle(self.now(), &id);
        match settled {
            None => Ok(()),
            Some(Settled::Again) => {
                info!(dataset = &*id.dataset, shard = id.shard, "shard is free again");
                if let Some(dataset) = self.state().live.get_mut(&id.dataset) {
                    dataset.progress.remove(&id.shard);
                    dataset.revision += 1;
                }
                self.free.notify_waiters();
                Ok(())
            }
            Some(Settled::GiveUp) => {
                let closed = self.give_up(&id).await;
                closed.inspect_err(|_| self.state().ledger.postpone(self.now(), &id))
            }
        }
    }

    /// Commits a slice that has failed too often, with every URL as `slice_failed`.
    async fn give_up(self: &Arc<Self>, id: &ShardId) -> Result<(), Error> {
        let urls = self.state().live.get(&id.dataset).map(|dataset| dataset.urls_of(id.shard));
        let Some(urls) = urls else { return Ok(()) };
        let mut index = ShardIndex {
            version: 1,
            nonce: nonce(),
            writer: "coordinator".to_owned(),
            shard: id.shard,
            attempt: Attempt { term: self.term.number, n: 0 }.to_string(),
            outcomes: BTreeMap::from([(Rejection::SliceFailed.name().to_owned(), urls)]),
            tars: BTreeMap::new(),
            outcomes_file: None,
        };
        let key = keys::index(&id.dataset, id.shard);
        if let Created::Lost(theirs) = self.store.create(&key, index.to_json().into(), &index.nonce).await? {
            index = ShardIndex::from_json(&theirs).map_err(|e| Error::Local(format!("{key}: {e}")))?;
        }
        warn!(dataset = &*id.dataset, shard = id.shard, urls, "slice failed too often and is closed");
        self.committed(&id.dataset, &index);
        Ok(())
    }

    /// Ends leases whose time is over, until the process ends.
    pub(crate) async fn watch_leases(self: Arc<Self>) {
        let period = (self.state().ledger.lease() / 10).clamp(Duration::from_millis(50), Duration::from_secs(1));
        let mut clock = tokio::time::interval(period);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            clock.tick().await;
            let over = {
                let mut state = self.state();
                state.workers.retain(|_, seen| seen.elapsed() < WORKER_FORGOTTEN);
                state.ledger.expire(self.now())
            };
            futures::stream::iter(over)
                .for_each_concurrent(PARALLEL, |id| {
                    let this = Arc::clone(&self);
                    async move {
                        if let Err(error) = this.check(id.clone()).await {
                            warn!(dataset = &*id.dataset, shard = id.shard, %error, "cannot check a shard");
                        }
                    }
                })
                .await;
            // Shards whose pause after a failure is over are free now, too.
            self.free.notify_waiters();
        }
    }

    fn spawn_seal(self: &Arc<Self>, id: Arc<str>) {
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let stage = loop {
                let sealed = {
                    let Ok(_permit) = this.sealing.acquire().await else { return };
                    this.seal(&id).await
                };
                match sealed {
                    Ok(manifest) => break Stage::Ready(manifest.into()),
                    Err(error @ (SealError::Empty(_) | SealError::Corrupt { .. })) => {
                        break Stage::Failed(error.to_string());
                    }
                    Err(error) => warn!(dataset = &*id, %error, "cannot seal, trying again"),
                }
                tokio::time::sleep(SEAL_PAUSE).await;
                if this.revision(&id).is_none() {
                    return;
                }
            };
            match &stage {
                Stage::Failed(error) => error!(dataset = &*id, error, "dataset failed"),
                _ => info!(dataset = &*id, "dataset is ready"),
            }
            if let Some(dataset) = this.state().live.get_mut(&id) {
                dataset.stage = stage;
                dataset.revision += 1;
            }
            if let Err(error) = this.sweep(&id).await {
                warn!(dataset = &*id, %error, "cannot remove what lost attempts left");
            }
        });
    }

    async fn seal(self: &Arc<Self>, id: &Arc<str>) -> Result<Manifest, SealError> {
        let Some(dataset) = self.state().live.get(id).cloned() else {
            return Err(SealError::Empty("it was deleted".to_owned()));
        };
        let sealing = Sealing {
            dataset: id.to_string(),
            version: self.latest_version(id).await? + 1,
            rounds: dataset.rounds.len() as u32,
            shards: dataset.shards(),
            urls_per_class: dataset.urls_per_class(),
            folder: self.folder.clone(),
            spec: DatasetSpec::clone(&dataset.spec),
        };
        let (store, handle) = (self.store.clone(), tokio::runtime::Handle::current());
        let sealed = tokio::task::spawn_blocking(move || seal(&handle, &store, &sealing)).await;
        sealed.unwrap_or_else(|error| Err(SealError::Local(std::io::Error::other(error))))
    }

    /// Removes the files of attempts whose shard has an index that names another attempt.
    async fn sweep(&self, id: &str) -> Result<(), crate::store::StoreError> {
        let indexes = self.store.get_all(self.store.list(&keys::indexes(id)).await?).await?;
        let winners: HashMap<u32, String> = indexes
            .iter()
            .filter_map(|(_, json)| ShardIndex::from_json(json).ok())
            .map(|index| (index.shard, index.attempt))
            .collect();
        let folder = keys::dataset(id);
        let mut folders = vec![format!("{folder}/outcomes")];
        folders.extend(Split::ALL.iter().map(|split| format!("{folder}/shards/{split}")));
        for folder in folders {
            let mut garbage = self.store.list(&folder).await?;
            garbage.retain(|key| {
                keys::attempt_of(key).is_ok_and(|(shard, attempt)| {
                    winners.get(&shard).is_some_and(|winner| *winner != attempt.to_string())
                })
            });
            if !garbage.is_empty() {
                info!(dataset = id, folder, objects = garbage.len(), "removing what lost attempts left");
                self.store.delete_all(garbage).await?;
            }
        }
        Ok(())
    }

    /// Puts the tombstone and forgets the dataset; its objects are removed in the background.
    pub(crate) async fn delete(self: &Arc<Self>, name: &str) -> Result<(), Error> {
        let (dataset, _) = self.find(name)?;
        self.bury(&dataset.id).await?;
        {
            let mut state = self.state();
            state.ledger.remove(&dataset.id);
            state.live.remove(&dataset.id);
        }
        info!(dataset = &*dataset.id, "dataset deleted");
        let this = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = this.remove(&dataset.id).await {
                warn!(dataset = &*dataset.id, %error, "cannot remove all objects; the next coordinator will go on");
            }
        });
        Ok(())
    }

    async fn bury(&self, id: &str) -> Result<(), crate::store::StoreError> {
        let tombstone = Tombstone { nonce: nonce(), at_millis: wall_millis() };
        let json = serde_json::to_vec(&tombstone).unwrap_or_default();
        self.store.create(&keys::tombstone(id), Bytes::from(json), &tombstone.nonce).await.map(drop)
    }

    /// Removes everything under a dataset, its tombstone last. Once more after a while: a worker that had not heard of the end
    /// may have written meanwhile.
    pub(crate) async fn remove(&self, id: &str) -> Result<(), crate::store::StoreError> {
        self.bury(id).await?;
        let tombstone = keys::tombstone(id);
        let lease = self.state().ledger.lease();
        for last in [false, true] {
            let mut keys = self.store.list(&keys::dataset(id)).await?;
            keys.retain(|key| *key != tombstone);
            self.store.delete_all(keys).await?;
            if !last {
                tokio::time::sleep(lease * 2).await;
            }
        }
        self.store.delete_all(vec![tombstone]).await
    }

    /// Removes the slices of a list that failed before anything was committed.
    pub(crate) async fn remove_unborn(&self, id: &str) -> Result<(), crate::store::StoreError> {
        let keys = self.store.list(&keys::dataset(id)).await?;
        if keys.is_empty() { Ok(()) } else { self.remove(id).await }
    }

    /// Worker, its leases, and since when nothing was heard of it.
    pub(crate) fn workers(&self) -> Vec<(String, u32, Duration)> {
        let state = self.state();
        let leases = state.ledger.workers();
        let mut workers: Vec<_> = state
            .workers
            .iter()
            .map(|(name, seen)| (name.clone(), leases.get(name.as_str()).copied().unwrap_or(0), seen.elapsed()))
            .collect();
        workers.sort();
        workers
    }
}

impl Dataset {
    fn new(id: &str, spec: DatasetSpec, rounds: Vec<Round>) -> anyhow::Result<Self> {
        let name = id.rsplit_once('-').map(|(name, _)| name.to_owned());
        let name = name.ok_or_else(|| anyhow::anyhow!("{id:?} is not <name>-<uid>"))?;
        Ok(Self {
            id: id.into(),
            name,
            spec_json: spec.to_json(),
            spec: spec.into(),
            rounds: rounds.into(),
            outcomes: BTreeMap::new(),
            progress: BTreeMap::new(),
            stage: Stage::Fetching,
            revision: 0,
        })
    }

    /// Counts a committed shard.
    fn count(&mut self, index: &ShardIndex) {
        self.progress.remove(&index.shard);
        for (outcome, urls) in &index.outcomes {
            *self.outcomes.entry(outcome.clone()).or_default() += urls;
        }
        self.revision += 1;
    }
}

fn stage_name(stage: &Stage) -> &'static str {
    match stage {
        Stage::Fetching => "fetching",
        Stage::Sealing => "sealing",
        Stage::Ready(_) => "ready",
        Stage::Failed(_) => "failed",
    }
}
