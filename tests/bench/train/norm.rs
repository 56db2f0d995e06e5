//! A batch norm of each lane's part of a batch alone, on lanes of equal shares: as [`Norm::train`] does it, and in two
//! other ways.

use anyhow::{Result, ensure};
use proto::RunSpec;
use proto::network::Network;
use tch::{Device, Kind, Tensor};

use super::{Clock, Figures};
use crate::learn::alexnet::norm::{EPS, Norm, batch_norm};
use crate::torch::device;

/// What normalises: the norm, its input, how many lanes, and where the statistics go.
type Way = fn(&Norm, &Tensor, i64, &mut Vec<Tensor>) -> Tensor;

const WAYS: [(&str, Way); 3] = [("lanes", lane_by_lane), ("view", on_view), ("channels", as_channels)];

/// Forward and backward through all norms of the spec's network, each on an input of its size, so many times in each
/// way; figures of each.
///
/// # Errors
/// If one of them computes something else.
pub fn ways(spec: &RunSpec, times: u64, device: &str) -> Result<Vec<Figures>> {
    tch::set_num_threads(spec.ranks.threads.max(1) as i32);
    let device = device::parse(device)?;
    let lanes = i64::from(spec.ranks.lanes);
    let samples = i64::from(spec.train.batch) / lanes * lanes;
    let shapes = inputs(spec, samples);
    let places: Vec<(Norm, Tensor, Tensor)> = shapes
        .iter()
        .map(|shape| {
            let normal = || Tensor::randn(shape.as_slice(), (Kind::Float, device));
            (Norm::new(shape[1], Kind::Float, device), normal().set_requires_grad(true), normal())
        })
        .collect();
    let pass = |way: Way| {
        let mut all = Vec::new();
        for (norm, x, gradient) in &places {
            let mut statistics = Vec::new();
            let y = way(norm, x, lanes, &mut statistics);
            let of = [x, &norm.weight, &norm.bias];
            let gradients = Tensor::run_backward(&[(&y * gradient).sum(Kind::Float)], &of, false, false);
            all.extend([y.detach()].into_iter().chain(gradients).chain(statistics));
        }
        settle(device);
        all
    };
    let found = WAYS.map(|(_, way)| pass(way));
    for ((what, _), other) in WAYS.iter().zip(&found).skip(1) {
        for (mine, other) in found[0].iter().zip(other) {
            let difference = (mine - other).norm().double_value(&[]) / mine.norm().double_value(&[]);
            ensure!(difference < 1e-4, "{what} differs from lane by lane by {difference}");
        }
    }
    drop(found);
    let nothing = |(what, _): (&str, Way)| Figures { what: what.to_owned(), images: 0, cpu: 0.0, wall: 0.0, rss: 0.0 };
    let mut figures = WAYS.map(nothing);
    // In turns, so that whatever else the machine does concerns all of them.
    for _ in 0..times {
        for ((what, way), sum) in WAYS.into_iter().zip(&mut figures) {
            let clock = Clock::start()?;
            pass(way);
            let took = clock.stop(what, samples as u64)?;
            (sum.images, sum.cpu, sum.wall) = (sum.images + took.images, sum.cpu + took.cpu, sum.wall + took.wall);
            sum.rss = took.rss;
        }
    }
    Ok(figures.into())
}

fn lane_by_lane(norm: &Norm, x: &Tensor, lanes: i64, statistics: &mut Vec<Tensor>) -> Tensor {
    norm.train(x, &vec![x.size()[0] / lanes; lanes as usize], statistics)
}

/// Mean and variance of a view with an axis for the lanes.
fn on_view(norm: &Norm, x: &Tensor, lanes: i64, statistics: &mut Vec<Tensor>) -> Tensor {
    let (samples, channels) = (x.size()[0], x.size()[1]);
    let view = x.view([lanes, samples / lanes, channels, -1]);
    let values = view.size()[1] * view.size()[3];
    let (variance, mean) = view.var_mean_correction([1_i64, 3].as_slice(), 0, true);
    let scale = (&variance + EPS).rsqrt() * norm.weight.view([1, 1, channels, 1]);
    let shift = norm.bias.view([1, 1, channels, 1]) - &mean * &scale;
    let unbiased = variance * (values as f64 / (values - 1) as f64);
    let sum = |of: Tensor| of.detach().sum_dim_intlist([0_i64].as_slice(), false, Kind::Double).view([channels]);
    statistics.push(Tensor::cat(&[sum(mean), sum(unbiased)], 0));
    // `view` x `scale` + `shift` in one pass.
    shift.addcmul(&view, &scale).view(x.size().as_slice())
}

/// Lanes as so many more channels, of which libtorch's kernel takes each by itself: one call for all, for which samples
/// change places.
fn as_channels(norm: &Norm, x: &Tensor, lanes: i64, statistics: &mut Vec<Tensor>) -> Tensor {
    let size = x.size();
    let (share, channels, rest) = (size[0] / lanes, size[1], &size[2..]);
    let shape = |axes: &[i64]| [axes, rest].concat();
    let by_lane = x.reshape(shape(&[lanes, share, channels]).as_slice()).transpose(0, 1);
    let input = by_lane.reshape(shape(&[share, lanes * channels]).as_slice());
    let [mean, variance] = [(); 2].map(|()| Tensor::zeros([lanes * channels], (Kind::Float, x.device())));
    let [weight, bias] = [&norm.weight, &norm.bias].map(|of| of.repeat([lanes]));
    let y = batch_norm(&input, [&weight, &bias, &mean, &variance]);
    let sum = |of: Tensor| of.view([lanes, channels]).sum_dim_intlist([0_i64].as_slice(), false, Kind::Double);
    statistics.push(Tensor::cat(&[sum(mean), sum(variance)], 0));
    y.reshape(shape(&[share, lanes, channels]).as_slice()).transpose(0, 1).reshape(size.as_slice())
}

/// The sizes of what the network's norms are given.
fn inputs(spec: &RunSpec, samples: i64) -> Vec<Vec<i64>> {
    let network = Network::new(&spec.model, 1000, spec.input.crop);
    let mut side = i64::from(spec.input.crop);
    let mut inputs = Vec::new();
    for (index, layer) in network.layers.iter().enumerate().filter(|(_, layer)| layer.norm) {
        let mut input = vec![samples, layer.shape[0] as i64];
        if let [_, _, window, _] = layer.shape[..] {
            let (stride, padding) = if index == 0 { (i64::from(network.stride), 2) } else { (1, window as i64 / 2) };
            side = (side + 2 * padding - window as i64) / stride + 1;
            input.extend([side, side]);
            if matches!(index, 0 | 1 | 4) {
                side = (side - 3) / 2 + 1;
            }
        }
        inputs.push(input);
    }
    inputs
}

/// Waits until a device has done what it was given.
pub(super) fn settle(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}
