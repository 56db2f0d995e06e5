use super::*;
use proptest::prelude::*;

const SECONDS: u64 = 10;

fn at(seconds: f64) -> Now {
    Duration::from_secs_f64(seconds)
}

fn config(slots: u32) -> HostBudgets {
    HostBudgets { host_slots: slots, host_rate: 100.0, host_budget: Vec::new(), grant_seconds: SECONDS as f64 }
}

fn demand(wanted: u32, holds: u32) -> Vec<Demand> {
    vec![Demand { host: "h".into(), wanted, holds, in_flight: 0 }]
}

fn ask(broker: &mut Broker, now: Now, worker: &str, sequence: u64, wanted: u32, holds: u32) -> u32 {
    broker.ask(now, worker, sequence, demand(wanted, holds)).expect("in order").shares[0].slots
}

#[test]
fn a_host_has_the_budget_of_the_longest_name_that_fits() {
    let named = |text: &str| named_budget(text).expect(text);
    let config =
        HostBudgets { host_budget: vec![named("flickr.com=64/200"), named("live.flickr.com=8")], ..config(16) };
    for (host, slots, rate) in [
        ("flickr.com", 64, 200.0),
        ("farm1.flickr.com:8080", 64, 200.0),
        ("live.flickr.com", 8, 0.0),
        ("notflickr.com", 16, 100.0),
        ("127.0.0.1:80", 16, 100.0),
        ("[::1]:80", 16, 100.0),
    ] {
        assert_eq!(config.budget(host), Budget { slots, rate }, "{host}");
    }
    for bad in ["flickr.com", "=3", "a=0", "a=x", "a=1/x", "a=1/-1", "a=70000"] {
        assert!(named_budget(bad).is_err(), "{bad}");
    }
}

#[test]
fn workers_share_a_host_equally_once_the_first_has_said_that_it_gave_back() {
    let mut broker = Broker::new(at(0.0), config(8), true);
    assert_eq!(ask(&mut broker, at(0.0), "a", 1, 20, 0), 8);
    assert_eq!(ask(&mut broker, at(0.1), "b", 1, 20, 0), 0);
    assert_eq!(ask(&mut broker, at(1.0), "a", 2, 20, 8), 4, "the answer may be lost");
    assert_eq!(ask(&mut broker, at(1.1), "b", 2, 20, 0), 0);
    assert_eq!(ask(&mut broker, at(1.2), "a", 3, 20, 4), 4);
    assert_eq!(ask(&mut broker, at(1.3), "b", 3, 20, 0), 4);
    let shares = broker.ask(at(1.4), "b", 4, demand(20, 4)).expect("in order");
    assert_eq!((shares.shares[0].rate, shares.ask_again), (50.0, Duration::from_millis(500)));
}

#[test]
fn what_a_silent_worker_held_is_granted_again_after_the_duration_and_the_margin() {
    let mut broker = Broker::new(at(0.0), config(8), true);
    assert_eq!(ask(&mut broker, at(0.0), "a", 1, 20, 0), 8);
    assert_eq!(ask(&mut broker, at(10.9), "b", 1, 20, 0), 0);
    assert_eq!(ask(&mut broker, at(11.0), "b", 2, 20, 0), 8);
}

#[test]
fn a_request_that_was_overtaken_gives_nothing_back() {
    let mut broker = Broker::new(at(0.0), config(8), true);
    assert_eq!(ask(&mut broker, at(0.0), "a", 2, 8, 1), 8);
    assert_eq!(broker.ask(at(0.1), "a", 1, demand(1, 1)), None);
    assert_eq!(ask(&mut broker, at(0.2), "b", 1, 8, 0), 0);
}

#[test]
fn a_new_coordinator_prolongs_what_is_held_and_grants_no_more_for_a_duration() {
    let mut broker = Broker::new(at(0.0), config(8), false);
    assert_eq!(ask(&mut broker, at(0.0), "a", 7, 8, 5), 5);
    assert_eq!(ask(&mut broker, at(0.0), "b", 1, 8, 0), 0);
    assert_eq!(ask(&mut broker, at(9.0), "a", 8, 8, 5), 5);
    assert_eq!(ask(&mut broker, at(10.9), "b", 2, 8, 0), 0);
    assert_eq!(ask(&mut broker, at(11.0), "b", 3, 8, 0), 3);
}

#[test]
fn requests_in_flight_count_even_if_their_grant_is_over() {
    let mut broker = Broker::new(at(0.0), config(8), true);
    assert_eq!(ask(&mut broker, at(0.0), "a", 1, 8, 0), 8);
    let late = vec![Demand { host: "h".into(), wanted: 0, holds: 0, in_flight: 6 }];
    assert_eq!(broker.ask(at(20.0), "a", 2, late).expect("in order").shares[0].slots, 0);
    assert_eq!(ask(&mut broker, at(20.0), "b", 1, 8, 0), 2);
}

