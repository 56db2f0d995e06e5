//! The budgets of hosts: how much of each every worker may use, so that all of them together stay within it. A pure state
//! machine; time comes in as an argument.
//!
//! A grant is a number of slots (requests at once) and a rate, for a duration. The worker counts the duration from the moment
//! when it asked, the broker from the moment of its answer and [`MARGIN`] longer, so what the broker takes for free is used by
//! nobody. To lower a grant takes two messages, because an answer may be lost: the broker answers with fewer slots, and
//! counts on having the others back when the worker says that it holds no more than these, or when their time is over.
//!
//! A coordinator that follows another knows of no grants. Until the last one that there can be has ended, it only prolongs
//! what workers say they hold.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use crate::ledger::Now;

/// For clocks that do not run alike: this share of a grant's duration more goes by before its slots are given to another.
const MARGIN: f64 = 0.1;
/// A worker asks again so many times in the duration of a grant, and this often if there is something to wait for.
const ASKS: u32 = 3;
const ASKS_IF_CONTENDED: u32 = 20;

/// Settings of what all workers together may ask of one host (a name or address with its port).
#[derive(Debug, Clone, clap::Args)]
pub struct HostBudgets {
    /// Requests that all workers together may have open at one host
    #[arg(long, env = "GLEANER_HOST_SLOTS", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536), value_name = "N")]
    pub host_slots: u32,
    /// Requests per second that all workers together may send to one host; 0: as many as its slots carry
    #[arg(long, env = "GLEANER_HOST_RATE", default_value_t = 100.0, value_parser = rate, value_name = "PER_SECOND")]
    pub host_rate: f64,
    /// Another budget for a host and the names under it: flickr.com=64 or flickr.com=64/200 (slots, requests per second); may
    /// be repeated, the longest name that fits counts
    #[arg(long, env = "GLEANER_HOST_BUDGET", value_delimiter = ',', value_parser = named_budget, value_name = "HOST=SLOTS[/RATE]")]
    pub host_budget: Vec<(String, Budget)>,
    /// Seconds for which a worker is granted its share of a host
    #[arg(long, env = "GLEANER_GRANT_SECONDS", default_value_t = 10.0, value_parser = grant_seconds, value_name = "SECONDS")]
    pub grant_seconds: f64,
}

/// What all workers together may ask of one host.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// Requests at once.
    pub slots: u32,
    /// Requests per second; 0: no limit.
    pub rate: f64,
}

impl Default for HostBudgets {
    fn default() -> Self {
        Self { host_slots: 16, host_rate: 100.0, host_budget: Vec::new(), grant_seconds: 10.0 }
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.0..=1e6).contains(&rate) => Ok(rate),
        _ => Err("must be a number of requests per second, 0 to 1000000".to_owned()),
    }
}

fn grant_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.5..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be a number of seconds, 0.5 to 600".to_owned()),
    }
}

fn named_budget(text: &str) -> Result<(String, Budget), String> {
    let wanted = || "HOST=SLOTS or HOST=SLOTS/RATE is wanted, such as flickr.com=64/200".to_owned();
    let (host, budget) = text.split_once('=').filter(|(host, _)| !host.is_empty()).ok_or_else(wanted)?;
    let (slots, per_second) = budget.split_once('/').unwrap_or((budget, "0"));
    let slots = slots.parse().ok().filter(|slots| (1..=65536).contains(slots)).ok_or_else(wanted)?;
    Ok((host.to_ascii_lowercase(), Budget { slots, rate: rate(per_second)? }))
}

impl HostBudgets {
    fn budget(&self, host: &str) -> Budget {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => host,
        };
        let fits = |of: &str| {
            host == of || name == of || name.strip_suffix(of).is_some_and(|subdomain| subdomain.ends_with('.'))
        };
        let named = self.host_budget.iter().filter(|(of, _)| fits(of)).max_by_key(|(of, _)| of.len());
        named.map_or(Budget { slots: self.host_slots, rate: self.host_rate }, |&(_, budget)| budget)
    }

    fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.grant_seconds)
    }
}

