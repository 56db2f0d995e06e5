//! Leases: shards are granted, renewed, given back, committed, and given up.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use proto::{Attempt, DatasetId, OutcomeCounts, Rejection, ShardId, ShardIndex, Stored, keys};
use tracing::{error, info, warn};

use super::wanted::Wanted;
use super::{Datasets, PARALLEL, Stage};
use crate::error::Error;
use crate::ledger::{Counts, Decision};
use crate::metrics;
use crate::store::{Created, nonce};

/// A worker that has not been heard of for so long is not shown any more.
const WORKER_FORGOTTEN: Duration = Duration::from_secs(60);

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
    pub(crate) wanted: HashMap<u32, u64>,
}

/// A lease that goes on.
#[derive(Debug, Clone)]
pub(crate) struct Renewed {
    pub(crate) duration: Duration,
    /// As in [`Grant`].
    pub(crate) wanted: HashMap<u32, u64>,
}

impl Datasets {
    /// Waits for a shard to make, at most so long.
    pub(crate) async fn lease(&self, worker: &str, wait: Duration) -> Option<Grant> {
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let freed = self.free.notified();
            tokio::pin!(freed);
            // Registers before it asks for a shard, so that nothing is missed in between.
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
        metrics::lease_granted();
        info!(dataset = &*id.dataset, shard = id.shard, %attempt, worker, "lease granted");
        let wanted = dataset.wanted.as_ref().map(Wanted::by_label).unwrap_or_default();
        let round = dataset.rounds.iter().find(|round| round.shards().contains(&id.shard));
        let traceparent = round.map(|round| round.traceparent.clone()).unwrap_or_default();
        let (duration, spec_json) = (state.ledger.lease(), dataset.spec_json.clone());
        Some(Grant { id, attempt, duration, spec_json, traceparent, wanted })
    }

    /// Prolongs a lease; None: it is over.
    pub(crate) fn renew(
        &self,
        worker: &str,
        id: &ShardId,
        attempt: Attempt,
        outcomes: OutcomeCounts,
        kept: &HashMap<u32, u64>,
    ) -> Option<Renewed> {
        let now = self.now();
        let mut state = self.state();
        state.workers.insert(worker.to_owned(), Instant::now());
        if !state.ledger.renew(now, id, attempt, worker) {
            return None;
        }
        let dataset = state.live.get_mut(&id.dataset)?;
        dataset.progressed(id.shard, outcomes, kept);
        let wanted = dataset.wanted.as_ref().map(Wanted::by_label).unwrap_or_default();
        Some(Renewed { duration: state.ledger.lease(), wanted })
    }

    /// Takes a lease back.
    pub(crate) fn release(&self, worker: &str, id: &ShardId, attempt: Attempt, failure: &str) {
        let failed = !failure.is_empty();
        if !failed {
            metrics::lease_over();
        } else {
            warn!(dataset = &*id.dataset, shard = id.shard, %attempt, worker, failure, "attempt failed");
        }
        {
            let now = self.now();
            let mut state = self.state();
            state.workers.insert(worker.to_owned(), Instant::now());
            state.ledger.release(now, id, attempt, failed);
            if let Some(dataset) = state.live.get_mut(&id.dataset) {
                dataset.dropped(id.shard);
            }
        }
        self.free.notify_waiters();
    }

    /// Reads the index of a shard that a worker says is committed, and returns the attempt that stands in it.
    pub(crate) async fn complete(self: &Arc<Self>, worker: &str, id: &ShardId) -> Result<Attempt, Error> {
        {
            let mut state = self.state();
            state.workers.insert(worker.to_owned(), Instant::now());
            if !state.live.contains_key(&id.dataset) {
                return Err(Error::NotFound(format!("no dataset {:?}", id.dataset)));
            }
        }
        let key = keys::index(id);
        let json = self.store.get(&key).await?;
        let json = json.ok_or_else(|| Error::Precondition(format!("{key} does not exist: put it first")))?;
        let index = ShardIndex::from_json(&json).map_err(|e| Error::Local(format!("{key}: {e}")))?;
        self.committed(&id.dataset, &index);
        Ok(index.attempt)
    }

    /// Takes note of a shard's index.
    fn committed(self: &Arc<Self>, id: &DatasetId, index: &ShardIndex) {
        let all = {
            let mut state = self.state();
            if !state.ledger.commit(&id.shard(index.shard)) {
                return;
            }
            let counts = state.ledger.counts(id);
            let Some(dataset) = state.live.get_mut(id) else { return };
            dataset.count(index);
            metrics::shard_committed();
            info!(
                dataset = &**id,
                shard = index.shard,
                attempt = %index.attempt,
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
            self.spawn_seal(id.clone());
        }
    }

    /// Reads whether the last attempt at a shard has left an index, and decides what becomes of the shard.
    async fn check(self: &Arc<Self>, id: ShardId) -> Result<(), Error> {
        let key = keys::index(&id);
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
        let decision = self.state().ledger.decide(self.now(), &id);
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
            Some(Decision::GiveUp) => {
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
            attempt: Attempt { term: self.term.number, n: 0 },
            outcomes: [(Err(Rejection::SliceFailed), urls)].into_iter().collect(),
            tars: BTreeMap::new(),
            outcomes_file: None,
        };
        let key = keys::index(id);
        if let Created::Lost(theirs) = self.store.create(&key, &index).await? {
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
}
