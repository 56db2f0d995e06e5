//! Decoded images.

use std::sync::OnceLock;

use crate::color::GREY;

/// A decoded image.
#[derive(Debug)]
pub struct Image {
    /// The sample's key.
    pub key: u64,
    /// The index of its class in the manifest.
    pub label: u32,
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// Rows of pixels of red, green, blue.
    pub pixels: Vec<u8>,
    grey: OnceLock<f32>,
}

impl Image {
    /// From its pixels.
    pub fn new(key: u64, label: u32, (width, height): (usize, usize), pixels: Vec<u8>) -> Self {
        Self { key, label, width, height, pixels, grey: OnceLock::new() }
    }

    /// The mean grey of its pixels, 0 to 1.
    pub fn grey(&self) -> f32 {
        *self.grey.get_or_init(|| {
            let mut sums = [0_u64; 3];
            for pixel in self.pixels.as_chunks::<3>().0 {
                for (sum, &byte) in sums.iter_mut().zip(pixel) {
                    *sum += u64::from(byte);
                }
            }
            let pixels = (self.width * self.height) as f32;
            sums.iter().zip(GREY).map(|(&sum, weight)| weight * sum as f32 / pixels / 255.0).sum()
        })
    }
}
