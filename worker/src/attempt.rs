//! One attempt at a shard: its slice of URLs becomes tars, outcomes and the index that commits them.
//!
//! Samples stand in their tar in the order in which they arrived: waiting for a slow server would hold up all that came
//! after it. The outcomes stand in the order of their keys.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use object_store::ObjectStore;
use proto::outcomes::OutcomeRow;
use proto::pb::FailureKind;
use proto::rejection::outcome_name;
use proto::shard::Origin;
use proto::{
    Attempt, DatasetSpec, FormatError, Outcome, OutcomeCounts, Rejection, Sample, ShardId, ShardIndex, Split, columns,
    keys, slice, table, trace,
};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::decode_pool::DecodePool;
use crate::dispatch::{Dispatcher, FetchResult, SliceEntry};
use crate::failure::{Failure, FaultOf};
use crate::metrics;
use crate::placeholder::Placeholders;
use crate::progress::Progress;
use crate::store;
use crate::thumbnail::Thumbnails;
use crate::upload::{self, TarUpload};
use crate::validate::{Rules, Stored};
use crate::verify;
use crate::way_out::WayOut;

/// An attempt that lasts longer commits what it has.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(15 * 60);
/// An attempt in which nothing is finished for so long, because sites are asked by others or want to be left alone,
/// commits what it has. If that is nothing its slice is free again, but for sites that throttle: then it commits that.
const LONGEST_WAIT: Duration = Duration::from_secs(5 * 60);
/// For what is in flight when the worker is told to leave.
const LAST_REQUESTS_TIMEOUT: Duration = Duration::from_secs(5);
/// For deleting an attempt's files; what is left then is the cluster's garbage collection's.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(3);

/// What all attempts of a process share.
#[derive(Debug)]
pub(crate) struct Tools {
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) way_out: Arc<WayOut>,
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
    /// All its URLs have failed in an earlier round.
    pub(crate) once: bool,
    /// All its URLs are of one large site.
    pub(crate) large: bool,
}

/// What ends an attempt from outside.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signals {
    /// The lease is over: nothing of it counts.
    pub(crate) cancel: CancellationToken,
    /// The worker is told to leave: what is there counts.
    pub(crate) leave: CancellationToken,
}

/// Why an attempt ends before all its URLs have a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EarlyEnd {
    Leave,
    TooLong,
    Waits,
    Offline,
}

/// What an attempt came to, if it did not fail.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AttemptResult {
    Committed,
    /// Another attempt, which this names, committed first; this one's files are deleted.
    LostTo(Attempt),
    /// It was cancelled before it committed; its files are deleted.
    Cancelled,
    /// The worker was told to leave, or no site had room, before any URL was finished.
    Left,
}

/// Makes a shard. `start_permit` is dropped when every URL has been started, or those that are left wait for their
/// hosts: from then on the attempt leaves connections idle. Once the files are uploaded, cancelling is too late and the
/// attempt commits.
///
/// An attempt that is told to leave, lasts or waits too long or loses its way out commits what it has, the rest as
/// `unfetched`.
///
/// # Errors
/// If the slice cannot be parsed, the store fails, or nothing was finished for want of a way out. The attempt's files
/// are deleted then, unless nobody knows whether the index was put.
pub(crate) async fn make_shard<T: Send>(
    tools: &Arc<Tools>,
    assignment: &Assignment,
    progress: &Progress,
    start_permit: T,
    signals: &Signals,
) -> Result<AttemptResult, Failure> {
    let start = Instant::now();
    let mut files = Files::new(&tools.store, assignment);
    let uploaded = tokio::select! {
        index = fetch_and_upload(tools, assignment, progress, start_permit, &signals.leave, &mut files) => index,
        () = signals.cancel.cancelled() => Ok(Err(AttemptResult::Cancelled)),
    };
    let index = match uploaded {
        Ok(Ok(index)) => index,
        Ok(Err(result)) => {
            files.delete().await;
            return Ok(result);
        }
        Err(error) => {
            files.delete().await;
            return Err(error);
        }
    };
    let committed = upload::commit(&*tools.store, &assignment.shard, &index).await.fault_of(FailureKind::Store)?;
    if committed.nonce != index.nonce {
        files.delete().await;
        return Ok(AttemptResult::LostTo(committed.attempt));
    }
    let (urls, kept) = (index.outcomes.total(), index.outcomes.of(Ok(())));
    let seconds = start.elapsed().as_secs_f32();
    tracing::info!(urls, kept, rejected = urls - kept, seconds, outcomes = ?index.outcomes, "shard committed");
    Span::current().record("urls", trace::integer(urls)).record("kept", trace::integer(kept));
    Ok(AttemptResult::Committed)
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

    async fn delete(self) {
        let delete = async {
            for tar in self.tars.into_values() {
                tar.abort().await;
            }
            if let Err(error) = upload::delete(&*self.store, &self.outcomes).await {
                tracing::warn!(key = self.outcomes, %error, "failed to delete an attempt's outcomes");
            }
        };
        if tokio::time::timeout(CLEANUP_TIMEOUT, delete).await.is_err() {
            tracing::warn!("the attempt's files could not be deleted in time; garbage collection will");
        }
    }
}

