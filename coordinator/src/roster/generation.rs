//! One generation: a fixed membership of ranks. This is its life:
//!
//! | phase | what happens | what follows | next phase |
//! | --- | --- | --- | --- |
//! | none | `schedule` chose devices, and the event `Generation` is written | `Serve` to the agent of rank 0 | `Opening` |
//! | none | a new coordinator reads the event `Generation` | it waits for the agents' hellos | `Recovering` |
//! | `Opening` | the agent answers `Serving` with a port | `Join` for every rank | `Training` |
//! | `Opening` | no store, a lost member, or the run is cancelled | all depart: nobody has joined yet | `Leaving` |
//! | `Recovering` | all agents are back with all ranks at work | | `Training` |
//! | `Recovering` | a rank is not at work, or an agent is not back in time | that member departs | `Leaving` |
//! | `Training` | a member departs in failure | `Leave` with abort | `Leaving` for `Failure` |
//! | `Training` | a member departs because its agent ends | `Leave` to the others | `Leaving` for `AgentLeaving` |
//! | `Training` | `schedule` finds devices for more ranks | `Leave` | `Leaving` for `Grow` |
//! | `Training` | the run is cancelled | `Leave` with a checkpoint | `Leaving` for `Cancel` |
//! | `Leaving` | a member departs in failure | `Leave` with abort | `Leaving` for `Failure`, unless for `Cancel` |
//! | `Leaving` | members have not left after 120 s | `Leave` with abort | the same |
//! | `Leaving` | members have not left `failure_detection` after an abort | they count as departed | the same |
//! | `Leaving` | all have departed | `Failure`: that event is written; else the run waits, or is cancelled | none: it is closed |
//! | any | rank 0 reports `Finished` | the event `Done` is written | none: it is closed |

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use proto::pb::{self, coordinator_message::Message, left::Cause};
use proto::run_event::Culprit;

use super::{Action, Agent, DeviceId, Now};

/// A completed step, a validation, or a checkpoint may take so long before ranks that were asked to leave are aborted.
const LEAVE_DEADLINE: Duration = Duration::from_secs(120);

/// One fixed membership of ranks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Generation {
    pub(super) n: u64,
    /// In the order of the ranks.
    pub(super) members: Vec<Member>,
    pub(super) phase: GenerationPhase,
    /// When its phase began.
    pub(super) since: Duration,
    pub(super) formed: Duration,
    /// The step at which it began, once that is known.
    pub(super) start: Option<u64>,
}

/// A rank of a generation.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Member {
    pub(super) device: DeviceId,
    pub(super) joined: bool,
    /// This coordinator has heard from its agent how it is.
    pub(super) confirmed: bool,
    pub(super) departure: Option<Departure>,
    pub(super) absence: Option<Absence>,
    /// For how long its agent had not heard of it.
    pub(super) silent: Duration,
    /// The newest that its agent heard.
    pub(super) heartbeat: pb::RankHeartbeat,
}

/// How a member left.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Departure {
    pub(super) at: Duration,
    /// `Unspecified`: it was given up, and must be killed.
    pub(super) cause: Cause,
    pub(super) detail: String,
    /// For how long it had not been heard of.
    pub(super) silent: Duration,
    /// It follows from the departure of another one.
    pub(super) induced: bool,
}

/// A hello did not have a member at work. It counts as departed from `due` on, unless the rank's own report, which may
/// be on its way behind the hello, comes first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Absence {
    pub(super) due: Duration,
    pub(super) cause: Cause,
}

/// See the table.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum GenerationPhase {
    /// The agent of rank 0 opens the TCPStore.
    Opening,
    /// Ranks join, then train.
    Training,
    /// Formed under an older coordinator; its agents have yet to come back.
    Recovering,
    /// Ranks were asked to leave, or have begun to.
    Leaving { reason: LeaveReason, aborted: bool },
}

/// What a generation is left for.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum LeaveReason {
    /// More ranks are to join the next one.
    Grow,
    /// An agent that shuts down had its ranks leave.
    AgentLeaving,
    Cancel,
    Failure(Failure),
}

/// Why a generation cannot go on.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Failure {
    pub(super) culprit: Option<Culprit>,
    pub(super) cause: Cause,
    pub(super) reason: String,
}

/// What a generation's advance depends on.
pub(super) struct Context<'a> {
    pub(super) now: Now,
    /// Whether silence counts.
    pub(super) detect: bool,
    pub(super) run: &'a str,
    pub(super) detection: Duration,
    pub(super) cancelling: bool,
    pub(super) agents: &'a BTreeMap<String, Agent>,
}

impl Member {
    pub(super) fn new(device: DeviceId, confirmed: bool) -> Self {
        Self {
            device,
            joined: false,
            confirmed,
            departure: None,
            absence: None,
            silent: Duration::ZERO,
            heartbeat: pb::RankHeartbeat::default(),
        }
    }

