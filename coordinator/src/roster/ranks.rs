//! What ranks report, and what the agent of rank 0 says of the generation's store.

use std::time::Duration;

use proto::pb::{self, coordinator_message::Message, left::Cause, rank_message::Message as Report};
use proto::run_event::RunEvent;

use super::generation::{GenerationPhase, Member};
use super::{Action, DeviceId, Now, Occupant, Roster, RunPhase};

impl Roster {
    /// The agent of rank 0 has opened the generation's TCPStore, or could not.
    pub(crate) fn serving(&mut self, now: Now, agent: &str, serving: &pb::Serving) -> Vec<Action> {
        let Some(address) = self.agents.get(agent).map(|agent| agent.address.clone()) else { return Vec::new() };
        let Some(run) = self.live.get_mut(&serving.run) else { return Vec::new() };
        let elapsed = run.began.map_or(0.0, |began| now.wall.saturating_sub(began) as f64 / 1000.0);
        let RunPhase::Active(generation) = &mut run.phase else { return Vec::new() };
        if generation.n != serving.generation
            || generation.phase != GenerationPhase::Opening
            || generation.members[0].device.agent != agent
        {
            return Vec::new();
        }
        if serving.port == 0 {
            let detail = format!("the rendezvous could not be opened: {}", serving.error);
            generation.members[0].depart(now, Cause::Error, detail);
            let mut actions = Vec::new();
            self.advance(now, false, &serving.run, &mut actions);
            return actions;
        }
        generation.enter(now, GenerationPhase::Training);
        let host = if address.contains(':') { format!("[{address}]") } else { address };
        let join = |(rank, member): (u32, &Member)| Action::Send {
            agent: member.device.agent.clone(),
            message: Message::Join(pb::Join {
                run: serving.run.clone(),
                generation: generation.n,
                device: member.device.index,
                rank,
                world_size: generation.members.len() as u32,
                store: format!("{host}:{}", serving.port),
                spec_json: run.spec_json.clone(),
                manifest_key: run.sources.manifest_key.clone(),
                manifest_sha256: run.sources.manifest_sha256.clone(),
                checkpoints: run.checkpoints.iter().rev().cloned().collect(),
                elapsed_seconds: elapsed,
                start: run.sources.start.clone(),
                traceparent: run.sources.traceparent.clone(),
                cores: 0,
            }),
        };
        (0u32..).zip(&generation.members).map(join).collect()
    }

    /// A rank, or its agent on its behalf, reports something. Reports of generations that are over are dropped.
    pub(crate) fn rank(&mut self, now: Now, agent: &str, message: &pb::RankMessage) -> Vec<Action> {
        let mut actions = Vec::new();
        let device = DeviceId { agent: agent.to_owned(), index: message.device };
        if self.agents.get_mut(agent).is_some_and(|agent| !agent.reports.note(message)) {
            return actions;
        }
        self.note_occupant(now, &device, message);
        let Some(run) = self.live.get_mut(&message.run) else {
            // A rank of an ended run has left: its device is free.
            if let Some(Report::Left(_)) = &message.message {
                self.evict(&device, &message.run, &mut actions);
            }
            return actions;
        };
        let closing = run.is_closing();
        let RunPhase::Active(generation) = &mut run.phase else { return actions };
        let (n, rank) = (generation.n, message.rank);
        let member = generation.members.get_mut(rank as usize);
        let Some(member) = member.filter(|member| member.device == device && message.generation == n) else {
            return actions;
        };
        member.silent = Duration::ZERO;
        match &message.message {
            Some(Report::Left(left)) => {
                run.step = run.step.max(left.step);
                member.depart(now, left.cause(), left.detail.clone());
            }
            _ if closing => return actions,
            Some(Report::Joined(joined)) => {
                member.joined = true;
                generation.start.get_or_insert(joined.step);
                run.step = joined.step;
                for pb::Damaged { key, reason } in joined.damaged.clone() {
                    if run.has_checkpoint(&key) {
                        run.propose(RunEvent::Damaged { key, reason }, &mut actions);
                    }
                }
            }
            Some(Report::Stepped(stepped)) if rank == 0 => run.step = stepped.step,
            // An older coordinator may have written it, and died before it said so.
            Some(Report::Checkpointed(made)) if rank == 0 && !run.has_checkpoint(&made.key) => {
                let pb::Checkpointed { step, key, digests, top1 } = made.clone();
                let digests = digests.into_iter().collect();
                run.propose(RunEvent::Checkpoint { step, key, digests, top1 }, &mut actions);
            }
            Some(Report::Finished(finished)) if rank == 0 => {
                let pb::Finished { key, digests } = finished.clone();
                let digests = digests.into_iter().collect();
                run.propose(RunEvent::Done { model: key, digests }, &mut actions);
            }
            _ => {}
        }
        if self.advance(now, false, &message.run, &mut actions) {
            self.schedule(now, &mut actions);
        }
        actions
    }

    /// Notes of the process on a device whether it is still there, and what it holds.
    fn note_occupant(&mut self, now: Now, device: &DeviceId, message: &pb::RankMessage) {
        let Some(known) = self.agents.get_mut(&device.agent) else { return };
        known.heard = now.at;
        let Some(slot) = known.devices.get_mut(device.index as usize) else { return };
        let is_it = |o: &&mut Occupant| o.run == message.run && o.generation == message.generation;
        if let (Some(Report::Left(left)), Some(occupant)) = (&message.message, slot.occupant.as_mut().filter(is_it)) {
            match left.cause() {
                Cause::Exited | Cause::Terminated => slot.occupant = None,
                _ => occupant.step = left.step,
            }
        }
    }
}
