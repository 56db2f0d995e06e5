//! The runs: their stored history, the agents' connections, and the one task that feeds the roster and does what it
//! says.
//!
//! `submit` makes new ones, with the `weights` that they begin with, `delete` removes them; `curve` and `history` hold
//! and read what ranks have measured and stored; `view` is what readers see.

mod curve;
mod delete;
mod history;
mod submit;
mod view;
mod weights;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use proto::pb::{self, agent_message, coordinator_message::Message, rank_message};
use proto::run_event::{EventRecord, RunEvent};
use proto::stored_run::{StartWeights, StoredRun};
use proto::{FormatError, Stored, keys};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tonic::Status;
use tracing::{error, info, warn};

use crate::datasets::Datasets;
use crate::error::Error;
use crate::roster::{Action, Now, Roster, Run, Sources};
use crate::store::{Created, Store, StoreError, nonce, wall_millis};
use crate::term::Term;
use curve::Curve;
use delete::LATE_WRITES;

/// How often the roster is asked what time calls for.
const TICK: Duration = Duration::from_millis(100);

/// Between two tries to write an event, when the store fails.
const WRITE_PAUSE: Duration = Duration::from_secs(1);

/// Runs that are read at the same time.
const PARALLEL: usize = 8;

fn sources(stored: &StoredRun) -> Sources {
    Sources {
        dataset: stored.dataset.to_string(),
        manifest_key: stored.manifest_key.clone(),
        manifest_sha256: stored.manifest_sha256.clone(),
        start: stored.start.as_ref().map(StartWeights::told),
        traceparent: stored.traceparent.clone(),
    }
}

/// What belongs to a run beside its place in the roster.
#[derive(Debug, Clone, Default)]
struct Record {
    request_id: String,
    /// Those that are written.
    events: Vec<EventRecord>,
    curve: Curve,
    /// Whether the points that an earlier coordinator heard have been read from the store.
    loaded: bool,
    /// When its curve was last summarised.
    summarised: Option<Instant>,
}

/// Where an agent's messages go.
pub(crate) type Outgoing = mpsc::Sender<Result<pb::CoordinatorMessage, Status>>;

/// What the driving task is told.
enum Input {
    Hello {
        hello: pb::Hello,
        connection: u64,
        outgoing: Outgoing,
    },
    Disconnected {
        agent: String,
        connection: u64,
    },
    AgentMessage {
        agent: String,
        connection: u64,
        message: agent_message::Message,
    },
    /// `done` is answered when the run has no event left to write.
    Request {
        run: String,
        request: Request,
        done: oneshot::Sender<()>,
    },
}

/// What somebody asks of a run.
enum Request {
    Submit {
        run: Box<Run>,
        submitted: RunEvent,
        request_id: String,
    },
    Cancel,
    /// Its tombstone is in the store.
    Delete,
    Resume {
        request_id: String,
        step: Option<u64>,
        epochs: Option<u32>,
    },
}

/// An agent's stream.
struct Connection {
    /// Tells it from later ones of the same agent.
    number: u64,
    outgoing: Outgoing,
}

#[derive(Default)]
struct Inner {
    roster: Roster,
    records: BTreeMap<String, Record>,
    connections: HashMap<String, Connection>,
    /// Runs whose objects are being removed, each until its sender is dropped.
    deleting: HashMap<String, watch::Receiver<()>>,
}

