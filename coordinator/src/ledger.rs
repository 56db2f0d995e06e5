//! The ledger of leases: who may make which shard, until when, and what failed attempts say. A pure state machine; time
//! comes in as an argument.
//!
//! Only what failed for the slice's own sake counts against it (a *strike*): its worker died or gave up at it. A
//! process strikes a slice once, and again only after it has committed another one. Strikes must have witnesses:
//! between two of them some shard was committed, so that a cluster in which nothing works closes nothing; where no open
//! slice has fewer strikes there is no better witness. Workers that are lost together strike nothing. Every failure
//! counts against its worker, which is asked less often.

mod answers;
mod changes;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proto::pb::FailureKind;
use proto::{Attempt, DatasetId, ShardId};

pub(crate) use self::answers::{Counts, Decision, Expired, Renewal};
pub(crate) use self::changes::Change;
use self::changes::Changes;

/// Strikes after which a slice is closed.
pub(crate) const MOST_STRIKES: usize = 5;
/// A lease under which no URL was finished for so long is not prolonged.
const STALLED: Duration = Duration::from_secs(600);
/// After its first failure a worker gets no lease for so long; the pause doubles with each one in a row, up to the
/// longest.
const WORKER_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_WORKER_PAUSE: Duration = Duration::from_secs(30);
/// A slice waits a lease time more after each failure of its own but the first, and not longer than so many.
const LONGEST_SLICE_PAUSE: u32 = 10;

/// Since the coordinator's start, by its monotonic clock.
pub(crate) type Now = Duration;

/// All shards that are not committed.
///
/// **At no time do two unexpired leases stand for one shard**, and a shard leaves only by [`Ledger::commit`] or with
/// its dataset.
#[derive(Debug)]
pub(crate) struct Ledger {
    term: u64,
    lease: Duration,
    granted: u64,
    changes: Changes,
    /// Shards that workers have committed.
    commits: u64,
    /// Oldest first.
    datasets: Vec<Queue>,
    /// Those that have committed or failed.
    workers: HashMap<Arc<str>, Record>,
    /// Leases that expired within the last lease time.
    lost: VecDeque<Loss>,
}

/// The uncommitted shards of one dataset.
#[derive(Debug)]
struct Queue {
    id: DatasetId,
    shards: BTreeMap<u32, Open>,
    /// So many of them.
    leased: u32,
    /// URLs that were granted, divided by its weight: whoever has the fewest comes first. One that comes later begins
    /// with as many as the last of those that are there.
    served: f64,
    weight: f64,
    is_paused: bool,
}

/// An uncommitted shard.
#[derive(Debug, Clone)]
struct Open {
    /// Attempts that failed for its own sake, whether or not they count.
    failures: u32,
    strikes: Vec<Strike>,
    /// `Ledger::commits` when it was added.
    commits: u64,
    /// The latest attempt that held it, in this term or, once it was heard of, in an older one.
    attempt: Option<Attempt>,
    /// Who made that attempt.
    holder: Option<Arc<str>>,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Strike {
    worker: Arc<str>,
    /// Of the worker, and of the whole ledger, before it.
    commits: (u64, u64),
}

#[derive(Debug)]
struct Loss {
    at: Now,
    worker: Arc<str>,
    id: ShardId,
    /// Whether it is held against the slice.
    counted: bool,
}

/// What one worker has done in this term.
#[derive(Debug, Default)]
struct Record {
    commits: u64,
    /// In a row.
    failures: u32,
    /// It gets no lease before.
    from: Now,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Can be granted from then on.
    Pending { from: Now },
    /// To be checked then: a new coordinator does not know yet whether somebody of an older term still makes it, an
    /// attempt has failed, or the last check has.
    Unknown { until: Now },
    /// Somebody makes it, and had finished so many URLs by the time when that number last grew.
    Leased { worker: Arc<str>, until: Now, finished: u64, since: Now },
    /// Its attempt is over; whether it left an index is being read.
    Checking,
}

impl Ledger {
    /// An empty one. `lease` is the duration of a lease.
    pub(crate) fn new(term: u64, lease: Duration) -> Self {
        let (datasets, workers, lost) = (Vec::new(), HashMap::new(), VecDeque::new());
        Self { term, lease, granted: 0, changes: Changes::new(), commits: 0, datasets, workers, lost }
    }

