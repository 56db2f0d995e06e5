//! Points of the learning curve, as stored: one JSON object a line (see [`crate::keys::metrics`]).

use serde::{Deserialize, Serialize};

use crate::format::{FormatError, stored};
use crate::pb;

/// A run's curve as it is held in memory, made of many objects of points: who opens a long run reads the newest of
/// these and what was stored after it (see [`crate::keys::curve`]). It can be made again at any time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CurveSummary {
    /// Of this format: 1.
    pub format: u32,
    /// File names of the objects whose points it has.
    pub covers: Vec<String>,
    /// In the order of their steps; of a long run not those of every step.
    pub points: Vec<MetricPoint>,
}

stored!(CurveSummary, "curve summary", format);

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
    /// Share of the time in which ranks waited for data (as all shares here, the mean over ranks).
    pub data_wait: f64,
    /// ... in which they computed forward and backward.
    pub compute: f64,
    /// ... in which they waited for the slowest of them.
    pub rank_wait: f64,
    /// ... in which they waited for the network, with nothing left to compute.
    pub network_wait: f64,
    /// ... in which they applied the gradients. A GPU does so in what counts as `compute` of the next step.
    pub optimizer: f64,
    /// The rank that the others waited for the longest.
    pub slowest_rank: u32,
    /// Ranks of the generation.
    pub ranks: u32,
    /// Bytes of gradients that each rank gives and gets in a step.
    pub gradient_bytes: u64,
    /// Bytes a second that a rank's link to the others was measured to carry each way, when the generation began; 0 for
    /// one rank.
    pub link_bytes_per_second: f64,
    /// The share of the time in which rank 0's device had a step's work to do, by its own clock: from the first to the
    /// last operation of what it was given at once. A CPU has no such clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<f64>,
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

impl TryFrom<&str> for MetricKind {
    type Error = FormatError;

    fn try_from(name: &str) -> Result<Self, FormatError> {
        let kinds = [MetricKind::Step, MetricKind::Train, MetricKind::Validation, MetricKind::Test];
        kinds
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| FormatError(format!("{name:?} is no kind of point")))
    }
}

impl TryFrom<&pb::Metric> for MetricPoint {
    type Error = FormatError;

    fn try_from(metric: &pb::Metric) -> Result<Self, FormatError> {
        let pb::Metric { generation, epoch, step, loss, top1, top5, samples, learning_rate, .. } = *metric;
        let pb::Metric { images_per_second, seconds, data_wait, compute, rank_wait, network_wait, .. } = *metric;
        let pb::Metric { optimizer, slowest_rank, ranks, gradient_bytes, link_bytes_per_second, device, .. } = *metric;
        #[rustfmt::skip]
        let point = Self {
            kind: metric.kind.as_str().try_into()?, generation, epoch, step, loss, top1, top5, samples, learning_rate, images_per_second,
            seconds, data_wait, compute, rank_wait, network_wait, optimizer, slowest_rank, ranks, gradient_bytes, link_bytes_per_second,
            device,
        };
        Ok(point)
    }
}

impl From<MetricPoint> for pb::Metric {
    fn from(point: MetricPoint) -> Self {
        let MetricPoint { kind, generation, epoch, step, loss, top1, top5, samples, .. } = point;
        let MetricPoint { learning_rate, images_per_second, seconds, data_wait, compute, rank_wait, .. } = point;
        let MetricPoint { network_wait, optimizer, slowest_rank, ranks, gradient_bytes, device, .. } = point;
        let (kind, link_bytes_per_second) = (kind.name().to_owned(), point.link_bytes_per_second);
        #[rustfmt::skip]
        let metric = Self {
            kind, generation, epoch, step, loss, top1, top5, samples, learning_rate, images_per_second, seconds, data_wait, compute,
            rank_wait, network_wait, optimizer, slowest_rank, ranks, gradient_bytes, link_bytes_per_second, device,
        };
        metric
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line as it is stored of a CPU's step.
    const LINE: &str = r#"{"kind":"step","generation":1,"epoch":1,"step":1,"loss":3.0,"top1":0.1,"top5":0.5,"samples":32,"learning_rate":0.1,"images_per_second":9.0,"seconds":1.0,"data_wait":0.0,"compute":1.0,"rank_wait":0.0,"network_wait":0.0,"optimizer":0.0,"slowest_rank":0,"ranks":1,"gradient_bytes":4,"link_bytes_per_second":0.0}"#;

    #[test]
    fn a_line_without_a_devices_share_is_read_and_written_as_it_was_and_one_with_it_goes_all_the_way() {
        let point: MetricPoint = serde_json::from_str(LINE).expect("as stored");
        assert_eq!(point.device, None);
        assert_eq!(serde_json::to_string(&point).expect("numbers"), LINE);
        let timed = MetricPoint { device: Some(0.75), ..point };
        assert_eq!(MetricPoint::try_from(&pb::Metric::from(timed)).expect("a kind"), timed);
        let line = serde_json::to_string(&timed).expect("numbers");
        assert!(line.ends_with(r#","device":0.75}"#), "{line}");
        assert_eq!(serde_json::from_str::<MetricPoint>(&line).expect("as stored"), timed);
    }
}
