//! What a model is, in words, to stand beside its files.

use std::fmt::Write;

use anyhow::{Context, Result};
use proto::pb::Run;
use serde::Deserialize;

/// What is taken of model.json.
#[derive(Debug, Deserialize)]
struct Description {
    model: serde_json::Value,
    crop: u32,
    resize: serde_json::Value,
    mean: [f64; 3],
    std: [f64; 3],
    classes: Vec<proto::Class>,
    dataset: String,
    manifest_version: u32,
    epochs: u32,
    test: Option<Test>,
}

#[derive(Debug, Deserialize)]
struct Test {
    top1: f64,
    top5: f64,
}

/// What is told of a run's model, of which `description` is the model.json, as Markdown.
pub(super) fn text(run: &Run, description: &[u8]) -> Result<Vec<u8>> {
    let Description { model, crop, resize, mean, std, classes, dataset, manifest_version, epochs, test } =
        serde_json::from_slice(description).context("model.json")?;
    let named = |key: &str| model[key].to_string().trim_matches('"').to_owned();
    let mut text = format!(
        "# {}\n\nA network of {} classes: `{}`, width {}, trained for {epochs} epochs on version {manifest_version} of the dataset \
         `{dataset}` by Gleaner.\n",
        run.run,
        classes.len(),
        named("arch"),
        named("width")
    );
    let _ = match test {
        Some(Test { top1, top5 }) => {
            let (top1, top5) = (100.0 * top1, 100.0 * top5);
            writeln!(
                text,
                "On the dataset's test split, which it has never seen, top-1 is {top1:.1} % and top-5 {top5:.1} %."
            )
        }
        None => writeln!(text, "The dataset has no test split, so how right it is was not measured."),
    };
    let _ = write!(
        text,
        "\n## To ask it\n\n`image` takes {crop} x {crop} pixels, red, green, blue, each from 0 to 1, [n, 3, {crop}, {crop}] in f32: the centre \
         of a picture that was resized as `resize` below says. Mean {mean:.4?} and deviation {std:.4?} are part of the network. Outputs are \
         `logits` and `probabilities` in the order of `classes` in model.json.\n\n\
         ```python\nimport json, numpy, onnxruntime\nfrom PIL import Image, ImageOps\n\n\
         side, crop = {size}, {crop}\n\
         picture = ImageOps.fit(ImageOps.exif_transpose(Image.open(\"picture.jpg\")).convert(\"RGB\"), (side, side), Image.Resampling.LANCZOS)\n\
         at = (side - crop) // 2\n\
         pixels = numpy.asarray(picture.crop((at, at, at + crop, at + crop)), \"float32\") / 255\n\
         model = onnxruntime.InferenceSession(\"model.onnx\")\n\
         (probabilities,) = model.run([\"probabilities\"], {{\"image\": pixels.transpose(2, 0, 1)[None]}})\n\
         print(json.load(open(\"model.json\"))[\"classes\"][probabilities[0].argmax()])\n```\n\n\
         (That is right for `mode` cover; `gleaner classify . picture.jpg` knows all modes.)\n",
        size = resize["size"],
    );
    let _ =
        write!(text, "\n## How its pictures were stored\n\n```json\n{}\n```\n", serde_json::to_string_pretty(&resize)?);
    let spec: serde_json::Value = serde_json::from_str(&run.spec_json).context("the run's spec")?;
    let _ = write!(text, "\n## How it was trained\n\n```json\n{}\n```\n", serde_json::to_string_pretty(&spec)?);
    let _ = write!(
        text,
        "\n## Whose pictures it learned from\n\nThose of the dataset's URLs, under their owners' terms. The dataset's outcomes name each URL, \
         and its samples what other columns the list had, such as a licence: `gleaner dataset outcomes {dataset}`.\n"
    );
    Ok(text.into_bytes())
}
