//! A rank's state as files: checkpoints to go on from, and the trained model.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use object_store::ObjectStore;
use proto::run_ledger::Line;
use proto::run_spec::Model;
use proto::shard::sha256_hex;
use proto::{Class, Manifest, RunSpec, keys, pb};
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::data::store::{get_checked, put};
use crate::learn::alexnet::{AlexNet, Named};
use crate::learn::history::Sums;

const TENSORS: &str = "state.safetensors";
const POSITION: &str = "state.json";

/// Where a run stands; together with the tensors all that a rank needs to go on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Progress {
    /// Steps applied.
    pub step: u64,
    /// Epochs after which the validation split was looked at.
    pub validated: u64,
    /// Over the steps of the epoch that has begun.
    pub sums: Sums,
    /// The newest lines of the ledger, which may not be in the store yet.
    pub tail: Vec<Line>,
}

/// What stands beside a checkpoint's tensors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Position {
    format: u32,
    run: String,
    generation: u64,
    steps_per_epoch: u64,
    progress: Progress,
}

impl Position {
    /// Where the run stands, if an epoch has as many steps as it had.
    pub(crate) fn progress(self, folder: &str, steps_per_epoch: u64) -> Result<Progress> {
        let found = self.steps_per_epoch;
        ensure!(
            found == steps_per_epoch,
            "checkpoint {folder} has {found} steps in an epoch, this run {steps_per_epoch}"
        );
        Ok(self.progress)
    }
}

/// A copy of a tensor, on its way to a file: contiguous, on the CPU.
struct Copied {
    tensor: Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl View for Copied {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        self.tensor.copy_data_u8(&mut bytes, self.tensor.numel());
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// A state that was copied, so that training can go on while it is written.
pub(crate) struct Snapshot {
    tensors: Vec<(String, Copied)>,
    position: Position,
}

impl Snapshot {
    /// Copies the tensors.
    pub(crate) fn take(
        run: &str,
        generation: u64,
        steps_per_epoch: u64,
        progress: &Progress,
        tensors: &Named,
    ) -> Result<Self> {
        let position =
            Position { format: 1, run: run.to_owned(), generation, steps_per_epoch, progress: progress.clone() };
        Ok(Self { tensors: tensors.iter().map(copy).collect::<Result<_>>()?, position })
    }

    /// Writes the files. Nothing exists until an event names them.
    pub(crate) async fn write(self, store: Arc<dyn ObjectStore>) -> Result<pb::Checkpointed> {
        let Self { tensors, position } = self;
        let step = position.progress.step;
        let key = keys::checkpoint(&position.run, step, position.generation, &nonce());
        let position = serde_json::to_vec(&position)?;
        // Beside the runtime, on which batches are read.
        let tensors = tokio::task::spawn_blocking(move || safetensors::serialize(tensors, None)).await?;
        let tensors = tensors.context("failed to write a checkpoint")?;
        let digests = put_files(&store, &key, [(TENSORS, tensors), (POSITION, position)]).await?;
        Ok(pb::Checkpointed { step, key, digests, top1: None })
    }
}

/// Reads a checkpoint whose files must have these digests. Its tensors come in the order of their names.
pub(crate) async fn read(
    store: &Arc<dyn ObjectStore>,
    folder: &str,
    digests: &HashMap<String, String>,
) -> Result<(Position, Named)> {
    let file = async |name: &str| {
        let digest = digests.get(name).with_context(|| format!("checkpoint {folder} has no {name}"))?;
        get_checked(store, &format!("{folder}/{name}"), digest).await
    };
    let position: Position =
        serde_json::from_slice(&file(POSITION).await?).with_context(|| format!("{folder}/{POSITION}"))?;
    let format = position.format;
    ensure!(format == 1, "checkpoint {folder} is of format {format}: this program reads format 1");
    let bytes = file(TENSORS).await?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("{folder}/{TENSORS}"))?;
    let named = tensors.iter().map(|(name, view)| {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            other => bail!("{folder}/{TENSORS}: tensor {name} is of kind {other:?}"),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Ok((name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, kind)?))
    });
    let mut named = named.collect::<Result<Named>>()?;
    // A file's tensors come in no order.
    named.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok((position, named))
}

