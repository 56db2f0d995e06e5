//! One generation of a run, on one rank: meet the others, agree on a state, train, until all epochs are done, somebody asks to leave,
//! or a rank is gone.
//!
//! **Parameters are touched only after every collective of the step has completed without error on this rank**, so after a failure the
//! state stands at the last step that was applied, and the next generation does the failed one again with the same samples.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use proto::metric::{MetricKind, MetricPoint};
use proto::pb::rank_heartbeat::Activity;
use proto::run_ledger::Line;
use proto::{Split, pb};
use tch::Tensor;
use tracing::info;

use crate::data::batch::Batch;
use crate::data::plan::lanes_of;
use crate::learn::checkpoint::{self, Snapshot};
use crate::learn::evaluate::evaluate;
use crate::learn::history::{History, Sums, digest};
use crate::learn::job::Job;
use crate::learn::step;
use crate::learn::timing::{self, Timing};
use crate::rank::{Reports, Wishes};
use crate::torch::{self, Group, Member, Op, Reducer};

/// Gradients that travel together (PyTorch's default).
const BUCKET_BYTES: usize = 25 << 20;
/// So many times `failure_detection` a collective may last. This is the last resort only: that a peer is lost is found out by its connection
/// or its heartbeat, and waiting for one that reads or validates is no failure.
const PATIENCE: u32 = 30;
/// Steps are reported to the coordinator no more often than this ...
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// ... and are points of the stored curve no more often than this.
const POINT_EVERY: Duration = Duration::from_secs(1);

/// How a generation ends without a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All left after the same step, because one was asked to.
    Asked,
    /// Nothing is left to do.
    Finished,
}

/// Why a rank left its generation.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Another rank is gone.
    #[error("{0}")]
    Collective(String),
    /// This one cannot go on.
    #[error("{0:#}")]
    Here(anyhow::Error),
}

impl From<torch::Error> for Failure {
    fn from(error: torch::Error) -> Self {
        match error {
            torch::Error::Timeout(_) | torch::Error::Collective(_) => Self::Collective(error.to_string()),
            torch::Error::Other(_) => Self::Here(error.into()),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Here(error)
    }
}

impl From<tch::TchError> for Failure {
    fn from(error: tch::TchError) -> Self {
        Self::Here(error.into())
    }
}

/// A rank's place in its generation.
pub(crate) struct Seat {
    pub generation: u64,
    pub rank: usize,
    pub world: usize,
    pub group: Group,
    /// Bytes a second that the link to the other ranks carries each way; 0 for one rank.
    pub link: f64,
    /// The run's time when the generation was joined, in seconds, and that moment.
    pub began: (f64, Instant),
}

impl Seat {
    fn take(job: &Job, join: &pb::Join, wishes: &Wishes) -> Result<Self, Failure> {
        let (rank, world) = (join.rank as usize, join.world_size as usize);
        let lanes = job.spec.ranks.lanes;
        if world > lanes as usize {
            return Err(
                anyhow!("{world} ranks cannot share {lanes} lanes: ranks.max must be at most ranks.lanes").into()
            );
        }
        let (host, port) = host_and_port(&join.store)?;
        let timeout = job.spec.failure_detection() * PATIENCE;
        let address = job.home.setup.advertise_address.clone();
        wishes.at(Activity::Meeting);
        let member = Member { rank, world, address, device: job.device, timeout };
        let group = Group::meet(host, port, member, || wishes.aborted())?;
        wishes.watch(group.aborter())?;
        let link = timing::link(&group, world)?;
        let began = (join.elapsed_seconds, Instant::now());
        Ok(Self { generation: join.generation, rank, world, group, link, began })
    }

