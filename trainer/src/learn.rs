//! The run on one rank: the network, the step, the loop over epochs, and what is kept of all this.

mod agree;
pub(crate) mod alexnet;
mod averaging;
mod best;
pub(crate) mod checkpoint;
pub(crate) mod context;
pub(crate) mod control;
pub(crate) mod device_time;
mod evaluate;
mod export;
pub(crate) mod failure;
mod graphs;
mod history;
pub(crate) mod job;
mod membership;
mod onnx;
mod records;
pub(crate) mod reports;
pub(crate) mod schedule;
pub(crate) mod step;
pub(crate) mod synthetic;
mod timing;
pub(crate) mod train;
