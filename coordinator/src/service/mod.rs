//! The gRPC services: they translate messages, and decide nothing.

pub(crate) mod dataset;
pub(crate) mod fetch;
mod logs;
pub(crate) mod run;
pub(crate) mod scaler;
pub(crate) mod trainer;
mod upload;
