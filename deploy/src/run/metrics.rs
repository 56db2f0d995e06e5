//! `gleaner run metrics`

use anyhow::Result;
use proto::pb::{GetMetricsRequest, Metric};

use super::NameArgs;
use super::plot::{self, Curve};
use crate::client::{Cluster, answer};
use crate::output::{Format, Table, say, say_json};

/// Arguments of `gleaner run metrics`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    of: NameArgs,
    /// Only points of these kinds: step, train, validation, test
    #[arg(long, value_name = "KIND", value_parser = ["step", "train", "validation", "test"])]
    kind: Vec<String>,
    /// All columns, as CSV with a header
    #[arg(long)]
    csv: bool,
    /// Draw loss and top-1 instead
    #[arg(long, conflicts_with = "csv")]
    plot: bool,
}

/// Runs the command.
pub(super) async fn run(args: Args) -> Result<()> {
    let Args { of, kind: kinds, csv, plot } = args;
    let mut client = Cluster::new(&of.cluster)?.runs;
    let metrics = answer(client.get_metrics(GetMetricsRequest { run: of.run.clone(), kinds })).await?.metrics;
    if of.cluster.output == Format::Json {
        return say_json(&metrics);
    }
    if plot {
        curves(&metrics).iter().for_each(say);
        return Ok(());
    }
    const HEADINGS: [&str; 16] = [
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
    ];
    let row = |m: &Metric| {
        let integers = [m.generation, m.epoch, m.step].map(|n| n.to_string());
        let scores = [m.loss, m.top1, m.top5].map(|x| format!("{x:.4}"));
        let [generation, epoch, step] = integers;
        let [loss, top1, top5] = scores;
        let learning_rate = format!("{:.6}", m.learning_rate);
        let [images, seconds] = [format!("{:.0}", m.images_per_second), format!("{:.1}", m.seconds)];
        let shares = [m.data_wait, m.compute, m.rank_wait, m.network_wait, m.optimizer].map(|x| format!("{x:.3}"));
        let [data_wait, compute, rank_wait, network_wait, optimizer] = shares;
        let samples = m.samples.to_string();
        let kind = m.kind.clone();
        #[rustfmt::skip]
        let row = [
            kind, generation, epoch, step, loss, top1, top5, samples, learning_rate, images, seconds, data_wait, compute, rank_wait,
            network_wait, optimizer,
        ];
        row
    };
    if csv {
        say(HEADINGS.join(","));
        metrics.iter().for_each(|metric| say(row(metric).join(",")));
    } else {
        // As much as a terminal is wide; where the time goes, `run explain` says in words.
        let shown = |cells: [String; 16]| [0, 2, 3, 4, 5, 6, 8, 9, 10].map(|column| cells[column].clone());
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