/// Copies those tensors of another run that belong to a network into it. Tensors of the last layer, one row a class, stay as they are if
/// that run had other classes; returns their names.
pub(crate) fn take_weights(into: &Named, from: &Named, classes: i64) -> Result<Vec<String>> {
    let from: HashMap<&str, &Tensor> = from.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut kept = Vec::new();
    for (name, tensor) in into {
        let found = from.get(name.as_str()).with_context(|| format!("there is no tensor {name}"))?;
        let (shape, theirs) = (tensor.size(), found.size());
        if shape == theirs {
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&found.to_device(tensor.device())))?;
        } else if shape.first() == Some(&classes) && shape.get(1..) == theirs.get(1..) {
            kept.push(name.clone());
        } else {
            bail!("tensor {name} is of shape {theirs:?} where {shape:?} belongs");
        }
    }
    Ok(kept)
}

/// What stands beside a trained model's weights: all that is needed to use it.
#[derive(Debug, Serialize)]
struct Description<'a> {
    format: u32,
    run: &'a str,
    model: &'a Model,
    crop: u32,
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

async fn put_files<const N: usize>(
    store: &Arc<dyn ObjectStore>,
    folder: &str,
    files: [(&str, Vec<u8>); N],
) -> Result<HashMap<String, String>> {
    let mut digests = HashMap::new();
    for (name, bytes) in files {
        let bytes = bytes::Bytes::from(bytes);
        let copy = bytes.clone();
        let digest = tokio::task::spawn_blocking(move || sha256_hex(&copy)).await?;
        digests.insert(name.to_owned(), digest);
        put(store, &format!("{folder}/{name}"), bytes).await?;
    }
    Ok(digests)
}

fn copy((name, tensor): &(String, Tensor)) -> Result<(String, Copied)> {
    let dtype = match tensor.kind() {
        Kind::Float => Dtype::F32,
        Kind::Double => Dtype::F64,
        other => bail!("tensor {name} is of kind {other:?}"),
    };
    let here = tensor.device() == tch::Device::Cpu;
    let tensor = tensor.detach();
    let tensor = if here { tensor.copy() } else { tensor.f_to_device(tch::Device::Cpu)? }.f_contiguous()?;
    let shape = tensor.size().iter().map(|&n| n as usize).collect();
    Ok((name.clone(), Copied { tensor, dtype, shape }))
}

fn nonce() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn for_other_classes_only_the_output_layer_begins_anew_and_another_network_is_refused() {
        let network = |classes: i64, units: i64, value: f64| -> Named {
            let tensor = |shape: &[i64]| Tensor::full(shape, value, (Kind::Float, Device::Cpu));
            let named = [
                ("features.0.weight", tensor(&[units, 3])),
                ("classifier.6.weight", tensor(&[classes, units])),
                ("classifier.6.bias", tensor(&[classes])),
            ];
            named.map(|(name, tensor)| (name.to_owned(), tensor)).into()
        };
        let first = |named: &Named| named.iter().map(|(_, tensor)| tensor.flatten(0, -1).double_value(&[0])).collect();
        let into = network(5, 4, 1.0);
        let new = take_weights(&into, &network(3, 4, 2.0), 5).expect("it fits");
        assert_eq!(new, ["classifier.6.weight", "classifier.6.bias"]);
        let values: Vec<f64> = first(&into);
        assert_eq!(values, [2.0, 1.0, 1.0]);
        assert!(take_weights(&into, &network(5, 4, 3.0), 5).expect("it fits").is_empty());
        let error = take_weights(&into, &network(5, 6, 2.0), 5).expect_err("it is wider").to_string();
        assert!(error.contains("features.0.weight") && error.contains("[6, 3]"), "{error}");
    }
}
