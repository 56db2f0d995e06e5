//! `gleaner run evaluate`: a trained model is tried on the pictures of a split.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use futures::TryStreamExt;
use proto::pb::GetRunRequest;
use proto::shard::RawSample;
use proto::{Class, Split};
use serde::Serialize;
use serde_json::Value;
use worker::Preparer;

use super::network::Network;
use crate::client::{Cluster, ClusterArgs, answer};
use crate::dataset::export::blocks;
use crate::dataset::reader::Reader;
use crate::exit::{Ended, Exit};
use crate::output::{Format, Progress, Table, percent, say, say_json};

/// Guesses among which the right one counts.
const GUESSES: usize = 5;
/// Classes that people are shown: those that the model knows worst.
const SHOWN: usize = 25;

/// Arguments of `gleaner run evaluate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A run's name, or a model on this machine: its folder, or its model.onnx
    model: String,
    /// The dataset [default: the run's own]
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
    /// Which pictures
    #[arg(long, default_value = "test", value_parser = |name: &str| name.parse::<Split>().map_err(|error| error.to_string()))]
    split: Split,
    /// This version of the dataset's manifest; the latest if left out
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    version: u32,
    /// Write here how often each class (a row) was taken for each class (a column)
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// What the model made of the pictures.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(crate) struct Evaluation {
    /// Pictures of classes that it knows, and how many of those it guessed right: at once, and among five guesses.
    pub(crate) pictures: u64,
    pub(crate) top1: u64,
    top5: u64,
    /// Pictures of classes that it does not know.
    unknown: u64,
    /// The model's classes.
    pub(crate) classes: Vec<Class>,
    /// How often each class (the first index) was taken for each one.
    pub(crate) taken_for: Vec<Vec<u64>>,
}

impl Evaluation {
    pub(crate) fn new(classes: Vec<Class>) -> Self {
        let taken_for = vec![vec![0; classes.len()]; classes.len()];
        Self { pictures: 0, top1: 0, top5: 0, unknown: 0, classes, taken_for }
    }

    /// Counts a picture of the class `is`, for which the network has these outputs.
    pub(crate) fn count(&mut self, is: usize, logits: &[f32]) {
        let better = logits.iter().filter(|logit| **logit > logits[is]).count();
        let first = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(is);
        self.pictures += 1;
        self.top1 += u64::from(first == is);
        self.top5 += u64::from(better < GUESSES);
        self.taken_for[is][first] += 1;
    }

    /// Of a class: its pictures, those that were guessed right, and for what it was taken most often instead.
    pub(crate) fn of(&self, class: usize) -> (u64, u64, Option<(usize, u64)>) {
        let row = &self.taken_for[class];
        let others = row.iter().copied().enumerate().filter(|&(other, n)| other != class && n > 0);
        (row.iter().sum(), row[class], others.max_by_key(|&(_, n)| n))
    }

    fn csv(&self) -> Result<Vec<u8>> {
        let mut csv = csv::Writer::from_writer(Vec::new());
        let synsets = self.classes.iter().map(|class| class.synset.clone());
        csv.write_record(std::iter::once("is".to_owned()).chain(synsets))?;
        for (class, row) in self.classes.iter().zip(&self.taken_for) {
            csv.write_record(std::iter::once(class.synset.clone()).chain(row.iter().map(u64::to_string)))?;
        }
        Ok(csv.into_inner()?)
    }
}

