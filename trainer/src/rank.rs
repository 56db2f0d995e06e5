//! The rank process: lives through generations, keeps its state between them, and does what its agent says.
//!
//! Three threads: one reads orders, one trains, one writes reports and signs of life. So a rank that trains, validates or waits for data
//! is heard, and one that hangs as a process is not.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use object_store::ObjectStore;
use prost::Message;
use proto::metric::MetricPoint;
use proto::pb::{self, coordinator_message, left::Why, rank_message};
use tracing::{error, info, warn};

use crate::c10d::Aborter;
use crate::ipc::{self, Setup};
use crate::job::{Home, Job};
use crate::train::{Ending, Failure, generation};

/// A rank is heard at least this often.
const SIGN_OF_LIFE: Duration = Duration::from_millis(500);

/// Runs one rank until its agent closes its stdin.
///
/// # Errors
/// If the agent says nothing, or something that is no order.
pub async fn run_rank(store: Arc<dyn ObjectStore>) -> Result<()> {
    // A rank of which any thread is gone would keep the others waiting; a rank that is gone is replaced.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        std::process::exit(101);
    }));
    let runtime = tokio::runtime::Handle::current();
    let (orders, to_train) = channel();
    let (reports, to_write) = channel();
    let mut stdin = std::io::stdin();
    let setup = tokio::task::spawn_blocking(move || ipc::read(&mut stdin)).await??;
    let setup: Setup =
        serde_json::from_slice(&setup.context("the agent said nothing; ranks are started by `gleaner trainer`")?)?;
    let home = Home { store, runtime, setup };
    let applied = Arc::new(AtomicU64::new(0));
    let heard = applied.clone();
    spawn("orders", move || {
        let result = read_orders(&orders, &heard);
        // What is not written yet is in the agent's or the store's hands no more; the training thread may hang in a collective.
        std::process::exit(i32::from(result.is_err()));
    })?;
    spawn("reports", move || write_reports(&to_write, &applied))?;
    let (done, ended) = tokio::sync::oneshot::channel();
    spawn("train", move || {
        serve(&home, &to_train, &reports);
        let _ = done.send(());
    })?;
    ended.await.context("the training thread panicked")
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).context("failed to start a thread")?;
    Ok(())
}

