//! The datasets: what is known of each, and the work on them, by subject: `recover`, `lease`, `large`, `control`,
//! `compare`, `rounds`, `seal`, `remove`, `wanted`.
//!
//! The state is behind one lock that is never held over an await. All of it comes from the store: [`Datasets::recover`]
//! rebuilds it by listing.

mod compare;
pub(crate) mod control;
mod large;
mod lease;
mod recover;
mod remove;
pub(crate) mod rounds;
mod seal;
mod wanted;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::handover::Handover;
use proto::manifest::{DamagedShard, Manifest};
use proto::pb::{self, FailureKind};
use proto::round::{Cause, Round, Slice};
use proto::site::Sites;
use proto::{DatasetId, DatasetSpec, OutcomeCounts, Rejection, ShardIndex, Split, keys};
use tokio::sync::{Notify, OwnedMutexGuard, Semaphore};
use tracing::info;

pub(crate) use crate::datasets::control::Controls;
use crate::datasets::large::Slices;
pub(crate) use crate::datasets::lease::{Renewed, Report};
pub(crate) use crate::datasets::remove::was_committed;
use crate::datasets::wanted::Wanted;
use crate::error::Error;
use crate::handover;
use crate::history::Tolerance;
use crate::inbox::Inboxes;
use crate::ledger::{Counts, Ledger, Now};
use crate::probes::Probes;
use crate::shares::{Learned, Shares};
use crate::site_rules::KnownRules;
use crate::sites::Deal;
use crate::store::{Created, Store};
use crate::term::Term;
use crate::trouble::{Trouble, Troubles};
use crate::yields::Yields;

/// Datasets, and slices of one dataset, that are worked on at the same time.
const PARALLEL: usize = 8;

/// All datasets of the store.
pub(crate) struct Datasets {
    pub(crate) store: Store,
    pub(crate) term: Arc<Term>,
    /// For temporary files.
    pub(crate) folder: Option<PathBuf>,
    /// The most bytes of a list.
    pub(crate) largest_list: u64,
    /// Lists that are being sent.
    pub(crate) inboxes: Arc<Inboxes>,
    /// What may be asked of which site.
    pub(crate) sites: Arc<Sites>,
    state: Mutex<State>,
    /// Who has which part of which site's budget. Locked after the state, if
    /// together with it, and never held over an await.
    shares: Mutex<Shares>,
    /// What sites say may be taken from them. Locked alone.
    site_rules: Mutex<KnownRules>,
    /// Told when a shard may have become free.
    free: Notify,
    /// Held while a dataset of that name is created.
    names: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Sealing reads whole datasets: not all at once.
    sealing: Semaphore,
}

struct State {
    ledger: Ledger,
    live: BTreeMap<DatasetId, Dataset>,
    slices: Slices,
    /// When each was heard of last.
    workers: HashMap<String, Now>,
    troubles: Troubles,
    yields: Yields,
    probes: Probes,
}

impl State {
    /// Takes note that an attempt has failed, or something that the coordinator itself (None) does.
    fn failed(&mut self, now: Now, kind: FailureKind, worker: Option<&str>, dataset: &DatasetId, text: String) {
        self.troubles.failed(now, kind, worker, dataset, text);
        if let Some(dataset) = self.live.get_mut(dataset) {
            dataset.revision += 1;
        }
    }
}

/// One live dataset.
#[derive(Debug, Clone)]
pub(crate) struct Dataset {
    pub(crate) id: DatasetId,
    pub(crate) spec: Arc<DatasetSpec>,
    pub(crate) spec_json: String,
    pub(crate) rounds: Arc<Vec<Round>>,
    /// Which slices are for whom.
    deal: Arc<Deal>,
    /// URLs by outcome: those of the rounds that the latest manifest names, each by its latest one, and those of the
    /// committed shards of later rounds.
    outcomes: OutcomeCounts,
    /// The same of the leased ones, as far as workers have told.
    progress: BTreeMap<u32, OutcomeCounts>,
    /// With `per_class` in the spec.
    wanted: Option<Wanted>,
    /// What people have decided about it since.
    pub(crate) controls: Controls,
    /// The latest one.
    pub(crate) manifest: Option<Arc<Manifest>>,
    /// Shards of later rounds whose index cannot be read.
    damaged: BTreeMap<u32, DamagedShard>,
    /// Somebody who had nothing to fetch agreed to leave out however much is damaged.
    accepts_damage: bool,
    pub(crate) stage: Stage,
    /// Grows with each change.
    revision: u64,
}

