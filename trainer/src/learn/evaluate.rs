//! Loss and accuracy over a whole split: each sample once, whatever the number of ranks.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use proto::Split;
use tch::{Kind, Tensor};

use super::alexnet::AlexNet;
use super::control::ControlFlags;
use super::failure::Failure;
use super::history::Sums;
use super::job::Job;
use super::membership::Membership;
use super::step;
use crate::data::cache::NextUse;
use crate::data::{plan, requests};
use crate::torch::{Op, device};

/// The sums of a network, which is that after `step`, over `split` on all ranks, and how long it took; None if the split
/// has no samples.
///
/// # Errors
/// Also if the loss is not finite, on all ranks alike: such a network is measured by nobody, and must not be the best.
pub(crate) fn evaluate(
    job: &Job,
    (network, step): (&AlexNet, u64),
    split: Split,
    own_lanes: Range<u32>,
    membership: &Membership,
    flags: &ControlFlags,
) -> Result<Option<(Sums, Duration)>, Failure> {
    let began = Instant::now();
    let kept = job.kept(split);
    if kept.iter().all(|&samples| samples == 0) {
        return Ok(None);
    }
    let sample_ids: Vec<_> = plan::evaluation(&kept, job.spec.ranks.lanes, own_lanes).collect();
    let batch = match job.spec.train.micro_batch {
        0 => (job.spec.train.batch as usize / membership.world).max(1),
        // No more at a time than a step has.
        most => most as usize,
    };
    let expected = sample_ids.len().div_ceil(batch);
    let epoch = job.progress.step / job.steps_per_epoch;
    let next_use = match split == Split::Validation && epoch < u64::from(job.spec.train.epochs) {
        true => NextUse::at_the_end_of(epoch as u32),
        false => NextUse::Never,
    };
    let mut batches =
        job.loader(split).batches(requests::evaluation(sample_ids, batch, job.spec.input.crop, next_use))?;
    let sums = Tensor::zeros([3], (Kind::Double, job.device));
    let mut own = 0;
    for _ in 0..expected {
        let batch = batches.next(|| flags.aborted()).unwrap_or_else(|| Err(anyhow!("the batches ended early")));
        if flags.aborted() {
            return Err(Failure::Collective("aborted during an evaluation".to_owned()));
        }
        let batch = batch?;
        device::begin_step(job.device)?;
        let (images, labels) = job.normalise.apply(&batch.pixels)?;
        let logits = network.evaluate(&images);
        let loss = step::loss(&logits, &labels, 0.0).to_kind(Kind::Double).reshape([1]);
        let _ = sums.shallow_clone().f_add_(&Tensor::cat(&[loss, step::correct(&logits, &labels)], 0))?;
        own += batch.samples;
    }
    let sums = Tensor::cat(&[sums.to_device(tch::Device::Cpu), Tensor::from_slice(&[own as f64])], 0);
    membership.group.all_reduce(&sums, Op::Sum)?.wait(membership.group.timeout())?;
    let sum = |i| sums.double_value(&[i]);
    let sums = Sums { loss: sum(0), top1: sum(1), top5: sum(2), samples: sum(3) };
    let samples: u64 = kept.iter().map(|&samples| u64::from(samples)).sum();
    if sums.samples as u64 != samples {
        return Err(anyhow!("all ranks evaluated {} samples of {split:?}, which has {samples}", sums.samples).into());
    }
    if !sums.loss.is_finite() {
        return Err(Failure::Diverged(format!(
            "the {split} loss after step {step} is {}: choose a lower train.learning_rate",
            sums.mean().loss
        )));
    }
    Ok(Some((sums, began.elapsed())))
}
