//! One run in the roster: what its stored history says, and how it stands.

use std::time::Duration;

use proto::RunSpec;
use proto::pb;
use proto::run_event::{EventRecord, Member, RunEvent};

use super::generation::{Generation, Seat, Stage};
use super::{End, Now};

/// How a run stands.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "runs are few, and a generation is what most of the living ones have")]
pub(crate) enum Phase {
    /// In the queue.
    Waiting,
    /// A generation is there.
    Going(Generation),
    /// Over: done, failed, or cancelled.
    Ended(End),
}

/// What a run's ranks read, and to what they belong.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sources {
    /// Key and SHA-256.
    pub(crate) manifest: (String, String),
    /// Another run's weights, which this one begins with.
    pub(crate) start: Option<pb::Checkpointed>,
    /// The span of the request that submitted it.
    pub(crate) traceparent: String,
}

/// How the last generation ended, if this coordinator saw it end: then its survivors are all known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It did not, or not under this coordinator.
    Unseen,
    /// Ranks were lost, or left: the survivors go on at once.
    Shrunk,
    /// It made room for more ranks.
    ToGrow,
}

/// One run.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) spec: RunSpec,
    pub(super) spec_json: String,
    pub(super) sources: Sources,
    pub(crate) phase: Phase,
    pub(crate) reason: String,
    /// The highest generation so far.
    pub(crate) generation: u64,
    pub(crate) world: u32,
    pub(crate) step: u64,
    pub(crate) steps_per_epoch: u64,
    pub(crate) cancelling: bool,
    /// Those that are kept, in the order in which they were made.
    pub(crate) checkpoints: Vec<pb::Checkpointed>,
    /// Of the first generation, in milliseconds since 1970.
    pub(super) began: Option<u64>,
    pub(super) failures: u32,
    pub(super) failed_at: u64,
    pub(super) not_before: Duration,
    pub(super) enough_since: Option<Duration>,
    pub(super) ended: Ended,
    pub(super) queued: u64,
}

impl Run {
    /// From its stored history.
    pub(crate) fn recovered(
        now: Now,
        spec: RunSpec,
        sources: Sources,
        steps_per_epoch: u64,
        events: &[EventRecord],
    ) -> Self {
        let mut run = Self {
            spec_json: spec.to_json(),
            spec,
            sources,
            phase: Phase::Waiting,
            reason: String::new(),
            generation: 0,
            world: 0,
            step: 0,
            steps_per_epoch,
            cancelling: false,
            checkpoints: Vec::new(),
            began: None,
            failures: 0,
            failed_at: 0,
            not_before: now.at,
            enough_since: None,
            ended: Ended::Unseen,
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
            RunEvent::Checkpoint { step, key, digests, top1 } => {
                let digests = digests.clone().into_iter().collect();
                self.checkpointed(pb::Checkpointed { step: *step, key: key.clone(), digests, top1: *top1 });
                self.step = self.step.max(*step);
            }
            RunEvent::Damaged { key, .. } => self.damaged(key),
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

    pub(super) fn requeue(&mut self) {
        (self.phase, self.cancelling, self.failures, self.world) = (Phase::Waiting, false, 0, 0);
        (self.ended, self.step) = (Ended::Unseen, self.checkpoints.last().map_or(0, |checkpoint| checkpoint.step));
    }

    /// Adds a checkpoint, and forgets those that are not to be kept: all but the newest ones and the best.
    pub(super) fn checkpointed(&mut self, made: pb::Checkpointed) {
        self.checkpoints.push(made);
        let best = self.best().map(|best| best.key.clone());
        let old = self.checkpoints.len().saturating_sub(self.spec.checkpoint.keep as usize);
        let mut at = 0;
        self.checkpoints.retain(|checkpoint| {
            at += 1;
            at > old || best.as_ref() == Some(&checkpoint.key)
        });
    }

    /// Key and SHA-256 of the manifest that it reads.
    pub(crate) fn manifest(&self) -> (&str, &str) {
        (&self.sources.manifest.0, &self.sources.manifest.1)
    }

    pub(super) fn damaged(&mut self, key: &str) {
        self.checkpoints.retain(|checkpoint| checkpoint.key != key);
    }

    /// The checkpoint with the best validation; of equal ones the newest.
    pub(crate) fn best(&self) -> Option<&pb::Checkpointed> {
        let measured = self.checkpoints.iter().filter(|checkpoint| checkpoint.top1.is_some());
        measured.max_by(|a, b| a.top1.unwrap_or(0.0).total_cmp(&b.top1.unwrap_or(0.0)))
    }

    pub(super) fn detection(&self) -> Duration {
        self.spec.failure_detection()
    }

    pub(super) fn going(&mut self) -> Option<&mut Generation> {
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
