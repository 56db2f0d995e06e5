//! The roster: which rank of which run is on which device. A pure state machine: it takes the time as an argument and
//! returns [`Action`]s in the order in which they must be done.
//!
//! It decides by events. A decision that must outlast this coordinator is proposed as the run's next event, and takes
//! effect only when the caller says that the event is [`Roster::written`]: so whatever a run shows, devices that it
//! frees included, is durable. Each run has a queue of events of its own, so that one which cannot be written holds up
//! no other run.
//!
//! `agents` handles what agents say of themselves, `ranks` what ranks report. `run` is one run as its events tell it,
//! `generation` one membership of ranks with the table of its life, `detection` finds out who is lost and who is to
//! blame, `schedule` gives devices to runs.

mod agents;
mod detection;
mod generation;
mod ranks;
mod run;
mod schedule;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::time::Duration;

use proto::pb::{self, coordinator_message::Message};
use proto::run_event::RunEvent;

use generation::{Context, LeaveReason};
use run::Reform;
pub(crate) use run::{Run, RunPhase, Sources};

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
    /// Put the run's next event, then call [`Roster::written`]. There is no other of the same run until then.
    Write { run: String, event: RunEvent },
    /// Tell an agent; lost if it is not connected.
    Send { agent: String, message: Message },
}

/// A device of an agent.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct DeviceId {
    agent: String,
    /// Its number in the agent's list.
    index: u32,
}

#[derive(Debug, Clone)]
pub(crate) struct Agent {
    pub(crate) address: String,
    pub(crate) devices: Vec<Device>,
    pub(crate) connected: bool,
    /// The run that it was started for, if it is of use to no other.
    only: Option<String>,
    /// It is shutting down.
    leaving: bool,
    heard: Duration,
    reports: Reports,
}

/// The reports of an agent, over all its streams.
#[derive(Debug, Clone, Default)]
struct Reports {
    /// The sequence number of the newest that came.
    newest: u64,
    /// All up to this number are settled: what follows from them is in the store.
    settled: u64,
    /// Those that came and are not settled, in order.
    open: VecDeque<Report>,
}

/// What is known of a report that is not settled.
#[derive(Debug, Clone)]
struct Report {
    sequence: u64,
    run: String,
    generation: u64,
    /// It says how a rank left.
    departure: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// The process on it, or the one that it is reserved for.
    pub(crate) occupant: Option<Occupant>,
}

/// A rank process: in a generation, or holding the training state of one that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Occupant {
    pub(crate) run: String,
    pub(crate) generation: u64,
    pub(crate) rank: u32,
    step: u64,
    /// When a process whose run has ended is killed, if it has not exited by itself.
    kill_at: Option<Duration>,
}

/// All agents and runs.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    pub(crate) agents: BTreeMap<String, Agent>,
    /// Runs that have not ended.
    pub(crate) live: BTreeMap<String, Run>,
    /// The others.
    pub(crate) ended: BTreeMap<String, Run>,
    /// The number that the run which was queued last has in the queue.
    queue_number: u64,
}

impl Roster {
    /// Adds a run, behind all others in the queue.
    pub(crate) fn add(&mut self, mut run: Run) {
        run.queue_number = self.next_in_queue();
        let runs = if run.phase.is_over() { &mut self.ended } else { &mut self.live };
        runs.insert(run.name.clone(), run);
    }

    /// Adds a new run; it waits for devices once the event is written.
    pub(crate) fn submit(&mut self, mut run: Run, submitted: RunEvent) -> Vec<Action> {
        let mut actions = Vec::new();
        run.propose(submitted, &mut actions);
        self.add(run);
        actions
    }

    /// The run of that name.
    pub(crate) fn find(&self, name: &str) -> Option<&Run> {
        self.live.get(name).or_else(|| self.ended.get(name))
    }

