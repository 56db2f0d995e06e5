//! Writes a run's ledger (the digests of the samples that it was trained on) and its learning curve to the store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use object_store::ObjectStore;
use proto::keys;
use proto::metric::MetricPoint;
use proto::run_ledger::{Line, Lines};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tracing::warn;

use crate::data::random;
use crate::data::store::put;

/// Lines and points are written at least this often.
const FLUSH: Duration = Duration::from_secs(60);

/// The digest of a set of samples, whatever their order: a sum of 40-bit hashes, so that 8,000,000 of them do not
/// overflow.
pub(crate) fn digest(keys: &[u64]) -> i64 {
    keys.iter().map(|&key| (random::key(&[key]) >> 24) as i64).sum()
}

/// Sums over samples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sums {
    /// Of the losses.
    pub loss: f64,
    /// Samples whose label is the first guess.
    pub top1: f64,
    /// Samples whose label is among the first five.
    pub top5: f64,
    /// Samples.
    pub samples: f64,
}

impl Sums {
    /// Adds `other`.
    pub(crate) fn add(&mut self, other: &Sums) {
        self.loss += other.loss;
        self.top1 += other.top1;
        self.top5 += other.top5;
        self.samples += other.samples;
    }

    /// The same per sample; `samples` stays.
    pub(crate) fn mean(&self) -> Sums {
        let n = self.samples.max(1.0);
        Sums { loss: self.loss / n, top1: self.top1 / n, top5: self.top5 / n, samples: self.samples }
    }
}

/// Writes ledger and curve of one generation in batches, while training goes on.
pub(crate) struct History {
    store: Arc<dyn ObjectStore>,
    runtime: tokio::runtime::Handle,
    run: String,
    generation: u64,
    files: u64,
    points: Vec<MetricPoint>,
    flushed: Instant,
    /// The write under way, and the step up to which the ledger is in the store once it is done.
    writing: Option<(u64, JoinHandle<bool>)>,
    /// The ledger is in the store up to this step.
    pub(crate) stored: u64,
}

impl History {
    /// For rank 0 of a generation.
    pub(crate) fn new(
        store: Arc<dyn ObjectStore>,
        runtime: tokio::runtime::Handle,
        run: &str,
        generation: u64,
    ) -> Self {
        let flushed = Instant::now();
        let run = run.to_owned();
        Self { store, runtime, run, generation, files: 0, points: Vec::new(), flushed, writing: None, stored: 0 }
    }

    /// Adds a point to the curve.
    pub(crate) fn point(&mut self, point: MetricPoint) {
        self.points.push(point);
    }

    /// Starts to write the new lines of the ledger's `tail` and the new points, if it is time or `now`. One write is in
    /// flight at a time.
    pub(crate) fn flush(&mut self, tail: &[Line], now: bool) {
        if let Some((step, write)) = self.writing.take_if(|(_, write)| write.is_finished())
            && self.runtime.block_on(write).unwrap_or(false)
        {
            self.stored = step;
        }
        // Before the lines are copied: this is called in every step.
        if self.writing.is_some() || !(now || self.flushed.elapsed() > FLUSH) {
            return;
        }
        let new: Vec<Line> = tail.iter().filter(|line| line.step > self.stored).cloned().collect();
        if new.is_empty() && self.points.is_empty() {
            return;
        }
        let step = new.last().map_or(self.stored, |line| line.step);
        self.writing = Some((step, self.write(new)));
    }

    /// Starts to write lines of the ledger, and the new points.
    fn write(&mut self, new: Vec<Line>) -> JoinHandle<bool> {
        self.flushed = Instant::now();
        self.files += 1;
        let mut files = Vec::new();
        if !new.is_empty() {
            let ledger = serde_json::to_vec(&Lines { format: 1, lines: new }).expect("numbers only");
            files.push((keys::ledger(&self.run, self.generation, self.files), Bytes::from(ledger)));
        }
        if !self.points.is_empty() {
            let line = |point| serde_json::to_string(&point).expect("numbers only") + "\n";
            let points: String = std::mem::take(&mut self.points).into_iter().map(line).collect();
            files.push((keys::metrics(&self.run, self.generation, self.files), Bytes::from(points)));
        }
        let store = self.store.clone();
        self.runtime.spawn(async move {
            for (key, bytes) in files {
                if let Err(error) = put(&store, &key, bytes).await {
                    warn!(key, error = format!("{error:#}"), "history not written");
                    return false;
                }
            }
            true
        })
    }

    /// Writes what is left, and waits for it.
    pub(crate) fn finish(&mut self, tail: &[Line]) {
        for _ in 0..2 {
            if let Some((step, write)) = self.writing.take()
                && self.runtime.block_on(write).unwrap_or(false)
            {
                self.stored = step;
            }
            self.flush(tail, true);
        }
        if let Some((_, write)) = self.writing.take() {
            let _ = self.runtime.block_on(write);
        }
    }
}

impl Drop for History {
    /// After a failure nobody calls `finish`: points that no write has taken yet stand nowhere else, unlike the
    /// ledger's lines.
    fn drop(&mut self) {
        if !self.points.is_empty() {
            drop(self.write(Vec::new()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;
    use object_store::{ObjectStoreExt, path::Path};
    use proto::metric::MetricKind;

    #[tokio::test(flavor = "multi_thread")]
    async fn points_that_wait_for_a_write_outlive_a_generation_that_fails() {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let mut history = History::new(store.clone(), tokio::runtime::Handle::current(), "run", 3);
        history.point(MetricPoint {
            kind: MetricKind::Validation,
            generation: 3,
            epoch: 1,
            step: 7,
            loss: 1.0,
            top1: 0.5,
            top5: 1.0,
            samples: 10,
            learning_rate: 0.0,
            images_per_second: 1.0,
            seconds: 1.0,
            data_wait: 0.0,
            compute: 1.0,
            rank_wait: 0.0,
            network_wait: 0.0,
            optimizer: 0.0,
            slowest_rank: 0,
            ranks: 1,
            gradient_bytes: 0,
            link_bytes_per_second: 0.0,
        });
        drop(history);
        let key = Path::from(keys::metrics("run", 3, 1));
        let written = loop {
            match store.get(&key).await {
                Ok(found) => break found.bytes().await.expect("memory reads"),
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        assert!(String::from_utf8_lossy(&written).contains("\"step\":7"), "{written:?}");
    }
}
