//! `gleaner run metrics`

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use parquet_derive::ParquetRecordWriter;
use proto::pb::{GetMetricsRequest, Metric};
use proto::table;

use super::NameArgs;
use super::plot::{self, Curve};
use crate::client::{Cluster, answer};
use crate::output::{Format, Table, note, say, say_json};

/// Of the columns.
const HEADINGS: [&str; 17] = [
    "kind",
    "generation",
    "epoch",
    "step",
    "loss",
    "top1",
    "top5",
    "samples",
    "learning_rate",
    "images_per_second",
    "seconds",
    "data_wait",
    "compute",
    "rank_wait",
    "network_wait",
    "optimizer",
    "device",
];

/// Arguments of `gleaner run metrics`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    of: NameArgs,
    /// Only points of these kinds: step, train, validation, test; of a long run not every step has one
    #[arg(long, value_name = "KIND", value_parser = ["step", "train", "validation", "test"])]
    kind: Vec<String>,
    /// All columns, as CSV with a header
    #[arg(long)]
    csv: bool,
    /// Draw loss and top-1 instead
    #[arg(long, conflicts_with = "csv")]
    plot: bool,
    /// Write all columns into this Parquet file instead
    #[arg(long, value_name = "FILE", conflicts_with_all = ["csv", "plot", "output"])]
    parquet: Option<PathBuf>,
}

/// A point as a row of Parquet; the fields are the file's columns.
#[derive(Debug, Clone, Default, ParquetRecordWriter)]
struct Row {
    kind: String,
    generation: i64,
    epoch: i64,
    step: i64,
    loss: f64,
    top1: f64,
    top5: f64,
    samples: i64,
    learning_rate: f64,
    images_per_second: f64,
    seconds: f64,
    data_wait: f64,
    compute: f64,
    rank_wait: f64,
    network_wait: f64,
    optimizer: f64,
    device: Option<f64>,
}

impl table::Row for Row {
    const NAME: &'static str = "metrics";
}

impl From<&Metric> for Row {
    fn from(metric: &Metric) -> Self {
        let Metric { loss, top1, top5, learning_rate, images_per_second, seconds, data_wait, compute, .. } = *metric;
        let Metric { rank_wait, network_wait, optimizer, device, .. } = *metric;
        let [generation, epoch, step, samples] = [metric.generation, metric.epoch, metric.step, metric.samples]
            .map(|n| i64::try_from(n).unwrap_or(i64::MAX));
        let kind = metric.kind.clone();
        #[rustfmt::skip]
        let row = Self {
            kind, generation, epoch, step, loss, top1, top5, samples, learning_rate, images_per_second, seconds, data_wait, compute,
            rank_wait, network_wait, optimizer, device,
        };
        row
    }
}

/// Runs the command.
pub(super) async fn run(args: Args) -> Result<()> {
    let Args { of, kind: kinds, csv, plot, parquet } = args;
    let mut client = Cluster::new(&of.cluster)?.runs;
    let metrics = answer(client.get_metrics(GetMetricsRequest { run: of.run.clone(), kinds })).await?.metrics;
    if let Some(file) = parquet {
        let rows: Vec<Row> = metrics.iter().map(Row::from).collect();
        std::fs::write(&file, table::write(&rows)?).with_context(|| format!("cannot write {}", file.display()))?;
        note(format!("{}: {} points", file.display(), rows.len()));
        return Ok(());
    }
    if of.cluster.output == Format::Json {
        return say_json(&metrics);
    }
    if plot {
        curves(&metrics).iter().for_each(say);
        return Ok(());
    }
    let row = |m: &Metric| {
        let integers = [m.generation, m.epoch, m.step].map(|n| n.to_string());
        let scores = [m.loss, m.top1, m.top5].map(|x| format!("{x:.4}"));
        let [generation, epoch, step] = integers;
        let [loss, top1, top5] = scores;
        let learning_rate = format!("{:.6}", m.learning_rate);
        let [images, seconds] = [format!("{:.0}", m.images_per_second), format!("{:.1}", m.seconds)];
        let shares = [m.data_wait, m.compute, m.rank_wait, m.network_wait, m.optimizer].map(|x| format!("{x:.3}"));
        let [data_wait, compute, rank_wait, network_wait, optimizer] = shares;
        // A CPU has none.
        let device = m.device.map_or_else(String::new, |share| format!("{share:.3}"));
        let samples = m.samples.to_string();
        let kind = m.kind.clone();
        #[rustfmt::skip]
        let row = [
            kind, generation, epoch, step, loss, top1, top5, samples, learning_rate, images, seconds, data_wait, compute, rank_wait,
            network_wait, optimizer, device,
        ];
        row
    };
    if csv {
        say(HEADINGS.join(","));
        metrics.iter().for_each(|metric| say(row(metric).join(",")));
    } else {
        // As much as a terminal is wide; where the time goes, `run explain` says in words.
        let shown = |cells: [String; 17]| [0, 2, 3, 4, 5, 6, 8, 9, 10].map(|column| cells[column].clone());
        let mut table = Table::new(&shown(HEADINGS.map(str::to_owned)).each_ref().map(String::as_str));
        metrics.iter().for_each(|metric| table.row(shown(row(metric)).into()));
        table.say();
    }
    Ok(())
}

/// Loss and top-1 of each kind of points, drawn.
fn curves(metrics: &[Metric]) -> Vec<String> {
    const KINDS: [(char, &str); 4] = [('.', "step"), ('t', "train"), ('v', "validation"), ('x', "test")];
    let chart = |title: &str, kinds: &[(char, &str)], value: fn(&Metric) -> f64| {
        let of = |&(letter, kind): &(char, &str)| -> Curve {
            let points = metrics.iter().filter(|metric| metric.kind == kind);
            (letter, points.map(|metric| (metric.step as f64, value(metric))).collect())
        };
        plot::chart(title, &kinds.iter().map(of).collect::<Vec<_>>(), plot::SIZE)
    };
    let mut lines = chart("loss, by step", &KINDS, |metric| metric.loss);
    if lines.is_empty() {
        return vec!["no step has been measured yet".to_owned()];
    }
    lines.push(String::new());
    lines.extend(chart("top-1, by step", &KINDS[1..], |metric| metric.top1));
    let there = KINDS.iter().filter(|(_, kind)| metrics.iter().any(|metric| metric.kind == *kind));
    let names: Vec<String> = there.map(|(letter, kind)| format!("{letter} {kind}")).collect();
    lines.push(format!("{}; * several", names.join(", ")));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::file::reader::{FileReader, SerializedFileReader};

    #[test]
    fn points_are_rows_of_parquet_with_the_columns_of_csv() {
        let metric = Metric { kind: "validation".to_owned(), step: 7, top1: 0.5, optimizer: 0.25, ..Metric::default() };
        let file = table::write(&[Row::from(&metric)]).expect("encodes");
        let read = SerializedFileReader::new(bytes::Bytes::from(file)).expect("Parquet");
        let row = read.get_row_iter(None).expect("rows").next().expect("one").expect("whole");
        let (names, values): (Vec<String>, Vec<String>) =
            row.get_column_iter().map(|(name, value)| (name.clone(), value.to_string())).unzip();
        assert_eq!(names, HEADINGS);
        let shown = [(0, "\"validation\""), (3, "7"), (5, "0.5"), (15, "0.25"), (16, "null")];
        assert!(shown.iter().all(|(column, value)| values[*column] == *value), "{values:?}");
    }
}
