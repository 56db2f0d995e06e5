//! The roster: which rank of which run sits on which device. A pure state machine; time comes in as an argument, what is to be
//! done comes out as [`Action`]s in the order in which they must be done. `trainer.proto` tells the life of a generation.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use proto::RunSpec;
use proto::pb::{self, coordinator_message::Message, left::Why};
use proto::run_event::{EventRecord, Member, RunEvent};

/// Devices that could start are waited with for so long, in case more are about to appear.
const GATHER: Duration = Duration::from_secs(1);
/// Between two changes of a generation that goes well, only to make it larger.
const GROW_PAUSE: Duration = Duration::from_secs(10);
/// A completed step, a validation, or a checkpoint may take so long before ranks that were asked to leave are aborted.
const ASKED: Duration = Duration::from_secs(120);
/// A process may take so long to start and to join its group.
const JOINING: Duration = Duration::from_secs(120);
/// An agent that has been gone for so long is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// An agent beats each second; one that was not heard of for so long gets nothing new.
const QUIET: Duration = Duration::from_secs(5);
/// A new coordinator gives agents so long, beside the failure detection, to come back.
const RECOVERY_MARGIN: Duration = Duration::from_secs(3);

/// Since the coordinator's start, and milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Now {
    pub(crate) at: Duration,
    pub(crate) wall: u64,
}

/// What the caller must do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// Put the run's next event, before the actions behind this one.
    Write { run: String, event: RunEvent },
    /// Tell an agent; lost if it is not connected.
    Send { agent: String, message: Message },
}

/// A device's place: agent, and number in its list.
type Place = (String, u32);

#[derive(Debug, Clone)]
pub(crate) struct Agent {
    pub(crate) address: String,
    pub(crate) devices: Vec<Device>,
    pub(crate) connected: bool,
    heard: Duration,
}

#[derive(Debug, Clone)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// The process on it.
    pub(crate) occupant: Option<Occupant>,
}

/// A rank process: in a generation, or holding the state of one that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Occupant {
    pub(crate) run: String,
    pub(crate) generation: u64,
    pub(crate) rank: u32,
    step: u64,
    /// When a process whose run has ended is ended, too, if it has not gone by itself.
    retires: Option<Duration>,
}

/// How a run stands.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Phase {
    /// In the queue.
    Waiting,
    /// A generation is there.
    Going(Generation),
    /// Over: done, failed, or cancelled.
    Ended(End),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    Done,
    Failed(String),
    Cancelled,
}

/// One fixed membership of ranks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Generation {
    n: u64,
    seats: Vec<Seat>,
    stage: Stage,
    /// When its stage began.
    since: Duration,
    formed: Duration,
    /// Where it began, once it is known.
    start: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
struct Seat {
    place: Place,
    joined: bool,
    confirmed: bool,
    left: Option<(Why, String)>,
    /// What a hello tells of a rank that is not at work. It counts from then on, unless the rank's own word, which may be on its
    /// way behind the hello, comes first.
    missing: Option<(Duration, Why)>,
    silent: Duration,
}

#[derive(Debug, Clone, PartialEq)]
enum Stage {
    /// The agent of rank 0 opens the TCPStore.
    Opening,
    /// Ranks join, then train.
    Running,
    /// Formed under an older coordinator; its agents have yet to come back.
    Recovering,
    /// Ranks were asked to leave, or have begun to.
    Leaving { why: Leaving, aborted: bool },
}

#[derive(Debug, Clone, PartialEq)]
enum Leaving {
    Regroup,
    Cancel,
    Failure { rank: Option<u32>, why: Why, reason: String },
}

/// One run.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) spec: RunSpec,
    spec_json: String,
    manifest: (String, String),
    pub(crate) phase: Phase,
    pub(crate) reason: String,
    /// The highest generation so far.
    pub(crate) generation: u64,
    pub(crate) world: u32,
    pub(crate) step: u64,
    pub(crate) steps_per_epoch: u64,
    pub(crate) cancelling: bool,
    pub(crate) checkpoint: Option<pb::Checkpointed>,
    /// Of the first generation, in milliseconds since 1970.
    began: Option<u64>,
    failures: u32,
    failed_at: u64,
    not_before: Duration,
    enough_since: Option<Duration>,
    queued: u64,
}

/// All agents and runs.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    pub(crate) agents: BTreeMap<String, Agent>,
    pub(crate) runs: BTreeMap<String, Run>,
    queued: u64,
}

