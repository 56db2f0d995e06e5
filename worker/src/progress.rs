//! What an attempt has made so far, and of what it is to make no more.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::rejection::outcome_name;
use proto::{Outcome, OutcomeCounts};

use crate::metrics;

/// What an attempt has made so far, and of what it is to make no more.
#[derive(Debug, Default)]
pub(crate) struct Progress(Mutex<Made>);

#[derive(Debug, Default)]
struct Made {
    /// URLs by outcome.
    outcomes: OutcomeCounts,
    /// Samples by label.
    kept: HashMap<u32, u64>,
    /// The same at which a class is full; classes that are not named have no limit.
    most: HashMap<u32, u64>,
    /// Whether a class may have become full.
    news: bool,
}

impl Progress {
    fn made(&self) -> MutexGuard<'_, Made> {
        // Nothing under the lock can leave it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count(&self, outcome: Outcome) {
        self.made().outcomes.add(outcome, 1);
        metrics::outcome(outcome_name(outcome));
    }

    pub(crate) fn keep(&self, label: u32) {
        let mut made = self.made();
        let kept = made.kept.entry(label).or_default();
        *kept += 1;
        let kept = *kept;
        made.news |= made.most.get(&label).is_some_and(|most| kept >= *most);
    }

    pub(crate) fn is_full(&self, label: u32) -> bool {
        let made = self.made();
        made.most.get(&label).is_some_and(|most| made.kept.get(&label).copied().unwrap_or(0) >= *most)
    }

    /// Whether a class may have become full since this was last asked.
    pub(crate) fn news(&self) -> bool {
        std::mem::take(&mut self.made().news)
    }

    /// Takes note of what classes still want beyond what was `reported` as kept.
    pub(crate) fn limit(&self, wanted: HashMap<u32, u64>, reported: &HashMap<u32, u64>) {
        let most = |(label, wanted)| (label, wanted + reported.get(&label).copied().unwrap_or(0));
        let mut made = self.made();
        made.most = wanted.into_iter().map(most).collect();
        made.news = true;
    }

    /// URLs by outcome.
    pub(crate) fn so_far(&self) -> OutcomeCounts {
        self.made().outcomes
    }

    /// Samples by label, if any class has a limit.
    pub(crate) fn kept(&self) -> HashMap<u32, u64> {
        let made = self.made();
        if made.most.is_empty() { HashMap::new() } else { made.kept.clone() }
    }
}
