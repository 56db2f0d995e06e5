//! Leases: shards are granted, renewed, given back, committed, and given up.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use proto::handover::Handover;
use proto::pb::{FailureKind, FetchedRules, KnownRules};
use proto::{Attempt, DatasetId, OutcomeCounts, Rejection, ShardId, ShardIndex, keys};
use tracing::{error, info, warn};

use super::wanted::Wanted;
use super::{Dataset, Datasets, Stage, State};
use crate::damage::{self, Read};
use crate::error::Error;
use crate::handover;
use crate::ledger::{Counts, Decision, Expired, MOST_STRIKES, Renewal};
use crate::metrics;
use crate::shares::{Demand, Learned, Share, Shares};
use crate::store::{Created, nonce, wall_millis};

/// A worker that has not been heard of for so long is not shown any more.
const WORKER_FORGOTTEN: Duration = Duration::from_secs(60);

/// Shards that are checked at the same time. One whose index the store does not give holds up no other until there are
/// so many of them.
const CHECKS: usize = 32;

/// Shards whose attempts are over.
#[derive(Default)]
struct Checks {
    waiting: VecDeque<ShardId>,
    open: FuturesUnordered<BoxFuture<'static, ()>>,
}

/// The lease of one shard, as a worker gets it.
#[derive(Debug, Clone)]
pub(crate) struct Grant {
    pub(crate) id: ShardId,
    pub(crate) attempt: Attempt,
    pub(crate) duration: Duration,
    pub(crate) spec_json: String,
    /// Of the shard's round.
    pub(crate) traceparent: String,
    /// Samples that classes still want, by label; see `wanted`.
    pub(crate) wanted: Arc<HashMap<u32, u64>>,
    /// Its URLs have failed before.
    pub(crate) once: bool,
    /// What lately gave pictures to others.
    pub(crate) probes: Vec<String>,
}

/// What a worker says with a renewal.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// URLs so far.
    pub(crate) outcomes: OutcomeCounts,
    /// Samples so far, by label.
    pub(crate) kept: HashMap<u32, u64>,
    /// What holds it up.
    pub(crate) trouble: Option<(FailureKind, String)>,
    /// URLs that lately gave it pictures.
    pub(crate) good: Vec<String>,
}

impl State {
    /// Refuses who speaks of another worker's attempt.
    fn check_holder(&mut self, worker: &str, id: &ShardId, attempt: Attempt) -> Result<(), Error> {
        match self.ledger.holder(id, attempt) {
            Some(holder) if holder != worker => {
                let (dataset, shard) = (&id.dataset, id.shard);
                Err(Error::Denied(format!(
                    "attempt {attempt} at shard {shard} of {dataset} is another worker's than {worker:?}"
                )))
            }
            _ => Ok(()),
        }
    }
}

/// A lease that goes on.
#[derive(Debug, Clone)]
pub(crate) struct Renewed {
    pub(crate) duration: Duration,
    /// As in [`Grant`].
    pub(crate) wanted: Arc<HashMap<u32, u64>>,
    /// As in [`Grant`].
    pub(crate) probes: Vec<String>,
    /// Nothing more is to be begun.
    pub(crate) finish: bool,
}

