//! The pieces of work of `make bench-train` and `make bench-gpu`, each as a rank does it; each says what it took. They
//! use the trainer's rooms and are compiled within its crate (its feature `bench`).

#[path = "norm.rs"]
pub mod norm;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::pb::{self, left::Cause, rank_message::Message};
use proto::shard::sha256_hex;
use proto::{DatasetId, Manifest, RunSpec, Split, Stored, keys};
use serde::Serialize;

use crate::data::blocks::BlockReader;
use crate::data::cache::Cache;
use crate::data::device_pixels::DevicePixels;
use crate::data::loader::Loader;
use crate::data::normalise::Normalise;
use crate::learn::context::{RankContext, Setup};
use crate::learn::control::{ControlFlags, Heartbeat};
use crate::learn::step;
use crate::learn::synthetic::Synthetic;
use crate::rank::serve;
use crate::torch::{Copies, Group, Member, Store, device};
use crate::trial::cpu_seconds;

/// Steps that are not counted: in the first ones libtorch chooses how it computes, on a GPU for longer.
const BEFORE: [u64; 2] = [2, 10];

/// Mean and standard deviation of the pictures' pixels.
pub const MOMENTS: ([f64; 3], [f64; 3]) = ([0.48, 0.46, 0.41], [0.23, 0.22, 0.23]);

/// What a piece of work took.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Of which part of the work.
    pub what: String,
    /// Images that it went over.
    pub images: u64,
    /// Processor time of this process, seconds.
    pub cpu: f64,
    /// Time that passed, seconds.
    pub wall: f64,
    /// The most memory that this process ever held, MiB.
    pub rss: f64,
}

/// How many bytes decoded images may take.
#[derive(Debug, Clone, Copy)]
pub struct Caches {
    /// Of the host's memory.
    pub host: u64,
    /// Of the device's.
    pub device: u64,
}

struct Clock(f64, Instant);

impl Clock {
    fn start() -> Result<Self> {
        Ok(Self(cpu_seconds()?, Instant::now()))
    }

    fn stop(&self, what: &str, images: u64) -> Result<Figures> {
        let (cpu, wall) = (cpu_seconds()? - self.0, self.1.elapsed().as_secs_f64());
        Ok(Figures { what: what.to_owned(), images, cpu, wall, rss: peak_mebibytes()? })
    }
}

fn peak_mebibytes() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? / 1024.0)
}

/// The dataset of [`run`].
pub fn dataset() -> DatasetId {
    "bench-1".parse().expect("an id")
}

/// Opens the meeting place of the ranks of [`steps`] on this machine; its port.
pub fn meeting_place() -> Result<(impl Sized, u16)> {
    let store = Store::serve("127.0.0.1")?;
    let port = store.port();
    Ok((store, port))
}

/// Trains `count` steps, after some that are not counted, on one batch in memory, as rank `rank` of `world` on
/// `device`.
pub fn steps(spec: &RunSpec, count: u64, rank: u32, world: u32, device: &str, port: u16) -> Result<Figures> {
    tch::set_num_threads(spec.ranks.threads.max(1) as i32);
    let member = Member {
        rank: rank as usize,
        world: world as usize,
        address: "127.0.0.1".to_owned(),
        device: device::parse(device)?,
        timeout: Duration::from_secs(300),
    };
    let before = BEFORE[usize::from(member.device.is_cuda())];
    let group = Group::join("127.0.0.1", port, member, || false)?;
    let mut rank = Synthetic::new(spec, &group, (rank, world))?;
    for _ in 0..before {
        rank.step()?;
    }
    rank.settle()?;
    let clock = Clock::start()?;
    for _ in 0..count {
        rank.step()?;
    }
    rank.settle()?;
    clock.stop("steps", count * rank.samples())
}