    /// All runs, in the order of their names within the live ones and within the others.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Run> {
        self.live.values().chain(self.ended.values())
    }

    /// Proposes the end of a run, after the step that it is at. One that has ended stays as it is.
    pub(crate) fn cancel(&mut self, name: &str) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(run) = self.live.get_mut(name)
            && !run.cancelling
            && !run.unwritten.iter().any(|event| *event == RunEvent::Cancelling || run::is_end(event))
        {
            run.propose(RunEvent::Cancelling, &mut actions);
        }
        actions
    }

    /// Proposes that an ended run is queued again, from the checkpoint of this step or the newest, perhaps with so many
    /// epochs.
    pub(crate) fn resume(
        &mut self,
        name: &str,
        request_id: String,
        (step, epochs): (Option<u64>, Option<u32>),
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(run) = self.ended.get_mut(name) {
            run.propose(RunEvent::Resumed { request_id, step, epochs }, &mut actions);
        }
        actions
    }

    /// The event of a run that was proposed first is in the store: it takes effect.
    pub(crate) fn written(&mut self, now: Now, name: &str) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(mut run) = self.live.remove(name).or_else(|| self.ended.remove(name)) else { return actions };
        if let Some(event) = run.unwritten.pop_front() {
            self.take_effect(now, &mut run, &event, &mut actions);
        }
        if let Some(event) = run.unwritten.front() {
            actions.push(Action::Write { run: name.to_owned(), event: event.clone() });
        }
        if run.phase.is_over() {
            self.ended.insert(name.to_owned(), run);
        } else {
            self.live.insert(name.to_owned(), run);
            self.advance(now, false, name, &mut actions);
        }
        self.schedule(now, &mut actions);
        actions
    }

    /// Changes a run as a written event says, and tells agents what follows from it.
    fn take_effect(&mut self, now: Now, run: &mut Run, event: &RunEvent, actions: &mut Vec<Action>) {
        let members = run.active().map_or_else(Vec::new, |generation| generation.members.clone());
        run.apply(now, now.wall, event);
        let freed: Vec<DeviceId> = match event {
            RunEvent::Generation { generation, members } => {
                if let Some(first) = members.first() {
                    let serve = pb::Serve { run: run.name.clone(), generation: *generation };
                    actions.push(Action::Send { agent: first.agent.clone(), message: Message::Serve(serve) });
                }
                return;
            }
            RunEvent::Resumed { .. } => {
                run.queue_number = self.next_in_queue();
                return;
            }
            // An untrusted process holds nothing that the next generation could use.
            RunEvent::Failure { .. } => members.into_iter().filter(|m| m.is_untrusted()).map(|m| m.device).collect(),
            // Those that have yet to leave do so by themselves.
            RunEvent::Done { .. } => {
                members.into_iter().filter(|member| member.departure.is_some()).map(|member| member.device).collect()
            }
            RunEvent::Cancelled | RunEvent::Failed { .. } => self.devices_of(&run.name),
            _ => return,
        };
        for device in freed {
            self.evict(&device, &run.name, actions);
        }
    }

    /// Does whatever the time calls for. Silence counts here alone: to be called when everything that arrived has been
    /// handled.
    pub(crate) fn tick(&mut self, now: Now) -> Vec<Action> {
        let mut actions = Vec::new();
        let names: Vec<String> = self.live.keys().cloned().collect();
        for name in &names {
            self.advance(now, true, name, &mut actions);
        }
        self.schedule(now, &mut actions);
        self.kill_late_ranks(now, &mut actions);
        let needed: HashSet<&str> = self.live.values().flat_map(Run::agents).collect();
        self.agents.retain(|name, agent| {
            agent.connected || now.at < agent.heard + FORGOTTEN || needed.contains(name.as_str())
        });
        actions
    }

    /// Takes a live run as far as what is known and written allows. Silence counts only if `detect`. True: it has begun
    /// to wait for devices.
    fn advance(&mut self, now: Now, detect: bool, name: &str, actions: &mut Vec<Action>) -> bool {
        let Some(run) = self.live.get_mut(name) else { return false };
        let (detection, cancelling) = (run.detection(), run.cancelling);
        if let RunPhase::Active(generation) = &mut run.phase
            && !run.unwritten.iter().any(run::is_close)
        {
            generation
                .advance(&Context { now, detect, run: name, detection, cancelling, agents: &self.agents }, actions);
        }
        if !run.unwritten.is_empty() {
            return false;
        }
        let mut waits = false;
        if let RunPhase::Active(generation) = &run.phase
            && let Some(reason) = generation.closed()
        {
            let reform = match reason {
                LeaveReason::Failure(failure) => {
                    let event = RunEvent::Failure {
                        generation: generation.n,
                        culprit: failure.culprit.clone(),
                        step: run.step,
                        reason: failure.reason.clone(),
                    };
                    run.propose(event, actions);
                    return false;
                }
                LeaveReason::Grow => Reform::Newcomers,
                LeaveReason::AgentLeaving | LeaveReason::Cancel => Reform::Survivors,
            };
            run.wait(reform);
            waits = true;
        }
        if run.phase == RunPhase::Waiting {
            if run.cancelling {
                run.propose(RunEvent::Cancelled, actions);
            } else if let Some(reason) = run.hopeless() {
                run.propose(RunEvent::Failed { reason }, actions);
            }
        }
        waits
    }

    /// Kills ranks of ended runs that do not exit by themselves.
    fn kill_late_ranks(&mut self, now: Now, actions: &mut Vec<Action>) {
        let of_ended = |device: &Device| device.occupant.as_ref().is_some_and(|o| !self.live.contains_key(&o.run));
        for device in self.devices(|_| true, of_ended) {
            let detection =
                self.occupant(&device).and_then(|occupant| self.ended.get(&occupant.run)).map(Run::detection);
            let Some(occupant) = self.slot(&device).and_then(|slot| slot.occupant.as_mut()) else { continue };
            let kill_at = *occupant.kill_at.get_or_insert(now.at + detection.unwrap_or_default());
            let run = occupant.run.clone();
            if now.at >= kill_at {
                self.evict(&device, &run, actions);
            }
        }
    }

    fn next_in_queue(&mut self) -> u64 {
        self.queue_number += 1;
        self.queue_number
    }

    fn slot(&mut self, device: &DeviceId) -> Option<&mut Device> {
        self.agents.get_mut(&device.agent)?.devices.get_mut(device.index as usize)
    }

    fn occupant(&self, device: &DeviceId) -> Option<&Occupant> {
        self.agents.get(&device.agent)?.devices.get(device.index as usize)?.occupant.as_ref()
    }

    /// Frees a device of the run's process, if that is on it, and has the process killed.
    fn evict(&mut self, device: &DeviceId, run: &str, actions: &mut Vec<Action>) {
        let occupant = self.slot(device).and_then(|slot| slot.occupant.take_if(|occupant| occupant.run == run));
        if let Some(Occupant { run, generation, .. }) = occupant {
            actions.push(kill(device, &run, generation));
        }
    }

    /// How the run has ended that this agent was started for.
    pub(crate) fn end_for(&self, agent: &str) -> pb::RunState {
        let only = self.agents.get(agent).and_then(|agent| agent.only.as_ref());
        let ended = only.and_then(|run| self.ended.get(run));
        ended.map_or(pb::RunState::Unspecified, Run::state)
    }

    /// Whether a device's agent may have ranks of this run.
    fn serves(&self, device: &DeviceId, run: &str) -> bool {
        self.agents.get(&device.agent).is_some_and(|agent| agent.serves(run))
    }

    fn devices_of(&self, run: &str) -> Vec<DeviceId> {
        self.devices(|_| true, |device| device.holds(run))
    }

    fn devices(&self, of: impl Fn(&Agent) -> bool, which: impl Fn(&Device) -> bool) -> Vec<DeviceId> {
        let mut devices = Vec::new();
        for (name, agent) in self.agents.iter().filter(|(_, agent)| of(agent)) {
            let matching = (0u32..).zip(&agent.devices).filter(|(_, device)| which(device));
            devices.extend(matching.map(|(index, _)| DeviceId { agent: name.clone(), index }));
        }
        devices
    }
}

impl Agent {
    /// Whether it may have ranks of this run.
    fn serves(&self, run: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == run)
    }
}

impl Device {
    /// Whether a process of this run is on it.
    fn holds(&self, run: &str) -> bool {
        self.occupant.as_ref().is_some_and(|occupant| occupant.run == run)
    }
}

fn kill(device: &DeviceId, run: &str, generation: u64) -> Action {
    let kill = pb::Kill { device: device.index, run: run.to_owned(), generation };
    Action::Send { agent: device.agent.clone(), message: Message::Kill(kill) }
}

#[cfg(test)]
mod tests;