/// All runs of the store.
pub(crate) struct Runs {
    pub(crate) store: Store,
    pub(crate) term: Arc<Term>,
    pub(crate) datasets: Arc<Datasets>,
    started: Instant,
    inner: Mutex<Inner>,
    inputs: mpsc::Sender<Input>,
    /// Held by whoever submits, resumes or deletes.
    changing: Arc<tokio::sync::Mutex<()>>,
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
        let changing = Arc::default();
        let runs = Arc::new(Self { store, term, datasets, started, inner: Mutex::default(), inputs, changing });
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
            let sources = sources(&stored);
            let run = Run::recovered(runs.now(), &name, stored.spec, sources, stored.steps_per_epoch, &events);
            info!(run = name, state = ?run.state(), events = events.len(), "run recovered");
            let mut inner = runs.lock();
            inner.roster.add(run);
            let request_id = stored.request_id;
            inner.records.insert(name, Record { request_id, events, ..Record::default() });
        }
        let drive = Arc::clone(&runs).drive(receiver);
        Ok((runs, drive))
    }

    async fn recover_one(
        self: &Arc<Self>,
        name: String,
    ) -> Result<Option<(String, StoredRun, Vec<EventRecord>)>, StoreError> {
        if self.store.get(&keys::run_tombstone(&name)).await?.is_some() {
            self.remove(&name, LATE_WRITES);
            return Ok(None);
        }
        let Some(json) = self.store.get(&keys::run_spec(&name)).await? else { return Ok(None) };
        let events = self.store.get_all(self.store.list(&keys::events(&name)).await?).await?;
        let parse = || {
            let events = events.iter().map(|(_, json)| EventRecord::from_json(json)).collect::<Result<_, _>>()?;
            Ok::<_, FormatError>((name.clone(), StoredRun::from_json(&json)?, events))
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

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing under the lock can leave it half changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one task that changes the roster. It waits for nothing but its inputs: events are written beside it.
    async fn drive(self: Arc<Self>, mut inputs: mpsc::Receiver<Input>) {
        let mut writes: JoinSet<(String, EventRecord)> = JoinSet::new();
        let mut requests: Vec<(String, oneshot::Sender<()>)> = Vec::new();
        let mut clock = tokio::time::interval(TICK);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ticked = self.now().at;
        loop {
            // Inputs first: silence counts only when everything that arrived has been handled.
            let actions = tokio::select! {
                biased;
                Some(written) = writes.join_next() => match written {
                    Ok((run, record)) => self.written(&run, record),
                    Err(error) => return self.term.end(format!("an event was not written: {error}")),
                },
                Some(input) = inputs.recv() => self.handle(input, &mut requests),
                _ = clock.tick() => {
                    let now = self.now();
                    let mut inner = self.lock();
                    // If this process itself was held up, nobody else was silent.
                    inner.roster.discount_stall(now, (now.at - ticked).saturating_sub(2 * TICK));
                    ticked = now.at;
                    inner.roster.tick(now)
                }
            };
            self.perform(actions, &mut writes);
            let inner = self.lock();
            let is_idle = |run: &String| inner.roster.find(run).is_none_or(|run| run.unwritten.is_empty());
            for (_, done) in requests.extract_if(.., |(run, _)| is_idle(run)) {
                // The caller may have gone.
                let _ = done.send(());
            }
        }
    }

    fn handle(&self, input: Input, requests: &mut Vec<(String, oneshot::Sender<()>)>) -> Vec<Action> {
        let now = self.now();
        let mut inner = self.lock();
        match input {
            Input::Hello { hello, connection, outgoing } => {
                let (devices, occupied) = (hello.devices.len(), hello.occupied.len());
                info!(agent = hello.agent, devices, occupied, "agent connected");
                inner.connections.insert(hello.agent.clone(), Connection { number: connection, outgoing });
                inner.roster.hello(now, &hello)
            }
            Input::Disconnected { agent, connection } => {
                if inner.is_current(&agent, connection) {
                    info!(agent, "agent disconnected");
                    inner.connections.remove(&agent);
                    inner.roster.disconnected(&agent);
                }
                Vec::new()
            }
            Input::AgentMessage { agent, connection, .. } if !inner.is_current(&agent, connection) => Vec::new(),
            Input::AgentMessage { agent, message, .. } => match &message {
                agent_message::Message::Heartbeat(heartbeat) => {
                    let acknowledged = inner.roster.heartbeat(now, &agent, heartbeat);
                    let ended = inner.roster.end_for(&agent).into();
                    let ack = Message::HeartbeatAck(pb::HeartbeatAck { acknowledged, ended });
                    vec![Action::Send { agent, message: ack }]
                }
                agent_message::Message::Serving(serving) => inner.roster.serving(now, &agent, serving),
                agent_message::Message::Rank(report) => {
                    inner.keep_points(report);
                    inner.roster.rank(now, &agent, report)
                }
                agent_message::Message::Hello(_) => Vec::new(),
            },
            Input::Request { run: name, request, done } => {
                requests.push((name.clone(), done));
                match request {
                    Request::Submit { run, submitted, request_id } => {
                        inner.records.insert(name, Record { request_id, loaded: true, ..Record::default() });
                        inner.roster.submit(*run, submitted)
                    }
                    Request::Cancel => inner.roster.cancel(&name),
                    Request::Delete => {
                        inner.records.remove(&name);
                        inner.roster.ended.remove(&name);
                        Vec::new()
                    }
                    Request::Resume { request_id, step, epochs } => {
                        inner.roster.resume(&name, request_id, (step, epochs))
                    }
                }
            }
        }
    }

    fn perform(self: &Arc<Self>, actions: Vec<Action>, writes: &mut JoinSet<(String, EventRecord)>) {
        for action in actions {
            match action {
                Action::Write { run, event } => {
                    let this = Arc::clone(self);
                    writes.spawn(async move { this.write(run, event).await });
                }
                Action::Send { agent, message } => {
                    let mut inner = self.lock();
                    let message = pb::CoordinatorMessage { message: Some(message) };
                    let connection = inner.connections.get(&agent);
                    // An agent that is away says what it has when it comes back.
                    if connection.is_some_and(|connection| connection.outgoing.try_send(Ok(message)).is_err()) {
                        warn!(agent, "agent does not take its messages");
                        inner.connections.remove(&agent);
                        inner.roster.disconnected(&agent);
                    }
                }
            }
        }
    }

    /// Puts the run's next event. Nothing may be done that is not written, so it tries until it can.
    async fn write(&self, run: String, event: RunEvent) -> (String, EventRecord) {
        let n = self.lock().records.get(&run).map_or(1, |record| record.events.len() as u64 + 1);
        let record =
            EventRecord { format: 1, n, term: self.term.number(), nonce: nonce(), at_millis: wall_millis(), event };
        loop {
            match self.store.create(&keys::event(&run, n), &record).await {
                Ok(Created::Won) => break,
                Ok(Created::Lost(_)) => {
                    return self.end_term(format!("another coordinator has written event {n} of run {run}")).await;
                }
                Err(error) => {
                    warn!(run, n, %error, "cannot write an event, trying again");
                    tokio::time::sleep(WRITE_PAUSE).await;
                }
            }
        }
        info!(run, n, event = %String::from_utf8_lossy(&record.to_json()), "run event");
        (run, record)
    }

    /// The process ends; what was decided must not be done.
    async fn end_term<T>(&self, reason: String) -> T {
        self.term.end(reason);
        std::future::pending().await
    }

    /// An event is in the store.
    fn written(&self, run: &str, record: EventRecord) -> Vec<Action> {
        let now = Now { wall: record.at_millis, ..self.now() };
        let made = match &record.event {
            RunEvent::Checkpoint { key, .. } => keys::checkpoint_of(run, key).ok(),
            _ => None,
        };
        let summarised = made.is_some() || matches!(record.event, RunEvent::Done { .. });
        let actions = {
            let mut inner = self.lock();
            inner.records.entry(run.to_owned()).or_default().events.push(record);
            inner.roster.written(now, run)
        };
        if let Some(made) = made {
            self.remove_old_checkpoints(run, made);
        }
        if summarised {
            self.summarise(run);
        }
        actions
    }

    /// Hands a request to the driving task, and waits until what it led to is written.
    async fn request(&self, run: &str, request: Request) -> Result<(), Error> {
        let ending = || Error::Local("this coordinator is ending".to_owned());
        let (done, answer) = oneshot::channel();
        let input = Input::Request { run: run.to_owned(), request, done };
        self.inputs.send(input).await.map_err(|_| ending())?;
        answer.await.map_err(|_| ending())
    }

    /// Asks for the end of a run.
    pub(crate) async fn cancel(&self, name: &str) -> Result<(), Error> {
        self.find(name)?;
        self.request(name, Request::Cancel).await
    }

    /// Queues an ended run again, from the checkpoint of this step or the newest; one that is done only with more
    /// `epochs`.
    pub(crate) async fn resume(
        &self,
        name: &str,
        request_id: String,
        step: Option<u64>,
        epochs: Option<u32>,
    ) -> Result<(), Error> {
        if request_id.is_empty() {
            return Err(Error::Invalid("request_id is empty".to_owned()));
        }
        let _one = self.changing.lock().await;
        let dataset = {
            let inner = self.lock();
            let (Some(run), Some(record)) = (inner.roster.find(name), inner.records.get(name)) else {
                return Err(inner.no_run(name));
            };
            let same = |record: &EventRecord| matches!(&record.event, RunEvent::Resumed { request_id: id, .. } if *id == request_id);
            if record.events.iter().any(same) {
                return Ok(());
            }
            match run.state() {
                pb::RunState::Cancelled | pb::RunState::Failed => {}
                pb::RunState::Done if epochs.is_some() => {}
                pb::RunState::Done => {
                    let advice = "give it more epochs: gleaner run extend";
                    return Err(Error::Precondition(format!("run {name:?} is done; {advice}")));
                }
                _ => return Err(Error::Precondition(format!("run {name:?} has not ended"))),
            }
            if step.is_some() || run.state() == pb::RunState::Done {
                run.checkpoint(step)?;
            }
            if let Some(epochs) = epochs {
                run.check_epochs(epochs)?;
            }
            run.dataset().to_owned()
        };
        if let Err(Error::NotFound(_)) = self.datasets.find(&dataset) {
            let gone = format!("run {name:?} cannot go on: its dataset {dataset:?} was deleted");
            return Err(Error::Precondition(gone));
        }
        self.request(name, Request::Resume { request_id, step, epochs }).await
    }

    /// A new stream of an agent; the number tells it from later ones.
    pub(crate) async fn connect(&self, hello: pb::Hello, connection: u64, outgoing: Outgoing) {
        // The task that takes them ends only with the process.
        let _ = self.inputs.send(Input::Hello { hello, connection, outgoing }).await;
    }

    /// What an agent sends after its hello.
    pub(crate) async fn message(&self, agent: &str, connection: u64, message: agent_message::Message) {
        let _ = self.inputs.send(Input::AgentMessage { agent: agent.to_owned(), connection, message }).await;
    }

    /// The end of an agent's stream.
    pub(crate) async fn disconnect(&self, agent: &str, connection: u64) {
        let _ = self.inputs.send(Input::Disconnected { agent: agent.to_owned(), connection }).await;
    }
}

impl Inner {
    /// There is no run of that name.
    fn no_run(&self, name: &str) -> Error {
        Error::unknown("run", name, self.records.keys().map(String::as_str))
    }

    /// Whether this is the newest stream of the agent.
    fn is_current(&self, agent: &str, connection: u64) -> bool {
        self.connections.get(agent).is_some_and(|current| current.number == connection)
    }

    /// Keeps the points of the curve that rank 0 of the newest generation reports.
    fn keep_points(&mut self, report: &pb::RankMessage) {
        let Some(record) = self.records.get_mut(&report.run) else { return };
        let current = self.roster.find(&report.run).is_some_and(|run| run.generation == report.generation);
        if let (Some(rank_message::Message::Stepped(stepped)), true, 0) = (&report.message, current, report.rank) {
            stepped.metrics.iter().for_each(|point| record.curve.add(point.clone()));
        }
    }
}
