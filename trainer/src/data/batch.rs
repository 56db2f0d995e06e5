//! Samples on their way to the device.

use input::color::ColorJitter;
use tch::Tensor;

/// A batch that is ready for the device.
#[derive(Debug)]
pub(crate) struct Batch {
    /// As in the request.
    pub step: u64,
    /// As in the request.
    pub samples: u64,
    /// As in the request.
    pub shares: Vec<i64>,
    /// Its samples, in the order of the request.
    pub pixels: Pixels,
}

/// Samples as they go to the device.
#[derive(Debug)]
pub(crate) struct Pixels {
    /// [samples, crop, crop, 3], bytes.
    pub pixels: Tensor,
    /// The color jitter of each sample.
    pub jitters: Vec<ColorJitter>,
    /// [samples], 64-bit integers.
    pub labels: Tensor,
    /// The samples' keys.
    pub keys: Vec<u64>,
}

impl Pixels {
    /// `count` samples from the `start`-th on, in the same memory.
    pub(crate) fn part(&self, start: usize, count: usize) -> Self {
        let of = |tensor: &Tensor| tensor.narrow(0, start as i64, count as i64);
        Self {
            pixels: of(&self.pixels),
            jitters: self.jitters[start..start + count].to_vec(),
            labels: of(&self.labels),
            keys: self.keys[start..start + count].to_vec(),
        }
    }
}
