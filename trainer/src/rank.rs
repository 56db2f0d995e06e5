//! The rank process: lives through generations, keeps its state between them, and does what its agent says.
//!
//! Three threads: one reads orders, one trains, one writes reports and signs of life. So a rank that trains, validates or waits for data
//! is heard, and one that hangs as a process is not.

pub(crate) mod ipc;

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

use crate::learn::context::{Home, Setup};
use crate::learn::control::{Pulse, Wishes};
use crate::learn::failure::Failure;
use crate::learn::job::Job;
use crate::learn::reports::Reports;
use crate::learn::train::{Ending, generation};

/// A rank is heard at least this often.
const SIGN_OF_LIFE: Duration = Duration::from_millis(250);

/// Runs one rank until its agent closes its stdin. On SIGTERM it leaves its generation after the step, with a checkpoint, and ends.
/// `used` gives what was asked of the store since it was last called, for the agent. `flush` is called when the rank has left a generation
/// in order and may be killed soon, to export the generation's span; nobody waits for it then, as long as it takes no more than a moment.
///
/// # Errors
/// If the agent says nothing, or something that is no order.
pub async fn run_rank(
    store: Arc<dyn ObjectStore>,
    used: fn() -> Option<pb::StoreUse>,
    flush: impl Fn() + Send + 'static,
) -> Result<()> {
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
    let pulse = Arc::new(Pulse::new());
    let current: Arc<Mutex<Option<Arc<Wishes>>>> = Arc::default();
    let (heard, joined) = (pulse.clone(), current.clone());
    spawn("orders", move || {
        let result = read_orders(&orders, &heard, &joined);
        // What is not written yet is in the agent's or the store's hands no more; the training thread may hang in a collective.
        std::process::exit(i32::from(result.is_err()));
    })?;
    let mut terminate = signal(SignalKind::terminate())?;
    let told = pulse.clone();
    tokio::spawn(async move {
        terminate.recv().await;
        told.terminated.store(true, Ordering::SeqCst);
        match current.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            Some(wishes) if !wishes.over.load(Ordering::SeqCst) => wishes.leave_after_step(true),
            // It holds at most a state that others hold, too.
            _ => std::process::exit(0),
        }
    });
    let (done, ended) = tokio::sync::oneshot::channel();
    let beating = pulse.clone();
    spawn("reports", move || {
        write_reports(&to_write, &beating, used);
        let _ = done.send(());
    })?;
    // Its end ends the reports, when all are written.
    spawn("train", move || serve(&home, &to_train, &reports, &pulse, &flush))?;
    ended.await.context("the reporting thread panicked")
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).context("failed to start a thread")?;
    Ok(())
}

/// Reads until the agent is gone. A `Leave` goes to the generation that it is for, past the training thread.
fn read_orders(
    orders: &Sender<(pb::Join, Arc<Wishes>)>,
    pulse: &Arc<Pulse>,
    current: &Mutex<Option<Arc<Wishes>>>,
) -> Result<()> {
    let mut stdin = std::io::stdin().lock();
    let current = || current.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(frame) = ipc::read(&mut stdin)? {
        match pb::CoordinatorMessage::decode(frame.as_slice())?.message {
            Some(coordinator_message::Message::Join(join)) => {
                pulse.hear();
                let wishes = Arc::new(Wishes::new(&join, pulse.clone()));
                if let Some(old) = current().replace(wishes.clone()) {
                    old.abort();
                }
                if orders.send((join, wishes)).is_err() {
                    break;
                }
            }
            Some(coordinator_message::Message::Leave(leave)) => {
                if let Some(wishes) = current().as_ref().filter(|wishes| wishes.concern(&leave)) {
                    wishes.hear(&leave);
                }
            }
            Some(coordinator_message::Message::HeartbeatAck(_)) => pulse.hear(),
            _ => {}
        }
    }
    Ok(())
}

/// Writes reports as they come, and between them signs of life and what was asked of the store, until there are no more.
fn write_reports(reports: &Receiver<pb::RankMessage>, pulse: &Pulse, used: fn() -> Option<pb::StoreUse>) {
    let mut stdout = std::io::stdout().lock();
    let mut write = |message: pb::RankMessage| ipc::write(&mut stdout, &message.encode_to_vec());
    let to_agent = |message| pb::RankMessage { message: Some(message), ..Default::default() };
    let mut due = Instant::now();
    loop {
        let report = reports.recv_timeout(due.saturating_duration_since(Instant::now()));
        let over = matches!(report, Err(RecvTimeoutError::Disconnected));
        let written = match report {
            Ok(message) => write(message),
            Err(_) => {
                due = Instant::now() + SIGN_OF_LIFE;
                let used = used().map(rank_message::Message::StoreUse);
                let alive = rank_message::Message::Heartbeat(pulse.alive());
                used.into_iter().chain([alive]).try_for_each(|message| write(to_agent(message)))
            }
        };
        if written.is_err() || over {
            return;
        }
    }
}

/// Takes part in one generation after the other, until there are no more orders, or the process is to end.
pub(crate) fn serve(
    home: &Home,
    orders: &Receiver<(pb::Join, Arc<Wishes>)>,
    reports: &Sender<pb::RankMessage>,
    pulse: &Pulse,
    flush: &dyn Fn(),
) {
    let mut job: Option<Job> = None;
    for (join, wishes) in orders {
        let span = trace::generation("rank", &join).entered();
        let reports =
            Reports { run: join.run.clone(), generation: join.generation, rank: join.rank, to: reports.clone() };
        let result = take_part(home, &mut job, &join, &wishes, &reports);
        wishes.over.store(true, Ordering::SeqCst);
        wishes.at(Activity::Idle);
        let terminated = pulse.terminated.load(Ordering::SeqCst);
        let (cause, detail) = match &result {
            Ok(Ending::Asked) if terminated => (Cause::Terminated, String::new()),
            Ok(Ending::Asked) => (Cause::Asked, String::new()),
            Ok(Ending::Finished) => (Cause::Finished, String::new()),
            Err(Failure::Collective(detail)) => (Cause::Collective, detail.clone()),
            Err(Failure::Here(error)) => (Cause::Error, format!("{error:#}")),
            Err(Failure::Diverged(detail)) => (Cause::Diverged, detail.clone()),
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
        reports.left(cause, step, detail);
        if terminated {
            return;
        }
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
    wishes.at(Activity::Opening);
    let job = match job.take().filter(|job| job.run == join.run) {
        Some(open) => job.insert(open),
        None => job.insert(Job::open(home, join)?),
    };
    generation(job, join, wishes, reports)
}
