//! The runs: their stored history, the agents' connections, and the one task that feeds the roster and does what it says.
//!
//! `submit` makes new ones; `history` reads and removes what ranks have stored.

mod history;
mod submit;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use proto::pb::{self, agent_message, coordinator_message::Message, rank_message};
use proto::run_event::{EventRecord, RunEvent};
use proto::{RunSpec, keys};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;
use tracing::{error, info, warn};

use crate::datasets::Datasets;
use crate::error::Error;
use crate::metrics::RunFigures;
use crate::roster::{Action, Now, Roster, Run, Sources};
use crate::store::{Created, Store, StoreError, nonce, wall_millis};
use crate::term::Term;

/// How often the roster is asked what time calls for.
const TICK: Duration = Duration::from_millis(100);

/// Between two tries to write an event, when the store fails.
const WRITE_PAUSE: Duration = Duration::from_secs(1);

/// Runs that are recovered at the same time.
const PARALLEL: usize = 8;

/// `runs/<run>/spec.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredRun {
    nonce: String,
    /// The caller's: a repeated request finds it here.
    request_id: String,
    /// `<name>-<uid>`.
    dataset: String,
    manifest_key: String,
    manifest_sha256: String,
    /// As the manifest's training images and the spec's batch make it.
    steps_per_epoch: u64,
    /// Whose weights it begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    start: Option<submit::Start>,
    /// The span of the request that submitted it, if that was exported; see [`proto::trace`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    traceparent: String,
    spec: RunSpec,
}

impl StoredRun {
    fn sources(&self) -> Sources {
        Sources {
            manifest: (self.manifest_key.clone(), self.manifest_sha256.clone()),
            start: self.start.as_ref().map(submit::Start::checkpoint),
            traceparent: self.traceparent.clone(),
        }
    }
}

/// What belongs to a run beside its place in the roster.
#[derive(Debug, Clone, Default)]
struct Record {
    request_id: String,
    events: Vec<EventRecord>,
    points: Vec<pb::Metric>,
    /// Whether the points that an earlier coordinator heard have been read from the store.
    loaded: bool,
}

/// Where an agent's messages go.
pub(crate) type Outgoing = mpsc::Sender<Result<pb::CoordinatorMessage, Status>>;

enum Input {
    Hello { hello: pb::Hello, connection: u64, outgoing: Outgoing },
    Gone { agent: String, connection: u64 },
    Said { agent: String, connection: u64, message: agent_message::Message },
    Submit { name: String, run: Box<Run>, submitted: RunEvent, request_id: String, done: oneshot::Sender<()> },
    Cancel { name: String, done: oneshot::Sender<()> },
    Resume { name: String, request_id: String, done: oneshot::Sender<()> },
}

#[derive(Default)]
struct State {
    roster: Roster,
    records: BTreeMap<String, Record>,
    connections: HashMap<String, (u64, Outgoing)>,
}

/// All runs of the store.
pub(crate) struct Runs {
    pub(crate) store: Store,
    pub(crate) term: Arc<Term>,
    pub(crate) datasets: Arc<Datasets>,
    started: Instant,
    state: Mutex<State>,
    inputs: mpsc::Sender<Input>,
    submitting: Arc<tokio::sync::Mutex<()>>,
}

impl Runs {
    /// All runs as the store tells them, and the task that drives them, which ends when it is dropped.
    pub(crate) async fn recover(
        store: Store,
        term: Arc<Term>,
        datasets: Arc<Datasets>,
    ) -> anyhow::Result<(Arc<Self>, impl Future<Output = ()> + Send + use<>)> {
        let (inputs, receiver) = mpsc::channel(1024);
        let started = Instant::now();
        let submitting = Arc::default();
        let runs = Arc::new(Self { store, term, datasets, started, state: Mutex::default(), inputs, submitting });
        let names = runs.store.folders(keys::RUNS).await?;
        let mut found: Vec<(String, StoredRun, Vec<EventRecord>)> = futures::stream::iter(names)
            .map(|name| {
                let runs = Arc::clone(&runs);
                async move { runs.recover_one(name).await }
            })
            .buffered(PARALLEL)
            .try_filter_map(|found| async move { Ok(found) })
            .try_collect()
            .await?;
        let queued = |events: &[EventRecord]| {
            let is =
                |event: &&EventRecord| matches!(event.event, RunEvent::Submitted { .. } | RunEvent::Resumed { .. });
            events.iter().rfind(is).map(|event| event.at_millis)
        };
        found.sort_by_key(|(_, _, events)| queued(events));
        for (name, stored, events) in found {
            let sources = stored.sources();
            let run = Run::recovered(runs.now(), stored.spec, sources, stored.steps_per_epoch, &events);
            info!(run = name, state = ?run.state(), events = events.len(), "run recovered");
            let mut state = runs.state();
            state.roster.add(name.clone(), run);
            let request_id = stored.request_id;
            state.records.insert(name, Record { request_id, events, ..Record::default() });
        }
        let drive = Arc::clone(&runs).drive(receiver);
        Ok((runs, drive))
    }

