//! What a committed slice has yielded, beside the others of its round.

use proto::{DatasetId, OutcomeCounts, ShardId};

use super::State;
use crate::ledger::Now;
use crate::yields::{Low, Yield};

impl State {
    /// Compares what a worker has kept of a slice with what was kept of the round's others; those of URLs that have
    /// failed before are left aside.
    pub(super) fn yielded(&mut self, now: Now, of: &ShardId, worker: &str, outcomes: &OutcomeCounts) {
        let Some(dataset) = self.live.get(&of.dataset) else { return };
        let round = dataset.rounds.iter().find(|round| round.shards().contains(&of.shard));
        let again = dataset.slice_of(of.shard).is_some_and(|slice| slice.once);
        if let Some(round) = round.filter(|_| !again) {
            let site = dataset.deal.site(of.shard);
            self.yields.committed(&of.dataset, round.round, worker, site, outcomes);
            self.compare(now, &of.dataset);
        }
    }

    /// Says which workers keep far less of a dataset than the others.
    pub(super) fn compare(&mut self, now: Now, dataset: &DatasetId) {
        let told = |Low { worker, own, others }| {
            let [own, others] = [own, others].map(|of: Yield| 100.0 * of.share());
            let text = format!(
                "worker {worker} lately kept {own:.1} % of what it asked many sites for, and the others {others:.1} %: \
                 look at its network, its name servers (DNS), its proxy"
            );
            (worker, text)
        };
        let low = self.yields.low(dataset).into_iter().map(told).collect();
        self.troubles.low_yields(now, dataset, low);
    }
}
