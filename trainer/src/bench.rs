//! This crate's side of `make bench-train`: each function does one piece of work, as a rank does it, and says what it took.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use object_store::local::LocalFileSystem;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::manifest::{ManifestBlock, ManifestClass, ManifestShard, ManifestTar};
use proto::pb::{self, left::Cause, rank_message::Message};
use proto::shard::{Origin, TarWriter, sha256_hex};
use proto::{Attempt, DatasetId, Manifest, OutcomeCounts, Resize, RunSpec, Sample, Split, Stored, keys};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::data::batch::{Batch, ColorJitter, Pixels};
use crate::data::blocks::BlockReader;
use crate::data::cache::Cache;
use crate::data::loader::Loader;
use crate::data::normalise::Normalise;
use crate::data::plan::lanes_of;
use crate::data::random;
use crate::learn::alexnet::AlexNet;
use crate::learn::context::{RankContext, Setup};
use crate::learn::control::{ControlFlags, Heartbeat};
use crate::learn::{schedule, step};
use crate::rank::serve;
use crate::torch::{Group, Member, Op, Reducer, Store};

const MEAN: [f64; 3] = [0.48, 0.46, 0.41];
const STD: [f64; 3] = [0.23, 0.22, 0.23];
/// Different pictures in a dataset; each stands in it several times, under several keys.
const PICTURES: u64 = 200;

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

fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    // The 14th and 15th field of the whole line, in ticks, of which Linux counts 100 a second.
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / 100.0)
}

fn peak_mebibytes() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? / 1024.0)
}

fn dataset() -> DatasetId {
    "bench-1".parse().expect("an id")
}

/// Writes a dataset of `images` training samples of `size` x `size` pixels in ten classes into the folder `store`, its manifest to
/// `manifest.json` there, and the names of its tars to `tars.txt`.
pub fn write_dataset(store: &Path, images: u64, size: u32) -> Result<()> {
    let pictures: Vec<bytes::Bytes> =
        (0..PICTURES.min(images)).map(|key| picture(key, size as usize)).collect::<Result<_>>()?;
    let mut shards = Vec::new();
    let (mut names, mut key) = (String::new(), 0);
    while key < images {
        let shard = shards.len() as u32;
        let mut tar = TarWriter::new();
        let end = images.min(key + 500);
        for key in key..end {
            let origin = Origin {
                synset: format!("n{}", key % 10),
                url: "http://x/".into(),
                sha256: "0".into(),
                width: size,
                height: size,
            };
            let image = pictures[(key % PICTURES) as usize].clone();
            tar.append(&Sample { key, label: (key % 10) as u32, image }, &origin);
        }
        let mut bytes = tar.take().to_vec();
        let (rest, _, sha256, blocks) = tar.finish();
        bytes.extend_from_slice(&rest);
        let name = keys::tar(&dataset().shard(shard), Split::Train, Attempt { term: 1, n: 1 });
        let path = store.join(&name);
        std::fs::create_dir_all(path.parent().context("a key has a folder")?)?;
        std::fs::write(&path, bytes)?;
        names += &format!("{}\n", path.display());
        let block = |b: &proto::shard::Block| ManifestBlock {
            offset: b.offset,
            length: b.length,
            samples: b.samples,
            kept: b.samples,
        };
        let tar = ManifestTar { key: name, sha256, first: 0, blocks: blocks.iter().map(block).collect() };
        let tars = BTreeMap::from([(Split::Train, tar)]);
        shards.push(ManifestShard { shard, round: 1, outcomes: None, findings: None, skips: None, tars });
        key = end;
    }
    let class = |i: u64| ManifestClass {
        synset: format!("n{i}"),
        name: String::new(),
        urls: images / 10,
        outcomes: OutcomeCounts::default(),
        samples: BTreeMap::from([(Split::Train, (images + 9 - i) / 10)]),
    };
    let manifest = Manifest {
        format: 1,
        nonce: "0".to_owned(),
        dataset: dataset(),
        version: 1,
        rounds: 1,
        resize: Resize { size, quality: 90, ..Resize::default() },
        smallest_side: size,
        classes: (0..10).map(class).collect(),
        outcomes: OutcomeCounts::default(),
        skipped: BTreeMap::new(),
        near_duplicates: 0,
        mean: MEAN,
        std: STD,
        shards,
    };
    std::fs::write(store.join("manifest.json"), manifest.to_json())?;
    std::fs::write(store.join("tars.txt"), names)?;
    Ok(())
}

/// Noise in all sizes, as photographs have it: as a JPEG it is about as long as one of them.
fn picture(key: u64, size: usize) -> Result<bytes::Bytes> {
    let mut pixels = vec![128.0_f32; 3 * size * size];
    for (octave, cell) in [64, 32, 16, 8, 4, 2].into_iter().enumerate() {
        let noise = random::key(&[key, octave as u64]);
        let strength = (cell as f32).sqrt() * 7.0;
        let at =
            |x: usize, y: usize, channel: usize| random::uniform(noise, ((y * 512 + x) * 3 + channel) as u64) - 0.5;
        for (i, value) in pixels.iter_mut().enumerate() {
            let (x, y, channel) = (i / 3 % size, i / 3 / size, i % 3);
            let (fx, fy) = ((x % cell) as f32 / cell as f32, (y % cell) as f32 / cell as f32);
            let (x, y) = (x / cell, y / cell);
            // Colour changes more slowly than light.
            let channel = if cell < 16 { 0 } else { channel };
            let row = |y| at(x, y, channel) * (1.0 - fx) + at(x + 1, y, channel) * fx;
            *value += strength * (row(y) * (1.0 - fy) + row(y + 1) * fy);
        }
    }
    let pixels: Vec<u8> = pixels.into_iter().map(|value| value as u8).collect();
    let format = turbojpeg::PixelFormat::RGB;
    let image = turbojpeg::Image { pixels: &pixels[..], width: size, pitch: 3 * size, height: size, format };
    let jpeg = turbojpeg::compress(image, 90, turbojpeg::Subsamp::Sub2x2)?;
    Ok(bytes::Bytes::copy_from_slice(&jpeg))
}