    async fn recover_one(&self, name: String) -> Result<Option<(String, StoredRun, Vec<EventRecord>)>, StoreError> {
        let Some(json) = self.store.get(&keys::run_spec(&name)).await? else { return Ok(None) };
        let events = self.store.get_all(self.store.list(&keys::events(&name)).await?).await?;
        let parse = || {
            let events = events.iter().map(|(_, json)| serde_json::from_slice(json)).collect::<Result<_, _>>()?;
            Ok::<_, serde_json::Error>((name.clone(), serde_json::from_slice(&json)?, events))
        };
        match parse() {
            Ok(found) => Ok(Some(found)),
            // One broken run must not keep the cluster from starting.
            Err(error) => {
                error!(run = name, %error, "run cannot be read; it is left out");
                Ok(None)
            }
        }
    }

    fn now(&self) -> Now {
        Now { at: self.started.elapsed(), wall: wall_millis() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one task that changes the roster: what it decides is done, in order, before the next input is looked at.
    async fn drive(self: Arc<Self>, mut inputs: mpsc::Receiver<Input>) {
        let mut clock = tokio::time::interval(TICK);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ticked = self.now().at;
        loop {
            // Inputs first: silence is judged only when everything that was said has been heard.
            tokio::select! {
                biased;
                Some(input) = inputs.recv() => self.take(input).await,
                _ = clock.tick() => {
                    let now = self.now();
                    let actions = {
                        let mut state = self.state();
                        // If this process itself was held up, nobody else was silent.
                        state.roster.excuse(now, (now.at - ticked).saturating_sub(2 * TICK));
                        state.roster.tick(now)
                    };
                    ticked = now.at;
                    self.perform(actions).await;
                }
            }
        }
    }

    async fn take(&self, input: Input) {
        let now = self.now();
        match input {
            Input::Hello { hello, connection, outgoing } => {
                info!(
                    agent = hello.agent,
                    devices = hello.devices.len(),
                    occupied = hello.occupied.len(),
                    "agent connected"
                );
                let actions = {
                    let mut state = self.state();
                    state.connections.insert(hello.agent.clone(), (connection, outgoing));
                    state.roster.hello(now, &hello)
                };
                self.perform(actions).await;
            }
            Input::Gone { agent, connection } => {
                let mut state = self.state();
                if state.connections.get(&agent).is_some_and(|(current, _)| *current == connection) {
                    info!(agent, "agent disconnected");
                    state.connections.remove(&agent);
                    state.roster.disconnected(&agent);
                }
            }
            Input::Said { agent, connection, message } => {
                let actions = {
                    let mut state = self.state();
                    if state.connections.get(&agent).is_none_or(|(current, _)| *current != connection) {
                        return;
                    }
                    match &message {
                        agent_message::Message::Heartbeat(beat) => {
                            state.roster.heartbeat(now, &agent, beat);
                            vec![Action::Send {
                                agent: agent.clone(),
                                message: Message::HeartbeatAck(pb::HeartbeatAck {}),
                            }]
                        }
                        agent_message::Message::Serving(serving) => state.roster.serving(now, &agent, serving),
                        agent_message::Message::Rank(said) => {
                            state.hear(said);
                            state.roster.rank(now, &agent, said)
                        }
                        agent_message::Message::Hello(_) => Vec::new(),
                    }
                };
                self.perform(actions).await;
            }
            Input::Submit { name, run, submitted, request_id, done } => {
                self.state().records.insert(name.clone(), Record { request_id, loaded: true, ..Record::default() });
                self.write(&name, submitted).await;
                self.state().roster.add(name, *run);
                let actions = self.state().roster.tick(now);
                let _ = done.send(());
                self.perform(actions).await;
            }
            Input::Cancel { name, done } => {
                let actions = self.state().roster.cancel(now, &name);
                self.perform(actions).await;
                let _ = done.send(());
            }
            Input::Resume { name, request_id, done } => {
                let actions = self.state().roster.resume(&name, request_id);
                self.perform(actions).await;
                let _ = done.send(());
            }
        }
    }

    async fn perform(&self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Write { run, event } => self.write(&run, event).await,
                Action::Send { agent, message } => {
                    let outgoing = self.state().connections.get(&agent).map(|(_, outgoing)| outgoing.clone());
                    let message = pb::CoordinatorMessage { message: Some(message) };
                    // An agent that is away says what it has when it comes back.
                    if outgoing.is_some_and(|outgoing| outgoing.try_send(Ok(message)).is_err()) {
                        warn!(agent, "agent does not take its messages");
                        self.state().connections.remove(&agent);
                        self.state().roster.disconnected(&agent);
                    }
                }
            }
        }
    }

