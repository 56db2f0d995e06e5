//! What ranks have stored of a run: its learning curve, its ledger, its checkpoints.

use std::collections::{BTreeSet, HashSet};
use std::pin::pin;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use proto::metric::{CurveSummary, MetricPoint};
use proto::run_ledger::{Ledger, Line, Lines};
use proto::{Stored, keys, pb};
use tracing::warn;

use super::Runs;
use super::curve::Curve;
use crate::error::Error;
use crate::store::{Store, StoreError};

/// What was stored of a run's curve in more objects than this becomes one.
const SUMMARISED: usize = 256;
/// Of a run that goes on.
const SUMMARISE_EVERY: Duration = Duration::from_secs(3600);

/// What the store has of a run's curve. That of a long run lies in thousands of objects, so a summary is left to
/// whoever asks next.
pub(super) async fn stored_curve(store: &Store, run: &str) -> Result<Curve, StoreError> {
    let mut curve = Curve::default();
    let mut covered = BTreeSet::new();
    let summaries = store.list(&keys::curves(run)).await?;
    if let Some(key) = summaries.last()
        && let Some(json) = store.get(key).await?
    {
        match CurveSummary::from_json(&json) {
            Ok(summary) => {
                summary.points.into_iter().for_each(|point| curve.add(point.into()));
                covered.extend(summary.covers);
            }
            Err(error) => warn!(run, key, %error, "a summary of the curve cannot be read; it is made again"),
        }
    }
    let mut new = store.list(&keys::metrics_of(run)).await?;
    new.retain(|key| !covered.contains(file_name(key)));
    let count = new.len();
    let mut objects = pin!(store.get_each(new));
    while let Some((key, lines)) = objects.try_next().await? {
        for line in lines.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<MetricPoint>(line) {
                Ok(point) => curve.add(point.into()),
                Err(error) => warn!(run, key, %error, "a line of the curve cannot be read"),
            }
        }
        covered.insert(file_name(&key).to_owned());
    }
    if count > SUMMARISED {
        let key = keys::curve(run, covered.len());
        let points = curve
            .points(&[])
            .iter()
            .map(MetricPoint::try_from)
            .collect::<Result<_, _>>()
            .expect("they were such points");
        let summary = CurveSummary { format: 1, covers: covered.into_iter().collect(), points };
        let old = summaries.into_iter().filter(|old| *old < key).collect();
        let left = async {
            store.put(&key, summary.to_json().into()).await?;
            store.delete_all(old).await
        };
        if let Err(error) = left.await {
            warn!(run, %error, "cannot leave a summary of the curve");
        }
    }
    Ok(curve)
}

fn file_name(key: &str) -> &str {
    key.rsplit_once('/').map_or(key, |(_, name)| name)
}

impl Runs {
    /// The points of the learning curve, of these kinds only unless there are none, in order.
    pub(crate) async fn points(&self, name: &str, kinds: &[String]) -> Result<Vec<pb::Metric>, Error> {
        self.load_curve(name).await?;
        Ok(self.lock().records.get(name).map_or_else(Vec::new, |record| record.curve.points(kinds)))
    }

    /// Reads what the store has of the run's curve, once.
    pub(super) async fn load_curve(&self, name: &str) -> Result<(), Error> {
        {
            let inner = self.lock();
            match inner.records.get(name) {
                None => return Err(inner.no_run(name)),
                Some(record) if record.loaded => return Ok(()),
                Some(_) => {}
            }
        }
        let mut stored = stored_curve(&self.store, name).await?;
        if let Some(record) = self.lock().records.get_mut(name) {
            stored.merge(std::mem::take(&mut record.curve));
            (record.curve, record.loaded) = (stored, true);
        }
        Ok(())
    }

    /// Whether two runs were trained on the same samples.
    pub(crate) async fn compare(&self, a: &str, b: &str) -> Result<pb::CompareRunsResponse, Error> {
        let [plan_a, plan_b] = [self.plan(a)?, self.plan(b)?];
        let (a, b) = (self.ledger(a).await?, self.ledger(b).await?);
        let (steps_equal, first) = a.compare(&b);
        let line = |side: Option<&(u64, Line)>| {
            side.map(|(generation, line)| {
                let Line { epoch, step, samples, digest } = *line;
                pb::LedgerLine { epoch, step, generation: *generation, samples, digest }
            })
        };
        let [first_a, first_b] = first.unwrap_or([None, None]).map(line);
        let (steps_a, steps_b) = (a.steps(), b.steps());
        let equal = first.is_none();
        Ok(pb::CompareRunsResponse { equal, steps_a, steps_b, steps_equal, first_a, first_b, plan_a, plan_b })
    }

    fn plan(&self, name: &str) -> Result<u32, Error> {
        let inner = self.lock();
        inner.roster.find(name).map(|run| run.spec.plan().into()).ok_or_else(|| inner.no_run(name))
    }

