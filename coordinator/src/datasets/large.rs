//! Large sites, which have slices of their own: of which of them a slice may be leased, and how far each is.

use std::collections::HashMap;
use std::sync::Arc;

use proto::pb;

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
    /// Of many sites, that nobody makes.
    mixed_waiting: u32,
    /// Large sites, the one of which most are waiting first.
    large: Vec<(Arc<str>, OfSite)>,
}

/// The slices of one large site.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct OfSite {
    waiting: u32,
    leased: u32,
}

impl State {
    /// Counts anew if anything has changed: many workers ask at the same moment.
    fn slices(&mut self) -> &Slices {
        let version = self.ledger.version();
        if self.slices.version != version {
            let mut slices = Slices { version, ..Slices::default() };
            let mut sites: HashMap<&Arc<str>, OfSite> = HashMap::new();
            for (id, shard, leased) in self.ledger.open_shards() {
                match (self.live.get(id).and_then(|dataset| dataset.deal.site(shard)), leased) {
                    (Some(site), true) => sites.entry(site).or_default().leased += 1,
                    (Some(site), false) => sites.entry(site).or_default().waiting += 1,
                    (None, leased) => slices.mixed_waiting += u32::from(!leased),
                }
            }
            slices.large = sites.into_iter().map(|(site, of)| (Arc::clone(site), of)).collect();
            slices.large.sort_by(|(a, of_a), (b, of_b)| of_b.waiting.cmp(&of_a.waiting).then_with(|| a.cmp(b)));
            self.slices = slices;
        }
        &self.slices
    }
}

impl Datasets {
    /// Of which sites a slice may be leased next, best first; None stands for slices of many sites.
    pub(super) fn leasable_sites(&self, state: &mut State, large: bool) -> Vec<Option<Arc<str>>> {
        let slices = state.slices();
        if !large {
            return if slices.mixed_waiting > 0 { vec![None] } else { Vec::new() };
        }
        let waiting = slices.large.iter().take_while(|(_, of)| of.waiting > 0);
        let leasable = waiting.filter(|(site, of)| self.leases_left(site, of.leased) > 0);
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
