//! One step: forward, loss, backward, learning rate, optimizer, and what is counted.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use proto::RunSpec;
use proto::network::is_of_output;
use proto::pb::rank_heartbeat::Activity;
use proto::run_spec::{Compress, Layout, Precision, Ranks, Train};
use tch::{Device, Kind, Reduction, Tensor};

use super::alexnet::{AlexNet, Forward};
use super::failure::Failure;
use super::history::Sums;
use crate::data::batch::{Batch, Pixels};
use crate::data::normalise::Normalise;
use crate::data::random;
use crate::torch::tensor::{self, Named};
use crate::torch::{self, Group, Half, Mark, Op, Reducer, Sgd, SgdSettings};

/// What forward and backward of all ranks gave, beside the gradients.
#[derive(Debug)]
pub(crate) struct Computed {
    /// Loss and hits.
    pub measured: Measured,
    /// The norms' statistics as in [`super::alexnet::Forward`], on the device.
    pub statistics: Tensor,
    /// Communication that no computation hid.
    pub exposed: Duration,
}

/// Loss and hits of a step, on their way from the device.
#[derive(Debug)]
pub(crate) struct Measured {
    /// In memory of the host: summed loss, top-1 and top-5 hits, once the device has come to the mark.
    numbers: Tensor,
    mark: Mark,
}

impl Measured {
    /// Has the device send what it has in these three numbers.
    pub(super) fn sent(numbers: &Tensor, group: &Group) -> Result<Self, Failure> {
        let numbers = numbers.f_to_device_(Device::Cpu, Kind::Double, true, false)?;
        Ok(Self { numbers, mark: group.mark()? })
    }

    /// Whether they are here.
    pub(crate) fn is_here(&self) -> Result<bool, Failure> {
        Ok(self.mark.reached()?)
    }

    /// Waits until they are.
    pub(crate) fn wait(&self, group: &Group) -> Result<(), Failure> {
        Ok(group.until(&self.mark)?)
    }

    /// What they say, once they are here, of the step of that number and so many samples. A loss that is not finite is
    /// refused.
    pub(crate) fn sums(&self, step: u64, samples: u64) -> Result<Sums, Failure> {
        let number = |i| self.numbers.double_value(&[i]);
        let sums = Sums { loss: number(0), top1: number(1), top5: number(2), samples: samples as f64 };
        if !sums.loss.is_finite() {
            let loss = format!("the loss of step {step} is {}: choose a lower train.learning_rate", sums.loss);
            return Err(Failure::Diverged(loss));
        }
        Ok(sums)
    }
}

/// Computes a rank's part of a step, in parts of whole lanes, and averages the gradients over the group's ranks; `at`
/// hears what it is at.
///
/// **Where there are other ranks, Ok means that every collective has completed on this one.** A rank alone has given
/// its device all of it to do, and waits for nothing: a device that fails ends its process, and with it all that was
/// applied there.
pub(crate) fn compute(
    spec: &RunSpec,
    group: &Group,
    model: &AlexNet,
    normalise: &Normalise,
    reducer: &Reducer,
    batch: &Batch,
    at: &dyn Fn(Activity),
) -> Result<Computed, Failure> {
    let (device, world) = (normalise.device(), group.world());
    let mut measured: Option<Tensor> = None;
    let mut summing = None;
    reducer.begin()?;
    let parts = parts(&batch.shares, spec.train.micro_batch);
    let (mut start, last) = (0, parts.len() - 1);
    for (i, shares) in parts.into_iter().enumerate() {
        let samples: i64 = shares.iter().sum();
        let pixels = batch.pixels.part(start as usize, samples as usize);
        start += samples;
        at(Activity::Forward);
        let (images, labels) = normalise.apply(&pixels)?;
        let keys = keys(spec, batch.step, &pixels);
        let forward = match autocast(spec.ranks.precision) {
            None => model.train(&images, shares, &keys),
            Some(half) => torch::autocast(device, half, || model.train(&images, shares, &keys))?,
        };
        let (share, these) = judged(spec, forward, &labels, share_of_mean(world, batch.samples));
        let sum = match measured {
            None => these,
            Some(sum) => sum + these,
        };
        at(Activity::Backward);
        if i < last {
            reducer.accumulate(&share)?;
        } else {
            // Under way while backward runs.
            summing = (world > 1).then(|| group.all_reduce(&sum, Op::Sum)).transpose()?;
            reducer.backward(&share)?;
        }
        measured = Some(sum);
    }
    if let Some(summing) = summing {
        summing.wait(group.timeout())?;
    }
    let all = measured.context("a rank without lanes")?;
    let measured = Measured::sent(&all.narrow(0, 0, 3), group)?;
    let exposed = if world > 1 { reducer.complete(&measured.mark)? } else { Duration::ZERO };
    Ok(Computed { measured, statistics: all.narrow(0, 3, all.size()[0] - 3), exposed })
}

