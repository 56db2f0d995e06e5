//! A host as this worker knows it: what waits for it, and whether it is paused or given up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::Rejection;
use proto::site::Budget;
use tokio::time::Instant;

use super::Place;
use crate::pace::Pace;

/// Failures in a row, after which a host is paused.
const FAILURES: u32 = 8;
/// The first pause; each one after it is twice as long.
const PAUSE: Duration = Duration::from_secs(2);
/// After so many pauses without an answer in between, a host is given up.
const PAUSES: u32 = 3;
/// For so long; then it gets one request to show that it is back.
const GIVEN_UP: Duration = Duration::from_secs(600);

/// Why a host is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GiveUp {
    /// It failed again and again.
    Dead,
    /// It throttled again and again, or wants to be left alone for long.
    Throttled,
}

impl GiveUp {
    /// What becomes of a URL that waited for it. To be told to come later is no try.
    pub(crate) fn rejection(self) -> Rejection {
        match self {
            Self::Dead => Rejection::HostGivenUp,
            Self::Throttled => Rejection::Unfetched,
        }
    }
}

#[derive(Debug)]
pub(super) struct Host<T> {
    pub(super) site: Arc<str>,
    pub(super) queue: BTreeMap<u64, T>,
    /// How many of its URLs are in `Hosts::paused`.
    pub(super) paused: usize,
    pub(super) in_flight: u32,
    /// Of an owner under a private suffix, who has a budget within the site's: requests at once, and their rate.
    pub(super) own: Option<(u32, Pace)>,
    /// Nothing is asked of it before.
    pub(super) quiet_until: Instant,
    /// Nor before this, as something has to be known of it first.
    pub(super) held_until: Instant,
    pub(super) failures: u32,
    pub(super) pauses: u32,
    pub(super) halvings: u32,
    /// Until when, at the least, and why.
    pub(super) given_up: Option<(Instant, GiveUp)>,
    pub(super) touched: Instant,
    pub(super) place: Place,
}

impl<T> Host<T> {
    pub(super) fn new(now: Instant, site: Arc<str>, own: Option<Budget>) -> Self {
        Self {
            site,
            queue: BTreeMap::new(),
            paused: 0,
            in_flight: 0,
            own: own.map(|budget| (budget.slots, Pace::new(now, budget.rate, budget.borne))),
            quiet_until: now,
            held_until: now,
            failures: 0,
            pauses: 0,
            halvings: 0,
            given_up: None,
            touched: now,
            place: Place::Nowhere,
        }
    }

    pub(super) fn place(&self, now: Instant) -> Place {
        let Some((&ticket, _)) = self.queue.first_key_value() else { return Place::Nowhere };
        // One request shows whether it is back.
        let slots = match self.given_up {
            None if self.pauses == 0 => self.own.map_or(u32::MAX, |(slots, _)| slots),
            _ => 1,
        };
        if self.in_flight >= slots {
            return Place::Nowhere;
        }
        let from = self.quiet_until.max(self.held_until);
        match self.own.map_or(from, |(_, pace)| pace.from().max(from)) {
            from if from > now => Place::Timed(from),
            _ => Place::Ready(ticket),
        }
    }

    /// Why it is given up, if it is.
    pub(super) fn given_up(&self, now: Instant) -> Option<GiveUp> {
        self.given_up.filter(|(until, _)| now < *until).map(|(_, why)| why)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.paused == 0 && self.in_flight == 0
    }

    /// Whether nothing would be lost if it were forgotten.
    pub(super) fn is_blank(&self) -> bool {
        let well = self.failures == 0 && self.pauses == 0 && self.halvings == 0 && self.given_up.is_none();
        self.is_idle() && well && self.own.is_none()
    }

    pub(super) fn fail(&mut self, now: Instant) {
        self.failures += 1;
        // What was in flight when the pause began says nothing new.
        if self.failures < FAILURES || now < self.quiet_until {
            return;
        }
        if self.pauses >= PAUSES {
            self.given_up = Some((now + GIVEN_UP, GiveUp::Dead));
            return;
        }
        self.quiet_until = now + PAUSE * 2u32.pow(self.pauses);
        self.pauses += 1;
    }
}
