//! A trained network that can be asked, on this machine's processor and without libtorch.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use proto::{Class, Resize};
use rten::{Dimension, Model, NodeId};
use rten_tensor::NdTensor;
use rten_tensor::prelude::*;
use worker::Pixels;

use super::model;
use crate::client::{Cluster, ClusterArgs};
use crate::exit::{Ended, Exit};

/// A model that can be asked.
pub(crate) struct Network {
    model: Model,
    /// In the order of its outputs.
    pub(crate) classes: Vec<Class>,
    /// How the pictures that it learned from were stored.
    pub(crate) resize: Resize,
    /// Side of the square that it sees, in pixels.
    crop: usize,
    input: NodeId,
    output: NodeId,
}

impl Network {
    /// A run's, or one on this machine: a folder, or its model.onnx.
    pub(crate) async fn load(model: &str, cluster: &ClusterArgs) -> Result<Self> {
        Self::new(bytes_of(model, cluster).await?).with_context(|| format!("model {model}"))
    }

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
    pub(crate) fn look(&self, pixels: &Pixels) -> Result<Vec<f32>> {
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
}

/// The bytes of a model.onnx: on this machine, or of a run.
async fn bytes_of(model: &str, cluster: &ClusterArgs) -> Result<Vec<u8>> {
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
