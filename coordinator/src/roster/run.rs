//! One run in the roster: what its events say, and what is only known while this coordinator lives.

use std::collections::VecDeque;
use std::time::Duration;

use proto::RunSpec;
use proto::pb::{self, left::Cause};
use proto::run_event::{EventRecord, RunEvent};

use super::generation::{Generation, GenerationPhase, LeaveReason, Member};
use super::{Action, DeviceId, Now};

/// Where a run is on its way.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "runs are few, and a generation is what most of the living ones have")]
pub(crate) enum RunPhase {
    /// In the queue.
    Waiting,
    /// These devices are reserved for its next generation, in the order of the ranks; its event is being written.
    Forming(Vec<DeviceId>),
    /// It has a generation.
    Active(Generation),
    /// All epochs, the test and the model are done.
    Done,
    /// It cannot go on, for this reason.
    Failed(String),
    /// It ended because somebody asked for it.
    Cancelled,
}

impl RunPhase {
    /// Whether the run has ended.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self, Self::Done | Self::Failed(_) | Self::Cancelled)
    }
}

/// What a run's ranks read, and to what they belong.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sources {
    /// `<name>-<uid>` of its dataset.
    pub(crate) dataset: String,
    pub(crate) manifest_key: String,
    pub(crate) manifest_sha256: String,
    /// Another run's weights, which this one begins with.
    pub(crate) start: Option<pb::StartWeights>,
    /// The span of the request that submitted it.
    pub(crate) traceparent: String,
}

/// How the next generation is formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reform {
    /// Devices are gathered for a moment: which survivors there are is not known.
    Gather,
    /// The survivors are all known, and go on at once if they are enough.
    Survivors,
    /// The last generation made room for more ranks: all that are free join at once.
    Newcomers,
}

/// One run.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) name: String,
    pub(crate) spec: RunSpec,
    pub(super) spec_json: String,
    pub(super) sources: Sources,
    pub(crate) phase: RunPhase,
    /// Why it waits.
    pub(crate) reason: String,
    /// The highest generation so far.
    pub(crate) generation: u64,
    /// Ranks of the generation that trains, or of an ended run's last one.
    pub(crate) world: u32,
    pub(crate) step: u64,
    pub(crate) steps_per_epoch: u64,
    pub(crate) cancelling: bool,
    /// Those that are kept, in the order in which they were made.
    pub(crate) checkpoints: Vec<pb::Checkpointed>,
    /// Events that are proposed; the first is being written.
    pub(crate) unwritten: VecDeque<RunEvent>,
    /// The highest generation before it was resumed: training state of that and older ones is of no use any more.
    pub(super) resumed_after: u64,
    /// When the first generation began, in milliseconds since 1970.
    pub(crate) began: Option<u64>,
    /// Generations that failed without a step between them.
    failures: u32,
    failed_step: u64,
    last_failure: String,
    /// Its training state was not finite: another generation would fail in the same way.
    diverged: bool,
    pub(super) backoff_until: Duration,
    pub(super) enough_since: Option<Duration>,
    pub(super) reform: Reform,
    pub(super) queue_number: u64,
}

impl Run {
    /// As its stored events tell it.
    pub(crate) fn recovered(
        now: Now,
        name: &str,
        spec: RunSpec,
        sources: Sources,
        steps_per_epoch: u64,
        events: &[EventRecord],
    ) -> Self {
        let mut run = Self {
            name: name.to_owned(),
            spec_json: spec.to_json(),
            spec,
            sources,
            phase: RunPhase::Waiting,
            reason: String::new(),
            generation: 0,
            world: 0,
            step: 0,
            steps_per_epoch,
            cancelling: false,
            checkpoints: Vec::new(),
            unwritten: VecDeque::new(),
            resumed_after: 0,
            began: None,
            failures: 0,
            failed_step: 0,
            last_failure: String::new(),
            diverged: false,
            backoff_until: now.at,
            enough_since: None,
            reform: Reform::Gather,
            queue_number: 0,
        };
        for record in events {
            run.apply(now, record.at_millis, &record.event);
        }
        // Only who saw a generation knows whether it made steps: the count alone does not end a run.
        run.failures = run.failures.min(run.spec.ranks.max_failures.saturating_sub(1));
        (run.backoff_until, run.reform) = (now.at, Reform::Gather);
        run
    }

