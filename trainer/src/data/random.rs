//! Random numbers as pure functions of what they are for, so that they are the same on any machine, for any number of
//! ranks, in any order, and after any crash. Counter-based: a key names a stream, a counter a place in it.

use tch::Tensor;

/// The key of the stream that these words name.
pub(crate) fn key(words: &[u64]) -> u64 {
    words.iter().fold(GOLDEN, |state, &word| bits(state, word))
}

/// The `index`-th 64 random bits of a stream (Steele, Lea & Flood's SplitMix64, 2014).
pub(crate) fn bits(key: u64, index: u64) -> u64 {
    let mut z = key ^ mix(index.wrapping_add(GOLDEN));
    z = z.wrapping_add(GOLDEN);
    mix(z)
}

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

/// The `index`-th number of a stream in [0, 1): the first 24 bits, which an f32 holds exactly.
pub(crate) fn uniform(key: u64, index: u64) -> f32 {
    (bits(key, index) >> 40) as f32 / (1u32 << 24) as f32
}

/// The `index`-th number of a stream of normal ones, mean 0 and deviation 1 (Box & Muller, 1958).
pub(crate) fn normal(key: u64, index: u64) -> f64 {
    let bits = bits(key, index);
    let half = |bits: u64| ((bits & 0xffff_ffff) as f64 + 0.5) / 4_294_967_296.0;
    (-2.0 * half(bits).ln()).sqrt() * (std::f64::consts::TAU * half(bits >> 32)).cos()
}

/// The `index`-th number of a stream in 0 .. `n`, by multiplication instead of division (Lemire, 2019).
pub(crate) fn below(key: u64, index: u64, n: u64) -> u64 {
    ((u128::from(bits(key, index)) * u128::from(n)) >> 64) as u64
}

/// Fisher and Yates' shuffle.
pub(crate) fn shuffle<T>(items: &mut [T], key: u64) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(key, i as u64, i as u64 + 1) as usize);
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const MIX_1: u64 = 0xbf58_476d_1ce4_e5b9;
const MIX_2: u64 = 0x94d0_49bb_1331_11eb;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(MIX_1);
    z = (z ^ (z >> 27)).wrapping_mul(MIX_2);
    z ^ (z >> 31)
}
