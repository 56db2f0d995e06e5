//! `gleaner classify`: what a trained model sees in pictures, on this machine's processor.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proto::{Class, Resize};
use rten::{Dimension, Model, NodeId};
use rten_tensor::NdTensor;
use rten_tensor::prelude::*;
use serde::Serialize;
use worker::{Pixels, Preparer};

use crate::client::{Cluster, ClusterArgs};
use crate::exit::{Ended, Exit};
use crate::output::{Format, say, say_json};
use crate::run::model;

/// The guesses that are told.
const GUESSES: usize = 5;
/// Characters of a guess's bar.
const BAR: usize = 24;
/// Bytes of a picture that is fetched.
const MOST_BYTES: usize = 50 << 20;
const FETCH: Duration = Duration::from_secs(60);

/// Arguments of `gleaner classify`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A run's name, or a model on this machine: its folder, or its model.onnx
    model: String,
    /// Pictures, folders of pictures, or http(s) addresses of pictures
    #[arg(required = true, value_name = "PICTURE")]
    pictures: Vec<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// What became of one picture.
#[derive(Debug, Serialize)]
struct Answer {
    picture: String,
    /// The likeliest classes, the likeliest first; empty if it could not be looked at.
    guesses: Vec<Guess>,
    /// The network's outputs, in the order of the classes.
    logits: Vec<f32>,
    /// Of reading, preparing and looking.
    millis: f64,
    /// Why it could not be looked at.
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Guess {
    synset: String,
    name: String,
    probability: f32,
}

/// Looks at all pictures and says what it sees as it goes.
pub(crate) async fn run(args: Args) -> Result<()> {
    let onnx = load(&args.model, &args.cluster).await?;
    let network = Network::new(onnx).with_context(|| format!("model {}", args.model))?;
    let mut preparer = Preparer::new(network.resize)?;
    let mut answers = Vec::new();
    for picture in listed(&args.pictures)? {
        let begun = Instant::now();
        let looked = async {
            let bytes = read(&picture).await?;
            let pixels = preparer.prepare(&bytes).map_err(|rejection| anyhow::anyhow!("{rejection}"))?;
            network.look(&pixels)
        };
        let (logits, error) = match looked.await {
            Ok(logits) => (logits, None),
            Err(error) => (Vec::new(), Some(format!("{error:#}"))),
        };
        let millis = begun.elapsed().as_secs_f64() * 1000.0;
        let answer = Answer { picture, guesses: network.guesses(&logits), logits, millis, error };
        if args.cluster.output == Format::Table {
            lines(&answer).iter().for_each(say);
        }
        answers.push(answer);
    }
    if args.cluster.output == Format::Json {
        say_json(&answers)?;
    }
    let failed = answers.iter().filter(|answer| answer.error.is_some()).count();
    ensure!(failed < answers.len(), Ended::error(Exit::Failed, "none of the pictures could be looked at"));
    Ok(())
}

/// The bytes of a model.onnx: on this machine, or of a run.
async fn load(model: &str, cluster: &ClusterArgs) -> Result<Vec<u8>> {
    let path = Path::new(model);
    let path = if path.is_dir() { path.join("model.onnx") } else { path.to_owned() };
    if path.is_file() {
        return std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
    }
    if model.contains('/') {
        return Err(Ended::error(Exit::NotFound, format!("there is no model at {}", path.display())));
    }
    model::fetch(&Cluster::new(cluster)?, model, "model.onnx").await
}

/// All pictures that are asked for; of a folder its files, in order.
fn listed(pictures: &[String]) -> Result<Vec<String>> {
    let mut listed = Vec::new();
    for picture in pictures {
        let path = Path::new(picture);
        if !path.is_dir() {
            listed.push(picture.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).with_context(|| format!("cannot read the folder {picture}"))?;
        let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
        files.retain(|file| file.is_file());
        files.sort();
        ensure!(!files.is_empty(), Ended::usage(format!("the folder {picture} has no file")));
        listed.extend(files.iter().map(|file| file.display().to_string()));
    }
    Ok(listed)
}

/// A picture's bytes.
async fn read(picture: &str) -> Result<Vec<u8>> {
    if !picture.starts_with("http://") && !picture.starts_with("https://") {
        return tokio::fs::read(picture).await.context("cannot be read");
    }
    let client = reqwest::Client::builder().timeout(FETCH).build()?;
    let mut response = client.get(picture).send().await?.error_for_status()?;
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        bytes.extend_from_slice(&chunk);
        ensure!(bytes.len() <= MOST_BYTES, "has more than {} MB", MOST_BYTES >> 20);
    }
    Ok(bytes)
}

/// A model that can be asked.
struct Network {
    model: Model,
    classes: Vec<Class>,
    resize: Resize,
    /// Side of the square that it sees, in pixels.
    crop: usize,
    input: NodeId,
    output: NodeId,
}

impl Network {
    fn new(onnx: Vec<u8>) -> Result<Self> {
        let model = Model::load(onnx).context(
            "cannot be loaded; of our networks `alexnet-2012` has an operator that is not read here (LRN), but by onnxruntime",
        )?;
        let property = |name: &str| {
            let missing = || {
                format!(
                    "has no {name:?} among its properties: only models of this version of Gleaner and later ones have"
                )
            };
            model.metadata().get(name).with_context(missing)
        };
        let classes: Vec<Class> = serde_json::from_str(property("classes")?).context("its classes")?;
        let shape = model.input_shape(0).context("has no input of a known shape")?;
        let [_, Dimension::Fixed(3), Dimension::Fixed(height), Dimension::Fixed(crop)] = shape[..] else {
            anyhow::bail!("takes no square of red, green and blue, but {shape:?}");
        };
        ensure!(height == crop, "takes no square, but {height} x {crop} pixels");
        let resize = serde_json::from_str(property("resize")?).context("its resize")?;
        // By place and not by name: the nodes that compute values have the same names.
        let (&[input], &[output, ..]) = (model.input_ids(), model.output_ids()) else {
            anyhow::bail!("has not one input and an output");
        };
        Ok(Self { model, classes, resize, crop, input, output })
    }