/// What a worker says of one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Demand {
    pub(crate) host: String,
    /// Slots for which it has URLs.
    pub(crate) wanted: u32,
    /// Slots of a live grant, which it does not exceed until it has an answer.
    pub(crate) holds: u32,
    /// Requests that are open.
    pub(crate) in_flight: u32,
}

/// A worker's share of one host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Share {
    pub(crate) host: String,
    pub(crate) slots: u32,
    /// Requests per second; 0: no limit.
    pub(crate) rate: f64,
}

/// The answer to a worker's demands: a share for each, all for the same duration from the moment when it asked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shares {
    pub(crate) shares: Vec<Share>,
    pub(crate) duration: Duration,
    /// When the worker should ask again.
    pub(crate) ask_again: Duration,
}

/// Who may use how much of which host.
///
/// **At no time do the unexpired grants of a host exceed its budget**, in slots and in rate, whatever is lost or late.
#[derive(Debug)]
pub(crate) struct Broker {
    config: HostBudgets,
    /// Until then, grants of an earlier coordinator may be in use.
    opens: Now,
    hosts: HashMap<String, BTreeMap<Arc<str>, Claim>>,
    workers: HashMap<Arc<str>, Worker>,
    swept: Now,
}

#[derive(Debug, Default)]
struct Worker {
    /// Of its latest request: an earlier one that comes after it is no longer true.
    sequence: u64,
    heard: Now,
    hosts: HashSet<String>,
}

/// One worker at one host.
#[derive(Debug, Default)]
struct Claim {
    wanted: u32,
    heard: Now,
    /// Slots that it may be using, each number until then; the highest counts.
    grants: Vec<(u32, Now)>,
}

impl Claim {
    fn slots(&self, now: Now) -> u32 {
        self.grants.iter().filter(|(_, until)| *until > now).map(|&(slots, _)| slots).max().unwrap_or(0)
    }
}

impl Broker {
    /// `first`: no coordinator has ever granted anything before this one.
    pub(crate) fn new(now: Now, config: HostBudgets, first: bool) -> Self {
        let opens = if first { now } else { now + config.duration().mul_f64(1.0 + MARGIN) };
        Self { config, opens, hosts: HashMap::new(), workers: HashMap::new(), swept: now }
    }

    /// Answers all demands of a worker; what it does not name it does not use. None: it has asked anew since, so that this
    /// request says nothing.
    pub(crate) fn ask(&mut self, now: Now, worker: &str, sequence: u64, demands: Vec<Demand>) -> Option<Shares> {
        self.sweep(now);
        let (name, known) = match self.workers.get_key_value(worker) {
            Some((name, known)) => (Arc::clone(name), known.sequence),
            None => (Arc::from(worker), 0),
        };
        if sequence <= known {
            return None;
        }
        let named: HashSet<String> = demands.iter().map(|demand| demand.host.clone()).collect();
        let before = self.workers.entry(Arc::clone(&name)).or_default();
        let unnamed: Vec<String> = before.hosts.difference(&named).cloned().collect();
        *before = Worker { sequence, heard: now, hosts: named };
        for host in unnamed {
            if let Some(claims) = self.hosts.get_mut(&host) {
                claims.remove(&name);
            }
        }
        let duration = self.config.duration();
        let mut contended = false;
        let shares = demands
            .into_iter()
            .map(|demand| {
                let (share, wait) = self.grant(now, &name, demand);
                contended |= wait;
                share
            })
            .collect();
        let ask_again = duration / if contended { ASKS_IF_CONTENDED } else { ASKS };
        Some(Shares { shares, duration, ask_again })
    }

