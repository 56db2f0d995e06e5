//! The networks.
//!
//! | | | parameters at width 1, crop 224, 1000 classes |
//! | --- | --- | --- |
//! | `alexnet` | torchvision's layout ("One weird trick", below) | 61,100,840 |
//! | `alexnet-bn` | the same with batch normalisation after each layer but the last | 61,110,184 |
//! | `alexnet-2012` | two groups, responses normalised across channels ("ImageNet classification", below) | 60,965,224 |
//! | `alexnet-slim` | `alexnet-bn` with global average pooling for the hidden fully-connected layers | 2,727,848 |
//!
//! Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014. Krizhevsky, Sutskever & Hinton,
//! "ImageNet classification with deep convolutional neural networks", 2012.
//!
//! Weights begin as in the source: uniform within 1 / sqrt(fan in), PyTorch's default (Kaiming's with a = sqrt 5),
//! biases too; but in `alexnet-2012` normal with a deviation of 0.01, and biases of 1 in the second, fourth and fifth
//! convolution and the hidden layers, 0 in the others.
//!
//! Batch normalisation here is per virtual rank ("ghost" batch norm, Hoffer et al., 2017): the share of each lane in a
//! batch is normalised alone. So the numbers are the same on any number of ranks, and nothing need be sent in forward
//! or backward. With it a layer has no bias of its own, since the norm would take it out again.

mod dropout;
mod formats;
pub(crate) mod norm;

use std::mem::MaybeUninit;

use proto::network::{self, Network};
use proto::run_spec::{Arch, Model};
use tch::{Device, Kind, Tensor};

use self::dropout::Keys;
use self::norm::Norm;
use crate::data::random;
use crate::torch::Result;
use crate::torch::tensor::{self, Named};

/// Weight of one step's statistics in the running ones (PyTorch's default).
const NORM_MOMENTUM: f64 = 0.1;

/// Of `alexnet-2012`: responses are divided by (2 + 1e-4 x the sum of the squares of 5 neighbouring channels)^(3/4).
const RESPONSE_CHANNELS: i64 = 5;
const RESPONSE_ALPHA: f64 = 1e-4;
const RESPONSE_BIAS: f64 = 2.0;

/// A network with its weights.
///
/// Tensors are named as in torchvision (`features.0.weight`, `classifier.1.bias`), a layer's norm as
/// `features.0.norm.weight`.
#[derive(Debug)]
pub(crate) struct AlexNet {
    features: Vec<Layer>,
    hidden: Vec<Layer>,
    output: Layer,
    /// As the paper of 2012 has it.
    paper: bool,
    groups: [u64; network::CONVOLUTIONS],
    stride: i64,
    /// Side of the map that the features are averaged to.
    grid: i64,
    dropout: f64,
}

/// What one rank's forward pass in training gives.
#[derive(Debug)]
pub(crate) struct Forward {
    /// [samples, classes].
    pub logits: Tensor,
    /// Per norm its channels' means, then their unbiased variances, each summed over the lanes of this rank, as f64;
    /// empty without norms.
    pub statistics: Tensor,
}

#[derive(Debug)]
struct Layer {
    name: String,
    weight: Tensor,
    bias: Option<Tensor>,
    norm: Option<Norm>,
}

impl AlexNet {
    /// A network for images of `crop` x `crop` pixels, with fresh weights: uniform within 1 / sqrt(fan in), as
    /// PyTorch's layers have by default (Kaiming's with a = sqrt 5), the same for a seed on every machine and for every
    /// `kind`.
    pub(crate) fn new(model: &Model, classes: i64, crop: i64, seed: u64, kind: Kind, device: Device) -> Self {
        let paper = model.arch == Arch::Alexnet2012;
        let network = Network::new(model, classes as u64, crop as u32);
        let layer = |(stream, of): (u64, &network::Layer)| {
            // The paper's second, fourth and fifth convolution and its hidden layers.
            let first = match paper {
                true => Init::Normal(if matches!(stream, 2 | 4..=7) { 1.0 } else { 0.0 }),
                false => Init::Uniform,
            };
            let shape: Vec<i64> = of.shape.iter().map(|&n| n as i64).collect();
            Layer::new(of.name.clone(), &shape, of.norm, first, random::key(&[seed, stream]), kind, device)
        };
        let mut layers: Vec<Layer> = (1..).zip(&network.layers).map(layer).collect();
        let output = layers.pop().expect("a network has layers");
        let hidden = layers.split_off(network::CONVOLUTIONS);
        let (stride, grid) = (network.stride.into(), network.grid.into());
        Self { features: layers, hidden, output, paper, groups: network.groups, stride, grid, dropout: model.dropout }
    }

