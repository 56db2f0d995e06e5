//! The trained model as files.

use std::collections::HashMap;

use anyhow::{Context, Result};
use proto::run_spec::Model;
use proto::{Class, Resize, keys};
use serde::Serialize;
use tch::{Kind, Tensor};

use super::alexnet::AlexNet;
use super::checkpoint::{copy, nonce};
use super::history::Sums;
use super::job::Job;
use crate::data::store::put_files;

/// The weights of a run that are exported.
pub(crate) struct Weights<'a> {
    pub network: &'a AlexNet,
    /// Steps applied in them.
    pub step: u64,
    /// Over the test split, if there is one.
    pub test: Option<Sums>,
}

/// What stands beside a trained model's weights: all that is needed to use it.
#[derive(Debug, Serialize)]
struct Description<'a> {
    format: u32,
    run: &'a str,
    model: &'a Model,
    crop: u32,
    /// How the pictures that it learned from were stored; of those the centre is cut out.
    resize: &'a Resize,
    /// Pixel values from 0 to 1 become (value - mean) / std, channel by channel: red, green, blue.
    mean: [f64; 3],
    std: [f64; 3],
    /// In the order of the outputs.
    classes: Vec<Class>,
    dataset: &'a str,
    manifest_version: u32,
    epochs: u32,
    /// Steps applied in these weights.
    step: u64,
    test: Option<Sums>,
}

/// Writes the folder of a run's model, as its networks evaluate: `model.*` has the best weights, or the last ones if no
/// others are better; beside better ones `last.*` has these. Returns it and the digests of its files.
pub(crate) async fn export(
    job: &Job,
    generation: u64,
    best: Option<&Weights<'_>>,
    last: &Weights<'_>,
) -> Result<(String, HashMap<String, String>)> {
    // A key of its own: an older generation that is cut off and finishes, too, must not overwrite what an event names.
    let folder = keys::model(&job.run, generation, &nonce());
    let mut digests = HashMap::new();
    for (name, weights) in [("model", Some(best.unwrap_or(last))), ("last", best.map(|_| last))] {
        if let Some(weights) = weights {
            digests.extend(put_files(&job.context.store, &folder, files(name, job, weights)?).await?);
        }
    }
    Ok((folder, digests))
}

/// The files of some weights.
fn files(name: &str, job: &Job, weights: &Weights<'_>) -> Result<[(String, Vec<u8>); 4]> {
    let (spec, manifest, network) = (&job.spec, &job.manifest, weights.network);
    let classes = manifest.classes.iter().map(|class| Class { synset: class.synset.clone(), name: class.name.clone() });
    let description = Description {
        format: 1,
        run: &job.run,
        model: &spec.model,
        crop: spec.input.crop,
        resize: &manifest.resize,
        mean: manifest.mean,
        std: manifest.std,
        classes: classes.collect(),
        dataset: &manifest.dataset,
        manifest_version: manifest.version,
        epochs: spec.train.epochs,
        step: weights.step,
        test: weights.test.map(|sums| sums.mean()),
    };
    let tensors = network.weights().into_iter().map(|(name, tensor)| copy(&(name, tensor.f_to_kind(Kind::Float)?)));
    let synsets: Vec<&str> = description.classes.iter().map(|class| class.synset.as_str()).collect();
    // So that another run can begin with them and find its classes.
    let metadata = HashMap::from([(proto::weights::CLASSES.to_owned(), serde_json::to_string(&synsets)?)]);
    let tensors = safetensors::serialize(tensors.collect::<Result<Vec<_>>>()?, Some(metadata));
    let tensors = tensors.context("failed to write the model")?;
    let properties = [
        ("run", job.run.clone()),
        ("classes", serde_json::to_string(&description.classes)?),
        ("input", "RGB, each value from 0 to 1".to_owned()),
        ("resize", serde_json::to_string(description.resize)?),
    ];
    let (folded, crop) = (network.folded(), i64::from(spec.input.crop));
    let channels = |of: [f64; 3]| Tensor::from_slice(&of.map(|value| value as f32));
    let (mean, deviation) = (channels(manifest.mean), channels(manifest.std));
    Ok([
        (format!("{name}.safetensors"), tensors),
        (format!("{name}.onnx"), folded.onnx(crop, &mean, &deviation, &properties)?),
        (format!("{name}.pt"), folded.torchscript(crop, &mean, &deviation)?),
        (format!("{name}.json"), serde_json::to_vec_pretty(&description)?),
    ])
}
