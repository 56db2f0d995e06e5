//! Steps that a GPU does from a recording (CUDA graphs): `ranks.graphs` of a run's spec.
//!
//! c10d's reducer starts its all-reduces in hooks of autograd, and a recording calls none. So here a step has two parts,
//! and what travels between ranks is started by hand: the first part is forward, loss, and backward through the
//! fully-connected layers, which have most of the gradients' bytes; while these travel, the second part is backward
//! through the convolutions. The order of collectives is the same whether a rank has recorded the step or not.
//!
//! Of each shape the first steps are computed operation by operation: libtorch then chooses among its kernels and makes
//! its work space. After them both parts are recorded once, and replayed from then on. A step in several parts of
//! lanes (`train.micro_batch`) is never recorded, nor is a shape when there are recordings of enough others. On a CPU
//! everything is the same, but that a replay computes once more what was recorded.
//!
//! **A recording reads and writes the same memory each time.** A step's inputs are copied to where the recording reads
//! them, and parameters are changed in place alone. So recordings live as long as a generation, which they begin after
//! its ranks have agreed on a state.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use proto::RunSpec;
use proto::pb::rank_heartbeat::Activity;
use proto::run_spec::network::is_within;
use tch::{Device, Tensor};

use super::alexnet::AlexNet;
use super::failure::Failure;
use super::step::{self, Computed, Measured};
use crate::data::batch::Batch;
use crate::data::normalise::Normalise;
use crate::torch::{self, Error, Graph, Group, Half, Op, Recorder, Result, Work, device};

/// Steps of a shape before it is recorded: as many as PyTorch's own `make_graphed_callables` takes.
const BEFORE: u32 = 3;
/// Shapes that are recorded. An epoch has two or three; each has its own inputs, and results on a rank alone.
const MOST: usize = 4;

/// Computes steps in two parts each.
pub(crate) struct Graphs {
    recorder: Recorder,
    dense: Bucket,
    convolutions: Bucket,
    shapes: HashMap<Shape, Seen>,
}

/// Samples of a step on all ranks, which the loss is divided by, and those of this rank's lanes.
type Shape = (u64, Vec<i64>);

#[derive(Default)]
struct Seen {
    steps: u32,
    recorded: Option<Recorded>,
}

/// A step of one shape.
struct Recorded {
    inputs: Inputs,
    first: (Graph, First),
    second: (Graph, Vec<Tensor>),
}

/// All that a step is computed of, beside the parameters; all of it on the device.
struct Inputs {
    images: Tensor,
    labels: Tensor,
    /// Of dropout.
    keys: Tensor,
}

impl Inputs {
    /// Copies these to where a recording reads.
    fn take(&self, given: &Self) -> Result<()> {
        self.images.shallow_clone().f_copy_(&given.images)?;
        self.labels.shallow_clone().f_copy_(&given.labels)?;
        self.keys.shallow_clone().f_copy_(&given.keys)?;
        Ok(())
    }
}

/// What the first part of a step gives.
struct First {
    /// As [`step::judged`] gives them, on the device.
    numbers: Tensor,
    /// Of the fully-connected layers.
    gradients: Vec<Tensor>,
    /// The output of the convolutions, and the loss's gradient by it, unless they are all frozen.
    cut: Option<(Tensor, Tensor)>,
}

/// What the parts of lanes before gave.
#[derive(Default)]
struct Earlier {
    numbers: Option<Tensor>,
    dense: Vec<Tensor>,
    convolutions: Vec<Tensor>,
}

impl Graphs {
    /// For a network whose parameters stay where they are.
    pub(super) fn new(spec: &RunSpec, group: &Group, model: &AlexNet) -> Result<Self> {
        let (convolutions, dense) = model.trained().into_iter().partition(|(name, _)| is_within(name, "features"));
        let compress = step::compression(spec.ranks.compress, group.world());
        let bucket = |of: Vec<(String, Tensor)>| {
            Bucket::new(of.into_iter().map(|(_, parameter)| parameter).collect(), group.world(), compress)
        };
        let (dense, convolutions) = (bucket(dense)?, bucket(convolutions)?);
        Ok(Self { recorder: Recorder::new(group.device())?, dense, convolutions, shapes: HashMap::new() })
    }