    /// Goes on in a higher term.
    pub(crate) fn rise(&mut self, term: u64) {
        self.term = self.term.max(term);
    }

    /// The duration of a lease.
    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    /// What [`Ledger::open_shards`] has become since the last call; None: anything.
    pub(crate) fn take_changes(&mut self) -> Option<Vec<Change>> {
        self.changes.take()
    }

    /// Adds uncommitted shards of a dataset: all of a new one, or those of another round. `fresh`: it was created in
    /// this term, so nobody of an older one can hold a lease.
    pub(crate) fn add(&mut self, now: Now, dataset: &DatasetId, shards: impl IntoIterator<Item = u32>, fresh: bool) {
        let state = if fresh { State::Pending { from: now } } else { State::Unknown { until: now + self.lease } };
        let open = Open { failures: 0, strikes: Vec::new(), commits: self.commits, attempt: None, holder: None, state };
        let shards = shards.into_iter().map(|shard| (shard, open.clone()));
        self.changes.note_all();
        let busy = self.datasets.iter().filter(|queue| !queue.shards.is_empty() && !queue.is_paused);
        let least = busy.map(|queue| queue.served).fold(f64::INFINITY, f64::min);
        let least = if least.is_finite() { least } else { 0.0 };
        match self.datasets.iter_mut().find(|queue| queue.id == *dataset) {
            Some(queue) => {
                if queue.shards.is_empty() {
                    queue.served = queue.served.max(least);
                }
                queue.shards.extend(shards);
            }
            None => {
                let (id, shards) = (dataset.clone(), shards.collect());
                self.datasets.push(Queue { id, shards, leased: 0, served: least, weight: 1.0, is_paused: false });
            }
        }
    }

    /// Sets how large a dataset's share of the workers is, and whether it has none for now.
    pub(crate) fn control(&mut self, dataset: &DatasetId, weight: f64, is_paused: bool) {
        self.changes.note_all();
        let least = self.order().first().and_then(|id| self.datasets.iter().find(|queue| queue.id == *id));
        let least = least.map_or(0.0, |queue| queue.served);
        let Some(queue) = self.datasets.iter_mut().find(|queue| queue.id == *dataset) else { return };
        if queue.is_paused && !is_paused {
            queue.served = queue.served.max(least);
        }
        // What it has had already counts neither more nor less.
        queue.served = least + (queue.served - least) * queue.weight / weight;
        (queue.weight, queue.is_paused) = (weight, is_paused);
    }

    /// Datasets that have uncommitted shards, the one that has had the least of its share first.
    pub(crate) fn order(&self) -> Vec<DatasetId> {
        let mut order: Vec<&Queue> =
            self.datasets.iter().filter(|queue| !queue.shards.is_empty() && !queue.is_paused).collect();
        // Stable: of two that have had as much, the older one.
        order.sort_by(|a, b| a.served.total_cmp(&b.served));
        order.into_iter().map(|queue| queue.id.clone()).collect()
    }

    /// Forgets a dataset and all its leases.
    pub(crate) fn remove(&mut self, dataset: &DatasetId) {
        self.changes.note_all();
        self.datasets.retain(|queue| queue.id != *dataset);
    }

    /// Forgets workers that are gone.
    pub(crate) fn retain_workers(&mut self, mut there: impl FnMut(&str) -> bool) {
        self.workers.retain(|worker, _| there(worker));
    }

