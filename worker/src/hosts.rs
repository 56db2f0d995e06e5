//! Which URL is fetched next: the one that has waited longest among those whose host has room. A pure state machine; time
//! comes in as an argument.
//!
//! Hosts of which the worker has few URLs get [`UNBROKERED_SLOTS`]. From [`THRESHOLD`] on a host is *brokered*: requests to it
//! need a share of its budget from the coordinator, which ends by this worker's clock. A URL whose host has no room waits
//! here and holds nothing: no connection, no slot.
//!
//! A host that fails many times in a row gets a pause, then one request at a time, and after some more failures it is given
//! up for a while: what waits for it is handed back.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

/// A host of which more URLs than this are at hand is brokered.
const THRESHOLD: usize = 8;
/// Requests at once to a host that is not brokered.
const UNBROKERED_SLOTS: u32 = 2;
/// This share of its duration before its end a share is no longer counted on when new ones are asked for.
const QUARTER: u32 = 4;
/// Failures in a row, after which a host is paused.
const FAILURES: u32 = 8;
/// The first pause; each one after it is twice as long.
const PAUSE: Duration = Duration::from_secs(2);
/// After so many pauses without an answer in between, a host is given up.
const PAUSES: u32 = 3;
/// For so long; then it gets one request to show that it is back.
const GIVEN_UP: Duration = Duration::from_secs(600);
/// A brokered host of which the coordinator has had no slot for so long is given up by this worker.
const PATIENCE: Duration = Duration::from_secs(600);
/// A host that has been idle for so long is forgotten.
const FORGET: Duration = Duration::from_secs(600);
/// How often idle hosts are looked for.
const SWEEP: Duration = Duration::from_secs(60);

/// The right to one request at a host, until [`Hosts::finish`].
#[derive(Debug)]
pub(crate) struct Pass {
    pub(crate) host: Arc<str>,
    /// The end of the share under which it was given out: it must not be begun later.
    until: Option<Instant>,
}

impl Pass {
    /// Whether its request may be begun now.
    pub(crate) fn is_valid(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

/// What a request says about its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostSignal {
    /// It answers.
    Answered,
    /// It does not answer, or says that it is in trouble.
    Failed,
    /// It asks to be left alone for so long (429).
    Throttled(Duration),
    /// Nothing: the request was dropped, or never begun.
    Unknown,
}

/// What is to be done with the worker's next free connection.
#[derive(Debug)]
pub(crate) enum Next<T> {
    /// Fetch this.
    Begin(Pass, T),
    /// The host of this was given up.
    GivenUp(T),
    /// Wait until then, or for something to change.
    Wait(Option<Instant>),
}

/// Asked of the coordinator, for one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Demand {
    pub(crate) host: Arc<str>,
    pub(crate) wanted: u32,
    pub(crate) holds: u32,
    pub(crate) in_flight: u32,
}

/// What the coordinator answers to all demands.
#[derive(Debug, Clone)]
pub(crate) struct Shares {
    /// Host, slots, requests per second (0: no limit).
    pub(crate) shares: Vec<(String, u32, f64)>,
    /// How long they count, from the moment when they were asked for.
    pub(crate) duration: Duration,
    /// The time between two askings.
    pub(crate) ask_again: Duration,
}

/// All URLs of the process that wait, by host. `T` is whatever belongs to a URL.
#[derive(Debug)]
pub(crate) struct Hosts<T> {
    connections: u32,
    hosts: HashMap<Arc<str>, Host<T>>,
    /// Hosts with room, by the age of their oldest URL.
    ready: BTreeSet<(u64, Arc<str>)>,
    /// Hosts that have room from a certain time on.
    timed: BTreeSet<(Instant, Arc<str>)>,
    brokered: BTreeSet<Arc<str>>,
    /// URLs with a pause of their own.
    paused: BTreeMap<(Instant, u64), (Arc<str>, T)>,
    given_up: VecDeque<T>,
    tickets: u64,
    ask_now: bool,
    swept: Instant,
}

#[derive(Debug)]
struct Host<T> {
    queue: BTreeMap<u64, T>,
    /// How many of its URLs are in `Hosts::paused`.
    paused: usize,
    in_flight: u32,
    brokered: bool,
    share: Option<Share>,
    /// Whether it was among the latest demands.
    asked: bool,
    /// For how long the coordinator has had no slot of it.
    unserved: Option<Instant>,
    /// By its rate, the next request can begin then.
    next: Instant,
    /// Nothing is asked of it before.
    quiet_until: Instant,
    failures: u32,
    pauses: u32,
    given_up: Option<Instant>,
    touched: Instant,
    place: Place,
}

