//! What is reported and stored on the way.

use std::time::{Duration, Instant};

use proto::metric::{MetricKind, MetricPoint};
use proto::pb::{self, rank_heartbeat::Activity};

use super::checkpoint::Snapshot;
use super::control::Wishes;
use super::failure::Failure;
use super::history::{History, Sums};
use super::job::Job;
use super::membership::Seat;
use super::reports::Reports;
use super::timing::Timing;

/// Steps are reported to the coordinator no more often than this ...
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// ... and are points of the stored curve no more often than this.
const POINT_EVERY: Duration = Duration::from_secs(1);

/// What is reported and stored on the way; by rank 0 alone.
pub(super) struct Records<'a> {
    seat: &'a Seat,
    reports: &'a Reports,
    pub(super) history: History,
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
    pub(super) fn new(job: &Job, join: &pb::Join, seat: &'a Seat, reports: &'a Reports) -> Self {
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

    pub(super) fn step(&mut self, job: &mut Job, sums: &Sums, learning_rate: f64, timing: &Timing) {
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
    pub(super) fn epoch(&mut self, job: &mut Job) {
        let (samples, timing) = std::mem::take(&mut self.epoch);
        let sums = std::mem::take(&mut job.progress.sums);
        if self.seat.rank == 0 && sums.samples > 0.0 {
            let mut point = self.point(job, MetricKind::Train, &sums, &timing);
            // A part of the epoch may have been another generation's.
            point.images_per_second *= samples / sums.samples.max(1.0);
            self.publish(job, point);
        }
    }

    pub(super) fn evaluated(&mut self, job: &Job, kind: MetricKind, (sums, time): &(Sums, Duration)) {
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
    pub(super) fn checkpoint_if_due(&mut self, job: &Job, wishes: &Wishes, over: bool) -> Result<(), Failure> {
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
    pub(super) fn last_checkpoint(&mut self, job: &Job, wishes: &Wishes) -> Result<(), Failure> {
        self.written(job);
        if self.seat.rank == 0 && self.saved < job.progress.step && wishes.in_contact(job.spec.failure_detection()) {
            self.begin_checkpoint(job)?;
            self.written(job);
        }
        Ok(())
    }

    /// Copies the state, and has it written. A ruined one is refused, so that it never takes the place of a sound checkpoint.
    fn begin_checkpoint(&mut self, job: &Job) -> Result<(), Failure> {
        let step = job.progress.step;
        let tensors = job.tensors();
        for (name, tensor) in &tensors {
            if tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                return Err(Failure::Diverged(format!(
                    "{name} is not finite after step {step}: choose a lower train.learning_rate; the last checkpoint before it is sound"
                )));
            }
        }
        let snapshot = Snapshot::take(&job.run, self.seat.generation, job.steps_per_epoch, &job.progress, &tensors)?;
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
    pub(super) fn finish(&mut self, job: &Job) {
        if self.seat.rank == 0 {
            self.written(job);
            self.history.finish(&job.progress.tail);
            self.reports.stepped(job.progress.step, None);
        }
    }
}
