//! What people decide about a dataset later: pausing it, finishing it with what it has, its share of the workers.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use proto::control::{Control, Decision, Priority};
use proto::round::Cause;
use proto::{DatasetId, ShardId, Stored, keys};
use tracing::info;

use super::{Dataset, Datasets, Stage};
use crate::error::Error;
use crate::store::{Created, Store, nonce, wall_millis};

/// Shards that are closed before leases are looked at again.
const CLOSED_AT_ONCE: usize = 256;

/// All decisions about one dataset.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Controls {
    /// How many there are.
    count: u32,
    pub(crate) paused: bool,
    pub(crate) priority: Priority,
    /// How many rounds are finished with what they have, and when, in milliseconds since 1970.
    finish: Option<(u32, u64)>,
}

impl Controls {
    /// Reads them.
    pub(super) async fn read(store: &Store, id: &DatasetId) -> anyhow::Result<Self> {
        let mut controls = Self::default();
        for (key, json) in store.get_all(store.list(&keys::controls(id)).await?).await? {
            controls.take(Control::from_json(&json).with_context(|| key)?.decision);
        }
        Ok(controls)
    }

    fn take(&mut self, decision: Decision) {
        self.count += 1;
        match decision {
            Decision::Pause => self.paused = true,
            Decision::Resume => self.paused = false,
            Decision::Finish { rounds, at_millis } => self.finish = Some((rounds, at_millis)),
            Decision::Priority(priority) => self.priority = priority,
        }
    }

    /// Whether the decision changes anything.
    fn is_news(&self, decision: Decision) -> bool {
        match decision {
            Decision::Pause => !self.paused,
            Decision::Resume => self.paused,
            // What is to be finished at once already is not made to wait.
            Decision::Finish { rounds, .. } => self.finish.is_none_or(|(of, at)| of < rounds || at > wall_millis()),
            Decision::Priority(priority) => self.priority != priority,
        }
    }
}

impl Dataset {
    /// In how long it is finished with what it has; None: it is not, or somebody has asked for another round since.
    pub(crate) fn finishes_after(&self) -> Option<Duration> {
        let (rounds, at) = self.controls.finish?;
        let asked_again = self.rounds.iter().skip(rounds as usize).any(|round| round.cause == Cause::Request);
        (!asked_again).then(|| Duration::from_millis(at.saturating_sub(wall_millis())))
    }

    /// Whether nothing more of it is fetched.
    pub(super) fn is_finished(&self) -> bool {
        self.finishes_after() == Some(Duration::ZERO)
    }
}

impl Datasets {
    /// Makes a decision about the dataset of that name, which outlives this coordinator.
    pub(crate) async fn control(self: &Arc<Self>, name: &str, wanted: Wanted) -> Result<(), Error> {
        let (dataset, _) = self.find(name)?;
        let _name = self.lock_name(dataset.id.name()).await;
        let (dataset, _) = self.find(name)?;
        let id = &dataset.id;
        let decision = match wanted {
            Wanted::Decision(decision) => decision,
            // Sealing may open another round, which is not fetched then; and a repeated call finds what the first has
            // done.
            Wanted::FinishAfter(_) if !matches!(dataset.stage, Stage::Fetching | Stage::Sealing) => {
                if dataset.is_finished() {
                    return Ok(());
                }
                let stage = dataset.stage.name();
                return Err(Error::Precondition(format!("dataset {name:?} is {stage}: there is nothing to finish")));
            }
            Wanted::FinishAfter(after) => Decision::Finish {
                rounds: dataset.rounds.len() as u32,
                at_millis: wall_millis().saturating_add(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
            },
        };
        if !dataset.controls.is_news(decision) {
            return Ok(());
        }
        self.term.check(&self.store).await?;
        let control = Control { format: 1, nonce: nonce(), at_millis: wall_millis(), decision };
        let number = dataset.controls.count + 1;
        if let Created::Lost(_) = self.store.create(&keys::control(id, number), &control).await? {
            return Err(Error::Aborted(format!("another coordinator has decided something about {id}: ask that one")));
        }
        info!(dataset = &**id, ?decision, "decided");
        let mut state = self.state();
        let state = &mut *state;
        if let Some(dataset) = state.live.get_mut(id) {
            dataset.controls.take(decision);
            dataset.revision += 1;
            state.ledger.control(id, dataset.controls.priority.weight(), dataset.controls.paused);
        }
        self.free.notify_waiters();
        Ok(())
    }

    /// Shards of finished datasets that nobody makes: they are to be closed.
    pub(super) fn take_finished(&self) -> Vec<ShardId> {
        let mut state = self.state();
        let state = &mut *state;
        let finished = state.live.values().filter(|dataset| matches!(dataset.stage, Stage::Fetching));
        let finished = finished.filter(|dataset| dataset.is_finished());
        finished.flat_map(|dataset| state.ledger.take_waiting(&dataset.id, CLOSED_AT_ONCE)).collect()
    }
}

/// What somebody wants.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wanted {
    Decision(Decision),
    FinishAfter(Duration),
}
