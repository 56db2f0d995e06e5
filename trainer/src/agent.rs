//! The agent: offers this machine's devices, and runs a rank process on each that is assigned. It decides nothing: it passes on what the
//! coordinator says to ranks and what ranks say to the coordinator, says who is silent and who is gone, serves the stores of generations,
//! and keeps logs.

mod config;
pub(crate) mod devices;
mod link;
mod logs;
pub mod metrics;
mod outbox;
mod process;

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use object_store::ObjectStore;
use proto::pb::{self, agent_message, coordinator_message, left::Cause, rank_message};
use proto::trace;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Span, info, warn};

pub use self::config::{CacheConfig, Config};
pub use self::devices::{describe, devices};
use self::link::Link;
use self::logs::Logs;
use self::outbox::Outbox;
pub use self::process::RANK_ENVIRONMENT;
use self::process::{Heard, Process, What};
use crate::learn::context::Setup;
use crate::torch;

const HEARTBEAT: Duration = Duration::from_millis(250);
/// Log lines are in the store after so long.
const FLUSH: Duration = Duration::from_secs(2);
/// At the end the last lines of logs may take so long.
const LAST_LOGS: Duration = Duration::from_secs(10);

struct Agent {
    name: String,
    address: String,
    interface: Option<String>,
    cache: CacheConfig,
    rank_command: Vec<OsString>,
    /// Hears what ranks have asked of the object store.
    used: fn(&pb::StoreUse),
    slots: Vec<Slot>,
    heard: mpsc::Sender<Heard>,
    processes: u64,
    /// The stores of generations, by run.
    stores: HashMap<String, (u64, torch::Store)>,
    serving: mpsc::Sender<(pb::Serve, torch::Result<torch::Store>)>,
    logs: Logs,
    term: u64,
    to_coordinator: Option<mpsc::Sender<pb::AgentMessage>>,
    /// It is shutting down.
    leaving: bool,
    /// What the coordinator must hear.
    outbox: Outbox,
}

/// A device, and the rank on it.
struct Slot {
    device: String,
    seat: Option<Seat>,
}

struct Seat {
    id: u64,
    process: Process,
    run: String,
    generation: u64,
    rank: u32,
    joined: bool,
    /// Of its generation, until it has left that.
    span: Span,
    /// Its last word of what it is at.
    alive: pb::RankHeartbeat,
    heard: Instant,
}

impl Seat {
    /// Ends the span of the generation, if it goes on.
    fn left(&mut self, cause: Cause, detail: &str) {
        let span = std::mem::replace(&mut self.span, Span::none());
        span.record("step", trace::integer(self.alive.step)).record("left", cause.as_str_name());
        if matches!(cause, Cause::Collective | Cause::Error | Cause::Exited | Cause::Diverged) {
            trace::failed(&span, detail);
        }
    }
}

/// Runs a trainer agent until `shutdown`, under a `name` that no other agent has. `rank_command` starts a rank process: a program that
/// calls [`run_rank`] on the same store, with stdin and stdout left to it. `used` hears what the ranks have asked of the store.
///
/// # Errors
/// If the settings cannot be meant so. Whatever fails later is tried again, or told to the coordinator.
pub async fn run(
    name: String,
    config: Config,
    store: Arc<dyn ObjectStore>,
    rank_command: Vec<OsString>,
    used: fn(&pb::StoreUse),
    shutdown: CancellationToken,
) -> Result<()> {
    let endpoint = link::endpoint(&config.coordinator)?;
    let devices = match &config.devices {
        Some(text) => devices::chosen(text)?,
        None => devices::devices(),
    };
    let grace = Duration::from_secs(config.leave_seconds.into());
    let (address, interface) = link::own_place(&endpoint, config.advertise_address, config.interface)?;
    let (heard, mut from_ranks) = mpsc::channel(1024);
    let (serving, mut served) = mpsc::channel(16);
    let (links, mut from_link) = mpsc::channel(64);
    let mut agent = Agent {
        name,
        address,
        interface,
        cache: config.cache,
        rank_command,
        used,
        slots: devices.into_iter().map(|device| Slot { device, seat: None }).collect(),
        heard,
        processes: 0,
        stores: HashMap::new(),
        serving,
        logs: Logs::new(store),
        term: 0,
        to_coordinator: None,
        leaving: false,
        outbox: Outbox::default(),
    };
    info!(agent = agent.name, address = agent.address, devices = agent.slots.len(), "agent started");
    let link = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(link::keep(endpoint, links)));
    let (mut heartbeat, mut flush) = (interval(HEARTBEAT), interval(FLUSH));
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut end: Option<Instant> = None;
    loop {
        tokio::select! {
            Some(link) = from_link.recv() => agent.link(link),
            Some(heard) = from_ranks.recv() => agent.heard(heard),
            Some((serve, store)) = served.recv() => agent.served(serve, store),
            _ = heartbeat.tick() => agent.heartbeat(),
            _ = flush.tick() => agent.logs.flush(),
            () = shutdown.cancelled(), if end.is_none() => {
                end = Some(Instant::now());
                agent.leave_all();
            }
        }
        if end.is_some_and(|end| end.elapsed() > grace || !agent.busy()) {
            break;
        }
    }
    // What was said last has a moment to reach the coordinator.
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(link);
    agent.slots.clear();
    if timeout(LAST_LOGS, agent.logs.finish()).await.is_err() {
        warn!("logs not written in time");
    }
    info!("agent ended");
    Ok(())
}

