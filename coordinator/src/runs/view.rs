//! What readers see of the runs: people, the scaler, metrics.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use proto::metric::MetricKind;
use proto::pb;
use proto::run_event::RunEvent;

use super::{PARALLEL, Record, Runs};
use crate::error::Error;
use crate::metrics::{self, ClusterFigures, RunFigures};
use crate::roster::{Run, RunPhase};

/// How old the figures of the metrics may be.
const FIGURES_PERIOD: Duration = Duration::from_secs(1);

impl Runs {
    /// An error unless there is a run of that name.
    pub(crate) fn find(&self, name: &str) -> Result<(), Error> {
        let inner = self.lock();
        if inner.records.contains_key(name) { Ok(()) } else { Err(inner.no_run(name)) }
    }

    /// Whether the run has ended.
    pub(crate) fn is_over(&self, name: &str) -> bool {
        self.lock().roster.find(name).is_none_or(|run| run.phase.is_over())
    }

    /// The newest runs as people see them, at most `limit` if that is not 0.
    pub(crate) async fn list(&self, limit: usize) -> Result<Vec<pb::Run>, Error> {
        let names = {
            let inner = self.lock();
            let mut names: Vec<(Reverse<u64>, &String)> =
                inner.records.iter().map(|(name, record)| (Reverse(record.submitted()), name)).collect();
            names.sort();
            let most = if limit == 0 { names.len() } else { limit };
            names.into_iter().take(most).map(|(_, name)| name.clone()).collect::<Vec<_>>()
        };
        let runs = futures::stream::iter(names).map(|name| async move {
            match self.describe(&name).await {
                Ok(run) => Ok(Some(run)),
                // It was deleted meanwhile.
                Err(Error::NotFound(_)) => Ok(None),
                Err(error) => Err(error),
            }
        });
        runs.buffered(PARALLEL).try_filter_map(|run| async move { Ok(run) }).try_collect().await
    }

    /// The run as people see it.
    pub(crate) async fn describe(&self, name: &str) -> Result<pb::Run, Error> {
        self.load_curve(name).await?;
        let inner = self.lock();
        let (Some(run), Some(record)) = (inner.roster.find(name), inner.records.get(name)) else {
            return Err(inner.no_run(name));
        };
        let reason = match &run.phase {
            RunPhase::Failed(reason) => reason.clone(),
            RunPhase::Waiting | RunPhase::Forming(_) => run.reason.clone(),
            _ => String::new(),
        };
        Ok(pb::Run {
            run: name.to_owned(),
            state: run.state().into(),
            reason,
            spec_json: run.spec.to_json(),
            dataset: run.spec.dataset.clone(),
            manifest_version: run.spec.manifest.unwrap_or(0),
            generation: run.generation,
            world_size: run.world,
            epochs: run.spec.train.epochs.into(),
            steps_per_epoch: run.steps_per_epoch,
            step: run.step,
            last_step: record.curve.newest(MetricKind::Step),
            last_validation: record.curve.newest(MetricKind::Validation),
            test: record.curve.newest(MetricKind::Test),
            checkpoint_step: newest_checkpoint(run),
            best_checkpoint_step: run.best().map_or(0, |checkpoint| checkpoint.step),
            submitted_millis: record.submitted(),
            began_millis: run.began.unwrap_or(0),
            ended_millis: if run.phase.is_over() { record.events.last().map_or(0, |event| event.at_millis) } else { 0 },
            events: record.events.iter().filter_map(|event| serde_json::to_string(event).ok()).collect(),
        })
    }

    /// The folder of a done run's model, and the digests of its files by name.
    pub(crate) fn model(&self, name: &str) -> Result<(String, BTreeMap<String, String>), Error> {
        let inner = self.lock();
        let record = inner.records.get(name).ok_or_else(|| inner.no_run(name))?;
        let done = record.events.iter().rev().find_map(|record| match &record.event {
            RunEvent::Done { model, digests } => Some((model.clone(), digests.clone())),
            _ => None,
        });
        done.ok_or_else(|| Error::Precondition(format!("run {name:?} is not done: a model is written at its end")))
    }

    /// Devices that runs which have not ended would take, all together.
    pub(crate) fn devices_wanted(&self) -> u64 {
        let inner = self.lock();
        let runs = inner.roster.live.values().filter(|run| !run.cancelling);
        runs.map(|run| u64::from(run.spec.ranks.max)).sum()
    }

    /// How many runs are in this state.
    pub(crate) fn count(&self, state: pb::RunState) -> u64 {
        self.lock().roster.all().filter(|run| run.state() == state).count() as u64
    }

    /// Connected agents with what is on their devices.
    pub(crate) fn agents(&self) -> Vec<pb::AgentStatus> {
        let inner = self.lock();
        let device = |device: &crate::roster::Device| pb::DeviceStatus {
            device: device.name.clone(),
            occupant: device.occupant.as_ref().map_or_else(String::new, |o| format!("{}/{}", o.run, o.rank)),
        };
        let agents = inner.roster.agents.iter().filter(|(_, agent)| agent.connected);
        let agents = agents.map(|(name, agent)| pb::AgentStatus {
            agent: name.clone(),
            address: agent.address.clone(),
            devices: agent.devices.iter().map(device).collect(),
        });
        agents.collect()
    }

    /// Keeps the cluster's metrics up to date.
    pub(crate) async fn watch_figures(self: Arc<Self>) {
        let mut shown = metrics::Shown::default();
        let mut clock = tokio::time::interval(FIGURES_PERIOD);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            clock.tick().await;
            shown.show(self.figures());
        }
    }

    fn figures(&self) -> ClusterFigures {
        use pb::RunState::{Cancelled, Cancelling, Done, Failed, Running, Waiting};
        let shards = self.datasets.totals();
        let devices: Vec<bool> = self.agents().iter().flat_map(|agent| &agent.devices).map(is_free).collect();
        let names = [
            ("waiting", Waiting),
            ("running", Running),
            ("cancelling", Cancelling),
            ("done", Done),
            ("failed", Failed),
            ("cancelled", Cancelled),
        ];
        ClusterFigures {
            term: self.term.number(),
            shards_waiting: shards.waiting.into(),
            shards_leased: shards.leased.into(),
            datasets: self.datasets.stages(),
            troubles: self.datasets.troubles_by_kind(),
            workers: self.datasets.workers().len() as u64,
            devices_free: devices.iter().filter(|free| **free).count() as u64,
            devices_taken: devices.iter().filter(|free| !**free).count() as u64,
            devices_wanted: self.devices_wanted(),
            runs_by_state: names.into_iter().map(|(name, state)| (name, self.count(state))).collect(),
            runs: self.run_figures(),
        }
    }

    fn run_figures(&self) -> Vec<RunFigures> {
        let inner = self.lock();
        let figures = inner.roster.live.values().map(|run| RunFigures {
            run: run.name.clone(),
            step: run.step,
            checkpoint: newest_checkpoint(run),
            generation: run.generation,
            ranks: run.world,
            newest: inner.records.get(&run.name).map_or_else(Vec::new, |record| record.curve.newest_of_each()),
        });
        figures.collect()
    }
}

impl Record {
    /// When it was submitted, in milliseconds since 1970; 0 if no event of it is written yet.
    fn submitted(&self) -> u64 {
        self.events.first().map_or(0, |event| event.at_millis)
    }
}

fn is_free(device: &pb::DeviceStatus) -> bool {
    device.occupant.is_empty()
}

fn newest_checkpoint(run: &Run) -> u64 {
    run.checkpoints.last().map_or(0, |checkpoint| checkpoint.step)
}
