//! Files of weights that a run begins with, on their way to the coordinator.

use std::path::Path;

use anyhow::Result;
use bytes::Bytes;
use proto::pb::submit_run_with_weights_request::Part;
use proto::pb::{Run, SubmitRunRequest, SubmitRunWithWeightsRequest};
use tonic::{Response, Status};

use crate::client::Cluster;
use crate::exit::{Ended, Exit};

/// Bytes in one message.
const PIECE: usize = 1 << 20;

/// PyTorch's own format.
const PICKLED: [&str; 3] = ["pth", "pt", "bin"];

/// Whether `--from` names a file, and no run.
pub(super) fn is_file(text: &str) -> bool {
    let ending = Path::new(text).extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    text.contains('/') || ending == "safetensors" || PICKLED.contains(&ending)
}

/// The file's bytes.
pub(super) fn read(path: &Path) -> Result<Bytes> {
    let name = path.display();
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    if PICKLED.contains(&ending) {
        return Err(Ended::usage(format!(
            "--from {name}: pickled files are not read, since to read one is to run it; a state dict of PyTorch becomes a safetensors file by: \
             python3 -c \"import torch, safetensors.torch as s; \
             s.save_file(torch.load('{name}', map_location='cpu', weights_only=True), 'weights.safetensors')\""
        )));
    }
    let bytes = std::fs::read(path);
    Ok(bytes.map_err(|error| Ended::error(Exit::NotFound, format!("cannot read {name}: {error}")))?.into())
}

/// Submits a run that begins with these weights. Uploads take what they take, so that there is no deadline.
pub(super) async fn send(cluster: &Cluster, request: SubmitRunRequest, weights: Bytes) -> Result<Run, Status> {
    let part = |part| SubmitRunWithWeightsRequest { part: Some(part) };
    let pieces = (0..weights.len()).step_by(PIECE);
    let pieces = pieces.map(move |at| part(Part::Weights(weights.slice(at..(at + PIECE).min(weights.len())))));
    let parts = std::iter::once(part(Part::Start(request))).chain(pieces);
    cluster.runs.clone().submit_run_with_weights(futures::stream::iter(parts)).await.map(Response::into_inner)
}
