//! Large sites, which have slices of their own: of which of them a slice may be leased, and how far each is.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use proto::{DatasetId, pb};

use super::{Dataset, Datasets, State};
use crate::ledger::{Change, Ledger};
use crate::shares::LEAST_RATE;
use crate::yields::SiteYield;

/// Requests at once for which one worker is enough.
const SLOTS_OF_A_WORKER: u32 = 16;
/// Slices that have failed wait for a while: then those of other sites are leased.
const ALTERNATIVES: usize = 8;
/// Sites of a dataset that are shown: those of which most is left.
const SHOWN: usize = 20;

/// Uncommitted slices of all datasets by their sites.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Slices {
    large: HashMap<Arc<str>, OfSite>,
    waiting: HashMap<DatasetId, Waiting>,
}

/// The slices of one large site. There are some.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct OfSite {
    waiting: u32,
    leased: u32,
}

/// The slices of one dataset that nobody makes. There are some.
#[derive(Debug, Default, PartialEq, Eq)]
struct Waiting {
    /// Of many sites.
    mixed: u32,
    /// Of each large site.
    large: HashMap<Arc<str>, u32>,
    /// The same, the one with the most first.
    most: BTreeSet<(Reverse<u32>, Arc<str>)>,
}

impl Slices {
    /// Takes up what the ledger has done since the last time: a count of all for each lease would be quadratic.
    /// `site` tells of which large site a slice is; None: of none that is there.
    fn follow(&mut self, ledger: &mut Ledger, site: impl Fn(&DatasetId, u32) -> Option<Option<Arc<str>>>) {
        let Some(changes) = ledger.take_changes() else {
            *self = Self::counted(ledger, site);
            return;
        };
        for Change { id, is_paused, was_leased, is_leased } in changes {
            let Some(site) = site(&id.dataset, id.shard) else { continue };
            // What waits in a paused dataset does not count.
            if was_leased || !is_paused {
                self.count(&id.dataset, site.as_ref(), was_leased, false);
            }
            if let Some(is_leased) = is_leased.filter(|is_leased| *is_leased || !is_paused) {
                self.count(&id.dataset, site.as_ref(), is_leased, true);
            }
        }
    }

    fn counted(ledger: &Ledger, site: impl Fn(&DatasetId, u32) -> Option<Option<Arc<str>>>) -> Self {
        let mut slices = Self::default();
        for (id, shard, leased) in ledger.open_shards() {
            if let Some(site) = site(id, shard) {
                slices.count(id, site.as_ref(), leased, true);
            }
        }
        slices
    }

    /// Counts one slice more, or one less.
    fn count(&mut self, id: &DatasetId, site: Option<&Arc<str>>, leased: bool, more: bool) {
        let change = |n: u32| if more { n + 1 } else { n.saturating_sub(1) };
        if let Some(site) = site {
            let of_site = self.large.entry(Arc::clone(site)).or_default();
            let counted = if leased { &mut of_site.leased } else { &mut of_site.waiting };
            *counted = change(*counted);
            if *of_site == OfSite::default() {
                self.large.remove(site);
            }
        }
        if leased {
            return;
        }
        if !self.waiting.contains_key(id) {
            self.waiting.insert(id.clone(), Waiting::default());
        }
        let Some(waiting) = self.waiting.get_mut(id) else { return };
        match site {
            None => waiting.mixed = change(waiting.mixed),
            Some(site) => {
                let before = waiting.large.remove(site).unwrap_or(0);
                waiting.most.remove(&(Reverse(before), Arc::clone(site)));
                let now = change(before);
                if now > 0 {
                    waiting.large.insert(Arc::clone(site), now);
                    waiting.most.insert((Reverse(now), Arc::clone(site)));
                }
            }
        }
        if *waiting == Waiting::default() {
            self.waiting.remove(id);
        }
    }
}

