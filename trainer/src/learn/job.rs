//! What a rank process holds of its run: opened at the first generation, kept through all that follow.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use object_store::ObjectStore;
use proto::run_ledger::Line;
use proto::run_spec::Compress;
use proto::{Manifest, RunSpec, Split, Stored, pb};
use tch::{Device, Kind, Tensor};
use tracing::{info, warn};

use crate::data::blocks::Blocks;
use crate::data::cache::Cache;
use crate::data::loader::Loader;
use crate::data::normalise::Normalise;
use crate::data::plan::{EpochPlan, steps_per_epoch};
use crate::data::store::{get_checked, is_damage};
use crate::learn::alexnet::{AlexNet, Named};
use crate::learn::checkpoint::{self, Progress};
use crate::learn::history::Sums;
use crate::learn::step::{self, Sgd};
use crate::learn::train::{Failure, Seat};
use crate::rank::ipc::Setup;
use crate::torch::device;
use crate::torch::{Group, Op};

/// Where all of a process' work runs.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    pub store: Arc<dyn ObjectStore>,
    pub runtime: tokio::runtime::Handle,
    pub setup: Setup,
}

/// One run on one rank: its data, its network, and how far it has come.
pub(crate) struct Job {
    pub home: Home,
    pub run: String,
    pub spec: RunSpec,
    pub manifest: Manifest,
    pub device: Device,
    pub normalise: Normalise,
    pub steps_per_epoch: u64,
    pub model: AlexNet,
    pub sgd: Sgd,
    pub progress: Progress,
    /// Whether model, momenta and progress are a state of the run: not before a state was agreed, nor after a half one came.
    pub held: bool,
    /// The generation in which the state was agreed. Ranks of the same one that have come as far hold the same state, bit by bit.
    agreed: u64,
    cache: Arc<Cache>,
    blocks: [Arc<Blocks>; 3],
}

impl Job {
    /// Reads the manifest and makes a fresh network.
    ///
    /// # Errors
    /// If spec and dataset do not go together.
    pub(crate) fn open(home: &Home, join: &pb::Join) -> Result<Self> {
        let spec = RunSpec::from_json(&join.spec_json)?;
        let manifest = home.runtime.block_on(get_checked(&home.store, &join.manifest_key, &join.manifest_sha256))?;
        let manifest = Manifest::from_json(&manifest).with_context(|| join.manifest_key.clone())?;
        let (crop, side) = (spec.input.crop, manifest.smallest_side);
        ensure!(
            crop <= side,
            "input.crop = {crop}: must be at most {side}, which the dataset's images are sure to have"
        );
        let blocks = Split::ALL.map(|split| Arc::new(Blocks::new(home.store.clone(), &manifest, split)));
        // Whether an epoch can be planned is the same for all epochs.
        EpochPlan::new(&blocks[0].kept(), spec.ranks.lanes, spec.train.batch, spec.seed, 0)?;
        let device = device::parse(&home.setup.device)?;
        let threads = if spec.ranks.threads > 0 { spec.ranks.threads } else { home.setup.threads };
        tch::set_num_threads(threads as i32);
        let kind = step::kind(spec.ranks.precision);
        let (model, sgd) = fresh(&spec, &manifest, kind, device);
        Ok(Self {
            home: home.clone(),
            run: join.run.clone(),
            normalise: Normalise::new(manifest.mean, manifest.std, device, kind),
            steps_per_epoch: steps_per_epoch(blocks[0].samples(), spec.train.batch),
            progress: Progress::default(),
            held: false,
            agreed: 0,
            cache: Arc::new(cache(&home.setup)?),
            spec,
            manifest,
            device,
            model,
            sgd,
            blocks,
        })
    }

    /// Steps of the whole run.
    pub(crate) fn steps(&self) -> u64 {
        self.steps_per_epoch * u64::from(self.spec.train.epochs)
    }

    /// How many samples of each block of a split count.
    pub(crate) fn kept(&self, split: Split) -> Vec<u32> {
        self.blocks[split as usize].kept()
    }

    /// Where batches of a split come from.
    pub(crate) fn loader(&self, split: Split) -> Loader {
        Loader {
            split,
            blocks: self.blocks[split as usize].clone(),
            cache: self.cache.clone(),
            threads: self.home.setup.threads.max(1) as usize,
            device: self.device,
            runtime: self.home.runtime.clone(),
        }
    }

    /// Bytes of all gradients together, as they travel.
    pub(crate) fn gradient_bytes(&self) -> u64 {
        let sizes = self
            .model
            .parameters()
            .into_iter()
            .map(|(_, parameter)| parameter.numel() * parameter.kind().elt_size_in_bytes());
        let halves = if self.spec.ranks.compress == Compress::None { 1 } else { 2 };
        sizes.sum::<usize>() as u64 / halves
    }

    /// All tensors of the state by name: parameters, running statistics, momenta.
    pub(crate) fn tensors(&self) -> Named {
        let momenta = self.sgd.momenta().into_iter().map(|(name, momentum)| (format!("momentum.{name}"), momentum));
        self.weights().into_iter().chain(momenta).collect()
    }

    /// Parameters and running statistics by name.
    pub(crate) fn weights(&self) -> Named {
        let parameters = self.model.parameters().into_iter().map(|(name, parameter)| (name, parameter.detach()));
        parameters.chain(self.model.buffers()).collect()
    }

