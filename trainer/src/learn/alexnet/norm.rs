//! Batch normalisation of each lane's part of a batch alone.

use tch::{Device, Kind, Tensor};

/// The floor of a variance (PyTorch's default).
pub(crate) const EPS: f64 = 1e-5;

/// A layer's norm: a factor and an offset for each channel, and the running statistics.
#[derive(Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(super) mean: Tensor,
    pub(super) variance: Tensor,
}

impl Norm {
    /// One that changes nothing yet but mean and deviation.
    pub(crate) fn new(channels: i64, kind: Kind, device: Device) -> Self {
        Self {
            weight: Tensor::ones([channels], (kind, device)).set_requires_grad(true),
            bias: Tensor::zeros([channels], (kind, device)).set_requires_grad(true),
            mean: Tensor::zeros([channels], (kind, device)),
            variance: Tensor::ones([channels], (kind, device)),
        }
    }

    /// `x` [samples, channels, ...] has `shares[i]` samples of lane i, lane after lane. `statistics` gets the channels'
    /// means, then their unbiased variances, each summed over lanes in f64, so that the order of summing over lanes and
    /// ranks does not show in f32.
    pub(crate) fn train(&self, x: &Tensor, shares: &[i64], statistics: &mut Vec<Tensor>) -> Tensor {
        match shares {
            [first, _, ..] if shares.iter().all(|share| share == first) => {
                self.as_channels(x, shares.len() as i64, statistics)
            }
            _ => self.lane_by_lane(x, shares, statistics),
        }
    }

    /// Lanes of equal shares as so many more channels: libtorch's kernel takes each channel by itself, so that a lane's
    /// numbers do not depend on which others stand beside it, and is called once for all. On a CPU this takes 0.83 of
    /// the time of lane by lane for 4 lanes of 8 samples and 0.34 for 8 lanes of 16, where mean and variance of a view
    /// with an axis for the lanes take 1.44 and 0.55.
    pub(crate) fn as_channels(&self, x: &Tensor, lanes: i64, statistics: &mut Vec<Tensor>) -> Tensor {
        let size = x.size();
        let (share, channels, rest) = (size[0] / lanes, size[1], &size[2..]);
        let shape = |axes: &[i64]| [axes, rest].concat();
        let by_lane = x.reshape(shape(&[lanes, share, channels]).as_slice()).transpose(0, 1);
        let input = by_lane.reshape(shape(&[share, lanes * channels]).as_slice());
        let [mean, variance] = [(); 2].map(|()| Tensor::zeros([lanes * channels], (self.mean.kind(), x.device())));
        let [weight, bias] = [&self.weight, &self.bias].map(|of| of.repeat([lanes]));
        let y = batch_norm(&input, [&weight, &bias, &mean, &variance]);
        let sum = |of: Tensor| of.view([lanes, channels]).sum_dim_intlist([0_i64].as_slice(), false, Kind::Double);
        statistics.push(Tensor::cat(&[sum(mean), sum(variance)], 0));
        y.reshape(shape(&[share, lanes, channels]).as_slice()).transpose(0, 1).reshape(size.as_slice())
    }

    /// Lanes of any shares, one after the other.
    pub(crate) fn lane_by_lane(&self, x: &Tensor, shares: &[i64], statistics: &mut Vec<Tensor>) -> Tensor {
        let (sums, lanes): (Vec<_>, Vec<_>) = x
            .split_with_sizes(shares, 0)
            .iter()
            .map(|lane| {
                let (mean, variance) = (self.mean.zeros_like(), self.mean.zeros_like());
                let y = batch_norm(lane, [&self.weight, &self.bias, &mean, &variance]);
                (Tensor::cat(&[mean, variance], 0), y)
            })
            .unzip();
        statistics.push(Tensor::stack(&sums, 0).sum_dim_intlist([0_i64].as_slice(), false, Kind::Double));
        match lanes.as_slice() {
            [all] => all.shallow_clone(),
            lanes => Tensor::cat(lanes, 0),
        }
    }

    /// By the running statistics.
    pub(super) fn evaluate(&self, x: &Tensor) -> Tensor {
        let (mean, variance) = (Some(&self.mean), Some(&self.variance));
        x.batch_norm(Some(&self.weight), Some(&self.bias), mean, variance, false, 0.0, EPS, true)
    }
}

/// By the statistics of `x` itself, which `mean` and `variance` get: running ones that forget all at once.
fn batch_norm(x: &Tensor, [weight, bias, mean, variance]: [&Tensor; 4]) -> Tensor {
    x.batch_norm(Some(weight), Some(bias), Some(mean), Some(variance), true, 1.0, EPS, true)
}
