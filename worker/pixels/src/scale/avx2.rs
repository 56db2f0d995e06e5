//! Scaling on x86-64 processors with AVX2: first down, then across, each rounded to bytes.
//!
//! Weights are kept, since photos come in few sizes. A row of single values, of which each result wants nine or so,
//! does not suit vectors: so rows are weighed across 32 at a time, turned so that their values stand side by side, by
//! the same step as down.

#![allow(unsafe_code, reason = "vectors are loaded and stored by address")]

use std::arch::x86_64::*;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use proto::Filter;

use super::weights::Weights;
use super::{Grid, Span};

/// Values that are weighed together.
const LANES: usize = 32;
/// Weights that are kept, of all sizes together.
const KEPT_WEIGHTS: usize = 1 << 18;

/// Which columns of an image are wanted, and the weights of both sides.
#[derive(Debug)]
struct Task {
    columns: Range<usize>,
    across: Arc<Weights>,
    down: Arc<Weights>,
}

/// Scales for one thread, with its buffers.
#[derive(Debug, Default)]
pub(super) struct Scaler {
    kept: HashMap<(Filter, usize, [u64; 3]), Arc<Weights>>,
    kept_weights: usize,
    /// [`LANES`] rows, weighed down.
    rows: Vec<u8>,
    /// The same, turned: the values of one column side by side.
    turned: Vec<[u8; LANES]>,
    /// Weighed across as well.
    weighed: Vec<[u8; LANES]>,
}

impl Scaler {
    /// As [`super::Scaler::scale`].
    #[target_feature(enable = "avx2")]
    pub(super) fn scale(&mut self, filter: Filter, from: Grid<'_>, across: Span, down: Span, to: &mut [u8]) {
        let Task { columns, across, down } = self.prepare(filter, from, across, down);
        let (stride, width, channels) = (from.width * from.channels, columns.len(), from.channels);
        let row = across.results() * channels;
        for (strip, to) in to.chunks_mut(LANES * row).enumerate() {
            let height = to.len() / row;
            for (y, weighed) in self.rows.chunks_exact_mut(width).take(height).enumerate() {
                let (first, weights) = down.of(strip * LANES + y);
                let source = &from.values[first * stride + columns.start..];
                for x in (0..width).step_by(LANES) {
                    // The last block may overlap the one before it.
                    let x = x.min(width.saturating_sub(LANES));
                    match weighed[x..].first_chunk_mut() {
                        Some(weighed) => weigh(&source[x..], stride, weights, down.bits, weighed),
                        None => weigh_narrow(source, stride, weights, down.bits, weighed),
                    }
                }
            }
            let (eights, rest) = self.turned.as_chunks_mut();
            let done = 8 * eights.len();
            for (x, columns) in eights.iter_mut().enumerate() {
                to_columns(&self.rows[8 * x..], width, columns);
            }
            for (x, column) in rest.iter_mut().enumerate() {
                *column = std::array::from_fn(|y| self.rows[y * width + done + x]);
            }
            for (x, weighed) in self.weighed.chunks_exact_mut(channels).enumerate() {
                let (first, weights) = across.of(x);
                for (channel, weighed) in weighed.iter_mut().enumerate() {
                    let source = self.turned[first * channels - columns.start + channel..].as_flattened();
                    weigh(source, LANES * channels, weights, across.bits, weighed);
                }
            }
            let (eights, rest) = self.weighed.as_chunks();
            let done = 8 * eights.len();
            for (x, columns) in eights.iter().enumerate() {
                to_rows(columns, &mut to[8 * x..], row);
            }
            for (y, to) in to.chunks_exact_mut(row).enumerate() {
                to[done..].iter_mut().zip(rest).for_each(|(to, column)| *to = column[y]);
            }
        }
    }

