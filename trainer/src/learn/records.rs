//! Reports, learning curve and checkpoints of a generation.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use proto::metric::{MetricKind, MetricPoint};
use proto::pb::{self, rank_heartbeat::Activity};
use tokio::sync::oneshot;

use super::checkpoint::Snapshot;
use super::control::ControlFlags;
use super::device_time::DeviceClock;
use super::failure::Failure;
use super::history::{History, Sums};
use super::job::{Job, Untold};
use super::membership::Membership;
use super::reports::Reports;
use super::timing::Timing;

/// Steps are reported to the coordinator no more often than this ...
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// ... and are points of the stored curve no more often than this.
const POINT_EVERY: Duration = Duration::from_secs(1);

/// Reports to the coordinator and writes learning curve, ledger and checkpoints. On other ranks than rank 0 it does
/// nothing.
pub(super) struct Records<'a> {
    membership: &'a Membership,
    reports: &'a Reports,
    pub(super) history: History,
    last_report: Instant,
    last_point: Instant,
    /// Samples and step times since the epoch, or the generation, began.
    epoch: (f64, Timing),
    /// Of rank 0's device. Its work on what is no step is not counted.
    pub(super) clock: DeviceClock,
    gradient_bytes: u64,
    learning_rate: f64,
    /// Steps between checkpoints.
    interval: u64,
    /// The step of the newest checkpoint that is in the store.
    saved_step: u64,
    /// The checkpoints that there are.
    known: Vec<pb::Checkpointed>,
    /// The steps of the checkpoints that are being written, one after the other, and the tasks that return them once they
    /// are.
    writing: VecDeque<(u64, tokio::task::JoinHandle<Option<pb::Checkpointed>>)>,
    /// Closes once the last of them is.
    last: Option<oneshot::Receiver<()>>,
    /// The next one.
    copied: Option<Copied>,
    /// The step and top-1 accuracy of the newest validation.
    validated: Option<(u64, f64)>,
}

/// A state on its way into a checkpoint, with its top-1 accuracy on the validation split if that was measured.
struct Copied {
    snapshot: Snapshot,
    top1: Option<f64>,
}

impl<'a> Records<'a> {
    pub(super) fn new(job: &Job, join: &pb::Join, membership: &'a Membership, reports: &'a Reports) -> Self {
        let history =
            History::new(job.context.store.clone(), job.context.runtime.clone(), &job.run, membership.generation);
        let long_ago = Instant::now().checked_sub(POINT_EVERY).unwrap_or_else(Instant::now);
        Self {
            membership,
            reports,
            history,
            last_report: long_ago,
            last_point: long_ago,
            epoch: (0.0, Timing::default()),
            clock: DeviceClock::new((membership.rank == 0).then_some(job.device)),
            gradient_bytes: job.gradient_bytes(),
            learning_rate: 0.0,
            interval: (job.spec.checkpoint.every_epochs * job.steps_per_epoch as f64).round().max(1.0) as u64,
            // A state older than the newest checkpoint was read from an older one, because the newest is damaged.
            saved_step: join.checkpoints.first().map_or(0, |newest| newest.step.min(job.progress.step)),
            known: join.checkpoints.clone(),
            writing: VecDeque::new(),
            last: None,
            copied: None,
            validated: None,
        }
    }

    fn point(&self, job: &Job, kind: MetricKind, sums: &Sums, timing: &Timing) -> MetricPoint {
        let mean = sums.mean();
        let seconds = timing.whole.max(1e-9);
        let learns = matches!(kind, MetricKind::Step | MetricKind::Train);
        MetricPoint {
            kind,
            generation: self.membership.generation,
            epoch: job.progress.step.div_ceil(job.steps_per_epoch),
            step: job.progress.step,
            loss: mean.loss,
            top1: mean.top1,
            top5: mean.top5,
            samples: mean.samples as u64,
            learning_rate: if learns { self.learning_rate } else { 0.0 },
            images_per_second: mean.samples / seconds,
            seconds: self.membership.seconds(),
            data_wait: timing.data / seconds,
            compute: timing.compute / seconds,
            rank_wait: timing.ranks / seconds,
            network_wait: timing.network / seconds,
            optimizer: timing.optimizer / seconds,
            slowest_rank: timing.slowest(),
            ranks: self.membership.world as u32,
            gradient_bytes: self.gradient_bytes,
            link_bytes_per_second: self.membership.link,
            device: timing.device.share(),
        }
    }