/// How far a dataset is.
#[derive(Debug, Clone)]
pub(crate) enum Stage {
    /// Shards are missing.
    Fetching,
    /// The manifest is being made.
    Sealing,
    /// The latest manifest names all.
    Ready,
    /// There is nothing to train on, or the manifest cannot be made.
    Failed(String),
}

/// Differs whenever a dataset has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Revision {
    number: u64,
    /// Whether it is ready or has failed.
    pub(crate) is_final: bool,
}

impl Stage {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Fetching => "fetching",
            Self::Sealing => "sealing",
            Self::Ready => "ready",
            Self::Failed(_) => "failed",
        }
    }
}

impl Dataset {
    pub(crate) fn revision(&self) -> Revision {
        Revision { number: self.revision, is_final: matches!(self.stage, Stage::Ready | Stage::Failed(_)) }
    }

    pub(crate) fn urls(&self) -> u64 {
        self.rounds.iter().map(|round| round.new_urls).sum()
    }

    pub(crate) fn shards(&self) -> Vec<u32> {
        self.rounds.iter().flat_map(Round::shards).collect()
    }

    /// URLs by their latest outcome, the workers' progress included. One that a later round fetches again has none
    /// until it has been fetched.
    pub(crate) fn outcomes_so_far(&self) -> OutcomeCounts {
        let mut all = self.outcomes;
        self.progress.values().for_each(|made| all.merge(made));
        self.unnamed_rounds().for_each(|round| all.subtract(&round.retried));
        all
    }

    /// The latest manifest, if there is anything to train on in it.
    pub(crate) fn trainable(&self) -> Option<&Arc<Manifest>> {
        self.manifest.as_ref().filter(|manifest| manifest.samples(Split::Train) > 0)
    }

    pub(crate) fn urls_per_class(&self) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for (synset, urls) in self.rounds.iter().flat_map(|round| &round.urls_per_class) {
            *all.entry(synset.clone()).or_default() += urls;
        }
        all
    }

    /// Shards that are left out, as far as is known.
    pub(crate) fn damaged(&self) -> impl Iterator<Item = &DamagedShard> {
        self.manifest.iter().flat_map(|manifest| &manifest.damaged).chain(self.damaged.values())
    }

    /// How much damage is no news, or agreed to by whoever asked for the latest round.
    pub(crate) fn tolerance(&self) -> Tolerance {
        let asked = self.rounds.iter().rfind(|round| round.cause == Cause::Request);
        let known = self.manifest.iter().flat_map(|manifest| &manifest.damaged);
        Tolerance {
            known: known.map(|damaged| damaged.shard).collect(),
            any: self.accepts_damage || asked.is_some_and(|round| round.accepts_damage),
        }
    }

    /// The rounds that the latest manifest does not name.
    fn unnamed_rounds(&self) -> impl Iterator<Item = &Round> {
        let named = self.manifest.as_ref().map_or(0, |manifest| manifest.rounds as usize);
        self.rounds.iter().skip(named)
    }

    /// Rounds that the coordinator opened by itself, for what may come back.
    pub(crate) fn automatic_rounds(&self) -> u32 {
        self.rounds.iter().filter(|round| round.cause == Cause::MayComeBack).count() as u32
    }

    fn slice_of(&self, shard: u32) -> Option<&Slice> {
        self.rounds.iter().find_map(|round| round.slices.get(shard.checked_sub(round.first_slice)? as usize))
    }
}

