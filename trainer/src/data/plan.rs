//! The order of samples: a pure function of the blocks' counts, the seed and the epoch. Which rank reads what follows
//! from the lanes alone, so any number of ranks trains on the same samples in the same steps.
//!
//! A run shuffles the blocks and lays them end to end; lane v of V owns an equal part of that line, cut inside blocks
//! where it must be, and owns it in every epoch: so a rank decodes no other samples than those that it has cached, and
//! a cluster reads the store once. An epoch shuffles each lane's pieces of blocks; within a window of pieces the lane's
//! samples are shuffled, and what comes out is spread evenly over the epoch's steps, by the run's [`Plan`]: lane by
//! lane, or by the shortest lane for all, so that lanes have equal shares. A share differs from another of the same
//! epoch by one sample at the most.
//!
//! Only the current windows are held sample by sample: 100,000,000 samples are some million blocks, and a lane's
//! position is found from these.

use std::ops::Range;
use std::sync::Arc;

use proto::run_spec::Plan;

use super::random::{key, shuffle};

/// Blocks in the windows of all lanes together. With blocks of 2 MiB this bounds what a single rank holds to 256 MiB.
const WINDOW_BLOCKS: usize = 128;

/// A sample of a split: the `sample`-th one of the `block`-th block, not counting those that are skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SampleId {
    /// Counts the split's blocks from 0.
    pub block: u32,
    /// Counts the block's samples that are not skipped from 0.
    pub sample: u32,
}

/// Why a split cannot be trained on in this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{samples} training samples in {steps} steps of {lanes} lanes are fewer than 2 for some lane and step, which batch normalisation \
     needs: choose a train.batch of at least {at_least}, or fewer ranks.lanes"
)]
pub(crate) struct TooFewSamples {
    samples: u64,
    steps: u64,
    lanes: u32,
    at_least: u64,
}

/// One epoch's order.
#[derive(Debug)]
pub(crate) struct EpochPlan {
    /// The blocks that have samples, in the order in which they lie on the line.
    order: Vec<u32>,
    /// `ends[i]`: where on the line block `order[i]` ends.
    ends: Vec<u64>,
    plan: Plan,
    lanes: u32,
    steps: u64,
    /// The epoch's.
    seed: u64,
}

/// When in an epoch the samples of some lanes are used.
#[derive(Debug)]
pub(crate) struct UseTimes(Vec<(SampleId, u32)>);

impl UseTimes {
    /// The fraction of the epoch (of 2^32) that has passed when the window of this sample begins; None if it is of
    /// another lane.
    pub(crate) fn of(&self, sample_id: SampleId) -> Option<u32> {
        let after = self.0.partition_point(|(first, _)| *first <= sample_id);
        let (first, time) = self.0[after.checked_sub(1)?];
        (first.block == sample_id.block && time != NOT_OWN).then_some(time)
    }
}

/// The time of samples of other lanes, which follow the last sample of a piece.
const NOT_OWN: u32 = u32::MAX;

/// The lanes of rank `rank` of `world`. The parts of all ranks are contiguous and differ by at most one lane.
pub(crate) fn lanes_of(rank: u32, world: u32, lanes: u32) -> Range<u32> {
    let cut = |rank: u32| part(u64::from(lanes), u64::from(rank), u64::from(world)) as u32;
    cut(rank)..cut(rank + 1)
}

/// Steps of an epoch: as many as bring the global batch nearest to `batch`.
pub(crate) fn steps_per_epoch(samples: u64, batch: u32) -> u64 {
    let batch = u64::from(batch);
    ((samples + batch / 2) / batch).max(1)
}

/// Where the `i`-th of `of` equal parts of `total` begins.
fn part(total: u64, i: u64, of: u64) -> u64 {
    (u128::from(total) * u128::from(i) / u128::from(of)) as u64
}

