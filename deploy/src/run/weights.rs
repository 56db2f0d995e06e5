//! Files of weights that a run begins with, on their way to the coordinator.

use std::path::Path;

use anyhow::Result;
use bytes::Bytes;
use proto::pb::submit_run_with_weights_request::Part;
use proto::pb::{Run, SubmitRunRequest, SubmitRunWithWeightsRequest};
use tonic::{Response, Status};

use crate::client::Cluster;
use crate::exit::{Ended, Exit};
use crate::output::note;

/// Bytes in one message.
const PIECE: usize = 1 << 20;

/// The endings of what PyTorch itself writes; `.pth.tar` is no tar.
const PICKLED: [&str; 5] = ["pth", "pt", "bin", "ckpt", "tar"];

/// Whether `--from` names a file, and no run.
pub(super) fn is_file(text: &str) -> bool {
    let ending = ending(Path::new(text));
    text.contains('/') || ending == "safetensors" || PICKLED.contains(&ending)
}

fn ending(path: &Path) -> &str {
    path.extension().and_then(|ending| ending.to_str()).unwrap_or_default()
}

/// The file's bytes, as a safetensors file if it is one of PyTorch.
pub(super) fn read(path: &Path) -> Result<Bytes> {
    let name = path.display();
    let bytes = std::fs::read(path);
    let bytes = bytes.map_err(|error| Ended::error(Exit::NotFound, format!("cannot read {name}: {error}")))?;
    if !PICKLED.contains(&ending(path)) {
        return Ok(bytes.into());
    }
    let converted = state_dict::convert(&bytes).map_err(|error| {
        Ended::usage(format!(
            "--from {name}: {error}. Only state dicts are read here, and nothing of the file is run; what PyTorch loads becomes one by: \
             python3 -c \"import torch; \
             torch.save(torch.load('{name}', map_location='cpu', weights_only=True), 'state_dict.pth')\""
        ))
    })?;
    if !converted.left_out.is_empty() {
        note(format!("{name}: no weights, and left out: {}", converted.left_out.join(", ")));
    }
    Ok(converted.safetensors.into())
}

/// Submits a run that begins with these weights. Uploads take what they take, so that there is no deadline.
pub(super) async fn send(cluster: &Cluster, request: SubmitRunRequest, weights: Bytes) -> Result<Run, Status> {
    let part = |part| SubmitRunWithWeightsRequest { part: Some(part) };
    let pieces = (0..weights.len()).step_by(PIECE);
    let pieces = pieces.map(move |at| part(Part::Weights(weights.slice(at..(at + PIECE).min(weights.len())))));
    let parts = std::iter::once(part(Part::Start(request))).chain(pieces);
    cluster.runs.clone().submit_run_with_weights(futures::stream::iter(parts)).await.map(Response::into_inner)
}