/// Of each sample the key of what is random for it in a step.
pub(super) fn keys(spec: &RunSpec, step: u64, pixels: &Pixels) -> Vec<u64> {
    pixels.keys.iter().map(|&key| random::key(&[spec.seed, step, key])).collect()
}

/// What a rank sends into backward is its loss, a sum, times this: gradients' sum over ranks is divided by their number.
pub(super) fn share_of_mean(world: usize, samples: u64) -> f64 {
    world as f64 / samples as f64
}

/// The loss times `share`, and in f64 one after the other the loss, top-1 and top-5 hits, and statistics.
pub(super) fn judged(spec: &RunSpec, forward: Forward, labels: &Tensor, share: f64) -> (Tensor, Tensor) {
    let logits = forward.logits.to_kind(kind(spec.ranks.precision));
    let loss = loss(&logits, labels, spec.train.label_smoothing);
    let share = &loss * share;
    let loss = loss.detach().to_kind(Kind::Double).reshape([1]);
    (share, Tensor::cat(&[loss, correct(&logits, labels), forward.statistics], 0))
}

/// Consecutive lanes that together have at most `most` samples, at least one at a time; all if `most` is 0.
pub(super) fn parts(shares: &[i64], most: u32) -> Vec<&[i64]> {
    let (mut parts, mut start, mut samples) = (Vec::new(), 0, 0);
    for (i, share) in shares.iter().enumerate() {
        if i > start && most > 0 && samples + share > i64::from(most) {
            parts.push(&shares[start..i]);
            (start, samples) = (i, 0);
        }
        samples += share;
    }
    parts.push(&shares[start..]);
    parts
}

/// The cross entropy of `logits` [samples, classes] with `labels` [samples] (i64), summed over samples.
pub(crate) fn loss(logits: &Tensor, labels: &Tensor, label_smoothing: f64) -> Tensor {
    logits.cross_entropy_loss(labels, None::<Tensor>, Reduction::Sum, -100, label_smoothing)
}

/// How many samples have their label as the first, and among the first five, of the classes by logit: [top1, top5] as
/// f64.
pub(crate) fn correct(logits: &Tensor, labels: &Tensor) -> Tensor {
    let k = logits.size()[1].min(5);
    let (_, best) = logits.detach().topk(k, 1, true, true);
    let hits = best.eq_tensor(&labels.unsqueeze(1)).to_kind(Kind::Double);
    Tensor::stack(&[hits.narrow(1, 0, 1).sum(Kind::Double), hits.sum(Kind::Double)], 0)
}

/// The network of a run as it begins, laid out for a device.
pub(crate) fn network(spec: &RunSpec, classes: i64, device: Device) -> AlexNet {
    let (crop, kind) = (i64::from(spec.input.crop), kind(spec.ranks.precision));
    let model = AlexNet::new(&spec.model, classes, crop, spec.seed, kind, device);
    if is_nhwc(&spec.ranks, device) { model.in_nhwc() } else { model }
}

/// The optimizer of a network, as a spec has it.
pub(crate) fn optimizer(model: &AlexNet, train: &Train) -> Sgd {
    let parameters = model.trained();
    let head = parameters.iter().take_while(|(name, _)| !is_of_output(name)).count();
    let &Train { momentum, weight_decay, clip_norm, head_factor, .. } = train;
    Sgd::new(parameters, SgdSettings { momentum, weight_decay, clip_norm, head, head_factor })
}

/// One whole step on one rank from the seed's weights, for comparison with another implementation.
///
/// `batch` is a safetensors file with `images` [samples, 3, crop, crop] (f32, normalised) and `labels` [samples] (i64).
/// `out` will be one with `before.NAME`, `gradient.NAME` and `after.NAME` of each parameter (and `after.NAME` of each
/// running statistic), `logits` and `loss` (the mean over samples). The step has the spec's peak learning rate; the
/// samples are shared out to `ranks.lanes` lanes in their order.
pub fn reference_step(spec: &RunSpec, classes: i64, batch: &Path, out: &Path) -> anyhow::Result<()> {
    let tensors = Tensor::read_safetensors(batch).with_context(|| format!("failed to read {}", batch.display()))?;
    let get = |name: &str| {
        let found = tensors.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor);
        found.with_context(|| format!("{}: no tensor {name}", batch.display()))
    };
    let written = stepped(spec, classes, Device::Cpu, (get("images")?, get("labels")?))?;
    Tensor::write_safetensors(&written, out).with_context(|| format!("failed to write {}", out.display()))
}