    /// The same with the weights of its convolutions in NHWC. With images that are so, too, all up to the fully-connected
    /// layers is.
    pub(crate) fn in_nhwc(mut self) -> Self {
        for layer in &mut self.features {
            let weight = tensor::nhwc(&layer.weight.detach()).expect("convolutions have four dimensions");
            layer.weight = weight.set_requires_grad(true);
        }
        self
    }

    /// The forward pass in training on this rank's part of a batch: `images` [samples, 3, crop, crop], normalised, lane
    /// after lane; `shares`: how many samples each lane has, two at least; `keys`: one random key per sample and step,
    /// of which dropout is made.
    pub(crate) fn train(&self, images: &Tensor, shares: &[i64], keys: &[u64]) -> Forward {
        self.train_by(images, shares, Keys::Host(keys), &mut |x| x)
    }

    /// The same of nothing but what the device has: `keys` are those that [`Self::dropout_keys`] gives. The
    /// fully-connected layers get what `cut` makes of the output of the convolutions.
    pub(crate) fn train_cut(
        &self,
        images: &Tensor,
        shares: &[i64],
        keys: &Tensor,
        cut: &mut dyn FnMut(Tensor) -> Tensor,
    ) -> Forward {
        self.train_by(images, shares, Keys::Device(keys), cut)
    }

    /// Keys of samples as [`Self::train_cut`] takes them, on a device.
    pub(crate) fn dropout_keys(&self, keys: &[u64], device: Device) -> Result<Tensor> {
        dropout::of_layers(self.hidden.len().max(1) as u64, keys, device)
    }

    fn train_by(
        &self,
        images: &Tensor,
        shares: &[i64],
        keys: Keys<'_>,
        cut: &mut dyn FnMut(Tensor) -> Tensor,
    ) -> Forward {
        let mut statistics = Vec::new();
        let mut norm = |norm: &Norm, x: &Tensor| norm.train(x, shares, &mut statistics);
        let dropout = |layer: u64, x: Tensor| dropout::drop_units(&x, self.dropout, layer, keys);
        let logits = self.forward(images, &mut norm, &dropout, cut);
        let statistics = match statistics.is_empty() {
            true => Tensor::zeros([0], (Kind::Double, images.device())),
            false => Tensor::cat(&statistics, 0),
        };
        Forward { logits, statistics }
    }

    /// The logits [samples, classes] of normalised images [samples, 3, crop, crop], by the running statistics.
    pub(crate) fn evaluate(&self, images: &Tensor) -> Tensor {
        tch::no_grad(|| self.forward(images, &mut |norm, x| norm.evaluate(x), &|_, x| x, &mut |x| x))
    }

    /// Moves the running statistics towards those of a step: [`Forward::statistics`] summed over ranks and divided by
    /// the number of lanes.
    pub(crate) fn update_running(&self, statistics: &Tensor) {
        let buffers = self.buffers();
        let sizes: Vec<i64> =
            buffers.iter().map(|(_, buffer)| buffer.size1().expect("one value per channel")).collect();
        tch::no_grad(|| {
            for ((_, buffer), new) in buffers.iter().zip(statistics.split_with_sizes(&sizes, 0)) {
                let _ =
                    buffer.shallow_clone().lerp_(&new.to_device(buffer.device()).to_kind(buffer.kind()), NORM_MOMENTUM);
            }
        });
    }

