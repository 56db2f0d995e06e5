//! What pages need of the coordinator's answers, and what is kept of them between two pages: manifests and blocks of
//! pictures, which never change, and a run's points for a moment, because a page is asked for again and again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use proto::outcomes::OutcomeRow;
use proto::pb::{Dataset, GetDatasetRequest, GetMetricsRequest, Metric, ReadObjectRequest, Run};
use proto::shard::{RawSample, split_block};
use proto::{Manifest, Stored, table};

use crate::client::{Cluster, answer};
use crate::dataset::manifest_json;
use crate::dataset::reader::{Reader, read_object};

/// Blocks of pictures that are kept; a block is some hundred kilobytes.
const BLOCKS: usize = 64;
const MANIFESTS: usize = 4;
/// Shards whose thumbnails are kept; of each they are some dozen kilobytes.
const THUMBNAILS: usize = 64;
const RUNS: usize = 8;
/// A run's points are asked for again after so long.
const FRESH: Duration = Duration::from_secs(5);
/// A dataset's speed is that of so long.
const SPEED_WINDOW: Duration = Duration::from_secs(60);

/// What pages are made of.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) cluster: Cluster,
    kept: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    manifests: Recent<(String, u32), Arc<Manifest>>,
    blocks: Recent<(String, u64), Arc<Vec<RawSample>>>,
    thumbnails: Recent<String, Arc<HashMap<i64, Bytes>>>,
    points: Recent<String, Points>,
    speeds: Recent<String, VecDeque<(Instant, u64)>>,
}

/// The newest few values by key.
struct Recent<K, V>(VecDeque<(K, V)>);

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<K: PartialEq, V: Clone> Recent<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value.clone())
    }

    /// Keeps a value, and at most so many in all.
    fn put(&mut self, key: K, value: V, most: usize) {
        self.0.retain(|(known, _)| *known != key);
        self.0.push_back((key, value));
        while self.0.len() > most {
            self.0.pop_front();
        }
    }
}

#[derive(Clone)]
struct Points {
    /// Steps applied, generation and whether the run had ended.
    of: (u64, u64, bool),
    asked: Instant,
    points: Arc<Vec<Metric>>,
}

impl Source {
    pub(super) fn new(cluster: Cluster) -> Self {
        Self { cluster, kept: Arc::default() }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn dataset(&self, name: &str) -> Result<Dataset> {
        Ok(answer(self.cluster.datasets.clone().get_dataset(GetDatasetRequest { name: name.to_owned() })).await?)
    }

    /// The way to a dataset's objects.
    pub(super) fn reader(&self, name: &str) -> Reader {
        Reader::Coordinator { cluster: Box::new(self.cluster.clone()), name: name.to_owned() }
    }

    /// An object of the dataset of that name, or a part of it; a length of 0 stands for all the rest.
    pub(super) async fn object(&self, name: &str, key: &str, offset: u64, length: u64) -> Result<Bytes> {
        let request = ReadObjectRequest { name: name.to_owned(), key: key.to_owned(), offset, length };
        read_object(&self.cluster, request).await.with_context(|| key.to_owned())
    }

    /// A manifest of a dataset.
    pub(super) async fn manifest(&self, dataset: &Dataset, version: u32) -> Result<Arc<Manifest>> {
        let of = (dataset.dataset.clone(), version);
        if let Some(manifest) = self.kept().manifests.get(&of) {
            return Ok(manifest);
        }
        let manifest = Arc::new(Manifest::from_json(&manifest_json(&self.cluster, &dataset.name, version).await?)?);
        self.kept().manifests.put(of, manifest.clone(), MANIFESTS);
        Ok(manifest)
    }

    /// The samples of one block of a tar of the dataset of that name.
    pub(super) async fn block(&self, name: &str, tar: &str, offset: u64, length: u64) -> Result<Arc<Vec<RawSample>>> {
        let of = (tar.to_owned(), offset);
        if let Some(block) = self.kept().blocks.get(&of) {
            return Ok(block);
        }
        let samples = Arc::new(split_block(&self.object(name, tar, offset, length).await?)?);
        self.kept().blocks.put(of, samples.clone(), BLOCKS);
        Ok(samples)
    }

    /// The small pictures of what was rejected that a file of outcomes has, by the URL's key.
    pub(super) async fn thumbnails(&self, name: &str, outcomes: &str) -> Result<Arc<HashMap<i64, Bytes>>> {
        if let Some(known) = self.kept().thumbnails.get(&outcomes.to_owned()) {
            return Ok(known);
        }
        let file = self.object(name, outcomes, 0, 0).await?;
        let rows = tokio::task::spawn_blocking(move || table::read::<OutcomeRow>(file)).await??;
        let of = |row: OutcomeRow| Some((row.key, Bytes::from(row.thumbnail?)));
        let found = Arc::new(rows.into_iter().filter_map(of).collect::<HashMap<_, _>>());
        self.kept().thumbnails.put(outcomes.to_owned(), found.clone(), THUMBNAILS);
        Ok(found)
    }

    /// All points of a run's curve.
    pub(super) async fn points(&self, run: &Run) -> Result<Arc<Vec<Metric>>> {
        let of = (run.step, run.generation, run.ended_millis > 0);
        if let Some(kept) = self.kept().points.get(&run.run)
            && (kept.of == of || kept.asked.elapsed() < FRESH && !of.2)
        {
            return Ok(kept.points);
        }
        let request = GetMetricsRequest { run: run.run.clone(), kinds: Vec::new() };
        let mut points = answer(self.cluster.runs.clone().get_metrics(request)).await?.metrics;
        // The newest are reported before they are stored.
        for last in [&run.last_step, &run.last_validation, &run.test].into_iter().flatten() {
            if points.iter().rev().all(|point| point.kind != last.kind || point.step < last.step) {
                points.push(last.clone());
            }
        }
        let points = Arc::new(points);
        let kept = Points { of, asked: Instant::now(), points: points.clone() };
        self.kept().points.put(run.run.clone(), kept, RUNS);
        Ok(points)
    }

    /// URLs a second that a dataset gets done, as seen by the pages of the last minute; none before the second look.
    pub(super) fn speed(&self, dataset: &Dataset) -> Option<f64> {
        let (now, done) = (Instant::now(), dataset.outcomes.values().sum());
        let mut kept = self.kept();
        let mut seen = kept.speeds.get(&dataset.dataset).unwrap_or_default();
        seen.push_back((now, done));
        while seen.front().is_some_and(|(at, _)| now - *at > SPEED_WINDOW) {
            seen.pop_front();
        }
        kept.speeds.put(dataset.dataset.clone(), seen.clone(), RUNS);
        let &(first, begun) = seen.front()?;
        let seconds = (now - first).as_secs_f64();
        (seconds > 1.0 && done > begun).then(|| (done - begun) as f64 / seconds)
    }
}
