//! Large sites, which have slices of their own: of which of them a slice may be leased, and how far each is.

use std::collections::HashMap;
use std::sync::Arc;

use proto::{DatasetId, pb};

use super::{Dataset, Datasets, State};
use crate::shares::LEAST_RATE;

/// Requests at once for which one worker is enough.
const SLOTS_OF_A_WORKER: u32 = 16;
/// Slices that have failed wait for a while: then those of other sites are leased.
const ALTERNATIVES: usize = 8;
/// Sites of a dataset that are shown: those of which most is left.
const SHOWN: usize = 20;

/// Uncommitted slices of all datasets, as long as the ledger does not change.
#[derive(Debug, Default)]
pub(super) struct Slices {
    version: u64,
    large: HashMap<Arc<str>, OfSite>,
    waiting: HashMap<DatasetId, Waiting>,
}

/// The slices of one large site.
#[derive(Debug, Clone, Copy, Default)]
struct OfSite {
    waiting: u32,
    leased: u32,
}

/// The slices of one dataset that nobody makes.
#[derive(Debug, Default)]
struct Waiting {
    /// Of many sites.
    mixed: u32,
    /// Of each large site, the one with the most first.
    large: Vec<(Arc<str>, u32)>,
}

impl State {
    /// Counts anew if anything has changed: many workers ask at the same moment.
    fn slices(&mut self) -> &Slices {
        let version = self.ledger.version();
        if self.slices.version != version {
            let mut slices = Slices { version, ..Slices::default() };
            let mut waiting: HashMap<(&DatasetId, &Arc<str>), u32> = HashMap::new();
            for (id, shard, leased) in self.ledger.open_shards() {
                let Some(dataset) = self.live.get(id) else { continue };
                match (dataset.deal.site(shard), leased) {
                    (Some(site), true) => slices.large.entry(Arc::clone(site)).or_default().leased += 1,
                    (Some(site), false) => {
                        slices.large.entry(Arc::clone(site)).or_default().waiting += 1;
                        *waiting.entry((id, site)).or_default() += 1;
                    }
                    (None, true) => {}
                    (None, false) => match slices.waiting.get_mut(id) {
                        Some(waiting) => waiting.mixed += 1,
                        None => drop(slices.waiting.insert(id.clone(), Waiting { mixed: 1, large: Vec::new() })),
                    },
                }
            }
            for ((id, site), n) in waiting {
                slices.waiting.entry(id.clone()).or_default().large.push((Arc::clone(site), n));
            }
            for waiting in slices.waiting.values_mut() {
                waiting.large.sort_by(|(a, n_a), (b, n_b)| n_b.cmp(n_a).then_with(|| a.cmp(b)));
            }
            self.slices = slices;
        }
        &self.slices
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
        let leasable = waiting.large.iter().filter(|(site, _)| self.leases_left(site, leased(site)) > 0);
        leasable.take(ALTERNATIVES).map(|(site, _)| Some(Arc::clone(site))).collect()
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
            let of_it = dataset.deal.large().filter(|(name, _)| &***name == site).flat_map(|(_, shards)| shards);
            pb::LargeSite {
                site: site.to_owned(),
                urls: of_it.map(urls).sum(),
                left,
                requests_per_second: standing.rate.0,
                known: standing.rate.1,
                slots_lent: standing.lent,
                slots: budget.slots,
                most_requests_per_second: budget.rate,
            }
        };
        left.into_iter().map(show).collect()
    }
}
