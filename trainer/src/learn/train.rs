//! One generation of a run on one rank: join the group, agree on a state, and train until all epochs are done, a rank
//! is asked to leave, or a rank is lost.
//!
//! **Parameters are touched only after every collective of the step has completed without error on this rank**, so
//! after a failure the state stands at the last step that was applied, and the next generation does the failed one
//! again with the same samples. The last collective is that of the counts, to which each rank gives its own once its
//! gradients are complete: no rank applies a step whose gradients another one lacks. So the host cannot do without this
//! wait, nor give the counts before it.
//!
//! A rank alone waits for nothing: it gives its device the next step while that is still at this one, and hears the
//! loss a step later. What must not come of a loss that is not finite waits for it ([`Job::settle`]).

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use proto::metric::MetricKind;
use proto::pb::rank_heartbeat::Activity;
use proto::run_ledger::Line;
use proto::{Split, pb};
use tch::Tensor;
use tracing::info;

use super::agree::agree;
use super::alexnet::AlexNet;
use super::averaging::Averaging;
use super::best::best_weights;
use super::control::ControlFlags;
use super::evaluate::evaluate;
use super::export::{Weights, export};
use super::failure::Failure;
use super::history::{Sums, digest};
use super::job::{Job, Untold};
use super::membership::Membership;
use super::records::Records;
use super::reports::Reports;
use super::schedule;
use super::step::Computed;
use super::timing::Timing;
use crate::data::batch::Batch;
use crate::data::plan::lanes_of;
use crate::torch::{Op, device};

/// How a generation ends without a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All ranks left after the same step, because one was asked to.
    Asked,
    /// All epochs are done.
    Finished,
}

/// Takes part in the generation that `join` names.
pub(crate) fn generation(
    job: &mut Job,
    join: &pb::Join,
    flags: &ControlFlags,
    reports: &Reports,
) -> Result<Ending, Failure> {
    let membership = Membership::join(&job.context.setup, &job.spec, job.device, join, flags)?;
    flags.set_activity(Activity::Agreeing);
    job.settle(&membership.group)?;
    let damaged = agree(job, &membership, join)?;
    flags.set_step(job.progress.step);
    info!(generation = join.generation, rank = join.rank, step = job.progress.step, "agreed on a state");
    reports.joined(job.progress.step, job.steps_per_epoch, damaged);

    let own_lanes = lanes_of(join.rank, join.world_size, job.spec.ranks.lanes);
    let mut batches = job.loader(Split::Train).train(&job.spec, own_lanes.clone(), job.progress.step)?;
    let mut averaging = Averaging::new(&job.spec, &membership.group, &job.model)?;
    let mut records = Records::new(job, join, &membership, reports);

    loop {
        let epoch = job.progress.step / job.steps_per_epoch;
        if job.progress.step.is_multiple_of(job.steps_per_epoch) && job.progress.validated < epoch {
            records.epoch(job)?;
            flags.set_activity(Activity::Evaluating);
            let (network, lanes) = ((&job.model, job.progress.step), own_lanes.clone());
            if let Some(sums) = evaluate(job, network, Split::Validation, lanes, &membership, flags)? {
                job.progress.note_validation(epoch, sums.0.mean().top1);
                records.evaluated(job, MetricKind::Validation, &sums);
            }
            job.progress.validated = epoch;
        }
        let over = job.progress.step == job.steps() || is_stale(job);
        // After the validation, because a checkpoint carries its result.
        records.checkpoint_if_due(job, flags, over)?;
        if over {
            break;
        }
        let asked = Instant::now();
        flags.set_activity(Activity::WaitingForData);
        let batch = batches.next(|| flags.aborted()).unwrap_or_else(|| Err(anyhow!("the batches ended early")));
        if flags.aborted() {
            return Err(Failure::Collective("aborted while waiting for data".to_owned()));
        }
        let word = train_step(job, &membership, &mut averaging, &batch?, flags, &mut records, asked)?;
        if word.leave {
            flags.set_activity(Activity::Checkpointing);
            records.settle(job)?;
            if word.checkpoint {
                records.last_checkpoint(job, flags)?;
            }
            records.finish(job);
            return Ok(Ending::Asked);
        }
    }

    finish(job, own_lanes, &membership, flags, records)
}

/// Whether the run ends here although it has epochs left. Every rank knows, since all measure the same.
fn is_stale(job: &Job) -> bool {
    let epoch = job.progress.step / job.steps_per_epoch;
    job.progress.step.is_multiple_of(job.steps_per_epoch) && job.progress.is_stale(epoch, job.spec.train.stop_after)
}

