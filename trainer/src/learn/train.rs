//! One generation of a run, on one rank: meet the others, agree on a state, train, until all epochs are done, somebody asks to leave,
//! or a rank is gone.
//!
//! **Parameters are touched only after every collective of the step has completed without error on this rank**, so after a failure the
//! state stands at the last step that was applied, and the next generation does the failed one again with the same samples.

use std::time::Instant;

use anyhow::{Result, anyhow};
use proto::metric::MetricKind;
use proto::pb::rank_heartbeat::Activity;
use proto::run_ledger::Line;
use proto::{Split, pb};
use tch::Tensor;
use tracing::info;

use super::agree::agree;
use super::control::Wishes;
use super::evaluate::evaluate;
use super::export::export;
use super::failure::Failure;
use super::history::{Sums, digest};
use super::job::Job;
use super::membership::Seat;
use super::records::Records;
use super::reports::Reports;
use super::timing::Timing;
use super::{schedule, step};
use crate::data::batch::Batch;
use crate::data::plan::lanes_of;
use crate::torch::{Op, Reducer};

/// Gradients that travel together (PyTorch's default).
const BUCKET_BYTES: usize = 25 << 20;

/// How a generation ends without a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All left after the same step, because one was asked to.
    Asked,
    /// Nothing is left to do.
    Finished,
}

/// Takes part in the generation that `join` names.
pub(crate) fn generation(
    job: &mut Job,
    join: &pb::Join,
    wishes: &Wishes,
    reports: &Reports,
) -> Result<Ending, Failure> {
    let seat = Seat::take(&job.home.setup, &job.spec, job.device, join, wishes)?;
    wishes.at(Activity::Agreeing);
    let damaged = agree(job, &seat, join)?;
    wishes.applied(job.progress.step);
    info!(generation = join.generation, rank = join.rank, step = job.progress.step, "agreed on a state");
    reports.joined(job.progress.step, job.steps_per_epoch, damaged);

    let mine = lanes_of(join.rank, join.world_size, job.spec.ranks.lanes);
    let mut batches = job.loader(Split::Train).train(&job.spec, mine.clone(), job.progress.step)?;
    let parameters: Vec<Tensor> = job.model.parameters().into_iter().map(|(_, parameter)| parameter).collect();
    let compress = step::compression(job.spec.ranks.compress, seat.world);
    let reducer = Reducer::new(&seat.group, &parameters, BUCKET_BYTES, compress)?;
    let mut records = Records::new(job, join, &seat, reports);

    loop {
        let epoch = job.progress.step / job.steps_per_epoch;
        if job.progress.step.is_multiple_of(job.steps_per_epoch) && job.progress.validated < epoch {
            records.epoch(job);
            wishes.at(Activity::Evaluating);
            if let Some(sums) = evaluate(job, Split::Validation, mine.clone(), &seat, wishes)? {
                records.evaluated(job, MetricKind::Validation, &sums);
            }
            job.progress.validated = epoch;
        }
        let over = job.progress.step == job.steps();
        // After the validation, whose result it carries.
        records.checkpoint_if_due(job, wishes, over)?;
        if over {
            break;
        }
        let asked = Instant::now();
        wishes.at(Activity::WaitingForData);
        let batch = batches.next(|| wishes.aborted()).unwrap_or_else(|| Err(anyhow!("the batches ended early")));
        if wishes.aborted() {
            return Err(Failure::Collective("aborted while waiting for data".to_owned()));
        }
        let word = train_step(job, &seat, &reducer, &batch?, wishes, &mut records, asked)?;
        if word.leave {
            wishes.at(Activity::Checkpointing);
            if word.checkpoint {
                records.last_checkpoint(job, wishes)?;
            }
            records.finish(job);
            return Ok(Ending::Asked);
        }
    }

    wishes.at(Activity::Evaluating);
    let test = evaluate(job, Split::Test, mine, &seat, wishes)?;
    if let Some(sums) = &test {
        records.evaluated(job, MetricKind::Test, sums);
    }
    wishes.at(Activity::Exporting);
    records.finish(job);
    if seat.rank == 0 {
        let test = test.map(|(sums, _)| sums);
        let (run, model) = ((job.run.as_str(), seat.generation), &job.model);
        let export = export(&job.home.store, run, &job.spec, &job.manifest, model, test);
        let (key, digests) = job.home.runtime.block_on(export)?;
        reports.finished(key, digests);
    }
    Ok(Ending::Finished)
}

