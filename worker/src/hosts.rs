//! Which URL is fetched next: the one that has waited longest among those whose host and site have room. A pure state
//! machine; time comes in as an argument.
//!
//! What has a budget is a site (see `proto::site`). **Nothing is asked of a site of whose budget this worker has no
//! part.** The coordinator lends parts for a while, by this worker's own clock; [`Hosts::demands`] says which are to be
//! asked for, prolonged, and given back. A URL whose site has no room waits here and holds nothing: no connection, no
//! slot.
//!
//! A host that fails many times in a row gets a pause, then one request at a time, and after some more failures it is
//! given up for a while: what waits for it is handed back. A site that throttles is asked more slowly (see `pace`); a
//! host that goes on throttling is given up as well, but what waited for it has not failed, and comes later.

mod end;
mod host;
mod site;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use proto::pb::{SiteDemand, SiteShare};
use proto::site::Sites;
use tokio::time::Instant;

pub(crate) use self::end::HostSignal;
pub(crate) use self::host::GiveUp;
use self::host::Host;
use self::site::{Ask, FORGET, Site, UNUSED};

/// How often idle ones are looked for.
const SWEEP: Duration = Duration::from_secs(60);
/// Sites of which it has parts, for each connection: most of them have to wait for their pace.
const SITES_PER_CONNECTION: usize = 16;
/// Sites of one request to the coordinator.
const MOST_DEMANDS: usize = 2048;

/// The right to one request at a host, until [`Hosts::finish`] or [`Hosts::cut`].
#[derive(Debug)]
pub(crate) struct Pass {
    pub(crate) host: Arc<str>,
    pub(crate) site: Arc<str>,
    begun: Instant,
}

/// What is to be done with the worker's next free connection.
#[derive(Debug)]
pub(crate) enum Next<T> {
    /// Fetch this.
    Begin(Pass, T),
    /// The host of this was given up, for this reason.
    GivenUp(T, GiveUp),
    /// Wait until then, or for something to change.
    Wait(Option<Instant>),
}

/// All URLs of the process that wait, by site and host. `T` is whatever belongs to a URL.
#[derive(Debug)]
pub(crate) struct Hosts<T> {
    known: Arc<Sites>,
    hosts: HashMap<Arc<str>, Host<T>>,
    sites: HashMap<Arc<str>, Site>,
    /// Sites with room, by the age of their oldest URL.
    ready: BTreeSet<(u64, Arc<str>)>,
    /// Sites and hosts that have room from a certain time on.
    timed: BTreeSet<(Instant, Kind, Arc<str>)>,
    /// URLs with a pause of their own.
    paused: BTreeMap<(Instant, u64), (Arc<str>, T)>,
    given_up: VecDeque<(T, GiveUp)>,
    /// Requests that were cut, and until when each counts.
    cut: VecDeque<(Instant, Pass)>,
    /// Sites whose part is to be asked for, prolonged or given back, by the time for it.
    due: BTreeSet<(Instant, Arc<str>)>,
    /// Sites that were not asked for yet, by the age of their oldest URL.
    wanting: BTreeSet<(u64, Arc<str>)>,
    /// Sites of which it has a part, and how many it may have.
    parts: usize,
    most_parts: usize,
    /// What the request to the coordinator that is under way names, and says that is held.
    asking: Vec<(Arc<str>, u32)>,
    tickets: [u64; 2],
    swept: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Site,
    Host,
}

/// Where a site or host stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Nowhere,
    /// Among those that may be asked, with its oldest ticket.
    Ready(u64),
    /// Among those that may be asked later.
    Timed(Instant),
}

impl<T> Hosts<T> {
    /// With what is known of sites.
    pub(crate) fn new(now: Instant, known: Arc<Sites>, connections: usize) -> Self {
        Self {
            known,
            hosts: HashMap::new(),
            sites: HashMap::new(),
            ready: BTreeSet::new(),
            timed: BTreeSet::new(),
            paused: BTreeMap::new(),
            given_up: VecDeque::new(),
            cut: VecDeque::new(),
            due: BTreeSet::new(),
            wanting: BTreeSet::new(),
            parts: 0,
            most_parts: SITES_PER_CONNECTION * connections,
            asking: Vec::new(),
            tickets: [0, 1 << 62],
            swept: now,
        }
    }