    /// As [`step::compute`].
    pub(super) fn compute(
        &mut self,
        spec: &RunSpec,
        group: &Group,
        model: &AlexNet,
        normalise: &Normalise,
        batch: &Batch,
        at: &dyn Fn(Activity),
    ) -> std::result::Result<Computed, Failure> {
        let Self { recorder, dense, convolutions, shapes } = self;
        let (dense, convolutions) = (&*dense, &*convolutions);
        let (device, world) = (normalise.device(), group.world());
        let share = step::share_of_mean(world, batch.samples);
        let mut parts = step::parts(&batch.shares, spec.train.micro_batch);
        let in_one = parts.len() == 1;
        let last = parts.pop().unwrap_or_default();
        let mut earlier = Earlier::default();
        let mut start = 0;
        let mut inputs = |shares: &[i64]| -> Result<Inputs> {
            let samples = shares.iter().sum::<i64>() as usize;
            let pixels = batch.pixels.part(start, samples);
            start += samples;
            let (images, labels) = normalise.apply(&pixels)?;
            let keys = model.dropout_keys(&step::keys(spec, batch.step, &pixels), device)?;
            Ok(Inputs { images, labels, keys })
        };
        let task = |shares, is_last| Task { spec, model, shares, share, dense, convolutions, is_last };

        for shares in parts {
            at(Activity::Forward);
            let (inputs, task) = (inputs(shares)?, task(shares, false));
            let mut first = recorder.aside(|| task.first(&inputs, &earlier))?;
            at(Activity::Backward);
            let convolutions = recorder.aside(|| task.second(first.cut.take(), &earlier))?;
            earlier = Earlier { numbers: Some(first.numbers), dense: first.gradients, convolutions };
        }

        at(Activity::Forward);
        let (inputs, task) = (inputs(last)?, task(last, true));
        let recorded = match in_one {
            true => recorded(shapes, (batch.samples, last.to_vec()), recorder, &task, &inputs)?,
            false => None,
        };
        let inputs = recorded.map_or(&inputs, |recorded| &recorded.inputs);
        let first = recorded.map(|recorded| replayed(&recorded.first)).transpose()?.flatten();
        let mut computed = None;
        let First { numbers, gradients, .. } = match first {
            Some(first) => first,
            None => computed.insert(recorder.aside(|| task.first(inputs, &earlier))?),
        };
        let summing = (world > 1).then(|| group.all_reduce(numbers, Op::Sum)).transpose()?;
        let dense_summing = dense.start(group)?;
        torch::set_gradients(&dense.parameters, gradients)?;
        let numbers = numbers.shallow_clone();

        at(Activity::Backward);
        let second = recorded.map(|recorded| replayed(&recorded.second)).transpose()?.flatten();
        let cut = computed.and_then(|first| first.cut);
        let gradients = match second {
            Some(gradients) => gradients,
            None => &recorder.aside(|| task.second(cut, &earlier))?,
        };
        torch::set_gradients(&convolutions.parameters, gradients)?;
        let (computed, mark) = (Instant::now(), group.mark()?);
        let convolutions_summing = convolutions.start(group)?;
        if let Some(summing) = summing {
            summing.wait(group.timeout())?;
        }
        for (bucket, summing) in [(dense, dense_summing), (convolutions, convolutions_summing)] {
            if let Some(summing) = summing {
                bucket.finish(summing, group)?;
            }
        }
        let measured = Measured::sent(&numbers.narrow(0, 0, 3), group)?;
        let exposed = if world > 1 {
            // A CPU has computed when it says so; a GPU when it comes to the mark.
            group.until(&mark)?;
            let began = if device.is_cuda() { Instant::now() } else { computed };
            measured.wait(group)?;
            began.elapsed()
        } else {
            Duration::ZERO
        };
        Ok(Computed { measured, statistics: numbers.narrow(0, 3, numbers.size()[0] - 3), exposed })
    }
}

