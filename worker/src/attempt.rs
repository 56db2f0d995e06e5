//! One attempt at a shard: its slice of URLs becomes tars, outcomes and the index that commits them.
//!
//! Samples stand in their tar in the order in which they came in: to wait for a slow server would hold up everything behind
//! it. The outcomes are in the order of their keys.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::outcomes::OutcomeRow;
use proto::rejection::outcome_name;
use proto::shard::Origin;
use proto::{Attempt, DatasetSpec, Outcome, Rejection, Sample, ShardId, ShardIndex, Split, keys, slice, table, trace};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::dispatch::{Dispatcher, Landed, Listed};
use crate::metrics;
use crate::placeholder::Placeholders;
use crate::progress::Progress;
use crate::upload::{self, TarUpload};
use crate::validate::{DecodePool, Rules, Stored};

/// To take back an attempt's files, after which a cluster's garbage collection has to.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(3);

/// What all attempts of a process share.
#[derive(Debug)]
pub(crate) struct Tools {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) pool: DecodePool,
    /// This worker's name.
    pub(crate) worker: String,
}

/// Which shard is to be made.
#[derive(Debug, Clone)]
pub(crate) struct Assignment {
    pub(crate) shard: ShardId,
    pub(crate) attempt: Attempt,
    pub(crate) spec: DatasetSpec,
}

/// How an attempt ended, if it did not fail.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its index stands.
    Won,
    /// Another attempt's index stood first; this one's files are gone.
    LostTo(Attempt),
    /// It was cancelled before it committed; its files are gone.
    Cancelled,
}

/// Makes a shard. `tail` is dropped when the last URL has been begun, or what is left has to wait for its hosts: what then
/// follows leaves connections idle. Once the files are uploaded, `cancel` is too late and the attempt commits.
///
/// # Errors
/// If the slice cannot be understood or the store fails. What the attempt wrote is gone then, unless the index itself is in
/// doubt.
pub(crate) async fn make_shard<T: Send>(
    tools: &Arc<Tools>,
    assignment: &Assignment,
    progress: &Progress,
    tail: T,
    cancel: &CancellationToken,
) -> anyhow::Result<End> {
    let start = Instant::now();
    let mut files = Files::new(&tools.store, assignment);
    let filled = tokio::select! {
        filled = fill(tools, assignment, progress, tail, &mut files) => filled.map(Some),
        () = cancel.cancelled() => Ok(None),
    };
    let index = match filled {
        Ok(Some(index)) => index,
        Ok(None) => {
            files.take_back().await;
            return Ok(End::Cancelled);
        }
        Err(error) => {
            files.take_back().await;
            return Err(error);
        }
    };
    let standing = upload::commit(&*tools.store, &assignment.shard, &index).await?;
    if standing.nonce != index.nonce {
        files.take_back().await;
        return Ok(End::LostTo(standing.attempt));
    }
    let (urls, kept) = (index.outcomes.total(), index.outcomes.of(Ok(())));
    let seconds = start.elapsed().as_secs_f32();
    tracing::info!(urls, kept, rejected = urls - kept, seconds, outcomes = ?index.outcomes, "shard committed");
    Span::current().record("urls", trace::integer(urls)).record("kept", trace::integer(kept));
    Ok(End::Won)
}

/// The objects that an attempt writes.
struct Files {
    store: Arc<dyn ObjectStore>,
    tars: BTreeMap<Split, TarUpload>,
    outcomes: String,
}

impl Files {
    fn new(store: &Arc<dyn ObjectStore>, of: &Assignment) -> Self {
        let outcomes = keys::outcomes(&of.shard, of.attempt);
        Self { store: Arc::clone(store), tars: BTreeMap::new(), outcomes }
    }

    fn tar(&mut self, of: &Assignment, split: Split) -> &mut TarUpload {
        self.tars
            .entry(split)
            .or_insert_with(|| TarUpload::new(Arc::clone(&self.store), keys::tar(&of.shard, split, of.attempt)))
    }

    async fn take_back(self) {
        let work = async {
            for tar in self.tars.into_values() {
                tar.abort().await;
            }
            if let Err(error) = upload::delete(&*self.store, &self.outcomes).await {
                tracing::warn!(key = self.outcomes, %error, "failed to take back an attempt's outcomes");
            }
        };
        if tokio::time::timeout(CLEANUP_TIMEOUT, work).await.is_err() {
            tracing::warn!("the attempt's files could not be taken back in time");
        }
    }
}