impl EpochPlan {
    /// For blocks with `kept[i]` samples that count, in `lanes` lanes, with about `batch` samples in a step. Epochs
    /// count from 0.
    ///
    /// # Errors
    /// If a lane's share of a step could have fewer than two samples.
    pub(crate) fn new(
        kept: &[u32],
        plan: Plan,
        lanes: u32,
        batch: u32,
        seed: u64,
        epoch: u64,
    ) -> Result<Self, TooFewSamples> {
        let mut order: Vec<u32> = (0..kept.len() as u32).filter(|&block| kept[block as usize] > 0).collect();
        shuffle(&mut order, key(&[seed]));
        let mut end = 0;
        let ends: Vec<u64> = order
            .iter()
            .map(|&block| {
                end += u64::from(kept[block as usize]);
                end
            })
            .collect();
        let steps = steps_per_epoch(end, batch);
        if end / u64::from(lanes) / steps < 2 {
            // Rounding the number of steps takes a quarter of a share at the most (1.5 batches in 2 steps).
            let at_least = u64::from(lanes) * 3;
            return Err(TooFewSamples { samples: end, steps, lanes, at_least });
        }
        Ok(Self { order, ends, plan, lanes, steps, seed: key(&[seed, epoch]) })
    }

    /// Samples of step `step` (counted within the epoch) in all lanes together.
    pub(crate) fn samples(&self, step: u64) -> u64 {
        (0..self.lanes).map(|lane| self.share(lane, step)).map(|share| share.end - share.start).sum()
    }

    /// The shares of one lane from step `from` on (counted within the epoch): each step's samples, until the epoch
    /// ends.
    pub(crate) fn lane(self: &Arc<Self>, lane: u32, from: u64) -> Lane {
        Lane { pieces: self.pieces(lane), plan: self.clone(), lane, step: from, window: 0..0, sample_ids: Vec::new() }
    }

    /// How many of its samples each block has for these lanes, in no order; blocks without any are left out.
    pub(crate) fn block_uses(&self, lanes: &Range<u32>) -> impl Iterator<Item = (u32, u32)> {
        let line = if lanes.is_empty() { 0..0 } else { self.line(lanes.start).start..self.line(lanes.end - 1).end };
        let first = self.ends.partition_point(|&end| end <= line.start);
        (first..self.order.len()).map_while(move |i| {
            let samples = overlap(&self.block(i), &line);
            (!samples.is_empty()).then(|| (self.order[i], (samples.end - samples.start) as u32))
        })
    }

    /// When the samples of these lanes are used.
    pub(crate) fn use_times(&self, lanes: Range<u32>) -> UseTimes {
        let mut use_times = Vec::new();
        for lane in lanes {
            let pieces = self.pieces(lane);
            let samples = pieces.ends.last().map_or(1, |&end| end.max(1));
            for (i, piece) in pieces.of.iter().enumerate() {
                let begins = pieces.start(pieces.window(i).start);
                use_times.push((piece.0, part(u64::from(NOT_OWN), begins, samples) as u32));
                use_times.push((SampleId { sample: piece.0.sample + piece.1, ..piece.0 }, NOT_OWN));
            }
        }
        // Where one piece of a block ends and another begins, the one that begins comes last.
        use_times.sort_unstable_by_key(|&(first, time)| (first, time != NOT_OWN));
        UseTimes(use_times)
    }