/// The recording of a shape, with these inputs in their places; none if the shape has not been there often enough, or
/// too many others have.
fn recorded<'a>(
    shapes: &'a mut HashMap<Shape, Seen>,
    shape: Shape,
    recorder: &Recorder,
    task: &Task<'_>,
    inputs: &Inputs,
) -> Result<Option<&'a Recorded>> {
    let has_room = shapes.values().filter(|seen| seen.recorded.is_some()).count() < MOST;
    let seen = shapes.entry(shape).or_default();
    seen.steps = seen.steps.saturating_add(1);
    if seen.steps > BEFORE && seen.recorded.is_none() && has_room {
        seen.recorded =
            Some(record(recorder, task, inputs).map_err(|error| not_recorded(error, inputs.images.device()))?);
    }
    if let Some(recorded) = &seen.recorded {
        recorded.inputs.take(inputs)?;
    }
    Ok(seen.recorded.as_ref())
}

fn record(recorder: &Recorder, task: &Task<'_>, given: &Inputs) -> Result<Recorded> {
    let inputs = Inputs {
        images: given.images.f_zeros_like()?,
        labels: given.labels.f_zeros_like()?,
        keys: given.keys.f_zeros_like()?,
    };
    inputs.take(given)?;
    let earlier = Earlier::default();
    let (first_graph, mut first) = recorder.record(|| task.first(&inputs, &earlier))?;
    let cut = first.cut.take();
    let second = recorder.record(|| task.second(cut, &earlier))?;
    Ok(Recorded { inputs, first: (first_graph, first), second })
}

/// What a recording writes, replayed; None if it has to be computed.
fn replayed<T>((graph, result): &(Graph, T)) -> Result<Option<&T>> {
    Ok(graph.replay()?.then_some(result))
}

/// Whatever it was: the device may be in the middle of a recording, so that the process has to end.
fn not_recorded(error: Error, device: Device) -> Error {
    let what = "ranks.graphs = true: a step could not be recorded as a CUDA graph";
    // Most operations of `tch` do not say of which class their failure is.
    let error = match error {
        Error::OutOfMemory(_) => error,
        error => device::failure(device, &error.to_string()).unwrap_or(error),
    };
    match error {
        Error::OutOfMemory(said) => Error::OutOfMemory(format!(
            "{what}, which has memory of its own that ranks.graphs = false does without: {said}"
        )),
        error => Error::Device(format!("{what}, which ranks.graphs = false does without: {error}")),
    }
}

/// One step, or a part of its lanes.
struct Task<'a> {
    spec: &'a RunSpec,
    model: &'a AlexNet,
    shares: &'a [i64],
    share: f64,
    dense: &'a Bucket,
    convolutions: &'a Bucket,
    /// Whether the gradients are whole after it, so that they travel.
    is_last: bool,
}

