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
    /// Those that no write has taken, or that one has given back.
    points: Vec<MetricPoint>,
    flushed: Instant,
    /// The write under way, and the step up to which the ledger is in the store if it succeeds.
    writing: Option<(u64, JoinHandle<Written>)>,
    /// The ledger is in the store up to this step.
    pub(crate) stored: u64,
}

/// What became of a write. The ledger's lines are left in the tail, the points nowhere else.
#[derive(Default)]
struct Written {
    ledger: bool,
    /// The points that are not in the store.
    left: Vec<MetricPoint>,
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
        if self.writing.as_ref().is_some_and(|(_, write)| write.is_finished()) {
            self.written();
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
        self.flushed = Instant::now();
        self.files += 1;
        let points = (keys::metrics(&self.run, self.generation, self.files), std::mem::take(&mut self.points));
        let ledger = (keys::ledger(&self.run, self.generation, self.files), new);
        self.writing = Some((step, self.runtime.spawn(write(self.store.clone(), ledger, points))));
    }

    /// Waits for the write under way. The points that are not in the store come before the new ones again.
    fn written(&mut self) {
        if let Some((step, write)) = self.writing.take() {
            let Written { ledger, left } = self.runtime.block_on(write).unwrap_or_default();
            if ledger {
                self.stored = step;
            }
            self.points.splice(..0, left);
        }
    }

    /// Writes what is left, and waits for it.
    pub(crate) fn finish(&mut self, tail: &[Line]) {
        for _ in 0..2 {
            self.written();
            self.flush(tail, true);
        }
        self.written();
    }
}

/// Writes lines of the ledger and points, each under its key; neither waits for the other, nor fails with it.
async fn write(
    store: Arc<dyn ObjectStore>,
    (ledger, lines): (String, Vec<Line>),
    (curve, points): (String, Vec<MetricPoint>),
) -> Written {
    let put = async |key: String, bytes: Vec<u8>| {
        let put = if bytes.is_empty() { Ok(()) } else { put(&store, &key, Bytes::from(bytes)).await };
        put.inspect_err(|error| warn!(key, error = format!("{error:#}"), "history not written")).is_ok()
    };
    let lines = match lines.is_empty() {
        true => Vec::new(),
        false => serde_json::to_vec(&Lines { format: 1, lines }).expect("numbers only"),
    };
    let line = |point| serde_json::to_string(point).expect("numbers only") + "\n";
    let text: String = points.iter().map(line).collect();
    let (ledger, curve) = tokio::join!(put(ledger, lines), put(curve, text.into()));
    Written { ledger, left: if curve { Vec::new() } else { points } }
}

impl Drop for History {
    /// After a failure nobody calls `finish`, and points stand nowhere else, unlike the ledger's lines.
    fn drop(&mut self) {
        let (writing, mut points) = (self.writing.take(), std::mem::take(&mut self.points));
        if writing.is_none() && points.is_empty() {
            return;
        }
        self.files += 1;
        let (store, ledger) = (self.store.clone(), (String::new(), Vec::new()));
        let curve = keys::metrics(&self.run, self.generation, self.files);
        self.runtime.spawn(async move {
            if let Some((_, writing)) = writing {
                points.splice(..0, writing.await.unwrap_or_default().left);
            }
            write(store, ledger, (curve, points)).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::TryStreamExt;
    use object_store::memory::InMemory;
    use object_store::{ObjectStoreExt, path::Path};
    use proto::metric::MetricKind;
    use support::{Faults, FaultyStore, Rules};

    fn point(step: u64) -> MetricPoint {
        MetricPoint {
            kind: MetricKind::Validation,
            generation: 3,
            epoch: 1,
            step,
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
            device: None,
        }
    }

    /// The steps of the points that are in the store.
    async fn steps(store: &InMemory) -> Vec<u64> {
        let curve = Path::from(keys::metrics_of("run"));
        let mut files: Vec<_> = store.list(Some(&curve)).try_collect().await.expect("memory lists");
        files.sort_by(|a: &object_store::ObjectMeta, b| a.location.cmp(&b.location));
        let mut steps = Vec::new();
        for file in files {
            let bytes = store.get(&file.location).await.expect("it is there").bytes().await.expect("memory reads");
            let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
            steps.extend(lines.map(|line| serde_json::from_slice::<MetricPoint>(line).expect("a point").step));
        }
        steps
    }

    /// Waits until these are there.
    async fn has(store: &InMemory, expected: &[u64]) {
        let mut found = Vec::new();
        for _ in 0..20_000 {
            found = steps(store).await;
            if found == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{found:?} where {expected:?} should be");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn points_that_wait_for_a_write_outlive_a_generation_that_fails() {
        let store = Arc::new(InMemory::new());
        let mut history = History::new(store.clone(), tokio::runtime::Handle::current(), "run", 3);
        history.point(point(7));
        drop(history);
        has(&store, &[7]).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn points_are_written_without_the_ledger_and_those_of_a_write_that_failed_with_the_next() {
        let memory = Arc::new(InMemory::new());
        let faults = Faults::new(1);
        let store = Arc::new(FaultyStore::new(memory.clone(), faults.clone()));
        let without = |under: String| Rules { under: Path::from(under), failed: 1.0, ..Rules::default() };
        let line = |step| Line { epoch: 1, step, samples: 1, digest: step };
        let mut history = History::new(store, tokio::runtime::Handle::current(), "run", 3);
        // Waiting for a write blocks.
        let (mut history, tail) = tokio::task::spawn_blocking({
            let faults = faults.clone();
            move || {
                faults.set(without(keys::ledgers("run")));
                history.point(point(1));
                history.flush(&[line(1)], true);
                history.written();
                assert_eq!((history.stored, history.points.len()), (0, 0));
                faults.set(without(keys::metrics_of("run")));
                history.point(point(2));
                let tail = vec![line(1), line(2)];
                history.flush(&tail, true);
                history.point(point(3));
                history.written();
                assert_eq!((history.stored, history.points.len()), (2, 2));
                (history, tail)
            }
        })
        .await
        .expect("no panic");
        has(&memory, &[1]).await;
        faults.set(Rules::default());
        let history = tokio::task::spawn_blocking(move || {
            history.finish(&tail);
            history
        });
        drop(history.await.expect("no panic"));
        has(&memory, &[1, 2, 3]).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn points_of_a_write_that_fails_as_the_generation_does_are_written_once_more() {
        let memory = Arc::new(InMemory::new());
        let faults = Faults::new(1);
        let store = Arc::new(FaultyStore::new(memory.clone(), faults.clone()));
        faults.set(Rules { failed: 1.0, ..Rules::default() });
        let mut history = History::new(store, tokio::runtime::Handle::current(), "run", 3);
        history.point(point(1));
        history.flush(&[], true);
        history.point(point(2));
        let failed = async || {
            let already = faults.injected().failed;
            while faults.injected().failed == already {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        failed().await;
        drop(history);
        for _ in 0..5 {
            failed().await;
        }
        faults.set(Rules::default());
        has(&memory, &[1, 2]).await;
    }
}
