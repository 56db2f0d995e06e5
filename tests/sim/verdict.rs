//! What a simulation comes to.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use proto::outcomes::OutcomeRow;
use proto::{DatasetId, OutcomeCounts, Rejection, ShardIndex, Stored, keys, table};

use super::large::{SLICE_URLS, SLICES};
use super::origin::Truth;
use super::shard;
use super::store::View;
use super::world::Sim;
use crate::audit;
use crate::store::Store;

#[derive(Debug)]
pub(super) struct Verdict {
    seed: u64,
    pub(super) hours: f64,
    pub(super) urls: u64,
    pub(super) kept: u64,
    /// URLs of sites that throttle to the end.
    pub(super) left: u64,
    pub(super) most_at_once: (u32, u32),
    most_per_second: (f64, f64),
    /// URLs without the outcome that they must have.
    pub(super) lost: u64,
    /// URLs that were kept twice, and indexes that were overwritten.
    pub(super) doubled: u64,
    /// The longest that a coordinator took to begin.
    recovery_ms: u64,
    /// In a large simulation: how many slices were committed in the end, and how long one then took.
    recovered: Option<(usize, u64)>,
    /// Of the whole process: coordinators have no more.
    coordinator_mb: u64,
    pub(super) trace: u64,
    pub(super) wrong: Vec<String>,
}

impl Verdict {
    /// What is known without a look at URLs.
    pub(super) fn of(sim: &mut Sim) -> Self {
        let mut wrong = std::mem::take(&mut sim.wrong);
        wrong.append(&mut sim.origin.crowded);
        wrong.truncate(20);
        Self {
            seed: sim.seed,
            hours: sim.now as f64 / 3.6e9,
            urls: 0,
            kept: 0,
            left: 0,
            most_at_once: sim.origin.most_at_once,
            most_per_second: sim.origin.most_per_second,
            lost: 0,
            doubled: sim.disk.overwritten(),
            recovery_ms: sim.recovery_ms,
            recovered: None,
            coordinator_mb: resident_mb(),
            trace: sim.trace(),
            wrong,
        }
    }

    pub(super) fn is_good(&self) -> bool {
        self.lost == 0 && self.doubled == 0 && self.wrong.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, hours, urls, kept, most_at_once: (most, slots), lost, doubled, trace, .. } = self;
        let ((fast, rate), Self { coordinator_mb, recovery_ms, .. }) = (self.most_per_second, self);
        write!(
            f,
            "seed={seed} simulated_hours={hours:.2} urls={urls} kept={kept} coordinator_mb={coordinator_mb} \
             recovery_ms={recovery_ms} max_at_once={most}/{slots} max_per_second={fast:.1}/{rate:.0} lost={lost} doubled={doubled} trace={trace:016x}"
        )?;
        match self.recovered {
            Some((slices, ms)) => write!(f, " committed_slices={slices} recovery_of_all_ms={ms}"),
            None => Ok(()),
        }
    }
}

impl Sim {
    /// Looks at what has come of a large one, of which URLs were only counted.
    pub(super) fn count(mut self) -> Verdict {
        let indexes = self.indexes(&"sim-0-1".parse().expect("an id"));
        let mut all = OutcomeCounts::default();
        indexes.values().for_each(|index| all.merge(&index.outcomes));
        let told = all.total() - all.of(Err(Rejection::Unfetched));
        let wanted = u64::from(SLICES) * u64::from(SLICE_URLS);
        let (lost, doubled) = (wanted.saturating_sub(told), told.saturating_sub(wanted));
        let mut verdict = Verdict::of(&mut self);
        (verdict.urls, verdict.kept) = (wanted, all.of(Ok(())));
        (verdict.lost, verdict.doubled) = (lost, verdict.doubled + doubled);
        // One more begins, of whom nothing is left to do.
        self.kill_coordinators();
        self.recovery_ms = 0;
        self.start_coordinator();
        verdict.recovered = Some((indexes.len(), self.recovery_ms));
        verdict
    }

    /// Looks at what has come of it.
    pub(super) fn verdict(mut self) -> Verdict {
        self.disk.mend();
        let view = View::new(&self.disk);
        let store = Store::new(Arc::new(view.clone()));
        let mut verdict = Verdict::of(&mut self);
        let lists = std::mem::take(&mut self.plan.lists);
        verdict.urls = lists.iter().map(|list| list.len() as u64).sum();
        for (n, list) in lists.iter().enumerate() {
            let outcomes = self.runtime.block_on(outcomes(&view, &store, n));
            for url in list {
                let told = outcomes.get(url).map_or(&[][..], Vec::as_slice);
                let pictures = told.iter().filter(|outcome| *outcome == "kept").count();
                // Sites that were down or asked too much may have said so in both rounds; that is their outcome.
                let trouble = [Rejection::Timeout, Rejection::HttpStatus, Rejection::HostGivenUp].map(Rejection::name);
                let last = told.last().map_or("", String::as_str);
                let is_left = last == Rejection::Unfetched.name() && self.origin.is_shut(self.now, url);
                verdict.left += u64::from(is_left);
                let right = match self.origin.truth(url) {
                    _ if is_left => true,
                    Truth::Gone => last == Rejection::NotFound.name() || trouble.contains(&last),
                    Truth::Picture | Truth::Late(_) => pictures > 0 || trouble.contains(&last),
                };
                verdict.kept += u64::from(pictures > 0);
                verdict.doubled += u64::from(pictures > 1);
                if !right {
                    verdict.lost += 1;
                    verdict.wrong.push(format!("{url} ({:?}): {told:?}", self.origin.truth(url)));
                }
            }
        }
        match self.runtime.block_on(audit::check(Arc::new(view), true)) {
            Ok(report) => {
                verdict.wrong.extend(report.findings.iter().map(|found| format!("{}: {}", found.key, found.what)));
            }
            Err(error) => verdict.wrong.push(error.to_string()),
        }
        verdict
    }
}

/// Memory that the process has now.
fn resident_mb() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    pages.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).map_or(0, |pages| (pages * 4096) >> 20)
}

/// What each round made of each URL.
async fn outcomes(view: &View, store: &Store, n: usize) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for folder in store.folders(keys::DATASETS).await.expect("it does not fail any more") {
        let Ok(id) = folder.parse::<DatasetId>() else { continue };
        if id.name() != format!("sim-{n}") {
            continue;
        }
        for key in store.list(&keys::indexes(&id)).await.expect("it does not fail any more") {
            let bytes = shard::read(view, &key).await.expect("it is listed");
            let index = ShardIndex::from_json(&bytes).expect("an index");
            let Some(file) = index.outcomes_file else { continue };
            let Some(bytes) = shard::read(view, &file.key).await else { continue };
            let rows: Vec<OutcomeRow> = table::read(bytes).expect("rows");
            rows.into_iter().for_each(|row| all.entry(row.url).or_default().push(row.outcome));
        }
    }
    all
}
