//! What a rank process holds of its run: opened at the first generation, kept through all that follow.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use proto::run_spec::Compress;
use proto::{Manifest, RunSpec, Split, Stored, pb};
use tch::Device;

use super::alexnet::AlexNet;
use super::checkpoint::Progress;
use super::context::{Home, Setup};
use super::step;
use crate::data::blocks::Blocks;
use crate::data::cache::Cache;
use crate::data::loader::Loader;
use crate::data::normalise::Normalise;
use crate::data::plan::{EpochPlan, steps_per_epoch};
use crate::data::store::get_checked;
use crate::torch::Sgd;
use crate::torch::device;
use crate::torch::tensor::Named;

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
    pub(super) agreed: u64,
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
        let (model, sgd) = fresh(&spec, &manifest, device);
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

/// The network of a run with the weights of its seed, and its optimizer.
pub(super) fn fresh(spec: &RunSpec, manifest: &Manifest, device: Device) -> (AlexNet, Sgd) {
    let (classes, crop) = (manifest.classes.len() as i64, i64::from(spec.input.crop));
    let model = AlexNet::new(&spec.model, classes, crop, spec.seed, step::kind(spec.ranks.precision), device);
    let sgd = step::optimizer(&model, &spec.train);
    (model, sgd)
}