/// Fetches the slice and uploads all that the index names; or says what the attempt came to without any.
async fn fetch_and_upload<T: Send>(
    tools: &Arc<Tools>,
    assignment: &Assignment,
    progress: &Progress,
    start_permit: T,
    leave: &CancellationToken,
    files: &mut Files,
) -> Result<Result<ShardIndex, AttemptResult>, Failure> {
    let spec = &assignment.spec;
    let mut early = std::pin::pin!(early_end(&tools.way_out, leave));
    let placeholders = Placeholders::load(&*tools.store).await?;
    let rules = Arc::new(Rules {
        resize: spec.resize,
        limits: spec.limits.clone(),
        placeholders,
        verify: spec.verify.clone(),
        flat: false,
        thumbnails: Thumbnails::of_shard(),
    });
    let labels: HashMap<&str, u32> =
        (0..).zip(&spec.classes).map(|(label, class)| (class.synset.as_str(), label)).collect();
    let entries = read_slice(&*tools.store, assignment).await?;
    let urls = entries.len();
    let mut rows: Vec<(u64, OutcomeRow)> = Vec::with_capacity(urls);
    let is_full = |entry: &SliceEntry| labels.get(entry.synset.as_str()).is_some_and(|&label| progress.is_full(label));
    let reject_full = |entry: SliceEntry| {
        progress.count_outcome(Err(Rejection::ClassFull));
        (0, unfetched(entry, Rejection::ClassFull))
    };
    let (full, entries): (Vec<_>, _) = entries.into_iter().partition(&is_full);
    rows.extend(full.into_iter().map(reject_full));
    let mut batch = tools.dispatcher.batch(entries, spec, assignment.once, assignment.large);
    let mut all_started = std::pin::pin!(batch.all_started());
    let mut start_permit = Some(start_permit);
    let mut validating = JoinSet::new();
    let (mut ended, mut cut) = (None, None);
    // Whether sites say that they are to be asked later.
    let mut throttled = false;
    let mut waits = std::pin::pin!(tokio::time::sleep(LONGEST_WAIT));
    while rows.len() < urls {
        if progress.take_class_filled() {
            rows.extend(batch.take_out(is_full).into_iter().map(reject_full));
            continue;
        }
        tokio::select! {
            () = &mut all_started, if start_permit.is_some() => drop(start_permit.take()),
            why = async { tokio::select! { why = &mut early => why, () = &mut waits => EarlyEnd::Waits } }, if ended.is_none() => {
                tracing::info!(?why, finished = rows.len(), urls, "ending early");
                ended = Some(why);
                drop(start_permit.take());
                for (entry, told) in batch.end() {
                    throttled |= told.is_some();
                    let http_status = told.map(i32::from);
                    rows.push((0, OutcomeRow { http_status, ..unfetched(entry, Rejection::Unfetched) }));
                }
                cut = Some(Instant::now() + match why {
                    EarlyEnd::Leave => LAST_REQUESTS_TIMEOUT,
                    EarlyEnd::TooLong | EarlyEnd::Waits => spec.limits.timeout(),
                    EarlyEnd::Offline => Duration::ZERO,
                });
            }
            () = async { sleep_until(cut.unwrap_or_else(Instant::now)).await }, if cut.is_some() => {
                cut = None;
                batch.cut();
            }
            result = batch.next(), if rows.len() + validating.len() < urls => {
                let result = result.context("a URL got no result").fault_of(FailureKind::Slice)?;
                match result.body {
                    Err(Rejection::Unfetched) => throttled |= ended.is_none(),
                    _ => waits.as_mut().reset(Instant::now() + LONGEST_WAIT),
                }
                let (tools, rules) = (Arc::clone(tools), Arc::clone(&rules));
                validating.spawn(async move { validate(&tools, rules, result).await });
            }
            Some(done) = validating.join_next() => {
                let done = done.context("a validation failed").and_then(|done| done);
                let Validated { number, mut row, outcome, kept } = done.fault_of(FailureKind::Slice)?;
                if let Some((stored, sha256)) = kept {
                    let label = labels.get(row.synset.as_str()).copied().with_context(|| {
                        format!("the slice names synset {:?}, which is no class of the dataset", row.synset)
                    });
                    let label = label.fault_of(FailureKind::Slice)?;
                    let appended = append_sample(assignment, files, label, stored, &sha256, &mut row).await;
                    appended.fault_of(FailureKind::Store)?;
                    progress.count_sample(label);
                }
                if outcome != Err(Rejection::Unfetched) {
                    progress.count_outcome(outcome);
                }
                rows.push((number, row));
            }
        }
    }
    let rows = match believed(&tools.way_out, rows).await {
        (rows, true) => rows,
        // Another attempt at once would come no further: a later round does.
        (rows, false) if throttled && matches!(ended, None | Some(EarlyEnd::Waits | EarlyEnd::TooLong)) => rows,
        _ if matches!(ended, Some(EarlyEnd::Leave | EarlyEnd::Waits)) => return Ok(Err(AttemptResult::Left)),
        _ if ended == Some(EarlyEnd::TooLong) => {
            let minutes = LONGEST_ATTEMPT.as_secs() / 60;
            return Err(anyhow!("no URL was finished in {minutes} minutes")).fault_of(FailureKind::Worker);
        }
        _ => return Err(anyhow!("this worker has no way out to the web")).fault_of(FailureKind::WayOut),
    };
    let mut tars = BTreeMap::new();
    for (split, tar) in &mut files.tars {
        tars.insert(*split, tar.finish().await.fault_of(FailureKind::Store)?);
    }
    let outcomes: Result<OutcomeCounts, FormatError> = rows.iter().map(|row| Ok((row.outcome()?, 1))).collect();
    let outcomes = outcomes.fault_of(FailureKind::Worker)?;
    let parquet = tokio::task::spawn_blocking(move || table::write(&rows)).await.fault_of(FailureKind::Worker)?;
    let parquet = parquet.fault_of(FailureKind::Worker)?;
    let outcomes_file = upload::put_file(&*tools.store, files.outcomes.clone(), parquet.into()).await;
    let outcomes_file = outcomes_file.fault_of(FailureKind::Store)?;
    Ok(Ok(ShardIndex {
        version: 1,
        nonce: uuid::Uuid::new_v4().simple().to_string(),
        writer: tools.worker.clone(),
        shard: assignment.shard.shard,
        attempt: assignment.attempt,
        outcomes,
        tars,
        outcomes_file: Some(outcomes_file),
    }))
}