    /// Notes that it has left; what was noted before stands.
    pub(super) fn depart(&mut self, now: Now, cause: Cause, detail: String) {
        let silent = self.silent;
        self.departure.get_or_insert(Departure { at: now.at, cause, detail, silent, induced: false });
    }

    pub(super) fn cause(&self) -> Option<Cause> {
        self.departure.as_ref().map(|departure| departure.cause)
    }

    /// A process that failed by itself, or was given up, has a training state that nobody can trust; one that exited
    /// has none.
    pub(super) fn is_untrusted(&self) -> bool {
        matches!(self.cause(), Some(Cause::Error | Cause::Unspecified | Cause::Diverged))
    }
}

impl Generation {
    pub(super) fn new(now: Now, n: u64, members: Vec<Member>, phase: GenerationPhase) -> Self {
        Self { n, members, phase, since: now.at, formed: now.at, start: None }
    }

    pub(super) fn enter(&mut self, now: Now, phase: GenerationPhase) {
        (self.phase, self.since) = (phase, now.at);
    }

    /// What it was left for, once all members have departed.
    pub(super) fn closed(&self) -> Option<&LeaveReason> {
        match &self.phase {
            GenerationPhase::Leaving { reason, .. } if self.members.iter().all(|m| m.departure.is_some()) => {
                Some(reason)
            }
            _ => None,
        }
    }

    /// Takes it to the next phase if that is due: see the table.
    pub(super) fn advance(&mut self, context: &Context<'_>, actions: &mut Vec<Action>) {
        let now = context.now;
        if self.phase == GenerationPhase::Recovering && !self.is_recovered(context) {
            return;
        }
        if context.detect {
            self.detect_lost(context, actions);
        }
        let failure = self.failure(context.agents);
        if matches!(self.phase, GenerationPhase::Leaving { .. }) {
            return self.advance_leaving(context, failure, actions);
        }
        let asked = self.members.iter().any(|m| matches!(m.cause(), Some(Cause::Asked | Cause::Terminated)));
        let opening = self.phase == GenerationPhase::Opening;
        let (reason, abort) = match failure {
            failure if context.cancelling => (LeaveReason::Cancel, failure.is_some()),
            Some(failure) => (LeaveReason::Failure(failure), true),
            // The agent asked its ranks by itself, and the control word all others.
            None if asked && self.phase == GenerationPhase::Training => (LeaveReason::AgentLeaving, false),
            None => return,
        };
        let checkpoint = reason == LeaveReason::Cancel && !abort;
        self.enter(now, GenerationPhase::Leaving { reason, aborted: abort });
        if opening {
            self.members.iter_mut().for_each(|member| member.depart(now, Cause::Asked, String::new()));
        } else {
            self.order_leave(context.run, checkpoint, abort, actions);
        }
    }

    fn advance_leaving(&mut self, context: &Context<'_>, failure: Option<Failure>, actions: &mut Vec<Action>) {
        let now = context.now;
        let failed = failure.is_some();
        // The first word may come from a rank that only felt the other's death.
        self.leave_for(failure);
        let GenerationPhase::Leaving { aborted, .. } = &mut self.phase else { return };
        let late = now.at - self.since >= if *aborted { context.detection } else { LEAVE_DEADLINE };
        if !*aborted && (failed || late) {
            (*aborted, self.since) = (true, now.at);
            self.order_leave(context.run, false, true, actions);
        } else if late {
            for member in self.members.iter_mut().filter(|member| member.departure.is_none()) {
                let (at, silent, detail) = (now.at, member.silent, "did not leave in time".to_owned());
                member.departure = Some(Departure { at, cause: Cause::Error, detail, silent, induced: true });
            }
            self.leave_for(self.failure(context.agents));
        }
    }

    /// A failure is what it is left for, unless the run is to end anyhow.
    fn leave_for(&mut self, failure: Option<Failure>) {
        if let (GenerationPhase::Leaving { reason, .. }, Some(failure)) = (&mut self.phase, failure)
            && *reason != LeaveReason::Cancel
        {
            *reason = LeaveReason::Failure(failure);
        }
    }

    /// Tells the agents of all members that are still there.
    pub(super) fn order_leave(&self, run: &str, checkpoint: bool, abort: bool, actions: &mut Vec<Action>) {
        let mut ordered = HashSet::new();
        for member in self.members.iter().filter(|member| member.departure.is_none()) {
            if ordered.insert(&member.device.agent) {
                let leave = pb::Leave { run: run.to_owned(), generation: self.n, checkpoint, abort };
                actions.push(Action::Send { agent: member.device.agent.clone(), message: Message::Leave(leave) });
            }
        }
    }
}