/// That step on any device, of images and labels in the host's memory; its tensors come there, too.
pub(crate) fn stepped(
    spec: &RunSpec,
    classes: i64,
    device: Device,
    (images, labels): (&Tensor, &Tensor),
) -> anyhow::Result<Named> {
    let images = images.f_to_device(device)?.f_to_kind(kind(spec.ranks.precision))?;
    let labels = labels.f_to_device(device)?;
    let images = if is_nhwc(&spec.ranks, device) { tensor::nhwc(&images)? } else { images };
    let (samples, lanes) = (images.size()[0], i64::from(spec.ranks.lanes));
    let shares: Vec<i64> = (0..lanes).map(|lane| samples * (lane + 1) / lanes - samples * lane / lanes).collect();
    let keys: Vec<u64> = (0..samples as u64).map(|sample| random::key(&[spec.seed, sample])).collect();

    let model = network(spec, classes, device);
    let mut sgd = optimizer(&model, &spec.train);
    let mut written: Named = Vec::new();
    let copied = |tensor: Tensor| tensor.detach().copy().to_device(Device::Cpu).contiguous();
    let mut write = |prefix: &str, named: Named| {
        written.extend(named.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), copied(tensor))));
    };
    write("before.", model.parameters());
    let forward = model.train(&images, &shares, &keys);
    let loss = loss(&forward.logits, &labels, spec.train.label_smoothing) / samples as f64;
    loss.f_backward()?;
    write("gradient.", model.parameters().into_iter().map(|(name, parameter)| (name, parameter.grad())).collect());
    sgd.step(spec.train.learning_rate)?;
    model.update_running(&(forward.statistics / lanes as f64));
    write("after.", model.parameters());
    write("after.", model.buffers());
    write("", vec![("logits".to_owned(), forward.logits), ("loss".to_owned(), loss)]);
    Ok(written)
}

/// libtorch's name of a precision.
pub(crate) fn kind(precision: Precision) -> Kind {
    match precision {
        Precision::F32 | Precision::Tf32 | Precision::Bf16 => Kind::Float,
        Precision::F64 => Kind::Double,
    }
}

/// Whether a device has images and weights of convolutions in NHWC.
pub(crate) fn is_nhwc(ranks: &Ranks, device: Device) -> bool {
    match ranks.layout {
        Layout::Auto => device.is_cuda() && ranks.precision == Precision::Bf16,
        Layout::Nchw => false,
        Layout::Nhwc => true,
    }
}

/// Makes a device ready to compute in a precision, for this process.
pub(crate) fn prepare(device: Device, precision: Precision) -> torch::Result<()> {
    torch::device::prepare(device, precision == Precision::Tf32)
}

/// What convolutions and matrix products compute in, if not in that.
pub(super) fn autocast(precision: Precision) -> Option<Half> {
    (precision == Precision::Bf16).then_some(Half::Bf16)
}

