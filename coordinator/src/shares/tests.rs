use proptest::prelude::*;

use super::*;

const LEASE: Duration = Duration::from_secs(30);

fn at(seconds: u64) -> Now {
    Duration::from_secs(seconds)
}

/// Workers that ask for one site, by name.
struct Asked {
    shares: Shares,
    sites: Sites,
    sequence: u64,
}

impl Asked {
    fn new(budget: &str, first: bool) -> Self {
        let budget = format!("big.com={budget}").parse().expect("well written");
        let sites = Sites::new(Budget::default(), [budget]);
        Self { shares: Shares::new(at(0), LEASE, first, []), sites, sequence: 0 }
    }

    /// Of which nothing is known: it has the default budget.
    fn unknown() -> Self {
        Self { shares: Shares::new(at(0), LEASE, true, []), sites: Sites::new(Budget::default(), []), sequence: 0 }
    }

    fn ask_with(&mut self, now: Now, worker: &str, held: u32, rate: (f64, bool), quiet: Duration) -> Share {
        self.sequence += 1;
        let demand = Demand { site: "big.com".to_owned(), held, wanted: true, rate, quiet };
        let shares = self.shares.ask(now, worker, self.sequence, &[demand], &self.sites);
        shares.expect("in order")[0]
    }

    fn ask(&mut self, now: Now, worker: &str, held: u32) -> u32 {
        self.ask_with(now, worker, held, (80.0, true), Duration::ZERO).slots
    }

    fn give_back(&mut self, now: Now, worker: &str) {
        self.sequence += 1;
        let demand =
            Demand { site: "big.com".to_owned(), held: 0, wanted: false, rate: (0.0, false), quiet: Duration::ZERO };
        assert!(self.shares.ask(now, worker, self.sequence, &[demand], &self.sites).is_some());
    }
}

#[test]
fn one_worker_has_all_of_a_site_until_others_come_and_they_share_it_evenly() {
    let mut asked = Asked::new("8/80", true);
    assert_eq!(asked.ask(at(0), "a", 0), 8);
    assert_eq!(asked.ask(at(1), "b", 0), 0);
    assert_eq!(asked.ask(at(2), "a", 8), 4);
    assert_eq!(asked.ask(at(2), "b", 0), 0, "the other one may still use them");
    assert_eq!(asked.ask(at(3), "a", 6), 4);
    assert_eq!(asked.ask(at(3), "b", 0), 2);
    assert_eq!((asked.ask(at(4), "a", 4), asked.ask(at(4), "b", 2)), (4, 4));
    assert_eq!(asked.ask(at(5), "c", 0), 0);
    assert_eq!((asked.ask(at(6), "a", 4), asked.ask(at(6), "b", 4)), (2, 2));
    assert_eq!((asked.ask(at(7), "a", 2), asked.ask(at(7), "b", 2), asked.ask(at(7), "c", 0)), (2, 2, 2));
    asked.give_back(at(8), "c");
    assert_eq!(asked.ask(at(9), "a", 2), 4);
}

#[test]
fn at_a_site_that_is_too_slow_to_share_workers_take_turns_in_the_order_in_which_they_came() {
    let mut asked = Asked::new("2/1", true);
    let mut ask = |now, worker: &str, held| {
        let share = asked.ask_with(at(now), worker, held, (1.0, true), Duration::ZERO);
        (share.slots, share.delay.as_millis())
    };
    assert_eq!(ask(0, "a", 0), (2, 0));
    assert_eq!((ask(1, "c", 0), ask(2, "b", 0)), ((0, 0), (0, 0)));
    assert_eq!(ask(5, "a", 2), (2, 0), "it is its turn");
    assert_eq!((ask(5, "c", 0), ask(6, "b", 0)), ((0, 0), (0, 0)));
    assert_eq!((ask(9, "c", 0), ask(9, "b", 0)), ((0, 0), (0, 0)));
    assert_eq!(ask(10, "a", 2).0, 0);
    assert_eq!(ask(11, "a", 0).0, 0, "it waits behind the others now");
    assert_eq!(ask(11, "b", 0).0, 0);
    assert_eq!(ask(11, "c", 0), (2, 1000), "another has asked just now");
    assert_eq!((ask(15, "a", 0).0, ask(15, "b", 0).0), (0, 0));
    assert_eq!(ask(21, "b", 0).0, 0);
    assert_eq!((ask(22, "c", 2).0, ask(23, "c", 0).0, ask(24, "b", 0).0), (0, 0, 2));
}

