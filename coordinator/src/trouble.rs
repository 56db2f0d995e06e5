//! What goes wrong in the cluster, and since when: the failures of workers and of the store that have not ended, and
//! workers that keep far less than others. Pure; time comes in as an argument.

use std::time::Duration;

use proto::DatasetId;
use proto::pb::{self, FailureKind};

use crate::ledger::Now;

/// A trouble that was not heard of for so long has passed.
const PASSED: Duration = Duration::from_secs(300);
/// A yield is news for longer: a slice may take a quarter of an hour.
const YIELD_PASSED: Duration = Duration::from_secs(3600);
/// Those that are remembered.
const MOST: usize = 1000;

/// Failures of one kind of one worker at one dataset, which have not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trouble {
    pub(crate) kind: FailureKind,
    /// None: the coordinator itself.
    pub(crate) worker: Option<String>,
    pub(crate) dataset: DatasetId,
    /// Of the latest one.
    pub(crate) text: String,
    pub(crate) count: u64,
    pub(crate) since: Now,
    pub(crate) last: Now,
    lasts: Lasts,
}

/// How long a trouble lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lasts {
    /// An attempt has failed: until its worker has committed something.
    Worked,
    /// It holds an attempt up that goes on: until it is no longer told.
    HeldUp,
    /// A worker keeps far less than the others: until it does not.
    LowYield,
}

impl Trouble {
    pub(crate) fn message(&self, now: Now) -> pb::Trouble {
        let ago = |then: Now| u64::try_from(now.saturating_sub(then).as_millis()).unwrap_or(u64::MAX);
        pb::Trouble {
            kind: self.kind.into(),
            text: self.text.clone(),
            worker: self.worker.clone().unwrap_or_default(),
            dataset: self.dataset.to_string(),
            count: self.count,
            since_millis_ago: ago(self.since),
            last_millis_ago: ago(self.last),
        }
    }
}

/// All troubles, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct Troubles(Vec<Trouble>);

impl Troubles {
    /// An attempt has failed, or something that the coordinator does.
    pub(crate) fn failed(
        &mut self,
        now: Now,
        kind: FailureKind,
        worker: Option<&str>,
        dataset: &DatasetId,
        text: String,
    ) {
        self.note(now, kind, worker, dataset, text, Lasts::Worked);
    }

    /// An attempt is held up, or (None) is not.
    pub(crate) fn held_up(
        &mut self,
        now: Now,
        worker: &str,
        dataset: &DatasetId,
        by: Option<(FailureKind, String)>,
    ) -> bool {
        let before = self.0.len();
        let kind = by.as_ref().map(|(kind, _)| *kind);
        let over = |trouble: &Trouble| {
            let same = trouble.worker.as_deref() == Some(worker) && trouble.dataset == *dataset;
            same && trouble.lasts == Lasts::HeldUp && Some(trouble.kind) != kind
        };
        self.0.retain(|trouble| !over(trouble));
        if let Some((kind, text)) = by {
            self.note(now, kind, Some(worker), dataset, text, Lasts::HeldUp);
            return true;
        }
        self.0.len() != before
    }

    /// A worker, or (None) the coordinator, did what it was to do: only slices that failed may still be in trouble.
    pub(crate) fn worked(&mut self, worker: Option<&str>) {
        let stays = |trouble: &Trouble| trouble.kind == FailureKind::Slice || trouble.lasts == Lasts::LowYield;
        self.0.retain(|trouble| trouble.worker.as_deref() != worker || stays(trouble));
    }

    /// The workers that keep far less of a dataset than the others, each with what is to be said: these, and no more.
    pub(crate) fn low_yields(&mut self, now: Now, dataset: &DatasetId, low: Vec<(String, String)>) {
        let is_low = |worker: Option<&str>| low.iter().any(|(low, _)| Some(&**low) == worker);
        self.0.retain(|trouble| {
            trouble.lasts != Lasts::LowYield || trouble.dataset != *dataset || is_low(trouble.worker.as_deref())
        });
        for (worker, text) in low {
            self.note(now, FailureKind::WayOut, Some(&worker), dataset, text, Lasts::LowYield);
        }
    }

    /// Forgets those that have passed, and those of datasets that are gone.
    pub(crate) fn forget(&mut self, now: Now, exists: impl Fn(&DatasetId) -> bool) {
        let passed = |trouble: &Trouble| if trouble.lasts == Lasts::LowYield { YIELD_PASSED } else { PASSED };
        self.0.retain(|trouble| now.saturating_sub(trouble.last) < passed(trouble) && exists(&trouble.dataset));
    }

