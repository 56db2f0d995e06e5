//! What libtorch has and `tch` does not bind: its own c10d, the engine inside PyTorch's DistributedDataParallel, on
//! `tch` tensors; autocast; CUDA graphs; a fused optimizer; the memory of tensors as slices. The only room with unsafe
//! code for libtorch.
//!
//! A generation is one [`Group`], made over one [`Store`]. Its [`Reducer`] averages gradients while backward still
//! runs; its small all-reduces carry everything else. After any error a group is of no more use: [`Aborter::abort`] it,
//! drop reducer and group, and make the next generation's.
//!
//! NCCL or gloo is one branch in the making of a group (`shim.cc`); all code on this side is the same in both builds.
//!
//! **A group and what is made from it stay on one thread**: the order in which a rank starts its collectives must be
//! that of all others. Only its [`Aborter`] crosses threads.
#![allow(unsafe_code, reason = "tensors and c10d's objects cross into C++ here, and nowhere else")]

mod autocast;
mod autograd;
mod copies;
pub(crate) mod device;
mod error;
mod ffi;
mod graph;
mod group;
mod moment;
mod optimizer;
mod reducer;
mod store;
pub(crate) mod tensor;
#[cfg(test)]
mod tests;

pub(crate) use autocast::{Half, autocast};
pub(crate) use autograd::{gradients, set_gradients};
#[cfg(test)]
pub(crate) use copies::Double;
pub(crate) use copies::{Arrival, Copies};
pub(crate) use device::Mark;
#[cfg(test)]
pub(crate) use device::{FAKE, Fake};
pub(crate) use error::{Error, Result};
pub(crate) use graph::{Graph, Recorder};
pub(crate) use group::{Aborter, Group, Member, NCCL_ENVIRONMENT, Op, Work};
pub(crate) use moment::Moment;
#[cfg(test)]
pub(crate) use moment::{Double as MomentDouble, FAKE_CLOCK, FakeClock};
pub(crate) use optimizer::{Settings as SgdSettings, Sgd};
pub(crate) use reducer::Reducer;
pub(crate) use store::Store;
