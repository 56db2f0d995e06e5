//! Who may use how much of which site: parts of its budget, lent to workers. A pure state machine; time comes in as an
//! argument.
//!
//! **At no time do the parts of a site that workers may use exceed its budget.** A part ends one lease time after its
//! holder asked for it, by the holder's clock; here it counts a little longer, from the moment of the answer. A holder
//! that is told of less than it has keeps the rest, here, until it says that it no longer uses it. A coordinator that
//! follows another knows of no parts: until the last one that there can be has ended, it only prolongs what is held,
//! unless the other one has left word that all had come back (see `handover`).
//!
//! A worker that is alone at a site has all of it. Others that come share it evenly, as long as each one's rate is
//! worth it; at slow sites they take turns. What the holders learn of a site's rate is kept for those who come after
//! them.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use proto::site::{Budget, FIRST_RATE, Sites};

use crate::ledger::Now;

/// For clocks that do not run alike: this part of a lease more goes by before a part is given to another.
const MARGIN: f64 = 0.1;
/// The same at the least: what a holder has cut counts for so long, since its server hears of that late.
const LEAST_MARGIN: Duration = Duration::from_secs(1);
/// The least of a site that is worth lending, in requests per second.
pub(crate) const LEAST_RATE: f64 = 2.0;
/// After so long a holder makes way for those that wait, if there is not enough for all.
const TURN: Duration = Duration::from_secs(10);
/// A worker that has not asked for so long does not wait any more.
const WAITS: Duration = Duration::from_secs(5);
/// A worker that has not asked for so long is forgotten.
const FORGET: Duration = Duration::from_secs(3600);
/// Sites of which more is kept than can be found out again; those that nobody uses are forgotten first.
const MOST_SITES: usize = 100_000;

/// What a worker says of one site.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Demand {
    pub(crate) site: String,
    /// Slots that it goes on using at the most.
    pub(crate) held: u32,
    /// It has URLs for it.
    pub(crate) wanted: bool,
    /// What it has found out that the whole site bears: requests per second (0: no limit), and whether it bears no
    /// more.
    pub(crate) rate: (f64, bool),
    /// The site wants to be left alone for so long.
    pub(crate) quiet: Duration,
}

/// A worker's part of a site's budget.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Share {
    /// Requests at once; its part of the rate is as large as its part of the site's slots.
    pub(crate) slots: u32,
    /// The whole site's.
    pub(crate) budget: Budget,
    /// What is known that the whole site bears, as in [`Demand::rate`].
    pub(crate) rate: (f64, bool),
    /// Nothing is asked before.
    pub(crate) delay: Duration,
}

/// What is known of a site.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Standing {
    /// Requests per second that it bears, as far as that is known (0: no limit), and whether it bears no more.
    pub(crate) rate: (f64, bool),
    /// Slots that are lent.
    pub(crate) lent: u32,
}

/// What one coordinator learns of a site and leaves to the next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Learned {
    /// As in [`Demand::rate`].
    pub(crate) rate: (f64, bool),
    /// It wants to be left alone until then.
    pub(crate) quiet_until: Now,
}

/// All parts that are out.
#[derive(Debug)]
pub(crate) struct Shares {
    lease: Duration,
    /// Until then, parts that an earlier coordinator has lent may be in use.
    opens: Now,
    sites: HashMap<String, Site>,
    /// The highest sequence of each worker, and when it came.
    sequences: HashMap<String, (u64, Now)>,
    swept: Now,
}

#[derive(Debug, Default)]
struct Site {
    /// In an order that does not change: rates are added up.
    out: BTreeMap<String, Out>,
    /// What all of it bears, as far as that is known.
    learned: Option<(f64, bool)>,
    /// When slots were last given back, or ended.
    freed: Option<Now>,
    /// It wants to be left alone.
    quiet_until: Now,
}

/// A worker's part, or that it waits for one.
#[derive(Debug, Clone, Copy)]
struct Out {
    /// 0: it waits.
    slots: u32,
    since: Now,
    until: Now,
    /// As it has said.
    rate: (f64, bool),
}

