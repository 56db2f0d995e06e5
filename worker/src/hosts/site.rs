//! A site as this worker knows it: its part of the budget, its pace, and what waits for its hosts.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proto::pb::{SiteDemand, SiteShare};
use proto::site::Budget;
use tokio::time::Instant;

use super::Place;
use crate::pace::Pace;

/// A site that has been idle for so long is forgotten, and a host.
pub(super) const FORGET: Duration = Duration::from_secs(600);
/// A part that nothing uses is given back after so long.
pub(super) const UNUSED: Duration = Duration::from_millis(500);
/// After so long a part is asked for again that others had.
const RETRY: Duration = Duration::from_secs(1);

/// When the coordinator is to be asked about a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    Never,
    /// As soon as this worker may have another part; with its oldest ticket.
    Wanting(u64),
    At(Instant),
}

#[derive(Debug)]
pub(super) struct Site {
    pub(super) pace: Pace,
    /// Requests at once that it may begin, until then; afterwards nothing may be in flight, either.
    pub(super) slots: u32,
    pub(super) until: Instant,
    /// Slots that the coordinator takes for used: more than `slots` until what is in flight has ended.
    pub(super) recorded: u32,
    /// The latest answer; None: it was never asked for.
    pub(super) answered: Option<Instant>,
    /// When the part is to be prolonged.
    pub(super) renew: Instant,
    /// The coordinator should hear soon what the site has said.
    pub(super) news: bool,
    pub(super) asking: bool,
    pub(super) ask: Ask,
    pub(super) in_flight: u32,
    /// URLs that wait for its hosts, and the first one's ticket.
    pub(super) queued: usize,
    pub(super) oldest: u64,
    /// Hosts that may be asked, by the age of their oldest URL.
    pub(super) waiting: BTreeSet<(u64, Arc<str>)>,
    pub(super) touched: Instant,
    pub(super) place: Place,
}

impl Site {
    pub(super) fn new(now: Instant, budget: Budget) -> Self {
        Self {
            pace: Pace::new(now, budget.rate, budget.borne),
            slots: 0,
            until: now,
            recorded: 0,
            answered: None,
            renew: now,
            news: false,
            asking: false,
            ask: Ask::Never,
            in_flight: 0,
            queued: 0,
            oldest: 0,
            waiting: BTreeSet::new(),
            touched: now,
            place: Place::Nowhere,
        }
    }

    /// Whether it has a part, by its own clock.
    pub(super) fn is_lent(&self, now: Instant) -> bool {
        self.recorded > 0 && now < self.until
    }

    /// Slots that it goes on using at the most.
    pub(super) fn held(&self, now: Instant) -> u32 {
        if self.is_lent(now) { self.slots.max(self.in_flight) } else { 0 }
    }

    /// What was cut as a part ended counts for a while: until then another part cannot be asked for.
    pub(super) fn may_ask(&self, now: Instant) -> bool {
        self.is_lent(now) || self.in_flight == 0
    }

    pub(super) fn place(&self, now: Instant) -> Place {
        let Some(&(ticket, _)) = self.waiting.first() else { return Place::Nowhere };
        if !self.is_lent(now) || self.in_flight >= self.slots {
            return Place::Nowhere;
        }
        match self.pace.from() {
            from if from > now => Place::Timed(from),
            _ => Place::Ready(ticket),
        }
    }

    pub(super) fn ask(&self, now: Instant) -> Ask {
        if self.asking || !self.may_ask(now) {
            return Ask::Never;
        }
        match (self.is_lent(now), self.queued > 0) {
            (true, false) if self.in_flight == 0 => Ask::At(self.renew.min(self.touched + UNUSED)),
            (true, _) if self.news || self.recorded > self.held(now) => Ask::At(self.touched),
            (true, _) => Ask::At(self.renew),
            (false, true) => match self.answered {
                None => Ask::Wanting(self.oldest),
                Some(answered) => Ask::At(if self.recorded > 0 { self.until } else { answered + RETRY }),
            },
            (false, false) => Ask::Never,
        }
    }

    pub(super) fn demand(&self, now: Instant, site: &str) -> SiteDemand {
        let (requests_per_second, known) = self.pace.rate();
        SiteDemand {
            site: site.to_owned(),
            held: self.held(now),
            wanted: self.queued > 0 || self.in_flight > 0,
            requests_per_second,
            known,
            quiet_millis: self.pace.quiet(now).as_millis() as u64,
        }
    }

    /// Takes up the answer to a demand that was made at `asked` and in which it said that it holds so many slots.
    pub(super) fn lend(&mut self, asked: Instant, now: Instant, held: u32, share: &SiteShare, duration: Duration) {
        let was_lent = self.is_lent(now) && held > 0;
        if held > 0 && !was_lent && self.in_flight > 0 {
            // The part that it named has ended before the answer came, and may be another's. What is in flight is over
            // first, also if this process stood still and has not cut it yet.
            (self.slots, self.recorded, self.until, self.answered) = (0, 0, now, Some(now));
            return;
        }
        let held = if was_lent { held } else { 0 };
        self.slots = share.slots;
        (self.recorded, self.until) = (share.slots.max(held), asked + duration);
        self.renew = asked + duration / 3;
        self.answered = if self.queued > 0 || self.recorded > 0 { Some(now) } else { None };
        let learned = (share.requests_per_second, share.known);
        let part = if share.slots > 0 { f64::from(share.slots) / f64::from(share.site_slots.max(1)) } else { 1.0 };
        if share.slots > 0 {
            self.pace.set(now, part, share.site_requests_per_second);
        }
        if !was_lent {
            self.pace.begin_at(now, learned);
        } else {
            self.pace.hear(now, learned);
        }
        self.pace.delay(now + Duration::from_millis(share.delay_millis));
    }

    /// Whether nothing is lost if it is forgotten.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let idle = self.in_flight == 0 && self.queued == 0 && self.waiting.is_empty() && !self.asking;
        idle && !self.is_lent(now) && now >= self.touched + FORGET
    }
}
