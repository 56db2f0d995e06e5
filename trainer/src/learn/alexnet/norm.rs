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

    /// Lane by lane with libtorch's own kernel, so that a lane's numbers cannot depend on which other lanes stand
    /// beside it: `x` [samples, channels, ...] has `shares[i]` samples of lane i, lane after lane. `statistics` gets
    /// the channels' means, then their unbiased variances, each summed over lanes in f64, so that the order of summing
    /// over lanes and ranks does not show in f32.
    ///
    /// Where shares are equal there are other ways (`tests/bench/train/norm.rs`). On a CPU none of them is faster:
    /// lanes as so many more channels of one call take 1.1 times as long, mean and variance of a view with an axis for
    /// the lanes 2.3 times.
    pub(crate) fn train(&self, x: &Tensor, shares: &[i64], statistics: &mut Vec<Tensor>) -> Tensor {
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
pub(crate) fn batch_norm(x: &Tensor, [weight, bias, mean, variance]: [&Tensor; 4]) -> Tensor {
    x.batch_norm(Some(weight), Some(bias), Some(mean), Some(variance), true, 1.0, EPS, true)
}
