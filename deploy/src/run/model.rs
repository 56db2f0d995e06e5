//! `gleaner run model`: a trained model out of the cluster's store into a folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use proto::shard::sha256_hex;
use serde_json::json;

use super::model_files::{done, of_run};
use super::{calibration, card, int8};
use crate::client::{Cluster, ClusterArgs};
use crate::complete;
use crate::exit::Ended;
use crate::output::{Format, say, say_json};
use crate::try_it;

/// Arguments of `gleaner run model`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run's name
    #[arg(add = complete::runs())]
    run: String,
    /// The folder to write to; it is made if it is not there
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    to: PathBuf,
    /// What the model is to be for; may be repeated
    #[arg(long, value_enum, default_values = ["safetensors", "onnx", "torchscript"])]
    format: Vec<ModelFormat>,
    /// The weights with the best validation, or those after the last step
    #[arg(long, value_enum, default_value_t = Weights::Best)]
    weights: Weights,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// A form in which a model is of use to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ModelFormat {
    /// model.safetensors: the weights, by the names that torchvision's AlexNet has
    Safetensors,
    /// model.onnx: for phones, browsers, anything with onnxruntime
    Onnx,
    /// model-int8.onnx: the same in 8 bits, a quarter of the bytes; fitted to pictures of the run's validation split
    OnnxInt8,
    /// model.pt: for libtorch and PyTorch
    Torchscript,
    /// index.html and what belongs to it: a page that any web server can serve, on which a browser asks the model (in 8
    /// bits if onnx-int8 is asked for as well)
    Page,
}

/// Which of a run's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Weights {
    /// With the best validation
    Best,
    /// After the last step
    Last,
}

impl Weights {
    /// The file that has them, of those that a run's model has. Where the last weights are the best there are no
    /// others.
    fn file(self, file: &str, digests: &BTreeMap<String, String>) -> String {
        let last = file.replacen("model.", "last.", 1);
        if self == Self::Last && digests.contains_key(&last) { last } else { file.to_owned() }
    }
}

/// Writes a done run's model in the forms that are asked for, with model.json and model.md, which say what it is.
pub(super) async fn run(args: Args) -> Result<()> {
    let wants = |format| args.format.contains(&format);
    if wants(ModelFormat::Page) && args.to == Path::new(".") {
        return Err(Ended::usage("a page is an index.html and more: --to FOLDER says where it may be written"));
    }
    let cluster = Cluster::new(&args.cluster)?;
    let (run, digests) = done(&cluster, &args.run).await?;
    let stored = async |file: &str| of_run(&cluster, &args.run, &digests, &args.weights.file(file, &digests)).await;
    std::fs::create_dir_all(&args.to).with_context(|| format!("failed to make {}", args.to.display()))?;
    let description = stored("model.json").await?;
    let mut files = vec![("model.md", card::text(&run, &description)?), ("model.json", description)];
    for (format, file) in [(ModelFormat::Safetensors, "model.safetensors"), (ModelFormat::Torchscript, "model.pt")] {
        if wants(format) {
            files.push((file, stored(file).await?));
        }
    }
    if wants(ModelFormat::Onnx) || wants(ModelFormat::OnnxInt8) || wants(ModelFormat::Page) {
        let onnx = stored("model.onnx").await?;
        let int8 = if wants(ModelFormat::OnnxInt8) {
            Some(int8::quantise(&onnx, &calibration::pictures(&cluster, &run, &onnx).await?)?)
        } else {
            None
        };
        if wants(ModelFormat::Page) {
            files.extend(try_it::folder(&args.run, if int8.is_some() { "model-int8.onnx" } else { "model.onnx" })?);
        }
        if wants(ModelFormat::Onnx) || int8.is_none() {
            files.push(("model.onnx", onnx));
        }
        files.extend(int8.map(|bytes| ("model-int8.onnx", bytes)));
    }
    let mut written = Vec::new();
    for (file, bytes) in files {
        let path = args.to.join(file);
        put(&path, &bytes).with_context(|| format!("failed to write {}", path.display()))?;
        match args.cluster.output {
            Format::Table => say(format!("{}  {} bytes", path.display(), bytes.len())),
            Format::Json => written.push(json!({"file": path, "bytes": bytes.len(), "sha256": sha256_hex(&bytes)})),
        }
    }
    if args.cluster.output == Format::Json {
        say_json(&written)?;
    }
    Ok(())
}

/// A half file never stands under its name.
fn put(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    std::fs::write(&part, bytes)?;
    std::fs::rename(&part, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_weights_have_files_of_their_own_only_where_others_are_better() {
        let of = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), String::new())).collect();
        let (one, both) = (of(&["model.onnx"]), of(&["model.onnx", "last.onnx"]));
        assert_eq!(Weights::Best.file("model.onnx", &both), "model.onnx");
        assert_eq!(Weights::Last.file("model.onnx", &both), "last.onnx");
        assert_eq!(Weights::Last.file("model.onnx", &one), "model.onnx");
    }
}