    /// One share, and whether there is more to be had or to be given back soon.
    fn grant(&mut self, now: Now, worker: &Arc<str>, demand: Demand) -> (Share, bool) {
        let Demand { host, wanted, holds, in_flight } = demand;
        let budget = self.config.budget(&host);
        let duration = self.config.duration();
        let claims = self.hosts.entry(host.clone()).or_default();
        let claim = claims.entry(Arc::clone(worker)).or_default();
        claim.wanted = wanted;
        claim.heard = now;
        claim.grants.retain_mut(|(slots, until)| {
            *slots = holds.min(*slots);
            *slots > 0 && *until > now
        });
        let (slots, wait) = if now < self.opens {
            let kept = wanted.min(holds).min(budget.slots);
            (kept, kept < wanted)
        } else {
            let others = claims.iter().filter(|(name, _)| *name != worker);
            let used: u32 = others.map(|(_, claim)| claim.slots(now)).fold(0, u32::saturating_add);
            let (target, scarce) = target(now, duration, budget.slots, claims, worker);
            let slots = target.min(budget.slots.saturating_sub(used));
            (slots, scarce || slots < target)
        };
        // What is in flight goes on, whatever becomes of the grant that it was begun under.
        let counted = slots.max(in_flight);
        if counted > 0
            && let Some(claim) = claims.get_mut(worker)
        {
            claim.grants.push((counted, now + duration.mul_f64(1.0 + MARGIN)));
        }
        let rate = budget.rate * f64::from(slots) / f64::from(budget.slots);
        (Share { host, slots, rate }, wait)
    }

    /// Forgets workers that have not asked for so long that they hold nothing.
    fn sweep(&mut self, now: Now) {
        let duration = self.config.duration();
        if now < self.swept + duration {
            return;
        }
        self.swept = now;
        let forgotten = |heard: Now| heard + duration.mul_f64(1.0 + MARGIN) <= now;
        self.workers.retain(|_, worker| !forgotten(worker.heard));
        self.hosts.retain(|_, claims| {
            claims.retain(|_, claim| !forgotten(claim.heard));
            !claims.is_empty()
        });
    }
}

/// The slots that a worker should have: all that claim some get equally many, as far as they want them, and what is left over
/// goes round among them from one duration to the next. Also whether there are fewer than are wanted by several.
fn target(
    now: Now,
    duration: Duration,
    budget: u32,
    claims: &BTreeMap<Arc<str>, Claim>,
    worker: &Arc<str>,
) -> (u32, bool) {
    let live: Vec<(&Arc<str>, u32)> = claims
        .iter()
        .filter(|(_, claim)| claim.wanted > 0 && claim.heard + duration > now)
        .map(|(name, claim)| (name, claim.wanted))
        .collect();
    let wanted = live.iter().map(|(_, wanted)| u64::from(*wanted)).sum::<u64>();
    let own = live.iter().find(|(name, _)| *name == worker).map_or(0, |(_, wanted)| *wanted);
    if wanted <= u64::from(budget) {
        return (own, false);
    }
    // The highest level at which all fit.
    let sum = |level: u32| live.iter().map(|(_, wanted)| u64::from(level.min(*wanted))).sum::<u64>();
    let (mut level, mut above) = (0, budget + 1);
    while level + 1 < above {
        let middle = level + (above - level) / 2;
        if sum(middle) <= u64::from(budget) { level = middle } else { above = middle }
    }
    let left = u64::from(budget) - sum(level);
    let wanting: Vec<&Arc<str>> = live.iter().filter(|(_, wanted)| *wanted > level).map(|(name, _)| *name).collect();
    let turn = u64::try_from(now.as_nanos() / duration.as_nanos().max(1)).unwrap_or(0);
    let count = wanting.len().max(1) as u64;
    let place = wanting.iter().position(|name| *name == worker).map(|place| place as u64);
    let first = (turn % count) * (left % count) % count;
    let extra = place.is_some_and(|place| (place + count - first) % count < left);
    (own.min(level) + u32::from(extra), live.len() > 1)
}

#[cfg(test)]
mod tests;
