//! How fast requests to one site may follow each other: an even pace that is learned. Pure; time comes in as an
//! argument.
//!
//! A site of which nothing is known gets two requests a second, and twice as many every five seconds, until it
//! throttles (429). That halves the rate, which soon comes back to the one that the site has borne, and rises slowly
//! from then on. It is never above the budget, and never zero. Several workers learn one rate, each by its own part of
//! it. Of a site that is said to bear any rate nothing is learned: it is left alone for as long as it wants, and then
//! asked as before.
//!
//! "Busy" (503 with `Retry-After`) may be said of the site or of one URL. It counts as throttling if it is said often;
//! and if half as many requests, and half as many again, hear it as often, it was said of URLs: then the rate returns.

use std::time::Duration;

use proto::site::FIRST_RATE;
use tokio::time::Instant;

/// In which a rate doubles while no limit is known.
const DOUBLES_IN: Duration = Duration::from_secs(5);
/// In which it rises by [`RETURNS`] while it is below what the site has borne, and by [`RISES`] above that.
const RETURNS_IN: Duration = Duration::from_secs(5);
const RETURNS: f64 = 1.25;
const RISES_IN: Duration = Duration::from_secs(60);
const RISES: f64 = 1.1;
/// A site that throttles the rate that it has borne seems to bear this part of it.
const BEARS_LESS: f64 = 0.75;
/// A rate rises if at least this part of it was made use of.
const USED: f64 = 0.5;
/// Requests per second at the least.
const LEAST: f64 = 1.0 / 64.0;
/// The same, of a site that is busy for some requests, and has lately answered others.
const LEAST_BUSY: f64 = 0.5;
const LATELY: Duration = Duration::from_secs(60);
/// "Busy" says something of the site if so many answers, and this part of them, were that.
const BUSY: u32 = 3;
const BUSY_PART: f64 = 0.1;
/// A site that is busy for more than this part is overloaded, whatever the rate.
const OVERLOADED: f64 = 0.5;
/// A part that is less than this part of what it was before a halving was made less by it.
const HELPED: f64 = 2.0 / 3.0;
/// After so many halvings that did not help, the rate returns, and "busy" says nothing for so long.
const USELESS: u32 = 2;
const UNHEARD: Duration = Duration::from_secs(600);
/// Answers that are counted: earlier ones count half.
const COUNTED: u32 = 64;

/// The rate of one site, and this worker's part of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// Requests per second of the whole site; 0: no limit.
    rate: f64,
    /// The budget's.
    most: f64,
    /// Whether it has been throttled, or need not be found out.
    known: bool,
    /// The part of the rate that is this worker's.
    part: f64,
    /// The highest rate that the site has borne.
    borne: f64,
    /// When the rate has changed, and how many requests were begun at it.
    since: Instant,
    begun: u32,
    /// When it was last halved.
    halved: Option<Instant>,
    /// Answers since the rate was halved, and those of them that were "busy".
    answers: u32,
    busy: u32,
    /// When it last answered otherwise.
    answered: Option<Instant>,
    /// What was before the latest halvings for which the site was as often busy as before.
    before: Option<Before>,
    /// "Busy" says nothing of the site until then.
    unheard_until: Instant,
    /// When the next request can begin.
    next: Instant,
    /// None begins before: the site wants to be left alone, or others have just asked.
    quiet_until: Instant,
    delayed_until: Instant,
}

/// Before some halvings: the rate, whether it was known, and which part of the answers were "busy".
#[derive(Debug, Clone, Copy)]
struct Before {
    rate: (f64, bool),
    part: f64,
    halvings: u32,
}

impl Pace {
    /// `most`: the budget's requests per second, 0: no limit; `borne`: the site is known to bear them.
    pub(crate) fn new(now: Instant, most: f64, borne: bool) -> Self {
        let rate = if borne { most } else { capped(FIRST_RATE, most) };
        let pace = Self {
            rate,
            most,
            known: borne,
            part: 1.0,
            borne: 0.0,
            since: now,
            begun: 0,
            halved: None,
            answers: 0,
            busy: 0,
            answered: None,
            before: None,
            unheard_until: now,
            next: now,
            quiet_until: now,
            delayed_until: now,
        };
        Self { borne: if borne { rate } else { 0.0 }, ..pace }
    }

