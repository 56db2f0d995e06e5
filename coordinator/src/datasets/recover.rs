//! A new coordinator's view of the datasets: all of it comes from listing the store.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use proto::manifest::Manifest;
use proto::round::Round;
use proto::{DatasetId, DatasetSpec, Stored, keys};
use tracing::{error, info, warn};

use super::control::Controls;
use super::remove::was_committed;
use super::rounds::short;
use super::seal::outcome;
use super::{Dataset, Datasets, PARALLEL, Stage};
use crate::damage;
use crate::error::Error;
use crate::store::StoreError;

impl Datasets {
    /// Rebuilds the state from the store, and goes on with what an earlier coordinator had begun.
    pub(crate) async fn recover(self: &Arc<Self>) -> anyhow::Result<()> {
        let folders = self.store.folders(keys::DATASETS).await?;
        let id = |folder: String| folder.parse().inspect_err(|error| warn!(%error, "a folder is no dataset's")).ok();
        let ids: Vec<DatasetId> = folders.into_iter().filter_map(id).collect();
        let found: Vec<Option<(Dataset, Vec<u32>)>> = futures::stream::iter(ids)
            .map(|id| {
                let this = Arc::clone(self);
                async move { this.recover_one(id).await }
            })
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        for (dataset, open) in found.into_iter().flatten() {
            info!(dataset = &*dataset.id, open = open.len(), stage = dataset.stage.name(), "dataset recovered");
            self.admit(dataset, open, false);
        }
        Ok(())
    }

    /// Takes in what an earlier coordinator, while this one began, has committed under a name that is locked.
    pub(crate) async fn catch_up(self: &Arc<Self>, name: &str) -> Result<(), Error> {
        for folder in self.store.folders(keys::DATASETS).await? {
            let Ok(id) = folder.parse::<DatasetId>() else { continue };
            let is_known = id.name() != name || self.state().live.contains_key(&id);
            if is_known || self.store.get(&keys::tombstone(&id)).await?.is_some() {
                continue;
            }
            let store = |error: anyhow::Error| match error.downcast() {
                Ok(error) => Error::Store(error),
                Err(error) => Error::Local(format!("{error:#}")),
            };
            if let Some((dataset, open)) = self.recover_one(id).await.map_err(store)? {
                info!(dataset = &*dataset.id, "dataset of an earlier coordinator found");
                self.admit(dataset, open, false);
            }
        }
        Ok(())
    }

    /// One dataset and its uncommitted shards; None if there is nothing to go on with.
    async fn recover_one(self: &Arc<Self>, id: DatasetId) -> anyhow::Result<Option<(Dataset, Vec<u32>)>> {
        let named = self.store.list(&keys::rounds(&id)).await?;
        let dead = self.store.get(&keys::tombstone(&id)).await?.is_some();
        if dead || named.is_empty() && !was_committed(&id, &self.store.list(&keys::dataset(&id)).await?) {
            // A list that was never read to its end. The tombstone first, so that whoever still works on it comes too
            // late.
            let this = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = this.remove(&id).await {
                    warn!(dataset = &*id, %error, "cannot remove a dead dataset; the next coordinator will try again");
                }
            });
            return Ok(None);
        }
        let recovered = async {
            let last = named.iter().filter_map(|key| number(key)).max().unwrap_or(1);
            let named = (1..=last).map(|round| keys::round(&id, round)).collect();
            let rounds = self.store.get_all(named).await?;
            let round = |(key, json): &(String, Bytes)| Round::from_json(json).with_context(|| key.clone());
            let rounds = rounds.iter().map(round).collect::<anyhow::Result<Vec<_>>>()?;
            let gap =
                (1u32..).zip(&rounds).find(|(n, round)| *n != round.round).map_or(rounds.len() as u32 + 1, |(n, _)| n);
            if gap <= last {
                anyhow::bail!("{} is gone", keys::round(&id, gap));
            }
            let key = keys::dataset_spec(&id);
            let spec_json = self.store.get(&key).await?.with_context(|| format!("{key} is gone"))?;
            let spec = DatasetSpec::from_json(str::from_utf8(&spec_json).with_context(|| key.clone())?);
            let spec = spec.with_context(|| key)?;
            let mut dataset = Dataset::new(&id, spec, rounds);
            dataset.controls = Controls::read(&self.store, &id).await?;
            if let Some(manifest) = self.latest_manifest(&id).await? {
                dataset.sealed(manifest.into());
            }
            // What the manifest names is committed, and its totals are known.
            let mut open: BTreeSet<u32> = dataset.unnamed_rounds().flat_map(Round::shards).collect();
            let mut committed = if open.is_empty() { Vec::new() } else { self.store.list(&keys::indexes(&id)).await? };
            committed.retain(|key| number(key).is_some_and(|shard| open.contains(&shard)));
            let mut indexes = std::pin::pin!(self.store.get_each(committed));
            while let Some((key, json)) = indexes.try_next().await? {
                let Some(shard) = number(&key) else { continue };
                match damage::known_index(&self.store, &id.shard(shard), &json).await? {
                    Ok(index) => dataset.count(&index),
                    Err(damaged) => {
                        error!(dataset = &*id, shard, key, what = damaged.what, "index is damaged");
                        dataset.count_damaged(damaged);
                    }
                }
                open.remove(&shard);
            }
            if open.is_empty() {
                let complete = |manifest: &&Arc<Manifest>| {
                    let all = manifest.rounds as usize >= dataset.rounds.len();
                    all && (dataset.is_finished() || short(manifest, dataset.spec.per_class).is_empty())
                };
                let manifest = dataset.manifest.as_ref().filter(complete);
                dataset.stage = manifest.map_or(Stage::Sealing, |manifest| outcome(manifest));
            }
            anyhow::Ok((dataset, open.into_iter().collect()))
        };
        match recovered.await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is::<StoreError>() => Err(error),
            // One broken dataset must not keep the cluster from starting, and it must not be gone from view.
            Err(error) => {
                let error = format!(
                    "the dataset cannot be read: {error:#}. Restore that object, and start the coordinator again"
                );
                error!(dataset = &*id, error, "dataset cannot be read");
                let mut dataset = Dataset::new(&id, DatasetSpec::default(), Vec::new());
                dataset.stage = Stage::Failed(error);
                Ok(Some((dataset, Vec::new())))
            }
        }
    }

    /// The latest one that can be read: what a damaged one named is sealed again.
    async fn latest_manifest(&self, id: &DatasetId) -> anyhow::Result<Option<Manifest>> {
        for version in (1..=self.latest_version(id).await?).rev() {
            let key = keys::manifest(id, version);
            match self.store.get(&key).await?.map(|json| Manifest::from_json(&json)) {
                Some(Ok(manifest)) => return Ok(Some(manifest)),
                Some(Err(error)) => error!(key, %error, "manifest is damaged; looking for the one before it"),
                None => {}
            }
        }
        Ok(None)
    }

    pub(super) async fn latest_version(&self, id: &DatasetId) -> Result<u32, StoreError> {
        // A version's skips and findings are in folders beside it, and many.
        let keys = self.store.files(&keys::manifests(id)).await?;
        Ok(keys.iter().filter_map(|key| number(key)).max().unwrap_or(0))
    }
}

fn number(key: &str) -> Option<u32> {
    keys::number(key).ok().and_then(|number| u32::try_from(number).ok())
}
