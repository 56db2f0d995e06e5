//! Steps on one batch of random pixels that stays in memory: what a step takes without data to wait for.

use anyhow::Context;
use input::color::ColorJitter;
use proto::RunSpec;
use tch::{Device, Kind, Tensor};

use super::alexnet::AlexNet;
use super::averaging::Averaging;
use super::failure::Failure;
use super::step::Measured;
use super::{schedule, step};
use crate::data::batch::{Batch, Pixels};
use crate::data::normalise::Normalise;
use crate::data::plan::lanes_of;
use crate::data::random;
use crate::torch::tensor::{Chunk, Slab};
use crate::torch::{Copies, Group, Op, Sgd};

const CLASSES: i64 = 1000;
/// Steps of an epoch of ImageNet at a batch of 1,280.
const STEPS_PER_EPOCH: u64 = 1000;
/// Mean and standard deviation of pictures' pixels.
const MOMENTS: ([f64; 3], [f64; 3]) = ([0.48, 0.46, 0.41], [0.23, 0.22, 0.23]);

/// A rank that takes such steps, as one of a run would.
pub(crate) struct Synthetic<'a> {
    spec: &'a RunSpec,
    group: &'a Group,
    model: AlexNet,
    sgd: Sgd,
    averaging: Averaging,
    normalise: Normalise,
    copies: Copies,
    /// The samples of each step, in the host's memory.
    pixels: Pixels,
    /// The next step's.
    batch: Batch,
    /// Of the step before.
    measured: Option<Measured>,
}

impl<'a> Synthetic<'a> {
    /// A rank of so many on the group's device.
    pub(crate) fn new(spec: &'a RunSpec, group: &'a Group, (rank, world): (u32, u32)) -> Result<Self, Failure> {
        let (kind, device) = (step::kind(spec.ranks.precision), group.device());
        step::prepare(device, spec.ranks.precision)?;
        let crop = i64::from(spec.input.crop);
        let model = step::network(spec, CLASSES, device);
        let sgd = step::optimizer(&model, &spec.train);
        let averaging = Averaging::new(spec, group, &model)?;
        let normalise = Normalise::new(MOMENTS.0, MOMENTS.1, device, kind)?.in_nhwc(step::is_nhwc(&spec.ranks, device));
        let (lanes, batch) = (i64::from(spec.ranks.lanes), i64::from(spec.train.batch));
        let share = |lane: u32| (batch * (i64::from(lane) + 1) / lanes) - (batch * i64::from(lane) / lanes);
        let shares: Vec<i64> = lanes_of(rank, world, spec.ranks.lanes).map(share).collect();
        let own: i64 = shares.iter().sum();
        let pixels = Pixels {
            on_device: None,
            pixels: random_bytes(&[own, crop, crop, 3], device)?,
            jitters: vec![ColorJitter::default(); own as usize],
            labels: Tensor::randint(CLASSES, [own], (Kind::Int64, Device::Cpu)),
            keys: (0..own as u64).collect(),
            ahead: None,
        };
        let copies = Copies::new(device)?;
        let batch = Batch { step: 0, samples: batch as u64, shares, pixels: sent_ahead(&pixels, &copies)? };
        Ok(Self { spec, group, model, sgd, averaging, normalise, copies, pixels, batch, measured: None })
    }

    /// Samples of this rank in a step.
    pub(crate) fn samples(&self) -> u64 {
        self.batch.pixels.keys.len() as u64
    }

    /// Takes the next step.
    pub(crate) fn step(&mut self) -> Result<(), Failure> {
        let Self { spec, group, model, sgd, averaging, normalise, copies, pixels, batch, measured } = self;
        let next = sent_ahead(pixels, copies)?;
        let computed = averaging.compute(spec, group, model, normalise, batch, &|_| {})?;
        if let Some(before) = measured.replace(computed.measured) {
            before.wait(group)?;
        }
        // As the ranks of a run count, which takes the same time for any few numbers.
        let counts = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
        group.all_reduce(&counts, Op::Sum)?.wait(group.timeout())?;
        sgd.step(schedule::learning_rate(batch.step, STEPS_PER_EPOCH, &spec.train))?;
        model.update_running(&(computed.statistics / f64::from(spec.ranks.lanes)));
        batch.step += 1;
        batch.pixels = next;
        Ok(())
    }

    /// Waits until the device has done all of it.
    pub(crate) fn settle(&self) -> Result<(), Failure> {
        Ok(self.group.settle()?)
    }
}

/// The same samples as a loader hands them on.
fn sent_ahead(pixels: &Pixels, copies: &Copies) -> Result<Pixels, Failure> {
    let mut pixels = pixels.part(0, pixels.keys.len());
    pixels.send_ahead(copies)?;
    Ok(pixels)
}

/// In the memory that a loader has for the device.
fn random_bytes(shape: &[i64], device: Device) -> Result<Tensor, Failure> {
    let mut chunk = Slab::new(shape, device)?.chunk(shape.iter().product::<i64>() as usize);
    for (eight, i) in chunk.chunks_mut(8).zip(0..) {
        eight.copy_from_slice(&random::bits(0, i).to_le_bytes()[..eight.len()]);
    }
    Ok(Chunk::join(vec![chunk]).context("one chunk is the whole slab")?)
}
