//! The run on one rank: the network, the step, the loop over epochs, and what is kept of all this.

pub(crate) mod alexnet;
pub(crate) mod checkpoint;
mod evaluate;
mod history;
pub(crate) mod job;
mod onnx;
pub(crate) mod step;
mod timing;
pub(crate) mod train;