impl Agent {
    fn link(&mut self, link: Link) {
        match link {
            Link::Opened(to) => {
                self.to_coordinator = Some(to);
                self.outbox.rewind();
                let hello = self.hello();
                self.say(agent_message::Message::Hello(hello));
                self.send_reports();
            }
            Link::Closed => {
                self.to_coordinator = None;
                self.outbox.rewind();
                metrics::set_ready(false);
            }
            Link::Said(message) => self.obey(*message),
        }
    }

    fn hello(&self) -> pb::Hello {
        let occupied = self.slots.iter().zip(0..).filter_map(|(slot, device)| {
            let Seat { run, generation, rank, joined, alive, .. } = slot.seat.as_ref()?;
            let (run, generation, rank, joined, step) = (run.clone(), *generation, *rank, *joined, alive.step);
            Some(pb::Occupied { device, run, generation, rank, joined, step })
        });
        pb::Hello {
            term_seen: self.term,
            agent: self.name.clone(),
            advertise_address: self.address.clone(),
            devices: self.slots.iter().map(|slot| slot.device.clone()).collect(),
            occupied: occupied.collect(),
        }
    }

    fn obey(&mut self, message: coordinator_message::Message) {
        use coordinator_message::Message;
        match message {
            Message::Welcome(welcome) if welcome.term < self.term => {
                warn!(term = welcome.term, newest = self.term, "an outdated coordinator answered");
                self.to_coordinator = None;
            }
            Message::Welcome(welcome) => {
                self.term = welcome.term;
                metrics::set_ready(true);
                info!(term = welcome.term, "connected to the coordinator");
            }
            // A stream that was refused may still carry words.
            _ if self.to_coordinator.is_none() => {}
            Message::Serve(serve) => self.serve(serve),
            Message::Join(join) => self.join(join),
            Message::Leave(leave) => self.leave(&leave),
            Message::Kill(kill) => self.kill(&kill),
            Message::HeartbeatAck(ack) => {
                self.outbox.acknowledged(ack.acknowledged);
                for seat in self.slots.iter().filter_map(|slot| slot.seat.as_ref()) {
                    seat.process.order(Message::HeartbeatAck(ack));
                }
            }
        }
    }

    /// Opens the store of a generation, beside everything else: looking up the own name may take a while.
    fn serve(&mut self, serve: pb::Serve) {
        let (address, done) = (self.address.clone(), self.serving.clone());
        tokio::task::spawn_blocking(move || {
            let store = torch::Store::serve(&address);
            let _ = done.blocking_send((serve, store));
        });
    }

    fn served(&mut self, serve: pb::Serve, store: torch::Result<torch::Store>) {
        let pb::Serve { run, generation } = serve;
        let (port, error) = match store {
            Ok(store) => {
                let port = store.port();
                self.keep_store(run.clone(), generation, store);
                (u32::from(port), String::new())
            }
            Err(error) => (0, error.to_string()),
        };
        self.say(agent_message::Message::Serving(pb::Serving { run, generation, port, error }));
    }

    fn keep_store(&mut self, run: String, generation: u64, store: torch::Store) {
        if self.stores.get(&run).is_none_or(|(newest, _)| *newest < generation) {
            drop_store(self.stores.insert(run, (generation, store)));
        }
    }