impl Datasets {
    /// Without any dataset; see [`Datasets::recover`].
    pub(crate) fn new(
        store: Store,
        term: Arc<Term>,
        lease: Duration,
        (folder, largest_list): (Option<PathBuf>, u64),
        sites: Sites,
        before: &Handover,
    ) -> Arc<Self> {
        let ledger = Ledger::new(term.number(), lease);
        let now = term.clock.now();
        let learned = before.sites.iter().map(|(name, site)| {
            let rate = (site.requests_per_second, site.known);
            (name.clone(), Learned { rate, quiet_until: now + handover::quiet(site) })
        });
        let shares = Shares::new(now, lease, before.all_back, learned);
        Arc::new(Self {
            store,
            term,
            folder,
            largest_list,
            inboxes: Arc::default(),
            sites: sites.into(),
            state: Mutex::new(State {
                ledger,
                live: BTreeMap::new(),
                slices: Slices::default(),
                workers: HashMap::new(),
                troubles: Troubles::default(),
                yields: Yields::default(),
                probes: Probes::default(),
            }),
            shares: Mutex::new(shares),
            site_rules: Mutex::default(),
            free: Notify::new(),
            names: Mutex::default(),
            sealing: Semaphore::new(2),
        })
    }

    /// Goes on in a higher term: its attempts are the only ones of that number.
    pub(crate) fn rise(&self, term: u64) {
        self.state().ledger.rise(term);
    }