/// Fetches the slice and uploads all that the index names.
async fn fill<T: Send>(
    tools: &Arc<Tools>,
    assignment: &Assignment,
    progress: &Progress,
    tail: T,
    files: &mut Files,
) -> anyhow::Result<ShardIndex> {
    let spec = &assignment.spec;
    let placeholders = Placeholders::load(&*tools.store).await?;
    let rules = Arc::new(Rules { resize: spec.resize, limits: spec.limits.clone(), placeholders });
    let labels: HashMap<&str, u32> =
        (0..).zip(&spec.classes).map(|(label, class)| (class.synset.as_str(), label)).collect();
    let listed = read_slice(&*tools.store, assignment).await?;
    let urls = listed.len();
    let mut rows = Vec::with_capacity(urls);
    let is_full = |at: &Listed| labels.get(at.synset.as_str()).is_some_and(|&label| progress.is_full(label));
    let leave = |left: Listed| {
        progress.count(Err(Rejection::ClassFull));
        OutcomeRow { outcome: Rejection::ClassFull.name().to_owned(), fetched_at: now(), ..left.row() }
    };
    let (full, listed): (Vec<_>, _) = listed.into_iter().partition(&is_full);
    rows.extend(full.into_iter().map(leave));
    let mut batch = tools.dispatcher.batch(listed, &spec.limits);
    let mut taken_up = std::pin::pin!(batch.taken_up());
    let mut tail = Some(tail);
    let mut judging = JoinSet::new();
    while rows.len() < urls {
        if progress.news() {
            rows.extend(batch.take_out(is_full).into_iter().map(leave));
            continue;
        }
        tokio::select! {
            () = &mut taken_up, if tail.is_some() => drop(tail.take()),
            landed = batch.next(), if rows.len() + judging.len() < urls => {
                let landed = landed.context("a fetch was lost")?;
                let (tools, rules) = (Arc::clone(tools), Arc::clone(&rules));
                judging.spawn(async move { judge(&tools, rules, landed).await });
            }
            Some(done) = judging.join_next() => {
                let Fetched { mut row, outcome, kept } = done.context("a verdict failed")??;
                if let Some((stored, sha256)) = kept {
                    let label = *labels.get(row.synset.as_str()).with_context(|| {
                        format!("the slice names synset {:?}, which is no class of the dataset", row.synset)
                    })?;
                    keep(assignment, files, label, stored, &sha256, &mut row).await?;
                    progress.keep(label);
                }
                progress.count(outcome);
                rows.push(row);
            }
        }
    }
    rows.sort_by_key(|row| row.key);
    let mut tars = BTreeMap::new();
    for (split, tar) in &mut files.tars {
        tars.insert(*split, tar.finish().await?);
    }
    let parquet = tokio::task::spawn_blocking(move || table::write(&rows)).await??;
    let outcomes_file = upload::put_file(&*tools.store, files.outcomes.clone(), parquet.into()).await?;
    Ok(ShardIndex {
        version: 1,
        nonce: uuid::Uuid::new_v4().simple().to_string(),
        writer: tools.worker.clone(),
        shard: assignment.shard.shard,
        attempt: assignment.attempt,
        outcomes: progress.so_far(),
        tars,
        outcomes_file: Some(outcomes_file),
    })
}

/// Milliseconds since 1970.
#[allow(clippy::disallowed_methods, reason = "a column for people; nothing is decided by it")]
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

async fn read_slice(store: &dyn ObjectStore, of: &Assignment) -> anyhow::Result<Vec<Listed>> {
    let key = keys::slice(&of.shard);
    let found = store.get(&Path::from(key.as_str())).await.with_context(|| format!("failed to read {key}"))?;
    let packed = found.bytes().await.with_context(|| format!("failed to read {key}"))?;
    let parse = move || -> anyhow::Result<Vec<Listed>> {
        let listed = |entry: slice::Entry<'_>| Listed {
            key: entry.key as i64,
            synset: entry.synset.to_owned(),
            url: entry.url.to_owned(),
        };
        slice::entries(&slice::unpack(&packed)?).map(|entry| Ok(listed(entry?))).collect()
    };
    tokio::task::spawn_blocking(parse).await?.with_context(|| format!("failed to understand {key}"))
}

/// What became of one URL.
#[derive(Debug)]
struct Fetched {
    /// Whole but for the place in a tar.
    row: OutcomeRow,
    outcome: Outcome,
    /// The picture, with the hash of the bytes that it was fetched as.
    kept: Option<(Stored, [u8; 32])>,
}

/// Judges what was fetched.
async fn judge(tools: &Tools, rules: Arc<Rules>, landed: Landed) -> anyhow::Result<Fetched> {
    let Landed { listed, trace, spent, fetched } = landed;
    if !spent.is_zero() {
        metrics::fetched(spent.as_secs_f64(), fetched.as_ref().map_or(0, |(body, _)| body.bytes.len()));
    }
    let mut row = OutcomeRow {
        final_url: trace.final_url,
        http_status: trace.status.map(i32::from),
        fetched_at: now(),
        millis: spent.as_millis() as i64,
        ..listed.row()
    };
    let outcome = match fetched {
        Err(rejection) => Err(rejection),
        Ok((body, _connection)) => {
            row.bytes = Some(body.bytes.len() as i64);
            let verdict = tools.pool.judge(body, rules).await?;
            row.sha256 = Some(hex::encode(verdict.sha256));
            row.phash = verdict.phash.map(|hash| format!("{hash:016x}"));
            row.width = verdict.size.and_then(|(width, _)| i32::try_from(width).ok());
            row.height = verdict.size.and_then(|(_, height)| i32::try_from(height).ok());
            verdict.outcome.map(|stored| (stored, verdict.sha256))
        }
    };
    let (outcome, kept) = match outcome {
        Ok(kept) => (Ok(()), Some(kept)),
        Err(rejection) => (Err(rejection), None),
    };
    row.outcome = outcome_name(outcome).to_owned();
    Ok(Fetched { row, outcome, kept })
}

/// Appends a sample to the tar of its split.
async fn keep(
    assignment: &Assignment,
    files: &mut Files,
    label: u32,
    stored: Stored,
    sha256: &[u8; 32],
    row: &mut OutcomeRow,
) -> anyhow::Result<()> {
    let split = assignment.spec.splits.split_of(sha256);
    let tar = files.tar(assignment, split);
    let side = |pixels: Option<i32>| pixels.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let origin = Origin {
        synset: row.synset.clone(),
        url: row.url.clone(),
        sha256: hex::encode(sha256),
        width: side(row.width),
        height: side(row.height),
    };
    let key = u64::try_from(row.key).context("keys count from 0")?;
    let (offset, length) = tar.append(&Sample { key, label, image: stored.image }, &origin, &stored.moments).await?;
    row.split = Some(split.name().to_owned());
    row.tar = Some(tar.key().to_owned());
    row.offset = Some(offset as i64);
    row.length = Some(length as i64);
    row.set_moments(&stored.moments);
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
