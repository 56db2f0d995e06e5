//! What a training run is: chosen once, at its submission, and stored as the run's `spec.json`.

pub mod network;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::network::{Network, is_within};
use crate::dataset_spec::{SpecError, check};

/// With fewer samples a lane's statistics are mostly noise ...
const FEW_SAMPLES: u32 = 8;
/// ... and lanes that nobody chose have this many.
const GOOD_SAMPLES: u32 = 16;
/// Lanes that nobody chose are no more than this.
const MOST_LANES: u32 = 8;

/// The description of a run, as a user writes it in TOML. Every field but `dataset` has a default; unknown keys are
/// refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// The dataset's name.
    pub dataset: String,
    /// The manifest's version; the latest one if left out. Always there in the stored spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<u32>,
    /// The rule by which epochs are shared out; the newest one if left out. Stored specs of runs that were submitted
    /// before there was a second one do not have it: see [`RunSpec::plan`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// Seed of weights, order, augmentation and dropout.
    #[serde(default)]
    pub seed: u64,
    /// The network.
    #[serde(default)]
    pub model: Model,
    /// From stored image to network input.
    #[serde(default)]
    pub input: Input,
    /// How it learns.
    #[serde(default)]
    pub train: Train,
    /// On how many devices, and how they talk.
    #[serde(default)]
    pub ranks: Ranks,
    /// What is kept on the way.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
}

/// How the samples of an epoch are shared out to its steps and lanes. A run resumes by the one that it was submitted
/// with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Plan {
    /// Each lane spreads its own samples over all steps, so that lanes may differ by one sample in any step.
    Spread = 1,
    /// All lanes have equally many samples in each step but the last of an epoch, where some may have one more.
    Equal = 2,
}

impl Plan {
    /// That of new runs.
    pub const NEWEST: Self = Self::Equal;
}

impl TryFrom<u32> for Plan {
    type Error = String;

    fn try_from(number: u32) -> Result<Self, String> {
        match number {
            1 => Ok(Self::Spread),
            2 => Ok(Self::Equal),
            _ => Err(format!("plan = {number}: must be 1 or 2")),
        }
    }
}

impl From<Plan> for u32 {
    fn from(plan: Plan) -> Self {
        plan as Self
    }
}

/// The network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Which layers.
    pub arch: Arch,
    /// Factor on the channels of all layers, 0.1 to 4.
    pub width: f64,
    /// Probability that a unit before a fully-connected layer is dropped while training, 0 to 0.9.
    pub dropout: f64,
}

impl Model {
    /// Whether lanes normalise their parts of a batch.
    pub fn is_normalised(&self) -> bool {
        matches!(self.arch, Arch::AlexnetBn | Arch::AlexnetSlim)
    }
}

/// The networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arch {
    /// torchvision's AlexNet (the layout of "One weird trick", Krizhevsky 2014), without normalisation layers.
    Alexnet,
    /// The same with batch normalisation after each convolution and each hidden fully-connected layer.
    AlexnetBn,
    /// The network of the paper of 2012: convolutions in two groups, responses normalised across channels.
    #[serde(rename = "alexnet-2012")]
    Alexnet2012,
    /// `alexnet-bn` with a global average pooling head instead of the fully-connected layers: small enough for a phone.
    AlexnetSlim,
}

/// From stored image to network input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Input {
    /// Side of the square that the network sees, in pixels; to evaluate, it is cut out of the centre.
    pub crop: u32,
    /// What is cut out to train.
    pub cut: Cut,
    /// With `resized`: the least share of an image's area that is cut out, 0.01 to 1.
    pub min_area: f64,
    /// With `resized`: the most that what is cut out is wider than high, or higher than wide, 1 to 10.
    pub max_aspect: f64,
    /// Whether images are mirrored at random while training.
    pub flip: bool,
    /// Pixel values are multiplied by a random factor from 1 - this to 1 + this while training, 0 to 0.9.
    pub brightness: f64,
    /// The same of the distance of pixels from their image's mean grey, 0 to 0.9.
    pub contrast: f64,
    /// The same of the distance of pixels from their own grey, 0 to 0.9.
    pub saturation: f64,
}

