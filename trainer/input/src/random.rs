//! Random numbers as pure functions of what they are for, so that they are the same on any machine, for any number of
//! ranks, in any order, and after any crash. Counter-based: a key names a stream, a counter a place in it.

use std::mem::MaybeUninit;

/// The key of the stream that these words name.
pub fn key(words: &[u64]) -> u64 {
    words.iter().fold(GOLDEN, |state, &word| bits(state, word))
}

/// The `index`-th 64 random bits of a stream (Steele, Lea & Flood's SplitMix64, 2014).
pub fn bits(key: u64, index: u64) -> u64 {
    let mut z = key ^ mix(index.wrapping_add(GOLDEN));
    z = z.wrapping_add(GOLDEN);
    mix(z)
}

/// The `index`-th number of a stream in [0, 1): the first 24 bits, which an f32 holds exactly.
pub fn uniform(key: u64, index: u64) -> f32 {
    (bits(key, index) >> 40) as f32 / (1u32 << 24) as f32
}

/// The `index`-th number of a stream of normal ones, mean 0 and deviation 1 (Box & Muller, 1958).
pub fn normal(key: u64, index: u64) -> f64 {
    let bits = bits(key, index);
    let half = |bits: u64| ((bits & 0xffff_ffff) as f64 + 0.5) / 4_294_967_296.0;
    (-2.0 * half(bits).ln()).sqrt() * (std::f64::consts::TAU * half(bits >> 32)).cos()
}

/// The `index`-th number of a stream in 0 .. `n`, by multiplication instead of division (Lemire, 2019).
pub fn below(key: u64, index: u64, n: u64) -> u64 {
    ((u128::from(bits(key, index)) * u128::from(n)) >> 64) as u64
}

/// Fisher and Yates' shuffle.
pub fn shuffle<T>(items: &mut [T], key: u64) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(key, i as u64, i as u64 + 1) as usize);
    }
}

/// Writes numbers of a stream from the `from`-th on, within `bound` of 0.
pub fn write_uniform(key: u64, from: u64, bound: f32, into: &mut [MaybeUninit<f32>]) {
    for (place, i) in into.iter_mut().zip(from..) {
        place.write(bound * (2.0 * uniform(key, i) - 1.0));
    }
}

/// Writes normal numbers of a stream from the `from`-th on, with mean 0 and this deviation.
pub fn write_normal(key: u64, from: u64, deviation: f64, into: &mut [MaybeUninit<f32>]) {
    for (place, i) in into.iter_mut().zip(from..) {
        place.write((deviation * normal(key, i)) as f32);
    }
}

/// Writes 0 with a probability of `threshold` / 65536, else `scale`, by 16 bits of a stream each.
pub fn write_mask(key: u64, threshold: u64, scale: f32, into: &mut [MaybeUninit<f32>]) {
    for (index, four) in into.chunks_mut(4).enumerate() {
        let bits = bits(key, index as u64);
        for (part, unit) in four.iter_mut().enumerate() {
            unit.write(if (bits >> (16 * part)) & 0xffff < threshold { 0.0 } else { scale });
        }
    }
}

/// The constants of [`bits`]: what is added, and what is multiplied by in turn.
pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// See [`GOLDEN`].
pub const MIX_1: u64 = 0xbf58_476d_1ce4_e5b9;
/// See [`GOLDEN`].
pub const MIX_2: u64 = 0x94d0_49bb_1331_11eb;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(MIX_1);
    z = (z ^ (z >> 27)).wrapping_mul(MIX_2);
    z ^ (z >> 31)
}
