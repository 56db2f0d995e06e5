//! A rank's state as files, to go on from.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use object_store::ObjectStore;
use proto::network::is_of_output;
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
    /// The state with the best validation so far, if one was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
}

/// A state that was better on the validation split than those before it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Best {
    /// Steps applied; of states that are as good the newest.
    pub step: u64,
    /// Share of right first guesses.
    pub top1: f64,
    /// The epoch after which it was first as good.
    pub epoch: u64,
}

impl Progress {
    /// Notes the validation after an epoch that has ended.
    pub(crate) fn note_validation(&mut self, epoch: u64, top1: f64) {
        let Self { step, best, .. } = self;
        let epoch = match best {
            Some(best) if top1 < best.top1 => return,
            Some(best) if top1 == best.top1 => best.epoch,
            _ => epoch,
        };
        *best = Some(Best { step: *step, top1, epoch });
    }

    /// Whether so many epochs have brought nothing better; never if that is 0.
    pub(crate) fn is_stale(&self, epoch: u64, stop_after: u32) -> bool {
        stop_after > 0 && self.best.is_some_and(|best| epoch >= best.epoch + u64::from(stop_after))
    }
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

    /// Steps applied in it.
    pub(crate) fn step(&self) -> u64 {
        self.position.progress.step
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
    Ok((position, read_tensors(store, folder, digests).await?))
}

/// Reads the tensors of a checkpoint, or of a folder that has nothing else, in the order of their names.
pub(super) async fn read_tensors(
    store: &Arc<dyn ObjectStore>,
    folder: &str,
    digests: &HashMap<String, String>,
) -> Result<Named> {
    let digest = digests.get(TENSORS).with_context(|| format!("{folder} has no {TENSORS}"))?;
    let bytes = get_checked(store, &format!("{folder}/{TENSORS}"), digest).await?;
    let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("{folder}/{TENSORS}"))?;
    let named = tensors.iter().map(|(name, view)| {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            // Of files from elsewhere.
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            other => bail!("{folder}/{TENSORS}: tensor {name} is of kind {other:?}"),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Ok((name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, kind)?))
    });
    let mut named = named.collect::<Result<Named>>()?;
    // A file's tensors come in no order.
    named.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(named)
}

/// Copies tensors into those of the same names, such as a checkpoint's into a network's. Names and shapes must be the
/// same on both sides.
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

/// Which rows of the last layer, one for each class, are taken from other weights.
#[derive(Debug)]
pub(crate) enum Rows<'a> {
    /// For each class the row there, or -1: that one stays as it is.
    OfClasses(&'a [i64]),
    /// All if there are as many, or else none. Which classes these are is not known.
    AllOrNone,
}

/// Copies those tensors of other weights that belong to a network into it.
pub(crate) fn take_weights(into: &Named, from: &Named, rows: &Rows<'_>) -> Result<()> {
    let from: HashMap<&str, &Tensor> = from.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    for (name, tensor) in into {
        let found = from.get(name.as_str()).with_context(|| format!("there is no tensor {name}"))?;
        let (shape, theirs) = (tensor.size(), found.size());
        let found = found.f_to_device(tensor.device())?.f_to_kind(tensor.kind())?;
        let is_output = is_of_output(name) && shape.get(1..) == theirs.get(1..);
        tch::no_grad(|| match rows {
            Rows::OfClasses(rows) if is_output => {
                ensure!(rows.len() as i64 == shape[0], "{} rows are told for {} classes", rows.len(), shape[0]);
                for (own, &row) in (0..).zip(*rows).filter(|(_, row)| **row >= 0) {
                    tensor.f_get(own)?.f_copy_(&found.f_get(row)?)?;
                }
                Ok(())
            }
            Rows::AllOrNone if is_output && shape != theirs => Ok(()),
            _ if shape == theirs => Ok(tensor.shallow_clone().f_copy_(&found)?),
            _ => bail!("tensor {name} is of shape {theirs:?} where {shape:?} belongs"),
        })?;
    }
    Ok(())
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

    /// A small network whose values are `value` and, in the last layer, the row's number more.
    fn network(classes: i64, units: i64, value: f64) -> Named {
        let number = Tensor::arange(classes, (Kind::Float, Device::Cpu));
        let named = [
            ("features.0.weight", Tensor::full([units, 3], value, (Kind::Float, Device::Cpu))),
            ("classifier.6.weight", number.unsqueeze(1).repeat([1, units]) + value),
            ("classifier.6.bias", number + value),
        ];
        named.map(|(name, tensor)| (name.to_owned(), tensor)).into()
    }

    fn values(named: &Named) -> Vec<Vec<f64>> {
        named.iter().map(|(_, tensor)| tensor.flatten(0, -1).try_into().expect("numbers")).collect()
    }

    #[test]
    fn the_last_layer_takes_the_rows_of_classes_that_both_know_and_the_others_begin_anew() {
        // The same number of classes in another order, of which the second is not known there.
        let into = network(3, 2, 100.0);
        take_weights(&into, &network(3, 2, 1.0), &Rows::OfClasses(&[2, -1, 0])).expect("it fits");
        let [features, weight, bias] = &values(&into)[..] else { panic!("three tensors") };
        assert_eq!(features, &[1.0; 6]);
        assert_eq!(weight, &[3.0, 3.0, 101.0, 101.0, 1.0, 1.0]);
        assert_eq!(bias, &[3.0, 101.0, 1.0]);
        let more = network(4, 2, 100.0);
        take_weights(&more, &network(3, 2, 1.0), &Rows::OfClasses(&[-1, 0, 1, -1])).expect("it fits");
        assert_eq!(values(&more)[2], [100.0, 1.0, 2.0, 103.0]);
        let error = take_weights(&network(3, 2, 1.0), &network(3, 2, 1.0), &Rows::OfClasses(&[7, 0, 0]));
        assert!(error.is_err(), "there is no such row");
    }

    #[test]
    fn where_classes_are_not_known_the_last_layer_is_taken_if_there_are_as_many_and_another_network_is_refused() {
        let into = network(5, 4, 100.0);
        take_weights(&into, &network(3, 4, 2.0), &Rows::AllOrNone).expect("it fits");
        assert_eq!(values(&into)[0], [2.0; 12]);
        assert_eq!(values(&into)[2], [100.0, 101.0, 102.0, 103.0, 104.0]);
        take_weights(&into, &network(5, 4, 3.0), &Rows::AllOrNone).expect("it fits");
        assert_eq!(values(&into)[2], [3.0, 4.0, 5.0, 6.0, 7.0]);
        for rows in [Rows::AllOrNone, Rows::OfClasses(&[0, 1, 2, 3, 4])] {
            let error = take_weights(&into, &network(5, 6, 2.0), &rows).expect_err("it is wider").to_string();
            assert!(error.contains("features.0.weight") && error.contains("[6, 3]"), "{error}");
        }
    }

    #[test]
    fn the_newest_of_the_best_states_counts_and_so_do_epochs_without_a_better_one() {
        let mut progress = Progress::default();
        assert!(!progress.is_stale(9, 2), "nothing was measured");
        let mut stale = Vec::new();
        for (epoch, top1) in [(1, 0.2), (2, 0.5), (3, 0.4), (4, 0.5)] {
            progress.step = epoch * 10;
            progress.note_validation(epoch, top1);
            stale.push(progress.is_stale(epoch, 2));
        }
        assert_eq!(stale, [false, false, false, true]);
        assert_eq!(progress.best, Some(Best { step: 40, top1: 0.5, epoch: 2 }));
        assert!(!progress.is_stale(4, 0), "it was not asked for");
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