    /// Puts the run's next event. Nothing may be done that is not written, so it tries until it can.
    async fn write(&self, run: &str, event: RunEvent) {
        let n = self.state().records.get(run).map_or(1, |record| record.events.len() as u64 + 1);
        let record = EventRecord { n, term: self.term.number, nonce: nonce(), at_millis: wall_millis(), event };
        let json = match serde_json::to_vec(&record) {
            Ok(json) => bytes::Bytes::from(json),
            Err(error) => return self.term.end(format!("an event of run {run} cannot be encoded: {error}")),
        };
        loop {
            match self.store.create(&keys::event(run, n), json.clone(), &record.nonce).await {
                Ok(Created::Won) => break,
                Ok(Created::Lost(_)) => {
                    self.term.end(format!("another coordinator has written event {n} of run {run}"));
                    // The process ends; whatever was decided must not be done.
                    return std::future::pending().await;
                }
                Err(error) => {
                    warn!(run, n, %error, "cannot write an event, trying again");
                    tokio::time::sleep(WRITE_PAUSE).await;
                }
            }
        }
        info!(run, n, event = %String::from_utf8_lossy(&json), "run event");
        let made = match &record.event {
            RunEvent::Checkpoint { key, .. } => keys::checkpoint_of(run, key).ok(),
            _ => None,
        };
        self.state().records.entry(run.to_owned()).or_default().events.push(record);
        if let Some(made) = made {
            self.forget_checkpoints(run, made);
        }
    }

    async fn input(&self, input: Input, told: oneshot::Receiver<()>) -> Result<(), Error> {
        let ending = |()| Error::Local("this coordinator is ending".to_owned());
        self.inputs.send(input).await.map_err(|_| ending(()))?;
        told.await.map_err(|_| ending(()))
    }

    /// Asks for the end of a run.
    pub(crate) async fn cancel(&self, name: &str) -> Result<(), Error> {
        self.find(name)?;
        let (done, told) = oneshot::channel();
        self.input(Input::Cancel { name: name.to_owned(), done }, told).await
    }

    /// Queues an ended run again.
    pub(crate) async fn resume(&self, name: &str, request_id: String) -> Result<(), Error> {
        if request_id.is_empty() {
            return Err(Error::Invalid("request_id is empty".to_owned()));
        }
        let _one = self.submitting.lock().await;
        self.find(name)?;
        {
            let state = self.state();
            let same = |record: &EventRecord| matches!(&record.event, RunEvent::Resumed { request_id: id } if *id == request_id);
            if state.records.get(name).is_some_and(|record| record.events.iter().any(same)) {
                return Ok(());
            }
            match state.roster.runs.get(name).map(Run::state) {
                Some(pb::RunState::Cancelled | pb::RunState::Failed) => {}
                Some(pb::RunState::Done) => return Err(Error::Precondition(format!("run {name:?} is done"))),
                _ => return Err(Error::Precondition(format!("run {name:?} has not ended"))),
            }
        }
        let (done, told) = oneshot::channel();
        self.input(Input::Resume { name: name.to_owned(), request_id, done }, told).await
    }

    /// An error unless there is a run of that name.
    pub(crate) fn find(&self, name: &str) -> Result<(), Error> {
        let known = self.state().records.contains_key(name);
        if known { Ok(()) } else { Err(Error::NotFound(format!("no run is called {name:?}"))) }
    }

    /// Whether the run has ended.
    pub(crate) fn ended(&self, name: &str) -> bool {
        use pb::RunState::{Cancelled, Done, Failed};
        self.state().roster.runs.get(name).is_none_or(|run| matches!(run.state(), Cancelled | Done | Failed))
    }

    /// Names of all runs.
    pub(crate) fn names(&self) -> Vec<String> {
        self.state().records.keys().cloned().collect()
    }

