//! Pictures by which a network's activations are measured: some of the validation split of the dataset that it was
//! trained on.

use anyhow::{Context, Result};
use futures::TryStreamExt;
use proto::Split;
use proto::pb::Run;
use worker::{Pixels, Preparer};

use super::network::Network;
use crate::client::Cluster;
use crate::dataset::export::blocks;
use crate::dataset::reader::Reader;
use crate::exit::{Ended, Exit};

/// Enough for scales that more pictures do not change.
const PICTURES: usize = 256;

/// Pictures from all over the run's validation split, or, if it has none, of what it was trained on; prepared for its
/// network `onnx`.
///
/// # Errors
/// If the dataset is gone.
pub(super) async fn pictures(cluster: &Cluster, run: &Run, onnx: &[u8]) -> Result<Vec<Pixels>> {
    let gone = || format!("8 bits are fitted to pictures of dataset {}", run.dataset);
    let reader = Reader::through(cluster.clone(), &run.dataset);
    let manifest = reader.manifest(run.manifest_version).await.with_context(gone)?;
    let split = if manifest.samples(Split::Validation) > 0 { Split::Validation } else { Split::Train };
    let shards: Vec<_> = manifest.shards.iter().filter_map(|shard| Some((shard, shard.tars.get(&split)?))).collect();
    let each = PICTURES.div_ceil(shards.len().clamp(1, PICTURES));
    let mut preparer = Preparer::new(Network::new(onnx.to_vec())?.resize)?;
    let mut pictures = Vec::new();
    for (shard, tar) in shards.iter().step_by(shards.len().div_ceil(PICTURES).max(1)) {
        let mut of_shard = 0;
        let mut blocks = std::pin::pin!(blocks(&reader, shard, tar, false).await.with_context(gone)?);
        while of_shard < each
            && let Some(samples) = blocks.try_next().await.with_context(gone)?
        {
            let (left, before) = (each - of_shard, pictures.len());
            pictures.extend(samples.iter().take(left).filter_map(|sample| preparer.prepare(&sample.image).ok()));
            of_shard += pictures.len() - before;
        }
    }
    if pictures.is_empty() {
        return Err(Ended::error(Exit::Failed, format!("dataset {} has no picture for it", run.dataset)));
    }
    Ok(pictures)
}
