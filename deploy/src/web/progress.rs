//! How far a dataset is, and what became of its URLs so far.

use proto::Rejection;
use proto::pb::{Dataset, DatasetState};
use proto::rejection::KEPT;

use super::source::Source;
use crate::output::percent;
use crate::time::span;

/// What a dataset's bar is made of.
pub(super) const YIELD: [&str; 4] = ["kept", "back", "gone", "wait"];

/// URLs that are kept, may come back, are gone, and wait. A status alone may stand for either; it counts as gone.
pub(super) fn shares(dataset: &Dataset) -> [f64; 4] {
    let mut shares = [0; 4];
    for (name, urls) in &dataset.outcomes {
        shares[if name == KEPT { 0 } else { usize::from(!comes_back(name)) + 1 }] += urls;
    }
    shares[3] = dataset.urls.saturating_sub(shares.iter().sum());
    shares.map(|urls| urls as f64)
}

/// Whether a later round asks again for URLs with this outcome.
pub(super) fn comes_back(outcome: &str) -> bool {
    outcome.parse::<Rejection>().is_ok_and(|rejection| rejection.is_transient(None))
}

/// How far a dataset is, in words.
pub(super) fn progress(source: &Source, dataset: &Dataset) -> String {
    let done: u64 = dataset.outcomes.values().sum();
    let kept = dataset.outcomes.get(KEPT).copied().unwrap_or(0);
    let so_far = format!("{} done, {} of that kept", percent(done, dataset.urls), percent(kept, done));
    match (dataset.state(), source.speed(dataset)) {
        (DatasetState::Sealing, _) => format!("{so_far}; its manifest is being made"),
        (_, Some(speed)) => {
            let left = dataset.urls.saturating_sub(done) as f64 / speed;
            format!("{so_far}; {speed:.0} URLs a second, about {} left", span((left * 1000.0) as u64))
        }
        (_, None) => so_far,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_the_bar_add_up_to_the_urls() {
        let outcomes = [(KEPT, 50), ("dns", 10), ("not_found", 20), ("from_the_future", 5)];
        let outcomes = outcomes.map(|(name, urls)| (name.to_owned(), urls)).into();
        let dataset = Dataset { urls: 100, outcomes, ..Dataset::default() };
        assert_eq!(shares(&dataset), [50.0, 10.0, 25.0, 15.0]);
    }
}
