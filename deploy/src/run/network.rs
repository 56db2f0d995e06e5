//! A run's trained network, or one on this machine, that can be asked.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use classifier::Network as Classifier;
use proto::{Class, Resize};
use worker::Pixels;

use super::model_files;
use crate::client::{Cluster, ClusterArgs};
use crate::exit::{Ended, Exit};

/// A model that can be asked.
pub(crate) struct Network {
    classifier: Classifier,
    /// In the order of its outputs.
    pub(crate) classes: Vec<Class>,
    /// How the pictures that it learned from were stored.
    pub(crate) resize: Resize,
}

impl Network {
    /// A run's, or one on this machine: a folder, or its model.onnx.
    pub(crate) async fn load(model: &str, cluster: &ClusterArgs) -> Result<Self> {
        Self::new(bytes_of(model, cluster).await?).with_context(|| format!("model {model}"))
    }

    pub(crate) fn new(onnx: Vec<u8>) -> Result<Self> {
        let classifier = Classifier::new(onnx)?;
        let classes = serde_json::from_str(classifier.property("classes")?).context("its classes")?;
        let resize = serde_json::from_str(classifier.property("resize")?).context("its resize")?;
        Ok(Self { classifier, classes, resize })
    }

    /// All that it puts out for a picture's centre.
    pub(crate) fn values(&self, pixels: &Pixels) -> Result<Vec<Vec<f32>>> {
        Ok(self.classifier.values(&pixels.values, (pixels.width, pixels.height), 3)?)
    }

    /// The outputs for a picture's centre.
    pub(crate) fn look(&self, pixels: &Pixels) -> Result<Vec<f32>> {
        let logits = self.classifier.logits(&pixels.values, (pixels.width, pixels.height), 3)?;
        ensure!(logits.len() == self.classes.len(), "{} outputs for {} classes", logits.len(), self.classes.len());
        Ok(logits)
    }
}

/// How likely each class is, by a network's outputs.
pub(crate) fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|logit| (logit - most).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
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
    model_files::fetch(&Cluster::new(cluster)?, model, "model.onnx").await
}