#[test]
fn with_more_workers_than_slots_each_has_its_turn() {
    let mut broker = Broker::new(at(0.0), config(2), true);
    let mut served = HashSet::new();
    let mut sequence = 0;
    let mut holds = HashMap::<String, u32>::new();
    for second in 0..100 {
        for worker in ["a", "b", "c", "d", "e"] {
            sequence += 1;
            let held = holds.get(worker).copied().unwrap_or(0);
            let slots = ask(&mut broker, at(f64::from(second)), worker, sequence, 9, held);
            holds.insert(worker.to_owned(), slots);
            if slots > 0 {
                served.insert(worker);
            }
        }
        assert!(holds.values().sum::<u32>() <= 2);
    }
    assert_eq!(served.len(), 5);
}

/// What may happen to one of four workers.
#[derive(Debug, Clone)]
enum Event {
    Wait(u64),
    /// It sends a request, wanting so many slots.
    Ask(usize, u32),
    /// The oldest of its requests arrives (or the newest, overtaking the others) and the answer is sent.
    Arrive(usize, bool),
    /// A request is lost.
    Lose(usize),
    /// The newest answer reaches the worker.
    Hear(usize),
    /// Another coordinator takes over; what was under way to the old one is lost.
    Replace,
}

fn event() -> impl Strategy<Value = Event> {
    let worker = 0usize..4;
    prop_oneof![
        3 => (0u64..4000).prop_map(Event::Wait),
        6 => (worker.clone(), 0u32..12).prop_map(|(worker, wanted)| Event::Ask(worker, wanted)),
        6 => (worker.clone(), any::<bool>()).prop_map(|(worker, newest)| Event::Arrive(worker, newest)),
        1 => worker.clone().prop_map(Event::Lose),
        5 => worker.prop_map(Event::Hear),
        1 => Just(Event::Replace),
    ]
}

/// A worker as the contract in fetch.proto describes it. It does nothing between two events, as one that is paused.
#[derive(Debug, Default)]
struct Model {
    sequence: u64,
    /// Slots, rate, and when they end by its clock.
    grant: Option<(u32, f64, Now)>,
    /// When it sent its latest request.
    asked: Now,
    requests: Vec<(u64, Demand)>,
    answer: Option<(u64, Shares)>,
}

impl Model {
    fn live(&self, now: Now) -> (u32, f64) {
        self.grant.filter(|(_, _, until)| *until > now).map_or((0, 0.0), |(slots, rate, _)| (slots, rate))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn live_grants_stay_within_the_budget_whatever_is_lost_late_or_replaced(
        events in prop::collection::vec(event(), 1..150), first: bool,
    ) {
        const BUDGET: u32 = 8;
        let timeout = Duration::from_secs(SECONDS) / 4;
        let mut now = at(0.0);
        let mut broker = Broker::new(now, config(BUDGET), first);
        let mut workers: [Model; 4] = Default::default();
        for event in events {
            match event {
                Event::Wait(millis) => now += Duration::from_millis(millis),
                Event::Ask(which, wanted) => {
                    let worker = &mut workers[which];
                    // It lowers itself to what it wants before it says so, and counts on nothing that ends soon.
                    worker.grant = worker.grant.filter(|(slots, _, until)| *slots > 0 && *until > now + timeout);
                    worker.grant = worker.grant.map(|(slots, rate, until)| {
                        let kept = slots.min(wanted);
                        (kept, rate * f64::from(kept) / f64::from(slots), until)
                    });
                    let holds = worker.live(now).0;
                    worker.sequence += 1;
                    worker.asked = now;
                    worker.answer = None;
                    let demand = Demand { host: "h".into(), wanted, holds, in_flight: 0 };
                    worker.requests.push((worker.sequence, demand));
                }
                Event::Arrive(which, newest) => {
                    let worker = &mut workers[which];
                    if worker.requests.is_empty() {
                        continue;
                    }
                    let place = if newest { worker.requests.len() - 1 } else { 0 };
                    let (sequence, demand) = worker.requests.remove(place);
                    let answer = broker.ask(now, &which.to_string(), sequence, vec![demand]);
                    if let Some(answer) = answer && sequence == worker.sequence {
                        worker.answer = Some((sequence, answer));
                    }
                }
                Event::Lose(which) => drop(workers[which].requests.pop()),
                Event::Hear(which) => {
                    let worker = &mut workers[which];
                    if let Some((_, answer)) = worker.answer.take() && now < worker.asked + timeout {
                        let Share { slots, rate, .. } = answer.shares[0];
                        worker.grant = Some((slots, rate, worker.asked + answer.duration));
                    }
                }
                Event::Replace => {
                    broker = Broker::new(now, config(BUDGET), false);
                    workers.iter_mut().for_each(|worker| {
                        worker.requests.clear();
                        worker.answer = None;
                    });
                }
            }
            let (slots, rate) = workers
                .iter()
                .map(|worker| worker.live(now))
                .fold((0, 0.0), |(slots, rate), (s, r)| (slots + s, rate + r));
            prop_assert!(slots <= BUDGET && rate <= 100.0 + 1e-6, "{slots} slots, {rate} per second: {workers:?}");
        }
    }
}