impl Run {
    /// From its stored history; `manifest` is the key and SHA-256 of what it reads.
    pub(crate) fn recovered(
        now: Now,
        spec: RunSpec,
        manifest: (String, String),
        steps_per_epoch: u64,
        events: &[EventRecord],
    ) -> Self {
        let mut run = Self {
            spec_json: spec.to_json(),
            spec,
            manifest,
            phase: Phase::Waiting,
            reason: String::new(),
            generation: 0,
            world: 0,
            step: 0,
            steps_per_epoch,
            cancelling: false,
            checkpoint: None,
            began: None,
            failures: 0,
            failed_at: 0,
            not_before: now.at,
            enough_since: None,
            queued: 0,
        };
        for record in events {
            run.apply(now, record);
        }
        run
    }

    fn apply(&mut self, now: Now, record: &EventRecord) {
        match &record.event {
            RunEvent::Submitted { .. } => {}
            RunEvent::Generation { generation, members } => {
                self.generation = *generation;
                self.world = members.len() as u32;
                self.began.get_or_insert(record.at_millis);
                let seat = |member: &Member| Seat::new((member.agent.clone(), member.device));
                let seats = members.iter().map(seat).collect();
                self.phase = Phase::Going(Generation::new(now, *generation, seats, Stage::Recovering));
            }
            RunEvent::Checkpoint { step, key, digests } => {
                let digests = digests.clone().into_iter().collect();
                self.checkpoint = Some(pb::Checkpointed { step: *step, key: key.clone(), digests });
                self.step = self.step.max(*step);
            }
            RunEvent::Failure { step, .. } => {
                self.failures = if *step > self.failed_at { 1 } else { self.failures + 1 };
                (self.failed_at, self.step, self.phase) = (*step, *step, Phase::Waiting);
            }
            RunEvent::Cancelling => self.cancelling = true,
            RunEvent::Cancelled => self.phase = Phase::Ended(End::Cancelled),
            RunEvent::Failed { reason } => self.phase = Phase::Ended(End::Failed(reason.clone())),
            RunEvent::Done { .. } => self.phase = Phase::Ended(End::Done),
            RunEvent::Resumed { .. } => self.requeue(),
        }
    }

    fn requeue(&mut self) {
        (self.phase, self.cancelling, self.failures, self.world) = (Phase::Waiting, false, 0, 0);
        self.step = self.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step);
    }

    fn detection(&self) -> Duration {
        self.spec.failure_detection()
    }

    fn going(&mut self) -> Option<&mut Generation> {
        match &mut self.phase {
            Phase::Going(generation) => Some(generation),
            _ => None,
        }
    }

    pub(crate) fn state(&self) -> pb::RunState {
        match &self.phase {
            Phase::Ended(End::Done) => pb::RunState::Done,
            Phase::Ended(End::Failed(_)) => pb::RunState::Failed,
            Phase::Ended(End::Cancelled) => pb::RunState::Cancelled,
            _ if self.cancelling => pb::RunState::Cancelling,
            Phase::Waiting => pb::RunState::Waiting,
            Phase::Going(_) => pb::RunState::Running,
        }
    }
}

impl Seat {
    fn new(place: Place) -> Self {
        Self { place, joined: false, confirmed: false, left: None, missing: None, silent: Duration::ZERO }
    }
}

impl Generation {
    fn new(now: Now, n: u64, seats: Vec<Seat>, stage: Stage) -> Self {
        Self { n, seats, stage, since: now.at, formed: now.at, start: None }
    }
}

impl Roster {
    /// Queues a run behind the others.
    pub(crate) fn add(&mut self, name: String, mut run: Run) {
        self.queued += 1;
        run.queued = self.queued;
        self.runs.insert(name, run);
    }

    /// Asks for the end of a run.
    pub(crate) fn cancel(&mut self, now: Now, name: &str) -> Vec<Action> {
        let Some(run) = self.runs.get_mut(name) else { return Vec::new() };
        if run.cancelling || matches!(run.phase, Phase::Ended(_)) {
            return Vec::new();
        }
        run.cancelling = true;
        let mut actions = vec![Action::Write { run: name.to_owned(), event: RunEvent::Cancelling }];
        actions.extend(self.tick(now));
        actions
    }

    /// Queues an ended run again.
    pub(crate) fn resume(&mut self, name: &str, request_id: String) -> Vec<Action> {
        self.queued += 1;
        let Some(run) = self.runs.get_mut(name) else { return Vec::new() };
        run.requeue();
        run.queued = self.queued;
        vec![Action::Write { run: name.to_owned(), event: RunEvent::Resumed { request_id } }]
    }