/// After the last step: the test, and the model. Tested and exported are the weights with the best validation; the last
/// ones are exported beside them if they are others.
fn finish(
    job: &Job,
    own_lanes: Range<u32>,
    membership: &Membership,
    flags: &ControlFlags,
    mut records: Records<'_>,
) -> Result<Ending, Failure> {
    flags.set_activity(Activity::Evaluating);
    let best = best_weights(job, membership, &mut records)?;
    let test = |of: (&AlexNet, u64)| evaluate(job, of, Split::Test, own_lanes.clone(), membership, flags);
    let of_last = test((&job.model, job.progress.step))?;
    let of_best = best.as_ref().map(|(network, step)| test((network, *step))).transpose()?;
    if let Some(sums) = of_best.as_ref().unwrap_or(&of_last) {
        records.evaluated(job, MetricKind::Test, sums);
    }
    flags.set_activity(Activity::Exporting);
    records.finish(job);
    if membership.rank == 0 {
        let sums = |test: Option<(Sums, Duration)>| test.map(|(sums, _)| sums);
        let last = Weights { network: &job.model, step: job.progress.step, test: sums(of_last) };
        let best = best.as_ref().zip(of_best);
        let best = best.map(|((network, step), test)| Weights { network, step: *step, test: sums(test) });
        let export = export(job, membership.generation, best.as_ref(), &last);
        let (key, digests) = job.context.runtime.block_on(export)?;
        records.finished(key, digests);
    }
    Ok(Ending::Finished)
}

/// How many counts of a step's small all-reduce are sums over all ranks. Two for each rank follow.
const SHARED: usize = 5;

/// What the ranks agreed on in a step, beside the gradients.
struct ControlWord {
    leave: bool,
    checkpoint: bool,
}

fn train_step(
    job: &mut Job,
    membership: &Membership,
    averaging: &mut Averaging,
    batch: &Batch,
    flags: &ControlFlags,
    records: &mut Records<'_>,
    asked: Instant,
) -> Result<ControlWord, Failure> {
    let waited = asked.elapsed();
    let Batch { step, samples, pixels, .. } = batch;
    if *step != job.progress.step {
        return Err(anyhow!("the batch of step {step} came where that of {} belongs", job.progress.step).into());
    }
    device::begin_step(job.device)?;
    records.clock.begin();
    let at = |activity| flags.set_activity(activity);
    let Computed { measured, statistics, exposed } =
        averaging.compute(&job.spec, &membership.group, &job.model, &job.normalise, batch, &at)?;
    records.clock.end();
    // The device is at this step: the one before is over, or soon.
    records.settle(job)?;
    let busy = asked.elapsed().saturating_sub(exposed);
    let is_told = measured.is_here()?;

    flags.set_activity(Activity::Counting);
    let (leave, checkpoint) = flags.leave_requested();
    let stored = if membership.rank == 0 { records.history.stored } else { 0 };
    let own = pixels.keys.len() as i64;
    let mut counts = vec![i64::from(leave), i64::from(checkpoint), own, digest(&pixels.keys), stored as i64];
    // Each rank writes its times at its own index, and zeros elsewhere.
    counts.resize(SHARED + 2 * membership.world, 0);
    counts[SHARED + 2 * membership.rank] = waited.as_micros() as i64;
    counts[SHARED + 2 * membership.rank + 1] = busy.as_micros() as i64;
    let counts = Tensor::from_slice(&counts);
    membership.group.all_reduce(&counts, Op::Sum)?.wait(membership.group.timeout())?;
    let agreed = asked.elapsed();
    let count = |i| counts.int64_value(&[i]);
    if count(2) as u64 != *samples {
        return Err(anyhow!("step {step} has {} samples on all ranks, its plan has {samples}", count(2)).into());
    }
    // Before the update if it can be.
    let sums = is_told.then(|| measured.sums(*step, *samples)).transpose()?;

    flags.set_activity(Activity::Updating);
    let learning_rate = schedule::learning_rate(*step, job.steps_per_epoch, &job.spec.train);
    records.clock.begin();
    job.sgd.step(learning_rate)?;
    job.model.update_running(&(statistics / f64::from(job.spec.ranks.lanes)));
    records.clock.end();
    let epoch = step / job.steps_per_epoch + 1;
    job.progress.step += 1;
    job.progress.tail.retain(|line| line.step > count(4) as u64);
    job.progress.tail.push(Line { epoch, step: job.progress.step, samples: *samples, digest: count(3) as u64 });
    flags.set_step(job.progress.step);
    let of_ranks: Vec<(i64, i64)> =
        (SHARED..SHARED + 2 * membership.world).step_by(2).map(|i| (count(i as i64), count(i as i64 + 1))).collect();
    let timing = Timing::of(&of_ranks, agreed, asked.elapsed());
    match sums {
        Some(sums) => {
            job.progress.sums.add(&sums);
            records.step(job, &sums, learning_rate, timing);
        }
        None => job.untold = Some(Untold { step: *step, samples: *samples, measured, learning_rate, timing }),
    }
    Ok(ControlWord { leave: count(0) > 0, checkpoint: count(1) > 0 })
}

#[cfg(test)]
mod golden;