impl Task<'_> {
    fn first(&self, inputs: &Inputs, earlier: &Earlier) -> Result<First> {
        let mut features = None;
        let mut cut = |x: Tensor| {
            if !x.requires_grad() {
                return x;
            }
            let leaf = x.detach().set_requires_grad(true);
            features = Some((x, leaf.shallow_clone()));
            leaf
        };
        let mut train = || self.model.train_cut(&inputs.images, self.shares, &inputs.keys, &mut cut);
        let forward = match step::autocast(self.spec.ranks.precision) {
            None => train(),
            Some(half) => torch::autocast(inputs.images.device(), half, train)?,
        };
        let (loss, numbers) = step::judged(self.spec, forward, &inputs.labels, self.share);
        let numbers = match &earlier.numbers {
            None => numbers,
            Some(sum) => sum + numbers,
        };
        let (features, leaf) = features.unzip();
        let leaves: Vec<Tensor> = self.dense.parameters.iter().map(Tensor::shallow_clone).chain(leaf).collect();
        let mut gradients = torch::gradients(&loss, None, &leaves)?;
        let cut = features.zip(gradients.split_off(self.dense.parameters.len()).pop());
        Ok(First { numbers, gradients: self.whole(self.dense, &earlier.dense, gradients)?, cut })
    }

    fn second(&self, cut: Option<(Tensor, Tensor)>, earlier: &Earlier) -> Result<Vec<Tensor>> {
        let Some((features, gradient)) = cut else { return Ok(Vec::new()) };
        let gradients = torch::gradients(&features, Some(&gradient), &self.convolutions.parameters)?;
        self.whole(self.convolutions, &earlier.convolutions, gradients)
    }

    /// With those of the parts before, and where they travel if there are no more.
    fn whole(&self, bucket: &Bucket, earlier: &[Tensor], gradients: Vec<Tensor>) -> Result<Vec<Tensor>> {
        for (sum, gradient) in earlier.iter().zip(&gradients) {
            let _ = sum.shallow_clone().f_add_(gradient)?;
        }
        let sums = if earlier.is_empty() { gradients } else { earlier.iter().map(Tensor::shallow_clone).collect() };
        if self.is_last { bucket.put(sums) } else { Ok(sums) }
    }
}

/// Parameters whose gradients travel together.
struct Bucket {
    parameters: Vec<Tensor>,
    /// None for a rank alone: its gradients stay where backward makes them.
    travel: Option<Travel>,
}

struct Travel {
    /// The gradients one after the other.
    all: Tensor,
    /// That of each parameter, in the same memory.
    places: Vec<Tensor>,
    world: i64,
    /// What a gradient is multiplied with before the sum over ranks.
    share: Tensor,
    compress: Option<Half>,
}

/// A bucket's sum over ranks, under way.
struct Summing {
    work: Work,
    /// What travels, if not the gradients themselves.
    small: Option<Tensor>,
}

impl Bucket {
    fn new(parameters: Vec<Tensor>, world: usize, compress: Option<Half>) -> Result<Self> {
        let Some(one) = parameters.first().filter(|_| world > 1) else {
            return Ok(Self { parameters, travel: None });
        };
        let sizes = parameters.iter().map(|parameter| parameter.numel() as i64);
        let all = Tensor::f_zeros([sizes.clone().sum::<i64>()], (one.kind(), one.device()))?;
        let starts = sizes.scan(0, |end, size| {
            *end += size;
            Some(*end - size)
        });
        let places = parameters.iter().zip(starts);
        let places = places.map(|(p, start)| all.f_as_strided(p.size(), p.stride(), start));
        let places = places.collect::<std::result::Result<_, _>>()?;
        let share = Tensor::from(1.0 / world as f64);
        Ok(Self { parameters, travel: Some(Travel { all, places, world: world as i64, share, compress }) })
    }

    /// Puts gradients to where they travel and will be averaged. As c10d's reducer does: divided before they are added
    /// up, which those in smaller numbers are when they are small.
    fn put(&self, gradients: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let Some(Travel { places, share, compress, .. }) = &self.travel else { return Ok(gradients) };
        for (place, gradient) in places.iter().zip(&gradients) {
            match compress {
                None => drop(gradient.f_mul_out(place, share)?),
                Some(_) => place.shallow_clone().f_copy_(gradient)?,
            }
        }
        Ok(places.iter().map(Tensor::shallow_clone).collect())
    }

    fn start(&self, group: &Group) -> Result<Option<Summing>> {
        let Some(Travel { all, world, compress, .. }) = &self.travel else { return Ok(None) };
        let small = |half: Half| all.f_to_kind(half.kind())?.f_div_scalar_(*world);
        let small = compress.map(small).transpose()?;
        let work = group.all_reduce(small.as_ref().unwrap_or(all), Op::Sum)?;
        Ok(Some(Summing { work, small }))
    }

    fn finish(&self, Summing { work, small }: Summing, group: &Group) -> Result<()> {
        work.wait(group.timeout())?;
        if let (Some(travel), Some(small)) = (&self.travel, small) {
            travel.all.shallow_clone().f_copy_(&small)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
