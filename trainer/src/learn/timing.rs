//! Where the time of a step goes, and the bandwidth between ranks: which of them limits a run.

use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use super::device_time::DeviceTime;
use super::failure::Failure;
use crate::torch::{Group, Op};

/// What is sent to measure the link between ranks.
const PROBE_BYTES: i64 = 4 << 20;

/// The time of a step, or the sum of many: in seconds, means over ranks.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Timing {
    /// All of it.
    pub whole: f64,
    /// Waiting for data.
    pub data: f64,
    /// Forward and backward. For one rank on a GPU, which is given a step while it is still at the one before, all the
    /// time in which it was waited for.
    pub compute: f64,
    /// Waiting for the slowest rank.
    pub ranks: f64,
    /// Waiting for the network, with nothing left to compute.
    pub network: f64,
    /// Applying the gradients; on a GPU, giving it that to do: the next step waits for it.
    pub optimizer: f64,
    /// How long the others waited for each rank.
    pub late: Vec<f64>,
    /// Of rank 0's device alone, by its own clock if it has one.
    pub device: DeviceTime,
}

impl Timing {
    /// Of one step: what each rank says of itself (how long it waited for data, and was busy until its last gradient
    /// was there, both in microseconds), when all had agreed on the step, and when it was applied.
    pub(crate) fn of(ranks: &[(i64, i64)], agreed: Duration, applied: Duration) -> Self {
        let n = ranks.len().max(1) as f64;
        let seconds = |micros: i64| micros as f64 / 1e6;
        let data = ranks.iter().map(|&(waited, _)| seconds(waited)).sum::<f64>() / n;
        let busy = ranks.iter().map(|&(_, busy)| seconds(busy)).sum::<f64>() / n;
        let slowest = ranks.iter().map(|&(_, busy)| seconds(busy)).fold(0.0, f64::max);
        let (agreed, whole) = (agreed.as_secs_f64(), applied.as_secs_f64());
        let optimizer = (whole - agreed).max(0.0);
        let waiting = (agreed - busy).max(0.0);
        // Ranks begin a step within moments of each other, not at the same time.
        let for_ranks = (slowest - busy).clamp(0.0, waiting);
        let late = ranks.iter().map(|&(_, busy)| (seconds(busy) - slowest + for_ranks).max(0.0)).collect();
        let network = waiting - for_ranks;
        let (compute, device) = ((busy - data).max(0.0), DeviceTime::default());
        Self { whole, data, compute, ranks: for_ranks, network, optimizer, late, device }
    }

    /// Adds another step's.
    pub(crate) fn add(&mut self, other: &Self) {
        let Self { whole, data, compute, ranks, network, optimizer, late, device } = self;
        for (sum, one) in [
            (whole, other.whole),
            (data, other.data),
            (compute, other.compute),
            (ranks, other.ranks),
            (network, other.network),
            (optimizer, other.optimizer),
        ] {
            *sum += one;
        }
        device.add(&other.device);
        late.resize(other.late.len(), 0.0);
        late.iter_mut().zip(&other.late).for_each(|(sum, one)| *sum += one);
    }

    /// The rank that the others waited for the longest.
    pub(crate) fn slowest(&self) -> u32 {
        let late = self.late.iter().enumerate().max_by(|(_, one), (_, other)| one.total_cmp(other));
        late.map_or(0, |(rank, _)| rank as u32)
    }
}

/// Bytes a second that a rank's link carries each way: by the fastest of a few all-reduces, each of which moves
/// 2 (n - 1) / n of the bytes both ways (Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
/// workstations", 2009). 0 for one rank.
pub(crate) fn measure_link(group: &Group, world: usize) -> Result<f64, Failure> {
    if world == 1 {
        return Ok(0.0);
    }
    let probe = Tensor::zeros([PROBE_BYTES / 4], (Kind::Float, group.device()));
    let mut fastest = f64::INFINITY;
    for _ in 0..3 {
        let began = Instant::now();
        group.all_reduce(&probe, Op::Sum)?.wait(group.timeout())?;
        group.settle()?;
        fastest = fastest.min(began.elapsed().as_secs_f64());
    }
    Ok(2.0 * (world as f64 - 1.0) / world as f64 * PROBE_BYTES as f64 / fastest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_split_into_parts_that_add_up() {
        let ms = Duration::from_millis;
        // Rank 1 waits 40 ms for data and is done 40 ms later than rank 0; the network then takes 10 ms, the optimizer
        // 5 ms.
        let step = Timing::of(&[(0, 100_000), (40_000, 140_000)], ms(150), ms(155));
        let near = |one: f64, other: f64| assert!((one - other).abs() < 1e-9, "{step:?}");
        near(step.data, 0.020);
        near(step.compute, 0.100);
        near(step.ranks, 0.020);
        near(step.network, 0.010);
        near(step.optimizer, 0.005);
        near(step.data + step.compute + step.ranks + step.network + step.optimizer, step.whole);
        let mut sum = Timing::default();
        sum.add(&step);
        sum.add(&step);
        near(sum.whole, 0.310);
        assert_eq!((step.slowest(), sum.slowest()), (1, 1));
    }

    #[test]
    fn one_rank_waits_for_no_other() {
        let step = Timing::of(&[(1_000, 9_000)], Duration::from_millis(9), Duration::from_millis(10));
        assert!(step.ranks == 0.0 && step.network.abs() < 1e-9 && step.slowest() == 0, "{step:?}");
    }
}
