//! One generation: who sits in it, who is lost, who has left, and whose fault it is.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use proto::pb::{self, coordinator_message::Message, left::Cause};
use proto::run_event::Culprit;

use super::{Action, Agent, Now, Place, kill};

/// A completed step, a validation, or a checkpoint may take so long before ranks that were asked to leave are aborted.
const ASKED: Duration = Duration::from_secs(120);
/// A process may take so long to start and to join its group.
const JOINING: Duration = Duration::from_secs(120);
/// An agent whose stream broke has so long to come back, if the ranks around it have felt a loss.
const RECONNECT: Duration = Duration::from_secs(1);
/// A new coordinator gives agents so long, beside the failure detection, to come back: on Kubernetes they find it only some seconds
/// after it is ready.
const RECOVERY_MARGIN: Duration = Duration::from_secs(10);

/// One fixed membership of ranks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Generation {
    pub(super) n: u64,
    pub(super) seats: Vec<Seat>,
    pub(super) stage: Stage,
    /// When its stage began.
    pub(super) since: Duration,
    pub(super) formed: Duration,
    /// Where it began, once it is known.
    pub(super) start: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Seat {
    pub(super) place: Place,
    pub(super) joined: bool,
    pub(super) confirmed: bool,
    pub(super) left: Option<Departure>,
    /// What a hello tells of a rank that is not at work. It counts from then on, unless the rank's own word, which may be on its
    /// way behind the hello, comes first.
    pub(super) missing: Option<(Duration, Cause)>,
    pub(super) silent: Duration,
    /// What it was at when it was last heard of.
    pub(super) alive: pb::RankHeartbeat,
}