    /// An agent has connected, for the first time or again.
    pub(crate) fn hello(&mut self, now: Now, hello: &pb::Hello) -> Vec<Action> {
        let mut actions = Vec::new();
        let device = |name: &String| Device { name: name.clone(), occupant: None };
        let mut devices: Vec<Device> = hello.devices.iter().map(device).collect();
        for (at, device) in (0u32..).zip(&mut devices) {
            let place = (hello.agent.clone(), at);
            let occupied = hello.occupied.iter().find(|occupied| occupied.device == at);
            if let Some(occupied) = occupied {
                let (keep, run) = (self.keeps(&place, occupied), occupied.run.clone());
                if keep {
                    let pb::Occupied { generation, rank, step, .. } = *occupied;
                    device.occupant = Some(Occupant { run, generation, rank, step, retires: None });
                } else {
                    actions.push(kill(&place));
                }
            }
        }
        let agent = Agent { address: hello.advertise_address.clone(), devices, connected: true, heard: now.at };
        self.agents.insert(hello.agent.clone(), agent);
        for (run_name, run) in &mut self.runs {
            let due = now.at + run.detection();
            let (name, step) = (&hello.agent, &mut run.step);
            let Phase::Going(generation) = &mut run.phase else { continue };
            for (rank, seat) in (0u32..).zip(&mut generation.seats).filter(|(_, seat)| seat.place.0 == *name) {
                let matching =
                    |o: &&pb::Occupied| o.device == seat.place.1 && o.generation == generation.n && o.rank == rank;
                let started = !matches!(generation.stage, Stage::Opening);
                match hello.occupied.iter().find(matching) {
                    Some(occupied) => {
                        if occupied.joined {
                            generation.start.get_or_insert(occupied.step);
                            seat.missing = None;
                        } else {
                            seat.missing.get_or_insert((due, Why::Collective));
                        }
                        seat.joined |= occupied.joined;
                        *step = (*step).max(occupied.step);
                    }
                    None if started => {
                        seat.missing.get_or_insert((due, Why::Exited));
                    }
                    None => {
                        let rank = Occupant {
                            run: run_name.clone(),
                            generation: generation.n,
                            rank,
                            step: *step,
                            retires: None,
                        };
                        let agent = self.agents.get_mut(name);
                        if let Some(device) = agent.and_then(|agent| agent.devices.get_mut(seat.place.1 as usize)) {
                            device.occupant = Some(rank);
                        }
                    }
                }
                seat.confirmed = true;
            }
        }
        actions.extend(self.tick(now));
        actions
    }

    /// Whether the process on a device is of use: in its run's generation, or holding state while none stands on that device.
    fn keeps(&self, place: &Place, occupied: &pb::Occupied) -> bool {
        let Some(run) = self.runs.get(&occupied.run) else { return false };
        match &run.phase {
            Phase::Ended(_) => false,
            Phase::Waiting => !occupied.joined,
            Phase::Going(generation) if occupied.generation == generation.n => {
                generation.seats.get(occupied.rank as usize).is_some_and(|seat| seat.place == *place)
            }
            Phase::Going(_) => !occupied.joined,
        }
    }

    /// An agent's stream has broken.
    pub(crate) fn disconnected(&mut self, agent: &str) {
        if let Some(agent) = self.agents.get_mut(agent) {
            agent.connected = false;
        }
    }

    /// An agent is alive, and says so of its processes.
    pub(crate) fn heartbeat(&mut self, now: Now, agent: &str, silent_millis: &[u64]) {
        let Some(known) = self.agents.get_mut(agent) else { return };
        known.heard = now.at;
        let generations = self.runs.values_mut().filter_map(Run::going);
        for seat in generations.flat_map(|generation| &mut generation.seats).filter(|seat| seat.place.0 == agent) {
            seat.silent = Duration::from_millis(silent_millis.get(seat.place.1 as usize).copied().unwrap_or(0));
        }
    }

