//! A rank's state as files, to go on from.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use object_store::ObjectStore;
use proto::run_ledger::Line;
use proto::{keys, pb};
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::history::Sums;
use crate::data::store::{get_checked, put_files};
use crate::torch::tensor::Named;

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
pub(super) struct Copied {
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

/// Copies tensors into those of the same names, such as a checkpoint's into a network's. Names and shapes must be the same on both sides.
pub(crate) fn load(into: &Named, from: &Named) -> Result<()> {
    ensure!(into.len() == from.len(), "{} tensors where {} belong", from.len(), into.len());
    for (name, target) in into {
        let (_, source) = from.iter().find(|(other, _)| other == name).with_context(|| format!("no tensor {name}"))?;
        let (found, wanted) = (source.size(), target.size());
        ensure!(found == wanted, "tensor {name} has shape {found:?} where {wanted:?} belongs");
        tch::no_grad(|| target.shallow_clone().f_copy_(source)).with_context(|| format!("tensor {name}"))?;
    }
    Ok(())
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

/// A copy of a named tensor.
pub(super) fn copy((name, tensor): &(String, Tensor)) -> Result<(String, Copied)> {
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

/// A part of a key that nobody else has.
pub(super) fn nonce() -> String {
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

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let tensor = |size: i64| Tensor::zeros([size], (Kind::Float, Device::Cpu));
        let into = vec![("a".to_owned(), tensor(2))];
        let error = |from: Named| format!("{:#}", load(&into, &from).expect_err("it does not fit"));
        assert!(error(vec![("b".to_owned(), tensor(2))]).contains("no tensor a"));
        assert!(error(vec![("a".to_owned(), tensor(3))]).contains("[3] where [2]"));
        load(&into, &vec![("a".to_owned(), tensor(2) + 1.0)]).expect("it fits");
        assert_eq!(into[0].1.double_value(&[1]), 1.0);
    }
}
