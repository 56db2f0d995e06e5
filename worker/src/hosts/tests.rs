use proto::site::Budget;

use super::*;

const LEASE: Duration = Duration::from_secs(30);
const DEFAULT: Budget = Budget { slots: 4, rate: 100.0, borne: true };

/// All of a site without a limit of its rate.
const ALL: SiteShare = SiteShare {
    slots: 4,
    site_slots: 4,
    site_requests_per_second: 0.0,
    requests_per_second: 0.0,
    known: true,
    delay_millis: 0,
};

/// A worker's table, and the clock that it is told.
struct Table {
    hosts: Hosts<u32>,
    start: Instant,
    millis: u64,
}

impl Table {
    fn new() -> Self {
        let start = Instant::now();
        let known = Arc::new(Sites::new(DEFAULT, []));
        Self { hosts: Hosts::new(start, known, 2), start, millis: 0 }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.millis)
    }

    fn push(&mut self, host: &str, items: std::ops::Range<u32>) {
        for item in items {
            let ticket = self.hosts.ticket(false);
            self.hosts.push(self.now(), host, ticket, item);
        }
    }

    /// Asks for parts, and answers each demand with this; what was demanded: site, held, wanted.
    fn ask(&mut self, share: SiteShare) -> Vec<(String, u32, bool)> {
        let demands = self.hosts.demands(self.now());
        let none = SiteShare { slots: 0, ..share };
        let shares: Vec<_> = demands.iter().map(|demand| if demand.wanted { share } else { none }).collect();
        self.hosts.lend(self.now(), self.now(), LEASE, &shares);
        demands.into_iter().map(|demand| (demand.site, demand.held, demand.wanted)).collect()
    }

    /// Begins everything that may begin now.
    fn begin(&mut self) -> Vec<(Pass, u32)> {
        let mut begun = Vec::new();
        while let Next::Begin(pass, item) = self.hosts.next(self.now()) {
            begun.push((pass, item));
        }
        begun
    }

    fn end(&mut self, begun: Vec<(Pass, u32)>, signal: HostSignal) {
        for (pass, _) in begun {
            self.hosts.finish(self.now(), pass, signal);
        }
    }

    /// How many requests are answered at once within so many milliseconds.
    fn answered_in(&mut self, millis: u64) -> usize {
        let (mut answered, end) = (0, self.millis + millis);
        while self.millis < end {
            let begun = self.begin();
            answered += begun.len();
            self.end(begun, HostSignal::Answered);
            self.millis += 5;
        }
        answered
    }
}

fn items(begun: &[(Pass, u32)]) -> Vec<u32> {
    begun.iter().map(|(_, item)| *item).collect()
}

fn demand(site: &str, held: u32, wanted: bool) -> (String, u32, bool) {
    (site.to_owned(), held, wanted)
}

#[test]
fn nothing_is_asked_of_a_site_without_a_part_and_names_under_it_share_one() {
    let mut table = Table::new();
    table.push("a.big.com", 0..4);
    table.push("b.big.com", 4..8);
    assert!(table.begin().is_empty());
    assert_eq!(table.ask(ALL), [demand("big.com", 0, true)]);
    let begun = table.begin();
    assert_eq!(items(&begun), [0, 1, 2, 3], "the oldest ones");
    assert!(table.hosts.demands(table.now()).is_empty(), "it has what it wants");
    table.end(begun, HostSignal::Answered);
    assert_eq!(items(&table.begin()), [4, 5, 6, 7]);
}

#[test]
fn a_part_is_prolonged_in_time_and_ends_by_the_workers_clock() {
    let mut table = Table::new();
    table.push("big.com", 0..20);
    table.ask(ALL);
    let begun = table.begin();
    table.millis = 10_000;
    assert_eq!(table.ask(ALL), [demand("big.com", 4, true)]);
    assert_eq!(table.hosts.until("big.com"), Some(table.now() + LEASE));
    table.end(begun, HostSignal::Answered);
    table.millis = 20_000;
    assert_eq!(table.hosts.demands(table.now()).len(), 1);
    table.hosts.unanswered(table.now());
    table.millis = 39_999;
    let begun = table.begin();
    assert_eq!(begun.len(), 4);
    table.millis = 40_000;
    table.end(begun, HostSignal::Unknown);
    assert!(table.begin().is_empty());
    assert_eq!(table.ask(ALL), [demand("big.com", 0, true)], "it may be another's by now");
    assert_eq!(table.begin().len(), 4);
}