    /// The agent of rank 0 has opened the generation's TCPStore, or could not.
    pub(crate) fn serving(&mut self, now: Now, agent: &str, serving: &pb::Serving) -> Vec<Action> {
        let Some(address) = self.agents.get(agent).map(|agent| agent.address.clone()) else { return Vec::new() };
        let Some(run) = self.runs.get_mut(&serving.run) else { return Vec::new() };
        let elapsed = run.began.map_or(0.0, |began| now.wall.saturating_sub(began) as f64 / 1000.0);
        let Phase::Going(generation) = &mut run.phase else { return Vec::new() };
        if generation.n != serving.generation
            || generation.stage != Stage::Opening
            || generation.seats[0].place.0 != agent
        {
            return Vec::new();
        }
        if serving.port == 0 {
            let reason = format!("the rendezvous could not be opened: {}", serving.error);
            generation.seats[0].left = Some((Why::Error, reason));
            return self.tick(now);
        }
        (generation.stage, generation.since) = (Stage::Running, now.at);
        let host = if address.contains(':') { format!("[{address}]") } else { address };
        let join = |(rank, seat): (u32, &Seat)| Action::Send {
            agent: seat.place.0.clone(),
            message: Message::Join(pb::Join {
                run: serving.run.clone(),
                generation: generation.n,
                device: seat.place.1,
                rank,
                world_size: generation.seats.len() as u32,
                store: format!("{host}:{}", serving.port),
                spec_json: run.spec_json.clone(),
                manifest_key: run.manifest.0.clone(),
                manifest_sha256: run.manifest.1.clone(),
                checkpoint: run.checkpoint.clone(),
                elapsed_seconds: elapsed,
            }),
        };
        (0u32..).zip(&generation.seats).map(join).collect()
    }

    /// A rank, or its agent on its behalf, says something. Messages of generations that are over are dropped.
    pub(crate) fn rank(&mut self, now: Now, agent: &str, message: &pb::RankMessage) -> Vec<Action> {
        use pb::rank_message::Message as Said;
        let place = (agent.to_owned(), message.device);
        if let Some(known) = self.agents.get_mut(agent) {
            known.heard = now.at;
            if let Some(device) = known.devices.get_mut(message.device as usize) {
                let is = |o: &Occupant| o.run == message.run && o.generation == message.generation;
                match (&message.message, &mut device.occupant) {
                    (Some(Said::Left(left)), Some(occupant)) if is(occupant) => match left.why() {
                        Why::Exited => device.occupant = None,
                        _ => occupant.step = left.step,
                    },
                    _ => {}
                }
            }
        }
        let Some(run) = self.runs.get_mut(&message.run) else { return Vec::new() };
        let name = &message.run;
        let Phase::Going(generation) = &mut run.phase else { return self.finished_left(&place, message) };
        let rank = message.rank;
        let known = generation.seats.get_mut(rank as usize).filter(|seat| seat.place == place);
        let Some(seat) = known.filter(|_| message.generation == generation.n) else { return Vec::new() };
        seat.silent = Duration::ZERO;
        let mut actions = Vec::new();
        match &message.message {
            Some(Said::Joined(joined)) => {
                seat.joined = true;
                generation.start.get_or_insert(joined.step);
                run.step = joined.step;
            }
            Some(Said::Stepped(stepped)) if rank == 0 => run.step = stepped.step,
            Some(Said::Checkpointed(made)) if rank == 0 => {
                run.checkpoint = Some(made.clone());
                let digests = made.digests.clone().into_iter().collect();
                let event = RunEvent::Checkpoint { step: made.step, key: made.key.clone(), digests };
                actions.push(Action::Write { run: name.clone(), event });
            }
            Some(Said::Finished(finished)) if rank == 0 => {
                let digests = finished.digests.clone().into_iter().collect();
                let event = RunEvent::Done { model: finished.key.clone(), digests };
                actions.push(Action::Write { run: name.clone(), event });
                run.phase = Phase::Ended(End::Done);
            }
            Some(Said::Left(left)) => {
                run.step = run.step.max(left.step);
                seat.left.get_or_insert((left.why(), left.detail.clone()));
            }
            _ => {}
        }
        actions.extend(self.tick(now));
        actions
    }

    /// A rank of an ended run has left: its device is free.
    fn finished_left(&mut self, place: &Place, message: &pb::RankMessage) -> Vec<Action> {
        let ended = self.runs.get(&message.run).is_some_and(|run| matches!(run.phase, Phase::Ended(_)));
        let left = matches!(message.message, Some(pb::rank_message::Message::Left(_)));
        let of_it = self.occupant(place).is_some_and(|occupant| occupant.run == message.run);
        if ended && left && of_it {
            self.release(place);
            return vec![kill(place)];
        }
        Vec::new()
    }