/// Opens the meeting place of the ranks of [`steps`] on this machine; its port.
pub fn meeting_place() -> Result<(impl Sized, u16)> {
    let store = Store::serve("127.0.0.1")?;
    let port = store.port();
    Ok((store, port))
}

/// Trains `count` steps, after two that are not counted, on one batch in memory, as rank `rank` of `world`.
pub fn steps(spec: &RunSpec, count: u64, rank: u32, world: u32, port: u16) -> Result<Figures> {
    let (kind, device) = (step::kind(spec.ranks.precision), Device::Cpu);
    tch::set_num_threads(spec.ranks.threads.max(1) as i32);
    let member = Member {
        rank: rank as usize,
        world: world as usize,
        address: "127.0.0.1".to_owned(),
        device,
        timeout: Duration::from_secs(300),
    };
    let group = Group::join("127.0.0.1", port, member, || false)?;
    let crop = i64::from(spec.input.crop);
    let model = AlexNet::new(&spec.model, 1000, crop, spec.seed, kind, device);
    let mut sgd = step::optimizer(&model, &spec.train);
    let parameters: Vec<Tensor> = model.parameters().into_iter().map(|(_, parameter)| parameter).collect();
    let compress = step::compression(spec.ranks.compress, world as usize);
    let reducer = Reducer::new(&group, &parameters, 25 << 20, compress)?;
    let normalise = Normalise::new(MEAN, STD, device, kind);
    let lanes = i64::from(spec.ranks.lanes);
    let mine = lanes_of(rank, world, spec.ranks.lanes);
    let batch = i64::from(spec.train.batch);
    let share = |lane: u32| (batch * (i64::from(lane) + 1) / lanes) - (batch * i64::from(lane) / lanes);
    let shares: Vec<i64> = mine.map(share).collect();
    let own: i64 = shares.iter().sum();
    let pixels = Pixels {
        pixels: Tensor::randint(256, [own, crop, crop, 3], (Kind::Uint8, device)),
        jitters: vec![ColorJitter::default(); own as usize],
        labels: Tensor::randint(1000, [own], (Kind::Int64, device)),
        keys: (0..own as u64).collect(),
    };
    let mut batch = Batch { step: 0, samples: batch as u64, shares, pixels };
    let mut clock = Clock::start()?;
    for i in 0..count + 2 {
        if i == 2 {
            clock = Clock::start()?;
        }
        batch.step = i;
        let computed = step::compute(spec, world as usize, &model, &normalise, &reducer, &batch, &|_| {})?;
        group.all_reduce(&computed.measured, Op::Sum)?.wait(group.timeout())?;
        sgd.step(schedule::learning_rate(i, 1000, &spec.train))?;
        let measured = &computed.measured;
        model.update_running(&(measured.narrow(0, 3, measured.size()[0] - 3) / lanes as f64));
    }
    clock.stop("steps", count * own as u64)
}

/// Reads and decodes the epochs of the spec from a folder of [`write_dataset`], up to numbers on the device; figures of each epoch.
pub fn loader(store: &Path, spec: &RunSpec, cache_bytes: u64) -> Result<Vec<Figures>> {
    let manifest = Manifest::from_json(&std::fs::read(store.join("manifest.json"))?)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let folder: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(store)?);
    let blocks = Arc::new(BlockReader::new(folder, &manifest, Split::Train));
    let threads = spec.ranks.threads.max(1);
    tch::set_num_threads(threads as i32);
    let loader = Loader {
        split: Split::Train,
        blocks: blocks.clone(),
        cache: Arc::new(Cache::new(cache_bytes, None)?),
        threads: threads as usize,
        device: Device::Cpu,
        runtime: runtime.handle().clone(),
    };
    let normalise = Normalise::new(manifest.mean, manifest.std, Device::Cpu, step::kind(spec.ranks.precision));
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
        figures.push(clock.stop(&format!("epoch {epoch}"), images)?);
        clock = Clock::start()?;
    }
    Ok(figures)
}

/// Trains the whole run of the spec from a folder of [`write_dataset`], as a rank that is alone: with ledger, checkpoints, export.
pub fn run(store: &Path, spec: &RunSpec, cache_bytes: u64) -> Result<Figures> {
    let runtime = tokio::runtime::Runtime::new()?;
    let folder: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(store)?);
    let manifest = std::fs::read(store.join("manifest.json"))?;
    let manifest_key = keys::manifest(&dataset(), 1);
    runtime.block_on(folder.put(&manifest_key.as_str().into(), manifest.clone().into()))?;
    let setup = Setup {
        device: "cpu".to_owned(),
        advertise_address: "127.0.0.1".to_owned(),
        threads: spec.ranks.threads.max(1),
        cache_bytes,
        cache_dir: None,
        cache_disk_bytes: 0,
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
    let mut images = 0;
    for message in said {
        match message.message {
            Some(Message::Stepped(stepped)) => {
                images += stepped.metrics.iter().filter(|m| m.kind == "train").map(|m| m.samples).sum::<u64>();
            }
            Some(Message::Left(left)) if left.cause() == Cause::Finished => return clock.stop("run", images),
            Some(Message::Left(left)) => bail!("the rank left: {}", left.detail),
            _ => {}
        }
    }
    bail!("the rank is gone")
}