    fn join(&mut self, mut join: pb::Join) {
        if self.leaving {
            // It crossed the word that this agent leaves.
            let left =
                pb::Left { cause: Cause::Exited.into(), step: 0, detail: "its agent is shutting down".to_owned() };
            let message = Some(rank_message::Message::Left(left));
            let pb::Join { run, generation, rank, device, .. } = join;
            return self.report(pb::RankMessage { run, generation, rank, device, message, ..Default::default() });
        }
        let device = join.device as usize;
        // A rank of another run holds nothing that this one could use.
        let slot = self.slots.get_mut(device);
        if let Some(Seat { run, generation, .. }) = slot.and_then(|slot| slot.seat.take_if(|seat| seat.run != join.run))
        {
            self.gone(&run, generation);
        }
        let Some(slot) = self.slots.get_mut(device) else {
            warn!(device, "asked to join on a device that is not here");
            return;
        };
        let (run, generation, rank) = (join.run.clone(), join.generation, join.rank);
        let span = trace::generation("agent", &join);
        let own = trace::traceparent(&span);
        if !own.is_empty() {
            join.traceparent = own;
        }
        if let Some(seat) = &mut slot.seat {
            (seat.generation, seat.rank, seat.joined, seat.span) = (generation, rank, true, span);
            seat.process.order(coordinator_message::Message::Join(join));
            return;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let setup = Setup {
            device: slot.device.clone(),
            advertise_address: self.address.clone(),
            threads: (cores / self.slots.len()).max(1) as u32,
            cache_bytes: self.cache.cache_bytes / self.slots.len() as u64,
            cache_dir: self.cache.cache_dir.clone(),
            cache_disk_bytes: self.cache.cache_disk_bytes / self.slots.len() as u64,
        };
        self.processes += 1;
        let id = self.processes;
        match Process::start(&self.rank_command, (&setup, self.interface.as_deref()), (device, id), &self.heard) {
            Ok(process) => {
                metrics::rank_started();
                info!(run, generation, rank, device, "rank started");
                process.order(coordinator_message::Message::Join(join));
                let heard = Instant::now();
                let alive = pb::RankHeartbeat::default();
                self.slots[device].seat =
                    Some(Seat { id, process, run, generation, rank, joined: true, span, alive, heard });
            }
            Err(error) => {
                let detail = format!("{error:#}");
                warn!(run, generation, rank, error = detail, "rank not started");
                trace::failed(&span, &detail);
                let left = pb::Left { cause: Cause::Error.into(), step: 0, detail };
                let message = Some(rank_message::Message::Left(left));
                self.report(pb::RankMessage {
                    run,
                    generation,
                    rank,
                    device: device as u32,
                    message,
                    ..Default::default()
                });
            }
        }
    }

    fn leave(&mut self, leave: &pb::Leave) {
        if leave.abort && self.stores.get(&leave.run).is_some_and(|(generation, _)| *generation == leave.generation) {
            // Ranks that still wait for each other at the store find out at once.
            drop_store(self.stores.remove(&leave.run));
        }
        for seat in self.slots.iter().filter_map(|slot| slot.seat.as_ref()) {
            if (seat.run.as_str(), seat.generation) == (leave.run.as_str(), leave.generation) {
                seat.process.order(coordinator_message::Message::Leave(leave.clone()));
            }
        }
    }

    /// Asks every rank here to leave after its step, with a checkpoint, and for no new ones.
    fn leave_all(&mut self) {
        self.leaving = true;
        self.heartbeat();
        for seat in self.slots.iter().filter_map(|slot| slot.seat.as_ref()).filter(|seat| seat.joined) {
            let (run, generation) = (seat.run.clone(), seat.generation);
            let leave = pb::Leave { run, generation, checkpoint: true, abort: false };
            seat.process.order(coordinator_message::Message::Leave(leave));
        }
    }

    fn busy(&self) -> bool {
        self.slots.iter().filter_map(|slot| slot.seat.as_ref()).any(|seat| seat.joined)
    }

    fn kill(&mut self, kill: &pb::Kill) {
        let device = kill.device as usize;
        let is_it = |seat: &mut Seat| seat.run == kill.run && seat.generation <= kill.generation;
        let seat = self.slots.get_mut(device).and_then(|slot| slot.seat.take_if(is_it));
        let Some(Seat { id, run, generation, rank, .. }) = seat else { return };
        info!(run, generation, rank, device, process = id, "rank ended");
        let left =
            pb::Left { cause: Cause::Exited.into(), step: 0, detail: "killed as the coordinator asked".to_owned() };
        let message = Some(rank_message::Message::Left(left));
        self.gone(&run, generation);
        self.report(pb::RankMessage { run, generation, rank, device: device as u32, message, ..Default::default() });
    }

    /// After the last rank of a run here has gone, from `generation`, nothing of the run is kept but the store of a later generation.
    fn gone(&mut self, run: &str, generation: u64) {
        if !self.slots.iter().filter_map(|slot| slot.seat.as_ref()).any(|seat| seat.run == run) {
            if self.stores.get(run).is_some_and(|(of, _)| *of <= generation) {
                drop_store(self.stores.remove(run));
            }
            self.logs.close(run);
        }
    }

    fn heard(&mut self, Heard { device, process, what }: Heard) {
        let Some(seat) = self.slots[device].seat.as_mut().filter(|seat| seat.id == process) else { return };
        let (run, generation, rank) = (seat.run.clone(), seat.generation, seat.rank);
        let device = device as u32;
        match what {
            What::Message(message) => {
                seat.heard = Instant::now();
                let for_the_agent = message.run.is_empty();
                match &message.message {
                    Some(rank_message::Message::Joined(joined)) => seat.alive.step = joined.step,
                    Some(rank_message::Message::Stepped(stepped)) => seat.alive.step = stepped.step,
                    Some(rank_message::Message::Heartbeat(alive)) => seat.alive = *alive,
                    Some(rank_message::Message::StoreUse(used)) => (self.used)(used),
                    Some(rank_message::Message::Left(left)) if message.generation == seat.generation => {
                        (seat.joined, seat.alive.step) = (false, left.step);
                        seat.left(left.cause(), &left.detail);
                    }
                    _ => {}
                }
                let terminated = matches!(&message.message, Some(rank_message::Message::Left(left)) if left.cause() == Cause::Terminated);
                if terminated {
                    // It has said its last word.
                    self.slots[device as usize].seat = None;
                    self.gone(&run, generation);
                }
                if !for_the_agent {
                    self.report(pb::RankMessage { device, ..message });
                }
            }
            What::Line(line) => {
                self.logs.line(&run, generation, rank, &line);
                // It is in the store anyhow, so it waits for no coordinator, and takes no room from what does.
                let message = Some(rank_message::Message::Log(pb::LogLine { generation, rank, line }));
                self.say(agent_message::Message::Rank(pb::RankMessage {
                    run,
                    generation,
                    rank,
                    device,
                    message,
                    ..Default::default()
                }));
            }
            What::Exited(status) => {
                metrics::rank_lost();
                warn!(run, generation, rank, status, "rank process is gone");
                seat.left(Cause::Exited, &status);
                let left = pb::Left { cause: Cause::Exited.into(), step: seat.alive.step, detail: status };
                self.slots[device as usize].seat = None;
                self.gone(&run, generation);
                let message = Some(rank_message::Message::Left(left));
                self.report(pb::RankMessage { run, generation, rank, device, message, ..Default::default() });
            }
        }
    }

    fn heartbeat(&mut self) {
        metrics::set_devices(self.slots.len(), self.slots.iter().filter(|slot| slot.seat.is_some()).count());
        let life = |slot: &Slot| {
            slot.seat.as_ref().map_or_else(pb::DeviceHeartbeat::default, |seat| pb::DeviceHeartbeat {
                silent_millis: seat.heard.elapsed().as_millis() as u64,
                rank: Some(seat.alive),
            })
        };
        let devices = self.slots.iter().map(life).collect();
        self.say(agent_message::Message::Heartbeat(pb::Heartbeat { devices, leaving: self.leaving }));
        self.send_reports();
    }

    /// Says something that is of no use later.
    fn say(&self, message: agent_message::Message) -> bool {
        let message = pb::AgentMessage { message: Some(message) };
        self.to_coordinator.as_ref().is_some_and(|to| to.try_send(message).is_ok())
    }

    /// Tells the coordinator, as soon as there is one.
    fn report(&mut self, message: pb::RankMessage) {
        self.outbox.push(message);
        self.send_reports();
    }

    fn send_reports(&mut self) {
        let Some(to) = &self.to_coordinator else { return };
        self.outbox.send(|report| {
            let message = Some(agent_message::Message::Rank(report.clone()));
            to.try_send(pb::AgentMessage { message }).is_ok()
        });
    }
}

/// Dropping a server joins its thread, for which the loop need not wait.
fn drop_store(store: Option<(u64, torch::Store)>) {
    if let Some(store) = store {
        tokio::task::spawn_blocking(move || drop(store));
    }
}

#[cfg(test)]
mod tests;