impl Shares {
    /// `all_back`: no worker has a part that an earlier coordinator has lent; `learned`: what those knew of sites.
    pub(crate) fn new(
        now: Now,
        lease: Duration,
        all_back: bool,
        learned: impl IntoIterator<Item = (String, Learned)>,
    ) -> Self {
        let opens = if all_back { now } else { now + with_margin(lease) };
        // Whoever had parts of them before may have used them just now.
        let site = |Learned { rate, quiet_until }| Site {
            learned: Some(rate),
            freed: Some(now),
            quiet_until,
            ..Site::default()
        };
        let sites = learned.into_iter().map(|(name, learned)| (name, site(learned))).collect();
        Self { lease, opens, sites, sequences: HashMap::new(), swept: now }
    }

    /// What is known of sites that cannot be found out at once.
    pub(crate) fn learned(&self, now: Now) -> impl Iterator<Item = (&str, Learned)> {
        let learned = move |(name, site): (_, &Site)| {
            let rate = site.learned.filter(|_| site.is_known() || now < site.quiet_until)?;
            Some((name, Learned { rate, quiet_until: site.quiet_until }))
        };
        self.sites.iter().map(|(name, site)| (name.as_str(), site)).filter_map(learned)
    }

    /// Whether no worker has a part of any site's budget.
    pub(crate) fn is_all_back(&self, now: Now) -> bool {
        let out = |site: &Site| site.out.values().any(|out| out.slots > 0 && out.until > now);
        now >= self.opens && !self.sites.values().any(out)
    }

    /// How long a part lasts.
    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    /// The answers to a worker's demands, one each; None: a later request of this worker came before.
    pub(crate) fn ask(
        &mut self,
        now: Now,
        worker: &str,
        sequence: u64,
        demands: &[Demand],
        sites: &Sites,
    ) -> Option<Vec<Share>> {
        self.forget(now);
        let (highest, seen) = self.sequences.entry(worker.to_owned()).or_insert((0, now));
        if sequence <= *highest {
            return None;
        }
        (*highest, *seen) = (sequence, now);
        let (open, until) = (now >= self.opens, now + with_margin(self.lease));
        let answer = |demand: &Demand| {
            let budget = sites.budget(&demand.site);
            if !self.sites.contains_key(&demand.site) {
                self.sites.insert(demand.site.clone(), Site::default());
            }
            let site = self.sites.get_mut(&demand.site).expect("just put there");
            site.ask(now, open, until, worker, demand, budget)
        };
        Some(demands.iter().map(answer).collect())
    }

    /// What is known of a site.
    pub(crate) fn standing(&self, now: Now, site: &str, budget: Budget) -> Standing {
        let rate = self.sites.get(site).map_or(begin_with(budget), |site| site.rate(budget));
        let live = self.sites.get(site).into_iter().flat_map(|site| site.out.values()).filter(|out| out.until > now);
        Standing { rate, lent: live.map(|out| out.slots).sum() }
    }

    fn forget(&mut self, now: Now) {
        if now < self.swept + WAITS {
            return;
        }
        self.swept = now;
        self.sequences.retain(|_, (_, seen)| now < *seen + FORGET);
        let many = self.sites.len() > MOST_SITES;
        self.sites.retain(|_, site| {
            site.end(now);
            site.is_known() && !many
                || !site.out.is_empty()
                || now < site.quiet_until
                || site.freed.is_some_and(|at| now < at + FORGET / 60)
        });
    }
}

impl Site {
    fn rate(&self, budget: Budget) -> (f64, bool) {
        let (rate, known) = self.learned.unwrap_or_else(|| begin_with(budget));
        if budget.rate > 0.0 && (rate == 0.0 || rate > budget.rate) { (budget.rate, known) } else { (rate, known) }
    }

    /// Whether more is known of it than how to begin.
    fn is_known(&self) -> bool {
        self.learned.is_some_and(|(rate, known)| known || rate != FIRST_RATE)
    }

