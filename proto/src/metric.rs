//! Points of the learning curve, as stored: one JSON object a line (see [`crate::keys::metrics`]).

use serde::{Deserialize, Serialize};

use crate::pb;

/// One point of the learning curve: [`pb::Metric`] as stored.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricPoint {
    /// Over what.
    pub kind: MetricKind,
    /// The generation that measured it; of two points of one step the higher generation's counts.
    pub generation: u64,
    /// Epochs begun, from 1.
    pub epoch: u64,
    /// Steps applied.
    pub step: u64,
    /// Mean over the samples.
    pub loss: f64,
    /// Share of samples whose label is the first guess.
    pub top1: f64,
    /// Share of samples whose label is among the first five guesses.
    pub top5: f64,
    /// Measured over.
    pub samples: u64,
    /// Of the step; 0 where nothing is learned.
    pub learning_rate: f64,
    /// Over all ranks.
    pub images_per_second: f64,
    /// Since the run's first generation began.
    pub seconds: f64,
    /// Share of the time in which the rank waited for data.
    pub data_wait: f64,
}

/// What a point is measured over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricKind {
    /// One step's samples.
    Step,
    /// The training samples of one epoch, while learning.
    Train,
    /// The validation split.
    Validation,
    /// The test split.
    Test,
}

impl MetricKind {
    /// The stable name.
    pub fn name(self) -> &'static str {
        match self {
            MetricKind::Step => "step",
            MetricKind::Train => "train",
            MetricKind::Validation => "validation",
            MetricKind::Test => "test",
        }
    }
}

impl From<MetricPoint> for pb::Metric {
    fn from(point: MetricPoint) -> Self {
        let MetricPoint { kind, generation, epoch, step, loss, top1, top5, samples, .. } = point;
        let MetricPoint { learning_rate, images_per_second, seconds, data_wait, .. } = point;
        let kind = kind.name().to_owned();
        #[rustfmt::skip]
        let metric = Self { kind, generation, epoch, step, loss, top1, top5, samples, learning_rate, images_per_second, seconds, data_wait };
        metric
    }
}