    /// Samples of the epoch.
    fn total(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The part of the line that a lane owns.
    fn line(&self, lane: u32) -> Range<u64> {
        let cut = |lane: u32| part(self.total(), u64::from(lane), u64::from(self.lanes));
        cut(lane)..cut(lane + 1)
    }

    /// The part of its samples that a lane owns in one step.
    fn share(&self, lane: u32, step: u64) -> Range<u64> {
        let line = self.line(lane);
        let (own, steps) = (line.end - line.start, self.steps);
        // Lanes differ by one sample at the most.
        let shortest = self.total() / u64::from(self.lanes);
        let cut = |step| match self.plan {
            Plan::Spread => part(own, step, steps),
            Plan::Equal if step == steps => own,
            // Rounded up, so that the last step, which has what longer lanes have more, is one of the smaller ones
            // without it.
            Plan::Equal => shortest - part(shortest, steps - step, steps),
        };
        cut(step)..cut(step + 1)
    }

    /// Where the `i`-th block lies on the line.
    fn block(&self, i: usize) -> Range<u64> {
        i.checked_sub(1).map_or(0, |before| self.ends[before])..self.ends[i]
    }

    /// A lane's pieces in the order of this epoch.
    fn pieces(&self, lane: u32) -> Pieces {
        let line = self.line(lane);
        let first = self.ends.partition_point(|&end| end <= line.start);
        let mut of: Vec<(SampleId, u32)> = (first..self.order.len())
            .map_while(|i| {
                let block = self.block(i);
                let samples = overlap(&block, &line);
                let first =
                    SampleId { block: self.order[i], sample: (samples.start.saturating_sub(block.start)) as u32 };
                (!samples.is_empty()).then(|| (first, (samples.end - samples.start) as u32))
            })
            .collect();
        let seed = key(&[self.seed, u64::from(lane)]);
        shuffle(&mut of, seed);
        let mut end = 0;
        let mut add = |&(_, samples): &(SampleId, u32)| {
            end += u64::from(samples);
            end
        };
        let ends = of.iter().map(&mut add).collect();
        let size = (WINDOW_BLOCKS / self.lanes as usize).max(1);
        // The lanes' first windows differ in size, so that they do not all ask for a new window's blocks at the same
        // step.
        let head = if of.len() <= size { of.len() } else { (size * (lane as usize + 1) / self.lanes as usize).max(1) };
        Pieces { of, ends, head, size, seed }
    }
}

/// A lane's part of the blocks, in the order of an epoch, in windows.
#[derive(Debug)]
struct Pieces {
    /// First sample and how many.
    of: Vec<(SampleId, u32)>,
    /// `ends[i]`: how many samples there are up to the end of the `i`-th.
    ends: Vec<u64>,
    /// Pieces in the first window, and in each of the others.
    head: usize,
    size: usize,
    seed: u64,
}

impl Pieces {
    /// How many samples there are before the `i`-th.
    fn start(&self, i: usize) -> u64 {
        i.checked_sub(1).map_or(0, |before| self.ends[before])
    }

    /// The window that the `i`-th is in.
    fn window(&self, i: usize) -> Range<usize> {
        let from = if i < self.head { 0 } else { i - (i - self.head) % self.size };
        from..if from == 0 { self.head } else { (from + self.size).min(self.of.len()) }
    }

    /// The window around the `position`-th sample: where it lies, and its samples in order.
    fn samples(&self, position: u64) -> (Range<u64>, Vec<SampleId>) {
        let window = self.window(self.ends.partition_point(|&end| end <= position));
        let all = |&(first, samples): &(SampleId, u32)| {
            (first.sample..first.sample + samples).map(move |sample| SampleId { sample, ..first })
        };
        let mut sample_ids: Vec<SampleId> = self.of[window.clone()].iter().flat_map(all).collect();
        shuffle(&mut sample_ids, key(&[self.seed, window.start as u64]));
        (self.start(window.start)..self.start(window.end), sample_ids)
    }
}

/// One lane's shares, step by step.
#[derive(Debug)]
pub(crate) struct Lane {
    plan: Arc<EpochPlan>,
    pieces: Pieces,
    lane: u32,
    step: u64,
    window: Range<u64>,
    sample_ids: Vec<SampleId>,
}

impl Iterator for Lane {
    type Item = Vec<SampleId>;

