//! `gleaner classify`: what a trained model sees in pictures, on this machine's processor.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use proto::Class;
use serde::Serialize;
use worker::Preparer;

use crate::client::ClusterArgs;
use crate::complete;
use crate::exit::{Ended, Exit};
use crate::output::{Format, say, say_json};
use crate::run::network::{Network, softmax};

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
    #[arg(add = complete::runs())]
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
    let network = Network::load(&args.model, &args.cluster).await?;
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
        let answer = Answer { picture, guesses: guesses(&network, &logits), logits, millis, error };
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

/// The likeliest classes by softmax.
fn guesses(network: &Network, logits: &[f32]) -> Vec<Guess> {
    let probabilities = softmax(logits);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let guess = |&class: &usize| {
        let Class { synset, name } = network.classes[class].clone();
        Guess { synset, name, probability: probabilities[class] }
    };
    order.iter().take(GUESSES).map(guess).collect()
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