#[derive(Debug, Clone, Copy)]
struct Share {
    slots: u32,
    rate: f64,
    until: Instant,
    duration: Duration,
}

/// Where in the sets of [`Hosts`] a host stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    Ready(u64),
    Timed(Instant),
}

impl<T> Host<T> {
    fn new(now: Instant) -> Self {
        Self {
            queue: BTreeMap::new(),
            paused: 0,
            in_flight: 0,
            brokered: false,
            share: None,
            asked: false,
            unserved: None,
            next: now,
            quiet_until: now,
            failures: 0,
            pauses: 0,
            given_up: None,
            touched: now,
            place: Place::Nowhere,
        }
    }

    fn live_share(&self, now: Instant) -> Option<Share> {
        self.share.filter(|share| share.slots > 0 && now < share.until)
    }

    fn slots(&self, now: Instant) -> u32 {
        let slots = if self.brokered { self.live_share(now).map_or(0, |share| share.slots) } else { UNBROKERED_SLOTS };
        if self.pauses > 0 { slots.min(1) } else { slots }
    }

    /// Where it belongs now.
    fn place(&self, now: Instant) -> Place {
        let Some((&ticket, _)) = self.queue.first_key_value() else { return Place::Nowhere };
        if self.in_flight >= self.slots(now) {
            return Place::Nowhere;
        }
        match self.next.max(self.quiet_until) {
            from if from > now => Place::Timed(from),
            _ => Place::Ready(ticket),
        }
    }

    fn is_idle(&self, now: Instant) -> bool {
        self.queue.is_empty() && self.paused == 0 && self.in_flight == 0 && self.live_share(now).is_none()
    }

    /// Whether nothing would be lost if it were forgotten.
    fn is_blank(&self, now: Instant) -> bool {
        self.is_idle(now) && !self.brokered && self.failures == 0 && self.pauses == 0 && self.given_up.is_none()
    }
}

impl<T> Hosts<T> {
    /// `connections`: the most that the worker has.
    pub(crate) fn new(now: Instant, connections: u32) -> Self {
        Self {
            connections,
            hosts: HashMap::new(),
            ready: BTreeSet::new(),
            timed: BTreeSet::new(),
            brokered: BTreeSet::new(),
            paused: BTreeMap::new(),
            given_up: VecDeque::new(),
            tickets: 0,
            ask_now: false,
            swept: now,
        }
    }

    /// A place in the order of URLs, behind all others.
    pub(crate) fn ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    /// Lets a URL wait for its host; a URL that comes back brings its old ticket.
    pub(crate) fn push(&mut self, now: Instant, host: &str, ticket: u64, item: T) {
        let host = self.enter(now, host);
        self.queue(now, host, ticket, item);
    }

    /// The same, but not before `pause` is over.
    pub(crate) fn push_later(&mut self, now: Instant, pause: Duration, host: &str, ticket: u64, item: T) {
        let host = self.enter(now, host);
        if let Some(at) = self.hosts.get_mut(&host) {
            at.paused += 1;
        }
        self.paused.insert((now + pause, ticket), (host, item));
    }

