//! The simulated web: what each URL gives, and how many requests each site has had at once and lately.

use std::collections::{BTreeMap, VecDeque};

use super::store::digest;
use super::{Micros, SECOND};

/// Over which requests per second are counted.
const WINDOW: Micros = 10 * SECOND;

/// What a URL gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Truth {
    Picture,
    Gone,
    /// Nothing the first so many times, then a picture.
    Late(u32),
}

/// What is answered to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Picture,
    Gone,
    Nothing,
    /// 429, and for how long it wants to be left alone.
    TooMany(Micros),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub(super) slots: u32,
    pub(super) rate: f64,
    /// It answers 429 above so many requests a second.
    pub(super) bears: f64,
    /// How long an answer takes at the most.
    pub(super) slowest: Micros,
}

#[derive(Debug)]
struct Site {
    terms: Terms,
    /// Requests that are open, each with whether it counts: one of a process that stands still cannot be ended by it.
    open: BTreeMap<u64, (usize, bool)>,
    begun: VecDeque<Micros>,
    bucket: f64,
    filled: Micros,
    /// It gives nothing until then.
    down_until: Micros,
    /// It answers nothing but 429 until then.
    shut_until: Micros,
}

#[derive(Debug)]
pub(super) struct Origin {
    seed: u64,
    sites: BTreeMap<String, Site>,
    requests: u64,
    asked: BTreeMap<String, u32>,
    /// The fullest moment of any site: requests at once, its slots.
    pub(super) most_at_once: (u32, u32),
    /// The busiest ten seconds of any site: requests per second, its rate.
    pub(super) most_per_second: (f64, f64),
    /// What was too much.
    pub(super) crowded: Vec<String>,
}

impl Origin {
    pub(super) fn new(seed: u64, sites: BTreeMap<String, Terms>) -> Self {
        let site = |terms: Terms| Site {
            terms,
            open: BTreeMap::new(),
            begun: VecDeque::new(),
            bucket: 1.0,
            filled: 0,
            down_until: 0,
            shut_until: 0,
        };
        let sites = sites.into_iter().map(|(name, terms)| (name, site(terms))).collect();
        let (most_at_once, most_per_second) = ((0, 1), (0.0, 1.0));
        let (asked, crowded) = (BTreeMap::new(), Vec::new());
        Self { seed, sites, requests: 0, asked, most_at_once, most_per_second, crowded }
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.sites.keys().cloned().collect()
    }

    pub(super) fn slowest(&self, site: &str) -> Micros {
        self.sites[site].terms.slowest
    }

    pub(super) fn truth(&self, url: &str) -> Truth {
        match digest(self.seed, &[url.as_bytes()]) % 20 {
            0..3 => Truth::Gone,
            3 => Truth::Late(1),
            4 => Truth::Late(4),
            _ => Truth::Picture,
        }
    }

    pub(super) fn goes_down(&mut self, site: &str, until: Micros) {
        self.sites.get_mut(site).expect("a site of the list").down_until = until;
    }

    pub(super) fn shuts(&mut self, site: &str, until: Micros) {
        self.sites.get_mut(site).expect("a site of the list").shut_until = until;
    }

    pub(super) fn is_shut(&self, now: Micros, url: &str) -> bool {
        self.sites.iter().any(|(name, site)| now < site.shut_until && url.contains(name))
    }

    /// A request of a worker is sent; `margin`: what clocks and the pace of each of several workers may add to ten
    /// seconds' requests.
    pub(super) fn begin(&mut self, now: Micros, name: &str, worker: usize, margin: f64) -> u64 {
        let site = self.sites.get_mut(name).expect("a site of the list");
        self.requests += 1;
        site.open.insert(self.requests, (worker, true));
        let at_once = site.open.values().filter(|(_, counts)| *counts).count() as u32;
        if at_once * self.most_at_once.1 > self.most_at_once.0 * site.terms.slots {
            self.most_at_once = (at_once, site.terms.slots);
        }
        if at_once > site.terms.slots {
            let (at, slots) = (now as f64 / 1e6, site.terms.slots);
            self.crowded.push(format!("{name}: {at_once} of {slots} at once at {at:.3} s: {:?}", site.open));
        }
        site.begun.push_back(now);
        while site.begun.front().is_some_and(|at| *at + WINDOW <= now) {
            site.begun.pop_front();
        }
        let (begun, rate) = (site.begun.len() as f64, site.terms.rate);
        let per_second = begun / (WINDOW / SECOND) as f64;
        if rate > 0.0 && per_second / rate > self.most_per_second.0 / self.most_per_second.1 {
            self.most_per_second = (per_second, rate);
        }
        if rate > 0.0 && begun > rate * (WINDOW / SECOND) as f64 * 1.03 + margin {
            self.crowded.push(format!("{name}: {begun} in 10 s, of {rate}/s, at {:.3} s", now as f64 / 1e6));
        }
        self.requests
    }

    pub(super) fn end(&mut self, name: &str, request: u64) {
        self.sites.get_mut(name).expect("a site of the list").open.remove(&request);
    }

    /// A worker stands still: whatever it has asked for is open until it is answered.
    pub(super) fn stands_still(&mut self, worker: usize) {
        let open = self.sites.values_mut().flat_map(|site| site.open.values_mut());
        open.filter(|(of, _)| *of == worker).for_each(|(_, counts)| *counts = false);
    }

    pub(super) fn answer(&mut self, now: Micros, name: &str, url: &str) -> Answer {
        let truth = self.truth(url);
        let site = self.sites.get_mut(name).expect("a site of the list");
        let bears = site.terms.bears;
        site.bucket = (site.bucket + (now - site.filled) as f64 / 1e6 * bears).min(bears.max(1.0));
        site.filled = now;
        if site.bucket < 1.0 || now < site.shut_until {
            return Answer::TooMany(SECOND);
        }
        site.bucket -= 1.0;
        if now < site.down_until {
            return Answer::Nothing;
        }
        let asked = self.asked.entry(url.to_owned()).or_default();
        *asked += 1;
        match truth {
            Truth::Gone => Answer::Gone,
            Truth::Late(times) if *asked <= times => Answer::Nothing,
            Truth::Picture | Truth::Late(_) => Answer::Picture,
        }
    }
}
