use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

const LEASE: Duration = Duration::from_secs(30);
/// More URLs than one.
const URLS: u32 = 10;

fn at(seconds: u64) -> Now {
    Duration::from_secs(seconds)
}

fn ledger(fresh: bool) -> (Ledger, DatasetId) {
    let mut ledger = Ledger::new(9, LEASE);
    let dataset: DatasetId = "birds-1".parse().expect("an id");
    ledger.add(at(0), &dataset, 0..2, fresh);
    (ledger, dataset)
}

fn ids(expired: &[Expired]) -> Vec<u32> {
    expired.iter().map(|expired| expired.id.shard).collect()
}

/// The shard that a worker gets. Datasets come in the order of their names: whose turn it is is another test's subject.
fn grant(ledger: &mut Ledger, now: Now, worker: &str) -> Option<(ShardId, Attempt)> {
    let mut order = ledger.order();
    order.sort();
    order.iter().find_map(|dataset| ledger.grant(now, worker, dataset, |_| URLS, |_| true))
}

#[test]
fn datasets_share_the_workers_by_urls_and_weight_and_one_that_comes_late_waits_for_nobody() {
    let mut ledger = Ledger::new(9, LEASE);
    let id = |name: &str| -> DatasetId { name.parse().expect("an id") };
    let (large, small) = (id("large-1"), id("small-1"));
    ledger.add(at(0), &large, 0..1000, true);
    let granted = |ledger: &mut Ledger, times: u32| {
        let urls = |shard: u32| if shard < 1000 { 100 } else { 10 };
        let grant = |_| {
            let order = ledger.order();
            let of = |dataset: &DatasetId| ledger.grant(at(0), "w", dataset, urls, |_| true);
            let (id, attempt) = order.iter().find_map(of).expect("there is more than enough");
            ledger.commit(&id, Some("w"));
            assert!(attempt.n > 0);
            u32::from(id.dataset == small)
        };
        (0..times).map(grant).sum::<u32>()
    };
    granted(&mut ledger, 500);
    ledger.add(at(0), &small, 1000..1300, true);
    // Ten small slices are as much as a large one.
    assert!((99..=101).contains(&granted(&mut ledger, 110)));
    ledger.control(&small, 4.0, false);
    assert!((40..=42).contains(&granted(&mut ledger, 42)));
    ledger.control(&small, 1.0, true);
    assert_eq!(granted(&mut ledger, 50), 0);
    ledger.control(&small, 1.0, false);
    // For what it did not want while it was paused it gets nothing now.
    assert!((49..=52).contains(&granted(&mut ledger, 56)));
}

#[test]
fn shards_that_nobody_makes_are_closed_when_their_dataset_is_finished() {
    let (mut ledger, dataset) = ledger(true);
    let (leased, attempt) = grant(&mut ledger, at(0), "w").expect("two are free");
    let taken = ledger.take_waiting(&dataset, 10);
    assert_eq!(taken, [dataset.shard(1 - leased.shard)]);
    assert_eq!(ledger.decide(at(0), &taken[0], URLS, true), Some(Decision::Close));
    assert_eq!(ledger.renew(at(10), &leased, attempt, "w", 1), Renewal::Prolonged);
    assert!(ledger.take_waiting(&dataset, 10).is_empty());
}

/// A worker is granted a shard and fails at it; what is then decided.
fn fail(ledger: &mut Ledger, now: Now, worker: &str, kind: FailureKind, urls: u32) -> Option<Decision> {
    let (id, attempt) = grant(ledger, now, worker).expect("one is free");
    assert!(ledger.release(now, &id, attempt, Some(kind)));
    assert_eq!(ids(&ledger.expire(now)), [id.shard]);
    ledger.decide(now, &id, urls, false)
}

#[test]
fn a_lease_that_expires_is_checked_before_it_is_granted_again() {
    let (mut ledger, _) = ledger(true);
    let (id, attempt) = grant(&mut ledger, at(0), "w1").expect("two are free");
    assert_eq!((id.shard, attempt), (0, Attempt { term: 9, n: 1 }));
    assert_eq!(ledger.renew(at(20), &id, attempt, "w1", 1), Renewal::Prolonged);
    assert!(ledger.expire(at(49)).is_empty());
    let lost = Some(("w1".into(), FailureKind::Slice));
    assert_eq!(ledger.expire(at(50)), [Expired { id: id.clone(), lost }]);
    assert_eq!(grant(&mut ledger, at(50), "w2").expect("the other one").0.shard, 1);
    assert_eq!(grant(&mut ledger, at(50), "w2"), None);
    assert_eq!(ledger.decide(at(50), &id, URLS, false), Some(Decision::Retry));
    let (again, second) = grant(&mut ledger, at(50), "w2").expect("free again");
    assert_eq!((again, second.n), (id.clone(), 3));
    assert_eq!(ledger.renew(at(51), &id, attempt, "w1", 1), Renewal::Over, "the first attempt is over");
}