impl State {
    fn slices(&mut self) -> &Slices {
        let Self { ledger, live, slices, .. } = self;
        slices.follow(ledger, |id, shard| live.get(id).map(|dataset| dataset.deal.site(shard).cloned()));
        slices
    }
}

impl Datasets {
    /// Of which sites a slice of this dataset may be leased next, best first; None stands for slices of many sites.
    pub(super) fn leasable_sites(&self, state: &mut State, of: &DatasetId, large: bool) -> Vec<Option<Arc<str>>> {
        let slices = state.slices();
        let Some(waiting) = slices.waiting.get(of) else { return Vec::new() };
        if !large {
            return if waiting.mixed > 0 { vec![None] } else { Vec::new() };
        }
        let leased = |site: &Arc<str>| slices.large.get(site).map_or(0, |of| of.leased);
        let leasable = waiting.most.iter().filter(|(_, site)| self.leases_left(site, leased(site)) > 0);
        leasable.take(ALTERNATIVES).map(|(_, site)| Some(Arc::clone(site))).collect()
    }

    /// How many more slices of a large site may be leased: workers that make more of them would only wait for each
    /// other.
    fn leases_left(&self, site: &str, leased: u32) -> u32 {
        let budget = self.sites.budget(site);
        let by_slots = budget.slots / SLOTS_OF_A_WORKER;
        let by_rate = match self.shares().standing(self.now(), site, budget).rate.0 {
            0.0 => by_slots,
            rate => (rate / LEAST_RATE) as u32,
        };
        by_slots.min(by_rate).max(1).saturating_sub(leased)
    }

    /// For how many workers there is something to do: shards that are made, and those that could be.
    pub(crate) fn leasable(&self) -> u64 {
        let mut state = self.state();
        let totals = state.ledger.totals();
        let large = &state.slices().large;
        let cannot = large.iter().map(|(site, of)| of.waiting.saturating_sub(self.leases_left(site, of.leased)));
        u64::from(totals.waiting + totals.leased) - cannot.map(u64::from).sum::<u64>()
    }

