//! What ranks have stored of a run: its learning curve, its ledger, its checkpoints.

use std::collections::HashSet;

use proto::metric::MetricPoint;
use proto::run_ledger::{Ledger, Line, Lines};
use proto::{Stored, keys, pb};
use tracing::warn;

use super::Runs;
use super::curve::Curve;
use crate::error::Error;

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
        let mut stored = Curve::default();
        for (key, lines) in self.store.get_all(self.store.list(&keys::metrics_of(name)).await?).await? {
            for line in lines.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
                match serde_json::from_slice::<MetricPoint>(line) {
                    Ok(point) => stored.add(point.into()),
                    Err(error) => warn!(run = name, key, %error, "a line of the curve cannot be read"),
                }
            }
        }
        if let Some(record) = self.lock().records.get_mut(name) {
            stored.merge(std::mem::take(&mut record.curve));
            (record.curve, record.loaded) = (stored, true);
        }
        Ok(())
    }

    /// Whether two runs were trained on the same samples.
    pub(crate) async fn compare(&self, a: &str, b: &str) -> Result<pb::CompareRunsResponse, Error> {
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
        Ok(pb::CompareRunsResponse { equal: first.is_none(), steps_a, steps_b, steps_equal, first_a, first_b })
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

    /// Removes, beside everything else, the run's checkpoints that are not kept. `made`: step and generation of the newest; what a later
    /// generation is writing, no event names yet.
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
