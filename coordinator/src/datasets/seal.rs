//! Sealing, once all shards of a dataset are committed, and what it leaves to sweep.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder;
use bytes::Bytes;
use futures::{FutureExt, TryStreamExt};
use proto::manifest::Manifest;
use proto::pb::FailureKind;
use proto::{Attempt, DatasetId, DatasetSpec, Split, keys};
use tracing::{error, info, warn};

use super::rounds::short;
use super::{Dataset, Datasets, Stage};
use crate::damage;
use crate::error::Error;
use crate::ledger::Counts;
use crate::manifest::{SealError, Sealing, seal};
use crate::store::StoreError;

/// Between two tries to seal, which read the whole dataset: the first, and the longest.
const SEAL_PAUSES: [Duration; 2] =
    if cfg!(test) { [Duration::from_millis(5); 2] } else { [Duration::from_secs(5), Duration::from_secs(300)] };

impl Datasets {
    /// Lets nothing be sealed any more: a simulation that only counts has no rows.
    #[cfg(test)]
    pub(crate) fn seal_nothing(&self) {
        self.sealing.close();
    }

    /// Tries once more to seal a dataset that has failed, unless its manifest names all.
    pub(crate) fn seal_again(self: &Arc<Self>, id: &DatasetId, accepts_damage: bool) {
        if let Some(dataset) = self.state().live.get_mut(id) {
            if !matches!(dataset.stage, Stage::Failed(_)) || dataset.unnamed_rounds().next().is_none() {
                return;
            }
            dataset.stage = Stage::Sealing;
            dataset.accepts_damage |= accepts_damage;
            dataset.revision += 1;
        }
        self.spawn_seal(id.clone());
    }