    /// What to do with a free connection.
    pub(crate) fn next(&mut self, now: Instant) -> Next<T> {
        self.sweep(now);
        while let Some(entry) = self.paused.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((_, ticket), (host, item)) = entry.remove_entry();
            if let Some(at) = self.hosts.get_mut(&host) {
                at.paused -= 1;
            }
            self.queue(now, host, ticket, item);
        }
        while let Some((from, host)) = self.timed.first().filter(|(from, _)| *from <= now).cloned() {
            self.timed.remove(&(from, Arc::clone(&host)));
            self.settle(now, &host);
        }
        if let Some(item) = self.given_up.pop_front() {
            return Next::GivenUp(item);
        }
        while let Some((_, host)) = self.ready.first().cloned() {
            // Its share may have ended since it was put there.
            self.settle(now, &host);
            let Some(at) = self.hosts.get_mut(&host).filter(|at| matches!(at.place, Place::Ready(_))) else { continue };
            let Some((_, item)) = at.queue.pop_first() else { continue };
            at.in_flight += 1;
            at.touched = now;
            let share = at.live_share(now).filter(|_| at.brokered);
            if let Some(rate) = share.map(|share| share.rate).filter(|rate| *rate > 0.0) {
                let interval = Duration::from_secs_f64((1.0 / rate).min(3600.0));
                // A timer that was a little late costs no rate.
                at.next = at.next.max(now.checked_sub(interval).unwrap_or(now)) + interval;
            }
            self.settle(now, &host);
            return Next::Begin(Pass { host, until: share.map(|share| share.until) }, item);
        }
        let timed = self.timed.first().map(|(from, _)| *from);
        Next::Wait(timed.into_iter().chain(self.paused.keys().next().map(|(from, _)| *from)).min())
    }

    /// Gives a pass back.
    pub(crate) fn finish(&mut self, now: Instant, pass: Pass, signal: HostSignal) {
        let host = pass.host;
        let Some(at) = self.hosts.get_mut(&host) else { return };
        at.in_flight -= 1;
        at.touched = now;
        match signal {
            HostSignal::Answered => (at.failures, at.pauses, at.given_up) = (0, 0, None),
            HostSignal::Failed => at.fail(now),
            HostSignal::Throttled(pause) => {
                at.fail(now);
                at.quiet_until = at.quiet_until.max(now + pause);
            }
            HostSignal::Unknown => {}
        }
        if at.given_up.is_some_and(|until| now < until) {
            self.given_up.extend(std::mem::take(&mut at.queue).into_values());
        }
        self.settle(now, &host);
        if self.hosts.get(&host).is_some_and(|at| at.is_blank(now)) {
            self.hosts.remove(&host);
        }
    }

    /// Holds no failure against any host: they were this worker's own.
    pub(crate) fn forgive(&mut self, now: Instant) {
        let mut changed = Vec::new();
        for (host, at) in &mut self.hosts {
            if at.failures > 0 || at.pauses > 0 || at.given_up.is_some() {
                (at.failures, at.pauses, at.given_up, at.quiet_until) = (0, 0, None, now);
                changed.push(Arc::clone(host));
            }
        }
        changed.iter().for_each(|host| self.settle(now, host));
    }

    /// Takes out everything that waits and fits.
    pub(crate) fn take_out(&mut self, now: Instant, fits: impl Fn(&T) -> bool) -> Vec<T> {
        let given_up = std::mem::take(&mut self.given_up);
        let (mut out, left): (Vec<T>, Vec<T>) = given_up.into_iter().partition(&fits);
        self.given_up = left.into();
        let (gone, left): (BTreeMap<_, _>, _) =
            std::mem::take(&mut self.paused).into_iter().partition(|(_, (_, item))| fits(item));
        self.paused = left;
        for (host, item) in gone.into_values() {
            out.push(item);
            if let Some(at) = self.hosts.get_mut(&host) {
                at.paused -= 1;
            }
        }
        let mut changed = Vec::new();
        for (host, at) in &mut self.hosts {
            let (gone, left): (BTreeMap<_, _>, _) =
                std::mem::take(&mut at.queue).into_iter().partition(|(_, item)| fits(item));
            at.queue = left;
            if !gone.is_empty() {
                out.extend(gone.into_values());
                changed.push(Arc::clone(host));
            }
        }
        changed.iter().for_each(|host| self.settle(now, host));
        out
    }

    /// Whether a brokered host is to be asked for that was not asked for yet. Says so once.
    pub(crate) fn ask_now(&mut self) -> bool {
        std::mem::take(&mut self.ask_now)
    }

    /// What to ask the coordinator for; none if nothing is wanted, held or in flight. Lowers the shares to what is said here.
    pub(crate) fn demands(&mut self, now: Instant) -> Vec<Demand> {
        let mut demands = Vec::new();
        for host in self.brokered.clone() {
            let Some(at) = self.hosts.get_mut(&host) else { continue };
            let waiting = u32::try_from(at.queue.len()).unwrap_or(u32::MAX).saturating_add(at.in_flight);
            let wanted = waiting.min(if at.pauses > 0 { 1 } else { self.connections });
            at.share = at.live_share(now).filter(|share| share.until > now + share.duration / QUARTER).map(|share| {
                let slots = share.slots.min(wanted);
                Share { slots, rate: share.rate * f64::from(slots) / f64::from(share.slots), ..share }
            });
            let holds = at.share.map_or(0, |share| share.slots);
            at.asked = wanted > 0 || holds > 0 || at.in_flight > 0;
            if at.asked {
                demands.push(Demand { host: Arc::clone(&host), wanted, holds, in_flight: at.in_flight });
            }
            self.settle(now, &host);
        }
        demands
    }

    /// Takes up the answer to the demands of `asked`. False: it comes too late to be used.
    pub(crate) fn shared(&mut self, asked: Instant, now: Instant, answer: Shares) -> bool {
        if now >= asked + answer.duration / QUARTER {
            return false;
        }
        for (host, slots, rate) in answer.shares {
            let Some((host, at)) = self.hosts.get_key_value(host.as_str()).filter(|(_, at)| at.brokered) else {
                continue;
            };
            let (host, waiting) = (Arc::clone(host), !at.queue.is_empty());
            let Some(at) = self.hosts.get_mut(&host) else { continue };
            at.share = Some(Share { slots, rate, until: asked + answer.duration, duration: answer.duration });
            at.unserved = if slots == 0 && waiting { at.unserved.or(Some(now)) } else { None };
            if rate > 0.0 {
                at.next = at.next.min(now + Duration::from_secs_f64((1.0 / rate).min(3600.0)));
            }
            if at.unserved.is_some_and(|since| now - since >= PATIENCE) {
                at.unserved = None;
                self.given_up.extend(std::mem::take(&mut at.queue).into_values());
            }
            self.settle(now, &host);
        }
        true
    }

    fn enter(&mut self, now: Instant, host: &str) -> Arc<str> {
        match self.hosts.get_key_value(host) {
            Some((host, _)) => Arc::clone(host),
            None => {
                let host: Arc<str> = host.into();
                self.hosts.insert(Arc::clone(&host), Host::new(now));
                host
            }
        }
    }

    fn queue(&mut self, now: Instant, host: Arc<str>, ticket: u64, item: T) {
        let at = self.hosts.entry(Arc::clone(&host)).or_insert_with(|| Host::new(now));
        at.touched = now;
        match at.given_up {
            Some(until) if now < until => return self.given_up.push_back(item),
            Some(_) => at.given_up = None,
            None => {}
        }
        at.queue.insert(ticket, item);
        if !at.brokered && at.queue.len() + at.paused + at.in_flight as usize > THRESHOLD {
            at.brokered = true;
            self.brokered.insert(Arc::clone(&host));
        }
        self.settle(now, &host);
    }

    /// Puts a host where it belongs, after anything about it has changed.
    fn settle(&mut self, now: Instant, host: &Arc<str>) {
        let Some(at) = self.hosts.get_mut(host) else { return };
        let place = at.place(now);
        if at.brokered && !at.asked && !at.queue.is_empty() && at.live_share(now).is_none() {
            self.ask_now = true;
        }
        let before = std::mem::replace(&mut at.place, place);
        if before == place && before != Place::Nowhere {
            // It may have been taken out of its set by whoever calls.
            match place {
                Place::Ready(ticket) => drop(self.ready.insert((ticket, Arc::clone(host)))),
                Place::Timed(from) => drop(self.timed.insert((from, Arc::clone(host)))),
                Place::Nowhere => {}
            }
            return;
        }
        match before {
            Place::Nowhere => {}
            Place::Ready(ticket) => drop(self.ready.remove(&(ticket, Arc::clone(host)))),
            Place::Timed(from) => drop(self.timed.remove(&(from, Arc::clone(host)))),
        }
        match place {
            Place::Nowhere => {}
            Place::Ready(ticket) => drop(self.ready.insert((ticket, Arc::clone(host)))),
            Place::Timed(from) => drop(self.timed.insert((from, Arc::clone(host)))),
        }
    }

    fn sweep(&mut self, now: Instant) {
        if now < self.swept + SWEEP {
            return;
        }
        self.swept = now;
        self.hosts.retain(|_, at| !(at.is_idle(now) && now >= at.touched + FORGET));
        let hosts = &self.hosts;
        self.brokered.retain(|host| hosts.contains_key(host));
    }
}

impl<T> Host<T> {
    fn fail(&mut self, now: Instant) {
        self.failures += 1;
        // What was in flight when the pause began says nothing new.
        if self.failures < FAILURES || now < self.quiet_until {
            return;
        }
        if self.pauses >= PAUSES {
            self.given_up = Some(now + GIVEN_UP);
            return;
        }
        self.quiet_until = now + PAUSE * 2u32.pow(self.pauses);
        self.pauses += 1;
    }
}

#[cfg(test)]
mod tests;
