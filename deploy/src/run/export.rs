//! `gleaner run export`: curves for TensorBoard.
//!
//! An event file is a row of records (length, its checksum, an `Event` of TensorFlow's `event.proto`, its checksum);
//! the checksums are CRC-32C, turned and moved as TensorFlow's `crc32c.h` says, since records may themselves lie in
//! records.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use crc_fast::{CrcAlgorithm, checksum};
use prost::{Message, Oneof};
use proto::pb::{GetMetricsRequest, GetRunRequest, Metric, Run};
use serde_json::json;

use crate::client::{Cluster, ClusterArgs, answer};
use crate::complete;
use crate::output::{Format, say, say_json};

/// Arguments of `gleaner run export`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The runs' names
    #[arg(required = true, add = complete::runs())]
    runs: Vec<String>,
    /// Write event files into this folder: a folder a run, in it one for steps, training epochs, validation and test
    #[arg(long, value_name = "FOLDER", required = true)]
    tensorboard: PathBuf,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// An event, with the numbers of `event.proto`.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// Writes the curves of all runs that are named.
pub(super) async fn run(args: Args) -> Result<()> {
    let cluster = Cluster::new(&args.cluster)?;
    let mut written = Vec::new();
    for name in &args.runs {
        let run = answer(cluster.runs.clone().get_run(GetRunRequest { run: name.clone() })).await?;
        let request = GetMetricsRequest { run: name.clone(), kinds: Vec::new() };
        let metrics = answer(cluster.runs.clone().get_metrics(request)).await?.metrics;
        for kind in ["step", "train", "validation", "test"] {
            let points: Vec<&Metric> = metrics.iter().filter(|point| point.kind == kind).collect();
            if points.is_empty() {
                continue;
            }
            let folder = args.tensorboard.join(name).join(kind);
            let file = put(&folder, &run, &points).with_context(|| format!("failed to write {}", folder.display()))?;
            match args.cluster.output {
                Format::Table => say(format!("{}  {} points", file.display(), points.len())),
                Format::Json => written.push(json!({"file": file, "points": points.len()})),
            }
        }
    }
    match args.cluster.output {
        Format::Json => say_json(&written),
        Format::Table => Ok(()),
    }
}

/// Writes one curve's file in place of an earlier one.
fn put(folder: &Path, run: &Run, points: &[&Metric]) -> std::io::Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    // By this name TensorBoard knows such files.
    let file = folder.join(format!("events.out.tfevents.{}.gleaner", run.began_millis / 1000));
    let begun = run.began_millis as f64 / 1000.0;
    let version = Event { wall_time: begun, step: 0, what: Some(What::FileVersion("brain.Event:2".to_owned())) };
    let mut bytes = record(&version);
    points.iter().for_each(|point| bytes.extend(record(&event(begun, point))));
    std::fs::write(&file, bytes)?;
    Ok(file)
}

fn event(begun: f64, point: &Metric) -> Event {
    let mut values = vec![("loss", point.loss), ("top1", point.top1), ("top5", point.top5)];
    if point.kind == "step" {
        values.extend([
            ("learning_rate", point.learning_rate),
            ("images_per_second", point.images_per_second),
            ("time/data_wait", point.data_wait),
            ("time/compute", point.compute),
            ("time/rank_wait", point.rank_wait),
            ("time/network_wait", point.network_wait),
            ("time/optimizer", point.optimizer),
        ]);
        values.extend(point.device.map(|share| ("time/device", share)));
    }
    let value = |(tag, value): (&str, f64)| Value { tag: tag.to_owned(), simple_value: Some(value as f32) };
    let summary = Summary { value: values.into_iter().map(value).collect() };
    Event { wall_time: begun + point.seconds, step: point.step as i64, what: Some(What::Summary(summary)) }
}

/// An event as it stands in a file.
fn record(event: &Event) -> Vec<u8> {
    let data = event.encode_to_vec();
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length).to_le_bytes(), &data, &masked(&data).to_le_bytes()].concat()
}

fn masked(bytes: &[u8]) -> u32 {
    let crc = checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_the_checksums_that_tensorflow_wants() {
        // As TensorFlow's own writer has it: an event of nothing but the file's version at time 0.
        let event = Event { wall_time: 0.0, step: 0, what: Some(What::FileVersion("brain.Event:2".to_owned())) };
        let record = record(&event);
        assert_eq!(record[..8], 15_u64.to_le_bytes());
        assert_eq!(record[12..27], *b"\x1a\x0dbrain.Event:2");
        // CRC-32C of "123456789", by its definition.
        assert_eq!(checksum(CrcAlgorithm::Crc32Iscsi, b"123456789"), 0xe306_9283);
    }
}
