//! The ledger of leases: who may make which shard, until when. A pure state machine; time comes in as an argument.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use proto::{Attempt, DatasetId, ShardId};

/// Attempts after which the coordinator closes a slice itself.
pub(crate) const MOST_FAILURES: u32 = 5;

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
    /// Oldest first: it is served first.
    datasets: Vec<(DatasetId, BTreeMap<u32, Open>)>,
}

/// An uncommitted shard.
#[derive(Debug, Clone)]
struct Open {
    failures: u32,
    /// The latest attempt that held it, in this term or, once it was heard of, in an older one.
    attempt: Option<Attempt>,
    state: State,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Can be granted from then on.
    Pending { from: Now },
    /// To be checked then: a new coordinator does not know yet whether somebody of an older term still makes it, an
    /// attempt has failed, or the last check has.
    Unknown { until: Now },
    /// Somebody makes it.
    Leased { worker: Arc<str>, until: Now },
    /// Its attempt is over; whether it left an index is being read.
    Checking,
}

/// What was decided about a shard whose attempt has ended without an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It may be leased again.
    Retry,
    /// It has failed too often: the coordinator closes it with an index of its own.
    GiveUp,
}

/// Shards of a dataset by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Neither leased nor committed.
    pub(crate) waiting: u32,
    /// Somebody makes them.
    pub(crate) leased: u32,
}

impl Ledger {
    /// An empty one. `lease` is the duration of a lease.
    pub(crate) fn new(term: u64, lease: Duration) -> Self {
        Self { term, lease, granted: 0, datasets: Vec::new() }
    }

    /// The duration of a lease.
    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    /// Adds uncommitted shards of a dataset: all of a new one, or those of another round. `fresh`: it was created in
    /// this term, so nobody of an older one can hold a lease.
    pub(crate) fn add(&mut self, now: Now, dataset: &DatasetId, shards: impl IntoIterator<Item = u32>, fresh: bool) {
        let state = if fresh { State::Pending { from: now } } else { State::Unknown { until: now + self.lease } };
        let open = Open { failures: 0, attempt: None, state };
        let shards = shards.into_iter().map(|shard| (shard, open.clone()));
        match self.datasets.iter_mut().find(|(id, _)| id == dataset) {
            Some((_, there)) => there.extend(shards),
            None => self.datasets.push((dataset.clone(), shards.collect())),
        }
    }

    /// Forgets a dataset and all its leases.
    pub(crate) fn remove(&mut self, dataset: &DatasetId) {
        self.datasets.retain(|(id, _)| id != dataset);
    }

    /// Grants the first shard of the oldest dataset that has one.
    pub(crate) fn grant(&mut self, now: Now, worker: &str) -> Option<(ShardId, Attempt)> {
        for (dataset, shards) in &mut self.datasets {
            let free = |open: &Open| matches!(open.state, State::Pending { from } if from <= now);
            let Some((&shard, open)) = shards.iter_mut().find(|(_, open)| free(open)) else { continue };
            self.granted += 1;
            let attempt = Attempt { term: self.term, n: self.granted };
            open.attempt = Some(attempt);
            open.state = State::Leased { worker: worker.into(), until: now + self.lease };
            return Some((dataset.shard(shard), attempt));
        }
        None
    }

    /// Prolongs a lease. An attempt that was late keeps its shard if nobody else has got it meanwhile, which undoes the
    /// failure that its expiry was, and one of an older term is adopted. False: the lease is over.
    pub(crate) fn renew(&mut self, now: Now, id: &ShardId, attempt: Attempt, worker: &str) -> bool {
        let (term, until) = (self.term, now + self.lease);
        let Some(open) = self.open(id) else { return false };
        let known = match open.attempt {
            Some(known) => known == attempt,
            None => attempt.term < term,
        };
        if known {
            if open.attempt.is_some() && !matches!(open.state, State::Leased { .. }) {
                open.failures = open.failures.saturating_sub(1);
            }
            open.attempt = Some(attempt);
            open.state = State::Leased { worker: worker.into(), until };
        }
        known
    }

    /// Takes a lease back before its end. After a failure the shard is over at the next [`Ledger::expire`] and is
    /// checked: the answer of the attempt's last put may have been lost.
    pub(crate) fn release(&mut self, now: Now, id: &ShardId, attempt: Attempt, failed: bool) {
        let Some(open) = self.open(id) else { return };
        if open.attempt != Some(attempt) || !matches!(open.state, State::Leased { .. }) {
            return;
        }
        // It does not come back.
        open.attempt = None;
        if failed {
            open.failures += 1;
            open.state = State::Unknown { until: now };
        } else {
            open.state = State::Pending { from: now };
        }
    }

    /// Ends the leases whose time is over. The caller reads their indexes and says [`Ledger::commit`] or
    /// [`Ledger::decide`].
    pub(crate) fn expire(&mut self, now: Now) -> Vec<ShardId> {
        let mut over = Vec::new();
        for (dataset, shards) in &mut self.datasets {
            for (&shard, open) in shards {
                match open.state {
                    State::Leased { until, .. } if until <= now => open.failures += 1,
                    State::Unknown { until } if until <= now => {}
                    _ => continue,
                }
                open.state = State::Checking;
                over.push(dataset.shard(shard));
            }
        }
        over
    }

