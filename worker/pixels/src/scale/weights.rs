//! What each pixel of a scaled image is made of.

use proto::Filter;

use super::{Span, kernel};

/// The weights of a result add up to 1 in units of 1/2^14, or of less where they are many.
const LEAST_BITS: u32 = 14;
/// So that sums of 255 times weights that add up to 1, some of them negative, fit 32 bits.
const MOST_BITS: u32 = 22;

/// The weights along one side: result n is made of `taps` values from `starts[n]` on.
#[derive(Debug)]
pub(super) struct Weights {
    starts: Vec<usize>,
    taps: usize,
    pub(super) values: Vec<i16>,
    /// Weights are in units of 1/2^bits.
    pub(super) bits: u32,
}

impl Weights {
    /// For a side of `of` pixels.
    pub(super) fn new(filter: Filter, of: usize, Span { start, length, to }: Span) -> Self {
        let scale = length / to as f64;
        // A smaller image sees all pixels of its source: the kernel grows with them.
        let stretch = scale.max(1.0);
        let radius = kernel::radius(filter, scale);
        let taps = ((2.0 * radius) as usize + 1).min(of);
        let bits = (LEAST_BITS + stretch.log2() as u32).min(MOST_BITS);
        let (mut starts, mut values) = (Vec::with_capacity(to), vec![0; taps * to]);
        let mut exact = vec![0.0; taps];
        for (to, values) in values.chunks_exact_mut(taps).enumerate() {
            let centre = start + (to as f64 + 0.5) * scale - 0.5;
            let first = ((centre - radius).ceil().max(0.0) as usize).min(of - taps);
            for (i, weight) in exact.iter_mut().enumerate() {
                *weight = kernel::weight(filter, scale, (first + i) as f64 - centre);
            }
            let unit = f64::from(1u32 << bits) / exact.iter().sum::<f64>();
            for (value, weight) in values.iter_mut().zip(&exact) {
                *value = (weight * unit).round() as i16;
            }
            // What is flat must stay as it is: the largest weight makes up for the rounding of all.
            let missing = (1 << bits) - values.iter().map(|&value| i32::from(value)).sum::<i32>();
            if let Some(largest) = values.iter_mut().max() {
                *largest = (i32::from(*largest) + missing).clamp(0, i32::from(i16::MAX)) as i16;
            }
            starts.push(first);
        }
        Self { starts, taps, values, bits }
    }

    pub(super) fn results(&self) -> usize {
        self.starts.len()
    }

    /// The first value that is wanted.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn first(&self) -> usize {
        self.starts.first().copied().unwrap_or(0)
    }

    /// Behind the last value that is wanted.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn end(&self) -> usize {
        self.starts.last().map_or(0, |start| start + self.taps)
    }

    pub(super) fn of(&self, result: usize) -> (usize, &[i16]) {
        (self.starts[result], &self.values[result * self.taps..][..self.taps])
    }
}