    /// All that is learned by gradients, from input to output.
    pub(crate) fn parameters(&self) -> Named {
        let mut named = Vec::new();
        for layer in self.layers() {
            named.push((format!("{}.weight", layer.name), layer.weight.shallow_clone()));
            if let Some(bias) = &layer.bias {
                named.push((format!("{}.bias", layer.name), bias.shallow_clone()));
            }
            if let Some(norm) = &layer.norm {
                named.push((format!("{}.norm.weight", layer.name), norm.weight.shallow_clone()));
                named.push((format!("{}.norm.bias", layer.name), norm.bias.shallow_clone()));
            }
        }
        named
    }

    /// Those parameters that are not frozen.
    pub(crate) fn trained(&self) -> Named {
        self.parameters().into_iter().filter(|(_, parameter)| parameter.requires_grad()).collect()
    }

    /// Leaves these parameters as they are from now on.
    pub(crate) fn freeze(&self, is_frozen: impl Fn(&str) -> bool) {
        for (_, parameter) in self.parameters().into_iter().filter(|(name, _)| is_frozen(name)) {
            let _ = parameter.set_requires_grad(false);
        }
    }

    /// Parameters and running statistics, without what belongs to gradients.
    pub(crate) fn weights(&self) -> Named {
        let parameters = self.parameters().into_iter().map(|(name, parameter)| (name, parameter.detach()));
        parameters.chain(self.buffers()).collect()
    }

    /// The running statistics of the norms, in the order of [`Forward::statistics`].
    pub(crate) fn buffers(&self) -> Named {
        let mut named = Vec::new();
        for layer in self.layers() {
            if let Some(norm) = &layer.norm {
                named.push((format!("{}.norm.running_mean", layer.name), norm.mean.shallow_clone()));
                named.push((format!("{}.norm.running_var", layer.name), norm.variance.shallow_clone()));
            }
        }
        named
    }

    fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.features.iter().chain(&self.hidden).chain([&self.output])
    }

    /// What each convolution is like, and what follows.
    fn stages(&self) -> [Stage; 5] {
        let groups = self.groups;
        [(self.stride, 2, true), (1, 2, true), (1, 1, false), (1, 1, false), (1, 1, true)].map({
            let mut index = 0;
            move |(stride, padding, pools)| {
                index += 1;
                let lrn = self.paper && index <= 2;
                Stage { stride, padding, groups: groups[index - 1] as i64, lrn, pools }
            }
        })
    }

    fn forward(
        &self,
        images: &Tensor,
        normalise: &mut dyn FnMut(&Norm, &Tensor) -> Tensor,
        dropout: &dyn Fn(u64, Tensor) -> Tensor,
        cut: &mut dyn FnMut(Tensor) -> Tensor,
    ) -> Tensor {
        let mut activate = |layer: &Layer, x: Tensor| match &layer.norm {
            Some(norm) => normalise(norm, &x).relu_(),
            None => x.shallow_clone().relu_(),
        };
        let mut x = images.shallow_clone();
        for (layer, stage) in self.features.iter().zip(self.stages()) {
            let Stage { stride, padding, groups, .. } = stage;
            x = x.conv2d(&layer.weight, layer.bias.as_ref(), [stride, stride], [padding, padding], [1, 1], groups);
            x = activate(layer, x);
            if stage.lrn {
                x = local_response_norm(&x);
            }
            if stage.pools {
                x = x.max_pool2d([3, 3], [2, 2], [0, 0], [1, 1], false);
            }
        }
        x = cut(x.adaptive_avg_pool2d([self.grid, self.grid]).flatten(1, -1));
        for (index, layer) in self.hidden.iter().enumerate() {
            // torchvision drops inputs of the hidden layers; the paper drops their outputs.
            if !self.paper {
                x = dropout(index as u64, x);
            }
            x = activate(layer, x.linear(&layer.weight, layer.bias.as_ref()));
            if self.paper {
                x = dropout(index as u64, x);
            }
        }
        if self.hidden.is_empty() {
            x = dropout(0, x);
        }
        x.linear(&self.output.weight, self.output.bias.as_ref())
    }
}

/// A convolution's geometry, and what follows its activation: a normalisation of responses, a pooling of 3 x 3 and
/// stride 2.
#[derive(Debug, Clone, Copy)]
struct Stage {
    stride: i64,
    padding: i64,
    groups: i64,
    lrn: bool,
    pools: bool,
}

