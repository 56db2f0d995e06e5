//! The trained model as files.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use object_store::ObjectStore;
use proto::run_spec::Model;
use proto::{Class, Manifest, Resize, RunSpec, keys};
use serde::Serialize;
use tch::{Kind, Tensor};

use super::alexnet::AlexNet;
use super::checkpoint::{copy, nonce};
use super::history::Sums;
use crate::data::store::put_files;

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
    test: Option<Sums>,
}

/// Writes the folder of a model that is as `network` evaluates. Returns it and the digests of its files.
pub(crate) async fn export(
    store: &Arc<dyn ObjectStore>,
    (run, generation): (&str, u64),
    spec: &RunSpec,
    manifest: &Manifest,
    network: &AlexNet,
    test: Option<Sums>,
) -> Result<(String, HashMap<String, String>)> {
    let classes = manifest.classes.iter().map(|class| Class { synset: class.synset.clone(), name: class.name.clone() });
    let description = Description {
        format: 1,
        run,
        model: &spec.model,
        crop: spec.input.crop,
        resize: &manifest.resize,
        mean: manifest.mean,
        std: manifest.std,
        classes: classes.collect(),
        dataset: &manifest.dataset,
        manifest_version: manifest.version,
        epochs: spec.train.epochs,
        test: test.map(|sums| sums.mean()),
    };
    let weights = network.parameters().into_iter().chain(network.buffers());
    let weights = weights.map(|(name, tensor)| copy(&(name, tensor.f_to_kind(Kind::Float)?)));
    let weights = safetensors::serialize(weights.collect::<Result<Vec<_>>>()?, None);
    let weights = weights.context("failed to write the model")?;
    let properties = [
        ("run", run.to_owned()),
        ("classes", serde_json::to_string(&description.classes)?),
        ("input", "RGB, each value from 0 to 1".to_owned()),
        ("resize", serde_json::to_string(description.resize)?),
    ];
    let (folded, crop) = (network.folded(), i64::from(spec.input.crop));
    let channels = |of: [f64; 3]| Tensor::from_slice(&of.map(|value| value as f32));
    let (mean, deviation) = (channels(manifest.mean), channels(manifest.std));
    let files = [
        ("model.safetensors", weights),
        ("model.onnx", folded.onnx(crop, &mean, &deviation, &properties)?),
        ("model.pt", folded.torchscript(crop, &mean, &deviation)?),
        ("model.json", serde_json::to_vec_pretty(&description)?),
    ];
    // A key of its own: an older generation that is cut off and finishes, too, must not overwrite what an event names.
    let folder = keys::model(run, generation, &nonce());
    let digests = put_files(store, &folder, files).await?;
    Ok((folder, digests))
}