    /// The oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Trouble> {
        self.0.iter()
    }

    fn note(
        &mut self,
        now: Now,
        kind: FailureKind,
        worker: Option<&str>,
        dataset: &DatasetId,
        text: String,
        lasts: Lasts,
    ) {
        let is_low = lasts == Lasts::LowYield;
        let same = |trouble: &&mut Trouble| {
            let same = trouble.kind == kind && trouble.worker.as_deref() == worker && trouble.dataset == *dataset;
            same && (trouble.lasts == Lasts::LowYield) == is_low
        };
        if let Some(trouble) = self.0.iter_mut().find(same) {
            (trouble.text, trouble.last, trouble.lasts) = (text, now, lasts);
            // A yield that stays low is one trouble.
            trouble.count += u64::from(!is_low);
        } else if self.0.len() < MOST {
            let (worker, dataset) = (worker.map(str::to_owned), dataset.clone());
            self.0.push(Trouble { kind, worker, dataset, text, count: 1, since: now, last: now, lasts });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Now {
        Duration::from_secs(seconds)
    }

    #[test]
    fn troubles_are_told_since_their_first_failure_until_their_worker_works_or_they_have_passed() {
        let (mut troubles, birds): (_, DatasetId) = (Troubles::default(), "birds-1".parse().expect("an id"));
        let store = |troubles: &mut Troubles, now, worker| {
            troubles.failed(now, FailureKind::Store, Some(worker), &birds, format!("full at {now:?}"));
        };
        store(&mut troubles, at(10), "w1");
        store(&mut troubles, at(20), "w2");
        store(&mut troubles, at(30), "w1");
        troubles.failed(at(40), FailureKind::Slice, Some("w1"), &birds, "slice 7".to_owned());
        let told: Vec<_> = troubles.iter().map(|trouble| trouble.message(at(50))).collect();
        assert_eq!(
            (told.len(), told[0].count, told[0].since_millis_ago, told[0].last_millis_ago),
            (3, 2, 40_000, 20_000)
        );
        assert_eq!(told[0].text, "full at 30s");
        troubles.worked(Some("w1"));
        let kinds: Vec<_> = troubles.iter().map(|trouble| trouble.kind).collect();
        assert_eq!(kinds, [FailureKind::Store, FailureKind::Slice], "w2's, and the slice's");
        troubles.forget(at(20) + PASSED, |_| true);
        assert_eq!(troubles.iter().count(), 1);
        troubles.forget(at(20), |_| false);
        assert_eq!(troubles.iter().count(), 0);
    }

    #[test]
    fn what_holds_an_attempt_up_is_over_when_it_is_no_longer_told_and_failures_are_not() {
        let (mut troubles, birds): (_, DatasetId) = (Troubles::default(), "birds-1".parse().expect("an id"));
        let full = || Some((FailureKind::Store, "full".to_owned()));
        assert!(troubles.held_up(at(1), "w1", &birds, full()) && troubles.held_up(at(2), "w1", &birds, full()));
        troubles.failed(at(3), FailureKind::WayOut, Some("w1"), &birds, "offline".to_owned());
        assert_eq!(troubles.iter().map(|trouble| trouble.count).collect::<Vec<_>>(), [2, 1]);
        assert!(troubles.held_up(at(4), "w1", &birds, None) && !troubles.held_up(at(5), "w1", &birds, None));
        assert_eq!(troubles.iter().map(|trouble| trouble.kind).collect::<Vec<_>>(), [FailureKind::WayOut]);
    }

    #[test]
    fn a_low_yield_stays_until_it_is_no_longer_told_whatever_else_its_worker_does() {
        let (mut troubles, birds): (_, DatasetId) = (Troubles::default(), "birds-1".parse().expect("an id"));
        let low = |percent: u32| vec![("w1".to_owned(), format!("w1 keeps {percent} %"))];
        troubles.low_yields(at(10), &birds, low(3));
        troubles.failed(at(20), FailureKind::WayOut, Some("w1"), &birds, "offline".to_owned());
        troubles.low_yields(at(30), &birds, low(4));
        troubles.worked(Some("w1"));
        assert!(!troubles.held_up(at(40), "w1", &birds, None));
        troubles.low_yields(at(50), &"cats-1".parse().expect("an id"), Vec::new());
        troubles.forget(at(30) + PASSED, |_| true);
        let told: Vec<_> = troubles.iter().map(|trouble| (&*trouble.text, trouble.since, trouble.count)).collect();
        assert_eq!(told, [("w1 keeps 4 %", at(10), 1)]);
        troubles.low_yields(at(60), &birds, Vec::new());
        assert_eq!(troubles.iter().count(), 0);
    }
}
