use super::*;

/// A worker's table with 10 connections, and the clock that it is told.
struct Table {
    hosts: Hosts<u32>,
    start: Instant,
    millis: u64,
}

impl Table {
    fn new() -> Self {
        let start = Instant::now();
        Self { hosts: Hosts::new(start, 10), start, millis: 0 }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.millis)
    }

    fn push(&mut self, host: &str, items: std::ops::Range<u32>) {
        for item in items {
            let ticket = self.hosts.ticket();
            self.hosts.push(self.now(), host, ticket, item);
        }
    }

    /// Begins all that can be begun.
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

    fn share(&mut self, host: &str, slots: u32, rate: f64) -> bool {
        let shares = Shares {
            shares: vec![(host.to_owned(), slots, rate)],
            duration: Duration::from_secs(10),
            ask_again: Duration::from_secs(3),
        };
        self.hosts.shared(self.now(), self.now(), shares)
    }
}

fn items(begun: &[(Pass, u32)]) -> Vec<u32> {
    begun.iter().map(|(_, item)| *item).collect()
}

#[test]
fn few_urls_of_a_host_need_no_share_but_go_two_at_a_time_in_their_order() {
    let mut table = Table::new();
    table.push("a", 0..4);
    table.push("b", 4..6);
    let begun = table.begin();
    assert_eq!(items(&begun), [0, 1, 4, 5]);
    assert!(table.hosts.demands(table.now()).is_empty());
    table.end(begun, HostSignal::Answered);
    assert_eq!(items(&table.begin()), [2, 3]);
}

#[test]
fn a_host_with_many_urls_waits_for_its_share_and_the_others_do_not_wait_for_it() {
    let mut table = Table::new();
    table.push("big", 0..20);
    table.push("small", 20..21);
    // Before it was known to be big it was allowed what any host is; nothing was asked for in between.
    assert_eq!(items(&table.begin()), [20]);
    assert!(table.hosts.ask_now() && !table.hosts.ask_now());
    let demands = table.hosts.demands(table.now());
    assert_eq!(demands, [Demand { host: "big".into(), wanted: 10, holds: 0, in_flight: 0 }]);
    assert!(table.share("big", 3, 0.0));
    let begun = table.begin();
    assert_eq!(items(&begun), [0, 1, 2]);
    table.end(begun, HostSignal::Answered);
    assert_eq!(items(&table.begin()), [3, 4, 5]);
}

#[test]
fn a_share_ends_by_the_workers_clock_and_what_was_in_flight_goes_on() {
    let mut table = Table::new();
    table.push("big", 0..20);
    table.hosts.demands(table.now());
    table.share("big", 3, 0.0);
    let mut begun = table.begin();
    table.millis = 9_999;
    assert!(begun.iter().all(|(pass, _)| pass.is_valid(table.now())));
    table.hosts.finish(table.now(), begun.pop().expect("three").0, HostSignal::Answered);
    table.millis = 10_000;
    assert!(begun.iter().all(|(pass, _)| !pass.is_valid(table.now())));
    assert_eq!(items(&table.begin()), [0; 0]);
    let demands = table.hosts.demands(table.now());
    assert_eq!(demands, [Demand { host: "big".into(), wanted: 10, holds: 0, in_flight: 2 }]);
}

#[test]
fn shares_are_lowered_to_what_is_wanted_before_they_are_told_and_late_answers_are_not_taken() {
    let mut table = Table::new();
    table.push("big", 0..12);
    table.hosts.demands(table.now());
    table.share("big", 8, 80.0);
    let mut done = 0;
    while done < 10 {
        let begun = table.begin();
        done += begun.len();
        table.end(begun, HostSignal::Answered);
        table.millis += 100;
    }
    let demands = table.hosts.demands(table.now());
    assert_eq!((demands[0].wanted, demands[0].holds), (1, 1));
    let asked = table.now();
    table.millis += 2_500;
    let shares = Shares {
        shares: vec![("big".into(), 8, 0.0)],
        duration: Duration::from_secs(10),
        ask_again: Duration::from_secs(3),
    };
    assert!(!table.hosts.shared(asked, table.now(), shares));
    assert_eq!(table.hosts.demands(table.now())[0].holds, 1);
    table.millis = 7_600;
    assert_eq!(table.hosts.demands(table.now())[0].holds, 0, "it ends too soon to be counted on");
}