    fn occupant(&self, (agent, device): &Place) -> Option<&Occupant> {
        self.agents.get(agent)?.devices.get(*device as usize)?.occupant.as_ref()
    }

    fn release(&mut self, (agent, device): &Place) {
        if let Some(device) = self.agents.get_mut(agent).and_then(|agent| agent.devices.get_mut(*device as usize)) {
            device.occupant = None;
        }
    }

    /// Does whatever the time, or what has happened, calls for.
    pub(crate) fn tick(&mut self, now: Now) -> Vec<Action> {
        let mut actions = Vec::new();
        let names: Vec<String> = self.runs.keys().cloned().collect();
        for name in &names {
            if let Some(mut run) = self.runs.remove(name) {
                self.advance(now, name, &mut run, &mut actions);
                self.runs.insert(name.clone(), run);
            }
        }
        self.assign(now, &mut actions);
        let seated: HashSet<&str> = self
            .runs
            .values()
            .filter_map(|run| if let Phase::Going(generation) = &run.phase { Some(generation) } else { None })
            .flat_map(|generation| generation.seats.iter().map(|seat| seat.place.0.as_str()))
            .collect();
        self.agents.retain(|name, agent| {
            agent.connected || now.at < agent.heard + FORGOTTEN || seated.contains(name.as_str())
        });
        actions
    }

    /// Whether an agent has not been heard of for so long.
    fn lost(&self, now: Now, agent: &str, since: Duration) -> bool {
        self.agents.get(agent).is_none_or(|agent| now.at >= agent.heard + since)
    }

    fn advance(&mut self, now: Now, name: &str, run: &mut Run, actions: &mut Vec<Action>) {
        let detection = run.detection();
        match &mut run.phase {
            Phase::Ended(_) => self.retire(now, name, detection, actions),
            Phase::Waiting if run.cancelling => self.end(name, run, End::Cancelled, actions),
            Phase::Waiting => {}
            Phase::Going(generation) => {
                self.look(now, name, detection, run.cancelling, generation, actions);
                if let Stage::Leaving { why, .. } = &generation.stage
                    && generation.seats.iter().all(|seat| seat.left.is_some())
                {
                    let why = why.clone();
                    let (n, start) = (generation.n, generation.start);
                    // A process that failed by itself has a state that nobody can trust; one that exited has none.
                    let bad = |seat: &&Seat| matches!(seat.left, Some((Why::Error | Why::Unspecified, _)));
                    let places: Vec<Place> =
                        generation.seats.iter().filter(bad).map(|seat| seat.place.clone()).collect();
                    for place in places {
                        if self.occupant(&place).is_some_and(|occupant| occupant.run == name) {
                            self.release(&place);
                            actions.push(kill(&place));
                        }
                    }
                    (run.phase, run.world, run.enough_since) = (Phase::Waiting, 0, None);
                    self.left(now, name, run, (n, start, why), actions);
                }
            }
        }
    }