/// Looks at every picture of the split that counts.
pub(super) async fn run(args: Args) -> Result<()> {
    let cluster = Cluster::new(&args.cluster)?;
    let name = match &args.dataset {
        Some(name) => name.clone(),
        None => dataset_of(&cluster, &args.model).await?,
    };
    let network = Arc::new(Network::load(&args.model, &args.cluster).await?);
    let reader = Reader::through(cluster, &name);
    let manifest = reader.manifest(args.version).await?;
    let total = manifest.samples(args.split);
    ensure!(total > 0, Ended::error(Exit::Failed, format!("{name} has no pictures in its {} split", args.split)));
    // By the model's classes, which need not be the dataset's.
    let known = |synset: &str| network.classes.iter().position(|class| class.synset == synset);
    let labels: Vec<Option<usize>> = manifest.classes.iter().map(|class| known(&class.synset)).collect();
    let mut evaluation = Evaluation::new(network.classes.clone());
    let mut progress = Progress::new("pictures");
    for shard in &manifest.shards {
        let Some(tar) = shard.tars.get(&args.split) else { continue };
        let mut blocks = std::pin::pin!(blocks(&reader, shard, tar, false).await?);
        while let Some(samples) = blocks.try_next().await? {
            let looked = look(Arc::clone(&network), labels.clone(), samples).await;
            for seen in looked.with_context(|| tar.key.clone())? {
                match seen {
                    Some((is, logits)) => evaluation.count(is, &logits),
                    None => evaluation.unknown += 1,
                }
            }
            progress.update(evaluation.pictures + evaluation.unknown, total, &name, "looked at");
        }
    }
    drop(progress);
    if evaluation.pictures == 0 {
        let message = format!("the model knows none of the classes of {name}'s {} split", args.split);
        return Err(Ended::error(Exit::Failed, message));
    }
    if let Some(path) = &args.csv {
        std::fs::write(path, evaluation.csv()?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match args.cluster.output {
        Format::Json => say_json(&evaluation),
        Format::Table => {
            let of = format!("{} on {name} (version {}), {} split", args.model, manifest.version, args.split);
            lines(&evaluation, &of).iter().for_each(say);
            Ok(())
        }
    }
}

/// The dataset that a run was trained on.
async fn dataset_of(cluster: &Cluster, run: &str) -> Result<String> {
    let missing = || Ended::usage("--dataset NAME is needed: a model on this machine does not say on what to try it");
    if run.contains('/') || std::path::Path::new(run).exists() {
        return Err(missing());
    }
    let run = answer(cluster.runs.clone().get_run(GetRunRequest { run: run.to_owned() })).await?;
    let spec: Value = serde_json::from_str(&run.spec_json).context("the run's spec")?;
    spec["dataset"].as_str().map(str::to_owned).ok_or_else(missing)
}

/// The network's outputs for each sample with its class, by the model's; None: of a class that it does not know.
async fn look(
    network: Arc<Network>,
    labels: Vec<Option<usize>>,
    samples: Vec<RawSample>,
) -> Result<Vec<Option<(usize, Vec<f32>)>>> {
    let look = move || {
        let mut preparer = Preparer::new(network.resize)?;
        let look = |sample: RawSample| {
            let Some(is) = labels.get(sample.label as usize).copied().flatten() else { return Ok(None) };
            let pixels = preparer.prepare(&sample.image);
            let pixels = pixels.map_err(|rejection| anyhow::anyhow!("picture {}: {rejection}", sample.key))?;
            anyhow::Ok(Some((is, network.look(&pixels)?)))
        };
        samples.into_iter().map(look).collect()
    };
    tokio::task::spawn_blocking(look).await?
}

fn lines(evaluation: &Evaluation, of: &str) -> Vec<String> {
    let Evaluation { pictures, top1, top5, unknown, classes, .. } = evaluation;
    let share = |n: u64| n as f64 / *pictures as f64;
    let mut lines = vec![format!("{of}: {pictures} pictures, top-1 {:.3}, top-5 {:.3}", share(*top1), share(*top5))];
    if *unknown > 0 {
        lines.push(format!("{unknown} pictures are of classes that the model does not know: they are left out"));
    }
    let mut order: Vec<usize> = (0..classes.len()).filter(|&class| evaluation.of(class).0 > 0).collect();
    let accuracy = |&class: &usize| {
        let (all, right, _) = evaluation.of(class);
        right as f64 / all as f64
    };
    order.sort_by(|a, b| accuracy(a).total_cmp(&accuracy(b)));
    let mut table = Table::new(&["synset", "name", "pictures", "right", "most often taken for"]);
    for &class in order.iter().take(SHOWN) {
        let (all, right, taken_for) = evaluation.of(class);
        let taken_for = taken_for.map_or("-".to_owned(), |(other, n)| {
            let Class { synset, name } = &classes[other];
            format!("{} ({n})", if name.is_empty() { synset } else { name })
        });
        let Class { synset, name } = classes[class].clone();
        table.row(vec![synset, name, all.to_string(), percent(right, all), taken_for]);
    }
    lines.push(String::new());
    lines.extend(table.lines());
    if order.len() > SHOWN {
        lines.push(format!("and {} classes more, of which it knows more: -o json", order.len() - SHOWN));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_counted_by_what_they_are_and_what_they_were_taken_for() {
        let class = |n| Class { synset: format!("n{n}"), name: String::new() };
        let mut evaluation = Evaluation::new((0..7).map(class).collect());
        evaluation.count(0, &[3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        evaluation.count(0, &[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]);
        evaluation.count(6, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]);
        assert_eq!((evaluation.pictures, evaluation.top1, evaluation.top5), (3, 1, 2));
        assert_eq!((evaluation.of(0), evaluation.of(6)), ((2, 1, Some((2, 1))), (1, 0, Some((5, 1)))));
        let csv = String::from_utf8(evaluation.csv().expect("in memory")).expect("text");
        assert_eq!(csv.lines().nth(1), Some("n0,1,0,1,0,0,0,0"));
        let lines = lines(&evaluation, "birds-1 on birds");
        assert!(lines[0].ends_with("3 pictures, top-1 0.333, top-5 0.667"), "{lines:?}");
        // The class that it knows worst comes first.
        assert!(lines[3].starts_with("n6"), "{lines:?}");
    }
}