    /// Grants the first shard of a dataset that has one which `may` be granted; one that has failed comes behind the
    /// others. `urls` says how many a shard has.
    pub(crate) fn grant(
        &mut self,
        now: Now,
        worker: &str,
        dataset: &DatasetId,
        urls: impl Fn(u32) -> u32,
        may: impl Fn(u32) -> bool,
    ) -> Option<(ShardId, Attempt)> {
        if self.workers.get(worker).is_some_and(|record| now < record.from) {
            return None;
        }
        let queue = self.datasets.iter_mut().find(|queue| queue.id == *dataset && !queue.is_paused)?;
        let free = |open: &Open| matches!(open.state, State::Pending { from } if from <= now);
        let mut found = None;
        for (&shard, open) in queue.shards.iter_mut().filter(|(shard, open)| free(open) && may(**shard)) {
            let failed = open.failures > 0;
            if !failed || found.is_none() {
                found = Some((shard, open));
            }
            if !failed {
                break;
            }
        }
        let (shard, open) = found?;
        self.granted += 1;
        let attempt = Attempt { term: self.term, n: self.granted };
        open.attempt = Some(attempt);
        let worker: Arc<str> = worker.into();
        open.holder = Some(Arc::clone(&worker));
        open.state = State::Leased { worker, until: now + self.lease, finished: 0, since: now };
        queue.served += f64::from(urls(shard)) / queue.weight;
        let id = dataset.shard(shard);
        self.moved(&id, false, Some(true));
        Some((id, attempt))
    }

    /// Takes shards of a dataset that nobody makes, up to so many, to be checked and closed.
    pub(crate) fn take_waiting(&mut self, dataset: &DatasetId, most: usize) -> Vec<ShardId> {
        let waiting = |open: &&mut Open| matches!(open.state, State::Pending { .. });
        let Some(shards) = self.shards(dataset) else { return Vec::new() };
        let taken = shards.iter_mut().map(|(shard, open)| (*shard, open)).filter(|(_, open)| waiting(open));
        let take = |(shard, open): (u32, &mut Open)| {
            open.state = State::Checking;
            dataset.shard(shard)
        };
        taken.take(most).map(take).collect()
    }

    /// Prolongs a lease, if its attempt goes on: `finished` are its URLs that are through. An attempt that was late
    /// keeps its shard if nobody else has got it meanwhile, which undoes the failure that its expiry was, and one of an
    /// older term is adopted.
    pub(crate) fn renew(&mut self, now: Now, id: &ShardId, attempt: Attempt, worker: &str, finished: u64) -> Renewal {
        let (term, lease) = (self.term, self.lease);
        let Some(open) = self.open(id) else { return Renewal::Over };
        let known = match open.attempt {
            Some(known) => known == attempt,
            // Terms count from 1.
            None => (1..term).contains(&attempt.term),
        };
        if !known {
            return Renewal::Over;
        }
        let since = match &open.state {
            State::Leased { finished: before, since, .. } if finished <= *before => *since,
            State::Leased { .. } => now,
            _ => now,
        };
        let was_leased = matches!(open.state, State::Leased { .. });
        let was_late = open.attempt.is_some() && !was_leased;
        open.attempt = Some(attempt);
        if now.saturating_sub(since) >= STALLED {
            open.attempt = None;
            open.state = State::Unknown { until: now };
            self.moved(id, was_leased, Some(false));
            self.fail(now, id, worker, FailureKind::Slice);
            return Renewal::Stalled;
        }
        let holder: Arc<str> = worker.into();
        open.holder = Some(Arc::clone(&holder));
        open.state = State::Leased { worker: holder, until: now + lease, finished, since };
        self.moved(id, was_leased, Some(true));
        if was_late {
            self.forgive(|loss| &*loss.worker == worker && loss.id == *id);
        }
        Renewal::Prolonged
    }

    /// Who makes an attempt, or made it last, if it is the shard's latest that has not come to an end.
    pub(crate) fn holder(&mut self, id: &ShardId, attempt: Attempt) -> Option<&str> {
        self.open(id).filter(|open| open.attempt == Some(attempt))?.holder.as_deref()
    }

    /// Takes a lease back before its end. After a failure the shard is over at the next [`Ledger::expire`] and is
    /// checked: the answer of the attempt's last put may have been lost. False: it was over already.
    pub(crate) fn release(&mut self, now: Now, id: &ShardId, attempt: Attempt, failure: Option<FailureKind>) -> bool {
        let Some(open) = self.open(id) else { return false };
        let State::Leased { worker, .. } = &open.state else { return false };
        if open.attempt != Some(attempt) {
            return false;
        }
        let worker = Arc::clone(worker);
        // It does not come back.
        open.attempt = None;
        match failure {
            Some(kind) => {
                open.state = State::Unknown { until: now };
                self.fail(now, id, &worker, kind);
            }
            None => open.state = State::Pending { from: now },
        }
        self.moved(id, true, Some(false));
        true
    }