    /// Looks after a generation: who is lost, who has left, what is asked.
    fn look(
        &self,
        now: Now,
        name: &str,
        detection: Duration,
        cancelling: bool,
        generation: &mut Generation,
        actions: &mut Vec<Action>,
    ) {
        let running_for = now.at - generation.since;
        let leaving = matches!(generation.stage, Stage::Leaving { .. });
        if generation.stage == Stage::Recovering {
            let back = generation.seats.iter().all(|seat| seat.confirmed);
            let at_work = |seat: &Seat| seat.joined && seat.left.is_none() && seat.missing.is_none();
            if back && generation.seats.iter().all(at_work) {
                (generation.stage, generation.since) = (Stage::Running, now.at);
            } else if !back && running_for < detection + RECOVERY_MARGIN {
                return;
            }
            for seat in generation.seats.iter_mut().filter(|seat| !seat.confirmed) {
                let detail = || (Why::Exited, "its agent did not come back after the coordinator's restart".to_owned());
                seat.left.get_or_insert_with(detail);
            }
        }
        for seat in &mut generation.seats {
            if let Some((_, why)) = seat.missing.filter(|(due, _)| now.at >= *due) {
                let what = if why == Why::Exited { "was gone" } else { "had left" };
                seat.left.get_or_insert_with(|| (why, format!("it {what} when its agent came back")));
            }
        }
        let patience = if leaving { detection / 4 } else { detection };
        for seat in generation.seats.iter_mut().filter(|seat| seat.left.is_none()) {
            let wait = if seat.joined { detection } else { detection.max(JOINING) };
            let lost = self.lost(now, &seat.place.0, detection)
                || (self.agents.get(&seat.place.0).is_none_or(|agent| !agent.connected)
                    && self.lost(now, &seat.place.0, patience));
            if lost {
                seat.left = Some((Why::Exited, format!("agent {} was not heard of", seat.place.0)));
            } else if generation.stage != Stage::Opening && seat.silent >= wait {
                seat.left = Some((Why::Unspecified, format!("silent for {:.1} s", seat.silent.as_secs_f64())));
                actions.push(kill(&seat.place));
            } else if generation.stage == Stage::Running && !seat.joined && running_for >= detection.max(JOINING) {
                seat.left = Some((Why::Unspecified, "did not join in time".to_owned()));
                actions.push(kill(&seat.place));
            }
        }
        if generation.stage == Stage::Opening && running_for >= detection {
            generation.seats[0].left.get_or_insert((Why::Exited, "the rendezvous was not opened in time".to_owned()));
        }
        let fault = fault(generation);
        let asked = generation.seats.iter().any(|seat| matches!(seat.left, Some((Why::Asked, _))));
        match &mut generation.stage {
            Stage::Leaving { why, aborted } => {
                match (&why, fault) {
                    // The first word may come from a rank that only felt the other's death.
                    (Leaving::Regroup | Leaving::Failure { .. }, Some(found)) => *why = found,
                    (Leaving::Cancel, Some(_)) if !*aborted => {
                        (*aborted, generation.since) = (true, now.at);
                        tell_to_leave(name, generation, false, true, actions);
                        return;
                    }
                    _ => {}
                }
                let failed = matches!(why, Leaving::Failure { .. });
                let deadline = if *aborted { detection } else { ASKED };
                let late = now.at - generation.since >= deadline;
                if !*aborted && (failed || late) {
                    (*aborted, generation.since) = (true, now.at);
                    tell_to_leave(name, generation, false, true, actions);
                } else if late {
                    for seat in generation.seats.iter_mut().filter(|seat| seat.left.is_none()) {
                        seat.left = Some((Why::Error, "did not leave in time".to_owned()));
                    }
                }
            }
            Stage::Running if fault.is_none() && !cancelling && asked => {
                // An agent that is shut down asks its ranks by itself, and the control word all others.
                generation.stage = Stage::Leaving { why: Leaving::Regroup, aborted: false };
                generation.since = now.at;
                tell_to_leave(name, generation, false, false, actions);
            }
            _ if fault.is_some() || cancelling => {
                let opening = generation.stage == Stage::Opening;
                let (why, abort) = match fault {
                    Some(failure) if !cancelling => (failure, true),
                    other => (Leaving::Cancel, other.is_some()),
                };
                generation.stage = Stage::Leaving { why, aborted: abort };
                generation.since = now.at;
                if opening {
                    // Nobody was told to join yet.
                    let here = || (Why::Asked, String::new());
                    for seat in &mut generation.seats {
                        seat.left.get_or_insert_with(here);
                    }
                } else {
                    tell_to_leave(name, generation, !abort, abort, actions);
                }
            }
            _ => {}
        }
    }

    /// All ranks have left a generation.
    fn left(
        &mut self,
        now: Now,
        name: &str,
        run: &mut Run,
        (n, start, why): (u64, Option<u64>, Leaving),
        actions: &mut Vec<Action>,
    ) {
        if let Leaving::Failure { rank, why, reason } = why {
            // What a rank says of itself comes again at the same step; what befalls it from outside does not.
            let progress =
                if why == Why::Error { run.step > run.failed_at } else { start.is_some_and(|s| run.step > s) };
            run.failures = if progress { 1 } else { run.failures + 1 };
            run.failed_at = run.failed_at.max(run.step);
            let event = RunEvent::Failure { generation: n, rank, step: run.step, reason: reason.clone() };
            actions.push(Action::Write { run: name.to_owned(), event });
            if run.failures >= run.spec.ranks.max_failures && !run.cancelling {
                let reason =
                    format!("{} generations failed without a step between them; the last: {reason}", run.failures);
                return self.end(name, run, End::Failed(reason), actions);
            }
            if why == Why::Error {
                run.not_before = now.at + Duration::from_secs(1 << run.failures.min(5));
            }
        }
        if run.cancelling {
            self.end(name, run, End::Cancelled, actions);
        }
    }

