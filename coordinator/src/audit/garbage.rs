//! What nobody needs any more. Only what no index, manifest, round or event names, and what nobody can name any more,
//! and only once it is older than a grace period:
//!
//! - files of attempts at shards whose index names another attempt, and of shards that no round has;
//! - slices of rounds that were never committed, and what is left of lists that were never read to their end;
//! - skips, findings and gists of manifests that another coordinator was the first to put, unless a later one names
//!   them;
//! - checkpoints that a run's own rule does not keep, weights and models that no event names;
//! - everything under a tombstone.
//!
//! The listing is older than all that is read to judge it, and what is committed once is never changed: what was not
//! named then can be named later only by whoever is still at it, which the grace period leaves time for.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use object_store::{ObjectMeta, ObjectStore};
use proto::manifest::Manifest;
use proto::round::Round;
use proto::tombstone::Tombstone;
use proto::{Attempt, DatasetId, Split, Stored, keys};
use serde::Serialize;

use super::{Audit, AuditError};
use crate::damage;
use crate::datasets::was_committed;
use crate::gists::parse_list;
use crate::store::{Created, Store, StoreError, nonce, wall_millis};

/// An object that nobody needs any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Garbage {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// Why it is garbage.
    pub why: &'static str,
    /// Of what it is a part: to be removed only while that is dead.
    #[serde(skip)]
    grave: Option<Grave>,
}

/// A folder that is dead as long as its tombstone stands.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Grave {
    tombstone: String,
    /// A list that was never read to its end gets one first, so that whoever still works on it comes too late.
    uncommitted: Option<DatasetId>,
}

