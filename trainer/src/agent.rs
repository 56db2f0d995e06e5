//! The agent offers this machine's devices and runs a rank process on each that is assigned. It decides nothing: it
//! passes messages on between coordinator and ranks, reports which ranks are silent or gone, serves the stores of
//! generations, and stores logs.

mod config;
pub(crate) mod devices;
mod last_lines;
mod link;
mod local_rank;
mod logs;
mod machine;
pub mod metrics;
mod nccl;
mod only_run;
mod outbox;
mod process;
mod slot;
mod stores;

use std::ffi::OsString;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use object_store::ObjectStore;
use proto::dial::Dial;
use proto::pb::{self, agent_message, coordinator_message, left::Cause, rank_message};
use proto::trace;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use self::config::{CacheConfig, Config};
pub use self::devices::{describe, devices, problem};
use self::last_lines::LastLines;
use self::link::LinkEvent;
use self::local_rank::LocalRank;
use self::logs::Logs;
use self::machine::Machine;
use self::only_run::OnlyRun;
use self::outbox::Outbox;
pub use self::process::RANK_ENVIRONMENT;
use self::process::{Event, Process, RankEvent};
use self::slot::DeviceSlot;
use self::stores::Stores;
use crate::learn::context::Setup;
use crate::torch;

const HEARTBEAT: Duration = Duration::from_millis(250);
/// Events of ranks that may wait for the agent.
const RANK_EVENTS: usize = 1024;
/// Messages of a stream that reports leave for heartbeats.
const HEARTBEAT_ROOM: usize = 32;
/// Log lines are written to the store this often.
const FLUSH: Duration = Duration::from_secs(2);
/// When the agent ends, writing the last log lines may take this long.
const LAST_LOGS: Duration = Duration::from_secs(10);

struct Agent {
    name: String,
    address: String,
    interface: Option<String>,
    cache: CacheConfig,
    rank_command: Vec<OsString>,
    /// Is called with the store requests that ranks have made.
    used: fn(&pb::StoreUse),
    machine: Machine,
    slots: Vec<DeviceSlot>,
    rank_events: mpsc::Sender<RankEvent>,
    processes: u64,
    stores: Stores,
    serving: mpsc::Sender<(pb::Serve, torch::Result<torch::Store>)>,
    logs: Logs,
    term: u64,
    to_coordinator: Option<mpsc::Sender<pb::AgentMessage>>,
    only_run: OnlyRun,
    /// Whether the agent is shutting down.
    leaving: bool,
    /// What the coordinator must hear.
    outbox: Outbox,
}

/// Runs a trainer agent until `shutdown`, or until the only run that it has ranks of has ended, under a `name` that no
/// other agent has. `rank_command` starts a rank process: a program that calls [`crate::run_rank`] on the same store,
/// with stdin and stdout left to it. `used` is called with the store requests of the ranks.
///
/// # Errors
/// If the settings are wrong, or that run has failed or was cancelled. Whatever else fails later is retried, or
/// reported to the coordinator.
pub async fn run(
    name: String,
    config: Config,
    dial: Dial,
    store: Arc<dyn ObjectStore>,
    rank_command: Vec<OsString>,
    used: fn(&pb::StoreUse),
    shutdown: CancellationToken,
) -> Result<()> {
    let devices = config.devices.as_deref().map_or_else(|| Ok(devices::devices()), devices::chosen)?;
    let grace = Duration::from_secs(config.leave_seconds.into());
    let (address, interface) = link::advertised_address(&dial, config.advertise_address, config.interface)?;
    let (rank_events, mut from_ranks) = mpsc::channel(RANK_EVENTS);
    let (serving, mut served) = mpsc::channel(16);
    let (links, mut from_link) = mpsc::channel(64);
    let mut agent = Agent {
        name,
        address,
        interface,
        cache: config.cache,
        rank_command,
        used,
        machine: Machine::join(devices.len()),
        slots: devices.into_iter().map(DeviceSlot::new).collect(),
        rank_events,
        processes: 0,
        stores: Stores::default(),
        serving,
        logs: Logs::new(Arc::clone(&store)),
        term: 0,
        to_coordinator: None,
        only_run: OnlyRun::new(config.run),
        leaving: false,
        outbox: Outbox::default(),
    };
    info!(agent = agent.name, address = agent.address, devices = agent.slots.len(), "agent started");
    if let Some(problem) = devices::problem() {
        warn!("{problem}");
    }
    let link = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(link::keep_open(dial, Arc::clone(&store), links)));
    let (mut heartbeat, mut flush) = (interval(HEARTBEAT), interval(FLUSH));
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    flush.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut beaten, mut end) = (Instant::now(), None::<Instant>);
    loop {
        tokio::select! {
            Some(event) = from_link.recv() => agent.on_link(event),
            Some(event) = from_ranks.recv() => agent.on_rank(event),
            Some((serve, store)) = served.recv() => agent.on_served(serve, store),
            _ = heartbeat.tick() => {
                let stall = beaten.elapsed().saturating_sub(2 * HEARTBEAT);
                beaten = Instant::now();
                agent.slots.iter_mut().filter_map(|slot| slot.rank.as_mut()).for_each(|local| local.discount(stall));
                // What ranks have said by now is no silence.
                for _ in 0..RANK_EVENTS {
                    let Ok(event) = from_ranks.try_recv() else { break };
                    agent.on_rank(event);
                }
                agent.heartbeat();
            }
            _ = flush.tick() => agent.logs.flush(),
            () = shutdown.cancelled(), if end.is_none() => {
                end = Some(Instant::now());
                agent.leave_all();
            }
        }
        if end.is_none() && agent.only_run.is_over() {
            end = Some(Instant::now());
            agent.leave_all();
        }
        if end.is_some_and(|end| end.elapsed() > grace || !agent.busy()) {
            break;
        }
    }
    // The last messages need a moment to reach the coordinator.
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(link);
    agent.slots.clear();
    if timeout(LAST_LOGS, agent.logs.finish()).await.is_err() {
        warn!("logs not written in time");
    }
    info!("agent ended");
    agent.only_run.end()
}

