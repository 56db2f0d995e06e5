//! What agents say of themselves: hello, heartbeats, the end of a stream.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::pb::{self, left::Cause};

use super::generation::{Absence, GenerationPhase};
use super::{Action, Agent, Device, DeviceId, Now, Occupant, Report, Reports, Roster, Run, RunPhase, kill};

impl Roster {
    /// An agent has connected, for the first time or again.
    pub(crate) fn hello(&mut self, now: Now, hello: &pb::Hello) -> Vec<Action> {
        let mut actions = Vec::new();
        let device = |name: &String| Device { name: name.clone(), occupant: None };
        let mut devices: Vec<Device> = hello.devices.iter().map(device).collect();
        for occupied in &hello.occupied {
            let device = DeviceId { agent: hello.agent.clone(), index: occupied.device };
            let pb::Occupied { generation, rank, step, .. } = *occupied;
            if !self.is_useful(&device, occupied) {
                actions.push(kill(&device, &occupied.run, generation));
            } else if let Some(slot) = devices.get_mut(occupied.device as usize) {
                slot.occupant = Some(Occupant { run: occupied.run.clone(), generation, rank, step, kill_at: None });
            }
        }
        let address = hello.advertise_address.clone();
        let reports = self.agents.remove(&hello.agent).map(|agent| agent.reports).unwrap_or_default();
        let only = Some(hello.only_run.clone()).filter(|run| !run.is_empty());
        let agent = Agent { address, devices, connected: true, only, leaving: false, heard: now.at, reports };
        self.agents.insert(hello.agent.clone(), agent);
        let concerned = self.live.values().filter(|run| run.agents().any(|agent| *agent == hello.agent));
        let concerned: Vec<String> = concerned.map(|run| run.name.clone()).collect();
        for name in &concerned {
            self.confirm_members(now, name, hello);
            self.advance(now, false, name, &mut actions);
        }
        self.schedule(now, &mut actions);
        actions
    }

    /// Compares a run's members on an agent with the ranks that the agent has.
    fn confirm_members(&mut self, now: Now, name: &str, hello: &pb::Hello) {
        let Some(run) = self.live.get_mut(name) else { return };
        let due = now.at + run.detection();
        let (next, mut step) = (run.generation + 1, run.step);
        let mut reserved = Vec::new();
        match &mut run.phase {
            RunPhase::Forming(devices) => {
                let here = (0u32..).zip(devices).filter(|(_, device)| device.agent == hello.agent);
                reserved.extend(here.map(|(rank, device)| (rank, device.clone(), next)));
            }
            RunPhase::Active(generation) => {
                let n = generation.n;
                let here = (0u32..).zip(&mut generation.members).filter(|(_, m)| m.device.agent == hello.agent);
                for (rank, member) in here {
                    let is_it = |o: &&pb::Occupied| {
                        o.run == name && o.device == member.device.index && o.generation == n && o.rank == rank
                    };
                    match hello.occupied.iter().find(is_it) {
                        Some(occupied) if occupied.joined => {
                            generation.start.get_or_insert(occupied.step);
                            (member.joined, member.absence) = (true, None);
                            step = step.max(occupied.step);
                        }
                        Some(occupied) => {
                            member.absence.get_or_insert(Absence { due, cause: Cause::Collective });
                            step = step.max(occupied.step);
                        }
                        None if generation.phase == GenerationPhase::Opening => {
                            reserved.push((rank, member.device.clone(), n));
                        }
                        None => {
                            member.absence.get_or_insert(Absence { due, cause: Cause::Exited });
                        }
                    }
                    member.confirmed = true;
                }
            }
            _ => {}
        }
        run.step = step;
        for (rank, device, generation) in reserved {
            if let Some(slot) = self.slot(&device) {
                slot.occupant = Some(Occupant { run: name.to_owned(), generation, rank, step, kill_at: None });
            }
        }
    }

    /// Whether the process on a device is in its run's generation, or holds training state that a later one can use.
    fn is_useful(&self, device: &DeviceId, occupied: &pb::Occupied) -> bool {
        let Some(run) = self.live.get(&occupied.run) else { return false };
        match &run.phase {
            RunPhase::Active(generation) if occupied.generation == generation.n => {
                generation.members.get(occupied.rank as usize).is_some_and(|member| member.device == *device)
            }
            _ => !occupied.joined && occupied.generation > run.resumed_after,
        }
    }

    /// An agent's stream has broken.
    pub(crate) fn disconnected(&mut self, agent: &str) {
        if let Some(agent) = self.agents.get_mut(agent) {
            agent.connected = false;
        }
    }

    /// An agent is there, and says when it last heard of its processes. Returns up to which number its reports are
    /// settled.
    pub(crate) fn heartbeat(&mut self, now: Now, agent: &str, heartbeat: &pb::Heartbeat) -> u64 {
        let Some(known) = self.agents.get_mut(agent) else { return 0 };
        known.reports.settle(&self.live);
        let settled = known.reports.settled;
        (known.heard, known.leaving) = (now.at, heartbeat.leaving);
        let generations = self.live.values_mut().filter_map(Run::active_mut);
        let members = generations.flat_map(|generation| &mut generation.members);
        for member in members.filter(|member| member.device.agent == agent) {
            let device = heartbeat.devices.get(member.device.index as usize).copied().unwrap_or_default();
            // What a rank was at when it left is told of it, whatever is on its device by now.
            if member.departure.is_none() {
                member.silent = Duration::from_millis(device.silent_millis);
                member.heartbeat = device.rank.unwrap_or_default();
            }
        }
        settled
    }

    /// This process was held up for so long, so that it could hear nobody: that is nobody's silence.
    pub(crate) fn discount_stall(&mut self, now: Now, stall: Duration) {
        self.agents.values_mut().for_each(|agent| agent.heard = (agent.heard + stall).min(now.at));
    }
}

impl Reports {
    /// Takes note of a report. False: it came before.
    pub(super) fn note(&mut self, message: &pb::RankMessage) -> bool {
        if message.sequence == 0 {
            return true;
        }
        if message.sequence <= self.newest {
            return false;
        }
        self.newest = message.sequence;
        let departure = matches!(message.message, Some(pb::rank_message::Message::Left(_)));
        let (sequence, run, generation) = (message.sequence, message.run.clone(), message.generation);
        self.open.push_back(Report { sequence, run, generation, departure });
        true
    }

    /// A report is settled when its run has nothing left to write. How a rank left is part of the event that follows
    /// when all have left, so that settles only with the generation.
    fn settle(&mut self, live: &BTreeMap<String, Run>) {
        let is_open = |report: &Report| {
            let Some(run) = live.get(&report.run) else { return false };
            let current = run.active().is_some_and(|generation| generation.n == report.generation);
            !run.unwritten.is_empty() || (report.departure && current)
        };
        while let Some(report) = self.open.front().filter(|report| !is_open(report)) {
            self.settled = report.sequence;
            self.open.pop_front();
        }
    }
}
