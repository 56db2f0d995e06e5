//! The weights that were best on the validation split.

use anyhow::{Context, Result};
use tch::Tensor;
use tracing::{info, warn};

use super::agree::largest;
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
    let read = membership.rank == 0 && {
        let read = read(job, records, best.step, &network.weights());
        if let Err(error) = &read {
            let error = format!("{error:#}");
            warn!(step = best.step, error, "the best weights cannot be read; the last ones are tested and exported");
        }
        read.is_ok()
    };
    if largest(&membership.group, [i64::from(read)])?[0] == 0 {
        return Ok(None);
    }
    let tensors: Vec<Tensor> = network.weights().into_iter().map(|(_, tensor)| tensor).collect();
    membership.group.broadcast(&tensors, 0)?;
    info!(step = best.step, top1 = best.top1, "the best weights are tested and exported");
    Ok(Some((network, best.step)))
}

fn read(job: &Job, records: &mut Records<'_>, step: u64, into: &Named) -> Result<()> {
    let made = records.checkpoint(job, step).context("there is no checkpoint of them")?;
    let read = checkpoint::read_tensors(&job.context.store, &made.key, &made.digests);
    let mut tensors = job.context.runtime.block_on(read)?;
    tensors.retain(|(name, _)| !name.starts_with("momentum."));
    checkpoint::load(into, &tensors)
}
