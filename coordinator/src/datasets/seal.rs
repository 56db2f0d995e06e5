//! Sealing, once all shards of a dataset are committed, and what it leaves to sweep.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use proto::manifest::Manifest;
use proto::{DatasetSpec, ShardIndex, Split, keys};
use tracing::{error, info, warn};

use super::{Datasets, Stage};
use crate::manifest::{SealError, Sealing, seal};
use crate::store::StoreError;

/// Between two tries to seal, when the store fails.
const SEAL_PAUSE: Duration = Duration::from_secs(5);

impl Datasets {
    pub(super) fn spawn_seal(self: &Arc<Self>, id: Arc<str>) {
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let stage = loop {
                let sealed = {
                    let Ok(_permit) = this.sealing.acquire().await else { return };
                    this.seal(&id).await
                };
                match sealed {
                    Ok(manifest) => break Stage::Ready(manifest.into()),
                    Err(error @ (SealError::Empty(_) | SealError::Corrupt { .. })) => {
                        break Stage::Failed(error.to_string());
                    }
                    Err(error) => warn!(dataset = &*id, %error, "cannot seal, trying again"),
                }
                tokio::time::sleep(SEAL_PAUSE).await;
                if this.revision(&id).is_none() {
                    return;
                }
            };
            match &stage {
                Stage::Failed(error) => error!(dataset = &*id, error, "dataset failed"),
                _ => info!(dataset = &*id, "dataset is ready"),
            }
            if let Some(dataset) = this.state().live.get_mut(&id) {
                dataset.stage = stage;
                dataset.revision += 1;
            }
            if let Err(error) = this.sweep(&id).await {
                warn!(dataset = &*id, %error, "cannot remove what lost attempts left");
            }
        });
    }

    async fn seal(self: &Arc<Self>, id: &Arc<str>) -> Result<Manifest, SealError> {
        let Some(dataset) = self.state().live.get(id).cloned() else {
            return Err(SealError::Empty("it was deleted".to_owned()));
        };
        let sealing = Sealing {
            dataset: id.to_string(),
            version: self.latest_version(id).await? + 1,
            rounds: dataset.rounds.len() as u32,
            shards: dataset.shards(),
            urls_per_class: dataset.urls_per_class(),
            folder: self.folder.clone(),
            spec: DatasetSpec::clone(&dataset.spec),
        };
        let (store, handle) = (self.store.clone(), tokio::runtime::Handle::current());
        let sealed = tokio::task::spawn_blocking(move || seal(&handle, &store, &sealing)).await;
        sealed.unwrap_or_else(|error| Err(SealError::Local(std::io::Error::other(error))))
    }

    /// Removes the files of attempts whose shard has an index that names another attempt.
    async fn sweep(&self, id: &str) -> Result<(), StoreError> {
        let indexes = self.store.get_all(self.store.list(&keys::indexes(id)).await?).await?;
        let winners: HashMap<u32, String> = indexes
            .iter()
            .filter_map(|(_, json)| ShardIndex::from_json(json).ok())
            .map(|index| (index.shard, index.attempt))
            .collect();
        let folder = keys::dataset(id);
        let mut folders = vec![format!("{folder}/outcomes")];
        folders.extend(Split::ALL.iter().map(|split| format!("{folder}/shards/{split}")));
        for folder in folders {
            let mut garbage = self.store.list(&folder).await?;
            garbage.retain(|key| {
                keys::attempt_of(key).is_ok_and(|(shard, attempt)| {
                    winners.get(&shard).is_some_and(|winner| *winner != attempt.to_string())
                })
            });
            if !garbage.is_empty() {
                info!(dataset = id, folder, objects = garbage.len(), "removing what lost attempts left");
                self.store.delete_all(garbage).await?;
            }
        }
        Ok(())
    }
}