    fn end(&mut self, name: &str, run: &mut Run, end: End, actions: &mut Vec<Action>) {
        let event = match &end {
            End::Failed(reason) => RunEvent::Failed { reason: reason.clone() },
            // `Done` is written when rank 0 has finished.
            End::Cancelled | End::Done => RunEvent::Cancelled,
        };
        actions.push(Action::Write { run: name.to_owned(), event });
        run.phase = Phase::Ended(end);
        run.world = 0;
        for place in self.places_of(name) {
            self.release(&place);
            actions.push(kill(&place));
        }
    }

    /// Ranks of a finished run leave by themselves; those that do not are ended.
    fn retire(&mut self, now: Now, name: &str, detection: Duration, actions: &mut Vec<Action>) {
        for place in self.places_of(name) {
            let Some(agent) = self.agents.get_mut(&place.0) else { continue };
            let Some(device) = agent.devices.get_mut(place.1 as usize) else { continue };
            let Some(occupant) = &mut device.occupant else { continue };
            if now.at >= *occupant.retires.get_or_insert(now.at + detection) {
                device.occupant = None;
                actions.push(kill(&place));
            }
        }
    }

    fn places_of(&self, run: &str) -> Vec<Place> {
        self.places(|_| true, |device| device.occupant.as_ref().is_some_and(|occupant| occupant.run == run))
    }

    fn places(&self, of: impl Fn(&Agent) -> bool, which: impl Fn(&Device) -> bool) -> Vec<Place> {
        let mut places = Vec::new();
        for (name, agent) in self.agents.iter().filter(|(_, agent)| of(agent)) {
            let here = (0u32..).zip(&agent.devices).filter(|(_, device)| which(device));
            places.extend(here.map(|(at, _)| (name.clone(), at)));
        }
        places
    }

    /// Gives free devices to waiting runs, in the order of the queue, then to running ones that can grow.
    fn assign(&mut self, now: Now, actions: &mut Vec<Action>) {
        let mut queue: Vec<(u64, String)> = self.runs.iter().map(|(name, run)| (run.queued, name.clone())).collect();
        queue.sort();
        let here = |agent: &Agent| agent.connected && now.at < agent.heard + QUIET;
        let total = self.places(here, |_| true).len() as u32;
        let mut free = self.places(here, |device| device.occupant.is_none());
        for (place_in_queue, (_, name)) in queue.iter().enumerate() {
            let Some(run) = self.runs.get(name).filter(|run| run.phase == Phase::Waiting && !run.cancelling) else {
                continue;
            };
            let (min, max) = (run.spec.ranks.min, run.spec.ranks.max);
            let mut survivors = self.places(here, |device| device.occupant.as_ref().is_some_and(|o| o.run == *name));
            // The furthest state first: rank 0 gives it to the others.
            survivors.sort_by_key(|place| std::cmp::Reverse(self.occupant(place).map_or(0, |occupant| occupant.step)));
            let there = (survivors.len() + free.len()) as u32;
            let agents = free.iter().map(|place| &place.0).collect::<HashSet<_>>().len();
            let Some(run) = self.runs.get_mut(name) else { continue };
            if there < min {
                run.enough_since = None;
                run.reason = format!("needs {min} ranks; {} devices are free on {agents} agents", free.len());
                // What could start once others have ended must not be overtaken for ever.
                if min <= total {
                    free.clear();
                    let missing = (min - there) as usize;
                    let later = queue.iter().skip(place_in_queue + 1).map(|(_, name)| name.as_str());
                    let stuck = self.stuck(later, here);
                    if stuck.len() >= missing {
                        for place in stuck.into_iter().rev().take(missing) {
                            self.release(&place);
                            actions.push(kill(&place));
                        }
                    }
                }
                continue;
            }
            let since = *run.enough_since.get_or_insert(now.at);
            let take = there.min(max) as usize;
            let mut places = survivors;
            places.truncate(take);
            let rest = take - places.len();
            let taken: Vec<Place> = free.drain(..rest.min(free.len())).collect();
            if now.at < run.not_before {
                run.reason = "waits a little after a failure before the next try".to_owned();
            } else if (there >= max && run.generation == 0) || now.at >= since + GATHER {
                places.extend(taken);
                self.form(now, name, places, actions);
            }
        }
        for (_, name) in &queue {
            let Some(run) = self.runs.get_mut(name).filter(|run| !run.cancelling) else { continue };
            let max = run.spec.ranks.max as usize;
            let Some(generation) = run.going() else { continue };
            let settled = generation.stage == Stage::Running && generation.seats.iter().all(|seat| seat.joined);
            if settled && generation.seats.len() < max && !free.is_empty() && now.at >= generation.formed + GROW_PAUSE {
                let more = free.len().min(max - generation.seats.len());
                free.drain(..more);
                generation.stage = Stage::Leaving { why: Leaving::Regroup, aborted: false };
                generation.since = now.at;
                tell_to_leave(name, generation, false, false, actions);
            }
        }
    }

