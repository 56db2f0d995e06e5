//! One run: its spec, its events, and the checkpoints and the model that they name.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use proto::run_event::{EventRecord, RunEvent};
use proto::run_ledger::Lines;
use proto::stored_run::StoredRun;
use proto::{Stored, keys};

use super::{Audit, PARALLEL, same};
use crate::damage::READS;
use crate::roster::{Now, Run, Sources};
use crate::store::StoreError;

/// How often the events of a run are read while new ones come.
const MOST_READS: usize = 5;

/// A run as its objects tell it.
pub(super) struct Recovered {
    pub(super) stored: StoredRun,
    pub(super) events: Vec<EventRecord>,
    pub(super) run: Run,
}

impl Recovered {
    /// The folder of its model and the digests of that, once it is done.
    pub(super) fn model(&self) -> Option<(&String, &BTreeMap<String, String>)> {
        self.events.iter().rev().find_map(|record| match &record.event {
            RunEvent::Done { model, digests } => Some((model, digests)),
            _ => None,
        })
    }
}

impl Audit {
    /// Checks a run. False: it is deleted, or was never submitted.
    pub(super) async fn check_run(&self, name: &str) -> Result<bool, StoreError> {
        let tombstone = keys::run_tombstone(name);
        let events = self.listing.under(&keys::events(name)).next().is_some();
        if self.listing.has(&tombstone) || !events && !self.listing.has(&keys::run_spec(name)) {
            return Ok(false);
        }
        let folder = keys::run(name);
        // A run that goes on removes what its later events do not keep: then they are read once more.
        for _ in 0..MOST_READS {
            self.forget(&folder);
            let Some(recovered) = self.recover_run(name).await? else { break };
            self.check_named(name, &recovered).await?;
            let events = self.store.list(&keys::events(name)).await?.len();
            if !self.has_found(&folder) || events == recovered.events.len() {
                break;
            }
        }
        let ledger = |json: Bytes| Lines::from_json(&json).map(drop).map_err(|error| error.to_string());
        let checks = self
            .listing
            .keys(&keys::ledgers(name))
            .into_iter()
            .map(|key| async move { self.object(&key, ledger).await.map(drop) });
        futures::stream::iter(checks).buffer_unordered(PARALLEL).try_collect::<()>().await?;
        // It may have been deleted meanwhile.
        let is_deleted = self.has_found(&folder)
            && (self.store.head(&tombstone).await?.is_some() || self.store.list(&folder).await?.is_empty());
        if is_deleted {
            self.forget(&folder);
        }
        Ok(!is_deleted)
    }

    /// The run as its events tell it; None if that cannot be known.
    pub(super) async fn recover_run(&self, name: &str) -> Result<Option<Recovered>, StoreError> {
        let parse = |json: Bytes| StoredRun::from_json(&json).map_err(|error| error.to_string());
        let stored = self.object(&keys::run_spec(name), parse).await?;
        let there = self.store.list(&keys::events(name)).await?;
        let last = there.iter().filter_map(|key| keys::number(key).ok()).max();
        let mut events: Vec<EventRecord> = Vec::new();
        for n in 1..=last.unwrap_or(0) {
            let parse = |json: Bytes| {
                let record = EventRecord::from_json(&json).map_err(|error| error.to_string())?;
                same("it is event", record.n, Some(n))?;
                match events.last().filter(|before| before.term > record.term) {
                    Some(before) => Err(format!("term {} wrote it after term {}", record.term, before.term)),
                    None => Ok(record),
                }
            };
            let Some(record) = self.object(&keys::event(name, n), parse).await? else { return Ok(None) };
            events.push(record);
        }
        let Some(stored) = stored else { return Ok(None) };
        let sources = Sources {
            dataset: stored.dataset.to_string(),
            manifest_key: stored.manifest_key.clone(),
            manifest_sha256: stored.manifest_sha256.clone(),
            start: None,
            traceparent: String::new(),
        };
        let now = Now { at: Duration::ZERO, wall: 0 };
        let run = Run::recovered(now, name, stored.spec.clone(), sources, stored.steps_per_epoch, &events);
        Ok(Some(Recovered { stored, events, run }))
    }

    /// Checks what a run's spec and events name, as far as it is still needed.
    async fn check_named(&self, name: &str, recovered: &Recovered) -> Result<(), StoreError> {
        let Recovered { stored, run, .. } = recovered;
        let folder = keys::dataset(&stored.dataset);
        // The dataset of an ended run may have been deleted.
        let deleted =
            self.listing.has(&keys::tombstone(&stored.dataset)) || self.listing.under(&folder).next().is_none();
        if !deleted {
            self.check_digest(&stored.manifest_key, &stored.manifest_sha256).await?;
        } else if !run.phase.is_over() {
            self.found(&keys::run_spec(name), format!("its dataset {} is gone", stored.dataset));
        }
        let mut files: BTreeMap<String, &String> = BTreeMap::new();
        // Copies of weights that a run began with are of no use once it has ended.
        if let Some(start) = stored.start.as_ref().filter(|_| !run.phase.is_over()) {
            files.extend(files_of(&start.key, &start.digests));
        }
        for checkpoint in &run.checkpoints {
            files.extend(files_of(&checkpoint.key, &checkpoint.digests));
        }
        if let Some((model, digests)) = recovered.model() {
            files.extend(files_of(model, digests));
        }
        for (key, sha256) in files {
            self.check_digest(&key, sha256).await?;
        }
        Ok(())
    }

    async fn check_digest(&self, key: &str, sha256: &str) -> Result<(), StoreError> {
        let mut wrong = "";
        for _ in 0..READS {
            match self.store.digest(key).await? {
                Some(found) if found == sha256 => return Ok(()),
                Some(_) => wrong = "its bytes are not those that it was named with",
                None => wrong = "it is gone",
            }
        }
        self.found(key, wrong);
        Ok(())
    }
}

/// The files of a folder, each with its digest.
fn files_of<'a>(
    folder: &'a str,
    digests: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> impl Iterator<Item = (String, &'a String)> {
    digests.into_iter().map(move |(file, sha256)| (format!("{folder}/{file}"), sha256))
}