/// What is cut out of an image to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cut {
    /// The square of `crop` pixels at a random place, as in AlexNet's paper.
    Translate,
    /// A part of random size, shape and place, scaled to the square (torchvision's `RandomResizedCrop`).
    Resized,
}

/// How it learns: SGD with momentum, as in the paper.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Passes over the training samples.
    pub epochs: u32,
    /// Samples in one step, over all ranks together.
    pub batch: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Of SGD, 0 to less than 1.
    pub momentum: f64,
    /// L2 penalty.
    pub weight_decay: f64,
    /// Probability that is spread over the wrong classes, 0 to less than 1.
    pub label_smoothing: f64,
    /// Epochs over which the learning rate rises from 0 to its peak.
    pub warmup_epochs: f64,
    /// How it falls afterwards.
    pub schedule: Schedule,
    /// With `step`: the learning rate is divided by 10 each time this many epochs have passed.
    pub step_epochs: f64,
    /// Gradients are scaled down to this norm at most; 0: never.
    pub clip_norm: f64,
    /// A rank computes a step in parts of so many samples at the most, and adds up their gradients, to need less
    /// memory: whole lanes, at least one at a time; 0: all at once.
    pub micro_batch: u32,
    /// Parts of the network that stay as they begin, by the names of their tensors or what these begin with:
    /// `features`, `classifier.1`. Running statistics of norms go on moving.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
    /// The learning rate of the last layer, which is new when a network is taken from elsewhere, is so many times that
    /// of the others.
    pub head_factor: f64,
    /// It ends early when so many epochs have brought no better validation; 0: never.
    pub stop_after: u32,
}

impl Train {
    /// Whether a tensor stays as it begins.
    pub fn is_frozen(&self, tensor: &str) -> bool {
        self.freeze.iter().any(|part| is_within(tensor, part))
    }
}

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine down to 0 at the last step (Loshchilov & Hutter, 2017).
    Cosine,
    /// Divided by 10 each `step_epochs`.
    Step,
    /// Not at all.
    Constant,
}

/// On how many devices, and how they talk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ranks {
    /// With fewer the run waits.
    pub min: u32,
    /// More are not used; 0: as many as there are lanes, up to 8.
    pub max: u32,
    /// Virtual ranks: the fixed parts of each global batch. The same numbers come out for any number of ranks up to
    /// this. Each normalises its part alone, so that a part should not be small; 0: up to 8, with 16 samples or more
    /// each, but no fewer than `max` or `min` says.
    pub lanes: u32,
    /// Threads of each rank's tensor operations; 0: the machine's cores divided by the devices of all agents there.
    pub threads: u32,
    /// After so long without a sign of life a rank counts as lost; the other deadlines derive from it.
    pub failure_detection_seconds: f64,
    /// After this many generations that ended in failure without a step between them the run fails.
    pub max_failures: u32,
    /// Arithmetic of weights and gradients.
    pub precision: Precision,
    /// How images and what convolutions make of them lie in a device's memory. The same numbers come out, within
    /// rounding.
    #[serde(skip_serializing_if = "Layout::is_auto")]
    pub layout: Layout,
    /// Whether a GPU is given a step as one recorded piece of work (CUDA graphs) instead of operation by operation.
    /// The same numbers come out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub graphs: bool,
    /// How gradients travel between ranks.
    pub compress: Compress,
}

/// Arithmetic of weights and gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits; but convolutions of a GPU (cuDNN's) may compute in TF32 where it has that, as libtorch does by default.
    F32,
    /// The same, but matrix products of a GPU compute in TF32, too: of what they multiply 11 bits are significant, sums
    /// have 32 bits. On a CPU it is `f32`.
    Tf32,
    /// 64 bits: to compare runs to the last digit.
    F64,
    /// 32 bits, but convolutions and matrix products compute in bfloat16 (autocast). For GPUs; CPUs without such
    /// instructions are slower.
    Bf16,
}

