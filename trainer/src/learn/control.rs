//! What other threads of a rank and its training thread tell each other while it trains.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::RunSpec;
use proto::pb::{self, rank_heartbeat::Activity};
use tracing::{error, warn};

use super::failure::Failure;
use crate::torch::Aborter;

/// If the spec cannot be read, which is found out where it is used.
const DETECTION: Duration = Duration::from_secs(10);

/// Does `work` on a thread of its own, and `late` if that takes longer than `limit`.
fn watched(
    limit: Duration,
    work: impl FnOnce() + Send + 'static,
    late: impl FnOnce() + Send + 'static,
) -> std::io::Result<()> {
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("abort".to_owned()).spawn(move || {
        work();
        let _ = done.send(());
    })?;
    let watch = move || {
        if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            late();
        }
    };
    std::thread::Builder::new().name("abort-watch".to_owned()).spawn(watch).map(drop)
}

/// Nothing else ends a process for sure whose threads hang in a library.
fn kill_this_process() {
    error!("the collectives cannot be aborted: this process ends");
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

/// What this rank shall do about its generation. Other threads set the flags while it trains.
#[derive(Debug)]
pub(crate) struct ControlFlags {
    run: String,
    generation: u64,
    leave: AtomicBool,
    checkpoint: AtomicBool,
    abort: AtomicBool,
    aborter: Mutex<Option<Aborter>>,
    /// Whether the rank has left the generation.
    pub(crate) left: AtomicBool,
    heartbeat: Arc<Heartbeat>,
    /// The run's `failure_detection`.
    detection: Duration,
}

impl ControlFlags {
    /// No flag is set, for the generation that `join` names.
    pub(crate) fn new(join: &pb::Join, heartbeat: Arc<Heartbeat>) -> Self {
        Self {
            run: join.run.clone(),
            generation: join.generation,
            leave: AtomicBool::new(false),
            checkpoint: AtomicBool::new(false),
            abort: AtomicBool::new(false),
            aborter: Mutex::new(None),
            left: AtomicBool::new(false),
            heartbeat,
            detection: RunSpec::from_json(&join.spec_json).map_or(DETECTION, |spec| spec.failure_detection()),
        }
    }

    pub(crate) fn are_for(&self, leave: &pb::Leave) -> bool {
        (self.run.as_str(), self.generation) == (leave.run.as_str(), leave.generation)
    }

    /// Sets the flags as a `Leave` message says.
    pub(crate) fn obey(&self, leave: &pb::Leave) {
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

    /// Aborts the generation's collectives, also those in flight.
    pub(crate) fn abort(&self) {
        self.abort.store(true, Ordering::SeqCst);
        let aborter = self.aborter.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(aborter) = aborter {
            // On a thread of its own, because with NCCL it may not return.
            let abort = move || {
                if let Err(error) = aborter.abort() {
                    warn!(%error, "abort failed");
                }
            };
            if let Err(error) = watched(self.detection, abort, kill_this_process) {
                warn!(%error, "abort failed");
            }
        }
    }

    /// Sets how the group of the generation is aborted.
    ///
    /// # Errors
    /// If the generation was aborted before.
    pub(crate) fn set_aborter(&self, aborter: Aborter) -> Result<(), Failure> {
        *self.aborter.lock().unwrap_or_else(PoisonError::into_inner) = Some(aborter);
        match self.aborted() {
            true => Err(Failure::Collective("aborted while the ranks met".to_owned())),
            false => Ok(()),
        }
    }

    /// Whether to leave at once.
    pub(crate) fn aborted(&self) -> bool {
        self.abort.load(Ordering::SeqCst)
    }

    /// Whether to leave after the current step, and whether with a checkpoint.
    pub(crate) fn leave_requested(&self) -> (bool, bool) {
        let leave = self.leave.load(Ordering::Acquire);
        (leave, leave && self.checkpoint.load(Ordering::Relaxed))
    }

    /// Sets what the training thread does, which heartbeats carry.
    pub(crate) fn set_activity(&self, activity: Activity) {
        self.heartbeat.activity.store(activity.into(), Ordering::Relaxed);
        self.heartbeat.since.store(self.heartbeat.now(), Ordering::Relaxed);
    }

    /// Sets the newest applied step, which heartbeats carry, too.
    pub(crate) fn set_step(&self, step: u64) {
        self.heartbeat.step.store(step, Ordering::Relaxed);
    }

    /// Whether the coordinator was heard within that time. If not, the generation may have ended without this rank's
    /// knowledge.
    pub(crate) fn in_contact(&self, within: Duration) -> bool {
        self.heartbeat.now() <= self.heartbeat.contact.load(Ordering::Relaxed) + within.as_millis() as u64
    }
}

/// What the heartbeats of a rank process are made of.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    began: Instant,
    step: AtomicU64,
    activity: AtomicI32,
    /// Milliseconds since `began`.
    since: AtomicU64,
    /// When the coordinator was last heard, also in milliseconds since `began`.
    contact: AtomicU64,
    pub(crate) terminated: AtomicBool,
}

impl Heartbeat {
    /// The heartbeat of a process that has just started.
    pub(crate) fn new() -> Self {
        Self {
            began: Instant::now(),
            step: AtomicU64::new(0),
            activity: AtomicI32::new(Activity::Idle.into()),
            since: AtomicU64::new(0),
            contact: AtomicU64::new(0),
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
        self.step.load(Ordering::Relaxed)
    }

    pub(crate) fn note_contact(&self) {
        self.contact.store(self.now(), Ordering::Relaxed);
    }

    /// Acts as if the coordinator were heard for that long from now on.
    #[cfg(any(test, feature = "bench"))]
    pub(crate) fn assume_contact_for(&self, time: Duration) {
        self.contact.store(self.now() + time.as_millis() as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abort_that_does_not_return_in_time_is_noticed_and_one_that_does_is_not() {
        let (late, was_late) = std::sync::mpsc::channel();
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let tell = late.clone();
        let hang = move || assert!(held.recv().is_err());
        watched(Duration::from_millis(10), hang, move || tell.send("hangs").expect("it is heard"))
            .expect("threads start");
        watched(Duration::from_secs(60), || {}, move || late.send("returns").expect("it is heard"))
            .expect("threads start");
        assert_eq!(was_late.recv(), Ok("hangs"));
        // Both watches have ended, the second without a word.
        assert!(was_late.recv().is_err());
        drop(hold);
    }
}