impl Datasets {
    /// Waits for a shard to make, at most so long: of one `large` site alone, or of many.
    pub(crate) async fn lease(&self, worker: &str, large: bool, wait: Duration) -> Option<Grant> {
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let freed = self.free.notified();
            tokio::pin!(freed);
            // Listens before it looks, so that nothing is missed in between.
            freed.as_mut().enable();
            if let Some(grant) = self.grant(worker, large) {
                return Some(grant);
            }
            if tokio::time::timeout_at(deadline, freed).await.is_err() {
                return None;
            }
        }
    }

    pub(super) fn shares(&self) -> MutexGuard<'_, Shares> {
        // Nothing under the lock can leave it half changed.
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Shares::ask`]; and for how long the parts last.
    pub(crate) fn share(&self, worker: &str, sequence: u64, demands: &[Demand]) -> Option<(Vec<Share>, Duration)> {
        let mut shares = self.shares();
        let answers = shares.ask(self.now(), worker, sequence, demands, &self.sites)?;
        // Whoever begins a later term waits for one lease time before it lends anything: by then all that this one has
        // lent must have ended, even if it does not know yet that its own term is over.
        Some((answers, shares.lease().saturating_sub(self.term.unchecked())))
    }

    /// Takes up files by which sites say what may be taken from them, as this worker has read them; and says what is
    /// known of those that it wants.
    pub(crate) fn share_rules(
        &self,
        worker: &str,
        agent: &str,
        fetched: Vec<FetchedRules>,
        wanted: &[String],
    ) -> Vec<KnownRules> {
        let now = self.now();
        // Nothing under the lock can leave it half changed.
        let mut known = self.site_rules.lock().unwrap_or_else(PoisonError::into_inner);
        fetched.into_iter().for_each(|fetched| known.tell(now, agent, &fetched.url, fetched.rules));
        wanted.iter().map(|url| known.ask(now, worker, agent, url)).collect()
    }

    /// What the next coordinator is to know. `served`: this one answers no more.
    pub(crate) fn handover(&self, served: bool) -> Handover {
        let (now, shares) = (self.now(), self.shares());
        let site = |(name, learned): (&str, Learned)| {
            (name.to_owned(), handover::site(learned.rate, learned.quiet_until.saturating_sub(now)))
        };
        Handover {
            format: 1,
            term: self.term.number(),
            at_millis: wall_millis(),
            all_back: served && shares.is_all_back(now),
            sites: shares.learned(now).map(site).collect(),
        }
    }

    /// A shard to make, if there is one now.
    pub(crate) fn grant(&self, worker: &str, large: bool) -> Option<Grant> {
        let now = self.now();
        let mut state = self.state();
        let state = &mut *state;
        state.workers.insert(worker.to_owned(), now);
        let (id, attempt) = state.ledger.order().iter().find_map(|of| {
            let sites = self.leasable_sites(state, of, large);
            let dataset = state.live.get(of).filter(|dataset| !dataset.is_finished())?;
            let urls = |shard| dataset.slice_of(shard).map_or(1, |slice| slice.urls);
            let ledger = &mut state.ledger;
            sites.iter().find_map(|wanted| {
                ledger.grant(now, worker, of, urls, |shard| dataset.deal.site(shard) == wanted.as_ref())
            })
        })?;
        let dataset = state.live.get_mut(&id.dataset)?;
        dataset.revision += 1;
        metrics::lease_granted();
        info!(dataset = &*id.dataset, shard = id.shard, %attempt, worker, "lease granted");
        let wanted = dataset.wanted.as_ref().map(Wanted::by_label).unwrap_or_default();
        let round = dataset.rounds.iter().find(|round| round.shards().contains(&id.shard));
        let traceparent = round.map(|round| round.traceparent.clone()).unwrap_or_default();
        let (duration, spec_json) = (state.ledger.lease(), dataset.spec_json.clone());
        let once = dataset.slice_of(id.shard).is_some_and(|slice| slice.once);
        let probes = state.probes.of_others(worker);
        Some(Grant { id, attempt, duration, spec_json, traceparent, wanted, once, probes })
    }

    /// Prolongs a lease; None: it is over.
    ///
    /// # Errors
    /// If it is another worker's.
    pub(crate) fn renew(
        &self,
        worker: &str,
        id: &ShardId,
        attempt: Attempt,
        report: Report,
    ) -> Result<Option<Renewed>, Error> {
        let Report { outcomes, kept, trouble, good } = report;
        let now = self.now();
        let mut state = self.state();
        let state = &mut *state;
        state.check_holder(worker, id, attempt)?;
        state.workers.insert(worker.to_owned(), now);
        state.probes.heard(worker, good);
        match state.ledger.renew(now, id, attempt, worker, outcomes.total()) {
            Renewal::Prolonged => {}
            Renewal::Over => return Ok(None),
            Renewal::Stalled => {
                let text = format!("slice {}: no URL was finished for ten minutes", id.shard);
                warn!(dataset = &*id.dataset, shard = id.shard, %attempt, worker, "attempt stands still; its lease ends");
                state.failed(now, FailureKind::Slice, Some(worker), &id.dataset, text);
                return Ok(None);
            }
        }
        let Some(dataset) = state.live.get_mut(&id.dataset) else { return Ok(None) };
        state.troubles.held_up(now, worker, &id.dataset, trouble);
        dataset.progressed(id.shard, outcomes, &kept);
        let wanted = dataset.wanted.as_ref().map(Wanted::by_label).unwrap_or_default();
        let (finish, probes) = (dataset.is_finished(), state.probes.of_others(worker));
        Ok(Some(Renewed { duration: state.ledger.lease(), wanted, probes, finish }))
    }

    /// Takes a lease back: after a failure, or on an orderly exit.
    ///
    /// # Errors
    /// If it is another worker's.
    pub(crate) fn release(
        &self,
        worker: &str,
        id: &ShardId,
        attempt: Attempt,
        failure: Option<(FailureKind, String)>,
    ) -> Result<(), Error> {
        self.state().check_holder(worker, id, attempt)?;
        match &failure {
            None => metrics::lease_over(),
            Some((kind, failure)) => {
                let kind = kind.as_str_name();
                warn!(dataset = &*id.dataset, shard = id.shard, %attempt, worker, kind, failure, "attempt failed");
            }
        }
        {
            let now = self.now();
            let mut state = self.state();
            state.workers.insert(worker.to_owned(), now);
            let held = state.ledger.release(now, id, attempt, failure.as_ref().map(|(kind, _)| *kind));
            if let Some(dataset) = state.live.get_mut(&id.dataset).filter(|_| held) {
                dataset.dropped(id.shard);
            }
            if let Some((kind, text)) = failure.filter(|_| held) {
                state.failed(now, kind, Some(worker), &id.dataset, format!("slice {}: {text}", id.shard));
            }
        }
        self.free.notify_waiters();
        Ok(())
    }

    /// Reads the index of a shard that a worker says is committed, and returns the attempt that stands in it.
    pub(crate) async fn complete(
        self: &Arc<Self>,
        worker: &str,
        id: &ShardId,
        good: Vec<String>,
    ) -> Result<Attempt, Error> {
        {
            let mut state = self.state();
            state.workers.insert(worker.to_owned(), self.now());
            state.probes.heard(worker, good);
            if !state.live.contains_key(&id.dataset) {
                return Err(Error::NotFound(format!("no dataset {:?}", id.dataset)));
            }
        }
        let index = damage::find_index(&self.store, id).await?;
        let index =
            index.ok_or_else(|| Error::Precondition(format!("{} does not exist: put it first", keys::index(id))))?;
        self.committed(id, &index);
        Ok(index.map_or(Attempt { term: 0, n: 0 }, |index| index.attempt))
    }

    /// Takes note of a shard's index. One that cannot be read commits the shard, too, since nobody can put another: its
    /// URLs come again in another round.
    fn committed(self: &Arc<Self>, of: &ShardId, index: &Read<ShardIndex>) {
        let id = &of.dataset;
        let all = {
            let mut state = self.state();
            // A shard without a file was closed by a coordinator.
            let worker = index.as_ref().ok().and_then(|index| index.outcomes_file.as_ref().map(|_| &*index.writer));
            if !state.ledger.commit(of, worker) {
                return;
            }
            if let Some(worker) = worker {
                state.troubles.worked(Some(worker));
                if let Ok(index) = index {
                    state.yielded(self.now(), of, worker, &index.outcomes);
                }
            }
            let counts = state.ledger.counts(id);
            let Some(dataset) = state.live.get_mut(id) else { return };
            match index {
                Ok(index) => {
                    dataset.count(index);
                    let (attempt, writer) = (index.attempt, &index.writer);
                    info!(dataset = &**id, shard = of.shard, %attempt, writer, "shard committed");
                }
                Err(damaged) => {
                    let (key, what) = (&damaged.key, &damaged.what);
                    error!(
                        dataset = &**id,
                        shard = of.shard,
                        key,
                        what,
                        "index is damaged; its URLs are fetched again"
                    );
                    dataset.count_damaged(damaged.clone());
                }
            }
            metrics::shard_committed();
            let all = counts == Counts::default();
            if all {
                dataset.stage = Stage::Sealing;
            }
            all
        };
        if all {
            self.spawn_seal(id.clone());
        }
    }

    /// Reads whether the last attempt at a shard has left an index, and decides what becomes of the shard.
    async fn check(self: &Arc<Self>, id: ShardId) -> Result<(), Error> {
        let read = damage::find_index(&self.store, &id).await;
        if let Some(index) = read.inspect_err(|_| self.state().ledger.postpone(self.now(), &id))? {
            self.committed(&id, &index);
            return Ok(());
        }
        let decision = {
            let mut state = self.state();
            let dataset = state.live.get(&id.dataset);
            let urls = dataset.and_then(|dataset| dataset.slice_of(id.shard)).map_or(0, |slice| slice.urls);
            let finished = dataset.is_some_and(Dataset::is_finished);
            state.ledger.decide(self.now(), &id, urls, finished)
        };
        match decision {
            None => Ok(()),
            Some(Decision::Retry) => {
                metrics::lease_over();
                info!(dataset = &*id.dataset, shard = id.shard, "shard is free again");
                if let Some(dataset) = self.state().live.get_mut(&id.dataset) {
                    dataset.dropped(id.shard);
                }
                self.free.notify_waiters();
                Ok(())
            }
            Some(decision) => {
                let closed = self.close(&id, decision).await;
                closed.inspect_err(|_| self.state().ledger.postpone(self.now(), &id))
            }
        }
    }

    /// Commits a slice that has failed too often or is not to be fetched, with every URL as `unfetched`: a later round
    /// deals them in smaller slices. One that failed alone is `slice_failed`.
    async fn close(self: &Arc<Self>, id: &ShardId, why: Decision) -> Result<(), Error> {
        let urls = {
            let state = self.state();
            state.live.get(&id.dataset).and_then(|dataset| dataset.slice_of(id.shard)).map(|slice| slice.urls)
        };
        let Some(urls) = urls else { return Ok(()) };
        // A stale coordinator must not close what the workers of a later one make.
        self.term.check(&self.store).await?;
        let failed = why == Decision::GiveUp;
        let outcome = if failed && urls == 1 { Rejection::SliceFailed } else { Rejection::Unfetched };
        let index = ShardIndex {
            version: 1,
            nonce: nonce(),
            writer: "coordinator".to_owned(),
            shard: id.shard,
            attempt: Attempt { term: self.term.number(), n: 0 },
            outcomes: [(Err(outcome), urls.into())].into_iter().collect(),
            tars: BTreeMap::new(),
            outcomes_file: None,
        };
        let index = match self.store.create(&keys::index(id), &index).await? {
            Created::Won => Ok(index),
            Created::Lost(theirs) => damage::known_index(&self.store, id, &theirs).await?,
        };
        let (dataset, shard, outcome) = (&*id.dataset, id.shard, outcome.name());
        match failed {
            true => warn!(dataset, shard, urls, outcome, "slice failed {MOST_STRIKES} workers; it is closed"),
            false => info!(dataset, shard, urls, outcome, "slice is closed: its dataset is to be finished"),
        }
        self.committed(id, &index);
        Ok(())
    }

    /// Ends leases whose time is over, until the process ends.
    pub(crate) async fn watch_leases(self: Arc<Self>) {
        let period = (self.state().ledger.lease() / 10).clamp(Duration::from_millis(50), Duration::from_secs(1));
        let mut clock = tokio::time::interval(period);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut checks = Checks::default();
        loop {
            tokio::select! {
                _ = clock.tick() => self.end_leases(&mut checks),
                // A store that hangs at one shard must not keep the leases of others from their end.
                () = self.check_next(&mut checks) => {}
            }
        }
    }

    /// The same once, for a simulated coordinator.
    #[cfg(test)]
    pub(crate) async fn end_leases_now(self: &Arc<Self>) {
        let mut checks = Checks::default();
        self.end_leases(&mut checks);
        while !(checks.waiting.is_empty() && checks.open.is_empty()) {
            self.check_next(&mut checks).await;
        }
        self.free.notify_waiters();
    }

    /// Ends the leases whose time is over now; what becomes of their shards is still to be looked at.
    fn end_leases(&self, checks: &mut Checks) {
        checks.waiting.extend(self.expire());
        // They can wait, and of those that are closed there may be very many.
        if checks.waiting.is_empty() {
            checks.waiting.extend(self.take_finished());
        }
        // Shards whose pause after a failure is over are free now, too.
        self.free.notify_waiters();
    }

    /// Waits until one more check is done. Nothing is lost if it is not waited for to the end.
    async fn check_next(self: &Arc<Self>, checks: &mut Checks) {
        while checks.open.len() < CHECKS
            && let Some(id) = checks.waiting.pop_front()
        {
            let this = Arc::clone(self);
            let check = async move {
                if let Err(error) = this.check(id.clone()).await {
                    warn!(dataset = &*id.dataset, shard = id.shard, %error, "cannot check a shard");
                    let text = format!("shard {}: {error}", id.shard);
                    this.state().failed(this.now(), FailureKind::Store, None, &id.dataset, text);
                }
            };
            checks.open.push(check.boxed());
        }
        if checks.open.next().await.is_none() {
            std::future::pending().await
        }
    }

    /// Ends what is over; the shards that are to be checked.
    fn expire(&self) -> Vec<ShardId> {
        let mut state = self.state();
        let state = &mut *state;
        let now = self.now();
        state.workers.retain(|_, seen| now < *seen + WORKER_FORGOTTEN);
        state.ledger.retain_workers(|worker| state.workers.contains_key(worker));
        state.troubles.forget(now, |id| state.live.contains_key(id));
        let (is_worker, is_live) =
            (|name: &str| state.workers.contains_key(name), |id: &DatasetId| state.live.contains_key(id));
        for changed in state.yields.retain(is_worker, is_live) {
            state.compare(now, &changed);
        }
        let mut shards = Vec::new();
        for Expired { id, lost } in state.ledger.expire(now) {
            if let Some((worker, kind)) = lost {
                let together = if kind == FailureKind::Worker { ", as others were" } else { "" };
                warn!(dataset = &*id.dataset, shard = id.shard, worker = &*worker, "worker was lost{together}");
                let text = format!("slice {}: its worker was lost{together}", id.shard);
                state.failed(now, kind, Some(&worker), &id.dataset, text);
            }
            shards.push(id);
        }
        shards
    }
}
