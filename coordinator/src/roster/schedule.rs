//! Who gets which devices: waiting runs in the order of the queue, then running ones that can grow.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::time::Duration;

use proto::run_event::{Member, RunEvent};

use super::generation::{GenerationPhase, LeaveReason};
use super::run::{Reform, RunPhase};
use super::{Action, Agent, DeviceId, Now, Occupant, Roster};

/// Devices that could start are waited with for so long, in case more are about to appear.
const GATHER: Duration = Duration::from_secs(1);
/// Between two changes of a generation that goes well, only to make it larger.
const GROW_PAUSE: Duration = Duration::from_secs(5);
/// An agent sends four heartbeats a second; one that was not heard of for so long gets nothing new.
const QUIET: Duration = Duration::from_secs(1);

impl Roster {
    /// Gives free devices to waiting runs, in the order of the queue, then to running ones that can grow.
    pub(super) fn schedule(&mut self, now: Now, actions: &mut Vec<Action>) {
        let mut queue: Vec<(u64, String)> =
            self.live.values().map(|run| (run.queue_number, run.name.clone())).collect();
        queue.sort();
        let available = |agent: &Agent| agent.connected && !agent.leaving && now.at < agent.heard + QUIET;
        let mut free = self.devices(available, |device| device.occupant.is_none());
        for (position, (_, name)) in queue.iter().enumerate() {
            if !self.is_waiting(name) {
                continue;
            }
            let mut survivors = self.devices(available, |device| device.holds(name));
            // The furthest training state first: rank 0 gives it to the others.
            survivors.sort_by_key(|device| Reverse(self.occupant(device).map_or(0, |occupant| occupant.step)));
            let total = self.devices(|agent| available(agent) && agent.serves(name), |_| true).len() as u32;
            let (mut usable, others): (Vec<DeviceId>, Vec<DeviceId>) =
                std::mem::take(&mut free).into_iter().partition(|device| self.serves(device, name));
            free = others;
            // First those that no other run has a use for.
            usable.sort_by_key(|device| self.agents.get(&device.agent).is_none_or(|agent| agent.only.is_none()));
            let agents = survivors.iter().chain(&usable).map(|device| &device.agent).collect::<HashSet<_>>().len();
            let Some(run) = self.live.get_mut(name) else { continue };
            let (min, max) = (run.spec.ranks.min, run.spec.ranks.max);
            let there = (survivors.len() + usable.len()) as u32;
            if there < min {
                run.enough_since = None;
                let holding = match survivors.len() {
                    0 => String::new(),
                    n => format!(" and {n} hold its state"),
                };
                run.reason =
                    format!("needs {min} ranks; {} devices are free{holding}, on {agents} agents", usable.len());
                // What could start once others have ended must not be overtaken for ever.
                if min > total {
                    free.append(&mut usable);
                } else {
                    let later = queue.iter().skip(position + 1).map(|(_, name)| name.as_str());
                    self.take_from_later(later, (min - there) as usize, available, actions);
                }
                continue;
            }
            let since = *run.enough_since.get_or_insert(now.at);
            // A new process takes seconds to start; survivors go on without, and take it in later.
            let alone = run.reform == Reform::Survivors && survivors.len() as u32 >= min;
            let take = there.min(max) as usize;
            let mut devices = survivors;
            devices.truncate(take);
            let rest = if alone { 0 } else { take - devices.len() };
            let taken: Vec<DeviceId> = usable.drain(..rest.min(usable.len())).collect();
            free.append(&mut usable);
            let all_there = there >= max && run.generation == 0;
            if now.at < run.backoff_until {
                run.reason = "waits a little after a failure before the next try".to_owned();
            } else if alone || run.reform == Reform::Newcomers || all_there || now.at >= since + GATHER {
                devices.extend(taken);
                self.form(name, devices, actions);
            }
        }
        for (_, name) in &queue {
            self.grow(now, name, available, &mut free, actions);
        }
    }

    /// Whether a run waits for devices, with nothing left to write first.
    fn is_waiting(&self, name: &str) -> bool {
        let waits = |run: &super::Run| run.phase == RunPhase::Waiting && run.unwritten.is_empty() && !run.cancelling;
        self.live.get(name).is_some_and(waits)
    }

    /// Has a generation leave after its step if it can have more ranks: free devices, or such as hold an old training
    /// state of the run.
    fn grow(
        &mut self,
        now: Now,
        name: &str,
        available: impl Fn(&Agent) -> bool,
        free: &mut Vec<DeviceId>,
        actions: &mut Vec<Action>,
    ) {
        let holding = self.devices(available, |device| device.holds(name));
        let usable: Vec<DeviceId> = free.iter().filter(|device| self.serves(device, name)).cloned().collect();
        let Some(run) = self.live.get_mut(name).filter(|run| !run.cancelling && !run.is_closing()) else { return };
        let max = run.spec.ranks.max as usize;
        let Some(generation) = run.active_mut() else { return };
        let outside = |device: &&DeviceId| generation.members.iter().all(|member| member.device != **device);
        let back = holding.iter().filter(outside).count();
        let trains = generation.phase == GenerationPhase::Training && generation.members.iter().all(|m| m.joined);
        let room = max.saturating_sub(generation.members.len());
        if trains && room > 0 && usable.len() + back > 0 && now.at >= generation.formed + GROW_PAUSE {
            let taken: HashSet<&DeviceId> = usable.iter().take(room.saturating_sub(back)).collect();
            free.retain(|device| !taken.contains(device));
            generation.enter(now, GenerationPhase::Leaving { reason: LeaveReason::Grow, aborted: false });
            generation.order_leave(name, false, false, actions);
        }
    }

    /// Takes `missing` devices from waiting runs that hold training state but cannot start with what they hold, the
    /// last in the queue first: two such runs would wait for each other for ever. Takes none if they have fewer.
    fn take_from_later<'a>(
        &mut self,
        later: impl Iterator<Item = &'a str>,
        missing: usize,
        available: impl Fn(&Agent) -> bool,
        actions: &mut Vec<Action>,
    ) {
        let mut held: Vec<(DeviceId, String)> = Vec::new();
        for name in later.filter(|name| self.is_waiting(name)) {
            let devices = self.devices(&available, |device| device.holds(name));
            let min = self.live.get(name).map_or(0, |run| run.spec.ranks.min);
            if (devices.len() as u32) < min {
                held.extend(devices.into_iter().map(|device| (device, name.to_owned())));
            }
        }
        if held.len() >= missing {
            for (device, name) in held.into_iter().rev().take(missing) {
                self.evict(&device, &name, actions);
            }
        }
    }

    /// Reserves devices for the run's next generation, and proposes it.
    fn form(&mut self, name: &str, devices: Vec<DeviceId>, actions: &mut Vec<Action>) {
        let Some(run) = self.live.get_mut(name) else { return };
        let (generation, step) = (run.generation + 1, run.step);
        let member = |device: &DeviceId| Member { agent: device.agent.clone(), device: device.index };
        let members = devices.iter().map(member).collect();
        run.propose(RunEvent::Generation { generation, members }, actions);
        run.phase = RunPhase::Forming(devices.clone());
        run.enough_since = None;
        for (rank, device) in (0u32..).zip(devices) {
            if let Some(slot) = self.slot(&device) {
                slot.occupant = Some(Occupant { run: name.to_owned(), generation, rank, step, kill_at: None });
            }
        }
    }
}