/// Reads and decodes the epochs of the spec from the folder of a dataset, whose manifest is its `manifest.json`, up to
/// numbers on the device; figures of each epoch.
pub fn loader(store: &Path, spec: &RunSpec, caches: Caches, device: &str) -> Result<Vec<Figures>> {
    let device = device::parse(device)?;
    let manifest = Manifest::from_json(&std::fs::read(store.join("manifest.json"))?)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let folder: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(store)?);
    let blocks = Arc::new(BlockReader::new(folder, &manifest, Split::Train));
    let threads = spec.ranks.threads.max(1);
    tch::set_num_threads(threads as i32);
    let loader = Loader {
        split: Split::Train,
        blocks: blocks.clone(),
        cache: Arc::new(Cache::new(caches.host, None)?),
        device_pixels: (caches.device > 0).then(|| Arc::new(DevicePixels::new(device, caches.device))),
        threads: threads as usize,
        copies: Copies::new(device)?,
        runtime: runtime.handle().clone(),
    };
    let normalise = Normalise::new(manifest.mean, manifest.std, device, step::kind(spec.ranks.precision))?
        .in_nhwc(step::is_nhwc(&spec.ranks, device));
    let mut figures = Vec::new();
    let mut clock = Clock::start()?;
    let mut batches = loader.train(spec, 0..spec.ranks.lanes, 0)?;
    for epoch in 0..spec.train.epochs {
        let mut images = 0;
        while images < blocks.samples() {
            let batch = batches.next(|| false).context("the batches ended early")??;
            let (input, _) = normalise.apply(&batch.pixels)?;
            ensure!(input.size()[0] == batch.pixels.keys.len() as i64, "a batch of another size");
            images += input.size()[0] as u64;
        }
        norm::settle(device);
        figures.push(clock.stop(&format!("epoch {epoch}"), images)?);
        clock = Clock::start()?;
    }
    Ok(figures)
}

/// Trains the whole run of the spec from such a folder, as a rank that is alone: with ledger, checkpoints, export.
/// Figures of all of it, and of all epochs but the first, if there are more.
pub fn run(store: &Path, spec: &RunSpec, caches: Caches, device: &str) -> Result<Vec<Figures>> {
    let runtime = tokio::runtime::Runtime::new()?;
    let folder: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(store)?);
    let manifest = std::fs::read(store.join("manifest.json"))?;
    let manifest_key = keys::manifest(&dataset(), 1);
    runtime.block_on(folder.put(&manifest_key.as_str().into(), manifest.clone().into()))?;
    let setup = Setup {
        device: device.to_owned(),
        advertise_address: "127.0.0.1".to_owned(),
        cache_bytes: caches.host,
        cache_dir: None,
        cache_disk_bytes: 0,
        device_cache_bytes: caches.device,
    };
    let context = RankContext { store: folder, runtime: runtime.handle().clone(), setup };
    let meeting = Store::serve("127.0.0.1")?;
    let join = pb::Join {
        run: format!("bench-{}", std::process::id()),
        generation: 1,
        device: 0,
        rank: 0,
        world_size: 1,
        store: format!("127.0.0.1:{}", meeting.port()),
        spec_json: spec.to_json(),
        manifest_sha256: sha256_hex(&manifest),
        manifest_key,
        checkpoints: Vec::new(),
        elapsed_seconds: 0.0,
        start: None,
        traceparent: String::new(),
        cores: spec.ranks.threads.max(1),
    };
    let clock = Clock::start()?;
    let (orders, to_rank) = channel();
    let (reports, said) = channel();
    let heartbeat = Arc::new(Heartbeat::new());
    // There is no coordinator that could be away.
    heartbeat.assume_contact_for(Duration::from_secs(24 * 3600));
    let flags = Arc::new(ControlFlags::new(&join, heartbeat.clone()));
    std::thread::spawn(move || serve(&context, &to_rank, &reports, &heartbeat, &|| {}));
    orders.send((join, flags))?;
    let (mut images, mut first, mut later) = (0, None, None);
    for message in said {
        match message.message {
            Some(Message::Stepped(stepped)) => {
                // One at the end of each epoch.
                for point in stepped.metrics.iter().filter(|point| point.kind == "train") {
                    images += point.samples;
                    match &first {
                        None => first = Some((Clock::start()?, images)),
                        Some((clock, of_first)) => later = Some(clock.stop("later epochs", images - of_first)?),
                    }
                }
            }
            Some(Message::Left(left)) if left.cause() == Cause::Finished => {
                return Ok([clock.stop("run", images)?].into_iter().chain(later).collect());
            }
            Some(Message::Left(left)) => bail!("the rank left: {}", left.detail),
            _ => {}
        }
    }
    bail!("the rank is gone")
}