#[test]
fn a_new_coordinator_waits_one_lease_time_and_adopts_what_is_renewed() {
    let (mut ledger, dataset) = ledger(false);
    let old = Attempt { term: 8, n: 5 };
    assert_eq!(grant(&mut ledger, at(29), "w"), None);
    assert_eq!(ledger.renew(at(29), &dataset.shard(1), old, "w1", 0), Renewal::Prolonged);
    let another = Attempt { term: 8, n: 4 };
    assert_eq!(ledger.renew(at(29), &dataset.shard(1), another, "w0", 0), Renewal::Over);
    let unheard = ledger.expire(at(30));
    assert_eq!(ids(&unheard), [0]);
    assert_eq!(ledger.decide(at(30), &unheard[0].id, URLS, false), Some(Decision::Retry));
    assert_eq!(grant(&mut ledger, at(30), "w").expect("shard 0").0.shard, 0);
    assert_eq!(grant(&mut ledger, at(30), "w"), None);
}

#[test]
fn an_attempt_is_its_workers_until_it_has_come_to_an_end() {
    let (mut ledger, dataset) = ledger(false);
    let (adopted, old) = (dataset.shard(1), Attempt { term: 8, n: 5 });
    assert_eq!(ledger.renew(at(1), &adopted, Attempt { term: 0, n: 1 }, "w0", 0), Renewal::Over, "no term was 0");
    assert_eq!(ledger.holder(&adopted, old), None);
    assert_eq!(ledger.renew(at(1), &adopted, old, "w1", 0), Renewal::Prolonged);
    assert_eq!(ledger.holder(&adopted, old), Some("w1"));
    assert_eq!(ids(&ledger.expire(at(31))), [0, 1]);
    assert_eq!(ledger.holder(&adopted, old), Some("w1"), "it may be late");
    assert_eq!(ledger.renew(at(31), &adopted, old, "w1", 1), Renewal::Prolonged);
    assert!(ledger.release(at(32), &adopted, old, None));
    assert_eq!(ledger.holder(&adopted, old), None, "it does not come back");
    let (again, new) = grant(&mut ledger, at(32), "w2").expect("given back");
    assert_eq!((again.shard, ledger.holder(&again, new)), (1, Some("w2")));
    assert_eq!(ledger.holder(&again, old), None);
}

/// One shard, and after it another dataset's hundred, which are made by others.
fn with_others() -> (Ledger, ShardId, DatasetId) {
    let mut ledger = Ledger::new(9, LEASE);
    let (dataset, others): (DatasetId, DatasetId) =
        ("birds-1".parse().expect("an id"), "cats-1".parse().expect("an id"));
    ledger.add(at(0), &dataset, 0..1, true);
    ledger.add(at(0), &others, 0..100, true);
    (ledger, dataset.shard(0), others)
}

#[test]
fn a_slice_at_which_five_workers_fail_while_others_are_made_is_given_up() {
    let (mut ledger, _, others) = with_others();
    for n in 1..=MOST_STRIKES as u32 {
        let decision = fail(&mut ledger, at(1000) * n, &format!("w{n}"), FailureKind::Slice, URLS);
        let last = n as usize == MOST_STRIKES;
        assert_eq!(decision, Some(if last { Decision::GiveUp } else { Decision::Retry }));
        assert!(ledger.commit(&others.shard(n), Some("other")));
    }
}

#[test]
fn failures_without_a_witness_close_nothing_until_no_slice_has_failed_less() {
    let (mut ledger, id, others) = with_others();
    let failures = |ledger: &mut Ledger, from: u32| {
        let mut failures = (from..from + 20).map(|n| {
            let decision = fail(ledger, at(1000) * n, &format!("w{n}"), FailureKind::Slice, URLS);
            if decision == Some(Decision::GiveUp) {
                ledger.postpone(at(0), &id)
            }
            decision
        });
        failures.position(|decision| decision == Some(Decision::GiveUp))
    };
    assert_eq!(failures(&mut ledger, 1), None, "nothing was committed");
    ledger.remove(&others);
    assert_eq!(failures(&mut ledger, 50), Some(3), "with the first one five");
}

#[test]
fn a_worker_counts_once_unless_it_did_other_work_in_between() {
    let (mut ledger, _, others) = with_others();
    for n in 1..=30 {
        assert_eq!(fail(&mut ledger, at(1000) * n, "w", FailureKind::Slice, URLS), Some(Decision::Retry));
        ledger.commit(&others.shard(n), Some("other"));
    }
    for n in 31..=33 {
        ledger.commit(&others.shard(n), Some("w"));
        assert_eq!(fail(&mut ledger, at(1000) * n, "w", FailureKind::Slice, URLS), Some(Decision::Retry));
    }
    ledger.commit(&others.shard(34), Some("w"));
    assert_eq!(fail(&mut ledger, at(40_000), "w", FailureKind::Slice, URLS), Some(Decision::GiveUp));
}