impl Agent {
    fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Opened(to) => {
                self.to_coordinator = Some(to);
                self.outbox.rewind();
                let hello = self.hello();
                self.send(agent_message::Message::Hello(hello));
                self.send_reports();
            }
            LinkEvent::ClusterChanged => self.forget_cluster(),
            LinkEvent::Closed => {
                self.to_coordinator = None;
                self.outbox.rewind();
                metrics::set_ready(false);
            }
            LinkEvent::Message(message) => self.handle(*message),
        }
    }

    /// The store is another cluster's, whose runs may have the names of those that had ranks here.
    fn forget_cluster(&mut self) {
        self.term = 0;
        self.outbox.clear();
        let ranks: Vec<LocalRank> = self.slots.iter_mut().filter_map(|slot| slot.rank.take()).collect();
        for LocalRank { run, generation, rank, .. } in ranks {
            warn!(run, generation, rank, "rank ended: its run is another cluster's");
            self.release(&run, generation);
        }
    }

    fn hello(&self) -> pb::Hello {
        let occupied = self.slots.iter().zip(0..).filter_map(|(slot, device)| {
            let LocalRank { run, generation, rank, joined, heartbeat, .. } = slot.rank.as_ref()?;
            let (run, generation, rank, joined, step) = (run.clone(), *generation, *rank, *joined, heartbeat.step);
            Some(pb::Occupied { device, run, generation, rank, joined, step })
        });
        pb::Hello {
            term_seen: self.term,
            agent: self.name.clone(),
            advertise_address: self.address.clone(),
            devices: self.slots.iter().map(|slot| slot.device.clone()).collect(),
            occupied: occupied.collect(),
            only_run: self.only_run.name.clone(),
        }
    }

    fn handle(&mut self, message: coordinator_message::Message) {
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
            // A stream to an outdated coordinator may still deliver messages: they are ignored.
            _ if self.to_coordinator.is_none() => {}
            Message::Serve(serve) => self.serve(serve),
            Message::Join(join) => self.join(join),
            Message::Leave(leave) => self.leave(&leave),
            Message::Kill(kill) => self.kill(&kill),
            Message::HeartbeatAck(ack) => {
                self.outbox.acknowledged(ack.acknowledged);
                self.only_run.hear(ack.ended());
                for local in self.slots.iter().filter_map(|slot| slot.rank.as_ref()) {
                    local.process.send(Message::HeartbeatAck(ack));
                }
            }
        }
    }

    /// Opens the store of a generation on a blocking thread, since looking up the own name may take a while.
    fn serve(&mut self, serve: pb::Serve) {
        let (address, done) = (self.address.clone(), self.serving.clone());
        tokio::task::spawn_blocking(move || {
            let store = torch::Store::serve(&address);
            let _ = done.blocking_send((serve, store));
        });
    }

    fn on_served(&mut self, serve: pb::Serve, store: torch::Result<torch::Store>) {
        let pb::Serve { run, generation } = serve;
        let (port, error) = match store {
            Ok(store) => {
                let port = store.port();
                self.stores.keep(run.clone(), generation, store);
                (u32::from(port), String::new())
            }
            Err(error) => (0, error.to_string()),
        };
        self.send(agent_message::Message::Serving(pb::Serving { run, generation, port, error }));
    }

    fn join(&mut self, mut join: pb::Join) {
        if self.leaving {
            // The coordinator sent this before it heard that the agent is leaving.
            let pb::Join { run, generation, rank, device, .. } = join;
            let shutting_down = "its agent is shutting down".to_owned();
            return self.report_left((run, generation, rank), device, Cause::Exited, (0, shutting_down));
        }
        let device = join.device as usize;
        // The state of another run's rank is of no use to this run.
        let slot = self.slots.get_mut(device);
        if let Some(LocalRank { run, generation, .. }) =
            slot.and_then(|slot| slot.rank.take_if(|local| local.run != join.run))
        {
            self.release(&run, generation);
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
        // Anew for each generation, because agents of this machine come and go.
        join.cores = self.machine.share() as u32;
        if let Some(local) = &mut slot.rank {
            (local.generation, local.rank, local.joined, local.span) = (generation, rank, true, span);
            local.process.send(coordinator_message::Message::Join(join));
            return;
        }
        let setup = Setup {
            device: self.slots[device].device.clone(),
            device_cache_bytes: self.slots[device].pixels(&run, self.pixels(device)),
            advertise_address: self.address.clone(),
            cache_bytes: self.cache.cache_bytes / self.slots.len() as u64,
            cache_dir: self.cache.cache_dir.clone(),
            cache_disk_bytes: self.cache.cache_disk_bytes / self.slots.len() as u64,
        };
        let environment = nccl::environment(&self.name, &self.devices(), device, self.interface.as_deref());
        self.processes += 1;
        let id = self.processes;
        match Process::start(&self.rank_command, (&setup, environment), (device, id), &self.rank_events) {
            Ok(process) => {
                metrics::rank_started();
                info!(run, generation, rank, device, "rank started");
                process.send(coordinator_message::Message::Join(join));
                let last_heard = Instant::now();
                self.slots[device].rank = Some(LocalRank {
                    id,
                    process,
                    run,
                    generation,
                    rank,
                    joined: true,
                    span,
                    heartbeat: pb::RankHeartbeat::default(),
                    last_heard,
                    last_lines: LastLines::default(),
                });
            }
            Err(error) => {
                let detail = format!("{error:#}");
                warn!(run, generation, rank, error = detail, "rank not started");
                trace::failed(&span, &detail);
                self.report_left((run, generation, rank), device as u32, Cause::Error, (0, detail));
            }
        }
    }

    fn devices(&self) -> Vec<&str> {
        self.slots.iter().map(|slot| slot.device.as_str()).collect()
    }

    /// How much of its device's memory decoded images may take in a slot.
    fn pixels(&self, slot: usize) -> u64 {
        let device = &self.slots[slot].device;
        self.cache.bytes_of(device, nccl::sharing(&self.devices(), device))
    }

    fn leave(&mut self, leave: &pb::Leave) {
        if leave.abort {
            self.stores.close_if(&leave.run, |generation| generation == leave.generation);
        }
        for local in self.slots.iter().filter_map(|slot| slot.rank.as_ref()) {
            if (local.run.as_str(), local.generation) == (leave.run.as_str(), leave.generation) {
                local.process.send(coordinator_message::Message::Leave(leave.clone()));
            }
        }
    }

    /// Asks every rank here to leave after its step, with a checkpoint; from now on the agent takes no new ones.
    fn leave_all(&mut self) {
        self.leaving = true;
        self.heartbeat();
        for local in self.slots.iter().filter_map(|slot| slot.rank.as_ref()).filter(|local| local.joined) {
            let (run, generation) = (local.run.clone(), local.generation);
            let leave = pb::Leave { run, generation, checkpoint: true, abort: false };
            local.process.send(coordinator_message::Message::Leave(leave));
        }
    }

    fn busy(&self) -> bool {
        self.slots.iter().filter_map(|slot| slot.rank.as_ref()).any(|local| local.joined)
    }

    fn kill(&mut self, kill: &pb::Kill) {
        let device = kill.device as usize;
        let is_it = |local: &mut LocalRank| local.run == kill.run && local.generation <= kill.generation;
        let local = self.slots.get_mut(device).and_then(|slot| slot.rank.take_if(is_it));
        let Some(LocalRank { id, run, generation, rank, .. }) = local else { return };
        info!(run, generation, rank, device, process = id, "rank ended");
        self.release(&run, generation);
        let killed = "killed as the coordinator asked".to_owned();
        self.report_left((run, generation, rank), device as u32, Cause::Exited, (0, killed));
    }

    /// Frees what the agent holds for a run whose last rank here left `generation`: the store, unless it is a later
    /// generation's, and logs.
    fn release(&mut self, run: &str, generation: u64) {
        if !self.slots.iter().filter_map(|slot| slot.rank.as_ref()).any(|local| local.run == run) {
            self.stores.close_if(run, |of| of <= generation);
            self.logs.close(run);
        }
    }

    fn on_rank(&mut self, RankEvent { device, process, event }: RankEvent) {
        let Some(local) = self.slots[device].rank.as_mut().filter(|local| local.id == process) else { return };
        let (run, generation, rank) = (local.run.clone(), local.generation, local.rank);
        let device = device as u32;
        match event {
            Event::Message(message) => {
                local.last_heard = Instant::now();
                let for_the_agent = message.run.is_empty();
                match &message.message {
                    Some(rank_message::Message::Joined(joined)) => local.heartbeat.step = joined.step,
                    Some(rank_message::Message::Stepped(stepped)) => local.heartbeat.step = stepped.step,
                    Some(rank_message::Message::Heartbeat(heartbeat)) => local.heartbeat = *heartbeat,
                    Some(rank_message::Message::StoreUse(used)) => (self.used)(used),
                    Some(rank_message::Message::Left(left)) if message.generation == local.generation => {
                        (local.joined, local.heartbeat.step) = (false, left.step);
                        local.end_span(left.cause(), &left.detail);
                    }
                    _ => {}
                }
                let left = match &message.message {
                    Some(rank_message::Message::Left(left)) => Some(left),
                    _ => None,
                };
                if left.is_some_and(|left| left.out_of_memory) {
                    let most = self.pixels(device as usize);
                    self.slots[device as usize].lacked_memory(&run, most);
                }
                let terminated = left.is_some_and(|left| left.cause() == Cause::Terminated);
                if terminated {
                    // It sends nothing after this.
                    self.slots[device as usize].rank = None;
                    self.release(&run, generation);
                }
                if !for_the_agent {
                    self.report(pb::RankMessage { device, ..message });
                }
            }
            Event::Line(line) => {
                self.logs.line(&run, generation, rank, &line);
                local.last_lines.add(&line);
            }
            Event::Exited(exit) => {
                metrics::rank_lost();
                let detail = local.last_lines.after(&exit);
                warn!(run, generation, rank, status = detail, "rank process is gone");
                local.end_span(Cause::Exited, &detail);
                let step = local.heartbeat.step;
                self.slots[device as usize].rank = None;
                self.release(&run, generation);
                self.report_left((run, generation, rank), device, Cause::Exited, (step, detail));
            }
        }
    }

    fn heartbeat(&mut self) {
        metrics::set_devices(self.slots.len(), self.slots.iter().filter(|slot| slot.rank.is_some()).count());
        let of = |slot: &DeviceSlot| {
            slot.rank.as_ref().map_or_else(pb::DeviceHeartbeat::default, |local| pb::DeviceHeartbeat {
                silent_millis: local.silence().as_millis() as u64,
                rank: Some(local.heartbeat),
            })
        };
        let devices = self.slots.iter().map(of).collect();
        self.send(agent_message::Message::Heartbeat(pb::Heartbeat { devices, leaving: self.leaving }));
        self.send_reports();
    }

    /// Sends a message if the stream is open and has room; otherwise drops it. Returns whether it was sent.
    fn send(&self, message: agent_message::Message) -> bool {
        let message = pb::AgentMessage { message: Some(message) };
        self.to_coordinator.as_ref().is_some_and(|to| to.try_send(message).is_ok())
    }

    /// Reports on behalf of a rank that it has left.
    fn report_left(&mut self, of: (String, u64, u32), device: u32, cause: Cause, (step, detail): (u64, String)) {
        let (run, generation, rank) = of;
        let left = pb::Left { cause: cause.into(), step, detail, ..Default::default() };
        let message = Some(rank_message::Message::Left(left));
        self.report(pb::RankMessage { run, generation, rank, device, message, ..Default::default() });
    }

    /// Sends a report as soon as a coordinator is connected, and again until it is acknowledged.
    fn report(&mut self, message: pb::RankMessage) {
        self.outbox.push(message);
        self.send_reports();
    }

    fn send_reports(&mut self) {
        let Some(to) = &self.to_coordinator else { return };
        self.outbox.send(|report| {
            let message = Some(agent_message::Message::Rank(report.clone()));
            // Reports can wait; a heartbeat that finds no room is lost.
            to.capacity() > HEARTBEAT_ROOM && to.try_send(pb::AgentMessage { message }).is_ok()
        });
    }
}

#[cfg(test)]
mod tests;