/// Returns when an attempt that begins now has to end with what it has.
async fn early_end(way_out: &WayOut, leave: &CancellationToken) -> EarlyEnd {
    tokio::select! {
        biased;
        () = leave.cancelled() => EarlyEnd::Leave,
        () = way_out.offline() => EarlyEnd::Offline,
        () = tokio::time::sleep(LONGEST_ATTEMPT) => EarlyEnd::TooLong,
    }
}

/// The row of a URL that was not asked for.
fn unfetched(entry: SliceEntry, why: Rejection) -> OutcomeRow {
    OutcomeRow { outcome: why.name().to_owned(), fetched_at: now(), ..entry.into_row() }
}

/// The rows in the order of their keys; those that are not believed as `unfetched`; and whether anything is left of them.
async fn believed(way_out: &WayOut, rows: Vec<(u64, OutcomeRow)>) -> (Vec<OutcomeRow>, bool) {
    let belief = way_out.prove(rows.iter().map(|(number, _)| *number).max().unwrap_or(0)).await;
    let (mut finished, mut left) = (0, 0);
    let believe = |(number, row): (u64, OutcomeRow)| {
        let outcome = row.outcome().unwrap_or(Err(Rejection::Unfetched));
        let transient = outcome.is_err_and(|why| why.is_transient(row.http_status));
        let holds = belief.holds(number);
        match outcome {
            Err(Rejection::Unfetched) => left += 1,
            _ if holds => finished += 1,
            _ => left += 1,
        }
        // Nothing has proved that it was the site, and not a portal, that said so: it must not be the last word.
        let unproved = number > 0 && !belief.proved && outcome.is_err() && !transient;
        if holds && !unproved {
            return row;
        }
        let entry = SliceEntry { key: row.key, synset: row.synset, url: row.url, columns: row.columns };
        unfetched(entry, Rejection::Unfetched)
    };
    let mut rows: Vec<OutcomeRow> = rows.into_iter().map(believe).collect();
    rows.sort_by_key(|row| row.key);
    (rows, finished > 0 || left == 0)
}