    fn now(&self) -> Now {
        self.term.clock.now()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
    pub(crate) async fn commit(self: &Arc<Self>, id: &DatasetId, spec: DatasetSpec, round: Round) -> Result<(), Error> {
        self.term.check(&self.store).await?;
        self.store.put(&keys::dataset_spec(id), spec.to_json().into()).await?;
        if let Created::Lost(_) = self.store.create(&keys::round(id, round.round), &round).await? {
            return Err(Error::Local(format!("somebody else wrote the catalog of {id}")));
        }
        // A later coordinator that began meanwhile has not seen it: the caller must ask that one, which then finds it.
        self.term.check(&self.store).await?;
        // A later coordinator buries whatever has no round yet when it begins.
        if self.store.get(&keys::tombstone(id)).await?.is_some() {
            return Err(Error::Aborted(format!("a later coordinator has removed {id} before it was complete")));
        }
        let dataset = Dataset::new(id, spec, vec![round]);
        let open = dataset.shards();
        info!(dataset = &**id, urls = dataset.urls(), shards = open.len(), "dataset created");
        self.admit(dataset, open, true);
        Ok(())
    }

    fn admit(self: &Arc<Self>, dataset: Dataset, open: Vec<u32>, fresh: bool) {
        let id = dataset.id.clone();
        let seal = matches!(dataset.stage, Stage::Sealing);
        {
            let mut state = self.state();
            let now = self.now();
            state.ledger.add(now, &id, open, fresh);
            state.ledger.control(&id, dataset.controls.priority.weight(), dataset.controls.paused);
            state.live.insert(id.clone(), dataset);
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

    /// The uncommitted shards of all datasets.
    pub(crate) fn totals(&self) -> Counts {
        self.state().ledger.totals()
    }

    /// How many datasets there are by stage.
    pub(crate) fn stages(&self) -> BTreeMap<&'static str, u64> {
        let mut stages = BTreeMap::from(["fetching", "sealing", "ready", "failed"].map(|stage| (stage, 0)));
        for dataset in self.state().live.values() {
            *stages.entry(dataset.stage.name()).or_default() += 1;
        }
        stages
    }

    /// The live dataset of that name (or `<name>-<uid>`).
    pub(crate) fn find(&self, name: &str) -> Result<(Dataset, Counts), Error> {
        let state = self.state();
        let found = state.live.values().find(|dataset| dataset.id.name() == name || &*dataset.id == name);
        let known = || state.live.values().map(|dataset| dataset.id.name());
        let dataset = found.ok_or_else(|| Error::unknown("dataset", name, known()))?;
        Ok((dataset.clone(), state.ledger.counts(&dataset.id)))
    }

    /// The revision of a live dataset: a cheap question whether anything has changed.
    pub(crate) fn revision(&self, id: &DatasetId) -> Option<Revision> {
        self.state().live.get(id).map(Dataset::revision)
    }

    /// The dataset and the round that a request made.
    pub(crate) fn by_request(&self, request_id: &str) -> Option<(DatasetId, Round)> {
        let state = self.state();
        let round = |dataset: &Dataset| {
            let round = dataset.rounds.iter().find(|round| round.request_id == request_id)?;
            Some((dataset.id.clone(), round.clone()))
        };
        state.live.values().find_map(round)
    }

    /// What goes wrong now, at one dataset or at all.
    pub(crate) fn troubles(&self, of: Option<&DatasetId>) -> Vec<pb::Trouble> {
        let (state, now) = (self.state(), self.now());
        let chosen = state.troubles.iter().filter(|trouble| of.is_none_or(|id| trouble.dataset == *id));
        chosen.map(|trouble: &Trouble| trouble.message(now)).collect()
    }

    /// How many of them there are by kind.
    pub(crate) fn troubles_by_kind(&self) -> [(&'static str, u64); 4] {
        use FailureKind::{Slice, Store, WayOut, Worker};
        let state = self.state();
        let of = |kind| state.troubles.iter().filter(|trouble| trouble.kind == kind).count() as u64;
        [("slice", of(Slice)), ("store", of(Store)), ("worker", of(Worker)), ("way_out", of(WayOut))]
    }

    /// Worker, its leases, and since when nothing was heard of it.
    pub(crate) fn workers(&self) -> Vec<(String, u32, Duration)> {
        let (state, now) = (self.state(), self.now());
        let leases = state.ledger.workers();
        let mut workers: Vec<_> = state
            .workers
            .iter()
            .map(|(name, seen)| {
                (name.clone(), leases.get(name.as_str()).copied().unwrap_or(0), now.saturating_sub(*seen))
            })
            .collect();
        workers.sort();
        workers
    }
}

impl Dataset {
    fn new(id: &DatasetId, spec: DatasetSpec, rounds: Vec<Round>) -> Self {
        let wanted = (spec.per_class > 0).then(|| Wanted::new(spec.per_class, spec.classes.len()));
        Self {
            id: id.clone(),
            spec_json: spec.to_json(),
            spec: spec.into(),
            deal: Deal::new(&rounds).into(),
            rounds: rounds.into(),
            outcomes: OutcomeCounts::default(),
            progress: BTreeMap::new(),
            wanted,
            controls: Controls::default(),
            manifest: None,
            damaged: BTreeMap::new(),
            accepts_damage: false,
            stage: Stage::Fetching,
            revision: 0,
        }
    }

    /// Takes note of what a worker has made of a shard so far: URLs by outcome, samples by label.
    fn progressed(&mut self, shard: u32, outcomes: OutcomeCounts, kept: &HashMap<u32, u64>) {
        self.progress.insert(shard, outcomes);
        if let Some(wanted) = &mut self.wanted {
            wanted.progressed(shard, kept);
        }
        self.revision += 1;
    }

    /// Forgets what was made of a shard.
    fn dropped(&mut self, shard: u32) {
        self.progress.remove(&shard);
        if let Some(wanted) = &mut self.wanted {
            wanted.dropped(shard);
        }
        self.revision += 1;
    }

    /// Takes note of the latest manifest.
    fn sealed(&mut self, manifest: Arc<Manifest>) {
        if let Some(wanted) = &mut self.wanted {
            wanted.sealed(&manifest);
        }
        self.outcomes = manifest.outcomes;
        self.damaged.clear();
        self.manifest = Some(manifest);
        self.revision += 1;
    }

    /// Counts a committed shard whose index cannot be read: nothing of it is there.
    fn count_damaged(&mut self, damaged: DamagedShard) {
        self.dropped(damaged.shard);
        let urls = self.slice_of(damaged.shard).map_or(0, |slice| slice.urls);
        self.outcomes.add(Err(Rejection::Unfetched), urls.into());
        self.damaged.insert(damaged.shard, damaged);
        self.revision += 1;
    }

    /// Counts a committed shard of a round that the latest manifest does not name.
    fn count(&mut self, index: &ShardIndex) {
        self.dropped(index.shard);
        if let Some(wanted) = &mut self.wanted {
            wanted.committed(index);
        }
        self.outcomes.merge(&index.outcomes);
        self.revision += 1;
    }
}
