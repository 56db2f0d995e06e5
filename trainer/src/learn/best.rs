//! The weights that were best on the validation split.

use anyhow::{Context, Result};
use tch::Tensor;
use tracing::{info, warn};

use super::agree::{largest, while_others_wait};
use super::alexnet::AlexNet;
use super::checkpoint;
use super::failure::Failure;
use super::job::{Job, fresh};
use super::membership::Membership;
use super::records::Records;
use crate::torch::tensor::Named;

/// A network with the best weights, on every rank, and the step after which they were so good. None: nothing was
/// measured, they are the last ones, or their checkpoint is gone.
pub(super) fn best_weights(
    job: &Job,
    membership: &Membership,
    records: &mut Records<'_>,
) -> Result<Option<(AlexNet, u64)>, Failure> {
    let Some(best) = job.progress.best.filter(|best| best.step < job.progress.step) else { return Ok(None) };
    let (network, _) = fresh(&job.spec, &job.manifest, job.device);
    let weights = network.weights();
    let reading = (membership.rank == 0).then(|| read(job, records, best.step, &weights));
    let read = while_others_wait(&job.context.runtime, &membership.group, reading)?;
    if let Some(Err(error)) = &read {
        let error = format!("{error:#}");
        warn!(step = best.step, error, "the best weights cannot be read; the last ones are tested and exported");
    }
    let is_read = matches!(read, Some(Ok(())));
    if largest(&membership.group, [i64::from(is_read)])?[0] == 0 {
        return Ok(None);
    }
    let tensors: Vec<Tensor> = weights.into_iter().map(|(_, tensor)| tensor).collect();
    membership.group.broadcast(&tensors, 0)?;
    info!(step = best.step, top1 = best.top1, "the best weights are tested and exported");
    Ok(Some((network, best.step)))
}

async fn read(job: &Job, records: &mut Records<'_>, step: u64, into: &Named) -> Result<()> {
    let made = records.checkpoint(step).await.context("there is no checkpoint of them")?;
    let mut tensors = checkpoint::read_tensors(&job.context.store, &made.key, &made.digests).await?;
    tensors.retain(|(name, _)| !name.starts_with("momentum."));
    checkpoint::load(into, &tensors)
}