#[test]
fn a_request_that_was_cut_counts_until_its_server_can_have_heard_of_that() {
    let mut table = Table::new();
    table.push("big.com", 0..20);
    table.ask(ALL);
    let mut begun = table.begin();
    let (cut, _) = begun.pop().expect("four");
    table.hosts.cut(table.now(), cut, HostSignal::Unknown);
    assert!(table.begin().is_empty());
    table.end(begun, HostSignal::Answered);
    assert_eq!(table.begin().len(), 3);
    table.millis = 999;
    assert!(table.begin().is_empty());
    table.millis = 1_000;
    assert_eq!(table.begin().len(), 1);
}

#[test]
fn what_is_cut_as_a_part_ends_is_over_before_another_part_is_asked_for() {
    let mut table = Table::new();
    table.push("big.com", 0..20);
    table.ask(ALL);
    let begun = table.begin();
    table.millis = 30_000;
    for (pass, _) in begun {
        table.hosts.cut(table.now(), pass, HostSignal::Unknown);
    }
    assert!(table.begin().is_empty() && table.ask(ALL).is_empty());
    table.millis += 1_000;
    assert_eq!(table.ask(ALL), [demand("big.com", 0, true)]);
    assert_eq!(table.begin().len(), 4);
}

#[test]
fn what_a_request_that_was_cut_has_shown_of_its_host_counts_at_once() {
    let mut table = Table::new();
    table.push("dead.com", 0..20);
    table.ask(SiteShare { slots: 8, site_slots: 8, ..ALL });
    for (pass, _) in table.begin() {
        table.hosts.cut(table.now(), pass, HostSignal::Failed);
    }
    table.millis = 1_000;
    assert!(table.begin().is_empty(), "eight in a row have failed: it is paused");
    table.millis = 2_000;
    assert_eq!(table.begin().len(), 1);
}

#[test]
fn a_part_that_has_ended_before_the_answer_came_is_not_held_by_it() {
    for is_cut in [true, false] {
        let mut table = Table::new();
        table.push("big.com", 0..20);
        table.ask(ALL);
        let begun = table.begin();
        table.millis = 20_000;
        let asked = table.now();
        assert_eq!(table.hosts.demands(asked)[0].held, 4);
        table.millis = 31_000;
        if is_cut {
            begun.into_iter().for_each(|(pass, _)| table.hosts.cut(table.now(), pass, HostSignal::Unknown));
        }
        // Another has all of it by now; or a new coordinator prolongs what it has heard of.
        let slots = if is_cut { 0 } else { 4 };
        table.hosts.lend(asked, table.now(), LEASE, &[SiteShare { slots, ..ALL }]);
        assert_eq!(table.hosts.part("big.com"), None, "whatever is in flight is cut");
        assert!(table.begin().is_empty() && table.hosts.demands(table.now()).is_empty());
        table.hosts.unanswered(table.now());
        if is_cut {
            table.millis = 32_000;
            assert_eq!(table.ask(ALL), [demand("big.com", 0, true)]);
            assert_eq!(table.begin().len(), 4);
        }
    }
}

#[test]
fn a_part_that_becomes_smaller_is_kept_until_what_is_in_flight_has_ended() {
    let mut table = Table::new();
    table.push("big.com", 0..20);
    table.ask(ALL);
    let mut begun = table.begin();
    table.millis = 10_000;
    table.ask(SiteShare { slots: 2, ..ALL });
    table.end(begun.split_off(3), HostSignal::Answered);
    assert!(table.begin().is_empty());
    assert_eq!(table.ask(SiteShare { slots: 2, ..ALL }), [demand("big.com", 3, true)]);
    table.end(begun.split_off(1), HostSignal::Answered);
    begun.extend(table.begin());
    assert_eq!(begun.len(), 2);
    assert_eq!(table.ask(SiteShare { slots: 0, ..ALL }), [demand("big.com", 2, true)]);
    table.end(begun, HostSignal::Answered);
    assert!(table.begin().is_empty());
    assert_eq!(table.ask(SiteShare { slots: 0, ..ALL }), [demand("big.com", 0, true)], "it waits for its turn");
    table.millis += 500;
    assert!(table.hosts.demands(table.now()).is_empty());
    table.hosts.unanswered(table.now());
    table.millis += 500;
    assert_eq!(table.ask(ALL), [demand("big.com", 0, true)]);
    assert_eq!(table.begin().len(), 4);
}