    /// As [`Job::settle`], with a point of what it says.
    pub(super) fn settle(&mut self, job: &mut Job) -> Result<(), Failure> {
        if let Some((sums, Untold { learning_rate, timing, .. })) = job.settle(&self.membership.group)? {
            self.step(job, &sums, learning_rate, timing);
        }
        Ok(())
    }

    /// A step that was applied, with the time of the device in what it has done by now: that may be the step before.
    pub(super) fn step(&mut self, job: &Job, sums: &Sums, learning_rate: f64, timing: Timing) {
        if self.membership.rank != 0 {
            return;
        }
        let timing = Timing { device: self.clock.read(), ..timing };
        self.learning_rate = learning_rate;
        self.epoch.0 += sums.samples;
        self.epoch.1.add(&timing);
        let point = self.point(job, MetricKind::Step, sums, &timing);
        if self.last_point.elapsed() >= POINT_EVERY {
            self.last_point = Instant::now();
            self.history.point(point);
        }
        if self.last_report.elapsed() >= REPORT_EVERY {
            self.last_report = Instant::now();
            self.reports.stepped(job.progress.step, Some(point));
        }
        self.history.flush(&job.progress.tail, false);
    }

    /// Adds the mean of the epoch that has ended to the curve, and resets the sums.
    pub(super) fn epoch(&mut self, job: &mut Job) -> Result<(), Failure> {
        self.settle(job)?;
        // The validation follows.
        self.clock.pause();
        let (samples, timing) = std::mem::take(&mut self.epoch);
        let sums = std::mem::take(&mut job.progress.sums);
        if self.membership.rank == 0 && sums.samples > 0.0 {
            let mut point = self.point(job, MetricKind::Train, &sums, &timing);
            // The sums may include steps of an earlier generation, which `samples` and `timing` do not.
            point.images_per_second *= samples / sums.samples.max(1.0);
            self.publish(job, point);
        }
        Ok(())
    }