/// How images and what convolutions make of them lie in a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// `nhwc` on GPUs in bf16, or else `nchw`.
    Auto,
    /// One channel after the other.
    Nchw,
    /// One pixel after the other, each with all its channels ("channels last"): what the matrix units of GPUs want.
    Nhwc,
}

impl Layout {
    /// Whether nobody chose: such a spec is stored without a word of it.
    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// How gradients travel between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// As they are.
    None,
    /// In 16 bits with 11 significant ones. What comes out then depends, within rounding, on the number of ranks.
    Fp16,
    /// In 16 bits with 8 significant ones, and the range of f32.
    Bf16,
}

/// What is kept on the way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSpec {
    /// A checkpoint is written each time this many epochs have passed (0.5: twice an epoch), whenever the validation is
    /// as good as never before, and at the end.
    pub every_epochs: f64,
    /// So many of the newest are kept, and the best.
    pub keep: u32,
}

impl Default for Model {
    fn default() -> Self {
        Self { arch: Arch::AlexnetBn, width: 1.0, dropout: 0.5 }
    }
}

impl Default for Input {
    fn default() -> Self {
        Self {
            crop: 224,
            cut: Cut::Translate,
            // torchvision's defaults.
            min_area: 0.08,
            max_aspect: 4.0 / 3.0,
            flip: true,
            brightness: 0.2,
            contrast: 0.0,
            saturation: 0.0,
        }
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            epochs: 90,
            batch: 256,
            learning_rate: 0.02,
            momentum: 0.9,
            weight_decay: 5e-4,
            label_smoothing: 0.0,
            warmup_epochs: 1.0,
            schedule: Schedule::Cosine,
            step_epochs: 30.0,
            clip_norm: 0.0,
            micro_batch: 0,
            freeze: Vec::new(),
            head_factor: 1.0,
            stop_after: 0,
        }
    }
}

impl Default for Ranks {
    fn default() -> Self {
        Self {
            min: 1,
            max: 0,
            lanes: 0,
            threads: 0,
            failure_detection_seconds: 10.0,
            max_failures: 3,
            precision: Precision::F32,
            layout: Layout::Auto,
            graphs: false,
            compress: Compress::None,
        }
    }
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { every_epochs: 1.0, keep: 3 }
    }
}

impl RunSpec {
    /// Parses a user's TOML and checks every value.
    pub fn from_toml(toml: &str) -> Result<Self, SpecError> {
        toml::from_str::<Self>(toml).map_err(|e| SpecError(format!("run spec: {e}")))?.resolved()
    }

    /// Parses JSON and checks every value.
    pub fn from_json(json: &str) -> Result<Self, SpecError> {
        serde_json::from_str::<Self>(json).map_err(|e| SpecError(format!("run spec: {e}")))?.resolved()
    }

