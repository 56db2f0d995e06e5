//! The clock by which a coordinator decides.

#[cfg(test)]
use std::sync::Arc;
#[cfg(test)]
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::ledger::Now;

/// Clones tell the same time.
#[derive(Debug, Clone)]
pub(crate) enum Clock {
    /// The machine's monotonic one, since then.
    Machine(Instant),
    /// A simulation's, in microseconds.
    #[cfg(test)]
    Simulated(Arc<AtomicU64>),
}

impl Clock {
    /// The machine's, from now on.
    pub(crate) fn machine() -> Self {
        Self::Machine(Instant::now())
    }

    pub(crate) fn now(&self) -> Now {
        match self {
            Self::Machine(started) => started.elapsed(),
            #[cfg(test)]
            Self::Simulated(micros) => Now::from_micros(micros.load(Ordering::Relaxed)),
        }
    }
}