    /// Begins, or goes on after a pause, at a rate that others have learned.
    pub(crate) fn begin_at(&mut self, now: Instant, (rate, known): (f64, bool)) {
        (self.rate, self.known) = (capped(rate, self.most), known);
        self.changed(now);
        self.borne = if known { self.rate } else { 0.0 };
    }

    /// Others have found out meanwhile what the site bears.
    pub(crate) fn hear(&mut self, now: Instant, (rate, known): (f64, bool)) {
        if known && !self.known {
            self.begin_at(now, (if self.rate == 0.0 { rate } else { capped(rate, self.rate) }, true));
        }
    }

    /// So large a part of the rate, up to `most`, is this worker's now.
    pub(crate) fn set(&mut self, now: Instant, part: f64, most: f64) {
        if self.part != part || self.most != most {
            (self.part, self.most) = (part, most);
            self.rate = capped(self.rate, most);
            if let Some(interval) = self.interval() {
                self.next = self.next.min(now + interval);
            }
        }
    }

    /// Nothing is asked before.
    pub(crate) fn delay(&mut self, until: Instant) {
        self.delayed_until = self.delayed_until.max(until);
    }

    /// Requests per second of the whole site, 0: no limit, and whether it has been throttled or need not be found out.
    pub(crate) fn rate(&self) -> (f64, bool) {
        (self.rate, self.known)
    }

    /// Whether the site is asked as slowly as any.
    pub(crate) fn is_slowest(&self) -> bool {
        self.rate > 0.0 && self.rate <= LEAST
    }

    /// For so long it wants to be left alone.
    pub(crate) fn quiet(&self, now: Instant) -> Duration {
        self.quiet_until.saturating_duration_since(now)
    }

    /// When the next request may begin.
    pub(crate) fn from(&self) -> Instant {
        self.next.max(self.quiet_until).max(self.delayed_until)
    }

    /// A request begins.
    pub(crate) fn begin(&mut self, now: Instant) {
        self.begun = self.begun.saturating_add(1);
        if let Some(interval) = self.interval() {
            // A timer that was a little late costs no rate.
            self.next = self.next.max(now.checked_sub(interval / 4).unwrap_or(now)) + interval;
        }
    }

    /// The site has answered a request.
    pub(crate) fn answered(&mut self, now: Instant) {
        self.count(false);
        self.answered = Some(now);
        let counted = |before: &Before| f64::from(self.answers) * before.part >= f64::from(BUSY);
        if self.before.is_some_and(|before| counted(&before) && self.part() < before.part * HELPED) {
            self.before = None;
        }
        let returns = self.known && self.rate < self.borne;
        let (pause, factor, most) = match self.known {
            false => (DOUBLES_IN, 2.0, self.most),
            true if returns => (RETURNS_IN, RETURNS, self.borne),
            true => (RISES_IN, RISES, self.most),
        };
        let used = f64::from(self.begun) >= USED * self.rate * self.part * pause.as_secs_f64();
        if self.rate > 0.0 && self.rate != self.most && now >= self.since + pause && used && self.part() <= OVERLOADED {
            self.borne = self.borne.max(self.rate);
            self.rate = capped(self.rate * factor, most);
            (self.since, self.begun) = (now, 0);
        }
    }

    /// The site has throttled a request that was begun at `begun`, and wants to be left alone for so long. Returns
    /// whether that was news: those that were under way at the last one say nothing new.
    pub(crate) fn throttled(&mut self, now: Instant, begun: Instant, cooldown: Duration) -> bool {
        self.quiet_until = self.quiet_until.max(now + cooldown);
        if self.halved.is_some_and(|halved| begun <= halved) {
            return false;
        }
        self.halved = Some(now);
        if self.rate == 0.0 {
            // It is said to bear any rate: it is left alone for as long as it wants, and no longer.
            return true;
        }
        if self.rate <= self.borne {
            self.borne = self.rate * BEARS_LESS;
        }
        (self.rate, self.known) = ((self.rate / 2.0).max(LEAST), true);
        self.changed(now);
        true
    }

