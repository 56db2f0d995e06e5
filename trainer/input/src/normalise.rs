//! From bytes to the network's input, with each sample's color jitter, in one pass over the pixels.

use std::mem::MaybeUninit;

use crate::color::{ColorJitter, GREY};

/// How channels, on the scale of 0 to 1, become input.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Of each channel; it becomes 0.
    pub mean: [f64; 3],
    /// The standard deviation of each channel; it becomes 1.
    pub std: [f64; 3],
}

impl Scale {
    /// Writes the input of some samples, three planes of `area` numbers each. `pixels` has as many samples as there are
    /// jitters, each of `area` pixels of three bytes.
    pub fn write_f32(&self, jitters: &[ColorJitter], pixels: &[u8], area: usize, input: &mut [MaybeUninit<f32>]) {
        self.write(jitters, pixels, area, input, |value| value as f32);
    }

    /// As [`Self::write_f32`].
    pub fn write_f64(&self, jitters: &[ColorJitter], pixels: &[u8], area: usize, input: &mut [MaybeUninit<f64>]) {
        self.write(jitters, pixels, area, input, |value| value);
    }

    fn write<T: Copy>(
        &self,
        jitters: &[ColorJitter],
        pixels: &[u8],
        area: usize,
        input: &mut [MaybeUninit<T>],
        of: impl Fn(f64) -> T,
    ) {
        // Consecutive samples with the same color jitter share their tables.
        let mut tables: Option<(ColorJitter, Box<[[T; 256]; 3]>)> = None;
        for ((jitter, pixels), input) in jitters.iter().zip(pixels.chunks(3 * area)).zip(input.chunks_mut(3 * area)) {
            let (red, rest) = input.split_at_mut(area);
            let (green, blue) = rest.split_at_mut(area);
            let pixels = pixels.as_chunks::<3>().0.iter().zip(red).zip(green).zip(blue);
            if jitter.grey != 0.0 {
                let normal = |channel: usize, value: f32| {
                    of((f64::from(value.clamp(0.0, 1.0)) - self.mean[channel]) / self.std[channel])
                };
                for (((pixel, red), green), blue) in pixels {
                    let [r, g, b] = pixel.map(|byte| f32::from(byte) / 255.0);
                    let shared = jitter.grey * (GREY[0] * r + GREY[1] * g + GREY[2] * b) + jitter.offset;
                    red.write(normal(0, jitter.gain * r + shared));
                    green.write(normal(1, jitter.gain * g + shared));
                    blue.write(normal(2, jitter.gain * b + shared));
                }
                continue;
            }
            let of_jitter = match tables.take() {
                Some((of, tables)) if of == *jitter => tables,
                _ => Box::new(self.tables(*jitter, &of)),
            };
            let [r, g, b] = &*of_jitter;
            for (((pixel, red), green), blue) in pixels {
                red.write(r[usize::from(pixel[0])]);
                green.write(g[usize::from(pixel[1])]);
                blue.write(b[usize::from(pixel[2])]);
            }
            tables = Some((*jitter, of_jitter));
        }
    }

    /// What each value of a byte becomes in each channel.
    fn tables<T>(&self, jitter: ColorJitter, of: impl Fn(f64) -> T) -> [[T; 256]; 3] {
        std::array::from_fn(|channel| {
            std::array::from_fn(|byte| {
                let lit = (f64::from(jitter.gain) * byte as f64 / 255.0 + f64::from(jitter.offset)).clamp(0.0, 1.0);
                of((lit - self.mean[channel]) / self.std[channel])
            })
        })
    }
}