#[test]
fn faults_of_stores_workers_and_networks_close_nothing_but_slow_down_who_fails() {
    let (mut ledger, id, others) = with_others();
    for n in 1..=50 {
        let kind = [FailureKind::Store, FailureKind::Worker, FailureKind::WayOut][n as usize % 3];
        let now = at(1000) * n;
        assert_eq!(fail(&mut ledger, now, &format!("w{}", n % 7), kind, URLS), Some(Decision::Retry));
        ledger.commit(&others.shard(n), Some("other"));
        assert_eq!(grant(&mut ledger, now, &format!("w{}", n % 7)), None, "it failed just now");
        let (granted, attempt) = grant(&mut ledger, now, "another").expect("free at once");
        assert_eq!(granted, id);
        ledger.release(now, &id, attempt, None);
    }
    assert_eq!(grant(&mut ledger, at(50_020), "w1"), None, "it has failed often");
    ledger.commit(&others.shard(60), Some("w1"));
    assert!(grant(&mut ledger, at(50_020), "w1").is_some(), "it has shown that it works");
}

#[test]
fn workers_that_are_lost_together_strike_no_slice() {
    let (mut ledger, id, others) = with_others();
    for n in 1..=20 {
        let now = at(1000) * n;
        assert_eq!(grant(&mut ledger, now, &format!("a{n}")).expect("free").0, id);
        let (other, _) = grant(&mut ledger, now + at(5), &format!("b{n}")).expect("free");
        let lost = ledger.expire(now + LEASE);
        assert_eq!(lost[0].lost.as_ref().expect("lost").1, FailureKind::Slice, "so it seems at first");
        assert_eq!(ledger.decide(now + LEASE, &id, URLS, false), Some(Decision::Retry));
        let lost = ledger.expire(now + LEASE + at(5));
        assert_eq!(lost[0].lost.as_ref().expect("lost").1, FailureKind::Worker);
        assert_eq!(ledger.decide(now + LEASE + at(5), &other, URLS, false), Some(Decision::Retry));
        ledger.commit(&others.shard(50 + n), Some("other"));
    }
}

#[test]
fn one_url_alone_is_given_up_only_after_something_has_worked() {
    let (mut ledger, _, others) = with_others();
    ledger.remove(&others);
    for n in 1..=20 {
        assert_eq!(fail(&mut ledger, at(1000) * n, &format!("w{n}"), FailureKind::Slice, 1), Some(Decision::Retry));
    }
    ledger.add(at(20_000), &others, 0..1, true);
    ledger.commit(&others.shard(0), Some("other"));
    assert_eq!(fail(&mut ledger, at(30_000), "w", FailureKind::Slice, 1), Some(Decision::GiveUp));
}

#[test]
fn a_lease_without_progress_is_taken_back() {
    let (mut ledger, id, _) = with_others();
    let (_, attempt) = grant(&mut ledger, at(0), "w").expect("free");
    for n in 1..=60 {
        // It finishes a URL each five minutes at first.
        assert_eq!(ledger.renew(at(20) * n, &id, attempt, "w", u64::from(n / 15)), Renewal::Prolonged);
    }
    for n in 61..90 {
        assert_eq!(ledger.renew(at(20) * n, &id, attempt, "w", 4), Renewal::Prolonged);
    }
    assert_eq!(ledger.renew(at(1800), &id, attempt, "w", 4), Renewal::Stalled);
    assert_eq!(ledger.renew(at(1801), &id, attempt, "w", 5), Renewal::Over, "it does not come back");
    assert_eq!(ids(&ledger.expire(at(1801))), [0]);
}

#[test]
fn an_orderly_release_costs_nothing_and_a_late_attempt_keeps_what_nobody_took() {
    let (mut ledger, dataset) = ledger(true);
    let (id, first) = grant(&mut ledger, at(0), "w").expect("free");
    ledger.release(at(1), &id, first, None);
    assert_eq!(ledger.renew(at(1), &id, first, "w", 0), Renewal::Over, "it was given back");
    let (_, second) = grant(&mut ledger, at(1), "w").expect("free again at once");
    ledger.expire(at(31));
    ledger.decide(at(31), &id, URLS, false);
    assert_eq!(ledger.renew(at(32), &id, second, "w", 0), Renewal::Prolonged);
    assert_eq!(ledger.counts(&dataset), Counts { waiting: 1, leased: 1 });
    let open = ledger.open(&id).expect("open");
    assert_eq!((open.failures, open.strikes.len()), (0, 0), "it was late, no more");
}