    /// Counts a failed attempt.
    fn fail(&mut self, now: Now, id: &ShardId, worker: &str, kind: FailureKind) {
        let record = self.workers.entry(worker.into()).or_default();
        let pause = WORKER_PAUSE * 2u32.saturating_pow(record.failures.min(16));
        record.failures += 1;
        record.from = now + pause.min(LONGEST_WORKER_PAUSE);
        let commits = (record.commits, self.commits);
        if kind != FailureKind::Slice {
            return;
        }
        let Some(open) = self.open(id) else { return };
        open.failures += 1;
        let strikes = open.strikes.len();
        let struck = open.strikes.iter().any(|strike| &*strike.worker == worker && strike.commits.0 == commits.0);
        let proven = open.strikes.last().is_none_or(|last| last.commits.1 < commits.1);
        // Of the others, none has fewer strikes: no success can be expected of them rather than of this one.
        let mut others = self.datasets.iter().flat_map(|queue| queue.shards.values());
        let witness = proven || others.all(|other| other.strikes.len() >= strikes);
        if let Some(open) = self.open(id).filter(|_| witness && !struck) {
            open.strikes.push(Strike { worker: worker.into(), commits });
        }
    }

    /// Ends the leases whose time is over. The caller reads their indexes and says [`Ledger::commit`] or
    /// [`Ledger::decide`].
    pub(crate) fn expire(&mut self, now: Now) -> Vec<Expired> {
        let mut over = Vec::new();
        for Queue { id: dataset, shards, .. } in &mut self.datasets {
            for (&shard, open) in shards {
                let lost = match &open.state {
                    State::Leased { until, worker, .. } if *until <= now => Some(Arc::clone(worker)),
                    State::Unknown { until } if *until <= now => None,
                    _ => continue,
                };
                open.state = State::Checking;
                over.push((dataset.shard(shard), lost));
            }
        }
        for (id, lost) in &over {
            self.moved(id, lost.is_some(), Some(false));
        }
        while self.lost.front().is_some_and(|loss| loss.at + self.lease <= now) {
            self.lost.pop_front();
        }
        // A machine room, a network or a spot market takes several workers at once; a slice takes one.
        let mut workers =
            self.lost.iter().map(|loss| &loss.worker).chain(over.iter().filter_map(|(_, lost)| lost.as_ref()));
        let together = workers.next().is_some_and(|first| workers.any(|other| other != first));
        let kind = if together { FailureKind::Worker } else { FailureKind::Slice };
        if together {
            self.forgive(|_| true);
        }
        for (id, worker) in over.iter().filter_map(|(id, lost)| Some((id, lost.as_ref()?))) {
            self.fail(now, id, worker, kind);
            self.lost.push_back(Loss { at: now, worker: Arc::clone(worker), id: id.clone(), counted: !together });
        }
        over.into_iter().map(|(id, lost)| Expired { id, lost: lost.map(|worker| (worker, kind)) }).collect()
    }

    /// Holds some of the latest losses against no slice any more.
    fn forgive(&mut self, which: impl Fn(&Loss) -> bool) {
        let mut lost = std::mem::take(&mut self.lost);
        for loss in lost.iter_mut().filter(|loss| loss.counted && which(loss)) {
            loss.counted = false;
            let Some(open) = self.open(&loss.id) else { continue };
            open.failures = open.failures.saturating_sub(1);
            if let Some(at) = open.strikes.iter().rposition(|strike| strike.worker == loss.worker) {
                open.strikes.remove(at);
            }
        }
        self.lost = lost;
    }