    /// Proposes an event: it takes effect when it is written, after those that were proposed before.
    pub(super) fn propose(&mut self, event: RunEvent, actions: &mut Vec<Action>) {
        if self.unwritten.is_empty() {
            actions.push(Action::Write { run: self.name.clone(), event: event.clone() });
        }
        self.unwritten.push_back(event);
    }

    /// Whether an event that ends its generation is being written.
    pub(super) fn is_closing(&self) -> bool {
        self.unwritten.iter().any(is_close)
    }

    /// Changes it as a stored event says.
    pub(super) fn apply(&mut self, now: Now, at_millis: u64, event: &RunEvent) {
        match event {
            RunEvent::Submitted { .. } => {}
            RunEvent::Generation { generation, members } => {
                // One that this coordinator did not form itself has agents that must come back first.
                let own = matches!(self.phase, RunPhase::Forming(_));
                let phase = if own { GenerationPhase::Opening } else { GenerationPhase::Recovering };
                let device =
                    |member: &proto::run_event::Member| DeviceId { agent: member.agent.clone(), index: member.device };
                let members: Vec<Member> = members.iter().map(|member| Member::new(device(member), own)).collect();
                (self.generation, self.world) = (*generation, members.len() as u32);
                self.began.get_or_insert(at_millis);
                self.reason.clear();
                self.phase = RunPhase::Active(Generation::new(now, *generation, members, phase));
            }
            RunEvent::Checkpoint { step, key, digests, top1 } => {
                let digests = digests.clone().into_iter().collect();
                self.keep_checkpoint(pb::Checkpointed { step: *step, key: key.clone(), digests, top1: *top1 });
                self.step = self.step.max(*step);
            }
            RunEvent::Damaged { key, .. } => self.checkpoints.retain(|checkpoint| checkpoint.key != *key),
            RunEvent::Failure { step, reason, .. } => self.fail_generation(now, *step, reason),
            RunEvent::Cancelling => self.cancelling = true,
            RunEvent::Cancelled => self.phase = RunPhase::Cancelled,
            RunEvent::Failed { reason } => self.phase = RunPhase::Failed(reason.clone()),
            RunEvent::Done { .. } => self.phase = RunPhase::Done,
            RunEvent::Resumed { step, epochs, .. } => {
                if let Some(epochs) = epochs {
                    // Who asks for so many wants so many.
                    (self.spec.train.epochs, self.spec.train.stop_after) = (*epochs, 0);
                    self.spec_json = self.spec.to_json();
                }
                if let Some(at) = step.and_then(|step| self.checkpoints.iter().rposition(|made| made.step == step)) {
                    self.checkpoints.truncate(at + 1);
                }
                self.wait(Reform::Gather);
                (self.cancelling, self.failures, self.diverged) = (false, 0, false);
                self.resumed_after = self.generation;
                self.step = self.checkpoints.last().map_or(0, |checkpoint| checkpoint.step);
            }
        }
    }

    /// Goes back to the queue.
    pub(super) fn wait(&mut self, reform: Reform) {
        (self.phase, self.world, self.enough_since, self.reform) = (RunPhase::Waiting, 0, None, reform);
    }

    /// Counts the failure of its generation.
    fn fail_generation(&mut self, now: Now, step: u64, reason: &str) {
        let seen = self.active().and_then(|generation| {
            let LeaveReason::Failure(failure) = generation.closed()? else { return None };
            Some((failure.cause, generation.start))
        });
        // What a rank reports of itself comes again at the same step; what befalls it from outside does not.
        let progress = match seen {
            Some((Cause::Error, _)) | None => step > self.failed_step,
            Some((_, start)) => start.is_some_and(|start| step > start),
        };
        self.diverged = matches!(seen, Some((Cause::Diverged, _)));
        self.failures = if progress { 1 } else { self.failures + 1 };
        if let Some((Cause::Error, _)) = seen {
            self.backoff_until = now.at + Duration::from_secs(1 << self.failures.min(5));
        }
        self.failed_step = if seen.is_some() { self.failed_step.max(step) } else { step };
        self.last_failure = reason.to_owned();
        self.step = step;
        self.wait(Reform::Survivors);
    }

