//! The roster: which rank of which run sits on which device. A pure state machine; time comes in as an argument, what is to be
//! done comes out as [`Action`]s in the order in which they must be done. `trainer.proto` tells the life of a generation.
//!
//! Here is what it hears; `run` is how a run stands, `generation` looks after one membership of ranks, `assign` forms the next.

mod assign;
mod generation;
mod run;

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use proto::pb::{self, coordinator_message::Message, left::Cause};
use proto::run_event::RunEvent;

use generation::{Departure, Failure, Leaving, Seat, Stage};
use run::Ended;
pub(crate) use run::{Phase, Run, Sources};

/// An agent that has been gone for so long is forgotten.
const FORGOTTEN: Duration = Duration::from_secs(60);

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
    /// It is shutting down.
    leaving: bool,
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

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    Done,
    Failed(String),
    Cancelled,
}

/// All agents and runs.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    pub(crate) agents: BTreeMap<String, Agent>,
    pub(crate) runs: BTreeMap<String, Run>,
    queued: u64,
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
        actions.extend(self.settle(now));
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
        let agent =
            Agent { address: hello.advertise_address.clone(), devices, connected: true, leaving: false, heard: now.at };
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
                            seat.missing.get_or_insert((due, Cause::Collective));
                        }
                        seat.joined |= occupied.joined;
                        *step = (*step).max(occupied.step);
                    }
                    None if started => {
                        seat.missing.get_or_insert((due, Cause::Exited));
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
        actions.extend(self.settle(now));
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
    pub(crate) fn heartbeat(&mut self, now: Now, agent: &str, beat: &pb::Heartbeat) {
        let Some(known) = self.agents.get_mut(agent) else { return };
        (known.heard, known.leaving) = (now.at, beat.leaving);
        let generations = self.runs.values_mut().filter_map(Run::going);
        for seat in generations.flat_map(|generation| &mut generation.seats).filter(|seat| seat.place.0 == agent) {
            let life = beat.devices.get(seat.place.1 as usize).cloned().unwrap_or_default();
            seat.silent = Duration::from_millis(life.silent_millis);
            seat.alive = life.rank.unwrap_or_default();
        }
    }

    /// For so long nobody could be heard, which is nobody's silence.
    pub(crate) fn excuse(&mut self, now: Now, held_up: Duration) {
        self.agents.values_mut().for_each(|agent| agent.heard = (agent.heard + held_up).min(now.at));
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
            generation.seats[0].leave(Cause::Error, reason);
            return self.settle(now);
        }
        generation.enter(now, Stage::Running);
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
                manifest_key: run.sources.manifest.0.clone(),
                manifest_sha256: run.sources.manifest.1.clone(),
                checkpoints: run.checkpoints.iter().rev().cloned().collect(),
                elapsed_seconds: elapsed,
                start: run.sources.start.clone(),
                traceparent: run.sources.traceparent.clone(),
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
                    (Some(Said::Left(left)), Some(occupant)) if is(occupant) => match left.cause() {
                        Cause::Exited | Cause::Terminated => device.occupant = None,
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
                for pb::Damaged { key, reason } in &joined.damaged {
                    run.damaged(key);
                    let event = RunEvent::Damaged { key: key.clone(), reason: reason.clone() };
                    actions.push(Action::Write { run: name.clone(), event });
                }
            }
            Some(Said::Stepped(stepped)) if rank == 0 => run.step = stepped.step,
            Some(Said::Checkpointed(made)) if rank == 0 => {
                run.checkpointed(made.clone());
                let digests = made.digests.clone().into_iter().collect();
                let event = RunEvent::Checkpoint { step: made.step, key: made.key.clone(), digests, top1: made.top1 };
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
                seat.leave(left.cause(), left.detail.clone());
            }
            _ => {}
        }
        actions.extend(self.settle(now));
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

    /// Does whatever the time calls for. Only here silence is judged: to be called when all that was said has been heard.
    pub(crate) fn tick(&mut self, now: Now) -> Vec<Action> {
        let actions = self.proceed(now, true);
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

    /// Does what follows from what was just heard.
    fn settle(&mut self, now: Now) -> Vec<Action> {
        self.proceed(now, false)
    }

    fn proceed(&mut self, now: Now, judge: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        let names: Vec<String> = self.runs.keys().cloned().collect();
        for name in &names {
            if let Some(mut run) = self.runs.remove(name) {
                self.advance(now, judge, name, &mut run, &mut actions);
                self.runs.insert(name.clone(), run);
            }
        }
        self.assign(now, &mut actions);
        actions
    }

    fn advance(&mut self, now: Now, judge: bool, name: &str, run: &mut Run, actions: &mut Vec<Action>) {
        let detection = run.detection();
        match &mut run.phase {
            Phase::Ended(_) => self.retire(now, name, detection, actions),
            Phase::Waiting if run.cancelling => self.end(name, run, End::Cancelled, actions),
            Phase::Waiting => {}
            Phase::Going(generation) => {
                generation.look(now, judge, (name, detection, run.cancelling), &self.agents, actions);
                if let Stage::Leaving { cause, .. } = &generation.stage
                    && generation.seats.iter().all(|seat| seat.left.is_some())
                {
                    let cause = cause.clone();
                    let (n, start) = (generation.n, generation.start);
                    // A process that failed by itself, or was given up, has a state that nobody can trust; one that exited has none.
                    let bad = |seat: &&Seat| {
                        matches!(&seat.left, Some(Departure { cause: Cause::Error | Cause::Unspecified, .. }))
                    };
                    let places: Vec<Place> =
                        generation.seats.iter().filter(bad).map(|seat| seat.place.clone()).collect();
                    for place in places {
                        if self.occupant(&place).is_some_and(|occupant| occupant.run == name) {
                            self.release(&place);
                            actions.push(kill(&place));
                        }
                    }
                    run.ended = match cause {
                        Leaving::Regroup { grow: true } => Ended::ToGrow,
                        _ => Ended::Shrunk,
                    };
                    (run.phase, run.world, run.enough_since) = (Phase::Waiting, 0, None);
                    self.left(now, name, run, (n, start, cause), actions);
                }
            }
        }
    }

    /// All ranks have left a generation.
    fn left(
        &mut self,
        now: Now,
        name: &str,
        run: &mut Run,
        (n, start, cause): (u64, Option<u64>, Leaving),
        actions: &mut Vec<Action>,
    ) {
        if let Leaving::Failure(Failure { culprit, cause, reason }) = cause {
            // What a rank says of itself comes again at the same step; what befalls it from outside does not.
            let progress =
                if cause == Cause::Error { run.step > run.failed_at } else { start.is_some_and(|s| run.step > s) };
            run.failures = if progress { 1 } else { run.failures + 1 };
            run.failed_at = run.failed_at.max(run.step);
            let event = RunEvent::Failure { generation: n, culprit, step: run.step, reason: reason.clone() };
            actions.push(Action::Write { run: name.to_owned(), event });
            if run.failures >= run.spec.ranks.max_failures && !run.cancelling {
                let reason =
                    format!("{} generations failed without a step between them; the last: {reason}", run.failures);
                return self.end(name, run, End::Failed(reason), actions);
            }
            if cause == Cause::Error {
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
}

fn kill(place: &Place) -> Action {
    Action::Send { agent: place.0.clone(), message: Message::Kill(pb::Kill { device: place.1 }) }
}

#[cfg(test)]
mod tests;
