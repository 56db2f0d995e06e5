//! How the ranks of a generation come by the gradients of a step.

use proto::RunSpec;
use proto::pb::rank_heartbeat::Activity;
use tch::Tensor;

use super::alexnet::AlexNet;
use super::failure::Failure;
use super::graphs::Graphs;
use super::step::{self, Computed};
use crate::data::batch::Batch;
use crate::data::normalise::Normalise;
use crate::torch::{Group, Reducer};

/// Bytes of gradients in one all-reduce (PyTorch's default).
const BUCKET_BYTES: usize = 25 << 20;

/// Computes steps, and averages their gradients over ranks.
pub(crate) enum Averaging {
    /// By c10d's reducer, in hooks of autograd.
    Reducer(Reducer),
    /// Without hooks: see [`super::graphs`].
    Graphs(Box<Graphs>),
}

impl Averaging {
    /// As a spec has it, for a network whose parameters stay where they are as long as this lives.
    pub(crate) fn new(spec: &RunSpec, group: &Group, model: &AlexNet) -> Result<Self, Failure> {
        if spec.ranks.graphs {
            return Ok(Self::Graphs(Box::new(Graphs::new(spec, group, model)?)));
        }
        let parameters: Vec<Tensor> = model.trained().into_iter().map(|(_, parameter)| parameter).collect();
        let compress = step::compression(spec.ranks.compress, group.world());
        Ok(Self::Reducer(Reducer::new(group, &parameters, BUCKET_BYTES, compress)?))
    }

    /// Computes a rank's part of a step: [`step::compute`].
    pub(crate) fn compute(
        &mut self,
        spec: &RunSpec,
        group: &Group,
        model: &AlexNet,
        normalise: &Normalise,
        batch: &Batch,
        at: &dyn Fn(Activity),
    ) -> Result<Computed, Failure> {
        match self {
            Self::Reducer(reducer) => step::compute(spec, group, model, normalise, reducer, batch, at),
            Self::Graphs(graphs) => graphs.compute(spec, group, model, normalise, batch, at),
        }
    }
}