    pub(super) fn evaluated(&mut self, job: &Job, kind: MetricKind, (sums, time): &(Sums, Duration)) {
        if self.membership.rank == 0 {
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

    /// Starts a checkpoint if one is due, or if the state is the best so far; at the end of the run the last one. One
    /// is written at a time, while training goes on after the state has been copied. A checkpoint that is due while
    /// another is being written, or while the coordinator is away, comes later; the best state waits as a copy.
    pub(super) fn checkpoint_if_due(&mut self, job: &mut Job, flags: &ControlFlags, over: bool) -> Result<(), Failure> {
        if self.membership.rank != 0 {
            return Ok(());
        }
        if over {
            // The other ranks do not wait for the store: the test goes on meanwhile.
            return self.begin_last_checkpoint(job, flags);
        }
        if self.writing.front().is_some_and(|(_, writing)| writing.is_finished()) {
            job.context.runtime.block_on(self.written());
        }
        let step = job.progress.step;
        let is_free = self.writing.is_empty() && flags.in_contact(job.spec.failure_detection());
        let due = step / self.interval > self.saved_step / self.interval;
        let is_best = job.progress.best.is_some_and(|best| best.step == step) && !self.has(step);
        // A best state that waits is not given up for one that is only due.
        if is_best || due && is_free && self.copied.is_none() {
            flags.set_activity(Activity::Checkpointing);
            self.copied = Some(self.copy(job)?);
        }
        if is_free && let Some(copied) = self.copied.take() {
            self.write(job, copied);
            self.history.flush(&job.progress.tail, true);
        }
        Ok(())
    }

    /// Whether there is a checkpoint of this step, or will be.
    fn has(&self, step: u64) -> bool {
        let copied = self.copied.as_ref().map(|copied| copied.snapshot.step());
        self.knows(step) || self.is_coming(step) || copied == Some(step)
    }

    fn knows(&self, step: u64) -> bool {
        self.known.iter().any(|made| made.step == step)
    }

    fn is_coming(&self, step: u64) -> bool {
        self.writing.iter().any(|(coming, _)| *coming == step)
    }

    /// Writes a checkpoint of the current state and waits for it, unless there is one or the coordinator is away.
    pub(super) fn last_checkpoint(&mut self, job: &mut Job, flags: &ControlFlags) -> Result<(), Failure> {
        self.all_written(job);
        self.begin_last_checkpoint(job, flags)?;
        self.all_written(job);
        Ok(())
    }

    fn begin_last_checkpoint(&mut self, job: &mut Job, flags: &ControlFlags) -> Result<(), Failure> {
        if self.membership.rank != 0 || !flags.in_contact(job.spec.failure_detection()) {
            return Ok(());
        }
        if let Some(copied) = self.copied.take() {
            self.write(job, copied);
        }
        if self.saved_step < job.progress.step && !self.is_coming(job.progress.step) {
            let copied = self.copy(job)?;
            self.write(job, copied);
        }
        Ok(())
    }

    /// Copies the state. One that is not finite, or came of a loss that is not, is refused, so that it never replaces a
    /// sound checkpoint.
    fn copy(&mut self, job: &mut Job) -> Result<Copied, Failure> {
        self.settle(job)?;
        self.clock.pause();
        let step = job.progress.step;
        let tensors = job.tensors();
        for (name, tensor) in &tensors {
            if tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                return Err(Failure::Diverged(format!(
                    "{name} is not finite after step {step}: choose a lower train.learning_rate; the last checkpoint before it is sound"
                )));
            }
        }
        let snapshot =
            Snapshot::take(&job.run, self.membership.generation, job.steps_per_epoch, &job.progress, &tensors)?;
        let best = job.progress.best.map(|best| (best.step, best.top1));
        let top1 = [self.validated, best].into_iter().flatten().find(|(at, _)| *at == step).map(|(_, top1)| top1);
        Ok(Copied { snapshot, top1 })
    }

    /// Starts to write a copy, once those before it are written.
    fn write(&mut self, job: &Job, Copied { snapshot, top1 }: Copied) {
        let step = snapshot.step();
        let (store, reports) = (job.context.store.clone(), self.reports.clone());
        let (done, last) = oneshot::channel::<()>();
        let before = self.last.replace(last);
        let write = async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            let _done = done;
            match snapshot.write(store).await {
                Ok(made) => {
                    let made = pb::Checkpointed { top1, ..made };
                    reports.checkpointed(made.clone());
                    Some(made)
                }
                Err(error) => {
                    tracing::error!(step, error = format!("{error:#}"), "checkpoint not written");
                    None
                }
            }
        };
        self.writing.push_back((step, job.context.runtime.spawn(write)));
    }

    fn all_written(&mut self, job: &Job) {
        while !self.writing.is_empty() {
            job.context.runtime.block_on(self.written());
        }
    }

    /// Waits for the first checkpoint that is being written.
    async fn written(&mut self) {
        if let Some((step, writing)) = self.writing.pop_front()
            && let Some(made) = writing.await.unwrap_or(None)
        {
            self.saved_step = step;
            self.known.push(made);
        }
    }

    /// The checkpoint of this step, once it is there if it is being written. Other ranks wait meanwhile, so nothing else
    /// is waited for.
    pub(super) async fn checkpoint(&mut self, step: u64) -> Option<&pb::Checkpointed> {
        while !self.knows(step) && self.is_coming(step) {
            self.written().await;
        }
        self.known.iter().rfind(|made| made.step == step)
    }

    /// Says that the run is complete, with its model's folder and files.
    pub(super) fn finished(&self, key: String, digests: HashMap<String, String>) {
        self.reports.finished(key, digests);
    }

    /// Waits until everything is in the store.
    pub(super) fn finish(&mut self, job: &Job) {
        if self.membership.rank == 0 {
            self.all_written(job);
            self.history.finish(&job.progress.tail);
            self.reports.stepped(job.progress.step, None);
        }
    }
}