/// Divides each response by what its neighbours across channels have, at the same place.
fn local_response_norm(x: &Tensor) -> Tensor {
    let margin = RESPONSE_CHANNELS / 2;
    let squares = x.square().unsqueeze(1).constant_pad_nd([0, 0, 0, 0, margin, margin]);
    let window = [RESPONSE_CHANNELS, 1, 1];
    let mean = squares.avg_pool3d(window, [1, 1, 1], [0, 0, 0], false, true, None::<i64>).squeeze_dim(1);
    let root = (mean * (RESPONSE_ALPHA * RESPONSE_CHANNELS as f64) + RESPONSE_BIAS).sqrt();
    x / (&root * root.sqrt())
}

/// What a layer's weights are before it has learned.
#[derive(Debug, Clone, Copy)]
enum Init {
    /// Weights and biases within 1 / sqrt(fan in).
    Uniform,
    /// Weights with a deviation of 0.01, biases of this.
    Normal(f64),
}

impl Layer {
    fn new(name: String, shape: &[i64], norm: bool, init: Init, key: u64, kind: Kind, device: Device) -> Self {
        let fan_in: i64 = shape[1..].iter().product();
        let bound = 1.0 / (fan_in as f32).sqrt();
        let leaf =
            |values: Tensor, shape: &[i64]| values.view(shape).to_kind(kind).to_device(device).set_requires_grad(true);
        let values = |from: u64, shape: &[i64]| {
            tensor::filled(shape, |values: &mut [MaybeUninit<f32>]| match init {
                Init::Uniform => random::write_uniform(key, from, bound, values),
                Init::Normal(_) => random::write_normal(key, from, 0.01, values),
            })
        };
        let weight = leaf(values(0, shape), shape);
        let bias = (!norm).then(|| {
            let shape = &shape[..1];
            match init {
                Init::Uniform => leaf(values(weight.numel() as u64, shape), shape),
                Init::Normal(bias) => leaf(Tensor::full(shape, bias, (kind, device)), shape),
            }
        });
        let norm = norm.then(|| Norm::new(shape[0], kind, device));
        Self { name, weight, bias, norm }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(arch: Arch, width: f64, classes: i64, crop: i64) -> AlexNet {
        AlexNet::new(&Model { arch, width, dropout: 0.5 }, classes, crop, 1, Kind::Double, Device::Cpu)
    }

    fn images(samples: i64, crop: i64) -> Tensor {
        let values: Vec<f64> =
            (0..(samples * 3 * crop * crop) as u64).map(|i| f64::from(random::uniform(3, i)) - 0.5).collect();
        Tensor::from_slice(&values).view([samples, 3, crop, crop])
    }

    #[test]
    fn each_network_has_the_documented_number_of_parameters() {
        for (arch, documented) in [
            (Arch::Alexnet, 61_100_840),
            (Arch::AlexnetBn, 61_110_184),
            (Arch::Alexnet2012, 60_965_224),
            (Arch::AlexnetSlim, 2_727_848),
        ] {
            let model = Model { arch, width: 1.0, dropout: 0.5 };
            let network = AlexNet::new(&model, 1000, 224, 1, Kind::Float, Device::Cpu);
            let count: usize = network.parameters().iter().map(|(_, parameter)| parameter.numel()).sum();
            assert_eq!(count, documented, "{arch:?}");
        }
    }

    #[test]
    fn two_lanes_on_one_rank_give_what_each_gives_alone() {
        // Of other shares, and of the same.
        two_lanes(3, 4);
        two_lanes(3, 3);
    }

    fn two_lanes(a: i64, b: i64) {
        let (images, keys) = (images(a + b, 64), &[1, 2, 3, 4, 5, 6, 7][..(a + b) as usize]);
        let together = network(Arch::AlexnetBn, 0.125, 5, 64);
        let forward = together.train(&images, &[a, b], keys);
        let weights = Tensor::arange((a + b) * 5, (Kind::Double, Device::Cpu)).view([a + b, 5]).cos();
        (&forward.logits * &weights).sum(Kind::Double).backward();

        let apart = network(Arch::AlexnetBn, 0.125, 5, 64);
        let mut sum = forward.statistics.zeros_like();
        for (start, count) in [(0, a), (a, b)] {
            let lane =
                apart.train(&images.narrow(0, start, count), &[count], &keys[start as usize..][..count as usize]);
            let difference = (&lane.logits - forward.logits.narrow(0, start, count)).abs().max().double_value(&[]);
            assert!(difference < 1e-12, "logits differ by {difference}");
            (&lane.logits * weights.narrow(0, start, count)).sum(Kind::Double).backward();
            sum += lane.statistics;
        }
        for ((name, one), (_, other)) in together.parameters().iter().zip(apart.parameters()) {
            let (one, other) = (one.grad(), other.grad());
            let relative = (&one - &other).norm().double_value(&[]) / one.norm().double_value(&[]);
            assert!(relative < 1e-12, "{name}: {relative}");
        }
        assert!((&sum - &forward.statistics).abs().max().double_value(&[]) < 1e-12);

        together.update_running(&(&forward.statistics / 2.0));
        let buffers = together.buffers();
        let (name, mean) = &buffers[0];
        assert_eq!(name, "features.0.norm.running_mean");
        let expected = forward.statistics.narrow(0, 0, mean.size()[0]) * (0.1 / 2.0);
        assert!((mean - expected).abs().max().double_value(&[]) < 1e-15);
    }

    #[test]
    fn one_lane_has_the_running_statistics_of_pytorchs_batch_norm() {
        let network = network(Arch::AlexnetSlim, 0.125, 5, 64);
        let images = images(6, 64);
        let forward = network.train(&images, &[6], &[0; 6]);
        network.update_running(&forward.statistics);
        let first = &network.features[0];
        let x = images.conv2d(&first.weight, None::<Tensor>, [2, 2], [2, 2], [1, 1], 1);
        let (variance, mean) = x.var_mean_dim([0_i64, 2, 3].as_slice(), true, false);
        let norm = first.norm.as_ref().expect("a slim network is normed");
        assert!((&norm.mean - mean * 0.1).abs().max().double_value(&[]) < 1e-12);
        assert!((&norm.variance - (variance * 0.1 + 0.9)).abs().max().double_value(&[]) < 1e-12);
    }

    #[test]
    fn weights_begin_as_the_source_of_the_network_says() {
        let paper = network(Arch::Alexnet2012, 0.25, 5, 64);
        let weight = &paper.hidden[1].weight;
        let (deviation, mean) = weight.std_mean(true);
        assert!((deviation.double_value(&[]) - 0.01).abs() < 1e-4 && mean.double_value(&[]).abs() < 1e-4);
        let first = |layer: &Layer| layer.bias.as_ref().expect("no norm").double_value(&[0]);
        assert_eq!(paper.features.iter().map(first).collect::<Vec<_>>(), [0.0, 1.0, 0.0, 1.0, 1.0]);
        assert_eq!((first(&paper.hidden[0]), first(&paper.output)), (1.0, 0.0));
        let plain = network(Arch::Alexnet, 0.25, 5, 64);
        let weight = &plain.hidden[1].weight;
        let bound = 1.0 / (weight.size()[1] as f64).sqrt();
        let largest = weight.abs().max().double_value(&[]) / bound;
        let deviation = weight.std(true).double_value(&[]) / bound;
        assert!((0.999..=1.0001).contains(&largest) && (deviation - 1.0 / 3.0_f64.sqrt()).abs() < 1e-2);
    }

    #[test]
    fn every_crop_size_goes_through() {
        for crop in [64, 65, 95, 96, 97, 112, 160, 224, 300] {
            for arch in [Arch::Alexnet, Arch::AlexnetBn, Arch::Alexnet2012, Arch::AlexnetSlim] {
                let logits = network(arch, 0.125, 7, crop).evaluate(&images(2, crop));
                assert_eq!(logits.size(), [2, 7], "{arch:?} {crop}");
            }
        }
    }
}