    /// What there is to do, with weights and buffers for it.
    fn prepare(&mut self, filter: Filter, from: Grid<'_>, across: Span, down: Span) -> Task {
        let (across, down) = (self.weights(filter, from.width, across), self.weights(filter, from.height, down));
        let columns = across.first() * from.channels..across.end() * from.channels;
        self.rows.resize(LANES * columns.len(), 0);
        self.turned.resize(columns.len(), [0; LANES]);
        self.weighed.resize(across.results() * from.channels, [0; LANES]);
        Task { columns, across, down }
    }

    fn weights(&mut self, filter: Filter, of: usize, span: Span) -> Arc<Weights> {
        let key = (filter, of, [span.start.to_bits(), span.length.to_bits(), span.to as u64]);
        if let Some(weights) = self.kept.get(&key) {
            return Arc::clone(weights);
        }
        let weights = Arc::new(Weights::new(filter, of, span));
        self.kept_weights += weights.values.len();
        if self.kept_weights > KEPT_WEIGHTS {
            self.kept.clear();
            self.kept_weights = weights.values.len();
        }
        if self.kept_weights <= KEPT_WEIGHTS {
            self.kept.insert(key, Arc::clone(&weights));
        }
        weights
    }
}

/// `weighed[i]` becomes the sum of `weights[k] * source[k * stride + i]`, over all k: two values of a lane at a time.
#[inline]
#[target_feature(enable = "avx2")]
fn weigh(source: &[u8], stride: usize, weights: &[i16], bits: u32, weighed: &mut [u8; LANES]) {
    let load = |k: usize| load(lanes(&source[k * stride..]));
    let zero = _mm256_setzero_si256();
    let mut sums = [_mm256_set1_epi32(1 << (bits - 1)); 4];
    let mut add = |a, b, weights: [i16; 2]| {
        let weights = _mm256_set1_epi32(i32::from(weights[0]) & 0xffff | i32::from(weights[1]) << 16);
        let (low, high) = (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
        let pairs = [
            _mm256_unpacklo_epi8(low, zero),
            _mm256_unpackhi_epi8(low, zero),
            _mm256_unpacklo_epi8(high, zero),
            _mm256_unpackhi_epi8(high, zero),
        ];
        for (sum, pairs) in sums.iter_mut().zip(pairs) {
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, weights));
        }
    };
    let (twos, last) = weights.as_chunks::<2>();
    for (k, &two) in twos.iter().enumerate() {
        add(load(2 * k), load(2 * k + 1), two);
    }
    if let &[weight] = last {
        add(load(2 * twos.len()), zero, [weight, 0]);
    }
    let bits = _mm_cvtsi32_si128(bits as i32);
    let sums = sums.map(|sum| _mm256_sra_epi32(sum, bits));
    // Packing undoes the order of unpacking, and saturates.
    let words = [_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3])];
    store(_mm256_packus_epi16(words[0], words[1]), weighed);
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(values: &[u8; LANES]) -> __m256i {
    // SAFETY: 32 bytes are there.
    unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(values: __m256i, into: &mut [u8; LANES]) {
    // SAFETY: there is room for 32 bytes.
    unsafe { _mm256_storeu_si256(into.as_mut_ptr().cast(), values) };
}

/// The first eight values of [`LANES`] rows, which are `width` long, as columns: rows y and y + 16 in the two halves of
/// a vector.
#[inline]
#[target_feature(enable = "avx2")]
fn to_columns(rows: &[u8], width: usize, columns: &mut [[u8; LANES]; 8]) {
    let value = |y: usize| eight(&rows[y * width..]) as i64;
    let row = |y: usize| _mm256_set_epi64x(0, value(y + 16), 0, value(y));
    // Of each column the values of 2, 4, 8 and 16 rows side by side.
    let twos = |y: usize| _mm256_unpacklo_epi8(row(y), row(y + 1));
    let fours = |y: usize| {
        let (a, b) = (twos(y), twos(y + 2));
        [_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)]
    };
    let eights = |y: usize| {
        let ([a, b], [c, d]) = (fours(y), fours(y + 4));
        [
            _mm256_unpacklo_epi32(a, c),
            _mm256_unpackhi_epi32(a, c),
            _mm256_unpacklo_epi32(b, d),
            _mm256_unpackhi_epi32(b, d),
        ]
    };
    let (upper, lower) = (eights(0), eights(8));
    for ((columns, upper), lower) in columns.as_chunks_mut::<2>().0.iter_mut().zip(upper).zip(lower) {
        store(_mm256_unpacklo_epi64(upper, lower), &mut columns[0]);
        store(_mm256_unpackhi_epi64(upper, lower), &mut columns[1]);
    }
}