#[test]
fn a_part_that_nothing_uses_is_given_back_and_not_used_any_more() {
    let mut table = Table::new();
    table.push("big.com", 0..1);
    table.ask(ALL);
    let begun = table.begin();
    table.end(begun, HostSignal::Answered);
    assert_eq!(table.hosts.ask_at(table.now()), Some(table.now() + UNUSED));
    table.millis = 500;
    let asked = table.now();
    assert!(!table.hosts.demands(asked)[0].wanted);
    table.push("big.com", 1..2);
    assert!(table.begin().is_empty(), "the coordinator may have heard of it");
    table.hosts.unanswered(table.now());
    assert!(table.begin().is_empty());
    assert_eq!(table.ask(ALL), [demand("big.com", 0, true)]);
    assert_eq!(table.begin().len(), 1);
}

#[test]
fn as_many_sites_are_asked_for_as_connections_can_use_those_of_the_oldest_urls_first() {
    let mut table = Table::new();
    for n in 0..50 {
        table.push(&format!("s{n}.com"), n..n + 1);
    }
    assert_eq!(table.ask(ALL).len(), 32);
    let begun = table.begin();
    assert_eq!(items(&begun), (0..32).collect::<Vec<_>>());
    assert!(table.ask(ALL).is_empty());
    table.end(begun, HostSignal::Answered);
    table.millis = 500;
    assert_eq!(table.ask(ALL).len(), 32, "they are given back");
    assert_eq!(table.ask(ALL).len(), 18);
}

#[test]
fn a_part_of_a_rate_is_asked_evenly_and_begins_with_what_others_learned() {
    let mut table = Table::new();
    table.push("big.com", 0..1000);
    let share = SiteShare { slots: 2, site_requests_per_second: 100.0, requests_per_second: 40.0, ..ALL };
    table.ask(SiteShare { delay_millis: 100, ..share });
    assert_eq!(table.answered_in(100), 0);
    let answered = table.answered_in(2000);
    assert!((40..=41).contains(&answered), "{answered}");
    let begun = table.begin();
    table.millis += 50;
    let begun = if begun.is_empty() { table.begin() } else { begun };
    table.end(begun, HostSignal::Throttled(Duration::from_secs(2)));
    let demands = table.hosts.demands(table.now());
    assert_eq!((demands[0].requests_per_second, demands[0].known, demands[0].quiet_millis), (20.0, true, 2000));
}

#[test]
fn owners_under_a_private_suffix_have_budgets_within_the_sites() {
    let mut table = Table::new();
    let share = SiteShare { slots: 6, site_slots: 6, ..ALL };
    let mut begun = Vec::new();
    for (owner, items, demands) in [("a.blogspot.com", 0..10, 1), ("www.b.blogspot.com", 10..20, 0)] {
        table.push(owner, items);
        assert_eq!(table.ask(share).len(), demands);
        for _ in 0..30 {
            begun.extend(table.begin());
            table.millis += 100;
        }
    }
    let of_a = begun.iter().filter(|(_, item)| *item < 10).count();
    assert_eq!((of_a, begun.len()), (4, 6));
    // One owner throttles: the other is not slowed down.
    let (throttled, answered): (Vec<_>, Vec<_>) = begun.into_iter().partition(|(_, item)| *item < 10);
    table.end(throttled, HostSignal::Throttled(Duration::from_secs(60)));
    table.end(answered, HostSignal::Answered);
    let begun = table.begin();
    assert!(!begun.is_empty() && items(&begun).iter().all(|item| *item >= 10));
}

#[test]
fn a_host_that_only_fails_is_paused_then_tried_alone_then_given_up_and_tried_once_later() {
    let mut table = Table::new();
    table.push("dead.com", 0..100);
    table.ask(ALL);
    let (mut given_up, mut tried) = (0, 0);
    while given_up == 0 {
        match table.hosts.next(table.now()) {
            Next::Wait(Some(until)) => table.millis = u64::try_from((until - table.start).as_millis()).expect("soon"),
            Next::Wait(None) => panic!("nothing would ever happen"),
            Next::Begin(pass, _) => {
                tried += 1;
                table.hosts.finish(table.now(), pass, HostSignal::Failed);
            }
            Next::GivenUp(_, why) => {
                assert_eq!(why, GiveUp::Dead);
                given_up += 1;
            }
        }
    }
    assert_eq!((tried, table.millis), (11, 14_000));
    while let Next::GivenUp(..) = table.hosts.next(table.now()) {
        given_up += 1;
    }
    assert_eq!(given_up, 89);
    assert_eq!(table.ask(ALL), [demand("dead.com", 0, false)]);
    table.push("dead.com", 100..101);
    assert!(matches!(table.hosts.next(table.now()), Next::GivenUp(100, GiveUp::Dead)));

    table.millis += 600_000;
    table.push("dead.com", 101..103);
    table.ask(ALL);
    let begun = table.begin();
    assert_eq!(items(&begun), [101]);
    table.end(begun, HostSignal::Answered);
    assert_eq!(items(&table.begin()), [102]);
}

