//! A new coordinator's view of the datasets: all of it comes from listing the store.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use proto::manifest::Manifest;
use proto::round::Round;
use proto::{DatasetId, DatasetSpec, ShardIndex, Stored, keys};
use tracing::{error, info, warn};

use super::rounds::short;
use super::seal::outcome;
use super::{Dataset, Datasets, PARALLEL, Stage};
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
        let rounds = self.store.get_all(self.store.list(&keys::rounds(&id)).await?).await?;
        let dead = self.store.get(&keys::tombstone(&id)).await?.is_some();
        if dead || rounds.is_empty() {
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
            let rounds = rounds.iter().map(|(_, json)| Round::from_json(json)).collect::<Result<Vec<_>, _>>()?;
            let spec_json = String::from_utf8(self.store.need(&keys::dataset_spec(&id)).await?.to_vec())?;
            let spec = DatasetSpec::from_json(&spec_json)?;
            let mut dataset = Dataset::new(&id, spec, rounds);
            if let Some(manifest) = self.latest_manifest(&id).await? {
                dataset.sealed(manifest.into());
            }
            // What the manifest names is committed, and its totals are known.
            let mut open: BTreeSet<u32> = dataset.unnamed_rounds().flat_map(Round::shards).collect();
            let mut committed = if open.is_empty() { Vec::new() } else { self.store.list(&keys::indexes(&id)).await? };
            committed.retain(|key| number(key).is_some_and(|shard| open.contains(&shard)));
            let mut indexes = std::pin::pin!(self.store.get_each(committed));
            while let Some((key, json)) = indexes.try_next().await? {
                let index = ShardIndex::from_json(&json).with_context(|| key)?;
                dataset.count(&index);
                open.remove(&index.shard);
            }
            if open.is_empty() {
                let complete = |manifest: &&Arc<Manifest>| {
                    let all = manifest.rounds as usize >= dataset.rounds.len();
                    all && short(manifest, dataset.spec.per_class).is_empty()
                };
                let manifest = dataset.manifest.as_ref().filter(complete);
                dataset.stage = manifest.map_or(Stage::Sealing, |manifest| outcome(manifest));
            }
            anyhow::Ok((dataset, open.into_iter().collect()))
        };
        match recovered.await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.is::<StoreError>() => Err(error),
            // One broken dataset must not keep the cluster from starting.
            Err(error) => {
                error!(dataset = &*id, error = format!("{error:#}"), "dataset cannot be read; it is left out");
                Ok(None)
            }
        }
    }

    async fn latest_manifest(&self, id: &DatasetId) -> anyhow::Result<Option<Manifest>> {
        match self.latest_version(id).await? {
            0 => Ok(None),
            version => {
                let json = self.store.need(&keys::manifest(id, version)).await?;
                Ok(Some(Manifest::from_json(&json)?))
            }
        }
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