#[test]
fn a_host_without_a_slot_for_its_urls_is_given_up_after_so_much_time_however_often_it_is_asked_for() {
    let mut table = Table::new();
    table.push("crowded", 0..20);
    for _ in 0..2000 {
        table.hosts.demands(table.now());
        table.share("crowded", 0, 0.0);
        assert!(matches!(table.hosts.next(table.now()), Next::Wait(_)));
        table.millis += 20;
    }
    table.millis += 600_000;
    table.hosts.demands(table.now());
    table.share("crowded", 0, 0.0);
    assert!(matches!(table.hosts.next(table.now()), Next::GivenUp(_)));
}

#[test]
fn a_rate_spreads_requests_evenly() {
    let mut table = Table::new();
    table.push("big", 0..40);
    table.hosts.demands(table.now());
    table.share("big", 5, 10.0);
    let mut begun = 0;
    while table.millis < 2_000 {
        let now = table.begin();
        begun += now.len();
        table.end(now, HostSignal::Answered);
        let Next::Wait(Some(until)) = table.hosts.next(table.now()) else { panic!("URLs wait for their time") };
        table.millis = u64::try_from((until - table.start).as_millis()).expect("soon");
    }
    assert!((20..=21).contains(&begun), "{begun}");
}

#[test]
fn a_host_that_only_fails_is_paused_then_tried_alone_then_given_up_and_tried_once_later() {
    let mut table = Table::new();
    table.push("dead", 0..100);
    table.hosts.demands(table.now());
    let (mut given_up, mut tried) = (0, 0);
    while given_up == 0 {
        table.share("dead", 4, 0.0);
        let begun = table.begin();
        tried += begun.len();
        table.end(begun, HostSignal::Failed);
        match table.hosts.next(table.now()) {
            Next::Wait(Some(until)) => table.millis = u64::try_from((until - table.start).as_millis()).expect("soon"),
            Next::Wait(None) => panic!("nothing would ever happen"),
            Next::Begin(pass, _) => {
                tried += 1;
                table.hosts.finish(table.now(), pass, HostSignal::Failed);
            }
            Next::GivenUp(_) => given_up += 1,
        }
    }
    assert_eq!((tried, table.millis), (12, 14_000));
    while let Next::GivenUp(_) = table.hosts.next(table.now()) {
        given_up += 1;
    }
    assert_eq!(given_up, 88);
    table.push("dead", 100..101);
    assert!(matches!(table.hosts.next(table.now()), Next::GivenUp(100)));

    table.millis += 600_000;
    table.push("dead", 101..103);
    table.hosts.demands(table.now());
    table.share("dead", 4, 0.0);
    let begun = table.begin();
    assert_eq!(items(&begun), [101]);
    table.end(begun, HostSignal::Answered);
    assert_eq!(items(&table.begin()), [102]);
}

#[test]
fn an_answer_in_between_keeps_a_host_in_service() {
    let mut table = Table::new();
    table.push("shaky", 0..100);
    table.hosts.demands(table.now());
    table.share("shaky", 4, 0.0);
    for _ in 0..20 {
        let mut begun = table.begin();
        let (pass, _) = begun.pop().expect("four at a time");
        table.end(begun, HostSignal::Failed);
        table.hosts.finish(table.now(), pass, HostSignal::Answered);
    }
    assert_eq!(table.begin().len(), 4);
}

#[test]
fn pauses_of_urls_and_of_hosts_are_waited_for_and_what_is_taken_out_is_gone() {
    let mut table = Table::new();
    let ticket = table.hosts.ticket();
    table.hosts.push_later(table.now(), Duration::from_secs(5), "a", ticket, 0);
    table.push("a", 1..3);
    let begun = table.begin();
    assert_eq!(items(&begun), [1, 2]);
    table.end(begun, HostSignal::Throttled(Duration::from_secs(8)));
    table.millis = 5_000;
    assert!(table.begin().is_empty());
    table.millis = 8_000;
    let begun = table.begin();
    assert_eq!(items(&begun), [0]);
    table.push("a", 3..9);
    assert_eq!(table.hosts.take_out(table.now(), |item| item % 2 == 1), [3, 5, 7]);
    table.end(begun, HostSignal::Answered);
    assert_eq!(items(&table.begin()), [4, 6]);
}
