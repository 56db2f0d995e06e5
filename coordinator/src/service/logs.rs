//! What ranks wrote, as their agents have stored it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use proto::{keys, pb};
use tokio::sync::mpsc;
use tonic::Status;

use crate::error::Error;
use crate::runs::Runs;
use crate::store::wall_millis;

/// How often the store is asked for more lines.
const PERIOD: Duration = Duration::from_secs(1);

/// Agents store what ranks say every few seconds: after a run's end the last lines may still be on their way.
const LAST_LINES: Duration = Duration::from_secs(4);

type Lines = mpsc::Sender<Result<pb::LogLine, Status>>;

/// Sends the stored lines, and with `follow` those that are stored later, until a while after the run's end. Lines come
/// from the store alone, so none is doubled, and they are there after death and cancel.
pub(super) async fn send(runs: &Runs, request: &pb::GetLogsRequest, sender: &Lines) -> Result<(), Error> {
    let pb::GetLogsRequest { run, follow, rank, tail, since_seconds } = request;
    let since = (*since_seconds > 0).then(|| wall_millis().saturating_sub(since_seconds * 1000) as i64);
    let mut read = HashSet::new();
    let mut numbers: HashMap<(u64, u32), u64> = HashMap::new();
    let mut first = (*tail > 0).then(|| LastLines::new(*tail as usize));
    let mut ended: Option<tokio::time::Instant> = None;
    loop {
        if runs.is_over(run) {
            ended.get_or_insert_with(tokio::time::Instant::now);
        } else {
            ended = None;
        }
        let mut objects = runs.store.objects(&keys::logs_of(run)).await?;
        objects.sort_by(|one, other| one.location.cmp(&other.location));
        for object in objects {
            let key = object.location.to_string();
            let (generation, of) = log_of(&key).unwrap_or_default();
            if read.contains(&key) || rank.is_some_and(|rank| rank != of) {
                continue;
            }
            let bytes = runs.store.need(&key).await?;
            read.insert(key);
            let number = numbers.entry((generation, of)).or_default();
            let is_old = since.is_some_and(|since| object.last_modified.timestamp_millis() < since);
            for line in String::from_utf8_lossy(&bytes).lines() {
                *number += 1;
                if is_old {
                    continue;
                }
                let line = pb::LogLine { generation, rank: of, line: line.to_owned(), number: *number };
                match &mut first {
                    Some(first) => first.push(line),
                    None if sender.send(Ok(line)).await.is_err() => return Ok(()),
                    None => {}
                }
            }
        }
        for line in first.take().into_iter().flat_map(|lines| lines.by_rank).flat_map(|(_, lines)| lines) {
            if sender.send(Ok(line)).await.is_err() {
                return Ok(());
            }
        }
        if !follow || ended.is_some_and(|at| at.elapsed() >= LAST_LINES) {
            return Ok(());
        }
        tokio::select! {
            () = sender.closed() => return Ok(()),
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
}

/// The last lines of each rank, over all generations.
struct LastLines {
    most: usize,
    by_rank: BTreeMap<u32, VecDeque<pb::LogLine>>,
}

impl LastLines {
    fn new(most: usize) -> Self {
        Self { most, by_rank: BTreeMap::new() }
    }

    fn push(&mut self, line: pb::LogLine) {
        let lines = self.by_rank.entry(line.rank).or_default();
        if lines.len() == self.most {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

/// Generation and rank of `.../000001-0002-000003.log`.
fn log_of(key: &str) -> Option<(u64, u32)> {
    let mut parts = key.rsplit('/').next()?.split('-');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
