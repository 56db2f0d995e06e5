//! The rank process takes part in one generation after another, as its agent tells it, and keeps its state between
//! them.
//!
//! It has three threads: one reads the agent's messages, one trains, one writes reports and heartbeats. So a rank that
//! trains, validates or waits for data sends heartbeats, and a process that hangs does not.

pub(crate) mod ipc;

use std::fs::File;
use std::os::fd::AsFd;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use object_store::ObjectStore;
use prost::Message;
use proto::pb::{self, coordinator_message, left::Cause, rank_heartbeat::Activity, rank_message};
use proto::trace;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use crate::learn::context::{RankContext, Setup};
use crate::learn::control::{ControlFlags, Heartbeat};
use crate::learn::failure::Failure;
use crate::learn::job::Job;
use crate::learn::reports::Reports;
use crate::learn::train::{Ending, generation};
use crate::torch::device;

/// Time between two heartbeats.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);

/// The name of the training thread.
const TRAINING_THREAD: &str = "train";

/// Runs one rank until its agent closes its stdin. On SIGTERM it leaves its generation after the step, with a
/// checkpoint, and ends. `used` returns the store requests since its last call, for the agent. `flush` is called after
/// the rank has left a generation in order, to export the generation's span before the process may be killed; it must
/// return soon.
///
/// # Errors
/// If the agent sends nothing, or something that is not a message.
pub async fn run_rank(
    store: Arc<dyn ObjectStore>,
    used: fn() -> Option<pb::StoreUse>,
    flush: impl Fn() + Send + 'static,
) -> Result<()> {
    // A rank without one of its threads would keep the other ranks waiting. A process that has exited is replaced. The
    // training thread says why it ends.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        if std::thread::current().name() != Some(TRAINING_THREAD) {
            std::process::exit(101);
        }
    }));
    let to_agent = own_stdout()?;
    let runtime = tokio::runtime::Handle::current();
    let (orders, to_train) = channel();
    let (reports, to_write) = channel();
    let mut stdin = std::io::stdin();
    let setup = tokio::task::spawn_blocking(move || ipc::read(&mut stdin)).await??;
    let setup: Setup =
        serde_json::from_slice(&setup.context("the agent said nothing; ranks are started by `gleaner trainer`")?)?;
    let context = RankContext { store, runtime, setup };
    let heartbeat = Arc::new(Heartbeat::new());
    let current: Arc<Mutex<Option<Arc<ControlFlags>>>> = Arc::default();
    let (heard, joined) = (heartbeat.clone(), current.clone());
    spawn("orders", move || {
        let result = read_orders(&orders, &heard, &joined);
        // The agent is gone, so nobody reads reports any more, and the training thread may hang in a collective.
        std::process::exit(i32::from(result.is_err()));
    })?;
    let mut terminate = signal(SignalKind::terminate())?;
    let told = heartbeat.clone();
    tokio::spawn(async move {
        terminate.recv().await;
        told.terminated.store(true, Ordering::SeqCst);
        match current.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(flags) if !flags.left.load(Ordering::SeqCst) => flags.leave_after_step(true),
            // Outside a generation it holds at most a state that other ranks hold, too.
            _ => std::process::exit(0),
        }
    });
    let (done, ended) = tokio::sync::oneshot::channel();
    let beating = heartbeat.clone();
    spawn("reports", move || {
        write_reports(to_agent, &to_write, &beating, used);
        let _ = done.send(());
    })?;
    // When this thread ends, the reports thread writes what is left and ends.
    spawn(TRAINING_THREAD, move || serve(&context, &to_train, &reports, &heartbeat, &flush))?;
    ended.await.context("the reporting thread panicked")
}

/// The way to the agent. Libraries may print on standard output, which is standard error from now on.
fn own_stdout() -> Result<File> {
    let agent = std::io::stdout().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdout(std::io::stderr())?;
    Ok(agent.into())
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).context("failed to start a thread")?;
    Ok(())
}

/// Reads messages until the agent is gone. A `Leave` sets the flags of its generation at once, whatever the training
/// thread does.
fn read_orders(
    orders: &Sender<(pb::Join, Arc<ControlFlags>)>,
    heartbeat: &Arc<Heartbeat>,
    current: &Mutex<Option<Arc<ControlFlags>>>,
) -> Result<()> {
    let mut stdin = std::io::stdin().lock();
    let current = || current.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(frame) = ipc::read(&mut stdin)? {
        match pb::CoordinatorMessage::decode(frame.as_slice())?.message {
            Some(coordinator_message::Message::Join(join)) => {
                heartbeat.note_contact();
                let flags = Arc::new(ControlFlags::new(&join, heartbeat.clone()));
                if let Some(old) = current().replace(flags.clone()) {
                    old.abort();
                }
                if orders.send((join, flags)).is_err() {
                    break;
                }
            }
            Some(coordinator_message::Message::Leave(leave)) => {
                if let Some(flags) = current().as_ref().filter(|flags| flags.are_for(&leave)) {
                    flags.obey(&leave);
                }
            }
            Some(coordinator_message::Message::HeartbeatAck(_)) => heartbeat.note_contact(),
            _ => {}
        }
    }
    Ok(())
}

