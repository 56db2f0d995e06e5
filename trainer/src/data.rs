//! The samples of a run, from the object store to tensors on the device, always ahead of the step.

pub(crate) mod batch;
pub(crate) mod blocks;
pub(crate) mod cache;
pub(crate) mod device_pixels;
mod gather;
pub(crate) mod loader;
pub(crate) mod normalise;
pub(crate) mod plan;
mod prefetch;
pub(crate) mod random;
pub(crate) mod requests;
pub(crate) mod store;