    /// Decides about a shard that was checked and has no index; its slice has so many URLs, and its dataset may be
    /// about to be `finished`. None: its attempt has come back meanwhile.
    pub(crate) fn decide(&mut self, now: Now, id: &ShardId, urls: u32, finished: bool) -> Option<Decision> {
        let (lease, commits) = (self.lease, self.commits);
        let open = self.open(id)?;
        if open.state != State::Checking {
            return None;
        }
        if finished {
            return Some(Decision::Close);
        }
        // One URL alone cannot be told from a cluster in which nothing works, unless something has worked.
        if open.strikes.len() >= MOST_STRIKES && (urls > 1 || commits > open.commits) {
            return Some(Decision::GiveUp);
        }
        open.state = State::Pending { from: now + lease * open.failures.saturating_sub(1).min(LONGEST_SLICE_PAUSE) };
        Some(Decision::Retry)
    }

    /// The check of a shard failed: it is to be checked again after another lease time.
    pub(crate) fn postpone(&mut self, now: Now, id: &ShardId) {
        let until = now + self.lease;
        if let Some(open) = self.open(id)
            && open.state == State::Checking
        {
            open.state = State::Unknown { until };
        }
    }

    /// Its index is in the store, put there by this worker; none: by a coordinator. True: it was not known before.
    pub(crate) fn commit(&mut self, id: &ShardId, worker: Option<&str>) -> bool {
        let open = self.shards(&id.dataset).and_then(|shards| shards.remove(&id.shard));
        let new = open.is_some();
        if let Some(open) = open {
            self.moved(id, matches!(open.state, State::Leased { .. }), None);
        }
        if let Some(worker) = worker.filter(|_| new) {
            self.commits += 1;
            let record = self.workers.entry(worker.into()).or_default();
            *record = Record { commits: record.commits + 1, ..Record::default() };
        }
        new
    }

    /// All uncommitted shards that may be leased or are, and which.
    pub(crate) fn open_shards(&self) -> impl Iterator<Item = (&DatasetId, u32, bool)> {
        let shard = |(shard, open): (&u32, &Open)| (*shard, matches!(open.state, State::Leased { .. }));
        self.datasets.iter().flat_map(move |Queue { id, shards, is_paused, .. }| {
            let shards = shards.iter().map(shard).filter(move |(_, leased)| *leased || !is_paused);
            shards.map(move |(shard, leased)| (id, shard, leased))
        })
    }

    /// A dataset's uncommitted shards.
    pub(crate) fn counts(&self, dataset: &DatasetId) -> Counts {
        self.count(|queue| queue.id == *dataset)
    }

    /// All uncommitted shards that may be leased.
    pub(crate) fn totals(&self) -> Counts {
        self.count(|queue| !queue.is_paused)
    }

    fn count(&self, which: impl Fn(&Queue) -> bool) -> Counts {
        let mut counts = Counts::default();
        for queue in self.datasets.iter().filter(|queue| which(queue)) {
            counts.leased += queue.leased;
            counts.waiting += queue.shards.len() as u32 - queue.leased;
        }
        counts
    }

    /// Takes note of a shard that was leased, or is now, or (None) is gone.
    fn moved(&mut self, id: &ShardId, was_leased: bool, is_leased: Option<bool>) {
        let Some(queue) = self.datasets.iter_mut().find(|queue| queue.id == id.dataset) else { return };
        queue.leased = queue.leased + u32::from(is_leased == Some(true)) - u32::from(was_leased);
        if is_leased != Some(was_leased) {
            self.changes.note(Change { id: id.clone(), is_paused: queue.is_paused, was_leased, is_leased });
        }
    }

    /// Leases by worker.
    pub(crate) fn workers(&self) -> HashMap<Arc<str>, u32> {
        let mut workers = HashMap::new();
        for open in self.datasets.iter().flat_map(|queue| queue.shards.values()) {
            if let State::Leased { worker, .. } = &open.state {
                *workers.entry(Arc::clone(worker)).or_default() += 1;
            }
        }
        workers
    }

    fn shards(&mut self, dataset: &DatasetId) -> Option<&mut BTreeMap<u32, Open>> {
        self.datasets.iter_mut().find(|queue| queue.id == *dataset).map(|queue| &mut queue.shards)
    }

    fn open(&mut self, id: &ShardId) -> Option<&mut Open> {
        self.shards(&id.dataset)?.get_mut(&id.shard)
    }
}

#[cfg(test)]
mod tests;