#[test]
fn what_was_learned_is_kept_for_those_who_come_after() {
    let mut asked = Asked::unknown();
    let first = asked.ask_with(at(0), "a", 0, (0.0, false), Duration::ZERO);
    assert_eq!((first.slots, first.rate), (16, (2.0, false)));
    assert_eq!(asked.ask_with(at(10), "a", 16, (8.0, false), Duration::ZERO).rate, (8.0, false));
    // It has found out more than one worker needs.
    assert_eq!(asked.ask_with(at(11), "b", 0, (0.0, false), Duration::ZERO).slots, 0);
    assert_eq!(asked.ask_with(at(12), "a", 16, (8.0, false), Duration::ZERO).slots, 8);
    assert_eq!(asked.ask_with(at(13), "a", 8, (4.0, true), at(20)).slots, 8);
    let second = asked.ask_with(at(14), "b", 0, (0.0, false), Duration::ZERO);
    assert_eq!((second.slots, second.rate, second.delay), (8, (4.0, true), at(19)));
    asked.give_back(at(20), "a");
    asked.give_back(at(20), "b");
    // Nobody is left, but what they learned is.
    let later = asked.ask_with(at(2000), "c", 0, (0.0, false), Duration::ZERO);
    assert_eq!((later.slots, later.rate, later.delay), (16, (4.0, true), Duration::ZERO));
    let budget = asked.sites.budget("big.com");
    assert_eq!(asked.shares.standing(at(2001), "big.com", budget), Standing { rate: (4.0, true), lent: 16 });
    assert_eq!(asked.shares.standing(at(2001), "b.com", budget), Standing { rate: (2.0, false), lent: 0 });
}

#[test]
fn a_coordinator_that_follows_knows_what_was_learned_and_lends_at_once_if_all_had_come_back() {
    let mut asked = Asked::new("8/80", true);
    assert!(asked.shares.is_all_back(at(0)));
    assert_eq!(asked.ask_with(at(0), "a", 0, (0.0, false), Duration::ZERO).slots, 8);
    asked.ask_with(at(5), "a", 8, (20.0, true), Duration::from_secs(60));
    assert!(!asked.shares.is_all_back(at(5)));
    asked.give_back(at(9), "a");
    assert!(asked.shares.is_all_back(at(9)));
    let learned: Vec<_> = asked.shares.learned(at(9)).map(|(name, learned)| (name.to_owned(), learned)).collect();
    assert_eq!(learned, [("big.com".to_owned(), Learned { rate: (20.0, true), quiet_until: at(65) })]);
    for (all_back, slots) in [(true, 8), (false, 0)] {
        asked.shares = Shares::new(at(10), LEASE, all_back, learned.clone());
        assert_eq!(asked.shares.is_all_back(at(10)), all_back);
        let share = asked.ask_with(at(10), "b", 0, (0.0, false), Duration::ZERO);
        assert_eq!((share.slots, share.rate, share.delay), (slots, (20.0, true), Duration::from_secs(55)));
    }
}

#[test]
fn a_part_that_has_ended_is_anothers_and_a_new_coordinator_prolongs_what_is_held() {
    let mut asked = Asked::new("8/80", true);
    assert_eq!(asked.ask(at(0), "a", 0), 8);
    assert_eq!(asked.ask(at(32), "b", 0), 0);
    assert_eq!(asked.ask(at(33), "b", 0), 8);

    asked.shares = Shares::new(at(0), LEASE, false, []);
    assert_eq!(asked.ask(at(20), "b", 5), 5);
    assert_eq!(asked.ask(at(21), "a", 0), 0, "it may be another's");
    assert_eq!(asked.ask(at(33), "a", 0), 3, "what was not prolonged");
}

#[test]
fn a_request_that_was_overtaken_is_not_heard() {
    let mut asked = Asked::new("8/80", true);
    assert_eq!(asked.ask(at(0), "a", 0), 8);
    let late = Demand { site: "big.com".into(), held: 1, wanted: true, rate: (1.0, true), quiet: Duration::ZERO };
    assert_eq!(asked.shares.ask(at(1), "a", 1, std::slice::from_ref(&late), &asked.sites), None);
    assert_eq!(asked.ask(at(2), "b", 0), 0);
}

#[test]
fn a_site_without_a_limit_has_none_for_its_holders() {
    let mut asked = Asked::new("8/0", true);
    let share = asked.ask_with(at(0), "a", 0, (0.0, false), Duration::ZERO);
    assert_eq!((share.slots, share.budget.rate, share.rate), (8, 0.0, (0.0, true)));
    assert_eq!(asked.ask_with(at(1), "a", 8, (0.0, true), Duration::ZERO).rate, (0.0, true));
}