    /// The site was busy for a request that was begun at `begun`. Returns whether that changed the rate.
    pub(crate) fn busy(&mut self, now: Instant, begun: Instant) -> bool {
        if self.halved.is_some_and(|halved| begun <= halved) {
            return false;
        }
        self.count(true);
        let part = self.part();
        let lately = self.answered.is_some_and(|answered| now < answered + LATELY);
        let least = if lately { LEAST_BUSY } else { LEAST };
        let unheard = now < self.unheard_until && part <= OVERLOADED;
        if self.rate == 0.0 || unheard || self.busy < BUSY || part < BUSY_PART {
            return false;
        }
        let useless = self.before.filter(|before| part >= before.part * HELPED && part <= OVERLOADED);
        let before = useless.unwrap_or(Before { rate: self.rate(), part, halvings: 0 });
        if before.halvings >= USELESS {
            (self.before, self.unheard_until) = (None, now + UNHEARD);
            self.begin_at(now, before.rate);
            return true;
        }
        if self.rate <= least {
            return false;
        }
        self.before = Some(Before { halvings: before.halvings + 1, ..before });
        self.throttled(now, begun, Duration::ZERO);
        self.rate = self.rate.max(least);
        true
    }

    /// Which part of the answers was "busy".
    fn part(&self) -> f64 {
        f64::from(self.busy) / f64::from(self.answers.max(1))
    }

    fn count(&mut self, busy: bool) {
        if self.answers >= COUNTED {
            (self.answers, self.busy) = (self.answers / 2, self.busy / 2);
        }
        (self.answers, self.busy) = (self.answers + 1, self.busy + u32::from(busy));
    }

    /// The rate has, by more than a little.
    fn changed(&mut self, now: Instant) {
        (self.since, self.begun, self.answers, self.busy) = (now, 0, 0, 0);
    }

    fn interval(&self) -> Option<Duration> {
        let rate = self.rate * self.part;
        (rate > 0.0).then(|| Duration::from_secs_f64((1.0 / rate).min(3600.0)))
    }
}

