//! Samples on their way to the device.

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

/// The weights of red, green and blue in the grey of a pixel (ITU-R BT.601, as in Pillow and torchvision).
pub(crate) const GREY: [f32; 3] = [0.299, 0.587, 0.114];

/// The color jitter of a sample, whose channels are 0 to 1: each channel x becomes `gain` x + `grey` g + `offset`,
/// clamped to 0 to 1, where g is the pixel's grey. Brightness, contrast and saturation one after the other are one such
/// map.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ColorJitter {
    pub gain: f32,
    pub grey: f32,
    pub offset: f32,
}

impl Default for ColorJitter {
    /// No change.
    fn default() -> Self {
        Self { gain: 1.0, grey: 0.0, offset: 0.0 }
    }
}