    /// Makes sure that all ranks hold the same state: that of the lowest rank among those that have come furthest; if none holds any, what
    /// rank 0 finds in the newest whole checkpoint, or the weights that the run starts from. Returns the checkpoints that rank 0 found damaged.
    pub(crate) fn agree(&mut self, seat: &Seat, join: &pb::Join) -> Result<Vec<pb::Damaged>, Failure> {
        let Seat { group, rank, world, .. } = seat;
        let mine = if self.held { self.progress.step as i64 + 1 } else { 0 };
        let agreed = if self.held { self.agreed as i64 } else { 0 };
        let [furthest, nearest, newest, oldest] = largest(group, [mine, -mine, agreed, -agreed])?;
        let same = furthest > 0 && (furthest, newest) == (-nearest, -oldest);
        let mut damaged = Vec::new();
        let root = if furthest == 0 {
            if *rank == 0 {
                damaged = self.load(join)?;
            }
            0
        } else {
            let vote = if mine == furthest { world - rank } else { 0 };
            world - largest(group, [vote as i64])?[0] as usize
        };
        if !same {
            // What is overwritten half way is no state any more, unless by the same values.
            self.held &= mine == furthest;
            let tensors: Vec<Tensor> = self.tensors().into_iter().map(|(_, tensor)| tensor).collect();
            group.broadcast(&tensors, root)?;
        }
        self.progress = broadcast_progress(group, &self.progress, root)?;
        (self.held, self.agreed) = (true, join.generation);
        Ok(damaged)
    }

    fn load(&mut self, join: &pb::Join) -> Result<Vec<pb::Damaged>> {
        (self.model, self.sgd) = fresh(&self.spec, &self.manifest, step::kind(self.spec.ranks.precision), self.device);
        self.progress = Progress::default();
        let mut damaged = Vec::new();
        for pb::Checkpointed { key, digests, .. } in &join.checkpoints {
            match self.home.runtime.block_on(checkpoint::read(&self.home.store, key, digests)) {
                Ok((position, tensors)) => {
                    self.progress = position.progress(key, self.steps_per_epoch)?;
                    step::load(&self.tensors(), &tensors).with_context(|| key.clone())?;
                    return Ok(damaged);
                }
                Err(error) if is_damage(&error) => {
                    let reason = format!("{error:#}");
                    warn!(key, reason, "a checkpoint is damaged; the one before is taken");
                    damaged.push(pb::Damaged { key: key.clone(), reason });
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(pb::Checkpointed { key, digests, .. }) = &join.start {
            let (_, tensors) = self.home.runtime.block_on(checkpoint::read(&self.home.store, key, digests))?;
            let new = checkpoint::take_weights(&self.weights(), &tensors, self.manifest.classes.len() as i64);
            let new = new.with_context(|| key.clone())?;
            info!(key, new_layers = new.join(", "), "begins with the weights of another run");
        }
        Ok(damaged)
    }
}

fn cache(setup: &Setup) -> Result<Cache> {
    let disk = setup.cache_dir.as_deref().map(|folder| (folder, setup.cache_disk_bytes));
    Cache::new(setup.cache_bytes, disk).with_context(|| {
        format!(
            "--cache-dir {}: cannot make a file there",
            disk.map_or("-".into(), |(folder, _)| folder.to_string_lossy())
        )
    })
}

fn fresh(spec: &RunSpec, manifest: &Manifest, kind: Kind, device: Device) -> (AlexNet, Sgd) {
    let (classes, crop) = (manifest.classes.len() as i64, i64::from(spec.input.crop));
    let model = AlexNet::new(&spec.model, classes, crop, spec.seed, kind, device);
    let sgd = Sgd::new(&model, &spec.train);
    (model, sgd)
}

/// The largest over all ranks of each of these.
fn largest<const N: usize>(group: &Group, mine: [i64; N]) -> Result<[i64; N], Failure> {
    let values = Tensor::from_slice(&mine);
    group.all_reduce(&values, Op::Max)?.wait(group.timeout())?;
    Ok(std::array::from_fn(|i| values.int64_value(&[i as i64])))
}

fn broadcast_progress(group: &Group, mine: &Progress, root: usize) -> Result<Progress, Failure> {
    let Progress { step, validated, sums, tail } = mine;
    let head = Tensor::from_slice(&[*step as i64, *validated as i64, tail.len() as i64]);
    let totals = Tensor::from_slice(&[sums.loss, sums.top1, sums.top5, sums.samples]);
    group.broadcast(&[head.shallow_clone()], root)?;
    group.broadcast(&[totals.shallow_clone()], root)?;
    let head = |i| head.int64_value(&[i]);
    let of = |line: &Line| [line.epoch as i64, line.step as i64, line.samples as i64, line.digest as i64];
    let mut lines: Vec<i64> = tail.iter().flat_map(of).collect();
    lines.resize(4 * head(2) as usize, 0);
    let lines = Tensor::from_slice(&lines);
    if head(2) > 0 {
        group.broadcast(&[lines.shallow_clone()], root)?;
    }
    let line = |i: i64| {
        let at = |column| lines.int64_value(&[4 * i + column]) as u64;
        Line { epoch: at(0), step: at(1), samples: at(2), digest: at(3) }
    };
    let total = |i| totals.double_value(&[i]);
    Ok(Progress {
        step: head(0) as u64,
        validated: head(1) as u64,
        sums: Sums { loss: total(0), top1: total(1), top5: total(2), samples: total(3) },
        tail: (0..head(2)).map(line).collect(),
    })
}