/// `rate` under a limit; 0: no limit.
fn capped(rate: f64, most: f64) -> f64 {
    if most > 0.0 && (rate == 0.0 || rate > most) { most } else { rate }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks as fast as it may a site that bears `limit` a second, for so long; how many were asked, and how many of
    /// them were throttled.
    fn ask(pace: &mut Pace, start: Instant, millis: std::ops::Range<u64>, limit: f64) -> (u32, u32) {
        let (mut asked, mut throttled) = (0, 0);
        let (mut bucket, mut last) = (limit.max(1.0), start);
        for millis in millis {
            let now = start + Duration::from_millis(millis);
            if pace.from() > now {
                continue;
            }
            bucket = (bucket + (now - last).as_secs_f64() * limit).min(limit.max(1.0));
            last = now;
            asked += 1;
            pace.begin(now);
            if bucket < 1.0 {
                throttled += 1;
                pace.throttled(now, now, Duration::from_secs(1));
            } else {
                bucket -= 1.0;
                pace.answered(now);
            }
        }
        (asked, throttled)
    }

    /// The same of a site that answers "busy" to what is above `limit`, and to each URL of a kind, whatever the rate.
    fn ask_busy(
        pace: &mut Pace,
        start: Instant,
        seconds: u64,
        limit: f64,
        is_of_kind: impl Fn(u32) -> bool,
    ) -> (u32, u32) {
        let (mut asked, mut busy) = (0, 0);
        let (mut bucket, mut last) = (limit.max(1.0), start);
        for millis in 0..seconds * 1000 {
            let now = start + Duration::from_millis(millis);
            if pace.from() > now {
                continue;
            }
            bucket = (bucket + (now - last).as_secs_f64() * limit).min(limit.max(1.0));
            (asked, last) = (asked + 1, now);
            pace.begin(now);
            if bucket < 1.0 || is_of_kind(asked) {
                busy += 1;
                pace.busy(now, now);
            } else {
                bucket -= 1.0;
                pace.answered(now);
            }
        }
        (asked, busy)
    }

    #[test]
    fn a_site_that_says_busy_to_what_is_too_much_is_asked_for_less() {
        let start = Instant::now();
        for limit in [1.0, 2.0, 5.0, 17.0, 60.0] {
            let mut pace = Pace::new(start, 100.0, false);
            let (asked, busy) = ask_busy(&mut pace, start, 300, limit, |_| false);
            let used = f64::from(asked - busy) / (limit * 300.0);
            assert!(
                f64::from(busy) <= 20.0 + 0.15 * f64::from(asked) && used > 0.6,
                "{limit}: {busy} of {asked}, {used}"
            );
        }
        let mut pace = Pace::new(start, 100.0, false);
        let (asked, _) = ask_busy(&mut pace, start, 600, 0.0, |_| true);
        assert!((6..40).contains(&asked), "{asked}");
    }

    #[test]
    fn urls_that_are_always_busy_do_not_slow_their_site_down_for_long() {
        let start = Instant::now();
        for every in [3, 5, 8, 15, 50] {
            let mut pace = Pace::new(start, 100.0, false);
            let (asked, _) = ask_busy(&mut pace, start, 300, 1000.0, |n| n % every == 0);
            assert!(asked > 6000, "each {every}th: {asked} in 300 s");
        }
        // Of a site that is hardly ever not busy it asks no more than that.
        let mut pace = Pace::new(start, 100.0, false);
        let (asked, _) = ask_busy(&mut pace, start, 300, 1000.0, |n| n % 10 != 0);
        assert!((50..400).contains(&asked), "{asked}");
    }

    #[test]
    fn a_rate_doubles_up_to_the_budget_and_never_rises_unused() {
        let start = Instant::now();
        let mut pace = Pace::new(start, 100.0, false);
        assert_eq!(ask(&mut pace, start, 0..40_000, 1000.0).1, 0);
        assert_eq!(pace.rate(), (100.0, false));
        let mut pace = Pace::new(start, 100.0, false);
        for second in 0..100 {
            pace.answered(start + Duration::from_secs(second));
        }
        assert_eq!(pace.rate(), (2.0, false));
        assert_eq!(Pace::new(start, 0.5, false).rate(), (0.5, false));
        assert_eq!(Pace::new(start, 50.0, true).rate(), (50.0, true));
    }

    #[test]
    fn what_a_site_bears_is_found_out_with_few_throttled_requests_and_made_use_of() {
        let start = Instant::now();
        for limit in [0.3, 1.0, 2.0, 5.0, 17.0, 60.0] {
            let mut pace = Pace::new(start, 100.0, false);
            let (asked, throttled) = ask(&mut pace, start, 0..300_000, limit);
            let used = f64::from(asked - throttled) / (limit * 300.0);
            assert!(throttled <= 12.max(asked / 33) && used > 0.6, "{limit}: {throttled} of {asked}, used {used}");
        }
    }

    #[test]
    fn a_site_that_bears_less_than_before_is_asked_less_and_never_not_at_all() {
        let start = Instant::now();
        let mut pace = Pace::new(start, 100.0, false);
        ask(&mut pace, start, 0..60_000, 20.0);
        let (asked, throttled) = ask(&mut pace, start, 60_000..360_000, 4.0);
        assert!(throttled * 20 <= asked, "{throttled} of {asked}");
        for second in 360..400 {
            let now = start + Duration::from_secs(second);
            pace.throttled(now, now, Duration::ZERO);
        }
        assert_eq!(pace.rate(), (LEAST, true));
    }

    #[test]
    fn a_site_that_is_said_to_bear_any_rate_is_left_alone_for_a_while_and_then_asked_as_before() {
        let start = Instant::now();
        let mut pace = Pace::new(start, 0.0, true);
        assert!(pace.throttled(start, start, Duration::from_secs(9)));
        assert_eq!((pace.rate(), pace.from()), ((0.0, true), start + Duration::from_secs(9)));
        let mut pace = Pace::new(start, 0.0, false);
        assert!(pace.throttled(start, start, Duration::from_secs(9)));
        assert_eq!(pace.rate(), (FIRST_RATE / 2.0, true));
    }

    #[test]
    fn requests_under_way_at_a_halving_say_nothing_new_and_others_knowledge_is_taken_up() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut pace = Pace::new(start, 100.0, false);
        pace.begin_at(start, (64.0, false));
        assert!(pace.throttled(at(100), at(50), Duration::from_secs(9)));
        assert!(!pace.throttled(at(110), at(90), Duration::ZERO));
        assert_eq!((pace.rate(), pace.quiet(at(100))), ((32.0, true), Duration::from_secs(9)));
        let mut other = Pace::new(start, 100.0, false);
        other.begin_at(start, (64.0, false));
        other.hear(at(200), (48.0, true));
        assert_eq!(other.rate(), (48.0, true));
    }

    #[test]
    fn a_part_of_a_rate_is_asked_evenly() {
        let start = Instant::now();
        let mut pace = Pace::new(start, 40.0, true);
        pace.set(start, 0.25, 40.0);
        let (asked, _) = ask(&mut pace, start, 0..2_000, 1000.0);
        assert!((20..=21).contains(&asked), "{asked}");
        pace.delay(start + Duration::from_secs(5));
        assert_eq!(ask(&mut pace, start, 2_000..5_000, 1000.0).0, 0);
    }
}