    fn next(&mut self) -> Option<Vec<SampleId>> {
        if self.step >= self.plan.steps {
            return None;
        }
        let share = self.plan.share(self.lane, self.step);
        self.step += 1;
        let sample_ids = share.map(|position| {
            if !self.window.contains(&position) {
                (self.window, self.sample_ids) = self.pieces.samples(position);
            }
            self.sample_ids[(position - self.window.start) as usize]
        });
        Some(sample_ids.collect())
    }
}

/// The samples that lanes `part` of `lanes` evaluate, in the order in which they are stored.
pub(crate) fn evaluation(kept: &[u32], lanes: u32, own_lanes: Range<u32>) -> impl Iterator<Item = SampleId> {
    let total = kept.iter().map(|&n| u64::from(n)).sum();
    let cut = |lane: u32| part(total, u64::from(lane), u64::from(lanes));
    let line = cut(own_lanes.start)..cut(own_lanes.end);
    let mut start = 0;
    let blocks: Vec<(u32, Range<u64>)> = kept
        .iter()
        .enumerate()
        .filter_map(|(block, &n)| {
            let at = start..start + u64::from(n);
            start = at.end;
            let samples = overlap(&at, &line);
            (!samples.is_empty()).then(|| (block as u32, samples.start - at.start..samples.end - at.start))
        })
        .collect();
    blocks.into_iter().flat_map(|(block, samples)| samples.map(move |sample| SampleId { block, sample: sample as u32 }))
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.max(b.start)..a.end.min(b.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};

    fn all(kept: &[u32]) -> Vec<SampleId> {
        let of = |(block, &n): (usize, &u32)| (0..n).map(move |sample| SampleId { block: block as u32, sample });
        kept.iter().enumerate().flat_map(of).collect()
    }

    fn plan(kept: &[u32], plan: Plan, lanes: u32, batch: u32, epoch: u64) -> Option<Arc<EpochPlan>> {
        EpochPlan::new(kept, plan, lanes, batch, 7, epoch).ok().map(Arc::new)
    }

    fn plans() -> impl Strategy<Value = Plan> {
        prop_oneof![Just(Plan::Spread), Just(Plan::Equal)]
    }

    fn blocks() -> impl Strategy<Value = Vec<u32>> {
        prop_oneof![
            prop::collection::vec(0u32..40, 1..400),
            prop::collection::vec(0u32..700, 1..12),
            prop::collection::vec(0u32..3, 100..900),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn an_epoch_has_every_sample_once_in_equal_lanes_and_shares(
            kept in blocks(), by in plans(), lanes in 1u32..20, batch in 2u32..300, epoch in 0u64..3,
        ) {
            let total = all(&kept).len() as u64;
            let Some(plan) = plan(&kept, by, lanes, batch, epoch) else {
                prop_assert!(total / u64::from(lanes) / steps_per_epoch(total, batch) < 2);
                return Ok(());
            };
            let mut seen = Vec::new();
            let mut sizes = Vec::new();
            let mut of_steps = vec![HashSet::new(); plan.steps as usize];
            let (mut least, mut most) = (usize::MAX, 0);
            for lane in 0..lanes {
                let shares: Vec<_> = plan.lane(lane, 0).collect();
                prop_assert_eq!(shares.len() as u64, plan.steps);
                prop_assert!(shares.iter().zip(0..).all(|(share, step)| share.len() as u64 <= plan.samples(step)));
                for (share, of_step) in shares.iter().zip(&mut of_steps) {
                    (least, most) = (least.min(share.len()), most.max(share.len()));
                    of_step.insert(share.len());
                }
                sizes.push(shares.iter().map(Vec::len).sum::<usize>());
                seen.extend(shares.into_iter().flatten());
            }
            prop_assert_eq!((0..plan.steps).map(|step| plan.samples(step)).sum::<u64>(), total);
            prop_assert!(sizes.iter().max() <= sizes.iter().min().map(|n| n + 1).as_ref());
            prop_assert!(least >= 2 && most <= least + 1);
            if by == Plan::Equal {
                let last = of_steps.pop().expect("an epoch has steps");
                prop_assert!(of_steps.iter().all(|shares| shares.len() == 1));
                prop_assert_eq!(last.len() == 1, total.is_multiple_of(u64::from(lanes)));
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, all(&kept));
        }

        #[test]
        fn a_lane_that_begins_in_the_middle_goes_on_as_one_that_did_not(
            kept in blocks(), by in plans(), lanes in 1u32..10, from in 0u64..200,
        ) {
            let Some(plan) = plan(&kept, by, lanes, lanes * 5, 1) else { return Ok(()) };
            for lane in 0..lanes {
                let whole: Vec<_> = plan.lane(lane, 0).skip(from as usize).collect();
                prop_assert_eq!(plan.lane(lane, from).collect::<Vec<_>>(), whole);
            }
        }

        #[test]
        fn ranks_own_all_lanes_and_know_how_often_they_use_a_block(kept in blocks(), by in plans(), world in 1u32..8) {
            let Some(plan) = plan(&kept, by, 8, 40, 0) else { return Ok(()) };
            let mut next = 0;
            for rank in 0..world {
                let own_lanes = lanes_of(rank, world, 8);
                prop_assert_eq!(own_lanes.start, next);
                prop_assert!(!own_lanes.is_empty());
                next = own_lanes.end;
                let mut used = HashMap::new();
                for sample_id in own_lanes.clone().flat_map(|lane| plan.lane(lane, 0).flatten()) {
                    *used.entry(sample_id.block).or_insert(0) += 1;
                }
                prop_assert_eq!(plan.block_uses(&own_lanes).collect::<HashMap<_, _>>(), used);
            }
            prop_assert_eq!(next, 8);
        }

        #[test]
        fn lanes_own_the_same_samples_in_every_epoch_and_say_when_their_turn_is(
            kept in blocks(), by in plans(), lanes in 1u32..10, from in 0u32..4,
        ) {
            let of_epoch = |epoch| plan(&kept, by, lanes, lanes * 5, epoch);
            let (Some(one), Some(other)) = (of_epoch(1), of_epoch(2)) else { return Ok(()) };
            let owned = from.min(lanes - 1)..lanes;
            let use_times = other.use_times(owned.clone());
            for lane in 0..lanes {
                let order: Vec<SampleId> = other.lane(lane, 0).flatten().collect();
                let sorted = |mut sample_ids: Vec<SampleId>| { sample_ids.sort_unstable(); sample_ids };
                prop_assert_eq!(sorted(one.lane(lane, 0).flatten().collect()), sorted(order.clone()));
                let samples = order.len() as f64;
                let window = |sample_id: SampleId| use_times.of(sample_id).map(|time| f64::from(time) / 4_294_967_296.0 * samples);
                for (position, sample_id) in order.into_iter().enumerate() {
                    let time = window(sample_id);
                    prop_assert_eq!(time.is_some(), owned.contains(&lane));
                    prop_assert!(time.is_none_or(|time| time < position as f64 + 1.0), "{:?} at {}", time, position);
                }
            }
        }

        #[test]
        fn an_evaluation_has_every_sample_once_in_the_stored_order(kept in blocks(), world in 1u32..8) {
            let read: Vec<_> = (0..world).flat_map(|rank| evaluation(&kept, 8, lanes_of(rank, world, 8))).collect();
            prop_assert_eq!(read, all(&kept));
        }
    }

    #[test]
    fn epochs_and_seeds_change_the_order_and_steps_mix_blocks() {
        let kept = [100; 40];
        let first = |seed, epoch| {
            let plan = Arc::new(EpochPlan::new(&kept, Plan::NEWEST, 4, 64, seed, epoch).expect("enough samples"));
            plan.lane(0, 0).next().expect("a step")
        };
        assert_ne!(first(1, 0), first(1, 1));
        assert_ne!(first(1, 0), first(2, 0));
        let mut blocks: Vec<u32> = first(1, 0).iter().map(|sample_id| sample_id.block).collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert!(blocks.len() >= 5, "{blocks:?}");
    }

    /// These numbers were computed in another language (Python's integers), from the words at the head of this file.
    #[test]
    fn the_order_of_samples_is_the_one_that_stored_runs_resume_by() {
        let kept: Vec<u32> = (0..150).map(|block| block * 7 % 23).collect();
        let digest = |by, epoch| {
            let plan = plan(&kept, by, 6, 60, epoch).expect("enough samples");
            let shares = (0..6).flat_map(|lane| plan.lane(lane, 0));
            let words = |sample_id: SampleId| [u64::from(sample_id.block), u64::from(sample_id.sample)];
            let words = shares.flat_map(|share| {
                [share.len() as u64].into_iter().chain(share.into_iter().flat_map(words)).collect::<Vec<_>>()
            });
            key(&words.collect::<Vec<_>>())
        };
        assert_eq!([0, 1].map(|epoch| digest(Plan::Spread, epoch)), [0x2811_69b9_9a47_a14b, 0xc8a4_013e_3c3b_ccd6]);
        assert_eq!([0, 1].map(|epoch| digest(Plan::Equal, epoch)), [0x5fb9_63f3_f3bf_a76f, 0xaa8e_087e_3e6a_d4fd]);
    }

    #[test]
    fn a_hundred_million_samples_are_planned_by_block_and_window() {
        let kept = vec![70; 1_430_000];
        for by in [Plan::Spread, Plan::Equal] {
            let plan = Arc::new(EpochPlan::new(&kept, by, 64, 4096, 1, 2).expect("enough samples"));
            let mut lane = plan.lane(63, plan.steps - 3);
            assert_eq!(lane.by_ref().map(|share| share.len()).min(), Some(64));
            assert!(lane.sample_ids.len() <= 70 * WINDOW_BLOCKS / 64);
        }
    }
}
