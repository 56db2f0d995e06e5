//! The end of a dataset: a tombstone, then everything under it.

use std::sync::Arc;

use proto::tombstone::Tombstone;
use proto::{DatasetId, keys};
use tracing::{info, warn};

use super::Datasets;
use crate::error::Error;
use crate::store::{StoreError, nonce, wall_millis};

/// Whether, of a dataset without a catalog, these keys show that it had one. If not, they are a list that was never
/// read to its end, or what somebody wrote after the dataset had been deleted.
pub(crate) fn was_committed(id: &DatasetId, keys: &[String]) -> bool {
    let any = |folder: String| keys.iter().any(|key| key.starts_with(&format!("{folder}/")));
    let is_whole = any(keys::slices(id)) || keys.contains(&keys::dataset_spec(id));
    any(keys::rounds(id)) || any(keys::manifests(id)) || any(keys::indexes(id)) && is_whole
}

impl Datasets {
    /// Puts the tombstone and forgets the dataset; its objects are removed in the background.
    pub(crate) async fn delete(self: &Arc<Self>, name: &str) -> Result<(), Error> {
        let (dataset, _) = self.find(name)?;
        self.put_tombstone(&dataset.id).await?;
        {
            let mut state = self.state();
            state.ledger.remove(&dataset.id);
            state.live.remove(&dataset.id);
        }
        info!(dataset = &*dataset.id, "dataset deleted");
        let this = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = this.remove(&dataset.id).await {
                warn!(dataset = &*dataset.id, %error, "cannot remove all objects; the next coordinator will go on");
            }
        });
        Ok(())
    }

    async fn put_tombstone(&self, id: &DatasetId) -> Result<(), StoreError> {
        let tombstone = Tombstone { format: 1, nonce: nonce(), at_millis: wall_millis() };
        self.store.create(&keys::tombstone(id), &tombstone).await.map(drop)
    }

    /// Removes everything under a dataset, its tombstone last. Once more after a while: a worker that had not heard of
    /// the end may have written meanwhile.
    pub(crate) async fn remove(&self, id: &DatasetId) -> Result<(), StoreError> {
        self.put_tombstone(id).await?;
        let tombstone = keys::tombstone(id);
        let lease = self.state().ledger.lease();
        for last in [false, true] {
            let mut keys = self.store.list(&keys::dataset(id)).await?;
            keys.retain(|key| *key != tombstone);
            self.store.delete_all(keys).await?;
            if !last {
                tokio::time::sleep(lease * 2).await;
            }
        }
        self.store.delete_all(vec![tombstone]).await
    }

    /// Removes the slices of a list that failed before anything was committed. What is committed belongs to the later
    /// coordinator that came in between.
    pub(crate) async fn remove_uncommitted(&self, id: &DatasetId) -> Result<(), StoreError> {
        let (keys, first) = (self.store.list(&keys::dataset(id)).await?, keys::round(id, 1));
        if keys.is_empty() || keys.contains(&first) { Ok(()) } else { self.remove(id).await }
    }
}
