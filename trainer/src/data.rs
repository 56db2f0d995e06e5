//! The samples of a run, from the object store to tensors on the device, always ahead of the step.

pub(crate) mod batch;
pub(crate) mod cache;
pub(crate) mod jpeg;
pub(crate) mod loader;
pub(crate) mod normalise;
pub(crate) mod plan;
pub(crate) mod random;
pub(crate) mod ready;
pub(crate) mod stream;