    /// The outputs for a picture's centre.
    fn look(&self, pixels: &Pixels) -> Result<Vec<f32>> {
        let Pixels { values, width, height } = pixels;
        let crop = self.crop;
        ensure!(
            *width >= crop && *height >= crop,
            "is stored as {width} x {height} pixels, and the model sees {crop} x {crop}"
        );
        let (left, top) = ((width - crop) / 2, (height - crop) / 2);
        let input = NdTensor::<f32, 4>::from_fn([1, 3, crop, crop], |[_, channel, y, x]| {
            f32::from(values[3 * ((top + y) * width + left + x) + channel]) / 255.0
        });
        let [output] = self.model.run_n(vec![(self.input, input.into())], [self.output], None)?;
        let output: NdTensor<f32, 2> = output.try_into()?;
        let logits = output.to_vec();
        ensure!(logits.len() == self.classes.len(), "{} outputs for {} classes", logits.len(), self.classes.len());
        Ok(logits)
    }

    /// The likeliest classes by softmax.
    fn guesses(&self, logits: &[f32]) -> Vec<Guess> {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers: Vec<f32> = logits.iter().map(|logit| (logit - most).exp()).collect();
        let sum: f32 = powers.iter().sum();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let guess = |&class: &usize| {
            let Class { synset, name } = self.classes[class].clone();
            Guess { synset, name, probability: powers[class] / sum }
        };
        order.iter().take(GUESSES).map(guess).collect()
    }
}

/// An answer for people.
fn lines(answer: &Answer) -> Vec<String> {
    if let Some(error) = &answer.error {
        return vec![format!("{}: {error}", answer.picture)];
    }
    let mut lines = vec![format!("{}  ({:.0} ms)", answer.picture, answer.millis)];
    for guess in &answer.guesses {
        let name = if guess.name.is_empty() { &guess.synset } else { &guess.name };
        let mut bar = String::new();
        let full = (guess.probability * BAR as f32).round() as usize;
        let _ = write!(bar, "{}{}", "█".repeat(full.min(BAR)), "·".repeat(BAR - full.min(BAR)));
        lines.push(format!("  {:>5.1} %  {bar}  {name}", 100.0 * guess.probability));
    }
    lines
}
