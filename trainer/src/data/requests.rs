//! The batches that a rank asks its loader for, in their order.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use proto::{RunSpec, Split};

use super::cache::{ImageId, NextUse, PlanTime};
use super::plan::{EpochPlan, Lane, SampleId, steps_per_epoch};
use input::augment::Augmentation;

/// One batch of one rank, as planned.
#[derive(Debug)]
pub(crate) struct BatchRequest {
    /// The step that it is for, counted over the whole run from 0.
    pub step: u64,
    /// With the first batch of a plan: how many samples of each block the whole plan uses, so that a block is dropped
    /// after the last one.
    pub uses: Option<HashMap<u32, u32>>,
    /// Samples of the step on all ranks.
    pub samples: u64,
    /// How many of `sample_ids` each lane has, lane after lane.
    pub shares: Vec<i64>,
    /// Its samples; at least one.
    pub sample_ids: Vec<SampleId>,
    /// How they become input.
    pub augmentation: Augmentation,
    /// When they are used next.
    pub next_use: NextUse,
}

/// A rank's training from step `from` (over the whole run, from 0) to the end of the last epoch.
pub(super) fn training(
    kept: Vec<u32>,
    spec: &RunSpec,
    own_lanes: Range<u32>,
    from: u64,
) -> impl Iterator<Item = BatchRequest> + Send + 'static {
    let (seed, train, lanes, input) = (spec.seed, spec.train.clone(), spec.ranks.lanes, spec.input.clone());
    let by = spec.plan();
    let steps = steps_per_epoch(kept.iter().map(|&n| u64::from(n)).sum(), train.batch);
    (from / steps..u64::from(train.epochs))
        .map_while(move |epoch| {
            // This cannot fail: `Job::open` has made such a plan, and whether one is possible is the same for all
            // epochs.
            let plan = |epoch| EpochPlan::new(&kept, by, lanes, train.batch, seed, epoch).ok();
            let next_use = match epoch + 1 < u64::from(train.epochs) {
                true => NextUse::InEpoch(epoch as u32 + 1, Arc::new(plan(epoch + 1)?.use_times(own_lanes.clone()))),
                false => NextUse::Never,
            };
            let plan = Arc::new(plan(epoch)?);
            let first = from.saturating_sub(epoch * steps);
            let mut uses = Some(plan.block_uses(&own_lanes).collect());
            let mut own: Vec<Lane> = own_lanes.clone().map(|lane| plan.lane(lane, first)).collect();
            let augmentation = Augmentation::Training { input: input.clone(), seed, epoch };
            Some((first..steps).map(move |step| {
                let shares: Vec<Vec<SampleId>> = own.iter_mut().filter_map(Lane::next).collect();
                BatchRequest {
                    step: epoch * steps + step,
                    uses: uses.take(),
                    samples: plan.samples(step),
                    shares: shares.iter().map(|share| share.len() as i64).collect(),
                    sample_ids: shares.concat(),
                    augmentation: augmentation.clone(),
                    next_use: next_use.clone(),
                }
            }))
        })
        .flatten()
}

/// The next uses of cached images for a training that begins at step `from`.
pub(super) fn needed(
    kept: &[u32],
    spec: &RunSpec,
    own_lanes: Range<u32>,
    from: u64,
) -> impl Fn(ImageId) -> Option<PlanTime> {
    let steps = steps_per_epoch(kept.iter().map(|&n| u64::from(n)).sum(), spec.train.batch);
    let epoch = from / steps;
    let use_times = |epoch: u64| match epoch < u64::from(spec.train.epochs) {
        true => EpochPlan::new(kept, spec.plan(), spec.ranks.lanes, spec.train.batch, spec.seed, epoch)
            .map_or(NextUse::Never, |plan| NextUse::InEpoch(epoch as u32, Arc::new(plan.use_times(own_lanes.clone())))),
        false => NextUse::Never,
    };
    let (this, next) = (use_times(epoch), use_times(epoch + 1));
    let now = (from << 32) / steps;
    move |(split, sample_id)| match split {
        Split::Train => this.of(sample_id).filter(|time| *time >= now).or_else(|| next.of(sample_id)),
        // Another rank may evaluate them now, and they are few: they are removed.
        _ => None,
    }
}

/// A rank's part of an evaluation, in batches of `batch` samples.
pub(crate) fn evaluation(
    sample_ids: Vec<SampleId>,
    batch: usize,
    crop: u32,
    next_use: NextUse,
) -> impl Iterator<Item = BatchRequest> + Send + 'static {
    let mut counts = HashMap::new();
    for sample_id in &sample_ids {
        *counts.entry(sample_id.block).or_insert(0) += 1;
    }
    let mut uses = Some(counts);
    (0..sample_ids.len()).step_by(batch).zip(0..).map(move |(start, step)| {
        let sample_ids = sample_ids[start..(start + batch).min(sample_ids.len())].to_vec();
        let own = sample_ids.len();
        let (augmentation, next_use) = (Augmentation::Evaluation { crop }, next_use.clone());
        BatchRequest {
            step,
            uses: uses.take(),
            samples: own as u64,
            shares: vec![own as i64],
            sample_ids,
            augmentation,
            next_use,
        }
    })
}
