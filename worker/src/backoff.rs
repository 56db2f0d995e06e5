//! Delays between the tries of a call that fails.

use std::time::Duration;

use backon::ExponentialBuilder;

/// Delays that double from `first` to `max`, each with a random part of itself on top so that workers do not come back
/// together. They do not end by themselves.
pub(crate) fn backoff(first: Duration, max: Duration) -> ExponentialBuilder {
    ExponentialBuilder::new().with_min_delay(first).with_max_delay(max).without_max_times().with_jitter()
}
