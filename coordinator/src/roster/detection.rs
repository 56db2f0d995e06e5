//! Who of a generation is lost, and who is to blame that it cannot go on.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use proto::pb::{left::Cause, rank_heartbeat::Activity};
use proto::run_event::Culprit;

use super::generation::{Absence, Context, Departure, Failure, Generation, GenerationPhase, Member};
use super::{Action, Agent, kill};

/// A process may take so long to start and to join its group.
const JOIN_DEADLINE: Duration = Duration::from_secs(120);
/// An agent whose stream broke has so long to come back, if the ranks around it have felt a loss.
const RECONNECT: Duration = Duration::from_secs(1);
/// A new coordinator gives agents so long, beside the failure detection, to come back: on Kubernetes they find it only
/// some seconds after it is ready.
const RECOVERY_MARGIN: Duration = Duration::from_secs(10);

impl Generation {
    /// Whether it is known how an older coordinator's generation is.
    pub(super) fn is_recovered(&mut self, context: &Context<'_>) -> bool {
        let now = context.now;
        let back = self.members.iter().all(|member| member.confirmed);
        let at_work = |member: &Member| member.joined && member.departure.is_none() && member.absence.is_none();
        if back && self.members.iter().all(at_work) {
            self.enter(now, GenerationPhase::Training);
        } else if !back && (!context.detect || now.at - self.since < context.detection + RECOVERY_MARGIN) {
            return false;
        }
        for member in self.members.iter_mut().filter(|member| !member.confirmed) {
            member.silent = now.at - self.since;
            let detail = "its agent did not come back after the coordinator's restart".to_owned();
            member.depart(now, Cause::Exited, detail);
        }
        true
    }

    /// Notes who is lost, and has them killed.
    pub(super) fn detect_lost(&mut self, context: &Context<'_>, actions: &mut Vec<Action>) {
        let (now, detection) = (context.now, context.detection);
        let in_phase = now.at - self.since;
        let training = self.phase == GenerationPhase::Training;
        let opening = self.phase == GenerationPhase::Opening;
        let reconnect = match self.phase {
            GenerationPhase::Leaving { .. } => RECONNECT.min(detection),
            _ => detection,
        };
        for member in &mut self.members {
            if let Some(Absence { cause, .. }) = member.absence.filter(|absence| now.at >= absence.due) {
                let how = if cause == Cause::Exited { "was gone" } else { "had left" };
                member.depart(now, cause, format!("it {how} when its agent came back"));
            }
        }
        for member in self.members.iter_mut().filter(|member| member.departure.is_none()) {
            let agent = context.agents.get(&member.device.agent);
            let unheard = agent.map_or(now.at - self.formed, |agent| now.at - agent.heard);
            let connected = agent.is_some_and(|agent| agent.connected);
            // A process that has not spoken yet cannot be told from one that hangs.
            let starting = !member.joined && member.heartbeat.activity() == Activity::Starting;
            let join_deadline = detection.max(JOIN_DEADLINE);
            let most_silent = if starting { join_deadline } else { detection };
            let detail = if unheard >= detection || (!connected && unheard >= reconnect) {
                member.silent += unheard;
                let how = if connected { "was not heard of" } else { "is disconnected and was not heard of" };
                format!("its agent {how} for {:.1} s", unheard.as_secs_f64())
            } else if !opening && member.silent >= most_silent {
                format!("the process was silent for {:.1} s", member.silent.as_secs_f64())
            } else if training && !member.joined && in_phase >= join_deadline {
                "did not join in time".to_owned()
            } else {
                continue;
            };
            member.depart(now, Cause::Unspecified, detail);
            actions.push(kill(&member.device, context.run, self.n));
        }
        if opening && in_phase >= detection {
            self.members[0].depart(now, Cause::Unspecified, "the rendezvous was not opened in time".to_owned());
        }
    }

    /// Why it cannot go on, if so. Of those that failed by themselves the first is to blame, since the others may have
    /// failed for it; then those that did not leave when another one had failed; last those that only felt the loss of
    /// another one.
    pub(super) fn failure(&self, agents: &BTreeMap<String, Agent>) -> Option<Failure> {
        let departures = (0u32..).zip(&self.members).filter_map(|(rank, m)| Some((rank, m, m.departure.as_ref()?)));
        let failed = departures.filter(|(_, _, departure)| blame(departure) > 0);
        if let Some((rank, member, departure)) =
            failed.max_by_key(|(rank, _, departure)| (blame(departure), Reverse((departure.at, *rank))))
        {
            let culprit = culprit(rank, member, departure.silent, agents);
            let Culprit { agent, address, device, activity, step, .. } = &culprit;
            let agent = agent.get(..8).unwrap_or(agent);
            let detail = &departure.detail;
            let mut reason = format!("rank {rank} ({device} of agent {agent} at {address}): {detail}");
            // A new coordinator knows nothing of a rank whose agent it has not heard.
            if member.confirmed {
                reason += &format!("; it was at: {activity}, after step {step}");
            }
            let culprit = (blame(departure) > 1).then_some(culprit);
            return Some(Failure { culprit, cause: departure.cause, reason });
        }
        self.members.iter().all(|member| member.cause() == Some(Cause::Finished)).then(|| {
            let reason = "all ranks finished, but rank 0's word of it was lost".to_owned();
            Failure { culprit: None, cause: Cause::Finished, reason }
        })
    }
}

/// How likely it is that a departure is what the others are due to; 0: it is no failure.
fn blame(departure: &Departure) -> u8 {
    match departure.cause {
        Cause::Exited | Cause::Unspecified | Cause::Error | Cause::Diverged if !departure.induced => 3,
        Cause::Exited | Cause::Unspecified | Cause::Error | Cause::Diverged => 2,
        Cause::Collective => 1,
        Cause::Asked | Cause::Finished | Cause::Terminated => 0,
    }
}

fn culprit(rank: u32, member: &Member, silent: Duration, agents: &BTreeMap<String, Agent>) -> Culprit {
    let agent = agents.get(&member.device.agent);
    let device = agent.and_then(|agent| agent.devices.get(member.device.index as usize));
    let unknown = || "unknown".to_owned();
    let activity = member.heartbeat.activity().as_str_name().trim_start_matches("ACTIVITY_");
    let activity = if member.confirmed { activity } else { "unknown" };
    Culprit {
        rank,
        agent: member.device.agent.clone(),
        address: agent.map_or_else(unknown, |agent| agent.address.clone()),
        device: device.map_or_else(unknown, |device| device.name.clone()),
        activity: activity.to_lowercase().replace('_', " "),
        step: member.heartbeat.step,
        silent_millis: silent.as_millis() as u64,
    }
}
