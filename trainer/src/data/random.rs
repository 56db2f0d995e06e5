//! Random numbers as pure functions of what they are for, on the host and on a device.

pub(crate) use input::random::*;
use tch::Tensor;

/// [`bits`] of each key and each index, on their device: its 64-bit integers wrap as ours do, and only their shifts
/// keep the sign.
pub(crate) fn bits_on(keys: &Tensor, indexes: &Tensor) -> Tensor {
    let shifted = |z: &Tensor, by: i64| z.bitwise_right_shift_tensor_scalar(by).bitwise_and((1_i64 << (64 - by)) - 1);
    let mix = |z: Tensor| {
        let z = z.bitwise_xor_tensor(&shifted(&z, 30)) * MIX_1 as i64;
        let z = z.bitwise_xor_tensor(&shifted(&z, 27)) * MIX_2 as i64;
        z.bitwise_xor_tensor(&shifted(&z, 31))
    };
    mix(keys.bitwise_xor_tensor(&mix(indexes + GOLDEN as i64)) + GOLDEN as i64)
}
