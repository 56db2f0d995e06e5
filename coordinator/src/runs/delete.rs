//! The end of a run that nobody needs any more: a tombstone, then everything under it; and of datasets that no run
//! needs.

use std::sync::Arc;
use std::time::Duration;

use proto::keys;
use proto::tombstone::Tombstone;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{Request, Runs};
use crate::error::Error;
use crate::store::{StoreError, nonce, wall_millis};

/// For so long after the end of a run its agents may still write logs and points of the curve.
pub(super) const LATE_WRITES: Duration = Duration::from_secs(15);

/// Between two tries to remove a run's objects.
const REMOVE_PAUSE: Duration = Duration::from_secs(5);

impl Runs {
    /// Deletes an ended run. Returns when its objects are gone and its name is free.
    pub(crate) async fn delete(self: &Arc<Self>, name: &str) -> Result<(), Error> {
        let mut removed = {
            let _one = self.changing.lock().await;
            let under_way = self.lock().deleting.get(name).cloned();
            match under_way {
                Some(removed) => removed,
                None => self.bury(name).await?,
            }
        };
        // An error says that the sender was dropped.
        while removed.changed().await.is_ok() {}
        Ok(())
    }

    async fn bury(self: &Arc<Self>, name: &str) -> Result<watch::Receiver<()>, Error> {
        let late = {
            let inner = self.lock();
            let (Some(run), Some(record)) = (inner.roster.find(name), inner.records.get(name)) else {
                return Err(inner.no_run(name));
            };
            if !run.phase.is_over() {
                let advice = format!("cancel it first: gleaner run cancel {name}");
                return Err(Error::Precondition(format!("run {name:?} has not ended; {advice}")));
            }
            let ended = record.events.last().map_or(0, |event| event.at_millis);
            LATE_WRITES.saturating_sub(Duration::from_millis(wall_millis().saturating_sub(ended)))
        };
        self.term.check(&self.store).await?;
        let tombstone = Tombstone { format: 1, nonce: nonce(), at_millis: wall_millis() };
        self.store.create(&keys::run_tombstone(name), &tombstone).await?;
        let removed = self.remove(name, late);
        self.request(name, Request::Delete).await?;
        info!(run = name, "run deleted");
        Ok(removed)
    }

    /// Removes everything under a run in the background, and once more after `late` what was still written then; its
    /// tombstone last. The name is taken until then.
    pub(super) fn remove(self: &Arc<Self>, name: &str, late: Duration) -> watch::Receiver<()> {
        let (done, removed) = watch::channel(());
        self.lock().deleting.insert(name.to_owned(), removed.clone());
        let (this, name) = (Arc::clone(self), name.to_owned());
        tokio::spawn(async move {
            while let Err(error) = this.remove_objects(&name, late).await {
                warn!(run = name, %error, "cannot remove all objects of a deleted run, trying again");
                tokio::time::sleep(REMOVE_PAUSE).await;
            }
            this.lock().deleting.remove(&name);
            drop(done);
        });
        removed
    }

    async fn remove_objects(&self, name: &str, late: Duration) -> Result<(), StoreError> {
        let tombstone = keys::run_tombstone(name);
        for pause in [Duration::ZERO, late] {
            tokio::time::sleep(pause).await;
            let mut keys = self.store.list(&keys::run(name)).await?;
            keys.retain(|key| *key != tombstone);
            self.store.delete_all(keys).await?;
        }
        self.store.delete_all(vec![tombstone]).await
    }

    /// Deletes a dataset, unless a run that has not ended reads it.
    pub(crate) async fn delete_dataset(&self, name: &str) -> Result<(), Error> {
        // No run can begin meanwhile.
        let _one = self.changing.lock().await;
        let (dataset, _) = self.datasets.find(name)?;
        let reader =
            self.lock().roster.live.values().find(|run| *run.dataset() == *dataset.id).map(|run| run.name.clone());
        if let Some(run) = reader {
            return Err(Error::Precondition(format!(
                "dataset {name:?} is in use by run {run:?}, which has not ended; wait for it (gleaner run wait {run}) or end it \
                 (gleaner run cancel {run})"
            )));
        }
        self.datasets.delete(name).await
    }
}