    /// Takes note of what is known of sites now: it is for hosts that are met for the first time.
    pub(crate) fn know(&mut self, known: Arc<Sites>) {
        self.known = known;
    }

    /// A place in the order of URLs, behind all others of its kind. Those of a large site's slice, which take longest,
    /// come first.
    pub(crate) fn ticket(&mut self, large: bool) -> u64 {
        let tickets = &mut self.tickets[usize::from(!large)];
        *tickets += 1;
        *tickets
    }

    /// Lets a URL wait for its host.
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

    /// Asks nothing of a host for so long, as something has to be known of it first; zero: any more.
    pub(crate) fn hold(&mut self, now: Instant, host: &str, pause: Duration) {
        let name = self.enter(now, host);
        if let Some(at) = self.hosts.get_mut(&name) {
            at.held_until = now + pause;
        }
        self.settle_host(now, &name);
    }

    /// Why this host is given up, if it is.
    pub(crate) fn given_up(&self, now: Instant, host: &str) -> Option<GiveUp> {
        self.host(host).and_then(|at| at.given_up(now))
    }

    /// Whether this host has throttled lately, and has answered nothing else since.
    pub(crate) fn is_throttling(&self, host: &str) -> bool {
        self.host(host).is_some_and(|at| at.halvings > 0)
    }

    fn host(&self, host: &str) -> Option<&Host<T>> {
        let place = self.known.place(host);
        self.hosts.get(place.bucket.unwrap_or(host))
    }

    /// When the coordinator is to be asked for parts next; None: not before something changes.
    pub(crate) fn ask_at(&self, now: Instant) -> Option<Instant> {
        if !self.asking.is_empty() {
            return None;
        }
        match self.wanting.is_empty() || self.parts > self.most_parts / 2 {
            true => self.due.first().map(|(at, _)| *at),
            false => Some(now),
        }
    }

    /// Which parts are to be asked for, prolonged and given back now. What it says is held is not exceeded from now on,
    /// whether or not there is an answer; [`Hosts::lend`] or [`Hosts::unanswered`] comes before the next demands.
    pub(crate) fn demands(&mut self, now: Instant) -> Vec<SiteDemand> {
        self.end_cut(now);
        self.parts = self.sites.values().filter(|site| site.is_lent(now)).count();
        let soon = now + UNUSED / 2;
        let due = self.due.iter().take_while(|(at, _)| *at <= soon).map(|(_, name)| name);
        let room = self.most_parts.saturating_sub(self.parts);
        let wanting = self.wanting.iter().take(room).map(|(_, name)| name);
        let may = |name: &&Arc<str>| self.sites.get(*name).is_some_and(|site| site.may_ask(now));
        self.asking = due.chain(wanting).filter(may).take(MOST_DEMANDS).cloned().map(|name| (name, 0)).collect();
        let names: Vec<Arc<str>> = self.asking.iter().map(|(name, _)| Arc::clone(name)).collect();
        let mut demands = Vec::with_capacity(names.len());
        for (n, name) in names.iter().enumerate() {
            let Some(site) = self.sites.get_mut(name) else { continue };
            if site.queued == 0 && site.in_flight == 0 {
                site.slots = 0;
            }
            (site.asking, site.news) = (true, false);
            let demand = site.demand(now, name);
            self.asking[n].1 = demand.held;
            demands.push(demand);
            self.settle_site(now, name);
        }
        demands
    }

    /// Takes up the answer to the demands that were made at `asked`.
    pub(crate) fn lend(&mut self, asked: Instant, now: Instant, duration: Duration, shares: &[SiteShare]) {
        for ((name, held), share) in std::mem::take(&mut self.asking).into_iter().zip(shares) {
            let Some(site) = self.sites.get_mut(&name) else { continue };
            site.asking = false;
            site.lend(asked, now, held, share, duration);
            self.settle_site(now, &name);
        }
        self.parts = self.sites.values().filter(|site| site.is_lent(now)).count();
    }

    /// There was no answer to the latest demands.
    pub(crate) fn unanswered(&mut self, now: Instant) {
        for (name, _) in std::mem::take(&mut self.asking) {
            let Some(site) = self.sites.get_mut(&name) else { continue };
            (site.asking, site.renew) = (false, now);
            self.settle_site(now, &name);
        }
    }