/// Reads until the agent is gone. A `Leave` goes to the generation that it is for, past the training thread.
fn read_orders(orders: &Sender<(pb::Join, Arc<Wishes>)>, applied: &Arc<AtomicU64>) -> Result<()> {
    let mut stdin = std::io::stdin().lock();
    let mut current: Option<Arc<Wishes>> = None;
    while let Some(frame) = ipc::read(&mut stdin)? {
        match pb::CoordinatorMessage::decode(frame.as_slice())?.message {
            Some(coordinator_message::Message::Join(join)) => {
                if let Some(old) = current.take() {
                    old.abort();
                }
                let wishes = Arc::new(Wishes::new(&join, applied.clone()));
                current = Some(wishes.clone());
                if orders.send((join, wishes)).is_err() {
                    break;
                }
            }
            Some(coordinator_message::Message::Leave(leave)) => {
                if let Some(wishes) = current.as_ref().filter(|wishes| wishes.concern(&leave)) {
                    wishes.hear(&leave);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn write_reports(reports: &Receiver<pb::RankMessage>, applied: &AtomicU64) {
    let mut stdout = std::io::stdout().lock();
    loop {
        let message = match reports.recv_timeout(SIGN_OF_LIFE) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => {
                let step = applied.load(Ordering::Relaxed);
                let stepped = pb::Stepped { step, metrics: Vec::new() };
                pb::RankMessage { message: Some(rank_message::Message::Stepped(stepped)), ..Default::default() }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if ipc::write(&mut stdout, &message.encode_to_vec()).is_err() {
            return;
        }
    }
}

/// Takes part in one generation after the other, until there are no more orders.
pub(crate) fn serve(home: &Home, orders: &Receiver<(pb::Join, Arc<Wishes>)>, reports: &Sender<pb::RankMessage>) {
    let mut job: Option<Job> = None;
    for (join, wishes) in orders {
        let reports =
            Reports { run: join.run.clone(), generation: join.generation, rank: join.rank, to: reports.clone() };
        let result = take_part(home, &mut job, &join, &wishes, &reports);
        let (why, detail) = match &result {
            Ok(Ending::Asked) => (Why::Asked, String::new()),
            Ok(Ending::Finished) => (Why::Finished, String::new()),
            Err(Failure::Collective(detail)) => (Why::Collective, detail.clone()),
            Err(Failure::Here(error)) => (Why::Error, format!("{error:#}")),
        };
        // A state that is no longer whole must not be counted on.
        let step = job.as_ref().filter(|job| job.held).map_or(0, |job| job.progress.step);
        match &result {
            Ok(ending) => info!(generation = join.generation, rank = join.rank, step, ?ending, "left the generation"),
            Err(failure @ Failure::Collective(_)) => {
                warn!(generation = join.generation, rank = join.rank, step, %failure, "left the generation");
            }
            Err(failure) => {
                error!(generation = join.generation, rank = join.rank, step, %failure, "left the generation")
            }
        }
        reports.left(why, step, detail);
    }
}

fn take_part(
    home: &Home,
    job: &mut Option<Job>,
    join: &pb::Join,
    wishes: &Wishes,
    reports: &Reports,
) -> Result<Ending, Failure> {
    info!(run = join.run, generation = join.generation, rank = join.rank, world = join.world_size, "joining");
    let job = match job.take().filter(|job| job.run == join.run) {
        Some(open) => job.insert(open),
        None => job.insert(Job::open(home, join)?),
    };
    generation(job, join, wishes, reports)
}

/// What this rank is wanted to do about its generation, set from outside while it trains.
#[derive(Debug)]
pub(crate) struct Wishes {
    run: String,
    generation: u64,
    leave: AtomicBool,
    checkpoint: AtomicBool,
    abort: AtomicBool,
    aborter: Mutex<Option<Aborter>>,
    applied: Arc<AtomicU64>,
}

impl Wishes {
    /// None yet, for the generation that is joined.
    pub(crate) fn new(join: &pb::Join, applied: Arc<AtomicU64>) -> Self {
        Self {
            run: join.run.clone(),
            generation: join.generation,
            leave: AtomicBool::new(false),
            checkpoint: AtomicBool::new(false),
            abort: AtomicBool::new(false),
            aborter: Mutex::new(None),
            applied,
        }
    }

    fn concern(&self, leave: &pb::Leave) -> bool {
        (self.run.as_str(), self.generation) == (leave.run.as_str(), leave.generation)
    }

    /// Does what a `Leave` says.
    pub(crate) fn hear(&self, leave: &pb::Leave) {
        if leave.abort {
            self.abort();
        } else {
            self.checkpoint.fetch_or(leave.checkpoint, Ordering::Relaxed);
            self.leave.store(true, Ordering::Release);
        }
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
            if let Err(error) = spawn("abort", abort) {
                warn!(error = format!("{error:#}"), "abort failed");
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

    /// Notes the newest step, which signs of life carry.
    pub(crate) fn applied(&self, step: u64) {
        self.applied.store(step, Ordering::Relaxed);
    }
}

/// Sends a rank's messages to its agent.
#[derive(Debug, Clone)]
pub(crate) struct Reports {
    pub run: String,
    pub generation: u64,
    pub rank: u32,
    pub to: Sender<pb::RankMessage>,
}

impl Reports {
    fn send(&self, message: rank_message::Message) {
        let Self { run, generation, rank, to } = self;
        // If nobody listens any more, the process is about to end.
        let _ = to.send(pb::RankMessage {
            run: run.clone(),
            generation: *generation,
            rank: *rank,
            device: 0,
            message: Some(message),
        });
    }

    pub(crate) fn joined(&self, step: u64, steps_per_epoch: u64) {
        self.send(rank_message::Message::Joined(pb::Joined { step, steps_per_epoch }));
    }

    pub(crate) fn stepped(&self, step: u64, point: Option<MetricPoint>) {
        let metrics = point.into_iter().map(pb::Metric::from).collect();
        self.send(rank_message::Message::Stepped(pb::Stepped { step, metrics }));
    }

    pub(crate) fn checkpointed(&self, step: u64, key: String, digests: HashMap<String, String>) {
        self.send(rank_message::Message::Checkpointed(pb::Checkpointed { step, key, digests }));
    }

    pub(crate) fn finished(&self, key: String, digests: HashMap<String, String>) {
        self.send(rank_message::Message::Finished(pb::Finished { key, digests }));
    }

    fn left(&self, why: Why, step: u64, detail: String) {
        self.send(rank_message::Message::Left(pb::Left { why: why.into(), step, detail }));
    }
}