/// Milliseconds since 1970.
#[allow(clippy::disallowed_methods, reason = "a column for people; nothing is decided by it")]
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

async fn read_slice(store: &dyn ObjectStore, of: &Assignment) -> Result<Vec<SliceEntry>, Failure> {
    let key = keys::slice(&of.shard);
    let compressed = store::read(store, &key).await.with_context(|| format!("failed to read {key}"));
    let compressed = compressed.fault_of(FailureKind::Store)?;
    let parse = move || -> anyhow::Result<Vec<SliceEntry>> {
        let owned = |entry: slice::Entry<'_>| SliceEntry {
            key: entry.key as i64,
            synset: entry.synset.to_owned(),
            url: entry.url.to_owned(),
            columns: Some(entry.columns.to_owned()).filter(|columns| !columns.is_empty()),
        };
        slice::entries(&slice::unpack(&compressed)?).map(|entry| Ok(owned(entry?))).collect()
    };
    let parsed = tokio::task::spawn_blocking(parse).await.fault_of(FailureKind::Worker)?;
    parsed.with_context(|| format!("failed to parse {key}")).fault_of(FailureKind::Slice)
}

/// One URL's row, and its sample if it gives one.
#[derive(Debug)]
struct Validated {
    number: u64,
    /// Complete but for the place in a tar.
    row: OutcomeRow,
    outcome: Outcome,
    /// The picture, with the hash of the bytes as fetched.
    kept: Option<(Stored, [u8; 32])>,
}

/// Has the body validated, if there is one.
async fn validate(tools: &Tools, rules: Arc<Rules>, result: FetchResult) -> anyhow::Result<Validated> {
    let FetchResult { entry, number, info, spent, body } = result;
    if !spent.is_zero() {
        metrics::fetched(spent.as_secs_f64(), body.as_ref().map_or(0, |(body, _)| body.bytes.len()));
    }
    let mut row = OutcomeRow {
        final_url: info.final_url,
        http_status: info.status.map(i32::from),
        fetched_at: now(),
        millis: spent.as_millis() as i64,
        detail: info.detail.map(str::to_owned),
        ..entry.into_row()
    };
    let outcome = match body {
        Err(rejection) => Err(rejection),
        Ok((body, _)) if changed(&rules, &row, &body.bytes) => {
            row.bytes = Some(body.bytes.len() as i64);
            row.sha256 = Some(proto::shard::sha256_hex(&body.bytes));
            Err(Rejection::Changed)
        }
        Ok((body, _connection)) => {
            row.bytes = Some(body.bytes.len() as i64);
            let validation = tools.pool.validate(body, rules).await?;
            row.sha256 = Some(hex::encode(validation.sha256));
            row.detail = validation.detail.map(str::to_owned);
            row.thumbnail = validation.thumbnail.map(Vec::from);
            row.phash = validation.phash.map(|hash| format!("{hash:016x}"));
            row.width = validation.size.and_then(|(width, _)| i32::try_from(width).ok());
            row.height = validation.size.and_then(|(_, height)| i32::try_from(height).ok());
            validation.outcome.map(|stored| (stored, validation.sha256))
        }
    };
    let (outcome, kept) = match outcome {
        Ok(kept) => (Ok(()), Some(kept)),
        Err(rejection) => (Err(rejection), None),
    };
    row.outcome = outcome_name(outcome).to_owned();
    Ok(Validated { number, row, outcome, kept })
}

/// Whether it is another body than was listed.
fn changed(rules: &Rules, row: &OutcomeRow, body: &[u8]) -> bool {
    rules.verify.as_ref().is_some_and(|verify| verify::differs(verify, row.columns.as_deref(), body))
}

/// Appends a sample to the tar of its split.
async fn append_sample(
    assignment: &Assignment,
    files: &mut Files,
    label: u32,
    stored: Stored,
    sha256: &[u8; 32],
    row: &mut OutcomeRow,
) -> anyhow::Result<()> {
    let splits = &assignment.spec.splits;
    let split = splits.published(row.columns.as_deref()).unwrap_or_else(|| splits.split_of(sha256));
    let tar = files.tar(assignment, split);
    let side = |pixels: Option<i32>| pixels.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let columns = row.columns.clone().unwrap_or_default();
    let one_class = !assignment.spec.unlabelled && !columns::has_several_classes(&columns);
    let origin = Origin {
        synset: if one_class { row.synset.clone() } else { String::new() },
        url: row.url.clone(),
        sha256: hex::encode(sha256),
        width: side(row.width),
        height: side(row.height),
        columns,
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