/// What gradients travel as between `world` ranks, if not as they are.
pub(crate) fn compression(compress: Compress, world: usize) -> Option<Half> {
    match compress {
        _ if world == 1 => None,
        Compress::None => None,
        Compress::Fp16 => Some(Half::Fp16),
        Compress::Bf16 => Some(Half::Bf16),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::run_spec::{Arch, Model};

    #[test]
    fn a_step_is_computed_in_parts_of_whole_lanes() {
        let shares = [3, 4, 3, 4];
        assert_eq!(parts(&shares, 0), [&shares[..]]);
        assert_eq!(parts(&shares, 7), [&shares[..2], &shares[2..]]);
        assert_eq!(parts(&shares, 10), [&shares[..3], &shares[3..]]);
        assert_eq!(parts(&shares, 1).len(), 4);
    }

    #[test]
    fn top_1_and_top_5_are_counted() {
        let logits = Tensor::from_slice(&[9.0_f32, 8.0, 7.0, 6.0, 5.0, 4.0]).view([1, 6]).repeat([3, 1]);
        let counts = correct(&logits, &Tensor::from_slice(&[0_i64, 4, 5]));
        assert_eq!(Vec::<f64>::try_from(&counts).expect("two numbers"), [1.0, 2.0]);
        let two_classes = correct(&logits.narrow(1, 0, 2), &Tensor::from_slice(&[1_i64, 1, 0]));
        assert_eq!(Vec::<f64>::try_from(&two_classes).expect("two numbers"), [1.0, 3.0]);
    }

    #[test]
    fn the_loss_is_a_sum_with_label_smoothing() {
        // Two classes with logits ln 3 and 0: probabilities 3/4 and 1/4.
        let logits = Tensor::from_slice(&[3.0_f64.ln(), 0.0]).view([1, 2]).repeat([2, 1]);
        let sum = loss(&logits, &Tensor::from_slice(&[0_i64, 1]), 0.2).double_value(&[]);
        let (right, wrong) = (-(0.75_f64.ln()), -(0.25_f64.ln()));
        let expected = (0.9 * right + 0.1 * wrong) + (0.9 * wrong + 0.1 * right);
        assert!((sum - expected).abs() < 1e-12, "{sum} is not {expected}");
    }

    #[test]
    fn sgd_counts_as_pytorch_does() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (batch, out) = (dir.path().join("batch"), dir.path().join("out"));
        let images = Tensor::arange(4 * 3 * 64 * 64, (Kind::Float, Device::Cpu)).sin().view([4, 3, 64, 64]);
        let labels = Tensor::from_slice(&[0_i64, 1, 2, 0]);
        Tensor::write_safetensors(&[("images", &images), ("labels", &labels)], &batch).expect("a folder to write to");
        let spec = RunSpec::from_toml(
            "dataset = \"d\"
            model = { arch = \"alexnet-slim\", width = 0.125, dropout = 0.0 }
            input = { crop = 64 }
            train = { batch = 4, learning_rate = 0.5, momentum = 0.9, weight_decay = 0.1 }
            ranks = { max = 1, lanes = 1, precision = \"f64\" }",
        )
        .expect("a sound spec");
        reference_step(&spec, 3, &batch, &out).expect("a sound batch");

        let written = Tensor::read_safetensors(&out).expect("own output");
        let get = |name: &str| &written.iter().find(|(other, _)| other == name).expect(name).1;
        let name = "features.3.weight";
        let [before, gradient, after] = ["before", "gradient", "after"].map(|prefix| get(&format!("{prefix}.{name}")));
        let expected = before - (gradient + before * 0.1) * 0.5;
        assert!((after - expected).abs().max().double_value(&[]) < 1e-12);
        assert!(gradient.abs().max().double_value(&[]) > 0.0);
        assert!((get("loss").double_value(&[]) - 3.0_f64.ln()).abs() < 1.0);
    }

    #[test]
    fn a_step_in_bf16_has_nearly_the_gradients_of_one_in_f32() {
        let samples = 8;
        let value = |i: u64| random::uniform(random::key(&[5]), i) - 0.5;
        let images: Vec<f32> = (0..samples * 3 * 64 * 64).map(value).collect();
        let images = Tensor::from_slice(&images).view([samples as i64, 3, 64, 64]);
        let labels = Tensor::arange(samples as i64, (Kind::Int64, Device::Cpu));
        let keys: Vec<u64> = (0..samples).collect();
        let gradients = |half: Option<Half>| -> Vec<Tensor> {
            let spec = Model { arch: Arch::Alexnet, width: 0.125, dropout: 0.5 };
            let model = AlexNet::new(&spec, 10, 64, 1, Kind::Float, Device::Cpu);
            let train = || model.train(&images, &[8], &keys).logits;
            let logits = match half {
                None => train(),
                Some(half) => torch::autocast(Device::Cpu, half, train).expect("libtorch has it"),
            };
            assert_eq!(logits.kind(), if half.is_some() { Kind::BFloat16 } else { Kind::Float });
            loss(&logits.to_kind(Kind::Float), &labels, 0.0).backward();
            model.parameters().into_iter().map(|(_, parameter)| parameter.grad()).collect()
        };
        for (whole, half) in gradients(None).iter().zip(gradients(Some(Half::Bf16))) {
            assert_eq!(half.kind(), Kind::Float, "what is summed and applied keeps its precision");
            let cosine = whole.flatten(0, -1).dot(&half.flatten(0, -1)) / (whole.norm() * half.norm());
            let cosine = cosine.double_value(&[]);
            assert!(cosine > 0.95 && cosine < 1.0 - 1e-9, "{:?}: {cosine}", whole.size());
        }
    }
}