#[derive(Debug, Clone)]
enum Event {
    Wait(u64),
    Grant(u8),
    Renew(usize, u64),
    Release(usize, Option<FailureKind>),
    Tick,
    Commit(u32, u8),
}

fn event() -> impl Strategy<Value = Event> {
    let failure = prop_oneof![
        Just(None),
        Just(Some(FailureKind::Slice)),
        Just(Some(FailureKind::Store)),
        Just(Some(FailureKind::Worker)),
    ];
    prop_oneof![
        (0u64..40).prop_map(Event::Wait),
        (0u8..8).prop_map(Event::Grant),
        (0usize..60, 0u64..3).prop_map(|(which, finished)| Event::Renew(which, finished)),
        (0usize..60, failure).prop_map(|(which, failure)| Event::Release(which, failure)),
        Just(Event::Tick),
        (0u32..6, 0u8..8).prop_map(|(shard, worker)| Event::Commit(shard, worker)),
    ]
}

proptest! {
    /// The holders are tracked from the answers alone, as workers see them.
    #[test]
    fn no_two_unexpired_leases_for_one_shard_no_shard_is_lost_and_none_is_given_up_without_five_failures(
        events in prop::collection::vec(event(), 1..300), fresh: bool,
    ) {
        let mut ledger = Ledger::new(2, LEASE);
        let dataset: DatasetId = "d-1".parse().expect("an id");
        ledger.add(at(0), &dataset, 0..6, fresh);
        let mut now = at(0);
        let mut known: Vec<(u32, Attempt)> =
            (0..6).map(|shard| (shard, Attempt { term: 1, n: u64::from(shard) })).collect();
        let mut leases: HashMap<(u32, Attempt), Now> = HashMap::new();
        let mut failures: HashMap<u32, usize> = HashMap::new();
        let mut given_up = HashSet::new();
        let mut committed = HashSet::new();
        for event in events {
            match event {
                Event::Wait(seconds) => now += at(seconds),
                Event::Grant(worker) => if let Some((id, attempt)) = grant(&mut ledger, now, &format!("w{worker}")) {
                    prop_assert!(!known.contains(&(id.shard, attempt)), "an attempt is used twice");
                    known.push((id.shard, attempt));
                    leases.insert((id.shard, attempt), now + LEASE);
                },
                Event::Renew(which, finished) => if let Some(&(shard, attempt)) = known.get(which) {
                    match ledger.renew(now, &dataset.shard(shard), attempt, "w", finished) {
                        Renewal::Prolonged => drop(leases.insert((shard, attempt), now + LEASE)),
                        Renewal::Over => drop(leases.remove(&(shard, attempt))),
                        Renewal::Stalled => {
                            *failures.entry(shard).or_default() += 1;
                            leases.remove(&(shard, attempt));
                        }
                    }
                },
                Event::Release(which, failure) => if let Some(&(shard, attempt)) = known.get(which) {
                    leases.remove(&(shard, attempt));
                    if ledger.release(now, &dataset.shard(shard), attempt, failure) && failure == Some(FailureKind::Slice) {
                        *failures.entry(shard).or_default() += 1;
                    }
                },
                Event::Tick => for expired in ledger.expire(now) {
                    if expired.lost.is_some_and(|(_, kind)| kind == FailureKind::Slice) {
                        *failures.entry(expired.id.shard).or_default() += 1;
                    }
                    if ledger.decide(now, &expired.id, URLS, false) == Some(Decision::GiveUp) {
                        prop_assert!(failures[&expired.id.shard] >= MOST_STRIKES);
                        given_up.insert(expired.id.shard);
                    }
                },
                Event::Commit(shard, worker) => {
                    if ledger.commit(&dataset.shard(shard), Some(&format!("w{worker}"))) {
                        committed.insert(shard);
                        leases.retain(|&(of, _), _| of != shard);
                    }
                }
            }
            let mut held = HashSet::new();
            for (&(shard, _), &until) in &leases {
                prop_assert!(until <= now || held.insert(shard), "two leases for shard {}", shard);
            }
        }
        // Whatever happened: with time, every shard that is neither committed nor given up can be granted again.
        let mut left: HashSet<u32> = (0..6).filter(|s| !committed.contains(s) && !given_up.contains(s)).collect();
        for _ in 0..3 {
            now += LEASE * 20;
            for expired in ledger.expire(now) {
                if ledger.decide(now, &expired.id, URLS, false) == Some(Decision::GiveUp) {
                    left.remove(&expired.id.shard);
                }
            }
        }
        now += LEASE * 20;
        while let Some((id, _)) = grant(&mut ledger, now, "new") {
            left.remove(&id.shard);
        }
        prop_assert!(left.is_empty(), "lost: {:?}", left);
    }
}