    /// Whether it has a part of any site's budget.
    pub(crate) fn has_parts(&self, now: Instant) -> bool {
        self.sites.values().any(|site| site.is_lent(now))
    }

    /// Until when requests to a site may be in flight; None: there may be none.
    pub(crate) fn until(&self, site: &str) -> Option<Instant> {
        self.sites.get(site).filter(|site| site.recorded > 0).map(|site| site.until)
    }

    /// Slots of a site that it takes for its own, and until when.
    #[cfg(test)]
    pub(crate) fn part(&self, site: &str) -> Option<(u32, Instant)> {
        self.sites.get(site).filter(|site| site.recorded > 0).map(|site| (site.recorded, site.until))
    }

    /// What to do with a free connection.
    pub(crate) fn next(&mut self, now: Instant) -> Next<T> {
        self.sweep(now);
        self.end_cut(now);
        while let Some(entry) = self.paused.first_entry().filter(|entry| entry.key().0 <= now) {
            let ((_, ticket), (host, item)) = entry.remove_entry();
            if let Some(at) = self.hosts.get_mut(&host) {
                at.paused -= 1;
            }
            self.queue(now, host, ticket, item);
        }
        while let Some((from, kind, name)) = self.timed.first().filter(|(from, ..)| *from <= now).cloned() {
            self.timed.remove(&(from, kind, Arc::clone(&name)));
            match kind {
                Kind::Site => self.settle_site(now, &name),
                Kind::Host => self.settle_host(now, &name),
            }
        }
        if let Some((item, why)) = self.given_up.pop_front() {
            return Next::GivenUp(item, why);
        }
        while let Some((_, name)) = self.ready.first().cloned() {
            // Its share may have ended since it was put there.
            self.settle_site(now, &name);
            let Some(site) = self.sites.get_mut(&name).filter(|site| matches!(site.place, Place::Ready(_))) else {
                continue;
            };
            let Some((_, host)) = site.waiting.first().cloned() else { continue };
            let Some(at) = self.hosts.get_mut(&host) else { continue };
            let Some((_, item)) = at.queue.pop_first() else { continue };
            (at.in_flight, site.in_flight) = (at.in_flight + 1, site.in_flight + 1);
            site.queued -= 1;
            (at.touched, site.touched) = (now, now);
            site.pace.begin(now);
            if let Some((_, pace)) = &mut at.own {
                pace.begin(now);
            }
            self.settle_host(now, &host);
            return Next::Begin(Pass { host, site: name, begun: now }, item);
        }
        let timed = self.timed.first().map(|(from, ..)| *from);
        let paused = self.paused.keys().next().map(|(from, _)| *from);
        Next::Wait([timed, paused, self.cut.front().map(|(until, _)| *until)].into_iter().flatten().min())
    }

    /// Holds no failure against any host: they were this worker's own. One that throttles has said so itself.
    pub(crate) fn forgive(&mut self, now: Instant) {
        let mut changed = Vec::new();
        for (host, at) in &mut self.hosts {
            let is_dead = matches!(at.given_up, Some((_, GiveUp::Dead)));
            if at.failures > 0 || at.pauses > 0 || is_dead {
                (at.failures, at.pauses, at.quiet_until) = (0, 0, now);
                at.given_up.take_if(|_| is_dead);
                changed.push(Arc::clone(host));
            }
        }
        changed.iter().for_each(|host| self.settle_host(now, host));
    }