    /// Why it is of no use to form another generation, if so.
    pub(super) fn hopeless(&self) -> Option<String> {
        let (failures, last) = (self.failures, &self.last_failure);
        if self.diverged {
            return Some(last.clone());
        }
        (failures >= self.spec.ranks.max_failures)
            .then(|| format!("{failures} generations failed without a step between them; the last: {last}"))
    }

    /// Adds a checkpoint, and forgets those that are not to be kept: all but the newest ones and the best.
    fn keep_checkpoint(&mut self, made: pb::Checkpointed) {
        self.checkpoints.push(made);
        let best = self.best().map(|best| best.key.clone());
        let old = self.checkpoints.len().saturating_sub(self.spec.checkpoint.keep as usize);
        let mut at = 0;
        self.checkpoints.retain(|checkpoint| {
            at += 1;
            at > old || best.as_ref() == Some(&checkpoint.key)
        });
    }

    pub(super) fn has_checkpoint(&self, key: &str) -> bool {
        self.checkpoints.iter().any(|checkpoint| checkpoint.key == key)
    }

    /// The checkpoint with the best validation; of equal ones the newest.
    pub(crate) fn best(&self) -> Option<&pb::Checkpointed> {
        let measured = self.checkpoints.iter().filter(|checkpoint| checkpoint.top1.is_some());
        measured.max_by(|a, b| a.top1.unwrap_or(0.0).total_cmp(&b.top1.unwrap_or(0.0)))
    }

    /// `<name>-<uid>` of its dataset.
    pub(crate) fn dataset(&self) -> &str {
        &self.sources.dataset
    }

    /// The manifest that it reads.
    pub(crate) fn manifest_key(&self) -> &str {
        &self.sources.manifest_key
    }

    pub(super) fn detection(&self) -> Duration {
        self.spec.failure_detection()
    }

    pub(super) fn active(&self) -> Option<&Generation> {
        match &self.phase {
            RunPhase::Active(generation) => Some(generation),
            _ => None,
        }
    }

    pub(super) fn active_mut(&mut self) -> Option<&mut Generation> {
        match &mut self.phase {
            RunPhase::Active(generation) => Some(generation),
            _ => None,
        }
    }

    /// The agents on which its ranks are, or will be.
    pub(super) fn agents(&self) -> impl Iterator<Item = &str> {
        let reserved = if let RunPhase::Forming(devices) = &self.phase { &devices[..] } else { &[] };
        let members = self.active().map_or(&[][..], |generation| &generation.members);
        reserved.iter().chain(members.iter().map(|member| &member.device)).map(|device| device.agent.as_str())
    }

    pub(crate) fn state(&self) -> pb::RunState {
        match &self.phase {
            RunPhase::Done => pb::RunState::Done,
            RunPhase::Failed(_) => pb::RunState::Failed,
            RunPhase::Cancelled => pb::RunState::Cancelled,
            _ if self.cancelling => pb::RunState::Cancelling,
            RunPhase::Waiting | RunPhase::Forming(_) => pb::RunState::Waiting,
            RunPhase::Active(_) => pb::RunState::Running,
        }
    }
}

/// Whether an event ends a run.
pub(super) fn is_end(event: &RunEvent) -> bool {
    matches!(event, RunEvent::Cancelled | RunEvent::Failed { .. } | RunEvent::Done { .. })
}

/// Whether an event ends the generation that a run has.
pub(super) fn is_close(event: &RunEvent) -> bool {
    matches!(event, RunEvent::Failure { .. }) || is_end(event)
}