/// Finds what is older than `grace` and not needed by anybody.
///
/// # Errors
/// If the store is no cluster's, or cannot be read.
pub async fn garbage(store: Arc<dyn ObjectStore>, grace: Duration) -> Result<Vec<Garbage>, AuditError> {
    let before = wall_millis().saturating_sub(u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
    let collector = Collector { audit: Audit::read(Store::new(store)).await?, before, garbage: Vec::new() };
    Ok(collector.collect().await?)
}

/// Removes garbage that [`garbage`] has found; how many objects.
///
/// # Errors
/// If the store cannot be read or refuses to remove something.
pub async fn remove(store: Arc<dyn ObjectStore>, garbage: Vec<Garbage>) -> Result<u64, AuditError> {
    let store = Store::new(store);
    let mut by_grave: BTreeMap<Option<String>, Vec<Garbage>> = BTreeMap::new();
    for garbage in garbage {
        by_grave.entry(garbage.grave.as_ref().map(|grave| grave.tombstone.clone())).or_default().push(garbage);
    }
    let mut removed = 0;
    for (tombstone, garbage) in by_grave {
        let mut keys: Vec<String> = garbage.iter().map(|garbage| garbage.key.clone()).collect();
        if let Some(tombstone) = &tombstone {
            let uncommitted = garbage.first().and_then(|garbage| garbage.grave.as_ref()?.uncommitted.as_ref());
            if let Some(id) = uncommitted {
                let stone = Tombstone { format: 1, nonce: nonce(), at_millis: wall_millis() };
                let created = store.create(tombstone, &stone).await?;
                if !store.list(&keys::rounds(id)).await?.is_empty() {
                    // It was committed at this very moment.
                    if created == Created::Won {
                        store.delete_all(vec![tombstone.clone()]).await?;
                    }
                    continue;
                }
            } else if store.head(tombstone).await?.is_none() {
                // Whoever buried it has removed all of it, and the name may be another's by now.
                continue;
            }
            keys.retain(|key| key != tombstone);
        }
        removed += keys.len() as u64;
        store.delete_all(keys).await?;
        if let Some(tombstone) = tombstone {
            removed += 1;
            store.delete_all(vec![tombstone]).await?;
        }
    }
    Ok(removed)
}

struct Collector {
    audit: Audit,
    /// What was written later, in milliseconds since 1970, may still be needed.
    before: u64,
    garbage: Vec<Garbage>,
}

impl Collector {
    async fn collect(mut self) -> Result<Vec<Garbage>, StoreError> {
        for key in self.audit.listing.keys("coordinator/check") {
            self.add(&key, "what a coordinator tried the store with", None);
        }
        let datasets = self.audit.listing.folders(keys::DATASETS);
        for id in datasets.iter().filter_map(|folder| folder.parse::<DatasetId>().ok()) {
            self.collect_dataset(&id).await?;
        }
        for run in self.audit.listing.folders(keys::RUNS) {
            self.collect_run(&run).await?;
        }
        self.garbage.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(self.garbage)
    }

    fn is_old(&self, object: &ObjectMeta) -> bool {
        u64::try_from(object.last_modified.timestamp_millis()).is_ok_and(|written| written <= self.before)
    }

    fn add(&mut self, key: &str, why: &'static str, grave: Option<Grave>) {
        if let Some(object) = self.audit.listing.0.get(key).filter(|object| self.is_old(object)) {
            self.garbage.push(Garbage { key: key.to_owned(), bytes: object.size, why, grave });
        }
    }

    /// Adds all of a folder, if nobody has written to it lately.
    fn add_folder(&mut self, folder: &str, why: &'static str, grave: &Grave) {
        if self.audit.listing.under(folder).all(|(_, object)| self.is_old(object)) {
            for key in self.audit.listing.keys(folder) {
                self.add(&key, why, Some(grave.clone()));
            }
        }
    }

    async fn collect_dataset(&mut self, id: &DatasetId) -> Result<(), StoreError> {
        let (folder, tombstone) = (keys::dataset(id), keys::tombstone(id));
        let is_dead = self.audit.listing.has(&tombstone);
        if is_dead || !was_committed(id, &self.audit.listing.keys(&folder)) {
            let why = if is_dead { "its dataset is deleted" } else { "its dataset was never committed" };
            let grave = Grave { tombstone, uncommitted: (!is_dead).then(|| id.clone()) };
            self.add_folder(&folder, why, &grave);
            return Ok(());
        }
        let Some(named) = self.named(id).await? else { return Ok(()) };
        let mut folders = vec![keys::outcomes_of(id)];
        folders.extend(Split::ALL.map(|split| keys::tars(id, split)));
        let keys: Vec<String> = folders.iter().flat_map(|folder| self.audit.listing.keys(folder)).collect();
        for key in keys {
            let Ok((shard, attempt)) = keys::attempt_of(&key) else { continue };
            let why = match (named.shards.contains(&shard), named.winners.get(&shard)) {
                (false, _) => "no round has its shard",
                (true, Some(winner)) if *winner != attempt => "another attempt has committed its shard",
                _ => continue,
            };
            if !named.files.contains(&key) {
                self.add(&key, why, None);
            }
        }
        for key in self.audit.listing.keys(&keys::slices(id)) {
            if keys::number(&key).is_ok_and(|n| u32::try_from(n).is_ok_and(|n| !named.shards.contains(&n))) {
                self.add(&key, "no round has its slice", None);
            }
        }
        let manifests = keys::manifests(id);
        for key in self.audit.listing.keys(&manifests) {
            let Some((version, _)) = key[manifests.len() + 1..].split_once('/') else { continue };
            // A manifest that is being made may still name what it has put.
            let is_made = keys::number(version).is_ok_and(|version| version <= named.version.into());
            if is_made && !named.files.contains(&key) {
                self.add(&key, "no manifest names it", None);
            }
        }
        Ok(())
    }

    /// What the objects of a dataset name; None if one of those that name others cannot be read.
    async fn named(&self, id: &DatasetId) -> Result<Option<Named>, StoreError> {
        let mut named = Named::default();
        let mut rounds = std::pin::pin!(self.audit.store.get_each(self.audit.store.list(&keys::rounds(id)).await?));
        while let Some((_, json)) = rounds.try_next().await? {
            let Ok(round) = Round::from_json(&json) else { return Ok(None) };
            named.shards.extend(round.shards());
        }
        let versions = self.audit.store.files(&keys::manifests(id)).await?;
        let mut manifests = std::pin::pin!(self.audit.store.get_each(versions));
        while let Some((_, json)) = manifests.try_next().await? {
            let Ok(manifest) = Manifest::from_json(&json) else { return Ok(None) };
            named.version = named.version.max(manifest.version);
            let list = keys::gist_list(id, manifest.version, &manifest.nonce);
            if let Some(json) = self.audit.store.get(&list).await? {
                let Ok(gists) = parse_list(&manifest, &json) else { return Ok(None) };
                named.files.extend(gists.objects.into_iter().map(|object| object.file.key));
                named.files.insert(list);
            }
            for shard in manifest.shards {
                let files = [shard.outcomes, shard.findings, shard.skips];
                named.files.extend(files.into_iter().flatten().map(|file| file.key));
                named.files.extend(shard.tars.into_values().map(|tar| tar.key));
            }
        }
        let mut indexes = std::pin::pin!(self.audit.store.get_each(self.audit.store.list(&keys::indexes(id)).await?));
        while let Some((key, json)) = indexes.try_next().await? {
            let Some(shard) = keys::number(&key).ok().and_then(|n| u32::try_from(n).ok()) else { continue };
            // Of a shard whose index is damaged nobody knows which attempt has won.
            let Ok(index) = damage::parse_index(&id.shard(shard), &json) else { continue };
            named.winners.insert(shard, index.attempt);
            named.files.extend(index.tars.into_values().map(|tar| tar.key));
            named.files.extend(index.outcomes_file.map(|file| file.key));
        }
        Ok(Some(named))
    }

    async fn collect_run(&mut self, name: &str) -> Result<(), StoreError> {
        let (folder, tombstone) = (keys::run(name), keys::run_tombstone(name));
        if self.audit.listing.has(&tombstone) {
            self.add_folder(&folder, "its run is deleted", &Grave { tombstone, uncommitted: None });
            return Ok(());
        }
        if !self.audit.listing.has(&keys::run_spec(name))
            && self.audit.listing.under(&keys::events(name)).next().is_none()
        {
            for key in self.audit.listing.keys(&folder) {
                self.add(&key, "its run was never submitted", None);
            }
            return Ok(());
        }
        let Some(found) = self.audit.recover_run(name).await? else { return Ok(()) };
        let kept: BTreeSet<&str> = found.run.checkpoints.iter().map(|made| made.key.as_str()).collect();
        let newest = found.run.checkpoints.iter().filter_map(|made| keys::checkpoint_of(name, &made.key).ok());
        let newest = newest.map(|(step, generation)| (generation, step)).max();
        let mut old = Vec::new();
        for key in self.audit.listing.keys(&keys::checkpoints(name)) {
            let Ok((step, generation)) = keys::checkpoint_of(name, &key) else { continue };
            // Ranks may still be at a newer one.
            let is_past = found.run.phase.is_over() || newest.is_some_and(|newest| (generation, step) <= newest);
            if is_past && !kept.contains(key.rsplit_once('/').map_or("", |(folder, _)| folder)) {
                old.push((key, "its run does not keep that checkpoint"));
            }
        }
        if found.run.phase.is_over() {
            let model = found.model().map(|(model, _)| format!("{model}/"));
            let others = self.audit.listing.keys(&format!("{folder}/model"));
            let others = others.into_iter().filter(|key| !model.as_ref().is_some_and(|model| key.starts_with(model)));
            old.extend(others.map(|key| (key, "no event names that model")));
        }
        let start = found.stored.start.as_ref().map(|start| format!("{}/", start.key));
        let others = self.audit.listing.keys(&format!("{folder}/start"));
        let others = others.into_iter().filter(|key| !start.as_ref().is_some_and(|start| key.starts_with(start)));
        old.extend(others.map(|key| (key, "no run begins with those weights")));
        for (key, why) in old {
            self.add(&key, why, None);
        }
        Ok(())
    }
}

/// What the objects of a dataset name.
#[derive(Default)]
struct Named {
    /// Of all rounds.
    shards: HashSet<u32>,
    winners: BTreeMap<u32, Attempt>,
    /// By indexes, manifests and their lists of gists.
    files: HashSet<String>,
    /// Of the latest manifest.
    version: u32,
}
