//! Which samples a rank's batches have, in the order in which they are needed.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use proto::{RunSpec, Split};

use super::augment::Views;
use super::cache::{Again, Id, Moment};
use super::plan::{EpochPlan, Lane, Place, steps_per_epoch};

/// One batch of one rank, as planned.
#[derive(Debug)]
pub(crate) struct Request {
    /// The step that it is for, counted over the whole run from 0.
    pub step: u64,
    /// With the first request of a plan: how many samples of each block the plan asks for in all, so that a block is let go after the last.
    pub uses: Option<HashMap<u32, u32>>,
    /// Samples of the step on all ranks.
    pub samples: u64,
    /// How many of `places` each lane has, lane after lane.
    pub shares: Vec<i64>,
    /// Its samples; at least one.
    pub places: Vec<Place>,
    /// What is done to them.
    pub views: Views,
    /// When they are needed the next time.
    pub again: Again,
}

/// A rank's training from step `from` (over the whole run, from 0) to the end of the last epoch.
pub(super) fn training(
    kept: Vec<u32>,
    spec: &RunSpec,
    mine: Range<u32>,
    from: u64,
) -> impl Iterator<Item = Request> + Send + 'static {
    let (seed, train, lanes, input) = (spec.seed, spec.train.clone(), spec.ranks.lanes, spec.input.clone());
    let steps = steps_per_epoch(kept.iter().map(|&n| u64::from(n)).sum(), train.batch);
    (from / steps..u64::from(train.epochs))
        .map_while(move |epoch| {
            // Whoever asks has made such a plan before, and whether one is possible is the same for all epochs.
            let plan = |epoch| EpochPlan::new(&kept, lanes, train.batch, seed, epoch).ok();
            let again = match epoch + 1 < u64::from(train.epochs) {
                true => Again::In(epoch as u32 + 1, Arc::new(plan(epoch + 1)?.turns(mine.clone()))),
                false => Again::Never,
            };
            let plan = Arc::new(plan(epoch)?);
            let first = from.saturating_sub(epoch * steps);
            let mut uses = Some(plan.uses(&mine).collect());
            let mut own: Vec<Lane> = mine.clone().map(|lane| plan.lane(lane, first)).collect();
            let views = Views::Training { input: input.clone(), seed, epoch };
            Some((first..steps).map(move |step| {
                let shares: Vec<Vec<Place>> = own.iter_mut().filter_map(Lane::next).collect();
                Request {
                    step: epoch * steps + step,
                    uses: uses.take(),
                    samples: plan.samples(step),
                    shares: shares.iter().map(|share| share.len() as i64).collect(),
                    places: shares.concat(),
                    views: views.clone(),
                    again: again.clone(),
                }
            }))
        })
        .flatten()
}

/// When images in the cache are needed by a training that begins at step `from`.
pub(super) fn needed(kept: &[u32], spec: &RunSpec, mine: Range<u32>, from: u64) -> impl Fn(Id) -> Option<Moment> {
    let steps = steps_per_epoch(kept.iter().map(|&n| u64::from(n)).sum(), spec.train.batch);
    let epoch = from / steps;
    let turns = |epoch: u64| match epoch < u64::from(spec.train.epochs) {
        true => EpochPlan::new(kept, spec.ranks.lanes, spec.train.batch, spec.seed, epoch)
            .map_or(Again::Never, |plan| Again::In(epoch as u32, Arc::new(plan.turns(mine.clone())))),
        false => Again::Never,
    };
    let (this, next) = (turns(epoch), turns(epoch + 1));
    let now = (from << 32) / steps;
    move |(split, place)| match split {
        Split::Train => this.of(place).filter(|moment| *moment >= now).or_else(|| next.of(place)),
        // Which of them are this rank's may have changed, and they are few.
        _ => None,
    }
}

/// A rank's part of an evaluation, in batches of `batch` samples.
pub(crate) fn evaluation(
    places: Vec<Place>,
    batch: usize,
    crop: u32,
    again: Again,
) -> impl Iterator<Item = Request> + Send + 'static {
    let mut counts = HashMap::new();
    for place in &places {
        *counts.entry(place.block).or_insert(0) += 1;
    }
    let mut uses = Some(counts);
    (0..places.len()).step_by(batch).zip(0..).map(move |(start, step)| {
        let places = places[start..(start + batch).min(places.len())].to_vec();
        let own = places.len();
        let (views, again) = (Views::Evaluation { crop }, again.clone());
        Request { step, uses: uses.take(), samples: own as u64, shares: vec![own as i64], places, views, again }
    })
}