    pub(super) fn spawn_seal(self: &Arc<Self>, id: DatasetId) {
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let [first, longest] = SEAL_PAUSES;
            let pauses = backon::ExponentialBuilder::new().with_min_delay(first).with_max_delay(longest);
            let mut pauses = pauses.with_factor(2.0).without_max_times().build();
            let stage = loop {
                let sealed = {
                    let Ok(_permit) = this.sealing.acquire().await else { return };
                    // Of what a panic may have left half done, only what is in the store goes on.
                    let sealed = AssertUnwindSafe(this.seal_or_reopen(&id)).catch_unwind().await;
                    sealed.unwrap_or_else(|panic| Err(SealError::Broken(Error::panicked(&*panic))))
                };
                match sealed {
                    Ok(Some(stage)) => break stage,
                    Ok(None) => return,
                    Err(error) if error.is_final() => break Stage::Failed(error.to_string()),
                    Err(error) => {
                        warn!(dataset = &*id, %error, "cannot seal, trying again");
                        let text = format!("cannot seal: {error}");
                        this.state().failed(this.now(), FailureKind::Store, None, &id, text);
                    }
                }
                tokio::time::sleep(pauses.next().unwrap_or(longest)).await;
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

    /// Opens an automatic round if there is anything for it. If not, makes the manifest, unless the latest one names
    /// all; if that shows that classes are short, opens what was left of them. None: shards are open (again), or the
    /// dataset is gone.
    async fn seal_or_reopen(self: &Arc<Self>, id: &DatasetId) -> Result<Option<Stage>, SealError> {
        let dataset = {
            let state = self.state();
            let Some(dataset) = state.live.get(id) else { return Ok(None) };
            if state.ledger.counts(id) != Counts::default() {
                return Ok(None);
            }
            dataset.clone()
        };
        let latest = dataset.manifest.clone().filter(|manifest| manifest.rounds as usize >= dataset.rounds.len());
        let manifest = match latest {
            Some(manifest) => manifest,
            None if !dataset.is_finished() && self.open_automatic(&dataset).await.map_err(SealError::Round)? => {
                return Ok(None);
            }
            None => Arc::new(self.seal(&dataset).await?),
        };
        if let Some(dataset) = self.state().live.get_mut(id) {
            dataset.sealed(Arc::clone(&manifest));
        }
        let short = short(&manifest, dataset.spec.per_class);
        if !short.is_empty() && !dataset.is_finished() {
            let dataset = Dataset { manifest: Some(Arc::clone(&manifest)), ..dataset };
            let opened = self.open_short(&dataset, short).await;
            if opened.map_err(SealError::Round)? {
                return Ok(None);
            }
        }
        Ok(Some(outcome(&manifest)))
    }

    async fn seal(&self, dataset: &Dataset) -> Result<Manifest, SealError> {
        let sealing = Sealing {
            dataset: dataset.id.clone(),
            version: self.latest_version(&dataset.id).await? + 1,
            rounds: dataset.rounds.to_vec(),
            folder: self.folder.clone(),
            tolerance: dataset.tolerance(),
            spec: DatasetSpec::clone(&dataset.spec),
            base: dataset.manifest.clone(),
        };
        let (store, handle) = (self.store.clone(), tokio::runtime::Handle::current());
        let sealed = tokio::task::spawn_blocking(move || seal(&handle, &store, &sealing)).await;
        sealed.unwrap_or_else(|error| Err(SealError::Broken(error.into())))
    }

    /// Removes the files of attempts whose shard has an index that names another attempt, and the slices of rounds that
    /// were never committed: those whose numbers lie between the ones that the catalog names. (Behind them, a round may
    /// be on its way.)
    async fn sweep(&self, id: &DatasetId) -> Result<(), StoreError> {
        let Ok((dataset, _)) = self.find(id) else { return Ok(()) };
        let named: HashSet<u32> = dataset.shards().into_iter().collect();
        let last = dataset.rounds.last().map_or(0, |round| round.first_slice);
        let mut slices = self.store.list(&keys::slices(id)).await?;
        slices.retain(|key| {
            keys::number(key).is_ok_and(|n| u32::try_from(n).is_ok_and(|n| n < last && !named.contains(&n)))
        });
        self.store.delete_all(slices).await?;
        // What the manifest names is the winner's. Of other files, the index knows.
        let shards = dataset.manifest.iter().flat_map(|manifest| &manifest.shards);
        let sealed = shards.filter_map(|shard| keys::attempt_of(&shard.outcomes.as_ref()?.key).ok());
        let sealed: HashMap<u32, Attempt> = sealed.collect();
        let mut folders = vec![keys::outcomes_of(id)];
        folders.extend(Split::ALL.map(|split| keys::tars(id, split)));
        for folder in folders {
            let others = self.store.list(&folder).await?.into_iter().filter_map(|key| {
                let (shard, attempt) = keys::attempt_of(&key).ok()?;
                (sealed.get(&shard) != Some(&attempt)).then_some((key, shard, attempt))
            });
            let others: Vec<(String, u32, Attempt)> = others.collect();
            let shards: BTreeSet<u32> = others.iter().map(|(_, shard, _)| *shard).collect();
            let indexes = self.store.get_each(shards.into_iter().map(|shard| keys::index(&id.shard(shard))).collect());
            // Of one that is damaged nobody knows which attempt has won.
            let winner = |(key, json): (String, Bytes)| {
                let of = id.shard(keys::number(&key).ok()?.try_into().ok()?);
                let index = damage::parse_index(&of, &json).ok()?;
                Some((index.shard, index.attempt))
            };
            let winners: HashMap<u32, Attempt> =
                indexes.try_filter_map(|found| async move { Ok(winner(found)) }).try_collect().await?;
            let is_lost = |(_, shard, attempt): &(String, u32, Attempt)| {
                winners.get(shard).is_some_and(|winner| winner != attempt)
            };
            let garbage: Vec<String> = others.into_iter().filter(is_lost).map(|(key, ..)| key).collect();
            if !garbage.is_empty() {
                info!(dataset = &**id, folder, objects = garbage.len(), "removing what lost attempts left");
                self.store.delete_all(garbage).await?;
            }
        }
        Ok(())
    }
}

/// What a dataset comes to with a manifest that names all of it.
pub(super) fn outcome(manifest: &Manifest) -> Stage {
    if manifest.samples(Split::Train) > 0 {
        return Stage::Ready;
    }
    let counts = manifest.outcomes.by_name().into_iter().map(|(outcome, urls)| format!("{outcome} {urls}"));
    let counts: Vec<String> =
        counts.chain(manifest.skipped.iter().map(|(skip, n)| format!("{} {n}", skip.name()))).collect();
    Stage::Failed(format!("no training image is left: of the dataset's URLs came {}", counts.join(", ")))
}