    /// Places where waiting runs hold state but cannot start with what they hold, in the order of these runs. Two such runs would
    /// wait for each other for ever.
    fn stuck<'a>(&self, runs: impl Iterator<Item = &'a str>, here: impl Fn(&Agent) -> bool) -> Vec<Place> {
        let mut stuck = Vec::new();
        for name in runs {
            let Some(run) = self.runs.get(name).filter(|run| run.phase == Phase::Waiting) else { continue };
            let held = self.places(&here, |device| device.occupant.as_ref().is_some_and(|o| o.run == name));
            if (held.len() as u32) < run.spec.ranks.min {
                stuck.extend(held);
            }
        }
        stuck
    }

    fn form(&mut self, now: Now, name: &str, places: Vec<Place>, actions: &mut Vec<Action>) {
        let Some(run) = self.runs.get_mut(name) else { return };
        run.generation += 1;
        run.world = places.len() as u32;
        run.began.get_or_insert(now.wall);
        run.enough_since = None;
        run.reason.clear();
        let member = |place: &Place| Member { agent: place.0.clone(), device: place.1 };
        let event = RunEvent::Generation { generation: run.generation, members: places.iter().map(member).collect() };
        actions.push(Action::Write { run: name.to_owned(), event });
        let serve = pb::Serve { run: name.to_owned(), generation: run.generation };
        actions.push(Action::Send { agent: places[0].0.clone(), message: Message::Serve(serve) });
        for (rank, (agent, device)) in (0u32..).zip(&places) {
            let occupant =
                Occupant { run: name.to_owned(), generation: run.generation, rank, step: run.step, retires: None };
            if let Some(device) = self.agents.get_mut(agent).and_then(|a| a.devices.get_mut(*device as usize)) {
                device.occupant = Some(occupant);
            }
        }
        let mut generation =
            Generation::new(now, run.generation, places.into_iter().map(Seat::new).collect(), Stage::Opening);
        generation.seats.iter_mut().for_each(|seat| seat.confirmed = true);
        run.phase = Phase::Going(generation);
    }
}

/// Who is at fault that a generation cannot go on: a rank that is gone or silent rather than one that only felt it.
fn fault(generation: &Generation) -> Option<Leaving> {
    let weight = |why: &Why| match why {
        Why::Exited | Why::Unspecified => 3,
        Why::Error => 2,
        Why::Collective => 1,
        Why::Asked | Why::Finished => 0,
    };
    let all_finished = || generation.seats.iter().all(|seat| matches!(seat.left, Some((Why::Finished, _))));
    let left = (0u32..).zip(&generation.seats).filter_map(|(rank, seat)| Some((rank, seat.left.as_ref()?)));
    match left.max_by_key(|(rank, (why, _))| (weight(why), std::cmp::Reverse(*rank))) {
        Some((rank, (why, detail))) if weight(why) > 0 => {
            let rank_at_fault = (weight(why) > 1).then_some(rank);
            Some(Leaving::Failure { rank: rank_at_fault, why: *why, reason: format!("rank {rank}: {detail}") })
        }
        _ if all_finished() => {
            let reason = "all ranks finished, but rank 0's word of it was lost".to_owned();
            Some(Leaving::Failure { rank: None, why: Why::Finished, reason })
        }
        _ => None,
    }
}

fn kill(place: &Place) -> Action {
    Action::Send { agent: place.0.clone(), message: Message::Kill(pb::Kill { device: place.1 }) }
}

fn tell_to_leave(run: &str, generation: &Generation, checkpoint: bool, abort: bool, actions: &mut Vec<Action>) {
    let mut told = HashSet::new();
    for seat in generation.seats.iter().filter(|seat| seat.left.is_none()) {
        if told.insert(&seat.place.0) {
            let leave = pb::Leave { run: run.to_owned(), generation: generation.n, checkpoint, abort };
            actions.push(Action::Send { agent: seat.place.0.clone(), message: Message::Leave(leave) });
        }
    }
}

#[cfg(test)]
mod tests;