    fn seconds(&self) -> f64 {
        self.began.0 + self.began.1.elapsed().as_secs_f64()
    }
}

fn host_and_port(address: &str) -> Result<(&str, u16)> {
    let (host, port) =
        address.rsplit_once(':').ok_or_else(|| anyhow!("store address {address:?}: must be host:port"))?;
    Ok((host.trim_start_matches('[').trim_end_matches(']'), port.parse()?))
}

/// Takes part in the generation that `join` names.
pub(crate) fn generation(
    job: &mut Job,
    join: &pb::Join,
    wishes: &Wishes,
    reports: &Reports,
) -> Result<Ending, Failure> {
    let seat = Seat::take(job, join, wishes)?;
    wishes.at(Activity::Agreeing);
    let damaged = job.agree(&seat, join)?;
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
        let export = checkpoint::export(&job.home.store, run, &job.spec, &job.manifest, model, test);
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
        return Err(anyhow!("the loss of step {step} is {}: choose a lower train.learning_rate", sums.loss).into());
    }

    wishes.at(Activity::Updating);
    let learning_rate = step::learning_rate(*step, job.steps_per_epoch, &job.spec.train);
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

/// What is reported and stored on the way; by rank 0 alone.
struct Records<'a> {
    seat: &'a Seat,
    reports: &'a Reports,
    history: History,
    reported: Instant,
    pointed: Instant,
    /// Since the epoch, or the generation, began: samples, and the time of the steps.
    epoch: (f64, Timing),
    gradient_bytes: u64,
    learning_rate: f64,
    /// Steps between checkpoints.
    every: u64,
    /// The step of the newest checkpoint that is in the store.
    saved: u64,
    /// The checkpoint that is being written; whether it was.
    writing: Option<(u64, tokio::task::JoinHandle<bool>)>,
    /// The newest validation: its step, and the share of right first guesses.
    validated: Option<(u64, f64)>,
}

impl<'a> Records<'a> {
    fn new(job: &Job, join: &pb::Join, seat: &'a Seat, reports: &'a Reports) -> Self {
        let history = History::new(job.home.store.clone(), job.home.runtime.clone(), &job.run, seat.generation);
        let long_ago = Instant::now().checked_sub(POINT_EVERY).unwrap_or_else(Instant::now);
        Self {
            seat,
            reports,
            history,
            reported: long_ago,
            pointed: long_ago,
            epoch: (0.0, Timing::default()),
            gradient_bytes: job.gradient_bytes(),
            learning_rate: 0.0,
            every: (job.spec.checkpoint.every_epochs * job.steps_per_epoch as f64).round().max(1.0) as u64,
            // A state from before the newest checkpoint goes on from an older one, since that one is damaged.
            saved: join.checkpoints.first().map_or(0, |newest| newest.step.min(job.progress.step)),
            writing: None,
            validated: None,
        }
    }

    fn point(&self, job: &Job, kind: MetricKind, sums: &Sums, timing: &Timing) -> MetricPoint {
        let mean = sums.mean();
        let seconds = timing.whole.max(1e-9);
        let learns = matches!(kind, MetricKind::Step | MetricKind::Train);
        MetricPoint {
            kind,
            generation: self.seat.generation,
            epoch: job.progress.step.div_ceil(job.steps_per_epoch),
            step: job.progress.step,
            loss: mean.loss,
            top1: mean.top1,
            top5: mean.top5,
            samples: mean.samples as u64,
            learning_rate: if learns { self.learning_rate } else { 0.0 },
            images_per_second: mean.samples / seconds,
            seconds: self.seat.seconds(),
            data_wait: timing.data / seconds,
            compute: timing.compute / seconds,
            rank_wait: timing.ranks / seconds,
            network_wait: timing.network / seconds,
            optimizer: timing.optimizer / seconds,
            slowest_rank: timing.slowest(),
            ranks: self.seat.world as u32,
            gradient_bytes: self.gradient_bytes,
            link_bytes_per_second: self.seat.link,
        }
    }

    fn step(&mut self, job: &mut Job, sums: &Sums, learning_rate: f64, timing: &Timing) {
        if self.seat.rank != 0 {
            return;
        }
        self.learning_rate = learning_rate;
        self.epoch.0 += sums.samples;
        self.epoch.1.add(timing);
        let point = self.point(job, MetricKind::Step, sums, timing);
        if self.pointed.elapsed() >= POINT_EVERY {
            self.pointed = Instant::now();
            self.history.point(point);
        }
        if self.reported.elapsed() >= REPORT_EVERY {
            self.reported = Instant::now();
            self.reports.stepped(job.progress.step, Some(point));
        }
        self.history.flush(&job.progress.tail, false);
    }