/// Writes reports as they come, and heartbeats and store use at intervals, until the training thread has ended.
fn write_reports(
    mut agent: File,
    reports: &Receiver<pb::RankMessage>,
    heartbeat: &Heartbeat,
    used: fn() -> Option<pb::StoreUse>,
) {
    let mut write = |message: pb::RankMessage| ipc::write(&mut agent, &message.encode_to_vec());
    let to_agent = |message| pb::RankMessage { message: Some(message), ..Default::default() };
    let mut due = Instant::now();
    loop {
        let report = reports.recv_timeout(due.saturating_duration_since(Instant::now()));
        let over = matches!(report, Err(RecvTimeoutError::Disconnected));
        let mut written = report.map_or(Ok(()), &mut write);
        // Also if reports come one after the other.
        if written.is_ok() && (over || Instant::now() >= due) {
            due = Instant::now() + HEARTBEAT_INTERVAL;
            let used = used().map(rank_message::Message::StoreUse);
            let alive = rank_message::Message::Heartbeat(heartbeat.alive());
            written = used.into_iter().chain([alive]).try_for_each(|message| write(to_agent(message)));
        }
        if written.is_err() || over {
            return;
        }
    }
}

/// Takes part in one generation after another, until there are no more of them, the process was told to terminate, or
/// its device failed.
pub(crate) fn serve(
    context: &RankContext,
    orders: &Receiver<(pb::Join, Arc<ControlFlags>)>,
    reports: &Sender<pb::RankMessage>,
    heartbeat: &Heartbeat,
    flush: &dyn Fn(),
) {
    let mut job: Option<Job> = None;
    for (join, flags) in orders {
        let span = trace::generation("rank", &join).entered();
        let reports =
            Reports { run: join.run.clone(), generation: join.generation, rank: join.rank, to: reports.clone() };
        let part = AssertUnwindSafe(|| take_part(context, &mut job, &join, &flags, &reports));
        let result = std::panic::catch_unwind(part).unwrap_or_else(|panic| {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(Failure::panicked(message, device::parse(&context.setup.device).ok()))
        });
        flags.left.store(true, Ordering::SeqCst);
        flags.set_activity(Activity::Idle);
        let terminated = heartbeat.terminated.load(Ordering::SeqCst);
        let (cause, detail) = match &result {
            Ok(Ending::Asked) if terminated => (Cause::Terminated, String::new()),
            Ok(Ending::Asked) => (Cause::Asked, String::new()),
            Ok(Ending::Finished) => (Cause::Finished, String::new()),
            Err(Failure::Collective(detail)) => (Cause::Collective, detail.clone()),
            Err(Failure::Here(error)) => (Cause::Error, format!("{error:#}")),
            Err(Failure::Device(detail) | Failure::OutOfMemory(detail)) => (Cause::Error, detail.clone()),
            Err(Failure::Diverged(detail)) => (Cause::Diverged, detail.clone()),
        };
        // Step 0 says that this rank holds no whole state.
        let step = job.as_ref().filter(|job| job.has_state).map_or(0, |job| job.progress.step);
        match &result {
            Ok(ending) => info!(generation = join.generation, rank = join.rank, step, ?ending, "left the generation"),
            Err(failure @ Failure::Collective(_)) => {
                warn!(generation = join.generation, rank = join.rank, step, %failure, "left the generation");
            }
            Err(failure) => {
                error!(generation = join.generation, rank = join.rank, step, %failure, "left the generation")
            }
        }
        span.record("step", trace::integer(step)).record("left", cause.as_str_name());
        match &result {
            Ok(_) => {
                drop(span);
                flush();
            }
            Err(failure) => {
                trace::failed(&span, &failure.to_string());
                drop(span);
            }
        }
        let out_of_memory = matches!(result, Err(Failure::OutOfMemory(_)));
        reports.left(pb::Left { cause: cause.into(), step, detail, out_of_memory });
        if matches!(result, Err(Failure::Device(_) | Failure::OutOfMemory(_))) {
            // To give back what a broken device holds may hang.
            std::mem::forget(job);
            return;
        }
        if terminated {
            return;
        }
    }
}

fn take_part(
    context: &RankContext,
    job: &mut Option<Job>,
    join: &pb::Join,
    flags: &ControlFlags,
    reports: &Reports,
) -> Result<Ending, Failure> {
    info!(run = join.run, generation = join.generation, rank = join.rank, world = join.world_size, "joining");
    flags.set_activity(Activity::Opening);
    let job = match job.take().filter(|job| job.run == join.run) {
        Some(mut open) => {
            open.use_cores(join.cores);
            job.insert(open)
        }
        None => job.insert(Job::open(context, join)?),
    };
    let device = job.device;
    generation(job, join, flags, reports).map_err(|failure| failure.on(device))
}