    /// Takes out everything that waits and fits.
    pub(crate) fn take_out(&mut self, now: Instant, fits: impl Fn(&T) -> bool) -> Vec<T> {
        let given_up = std::mem::take(&mut self.given_up);
        let (out, left): (Vec<_>, Vec<_>) = given_up.into_iter().partition(|(item, _)| fits(item));
        let mut out: Vec<T> = out.into_iter().map(|(item, _)| item).collect();
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
                if let Some(site) = self.sites.get_mut(&at.site) {
                    site.queued -= gone.len();
                }
                out.extend(gone.into_values());
                changed.push(Arc::clone(host));
            }
        }
        changed.iter().for_each(|host| self.settle_host(now, host));
        out
    }

    /// The name under which a host is known: under a private suffix, its owner's.
    fn enter(&mut self, now: Instant, host: &str) -> Arc<str> {
        let known = Arc::clone(&self.known);
        let place = known.place(host);
        let name = place.bucket.unwrap_or(host);
        if let Some((name, _)) = self.hosts.get_key_value(name) {
            return Arc::clone(name);
        }
        let (site, name): (_, Arc<str>) = (self.enter_site(now, place.site), name.into());
        let own = place.bucket.map(|_| known.default_budget());
        self.hosts.insert(Arc::clone(&name), Host::new(now, site, own));
        name
    }

    fn enter_site(&mut self, now: Instant, site: &str) -> Arc<str> {
        if let Some((name, _)) = self.sites.get_key_value(site) {
            return Arc::clone(name);
        }
        let name: Arc<str> = site.into();
        self.sites.insert(Arc::clone(&name), Site::new(now, self.known.budget(site)));
        name
    }

    fn queue(&mut self, now: Instant, host: Arc<str>, ticket: u64, item: T) {
        let Some(at) = self.hosts.get_mut(&host) else { return };
        at.touched = now;
        match at.given_up {
            Some((until, why)) if now < until => return self.given_up.push_back((item, why)),
            Some((_, GiveUp::Dead)) => at.given_up = None,
            // Not before it has answered.
            Some((_, GiveUp::Throttled)) | None => {}
        }
        at.queue.insert(ticket, item);
        if let Some(site) = self.sites.get_mut(&at.site) {
            if site.queued == 0 {
                site.oldest = ticket;
            }
            site.queued += 1;
        }
        self.settle_host(now, &host);
    }

    /// Puts a host where it belongs, after anything about it has changed; then its site.
    fn settle_host(&mut self, now: Instant, name: &Arc<str>) {
        let Some(at) = self.hosts.get_mut(name) else { return };
        let Some(site) = self.sites.get_mut(&at.site) else { return };
        match at.place {
            Place::Nowhere => {}
            Place::Ready(ticket) => drop(site.waiting.remove(&(ticket, Arc::clone(name)))),
            Place::Timed(from) => drop(self.timed.remove(&(from, Kind::Host, Arc::clone(name)))),
        }
        at.place = at.place(now);
        match at.place {
            Place::Nowhere => {}
            Place::Ready(ticket) => drop(site.waiting.insert((ticket, Arc::clone(name)))),
            Place::Timed(from) => drop(self.timed.insert((from, Kind::Host, Arc::clone(name)))),
        }
        let site = Arc::clone(&at.site);
        self.settle_site(now, &site);
    }

    /// Puts a site where it belongs.
    fn settle_site(&mut self, now: Instant, name: &Arc<str>) {
        let Some(site) = self.sites.get_mut(name) else { return };
        let place = site.place(now);
        if place != site.place {
            match std::mem::replace(&mut site.place, place) {
                Place::Nowhere => {}
                Place::Ready(ticket) => drop(self.ready.remove(&(ticket, Arc::clone(name)))),
                Place::Timed(from) => drop(self.timed.remove(&(from, Kind::Site, Arc::clone(name)))),
            }
            match place {
                Place::Nowhere => {}
                Place::Ready(ticket) => drop(self.ready.insert((ticket, Arc::clone(name)))),
                Place::Timed(from) => drop(self.timed.insert((from, Kind::Site, Arc::clone(name)))),
            }
        }
        let ask = site.ask(now);
        if ask != site.ask {
            match std::mem::replace(&mut site.ask, ask) {
                Ask::Never => {}
                Ask::Wanting(ticket) => drop(self.wanting.remove(&(ticket, Arc::clone(name)))),
                Ask::At(at) => drop(self.due.remove(&(at, Arc::clone(name)))),
            }
            match ask {
                Ask::Never => {}
                Ask::Wanting(ticket) => drop(self.wanting.insert((ticket, Arc::clone(name)))),
                Ask::At(at) => drop(self.due.insert((at, Arc::clone(name)))),
            }
        }
    }

    fn sweep(&mut self, now: Instant) {
        if now < self.swept + SWEEP {
            return;
        }
        self.swept = now;
        self.hosts.retain(|_, at| !at.is_idle() || now < at.touched + FORGET || at.given_up(now).is_some());
        let used: BTreeSet<Arc<str>> = self.hosts.values().map(|at| Arc::clone(&at.site)).collect();
        self.sites.retain(|name, site| used.contains(name) || !site.is_over(now));
    }
}

#[cfg(test)]
mod tests;