/// How a rank left.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Departure {
    /// `Unspecified`: it was given up, and must be ended.
    pub(super) cause: Cause,
    pub(super) detail: String,
    /// How long it had not been heard of.
    pub(super) silent: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Stage {
    /// The agent of rank 0 opens the TCPStore.
    Opening,
    /// Ranks join, then train.
    Running,
    /// Formed under an older coordinator; its agents have yet to come back.
    Recovering,
    /// Ranks were asked to leave, or have begun to.
    Leaving { cause: Leaving, aborted: bool },
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Leaving {
    /// With `grow` to take in more ranks; without it because one was asked to leave by its own agent.
    Regroup {
        grow: bool,
    },
    Cancel,
    Failure(Failure),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failure {
    pub(super) culprit: Option<Culprit>,
    pub(super) cause: Cause,
    pub(super) reason: String,
}

impl Seat {
    pub(super) fn new(place: Place) -> Self {
        Self {
            place,
            joined: false,
            confirmed: false,
            left: None,
            missing: None,
            silent: Duration::ZERO,
            alive: pb::RankHeartbeat::default(),
        }
    }

    /// Notes that it has left; what was noted before stands.
    pub(super) fn leave(&mut self, cause: Cause, detail: String) {
        let silent = self.silent;
        self.left.get_or_insert(Departure { cause, detail, silent });
    }

    fn cause(&self) -> Option<Cause> {
        self.left.as_ref().map(|left| left.cause)
    }
}

impl Generation {
    pub(super) fn new(now: Now, n: u64, seats: Vec<Seat>, stage: Stage) -> Self {
        Self { n, seats, stage, since: now.at, formed: now.at, start: None }
    }

    pub(super) fn enter(&mut self, now: Now, stage: Stage) {
        (self.stage, self.since) = (stage, now.at);
    }

    /// Looks after it: who is lost, who has left, what is asked. Silence counts only if `judge`.
    pub(super) fn look(
        &mut self,
        now: Now,
        judge: bool,
        (run, detection, cancelling): (&str, Duration, bool),
        agents: &BTreeMap<String, Agent>,
        actions: &mut Vec<Action>,
    ) {
        if self.stage == Stage::Recovering && !self.recover(now, judge, detection) {
            return;
        }
        if judge {
            self.judge(now, detection, agents, actions);
        }
        let fault = self.fault(agents);
        let asked = self.seats.iter().any(|seat| matches!(seat.cause(), Some(Cause::Asked | Cause::Terminated)));
        match &mut self.stage {
            Stage::Leaving { cause, aborted } => {
                match (&cause, fault) {
                    // The first word may come from a rank that only felt the other's death.
                    (Leaving::Regroup { .. } | Leaving::Failure(_), Some(found)) => *cause = Leaving::Failure(found),
                    (Leaving::Cancel, Some(_)) if !*aborted => {
                        (*aborted, self.since) = (true, now.at);
                        return self.tell_to_leave(run, false, true, actions);
                    }
                    _ => {}
                }
                let failed = matches!(cause, Leaving::Failure(_));
                let deadline = if *aborted { detection } else { ASKED };
                let late = now.at - self.since >= deadline;
                if !*aborted && (failed || late) {
                    (*aborted, self.since) = (true, now.at);
                    self.tell_to_leave(run, false, true, actions);
                } else if late {
                    for seat in self.seats.iter_mut().filter(|seat| seat.left.is_none()) {
                        seat.leave(Cause::Error, "did not leave in time".to_owned());
                    }
                }
            }
            Stage::Running if fault.is_none() && !cancelling && asked => {
                // An agent that is shut down asks its ranks by itself, and the control word all others.
                self.enter(now, Stage::Leaving { cause: Leaving::Regroup { grow: false }, aborted: false });
                self.tell_to_leave(run, false, false, actions);
            }
            _ if fault.is_some() || cancelling => {
                let opening = self.stage == Stage::Opening;
                let (cause, abort) = match fault {
                    Some(failure) if !cancelling => (Leaving::Failure(failure), true),
                    other => (Leaving::Cancel, other.is_some()),
                };
                self.enter(now, Stage::Leaving { cause, aborted: abort });
                if opening {
                    // Nobody was told to join yet.
                    self.seats.iter_mut().for_each(|seat| seat.leave(Cause::Asked, String::new()));
                } else {
                    self.tell_to_leave(run, !abort, abort, actions);
                }
            }
            _ => {}
        }
    }

    /// Whether it is known how an older coordinator's generation stands.
    fn recover(&mut self, now: Now, judge: bool, detection: Duration) -> bool {
        let back = self.seats.iter().all(|seat| seat.confirmed);
        let at_work = |seat: &Seat| seat.joined && seat.left.is_none() && seat.missing.is_none();
        if back && self.seats.iter().all(at_work) {
            self.enter(now, Stage::Running);
        } else if !back && (!judge || now.at - self.since < detection + RECOVERY_MARGIN) {
            return false;
        }
        for seat in self.seats.iter_mut().filter(|seat| !seat.confirmed) {
            seat.silent = now.at - self.since;
            seat.leave(Cause::Exited, "its agent did not come back after the coordinator's restart".to_owned());
        }
        true
    }

    /// Finds out who is lost.
    fn judge(&mut self, now: Now, detection: Duration, agents: &BTreeMap<String, Agent>, actions: &mut Vec<Action>) {
        let running_for = now.at - self.since;
        let patience = match self.stage {
            Stage::Leaving { .. } => RECONNECT.min(detection),
            _ => detection,
        };
        for seat in &mut self.seats {
            if let Some((_, cause)) = seat.missing.filter(|(due, _)| now.at >= *due) {
                let what = if cause == Cause::Exited { "was gone" } else { "had left" };
                seat.leave(cause, format!("it {what} when its agent came back"));
            }
        }
        for seat in self.seats.iter_mut().filter(|seat| seat.left.is_none()) {
            let agent = agents.get(&seat.place.0);
            let unheard = agent.map_or(now.at - self.formed, |agent| now.at - agent.heard);
            let connected = agent.is_some_and(|agent| agent.connected);
            // A process that has not spoken yet cannot be told from one that hangs.
            let starting = !seat.joined && seat.alive.activity() == pb::rank_heartbeat::Activity::Starting;
            let wait = if starting { detection.max(JOINING) } else { detection };
            if unheard >= detection || (!connected && unheard >= patience) {
                seat.silent = unheard + seat.silent;
                let how = if connected { "was not heard of" } else { "is disconnected and was not heard of" };
                seat.leave(Cause::Unspecified, format!("its agent {how} for {:.1} s", unheard.as_secs_f64()));
            } else if self.stage != Stage::Opening && seat.silent >= wait {
                let silent = seat.silent.as_secs_f64();
                seat.leave(Cause::Unspecified, format!("the process was silent for {silent:.1} s"));
            } else if self.stage == Stage::Running && !seat.joined && running_for >= detection.max(JOINING) {
                seat.leave(Cause::Unspecified, "did not join in time".to_owned());
            }
            if seat.left.is_some() {
                actions.push(kill(&seat.place));
            }
        }
        if self.stage == Stage::Opening && running_for >= detection {
            self.seats[0].leave(Cause::Unspecified, "the rendezvous was not opened in time".to_owned());
        }
    }

    /// Who is at fault that it cannot go on: a rank that is gone or silent rather than one that only felt it.
    fn fault(&self, agents: &BTreeMap<String, Agent>) -> Option<Failure> {
        let weight = |cause: &Cause| match cause {
            Cause::Exited | Cause::Unspecified => 3,
            Cause::Error => 2,
            Cause::Collective => 1,
            Cause::Asked | Cause::Finished | Cause::Terminated => 0,
        };
        let all_finished = || self.seats.iter().all(|seat| seat.cause() == Some(Cause::Finished));
        let left = (0u32..).zip(&self.seats).filter_map(|(rank, seat)| Some((rank, seat, seat.left.as_ref()?)));
        match left.max_by_key(|(rank, _, left)| (weight(&left.cause), std::cmp::Reverse(*rank))) {
            Some((rank, seat, left)) if weight(&left.cause) > 0 => {
                let culprit = culprit(rank, seat, left.silent, agents);
                let Culprit { agent, address, device, activity, step, .. } = &culprit;
                let agent = agent.get(..8).unwrap_or(agent);
                let reason = format!(
                    "rank {rank} ({device} of agent {agent} at {address}): {}; it was at: {activity}, after step {step}",
                    left.detail
                );
                Some(Failure { culprit: (weight(&left.cause) > 1).then_some(culprit), cause: left.cause, reason })
            }
            _ if all_finished() => {
                let reason = "all ranks finished, but rank 0's word of it was lost".to_owned();
                Some(Failure { culprit: None, cause: Cause::Finished, reason })
            }
            _ => None,
        }
    }

    pub(super) fn tell_to_leave(&self, run: &str, checkpoint: bool, abort: bool, actions: &mut Vec<Action>) {
        let mut told = HashSet::new();
        for seat in self.seats.iter().filter(|seat| seat.left.is_none()) {
            if told.insert(&seat.place.0) {
                let leave = pb::Leave { run: run.to_owned(), generation: self.n, checkpoint, abort };
                actions.push(Action::Send { agent: seat.place.0.clone(), message: Message::Leave(leave) });
            }
        }
    }
}

fn culprit(rank: u32, seat: &Seat, silent: Duration, agents: &BTreeMap<String, Agent>) -> Culprit {
    let (name, at) = &seat.place;
    let agent = agents.get(name);
    let device = agent.and_then(|agent| agent.devices.get(*at as usize));
    let unknown = || "unknown".to_owned();
    let activity = seat.alive.activity().as_str_name().trim_start_matches("ACTIVITY_").to_lowercase().replace('_', " ");
    Culprit {
        rank,
        agent: name.clone(),
        address: agent.map_or_else(unknown, |agent| agent.address.clone()),
        device: device.map_or_else(unknown, |device| device.name.clone()),
        activity,
        step: seat.alive.step,
        silent_millis: silent.as_millis() as u64,
    }
}