    /// The run as people see it.
    pub(crate) async fn describe(&self, name: &str) -> Result<pb::Run, Error> {
        self.load(name).await?;
        let state = self.state();
        let (Some(run), Some(record)) = (state.roster.runs.get(name), state.records.get(name)) else {
            return Err(Error::NotFound(format!("no run is called {name:?}")));
        };
        let newest = |kind: &str| record.points.iter().rfind(|point| point.kind == kind).cloned();
        let reason = match &run.phase {
            crate::roster::Phase::Ended(crate::roster::End::Failed(reason)) => reason.clone(),
            crate::roster::Phase::Waiting => run.reason.clone(),
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
            last_step: newest("step"),
            last_validation: newest("validation"),
            test: newest("test"),
            checkpoint_step: run.checkpoints.last().map_or(0, |checkpoint| checkpoint.step),
            best_checkpoint_step: run.best().map_or(0, |checkpoint| checkpoint.step),
            events: record.events.iter().filter_map(|event| serde_json::to_string(event).ok()).collect(),
        })
    }

    /// The folder of a done run's model, and the digests of its files by name.
    pub(crate) async fn model(&self, name: &str) -> Result<(String, BTreeMap<String, String>), Error> {
        self.load(name).await?;
        let state = self.state();
        let record = state.records.get(name).ok_or_else(|| Error::NotFound(format!("no run is called {name:?}")))?;
        let done = record.events.iter().rev().find_map(|record| match &record.event {
            RunEvent::Done { model, digests } => Some((model.clone(), digests.clone())),
            _ => None,
        });
        done.ok_or_else(|| Error::Precondition(format!("run {name:?} is not done: a model is written at its end")))
    }

    /// A new stream of an agent; the number tells it from later ones.
    pub(crate) async fn connect(&self, hello: pb::Hello, connection: u64, outgoing: Outgoing) {
        // The task that takes them ends only with the process.
        let _ = self.inputs.send(Input::Hello { hello, connection, outgoing }).await;
    }

    /// What an agent says.
    pub(crate) async fn said(&self, agent: &str, connection: u64, message: agent_message::Message) {
        let _ = self.inputs.send(Input::Said { agent: agent.to_owned(), connection, message }).await;
    }

    /// The end of an agent's stream.
    pub(crate) async fn gone(&self, agent: &str, connection: u64) {
        let _ = self.inputs.send(Input::Gone { agent: agent.to_owned(), connection }).await;
    }

    /// Devices that runs which have not ended would take, all together.
    pub(crate) fn devices_wanted(&self) -> u64 {
        use pb::RunState::{Running, Waiting};
        let state = self.state();
        let runs = state.roster.runs.values().filter(|run| matches!(run.state(), Waiting | Running));
        runs.map(|run| u64::from(run.spec.ranks.max)).sum()
    }

    /// How many runs there are by state.
    pub(crate) fn states(&self) -> BTreeMap<&'static str, u64> {
        use pb::RunState::{Cancelled, Cancelling, Done, Failed, Running, Waiting};
        let state = self.state();
        let of = |wanted| state.roster.runs.values().filter(|run| run.state() == wanted).count() as u64;
        let names = [
            ("waiting", Waiting),
            ("running", Running),
            ("cancelling", Cancelling),
            ("done", Done),
            ("failed", Failed),
            ("cancelled", Cancelled),
        ];
        names.into_iter().map(|(name, wanted)| (name, of(wanted))).collect()
    }

    /// The figures of every run that has not ended.
    pub(crate) fn figures(&self) -> Vec<RunFigures> {
        let state = self.state();
        let going = state.roster.runs.iter().filter(|(_, run)| !matches!(run.phase, crate::roster::Phase::Ended(_)));
        let figures = going.map(|(name, run)| {
            let points = state.records.get(name).map_or(&[][..], |record| &record.points);
            let newest = |kind: &&str| points.iter().rfind(|point| point.kind == *kind).cloned();
            RunFigures {
                run: name.clone(),
                step: run.step,
                checkpoint: run.checkpoints.last().map_or(0, |checkpoint| checkpoint.step),
                generation: run.generation,
                ranks: run.world,
                newest: ["step", "train", "validation", "test"].iter().filter_map(newest).collect(),
            }
        });
        figures.collect()
    }

    /// Connected agents with what sits on their devices, then how many runs wait and how many run.
    pub(crate) fn status(&self) -> (Vec<pb::AgentStatus>, u64, u64) {
        let state = self.state();
        let device = |device: &crate::roster::Device| pb::DeviceStatus {
            device: device.name.clone(),
            occupant: device.occupant.as_ref().map_or_else(String::new, |o| format!("{}/{}", o.run, o.rank)),
        };
        let agents = state.roster.agents.iter().filter(|(_, agent)| agent.connected);
        let agents = agents.map(|(name, agent)| pb::AgentStatus {
            agent: name.clone(),
            address: agent.address.clone(),
            devices: agent.devices.iter().map(device).collect(),
        });
        let of = |wanted| state.roster.runs.values().filter(|run| run.state() == wanted).count() as u64;
        (agents.collect(), of(pb::RunState::Waiting), of(pb::RunState::Running))
    }
}

impl State {
    /// Keeps the points of the curve that rank 0 tells.
    fn hear(&mut self, said: &pb::RankMessage) {
        let Some(record) = self.records.get_mut(&said.run) else { return };
        let current = self.roster.runs.get(&said.run).is_some_and(|run| run.generation == said.generation);
        if let (Some(rank_message::Message::Stepped(stepped)), true, 0) = (&said.message, current, said.rank) {
            for point in &stepped.metrics {
                history::add_point(&mut record.points, point.clone());
            }
        }
    }
}
