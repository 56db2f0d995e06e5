//! What an attempt has made so far, and how many samples of a class it may make.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::rejection::outcome_name;
use proto::{Outcome, OutcomeCounts};

use crate::metrics;

/// Shared by an attempt, which counts, and its lease's renewals, which report the counts and bring limits.
#[derive(Debug, Default)]
pub(crate) struct Progress(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// URLs by outcome.
    outcomes: OutcomeCounts,
    /// Samples by label.
    kept: HashMap<u32, u64>,
    /// The number of samples at which a class is full; classes that are not named have no limit.
    limits: HashMap<u32, u64>,
    class_filled: bool,
}

impl Progress {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Nothing under the lock can leave it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count_outcome(&self, outcome: Outcome) {
        self.counts().outcomes.add(outcome, 1);
        metrics::outcome(outcome_name(outcome));
    }

    pub(crate) fn count_sample(&self, label: u32) {
        let mut counts = self.counts();
        let kept = counts.kept.entry(label).or_default();
        *kept += 1;
        let kept = *kept;
        counts.class_filled |= counts.limits.get(&label).is_some_and(|limit| kept >= *limit);
    }

    pub(crate) fn is_full(&self, label: u32) -> bool {
        let counts = self.counts();
        let kept = counts.kept.get(&label).copied().unwrap_or(0);
        counts.limits.get(&label).is_some_and(|limit| kept >= *limit)
    }

    /// Whether a class is full that was not at the last call, or is so by what the coordinator has said since.
    pub(crate) fn take_class_filled(&self) -> bool {
        std::mem::take(&mut self.counts().class_filled)
    }

    /// Sets how many samples classes still want beyond those that were `reported` as kept.
    pub(crate) fn set_wanted(&self, wanted: HashMap<u32, u64>, reported: &HashMap<u32, u64>) {
        let limit = |(label, wanted)| (label, wanted + reported.get(&label).copied().unwrap_or(0));
        let mut counts = self.counts();
        counts.limits = wanted.into_iter().map(limit).collect();
        let Counts { kept, limits, .. } = &*counts;
        counts.class_filled = limits.iter().any(|(label, limit)| kept.get(label).copied().unwrap_or(0) >= *limit);
    }

    /// URLs by outcome.
    pub(crate) fn outcomes(&self) -> OutcomeCounts {
        self.counts().outcomes
    }

    /// Samples by label, if any class has a limit.
    pub(crate) fn kept(&self) -> HashMap<u32, u64> {
        let counts = self.counts();
        if counts.limits.is_empty() { HashMap::new() } else { counts.kept.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_looked_through_only_when_a_class_is_full() {
        let (progress, none) = (Progress::default(), HashMap::new());
        progress.set_wanted([(0, 2), (1, 5)].into(), &none);
        progress.count_sample(0);
        assert!(!progress.take_class_filled(), "no class is full, though each has a limit");
        progress.count_sample(0);
        assert!(progress.take_class_filled() && !progress.take_class_filled());
        progress.set_wanted([(0, 9), (1, 5)].into(), &progress.kept());
        assert!(!progress.take_class_filled() && !progress.is_full(0));
        progress.set_wanted([(0, 9), (1, 0)].into(), &progress.kept());
        assert!(progress.take_class_filled() && progress.is_full(1));
    }
}