/// What a worker has, by its own clock.
#[derive(Debug, Clone, Copy)]
struct Holder {
    slots: u32,
    until: Now,
    in_flight: u32,
}

#[derive(Debug, Clone)]
enum Event {
    Wait(u64),
    /// A worker begins and ends as many requests as it may, and some end.
    Work(usize, u32),
    /// Whether the request comes late, and whether the answer is lost.
    Ask(usize, bool, bool),
    GiveBack(usize),
    /// What came late arrives.
    Late,
    /// Another coordinator begins.
    Replace,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0u64..14).prop_map(Event::Wait),
        4 => (0usize..5, 0u32..9).prop_map(|(worker, end)| Event::Work(worker, end)),
        8 => (0usize..5, prop::bool::weighted(0.1), prop::bool::weighted(0.2))
            .prop_map(|(worker, late, lost)| Event::Ask(worker, late, lost)),
        2 => (0usize..5).prop_map(Event::GiveBack),
        1 => Just(Event::Late),
        1 => Just(Event::Replace),
    ]
}

proptest! {
    /// Whatever requests are late and whatever answers are lost.
    #[test]
    fn workers_never_have_more_in_flight_than_the_budget(
        events in prop::collection::vec(event(), 1..150), budget in prop::sample::select(vec!["8/80", "3/2", "1/1", "5/0"]),
    ) {
        let mut asked = Asked::new(budget, true);
        let most = asked.sites.budget("big.com").slots;
        let mut now = at(0);
        let mut workers = [Holder { slots: 0, until: at(0), in_flight: 0 }; 5];
        let mut late: Vec<(String, u64, Demand)> = Vec::new();
        for event in events {
            for worker in &mut workers {
                // What is in flight is aborted when it ends.
                if worker.until <= now {
                    (worker.slots, worker.in_flight) = (0, 0);
                }
            }
            match event {
                Event::Wait(seconds) => now += at(seconds),
                Event::Work(worker, end) => {
                    let worker = &mut workers[worker];
                    worker.in_flight = worker.in_flight.saturating_sub(end);
                    worker.in_flight = worker.in_flight.max(worker.slots);
                }
                Event::Ask(n, is_late, lost) => {
                    let (name, worker) = (format!("w{n}"), &mut workers[n]);
                    let held = worker.in_flight.max(worker.slots);
                    asked.sequence += 1;
                    let demand =
                        Demand { site: "big.com".into(), held, wanted: true, rate: (2.0, true), quiet: Duration::ZERO };
                    if is_late {
                        late.push((name, asked.sequence, demand));
                        continue;
                    }
                    let sequence = asked.sequence;
                    let shares = asked.shares.ask(now, &name, sequence, &[demand], &asked.sites).expect("in order");
                    if !lost {
                        (worker.slots, worker.until) = (shares[0].slots, now + LEASE);
                    }
                }
                Event::GiveBack(n) => {
                    workers[n] = Holder { slots: 0, until: now, in_flight: 0 };
                    asked.give_back(now, &format!("w{n}"));
                }
                Event::Late => for (name, sequence, demand) in late.drain(..) {
                    asked.shares.ask(now, &name, sequence, &[demand], &asked.sites);
                },
                Event::Replace => {
                    asked.shares = Shares::new(now, LEASE, false, []);
                    // Connections to the old one have ended.
                    late.clear();
                }
            }
            let live = workers.iter().filter(|worker| worker.until > now);
            let sum: u32 = live.map(|worker| worker.in_flight.max(worker.slots)).sum();
            prop_assert!(sum <= most, "{sum} of {most}: {workers:?}");
        }
    }

    #[test]
    fn everybody_who_keeps_asking_gets_a_part_in_time(
        workers in 1usize..6, budget in prop::sample::select(vec!["8/80", "3/2", "1/1", "5/0"]),
    ) {
        let mut asked = Asked::new(budget, true);
        let mut holders = vec![0; workers];
        let mut had = vec![0; workers];
        for second in 0..u64::try_from(workers).expect("few") * 30 {
            for n in 0..workers {
                holders[n] = asked.ask_with(at(second), &format!("w{n}"), holders[n], (2.0, true), Duration::ZERO).slots;
                had[n] += u32::from(holders[n] > 0);
            }
        }
        prop_assert!(had.iter().all(|seconds| *seconds >= 10), "{had:?}");
    }
}
