//! Who gets which devices: waiting runs in the order of the queue, then running ones that can grow.

use std::collections::HashSet;
use std::time::Duration;

use proto::pb::{self, coordinator_message::Message};
use proto::run_event::{Member, RunEvent};

use super::generation::{Generation, Leaving, Seat, Stage};
use super::run::{Ended, Phase};
use super::{Action, Agent, Device, Now, Occupant, Place, Roster, kill};

/// Devices that could start are waited with for so long, in case more are about to appear.
const GATHER: Duration = Duration::from_secs(1);
/// Between two changes of a generation that goes well, only to make it larger.
const GROW_PAUSE: Duration = Duration::from_secs(5);
/// An agent beats four times a second; one that was not heard of for so long gets nothing new.
const QUIET: Duration = Duration::from_secs(1);

impl Roster {
    /// Gives free devices to waiting runs, in the order of the queue, then to running ones that can grow.
    pub(super) fn assign(&mut self, now: Now, actions: &mut Vec<Action>) {
        let mut queue: Vec<(u64, String)> = self.runs.iter().map(|(name, run)| (run.queued, name.clone())).collect();
        queue.sort();
        let here = |agent: &Agent| agent.connected && !agent.leaving && now.at < agent.heard + QUIET;
        let total = self.places(here, |_| true).len() as u32;
        let mut free = self.places(here, |device| device.occupant.is_none());
        for (place_in_queue, (_, name)) in queue.iter().enumerate() {
            let Some(run) = self.runs.get(name).filter(|run| run.phase == Phase::Waiting && !run.cancelling) else {
                continue;
            };
            let (min, max) = (run.spec.ranks.min, run.spec.ranks.max);
            let mut survivors = self.places(here, |device| holds(device, name));
            // The furthest state first: rank 0 gives it to the others.
            survivors.sort_by_key(|place| std::cmp::Reverse(self.occupant(place).map_or(0, |occupant| occupant.step)));
            let there = (survivors.len() + free.len()) as u32;
            let agents = survivors.iter().chain(&free).map(|place| &place.0).collect::<HashSet<_>>().len();
            let Some(run) = self.runs.get_mut(name) else { continue };
            if there < min {
                run.enough_since = None;
                let holding = match survivors.len() {
                    0 => String::new(),
                    n => format!(" and {n} hold its state"),
                };
                run.reason = format!("needs {min} ranks; {} devices are free{holding}, on {agents} agents", free.len());
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
            // A new process takes seconds to start; survivors go on without, and take it in later.
            let alone = run.ended == Ended::Shrunk && survivors.len() as u32 >= min;
            let take = there.min(max) as usize;
            let mut places = survivors;
            places.truncate(take);
            let rest = if alone { 0 } else { take - places.len() };
            let taken: Vec<Place> = free.drain(..rest.min(free.len())).collect();
            let all_here = there >= max && run.generation == 0;
            if now.at < run.not_before {
                run.reason = "waits a little after a failure before the next try".to_owned();
            } else if alone || run.ended == Ended::ToGrow || all_here || now.at >= since + GATHER {
                places.extend(taken);
                self.form(now, name, places, actions);
            }
        }
        for (_, name) in &queue {
            self.grow(now, name, here, &mut free, actions);
        }
    }

    /// Has a generation leave after its step if it can have more ranks: free devices, or such as hold an old state of the run.
    fn grow(
        &mut self,
        now: Now,
        name: &str,
        here: impl Fn(&Agent) -> bool,
        free: &mut Vec<Place>,
        actions: &mut Vec<Action>,
    ) {
        let held = self.places(here, |device| holds(device, name));
        let Some(run) = self.runs.get_mut(name).filter(|run| !run.cancelling) else { return };
        let max = run.spec.ranks.max as usize;
        let Some(generation) = run.going() else { return };
        let back = held.iter().filter(|place| generation.seats.iter().all(|seat| seat.place != **place)).count();
        let settled = generation.stage == Stage::Running && generation.seats.iter().all(|seat| seat.joined);
        let room = max.saturating_sub(generation.seats.len());
        if settled && room > 0 && free.len() + back > 0 && now.at >= generation.formed + GROW_PAUSE {
            free.drain(..free.len().min(room.saturating_sub(back)));
            generation.enter(now, Stage::Leaving { cause: Leaving::Regroup { grow: true }, aborted: false });
            generation.tell_to_leave(name, false, false, actions);
        }
    }

    /// Places where waiting runs hold state but cannot start with what they hold, in the order of these runs. Two such runs would
    /// wait for each other for ever.
    fn stuck<'a>(&self, runs: impl Iterator<Item = &'a str>, here: impl Fn(&Agent) -> bool) -> Vec<Place> {
        let mut stuck = Vec::new();
        for name in runs {
            let Some(run) = self.runs.get(name).filter(|run| run.phase == Phase::Waiting) else { continue };
            let held = self.places(&here, |device| holds(device, name));
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
        (run.enough_since, run.ended) = (None, Ended::Unseen);
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

fn holds(device: &Device, run: &str) -> bool {
    device.occupant.as_ref().is_some_and(|occupant| occupant.run == run)
}