    /// The epoch is over: its mean is a point, and the next one counts from nothing.
    fn epoch(&mut self, job: &mut Job) {
        let (samples, timing) = std::mem::take(&mut self.epoch);
        let sums = std::mem::take(&mut job.progress.sums);
        if self.seat.rank == 0 && sums.samples > 0.0 {
            let mut point = self.point(job, MetricKind::Train, &sums, &timing);
            // A part of the epoch may have been another generation's.
            point.images_per_second *= samples / sums.samples.max(1.0);
            self.publish(job, point);
        }
    }

    fn evaluated(&mut self, job: &Job, kind: MetricKind, (sums, time): &(Sums, Duration)) {
        if self.seat.rank == 0 {
            let timing = Timing { whole: time.as_secs_f64(), ..Timing::default() };
            let point = self.point(job, kind, sums, &timing);
            if kind == MetricKind::Validation {
                self.validated = Some((point.step, point.top1));
            }
            self.publish(job, point);
        }
    }

    fn publish(&mut self, job: &Job, point: MetricPoint) {
        self.history.point(point);
        self.reports.stepped(job.progress.step, Some(point));
        self.history.flush(&job.progress.tail, true);
    }

    /// Begins a checkpoint if one is due, or, at the run's end, writes the last one. One at a time and beside the training, which is held
    /// up by the copy alone: what is due while the store is still at the one before, or the coordinator is away, is made up for later.
    fn checkpoint_if_due(&mut self, job: &Job, wishes: &Wishes, over: bool) -> Result<()> {
        if self.seat.rank != 0 {
            return Ok(());
        }
        if over {
            return self.last_checkpoint(job, wishes);
        }
        if self.writing.as_ref().is_some_and(|(_, writing)| writing.is_finished()) {
            self.written(job);
        }
        let due = job.progress.step / self.every > self.saved / self.every;
        if due && self.writing.is_none() && wishes.in_contact(job.spec.failure_detection()) {
            wishes.at(Activity::Checkpointing);
            self.begin_checkpoint(job)?;
            self.history.flush(&job.progress.tail, true);
        }
        Ok(())
    }

    /// A checkpoint of this very state is in the store, unless the coordinator is away.
    fn last_checkpoint(&mut self, job: &Job, wishes: &Wishes) -> Result<()> {
        self.written(job);
        if self.seat.rank == 0 && self.saved < job.progress.step && wishes.in_contact(job.spec.failure_detection()) {
            self.begin_checkpoint(job)?;
            self.written(job);
        }
        Ok(())
    }

    /// Copies the state, and has it written.
    fn begin_checkpoint(&mut self, job: &Job) -> Result<()> {
        let step = job.progress.step;
        let snapshot =
            Snapshot::take(&job.run, self.seat.generation, job.steps_per_epoch, &job.progress, &job.tensors())?;
        let top1 = self.validated.filter(|(at, _)| *at == step).map(|(_, top1)| top1);
        let (store, reports) = (job.home.store.clone(), self.reports.clone());
        let write = async move {
            match snapshot.write(store).await {
                Ok(made) => reports.checkpointed(pb::Checkpointed { top1, ..made }),
                Err(error) => {
                    tracing::error!(step, error = format!("{error:#}"), "checkpoint not written");
                    return false;
                }
            }
            true
        };
        self.writing = Some((step, job.home.runtime.spawn(write)));
        Ok(())
    }

    /// Waits for the checkpoint that is being written.
    fn written(&mut self, job: &Job) {
        if let Some((step, writing)) = self.writing.take()
            && job.home.runtime.block_on(writing).unwrap_or(false)
        {
            self.saved = step;
        }
    }

    /// All that was begun is in the store.
    fn finish(&mut self, job: &Job) {
        if self.seat.rank == 0 {
            self.written(job);
            self.history.finish(&job.progress.tail);
            self.reports.stepped(job.progress.step, None);
        }
    }
}
