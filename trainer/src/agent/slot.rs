//! A place for a rank: one of the agent's devices, or a part of one.

use tracing::warn;

use super::local_rank::LocalRank;

/// Decoded images get no less than this of a device: it is about what they take of it at once.
const LEAST_PIXELS: u64 = 256 << 20;

/// A device, and the rank on it.
pub(super) struct DeviceSlot {
    pub(super) device: String,
    pub(super) rank: Option<LocalRank>,
    budget: PixelBudget,
}

impl DeviceSlot {
    pub(super) fn new(device: String) -> Self {
        Self { device, rank: None, budget: PixelBudget::default() }
    }

    /// How much of the device's memory the decoded images of a run may take, of at most so much.
    pub(super) fn pixels(&self, run: &str, most: u64) -> u64 {
        self.budget.of(run, most)
    }

    /// A run's rank here had no memory left for a step.
    pub(super) fn lacked_memory(&mut self, run: &str, most: u64) {
        if self.budget.lower(run, most) {
            let bytes = self.budget.of(run, most);
            warn!(run, device = self.device, bytes, "decoded images leave the next rank more of its device's memory");
        }
    }
}

/// How much of a device's memory decoded images may take: less for a run whose steps found none left, since its next
/// rank there would fill the device in the same way.
#[derive(Default)]
struct PixelBudget(Option<(String, u64)>);

impl PixelBudget {
    fn of(&self, run: &str, most: u64) -> u64 {
        self.0.as_ref().filter(|(of, _)| of == run).map_or(most, |(_, bytes)| most.min(*bytes))
    }

    /// Halves it for this run, at last to nothing. Returns whether there was something to halve.
    fn lower(&mut self, run: &str, most: u64) -> bool {
        let (had, half) = (self.of(run, most), self.of(run, most) / 2);
        self.0 = Some((run.to_owned(), if half < LEAST_PIXELS { 0 } else { half }));
        had > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_whose_steps_find_no_memory_keeps_half_as_many_images_each_time_and_at_last_none() {
        let mut budget = PixelBudget::default();
        let most = 3 << 30;
        let mut given = vec![budget.of("r", most)];
        while budget.lower("r", most) {
            given.push(budget.of("r", most));
        }
        assert_eq!(given, [3 << 30, 3 << 29, 3 << 28, 3 << 27, 0]);
        assert_eq!((budget.of("r", most), budget.of("another", most)), (0, most));
        budget.lower("another", most);
        assert_eq!((budget.of("r", most), budget.of("another", most)), (most, most / 2));
    }
}