    async fn ledger(&self, run: &str) -> Result<Ledger, Error> {
        self.find(run)?;
        let mut ledger = Ledger::default();
        for (key, json) in self.store.get_all(self.store.list(&keys::ledgers(run)).await?).await? {
            let bad = |error: &dyn std::fmt::Display| Error::Local(format!("{key}: {error}"));
            let generation = keys::number(&key).map_err(|error| bad(&error))?;
            ledger.add(generation, Lines::from_json(&json).map_err(|error| bad(&error))?);
        }
        Ok(ledger)
    }

    /// Sees to it that a summary of the run's curve is in the store, in the background; of a run that goes on once in a
    /// while.
    pub(super) fn summarise(&self, run: &str) {
        {
            let mut inner = self.lock();
            let is_over = inner.roster.find(run).is_none_or(|known| known.phase.is_over());
            let Some(record) = inner.records.get_mut(run) else { return };
            if !is_over && record.summarised.is_some_and(|at| at.elapsed() < SUMMARISE_EVERY) {
                return;
            }
            record.summarised = Some(Instant::now());
        }
        let (store, run) = (self.store.clone(), run.to_owned());
        tokio::spawn(async move {
            if let Err(error) = stored_curve(&store, &run).await {
                warn!(run, %error, "cannot summarise the curve");
            }
        });
    }

    /// Removes, beside everything else, the run's checkpoints that are not kept. `made`: step and generation of the
    /// newest; what a later generation is writing, no event names yet.
    pub(super) fn remove_old_checkpoints(&self, run: &str, made: (u64, u64)) {
        let kept: HashSet<String> = match self.lock().roster.find(run) {
            Some(known) => known.checkpoints.iter().map(|checkpoint| checkpoint.key.clone()).collect(),
            None => return,
        };
        let (store, run) = (self.store.clone(), run.to_owned());
        tokio::spawn(async move {
            let old = |key: &String| {
                let folder = key.rsplit_once('/').map_or("", |(folder, _)| folder);
                let before = |(step, generation)| (generation, step) <= (made.1, made.0);
                !kept.contains(folder) && keys::checkpoint_of(&run, key).is_ok_and(before)
            };
            let removed = async {
                let mut keys = store.list(&keys::checkpoints(&run)).await?;
                keys.retain(old);
                store.delete_all(keys).await
            };
            if let Err(error) = removed.await {
                warn!(run, %error, "cannot remove old checkpoints");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;
    use proto::metric::MetricKind;
    use std::sync::Arc;

    fn point(kind: MetricKind, step: u64) -> MetricPoint {
        let metric = pb::Metric { kind: kind.name().to_owned(), generation: 1, step, ..pb::Metric::default() };
        MetricPoint::try_from(&metric).expect("a kind")
    }

    async fn put(store: &Store, file: u64, points: impl IntoIterator<Item = MetricPoint>) {
        let lines: String =
            points.into_iter().map(|point| serde_json::to_string(&point).expect("numbers") + "\n").collect();
        store.put(&keys::metrics("run", 1, file), lines.into()).await.expect("memory");
    }

    #[tokio::test]
    async fn the_curve_of_a_long_run_is_read_from_a_summary_and_from_what_came_after_it() {
        let store = Store::new(Arc::new(InMemory::new()));
        let files = SUMMARISED as u64 + 1;
        for file in 1..=files {
            let steps = (0..20).map(|n| point(MetricKind::Step, 20 * file + n));
            put(&store, file, steps.chain([point(MetricKind::Validation, 20 * file)])).await;
        }
        let read = async || stored_curve(&store, "run").await.expect("memory").points(&[]);
        let first = read().await;
        let validations = first.iter().filter(|point| point.kind == "validation").count() as u64;
        assert!(validations == files && first.len() < 4096 + files as usize, "{validations} of {}", first.len());
        // As nobody would: what the summary covers is gone, so whoever still knows it has read the summary.
        let covered = store.list(&keys::metrics_of("run")).await.expect("memory");
        store.delete_all(covered.clone()).await.expect("memory");
        assert_eq!(read().await, first);
        // A generation's last objects may come after the first ones of the next.
        put(&store, 20_000, [point(MetricKind::Test, 1_000_000)]).await;
        let later = read().await;
        assert_eq!((later.len(), later.last().map(|point| point.step)), (first.len() + 1, Some(1_000_000)));
        let summaries = store.list(&keys::curves("run")).await.expect("memory");
        assert_eq!(summaries, [keys::curve("run", covered.len())], "too little is new for another one");
        store.put(&summaries[0], "{".into()).await.expect("memory");
        assert_eq!(read().await.len(), 1, "what cannot be read is made anew of what there is");
    }
}
