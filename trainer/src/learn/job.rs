//! A run on one rank. It is opened in the rank's first generation and kept through all later ones.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use proto::run_spec::Compress;
use proto::{Manifest, RunSpec, Split, Stored, pb};
use tch::Device;

use super::alexnet::AlexNet;
use super::checkpoint::Progress;
use super::context::{RankContext, Setup};
use super::failure::Failure;
use super::history::Sums;
use super::step::{self, Measured};
use super::timing::Timing;
use crate::data::blocks::BlockReader;
use crate::data::cache::Cache;
use crate::data::device_pixels::DevicePixels;
use crate::data::loader::Loader;
use crate::data::normalise::Normalise;
use crate::data::plan::{EpochPlan, steps_per_epoch};
use crate::data::store::get_checked;
use crate::torch::tensor::Named;
use crate::torch::{Copies, Group, Sgd, device};

/// One run on one rank: its data, its network, and how far it has come.
pub(crate) struct Job {
    pub context: RankContext,
    pub run: String,
    pub spec: RunSpec,
    pub manifest: Manifest,
    pub device: Device,
    pub normalise: Normalise,
    pub steps_per_epoch: u64,
    pub model: AlexNet,
    pub sgd: Sgd,
    pub progress: Progress,
    /// The newest applied step, as long as its loss is not known.
    pub(super) untold: Option<Untold>,
    /// Whether model, momenta and progress are a state of the run. They are not before the first agreement on a state,
    /// nor after the receipt of another rank's state was interrupted.
    pub has_state: bool,
    /// The generation in which the ranks agreed on the state. Ranks with the same one and the same step hold the same
    /// state, bit by bit.
    pub(super) agreed_generation: u64,
    cache: Arc<Cache>,
    device_pixels: Option<Arc<DevicePixels>>,
    copies: Copies,
    blocks: [Arc<BlockReader>; 3],
    /// The share of the machine's cores that this rank has in its generation.
    cores: u32,
}

/// A step that was applied before the device had told its loss.
pub(super) struct Untold {
    pub step: u64,
    pub samples: u64,
    pub measured: Measured,
    pub learning_rate: f64,
    pub timing: Timing,
}

impl Job {
    /// Reads the manifest and makes a fresh network.
    ///
    /// # Errors
    /// If spec and dataset do not fit.
    pub(crate) fn open(context: &RankContext, join: &pb::Join) -> Result<Self> {
        let spec = RunSpec::from_json(&join.spec_json)?;
        let manifest =
            context.runtime.block_on(get_checked(&context.store, &join.manifest_key, &join.manifest_sha256))?;
        let manifest = Manifest::from_json(&manifest).with_context(|| join.manifest_key.clone())?;
        let (crop, side) = (spec.input.crop, manifest.smallest_side);
        ensure!(
            crop <= side,
            "input.crop = {crop}: must be at most {side}, which the dataset's images are sure to have"
        );
        let blocks = Split::ALL.map(|split| Arc::new(BlockReader::new(context.store.clone(), &manifest, split)));
        // Fails here if no epoch can be planned: that is the same for all epochs.
        EpochPlan::new(&blocks[0].kept(), spec.plan(), spec.ranks.lanes, spec.train.batch, spec.seed, 0)?;
        let device = device::parse(&context.setup.device)?;
        let kind = step::kind(spec.ranks.precision);
        step::prepare(device, spec.ranks.precision)?;
        let (model, sgd) = fresh(&spec, &manifest, device);
        let on_device = context.setup.device_cache_bytes;
        let mut job = Self {
            context: context.clone(),
            run: join.run.clone(),
            normalise: Normalise::new(manifest.mean, manifest.std, device, kind)?
                .in_nhwc(step::is_nhwc(&spec.ranks, device)),
            steps_per_epoch: steps_per_epoch(blocks[0].samples(), spec.train.batch),
            progress: Progress::default(),
            untold: None,
            has_state: false,
            agreed_generation: 0,
            cache: Arc::new(cache(&context.setup)?),
            device_pixels: (on_device > 0).then(|| Arc::new(DevicePixels::new(device, on_device))),
            copies: Copies::new(device)?,
            spec,
            manifest,
            device,
            model,
            sgd,
            blocks,
            cores: 1,
        };
        job.use_cores(join.cores);
        Ok(job)
    }

    /// From now on so many of the machine's cores are this rank's.
    pub(crate) fn use_cores(&mut self, cores: u32) {
        self.cores = cores.max(1);
        let threads = if self.spec.ranks.threads > 0 { self.spec.ranks.threads } else { self.cores };
        tch::set_num_threads(threads as i32);
    }

    /// Waits for the loss of the step that was applied last, and counts it, if it is not known yet. **What is kept,
    /// measured or handed on of a state comes after this**: a loss that is not finite is a failure, and the state is
    /// none any more.
    pub(super) fn settle(&mut self, group: &Group) -> Result<Option<(Sums, Untold)>, Failure> {
        if let Some(untold) = &self.untold {
            // If this fails, the next generation waits for it.
            untold.measured.wait(group)?;
        }
        let Some(untold) = self.untold.take() else { return Ok(None) };
        let sums = untold.measured.sums(untold.step, untold.samples);
        self.has_state &= sums.is_ok();
        let sums = sums?;
        self.progress.sums.add(&sums);
        Ok(Some((sums, untold)))
    }

    /// Steps of the whole run.
    pub(crate) fn steps(&self) -> u64 {
        self.steps_per_epoch * u64::from(self.spec.train.epochs)
    }

    /// How many samples of each block of a split are not skipped.
    pub(crate) fn kept(&self, split: Split) -> Vec<u32> {
        self.blocks[split as usize].kept()
    }

    /// The loader of a split.
    pub(crate) fn loader(&self, split: Split) -> Loader {
        Loader {
            split,
            blocks: self.blocks[split as usize].clone(),
            cache: self.cache.clone(),
            device_pixels: self.device_pixels.clone(),
            threads: decoders(self.cores, self.device),
            copies: self.copies.clone(),
            runtime: self.context.runtime.clone(),
        }
    }

    /// Bytes of all gradients together, as they are sent.
    pub(crate) fn gradient_bytes(&self) -> u64 {
        let sizes = self
            .model
            .trained()
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
        self.model.weights()
    }
}

/// How many threads decode images on so many cores. On a GPU one core is left to the thread that gives it its work: what
/// that is late with, the GPU waits for.
fn decoders(cores: u32, device: Device) -> usize {
    let left = u32::from(device.is_cuda());
    cores.saturating_sub(left).max(1) as usize
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
    let model = step::network(spec, manifest.classes.len() as i64, device);
    model.freeze(|name| spec.train.is_frozen(name));
    let sgd = step::optimizer(&model, &spec.train);
    (model, sgd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_a_gpu_one_core_is_left_to_the_thread_that_gives_it_its_work() {
        assert_eq!([1, 2, 8].map(|cores| decoders(cores, Device::Cpu)), [1, 2, 8]);
        assert_eq!([1, 2, 8].map(|cores| decoders(cores, Device::Cuda(0))), [1, 1, 7]);
    }
}