    /// The large sites of a dataset that are not finished, those of which most is left first.
    pub(crate) fn large_sites(&self, dataset: &Dataset) -> Vec<pb::LargeSite> {
        let first = dataset.rounds.last().map_or(0, |round| round.first_slice);
        let urls = |shard| dataset.slice_of(shard).map_or(0, |slice| u64::from(slice.urls));
        let mut left: HashMap<&str, u64> = HashMap::new();
        {
            let state = self.state();
            for (_, shard, _) in state.ledger.open_shards().filter(|(id, ..)| **id == dataset.id) {
                let Some(site) = dataset.deal.site(shard) else { continue };
                let done = dataset.progress.get(&shard).map_or(0, |outcomes| outcomes.total());
                *left.entry(site).or_default() += urls(shard).saturating_sub(done);
            }
        }
        let mut left: Vec<_> = left.into_iter().filter(|(_, left)| *left > 0).collect();
        left.sort_by(|(a, left_a), (b, left_b)| left_b.cmp(left_a).then_with(|| a.cmp(b)));
        left.truncate(SHOWN);
        let show = |(site, left): (&str, u64)| {
            let budget = self.sites.budget(site);
            let standing = self.shares().standing(self.now(), site, budget);
            let SiteYield { all, lately } = self.state().yields.site(&dataset.id, site);
            let lately = lately.unwrap_or_default();
            // Rounds before the last ones asked for the same URLs.
            let of_it = dataset.deal.large().filter(|(name, _)| &***name == site).flat_map(|(_, shards)| shards);
            let of_it = of_it.filter(|shard| *shard >= first);
            pb::LargeSite {
                site: site.to_owned(),
                urls: of_it.map(urls).sum(),
                left,
                requests_per_second: standing.rate.0,
                known: standing.rate.1,
                slots_lent: standing.lent,
                slots: budget.slots,
                most_requests_per_second: budget.rate,
                asked: all.asked,
                kept: all.kept,
                asked_lately: lately.asked,
                kept_lately: lately.kept,
            }
        };
        left.into_iter().map(show).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::ledger::Now;

    fn id(n: usize) -> DatasetId {
        format!("birds-{n}").parse().expect("an id")
    }

    /// Of three slices one is of many sites; the others are of four large ones, which datasets share.
    fn site(_: &DatasetId, shard: u32) -> Option<Option<Arc<str>>> {
        Some((!shard.is_multiple_of(3)).then(|| format!("site-{}.com", shard % 4).into()))
    }

    proptest! {
        #[test]
        fn what_is_followed_is_what_would_be_counted(steps in prop::collection::vec((0..12u8, 0..1000u32, 0..4u64), 1..200)) {
            let lease = Duration::from_secs(30);
            let (mut ledger, mut slices) = (Ledger::new(1, lease), Slices::default());
            let mut now = Now::ZERO;
            let (mut leases, mut next) = (Vec::new(), [0u32; 3]);
            for (what, n, seconds) in steps {
                now += Duration::from_secs(seconds);
                let (of, worker) = (n as usize % 3, format!("w{}", n % 5));
                match what {
                    0 => {
                        let first = next[of];
                        next[of] += n % 40;
                        ledger.add(now, &id(of), first..next[of], n % 2 == 0);
                    }
                    1 => ledger.control(&id(of), 1.0, n % 2 == 0),
                    2 if n % 10 == 0 => ledger.remove(&id(of)),
                    3 => now += lease,
                    4 => drop(ledger.expire(now)),
                    5 => {
                        for shard in 0..next[of] {
                            ledger.decide(now, &id(of).shard(shard), 10, false);
                        }
                    }
                    6 => drop(ledger.take_waiting(&id(of), 2)),
                    7 if !leases.is_empty() => {
                        let (shard, attempt, worker): &(_, _, String) = &leases[n as usize % leases.len()];
                        ledger.renew(now, shard, *attempt, worker, 0);
                    }
                    8 if !leases.is_empty() => {
                        let (shard, attempt, _) = &leases[n as usize % leases.len()];
                        ledger.release(now, shard, *attempt, None);
                    }
                    9 if !leases.is_empty() => drop(ledger.commit(&leases[n as usize % leases.len()].0, Some("w1"))),
                    _ => if let Some((shard, attempt)) = ledger.grant(now, &worker, &id(of), |_| 10, |_| true) {
                        leases.push((shard, attempt, worker));
                    }
                }
                // Not after each step, so that several are taken up at once.
                if n % 3 > 0 {
                    slices.follow(&mut ledger, site);
                    prop_assert_eq!(&slices, &Slices::counted(&ledger, site));
                }
                let leased = ledger.open_shards().filter(|(_, _, leased)| *leased);
                let all: u32 = (0..3).map(|of| ledger.counts(&id(of)).leased).sum();
                prop_assert_eq!(all as usize, leased.count());
            }
        }
    }

    #[test]
    fn a_lease_costs_the_same_however_many_slices_wait() {
        let (mut ledger, mut slices) = (Ledger::new(1, Duration::from_secs(30)), Slices::default());
        ledger.add(Now::ZERO, &id(0), 0..10_000, true);
        let looked = Cell::new(0);
        let counting = |of: &DatasetId, shard: u32| {
            looked.set(looked.get() + 1);
            site(of, shard)
        };
        slices.follow(&mut ledger, counting);
        assert_eq!(looked.replace(0), 10_000);
        for n in 0..1000 {
            let (shard, _) = ledger.grant(Now::ZERO, "w", &id(0), |_| 10, |_| true).expect("there are more");
            if n % 2 == 0 {
                ledger.commit(&shard, Some("w"));
            }
            slices.follow(&mut ledger, counting);
        }
        assert_eq!(looked.get(), 1500, "one slice for each lease, and for each commit");
        assert_eq!(slices, Slices::counted(&ledger, site));
    }
}