    /// The stored form.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and numbers only")
    }

    /// By which its epochs are shared out: whoever submits it chooses, and runs of before there was a choice have the
    /// first.
    pub fn plan(&self) -> Plan {
        self.plan.unwrap_or(Plan::Spread)
    }

    /// The one knob from which every deadline of training derives.
    pub fn failure_detection(&self) -> Duration {
        Duration::from_secs_f64(self.ranks.failure_detection_seconds)
    }

    /// For people: what is allowed, but hardly meant.
    pub fn warnings(&self) -> Vec<String> {
        let (batch, lanes) = (self.train.batch, self.ranks.lanes);
        let few = self.model.is_normalised() && batch / lanes < FEW_SAMPLES;
        let few = few.then(|| {
            format!(
                "each of ranks.lanes = {lanes} normalises {} of train.batch = {batch} samples alone, which are too few to tell their mean: \
                 choose fewer lanes or a larger batch, so that each has 16 or more",
                batch / lanes
            )
        });
        few.into_iter().collect()
    }

    /// With what was left open, each value checked.
    fn resolved(mut self) -> Result<Self, SpecError> {
        let (batch, ranks) = (self.train.batch, &mut self.ranks);
        if ranks.lanes == 0 {
            ranks.lanes = (batch / GOOD_SAMPLES).clamp(1, MOST_LANES).max(ranks.max).max(ranks.min);
        }
        if ranks.max == 0 {
            ranks.max = ranks.lanes.min(MOST_LANES.max(ranks.min));
        }
        self.check()?;
        Ok(self)
    }

    fn check(&self) -> Result<(), SpecError> {
        let Self { model, input, train, ranks, checkpoint, .. } = self;
        check("dataset", format!("{:?}", self.dataset), crate::ids::is_name(&self.dataset), "a dataset's name")?;
        check("model.width", model.width, (0.1..=4.0).contains(&model.width), "0.1 to 4")?;
        check("model.dropout", model.dropout, (0.0..=0.9).contains(&model.dropout), "0 to 0.9")?;
        check("input.crop", input.crop, (64..=1024).contains(&input.crop), "64 to 1024")?;
        check("input.min_area", input.min_area, (0.01..=1.0).contains(&input.min_area), "0.01 to 1")?;
        check("input.max_aspect", input.max_aspect, (1.0..=10.0).contains(&input.max_aspect), "1 to 10")?;
        let lights = [
            ("input.brightness", input.brightness),
            ("input.contrast", input.contrast),
            ("input.saturation", input.saturation),
        ];
        for (key, value) in lights {
            check(key, value, (0.0..=0.9).contains(&value), "0 to 0.9")?;
        }
        check("train.epochs", train.epochs, (1..=100_000).contains(&train.epochs), "1 to 100000")?;
        check("train.learning_rate", train.learning_rate, train.learning_rate > 0.0, "more than 0")?;
        check("train.momentum", train.momentum, (0.0..1.0).contains(&train.momentum), "0 to less than 1")?;
        check("train.weight_decay", train.weight_decay, train.weight_decay >= 0.0, "0 or more")?;
        check(
            "train.label_smoothing",
            train.label_smoothing,
            (0.0..1.0).contains(&train.label_smoothing),
            "0 to less than 1",
        )?;
        check("train.warmup_epochs", train.warmup_epochs, train.warmup_epochs >= 0.0, "0 or more")?;
        check("train.step_epochs", train.step_epochs, train.step_epochs > 0.0, "more than 0")?;
        check("train.clip_norm", train.clip_norm, train.clip_norm >= 0.0, "0 or more")?;
        check("train.head_factor", train.head_factor, train.head_factor > 0.0, "more than 0")?;
        let parameters = Network::new(model, 1, input.crop).parameters();
        for part in &train.freeze {
            let known = parameters.keys().any(|name| is_within(name, part));
            check(
                "train.freeze",
                format!("{part:?}"),
                known,
                "a part of the network, such as \"features\" or \"classifier.1\"",
            )?;
        }
        check(
            "train.freeze",
            format!("{:?}", train.freeze),
            parameters.keys().any(|name| !train.is_frozen(name)),
            "less than the whole network",
        )?;
        check("ranks.lanes", ranks.lanes, (1..=4096).contains(&ranks.lanes), "1 to 4096")?;
        check("ranks.max", ranks.max, (1..=ranks.lanes).contains(&ranks.max), "1 to ranks.lanes")?;
        check("ranks.min", ranks.min, (1..=ranks.max).contains(&ranks.min), "1 to ranks.max")?;
        // A lane normalises its share alone, and one sample has no deviation.
        check("train.batch", train.batch, train.batch / ranks.lanes >= 2, "at least 2 x ranks.lanes")?;
        check("ranks.threads", ranks.threads, ranks.threads <= 1024, "0 to 1024")?;
        let seconds = ranks.failure_detection_seconds;
        check("ranks.failure_detection_seconds", seconds, (1.0..=3600.0).contains(&seconds), "1 to 3600")?;
        check("checkpoint.every_epochs", checkpoint.every_epochs, checkpoint.every_epochs > 0.0, "more than 0")?;
        check("checkpoint.keep", checkpoint.keep, checkpoint.keep >= 1, "at least 1")
    }
}
