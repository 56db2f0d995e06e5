//! What is told to the training thread while it trains, and what is known of it meanwhile.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::pb::{self, rank_heartbeat::Activity};
use tracing::warn;

use super::failure::Failure;
use crate::torch::Aborter;

/// What this rank is wanted to do about its generation, set from outside while it trains.
#[derive(Debug)]
pub(crate) struct Wishes {
    run: String,
    generation: u64,
    leave: AtomicBool,
    checkpoint: AtomicBool,
    abort: AtomicBool,
    aborter: Mutex<Option<Aborter>>,
    /// It has left.
    pub(crate) over: AtomicBool,
    pulse: Arc<Pulse>,
}

impl Wishes {
    /// None yet, for the generation that is joined.
    pub(crate) fn new(join: &pb::Join, pulse: Arc<Pulse>) -> Self {
        Self {
            run: join.run.clone(),
            generation: join.generation,
            leave: AtomicBool::new(false),
            checkpoint: AtomicBool::new(false),
            abort: AtomicBool::new(false),
            aborter: Mutex::new(None),
            over: AtomicBool::new(false),
            pulse,
        }
    }

    pub(crate) fn concern(&self, leave: &pb::Leave) -> bool {
        (self.run.as_str(), self.generation) == (leave.run.as_str(), leave.generation)
    }

    /// Does what a `Leave` says.
    pub(crate) fn hear(&self, leave: &pb::Leave) {
        if leave.abort {
            self.abort();
        } else {
            self.leave_after_step(leave.checkpoint);
        }
    }

    pub(crate) fn leave_after_step(&self, checkpoint: bool) {
        self.checkpoint.fetch_or(checkpoint, Ordering::Relaxed);
        self.leave.store(true, Ordering::Release);
    }

    /// Ends the generation's collectives, those in flight too.
    pub(crate) fn abort(&self) {
        self.abort.store(true, Ordering::SeqCst);
        let aborter = self.aborter.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(aborter) = aborter {
            // With NCCL it may not return.
            let abort = move || {
                if let Err(error) = aborter.abort() {
                    warn!(%error, "abort failed");
                }
            };
            if let Err(error) = std::thread::Builder::new().name("abort".to_owned()).spawn(abort) {
                warn!(%error, "abort failed");
            }
        }
    }

    /// Gives the group of the generation, once there is one.
    pub(crate) fn watch(&self, aborter: Aborter) -> Result<(), Failure> {
        *self.aborter.lock().unwrap_or_else(PoisonError::into_inner) = Some(aborter);
        match self.aborted() {
            true => Err(Failure::Collective("aborted while the ranks met".to_owned())),
            false => Ok(()),
        }
    }

    /// Whether to end at once.
    pub(crate) fn aborted(&self) -> bool {
        self.abort.load(Ordering::SeqCst)
    }

    /// Whether to leave after a completed step, and whether with a checkpoint.
    pub(crate) fn leave(&self) -> (bool, bool) {
        let leave = self.leave.load(Ordering::Acquire);
        (leave, leave && self.checkpoint.load(Ordering::Relaxed))
    }

    /// Notes what the training thread is at, which signs of life carry.
    pub(crate) fn at(&self, activity: Activity) {
        self.pulse.activity.store(activity.into(), Ordering::Relaxed);
        self.pulse.since.store(self.pulse.now(), Ordering::Relaxed);
    }

    /// Notes the newest step, the same.
    pub(crate) fn applied(&self, step: u64) {
        self.pulse.applied.store(step, Ordering::Relaxed);
    }

    /// Whether the coordinator was there at most so long ago. If not, the generation may be over without this rank's knowing.
    pub(crate) fn in_contact(&self, within: Duration) -> bool {
        self.pulse.now() <= self.pulse.heard.load(Ordering::Relaxed) + within.as_millis() as u64
    }
}

/// What is known of a rank process beside its training thread.
#[derive(Debug)]
pub(crate) struct Pulse {
    began: Instant,
    applied: AtomicU64,
    activity: AtomicI32,
    /// Milliseconds since `began`.
    since: AtomicU64,
    /// When the coordinator was last known to be there; the same.
    heard: AtomicU64,
    pub(crate) terminated: AtomicBool,
}

impl Pulse {
    /// Of a process that has just begun.
    pub(crate) fn new() -> Self {
        Self {
            began: Instant::now(),
            applied: AtomicU64::new(0),
            activity: AtomicI32::new(Activity::Idle.into()),
            since: AtomicU64::new(0),
            heard: AtomicU64::new(0),
            terminated: AtomicBool::new(false),
        }
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    pub(crate) fn alive(&self) -> pb::RankHeartbeat {
        let millis = self.now().saturating_sub(self.since.load(Ordering::Relaxed));
        pb::RankHeartbeat { activity: self.activity.load(Ordering::Relaxed), step: self.step(), millis }
    }

    /// Steps applied.
    pub(crate) fn step(&self) -> u64 {
        self.applied.load(Ordering::Relaxed)
    }

    pub(crate) fn hear(&self) {
        self.heard.store(self.now(), Ordering::Relaxed);
    }

    /// The coordinator counts as there for so long from now on.
    #[cfg(any(test, feature = "bench"))]
    pub(crate) fn hear_for(&self, time: Duration) {
        self.heard.store(self.now() + time.as_millis() as u64, Ordering::Relaxed);
    }
}