    /// Slots that are worth lending alone.
    fn chunk(&self, budget: Budget) -> u32 {
        let parts = match self.rate(budget).0 {
            0.0 => budget.slots,
            rate => ((rate / LEAST_RATE) as u32).clamp(1, budget.slots),
        };
        budget.slots.div_ceil(parts)
    }

    /// Forgets parts that have ended, and those who wait no more.
    fn end(&mut self, now: Now) {
        let mut freed = self.freed;
        self.out.retain(|_, out| {
            if out.until <= now && out.slots > 0 {
                freed = freed.max(Some(out.until));
            }
            out.until > now
        });
        self.freed = freed;
    }

    fn ask(&mut self, now: Now, open: bool, until: Now, worker: &str, demand: &Demand, budget: Budget) -> Share {
        self.end(now);
        self.quiet_until = self.quiet_until.max(now + demand.quiet);
        let before = self.out.remove(worker);
        let used = self.out.values().map(|out| out.slots).sum::<u32>().min(budget.slots);
        let (free, chunk) = (budget.slots - used, self.chunk(budget));
        let held = demand.held.min(free);
        if before.is_some_and(|before| before.slots > held) {
            self.freed = Some(now);
        }
        let had = before.filter(|before| (before.slots > 0) == (held > 0));
        let since = had.map_or(now, |before| before.since);
        // Those that wait, and those of them that came before.
        let waiting = || self.out.iter().filter(|(_, out)| out.slots == 0);
        let before_it = |(name, out): &(&String, &Out)| (out.since, name.as_str()) < (since, worker);
        let (all, earlier) = (waiting().count(), waiting().filter(before_it).count() as u32);
        let there = self.out.len() as u32 + 1;
        let fair = (budget.slots / there).max(chunk).min(free);
        let slots = match held {
            _ if !demand.wanted => 0,
            _ if !open => held,
            0 if free < chunk.saturating_mul(earlier + 1) => 0,
            _ if there == 1 => free,
            // There is enough for all, or it is still its turn.
            held if held == 0 || all == 0 || budget.slots / chunk >= there || now < since + TURN => fair,
            _ => 0,
        };
        let rate = if held > 0 { demand.rate } else { self.rate(budget) };
        match slots.max(held) {
            0 if demand.wanted => {
                self.out.insert(worker.to_owned(), Out { slots: 0, since, until: now + WAITS, rate });
            }
            0 => {}
            slots => {
                let since = if held > 0 { since } else { now };
                self.out.insert(worker.to_owned(), Out { slots, since, until, rate });
            }
        }
        self.learn();
        let rate = self.rate(budget);
        let own = rate.0 * f64::from(slots) / f64::from(budget.slots);
        // Whoever had these slots before may have used them just now.
        let pause = if own > 0.0 { Duration::from_secs_f64((1.0 / own).min(60.0)) } else { Duration::ZERO };
        let others = self.freed.filter(|_| held == 0).map_or(now, |freed| freed + pause);
        Share { slots, budget, rate, delay: others.max(self.quiet_until).saturating_sub(now) }
    }

    /// Takes up what the holders have found out, each for as much as it has.
    fn learn(&mut self) {
        let holders = || self.out.values().filter(|out| out.slots > 0);
        let slots: f64 = holders().map(|out| f64::from(out.slots)).sum();
        if slots > 0.0 {
            let sum: f64 = holders().map(|out| f64::from(out.slots) * out.rate.0).sum();
            self.learned = Some((sum / slots, holders().any(|out| out.rate.1)));
        }
    }
}

/// How long a part counts that is lent for so long.
fn with_margin(lease: Duration) -> Duration {
    lease + lease.mul_f64(MARGIN).max(LEAST_MARGIN)
}

/// The rate of a site of which nothing is known yet.
fn begin_with(budget: Budget) -> (f64, bool) {
    match budget.borne {
        true => (budget.rate, true),
        false if budget.rate > 0.0 => (budget.rate.min(FIRST_RATE), false),
        false => (FIRST_RATE, false),
    }
}

#[cfg(test)]
mod tests;