/// Words of a step's small all-reduce that are of all ranks together; those of each rank follow.
const WORDS: usize = 5;

/// What the ranks agreed on in a step, beside the gradients.
struct Word {
    leave: bool,
    checkpoint: bool,
}

fn train_step(
    job: &mut Job,
    seat: &Seat,
    reducer: &Reducer,
    batch: &Batch,
    wishes: &Wishes,
    records: &mut Records<'_>,
    asked: Instant,
) -> Result<Word, Failure> {
    let waited = asked.elapsed();
    let Batch { step, samples, pixels, .. } = batch;
    if *step != job.progress.step {
        return Err(anyhow!("the batch of step {step} came where that of {} belongs", job.progress.step).into());
    }
    let at = |activity| wishes.at(activity);
    let computed = step::compute(&job.spec, seat.world, &job.model, &job.normalise, reducer, batch, &at)?;
    let busy = asked.elapsed().saturating_sub(computed.exposed);

    wishes.at(Activity::Counting);
    let (leave, checkpoint) = wishes.leave();
    let stored = if seat.rank == 0 { records.history.stored } else { 0 };
    let own = pixels.keys.len() as i64;
    let mut counts = vec![i64::from(leave), i64::from(checkpoint), own, digest(&pixels.keys), stored as i64];
    // Each rank's time has a place of its own.
    counts.resize(WORDS + 2 * seat.world, 0);
    counts[WORDS + 2 * seat.rank] = waited.as_micros() as i64;
    counts[WORDS + 2 * seat.rank + 1] = busy.as_micros() as i64;
    let counts = Tensor::from_slice(&counts);
    let measured = computed.measured;
    let (first, second) = (seat.group.all_reduce(&counts, Op::Sum)?, seat.group.all_reduce(&measured, Op::Sum)?);
    first.wait(seat.group.timeout())?;
    second.wait(seat.group.timeout())?;
    let agreed = asked.elapsed();
    let count = |i| counts.int64_value(&[i]);
    let sums = Sums {
        loss: measured.double_value(&[0]),
        top1: measured.double_value(&[1]),
        top5: measured.double_value(&[2]),
        samples: count(2) as f64,
    };
    if count(2) as u64 != *samples {
        return Err(anyhow!("step {step} has {} samples on all ranks, its plan has {samples}", count(2)).into());
    }
    if !sums.loss.is_finite() {
        let loss = format!("the loss of step {step} is {}: choose a lower train.learning_rate", sums.loss);
        return Err(Failure::Diverged(loss));
    }

    wishes.at(Activity::Updating);
    let learning_rate = schedule::learning_rate(*step, job.steps_per_epoch, &job.spec.train);
    job.sgd.step(learning_rate)?;
    let statistics = measured.narrow(0, 3, measured.size()[0] - 3) / f64::from(job.spec.ranks.lanes);
    job.model.update_running(&statistics);
    let epoch = step / job.steps_per_epoch + 1;
    job.progress.step += 1;
    job.progress.sums.add(&sums);
    job.progress.tail.retain(|line| line.step > count(4) as u64);
    job.progress.tail.push(Line { epoch, step: job.progress.step, samples: *samples, digest: count(3) as u64 });
    wishes.applied(job.progress.step);
    let of_ranks: Vec<(i64, i64)> =
        (WORDS..WORDS + 2 * seat.world).step_by(2).map(|i| (count(i as i64), count(i as i64 + 1))).collect();
    records.step(job, &sums, learning_rate, &Timing::of(&of_ranks, agreed, asked.elapsed()));
    Ok(Word { leave: count(0) > 0, checkpoint: count(1) > 0 })
}