/// The way back, for as many rows as there are.
#[inline]
#[target_feature(enable = "avx2")]
fn to_rows(columns: &[[u8; LANES]; 8], rows: &mut [u8], width: usize) {
    if rows.len() < (LANES - 1) * width + 8 {
        for (y, row) in rows.chunks_mut(width).enumerate() {
            row.iter_mut().zip(columns).for_each(|(value, column)| *value = column[y]);
        }
        return;
    }
    // Of each row the values of 2, 4 and 8 columns side by side; rows y and y + 16 in the two halves.
    let twos = |x: usize| {
        let (a, b) = (load(&columns[x]), load(&columns[x + 1]));
        [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)]
    };
    let fours = |x: usize| {
        let ([a, b], [c, d]) = (twos(x), twos(x + 2));
        [
            _mm256_unpacklo_epi16(a, c),
            _mm256_unpackhi_epi16(a, c),
            _mm256_unpacklo_epi16(b, d),
            _mm256_unpackhi_epi16(b, d),
        ]
    };
    let mut put = |y: usize, values: i64| {
        let row: Option<&mut [u8; 8]> = rows[y * width..].first_chunk_mut();
        *row.expect("whole rows") = values.to_le_bytes();
    };
    for ((left, right), y) in fours(0).into_iter().zip(fours(4)).zip((0..).step_by(4)) {
        let (a, b) = (_mm256_unpacklo_epi32(left, right), _mm256_unpackhi_epi32(left, right));
        for (values, y) in [(a, y), (b, y + 2)] {
            put(y, _mm256_extract_epi64::<0>(values));
            put(y + 1, _mm256_extract_epi64::<1>(values));
            put(y + 16, _mm256_extract_epi64::<2>(values));
            put(y + 17, _mm256_extract_epi64::<3>(values));
        }
    }
}

/// As [`weigh`], for a row of fewer values.
fn weigh_narrow(source: &[u8], stride: usize, weights: &[i16], bits: u32, weighed: &mut [u8]) {
    for (x, weighed) in weighed.iter_mut().enumerate() {
        let values = source[x..].iter().step_by(stride);
        let terms = values.zip(weights).map(|(&value, &weight)| i32::from(value) * i32::from(weight));
        *weighed = byte((1 << (bits - 1)) + terms.sum::<i32>(), bits);
    }
}

fn lanes(source: &[u8]) -> &[u8; LANES] {
    source.first_chunk().expect("a block never reaches beyond its rows")
}

fn eight(values: &[u8]) -> u64 {
    u64::from_le_bytes(*values.first_chunk().expect("whole squares"))
}

fn byte(sum: i32, bits: u32) -> u8 {
    (sum >> bits).clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_kept_up_to_a_limit() {
        let mut scaler = Scaler::default();
        for side in 4000..4100 {
            let values = vec![0; side];
            let from = Grid { values: &values, width: side, height: 1, channels: 1 };
            let across = Span { start: 0.0, length: side as f64, to: 256 };
            scaler.prepare(Filter::Lanczos3, from, across, Span { start: 0.0, length: 1.0, to: 2 });
            let held: usize = scaler.kept.values().map(|weights| weights.values.len()).sum();
            assert!(held == scaler.kept_weights && held <= KEPT_WEIGHTS);
        }
    }
}
