//! What libtorch has and `tch` does not bind: collectives between ranks, and the memory of tensors as slices. The only room with unsafe
//! code for libtorch.

pub(crate) mod c10d;
pub(crate) mod device;
pub(crate) mod tensor;