    /// Decides about a shard that was checked and has no index. None: its attempt has come back meanwhile.
    pub(crate) fn decide(&mut self, now: Now, id: &ShardId) -> Option<Decision> {
        let lease = self.lease;
        let open = self.open(id)?;
        if open.state != State::Checking {
            return None;
        }
        if open.failures >= MOST_FAILURES {
            return Some(Decision::GiveUp);
        }
        // What fails at once (a store that is down) must not use up all its attempts at once.
        open.state = State::Pending { from: now + lease * open.failures.saturating_sub(1) };
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

    /// Its index is in the store. True: it was not known before.
    pub(crate) fn commit(&mut self, id: &ShardId) -> bool {
        self.shards(&id.dataset).is_some_and(|shards| shards.remove(&id.shard).is_some())
    }

    /// A dataset's uncommitted shards.
    pub(crate) fn counts(&self, dataset: &DatasetId) -> Counts {
        self.count(|id| id == dataset)
    }

    /// All uncommitted shards.
    pub(crate) fn totals(&self) -> Counts {
        self.count(|_| true)
    }

    fn count(&self, which: impl Fn(&DatasetId) -> bool) -> Counts {
        let mut counts = Counts::default();
        for open in self.datasets.iter().filter(|(id, _)| which(id)).flat_map(|(_, shards)| shards.values()) {
            match open.state {
                State::Leased { .. } => counts.leased += 1,
                _ => counts.waiting += 1,
            }
        }
        counts
    }

    /// Leases by worker.
    pub(crate) fn workers(&self) -> HashMap<Arc<str>, u32> {
        let mut workers = HashMap::new();
        for open in self.datasets.iter().flat_map(|(_, shards)| shards.values()) {
            if let State::Leased { worker, .. } = &open.state {
                *workers.entry(Arc::clone(worker)).or_default() += 1;
            }
        }
        workers
    }

    fn shards(&mut self, dataset: &DatasetId) -> Option<&mut BTreeMap<u32, Open>> {
        self.datasets.iter_mut().find(|(id, _)| id == dataset).map(|(_, shards)| shards)
    }

    fn open(&mut self, id: &ShardId) -> Option<&mut Open> {
        self.shards(&id.dataset)?.get_mut(&id.shard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const LEASE: Duration = Duration::from_secs(30);

    fn at(seconds: u64) -> Now {
        Duration::from_secs(seconds)
    }

    fn ledger(fresh: bool) -> (Ledger, DatasetId) {
        let mut ledger = Ledger::new(9, LEASE);
        let dataset: DatasetId = "birds-1".parse().expect("an id");
        ledger.add(at(0), &dataset, 0..2, fresh);
        (ledger, dataset)
    }

    #[test]
    fn a_lease_that_expires_is_checked_before_it_is_granted_again() {
        let (mut ledger, _) = ledger(true);
        let (id, attempt) = ledger.grant(at(0), "w1").expect("two are free");
        assert_eq!((id.shard, attempt), (0, Attempt { term: 9, n: 1 }));
        assert!(ledger.renew(at(20), &id, attempt, "w1"));
        assert!(ledger.expire(at(49)).is_empty());
        assert_eq!(ledger.expire(at(50)), std::slice::from_ref(&id));
        assert_eq!(ledger.grant(at(50), "w2").expect("the other one").0.shard, 1);
        assert_eq!(ledger.grant(at(50), "w2"), None);
        assert_eq!(ledger.decide(at(50), &id), Some(Decision::Retry));
        let (again, second) = ledger.grant(at(50), "w2").expect("free again");
        assert_eq!((again, second.n), (id.clone(), 3));
        assert!(!ledger.renew(at(51), &id, attempt, "w1"), "the first attempt is over");
    }

    #[test]
    fn a_new_coordinator_waits_one_lease_time_and_adopts_what_is_renewed() {
        let (mut ledger, dataset) = ledger(false);
        let old = Attempt { term: 8, n: 5 };
        assert_eq!(ledger.grant(at(29), "w"), None);
        assert!(ledger.renew(at(29), &dataset.shard(1), old, "w1"));
        assert!(!ledger.renew(at(29), &dataset.shard(1), Attempt { term: 8, n: 4 }, "w0"), "it is another's");
        let unheard = ledger.expire(at(30));
        assert_eq!(unheard.iter().map(|id| id.shard).collect::<Vec<_>>(), [0]);
        assert_eq!(ledger.decide(at(30), &unheard[0]), Some(Decision::Retry));
        assert_eq!(ledger.grant(at(30), "w").expect("shard 0").0.shard, 0);
        assert_eq!(ledger.grant(at(30), "w"), None);
    }

    #[test]
    fn a_slice_that_fails_its_workers_is_given_up_after_five_attempts_with_growing_pauses() {
        let (mut ledger, dataset) = ledger(true);
        ledger.commit(&dataset.shard(1));
        let mut now = at(0);
        for failures in 1..=MOST_FAILURES {
            let (id, attempt) = ledger.grant(now, "w").expect("after the pause");
            ledger.release(now, &dataset.shard(0), attempt, true);
            assert_eq!(ledger.expire(now), std::slice::from_ref(&id));
            let decision = ledger.decide(now, &id);
            assert_eq!(decision, Some(if failures == MOST_FAILURES { Decision::GiveUp } else { Decision::Retry }));
            now += LEASE * (failures - 1);
        }
    }

    #[test]
    fn an_orderly_release_costs_nothing_and_a_late_attempt_keeps_what_nobody_took() {
        let (mut ledger, dataset) = ledger(true);
        let (id, first) = ledger.grant(at(0), "w").expect("free");
        ledger.release(at(1), &id, first, false);
        assert!(!ledger.renew(at(1), &id, first, "w"), "it was given back");
        let (_, second) = ledger.grant(at(1), "w").expect("free again at once");
        ledger.expire(at(31));
        ledger.decide(at(31), &id);
        assert!(ledger.renew(at(32), &id, second, "w"));
        assert_eq!(ledger.counts(&dataset), Counts { waiting: 1, leased: 1 });
        assert_eq!(ledger.open(&id).expect("open").failures, 0, "it was late, no more");
    }

    #[derive(Debug, Clone)]
    enum Event {
        Wait(u64),
        Grant,
        Renew(usize),
        Release(usize, bool),
        Tick,
        Commit(u32),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0u64..40).prop_map(Event::Wait),
            Just(Event::Grant),
            (0usize..60).prop_map(Event::Renew),
            (0usize..60, any::<bool>()).prop_map(|(which, failed)| Event::Release(which, failed)),
            Just(Event::Tick),
            (0u32..6).prop_map(Event::Commit),
        ]
    }

    proptest! {
        /// The holders are tracked from the answers alone, as workers see them.
        #[test]
        fn no_two_unexpired_leases_for_one_shard_and_no_shard_is_lost(
            events in prop::collection::vec(event(), 1..200), fresh: bool,
        ) {
            let mut ledger = Ledger::new(2, LEASE);
            let dataset: DatasetId = "d-1".parse().expect("an id");
            ledger.add(at(0), &dataset, 0..6, fresh);
            let mut now = at(0);
            let mut known: Vec<(u32, Attempt)> =
                (0..6).map(|shard| (shard, Attempt { term: 1, n: u64::from(shard) })).collect();
            let mut leases: HashMap<(u32, Attempt), Now> = HashMap::new();
            let mut given_up = HashSet::new();
            let mut committed = HashSet::new();
            for event in events {
                match event {
                    Event::Wait(seconds) => now += at(seconds),
                    Event::Grant => if let Some((id, attempt)) = ledger.grant(now, "w") {
                        prop_assert!(!known.contains(&(id.shard, attempt)), "an attempt is used twice");
                        known.push((id.shard, attempt));
                        leases.insert((id.shard, attempt), now + LEASE);
                    },
                    Event::Renew(which) => if let Some(&(shard, attempt)) = known.get(which) {
                        if ledger.renew(now, &dataset.shard(shard), attempt, "w") {
                            leases.insert((shard, attempt), now + LEASE);
                        } else {
                            leases.remove(&(shard, attempt));
                        }
                    },
                    Event::Release(which, failed) => if let Some(&(shard, attempt)) = known.get(which) {
                        leases.remove(&(shard, attempt));
                        ledger.release(now, &dataset.shard(shard), attempt, failed);
                    },
                    Event::Tick => for id in ledger.expire(now) {
                        if ledger.decide(now, &id) == Some(Decision::GiveUp) {
                            given_up.insert(id.shard);
                        }
                    },
                    Event::Commit(shard) => if ledger.commit(&dataset.shard(shard)) {
                        committed.insert(shard);
                        leases.retain(|&(of, _), _| of != shard);
                    },
                }
                let mut held = HashSet::new();
                for (&(shard, _), &until) in &leases {
                    prop_assert!(until <= now || held.insert(shard), "two leases for shard {}", shard);
                }
            }
            // Whatever happened: with time, every shard that is neither committed nor given up can be granted again.
            let mut left: HashSet<u32> = (0..6).filter(|s| !committed.contains(s) && !given_up.contains(s)).collect();
            for _ in 0..3 {
                now += LEASE * MOST_FAILURES;
                for id in ledger.expire(now) {
                    if ledger.decide(now, &id) == Some(Decision::GiveUp) {
                        left.remove(&id.shard);
                    }
                }
            }
            now += LEASE * MOST_FAILURES;
            while let Some((id, _)) = ledger.grant(now, "w") {
                left.remove(&id.shard);
            }
            prop_assert!(left.is_empty(), "lost: {:?}", left);
        }
    }
}