#[test]
fn pauses_of_urls_are_waited_for_and_what_is_taken_out_is_gone() {
    let mut table = Table::new();
    let ticket = table.hosts.ticket(false);
    table.hosts.push_later(table.now(), Duration::from_secs(5), "a.com", ticket, 0);
    table.push("a.com", 1..3);
    table.ask(ALL);
    let begun = table.begin();
    assert_eq!(items(&begun), [1, 2]);
    table.end(begun, HostSignal::Answered);
    table.push("a.com", 3..9);
    assert_eq!(table.hosts.take_out(table.now(), |item| item % 2 == 1), [3, 5, 7]);
    let begun = table.begin();
    assert_eq!(items(&begun), [4, 6, 8]);
    table.end(begun, HostSignal::Answered);
    table.millis = 5_000;
    assert_eq!(table.hosts.take_out(table.now(), |item| *item == 0), [0]);
    assert_eq!(table.ask(ALL), [demand("a.com", 0, false)]);
}

/// Whether everything that waits is handed back now, as it has to be asked for later.
fn handed_back(table: &mut Table) -> Vec<u32> {
    let mut back = Vec::new();
    while let Next::GivenUp(item, why) = table.hosts.next(table.now()) {
        assert_eq!(why, GiveUp::Throttled);
        back.push(item);
    }
    back
}

#[test]
fn a_host_that_goes_on_throttling_is_left_alone_and_what_waits_for_it_is_to_come_later() {
    let mut table = Table::new();
    table.push("a.com", 0..100);
    let mut tried = 0;
    while table.hosts.given_up(table.now(), "a.com").is_none() {
        // Its share is prolonged all the time.
        table.ask(ALL);
        let begun = table.begin();
        tried += begun.len();
        table.end(begun, HostSignal::Throttled(Duration::from_secs(1)));
        table.millis += 500;
    }
    assert!(tried <= 24 && table.millis < 60_000, "{tried} in {} ms", table.millis);
    assert!(table.hosts.is_throttling("a.com"));
    assert_eq!(handed_back(&mut table).len() + tried, 100);
    table.push("a.com", 100..110);
    assert_eq!(handed_back(&mut table).len(), 10, "it is not asked so soon");
}

#[test]
fn a_host_that_throttles_the_slowest_rate_that_others_have_learned_is_asked_once() {
    let mut table = Table::new();
    table.push("a.com", 0..100);
    table.ask(SiteShare { site_requests_per_second: 100.0, requests_per_second: 1.0 / 64.0, ..ALL });
    let begun = table.begin();
    assert_eq!(begun.len(), 1);
    table.end(begun, HostSignal::Throttled(Duration::from_secs(1)));
    assert_eq!(handed_back(&mut table).len(), 99);
}

#[test]
fn a_host_that_has_rested_for_as_long_as_it_wants_is_asked_once_and_given_up_again_or_back() {
    for is_back in [false, true] {
        let mut table = Table::new();
        table.push("a.com", 0..1);
        table.ask(ALL);
        let begun = table.begin();
        table.end(begun, HostSignal::Throttled(Duration::from_secs(700)));
        table.millis = 699_000;
        table.push("a.com", 1..2);
        assert_eq!(handed_back(&mut table), [1]);
        table.millis = 700_500;
        table.push("a.com", 2..10);
        table.ask(ALL);
        let begun = table.begin();
        assert_eq!(items(&begun), [2]);
        // However long it wants to be left alone.
        let signal = if is_back { HostSignal::Answered } else { HostSignal::Throttled(Duration::MAX) };
        table.end(begun, signal);
        assert_eq!(handed_back(&mut table).len(), if is_back { 0 } else { 7 });
        assert_eq!(table.hosts.is_throttling("a.com"), !is_back);
        table.millis += 3_000;
        table.ask(ALL);
        assert_eq!(table.begin().len() > 1, is_back);
    }
}
