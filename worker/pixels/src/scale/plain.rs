//! Scaling value by value, for processors without the vectors that `avx2` wants: first down, then across, each rounded
//! to bytes.

use proto::Filter;

use super::weights::Weights;
use super::{Grid, Span};

/// As [`super::Scaler::scale`].
pub(super) fn scale(filter: Filter, from: Grid<'_>, across: Span, down: Span, to: &mut [u8]) {
    let (across, down) = (Weights::new(filter, from.width, across), Weights::new(filter, from.height, down));
    let (stride, channels) = (from.width * from.channels, from.channels);
    let mut row = vec![0; stride];
    for (y, to) in to.chunks_exact_mut(across.results() * channels).enumerate() {
        let (first, weights) = down.of(y);
        for (x, value) in row.iter_mut().enumerate() {
            *value = weigh(&from.values[first * stride + x..], stride, weights, down.bits);
        }
        for (x, pixel) in to.chunks_exact_mut(channels).enumerate() {
            let (first, weights) = across.of(x);
            for (channel, value) in pixel.iter_mut().enumerate() {
                *value = weigh(&row[first * channels + channel..], channels, weights, across.bits);
            }
        }
    }
}

fn weigh(values: &[u8], stride: usize, weights: &[i16], bits: u32) -> u8 {
    let values = values.iter().step_by(stride);
    let sum: i32 = values.zip(weights).map(|(value, weight)| i32::from(*value) * i32::from(*weight)).sum();
    ((sum + (1 << (bits - 1))) >> bits).clamp(0, 255) as u8
}
