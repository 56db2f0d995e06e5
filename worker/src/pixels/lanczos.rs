//! Images of 8-bit values, scaled with Lanczos' filter of three lobes: first down, then across, each rounded to bytes.
//!
//! Most of what scaling a plane of a photo costs elsewhere is not the weighing: weights are worked out anew for each plane, and a
//! row of single values, of which each result wants nine or so, does not suit vectors. Here weights are kept, since photos come in few
//! sizes, and rows are weighed across 32 at a time, turned so that their values stand side by side: the same step as down.

#![allow(unsafe_code, reason = "vectors that the compiler does not find by itself")]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

#[cfg(target_arch = "x86_64")]
use super::avx2;

/// Values that are weighed together.
pub(crate) const LANES: usize = 32;
/// The weights of a result add up to 1 in units of 1/2^14, or of less where they are many.
const LEAST_BITS: u32 = 14;
/// So that sums of 255 times weights that add up to 1, some of them negative, fit 32 bits.
const MOST_BITS: u32 = 22;
/// Weights that are kept, of all sizes together.
const KEPT_WEIGHTS: usize = 1 << 18;

/// An image: rows of pixels without gaps, each of `channels` values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid<'a> {
    pub(crate) values: &'a [u8],
    pub(crate) width: usize,
    pub(crate) height: usize,
    pub(crate) channels: usize,
}

/// A part of one side of an image, in pixels, and how many it becomes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Span {
    pub(crate) start: f64,
    pub(crate) length: f64,
    pub(crate) to: usize,
}

impl Span {
    fn is_as_it_was(&self, of: usize) -> bool {
        self.start == 0.0 && self.length == of as f64 && self.to == of
    }
}

/// An image, which of its columns are wanted, and the weights of both sides.
#[derive(Debug)]
struct Task<'a> {
    from: Grid<'a>,
    columns: Range<usize>,
    across: Arc<Weights>,
    down: Arc<Weights>,
}

/// Scales for one thread, with its buffers.
#[derive(Debug, Default)]
pub(crate) struct Scaler {
    kept: HashMap<(usize, [u64; 3]), Arc<Weights>>,
    kept_weights: usize,
    /// [`LANES`] rows, weighed down.
    rows: Vec<u8>,
    /// The same, turned: the values of one column side by side.
    turned: Vec<[u8; LANES]>,
    /// Weighed across as well.
    weighed: Vec<[u8; LANES]>,
}

impl Scaler {
    /// The part of `from` that the spans name, scaled into `to`, which has `across.to` x `down.to` pixels.
    pub(crate) fn scale(&mut self, from: Grid<'_>, across: Span, down: Span, to: &mut [u8]) {
        if across.is_as_it_was(from.width) && down.is_as_it_was(from.height) {
            return to.copy_from_slice(from.values);
        }
        let task = self.prepare(from, across, down);
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { self.weigh_with_avx2(&task, to) };
        }
        self.weigh_plainly(&task, to);
    }

    /// What there is to do, with weights and buffers for it.
    fn prepare<'a>(&mut self, from: Grid<'a>, across: Span, down: Span) -> Task<'a> {
        let (across, down) = (self.weights(from.width, across), self.weights(from.height, down));
        let columns = across.first() * from.channels..across.end() * from.channels;
        self.rows.resize(LANES * columns.len(), 0);
        self.turned.resize(columns.len(), [0; LANES]);
        self.weighed.resize(across.results() * from.channels, [0; LANES]);
        Task { from, columns, across, down }
    }

    fn weights(&mut self, of: usize, span: Span) -> Arc<Weights> {
        let key = (of, [span.start.to_bits(), span.length.to_bits(), span.to as u64]);
        if let Some(weights) = self.kept.get(&key) {
            return Arc::clone(weights);
        }
        let weights = Arc::new(Weights::new(of, span));
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

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn weigh_with_avx2(&mut self, task: &Task<'_>, to: &mut [u8]) {
        // Only closures of a function with AVX2 become a part of it.
        let weigh = |source: &[u8], stride, weights: &[i16], bits, weighed: &mut [u8; LANES]| {
            avx2::weigh(source, stride, weights, bits, weighed);
        };
        let to_columns = |rows: &[u8], width, columns: &mut [[u8; LANES]; 8]| avx2::to_columns(rows, width, columns);
        let to_rows = |columns: &[[u8; LANES]; 8], rows: &mut [u8], width| avx2::to_rows(columns, rows, width);
        self.weigh(task, to, (weigh, to_columns, to_rows));
    }

    fn weigh_plainly(&mut self, task: &Task<'_>, to: &mut [u8]) {
        self.weigh(task, to, (weigh, to_columns, to_rows));
    }

    /// By what does as [`weigh`], [`to_columns`] and [`to_rows`] do.
    #[inline(always)]
    fn weigh(
        &mut self,
        Task { from, columns, across, down }: &Task<'_>,
        to: &mut [u8],
        (weigh, to_columns, to_rows): (
            impl Fn(&[u8], usize, &[i16], u32, &mut [u8; LANES]),
            impl Fn(&[u8], usize, &mut [[u8; LANES]; 8]),
            impl Fn(&[[u8; LANES]; 8], &mut [u8], usize),
        ),
    ) {
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
}

/// The weights along one side: result n is made of `taps` values from `starts[n]` on.
#[derive(Debug)]
struct Weights {
    starts: Vec<usize>,
    taps: usize,
    values: Vec<i16>,
    /// Weights are in units of 1/2^bits.
    bits: u32,
}

impl Weights {
    /// For a side of `of` pixels.
    fn new(of: usize, Span { start, length, to }: Span) -> Self {
        let scale = length / to as f64;
        // A smaller image sees all pixels of its source: the kernel grows with them.
        let stretch = scale.max(1.0);
        let radius = 3.0 * stretch;
        let taps = ((2.0 * radius) as usize + 1).min(of);
        let bits = (LEAST_BITS + stretch.log2() as u32).min(MOST_BITS);
        let (mut starts, mut values) = (Vec::with_capacity(to), vec![0; taps * to]);
        let mut exact = vec![0.0; taps];
        for (to, values) in values.chunks_exact_mut(taps).enumerate() {
            let centre = start + (to as f64 + 0.5) * scale - 0.5;
            let first = ((centre - radius).ceil().max(0.0) as usize).min(of - taps);
            for (i, weight) in exact.iter_mut().enumerate() {
                *weight = lanczos3(((first + i) as f64 - centre) / stretch);
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

    fn results(&self) -> usize {
        self.starts.len()
    }

    /// The first value that is wanted.
    fn first(&self) -> usize {
        self.starts.first().copied().unwrap_or(0)
    }

    /// Behind the last value that is wanted.
    fn end(&self) -> usize {
        self.starts.last().map_or(0, |start| start + self.taps)
    }

    fn of(&self, result: usize) -> (usize, &[i16]) {
        (self.starts[result], &self.values[result * self.taps..][..self.taps])
    }
}

/// Lanczos' kernel of three lobes, sinc(x) sinc(x / 3): both sines come from one polynomial, within 1e-10.
fn lanczos3(x: f64) -> f64 {
    use std::f64::consts::PI;
    /// sin(a) / a by powers of a squared, up to the 14th of a: (-1)^k / (2k + 1)!
    const SINE: [f64; 8] = {
        let (mut terms, mut k) = ([1.0; 8], 1);
        while k < 8 {
            terms[k] = -terms[k - 1] / ((2 * k) * (2 * k + 1)) as f64;
            k += 1;
        }
        terms
    };
    let angle = x.abs() * (PI / 3.0);
    if angle >= PI {
        return 0.0;
    }
    if angle == 0.0 {
        return 1.0;
    }
    let folded = angle.min(PI - angle);
    let square = folded * folded;
    let sine = folded * SINE.iter().rev().fold(0.0, |sum, term| sum * square + term);
    // sin(3a) = 3 sin(a) - 4 sin(a)^3
    let sinc = sine / angle;
    sinc * sinc * (1.0 - 4.0 / 3.0 * sine * sine)
}

/// `weighed[i]` becomes the sum of `weights[k] * source[k * stride + i]`, over all k.
#[inline]
fn weigh(source: &[u8], stride: usize, weights: &[i16], bits: u32, weighed: &mut [u8; LANES]) {
    /// Of its own, because only so is it compiled to vectors.
    #[inline(never)]
    fn add(sums: &mut [i32; LANES], values: &[u8; LANES], weight: i16) {
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum += i32::from(value) * i32::from(weight);
        }
    }
    let mut sums = [1 << (bits - 1); LANES];
    for (k, &weight) in weights.iter().enumerate() {
        add(&mut sums, lanes(&source[k * stride..]), weight);
    }
    *weighed = sums.map(|sum| byte(sum, bits));
}

/// The same for a row of fewer values.
fn weigh_narrow(source: &[u8], stride: usize, weights: &[i16], bits: u32, weighed: &mut [u8]) {
    for (x, weighed) in weighed.iter_mut().enumerate() {
        let values = source[x..].iter().step_by(stride);
        let terms = values.zip(weights).map(|(&value, &weight)| i32::from(value) * i32::from(weight));
        *weighed = byte((1 << (bits - 1)) + terms.sum::<i32>(), bits);
    }
}

pub(crate) fn lanes(source: &[u8]) -> &[u8; LANES] {
    source.first_chunk().expect("a block never reaches beyond its rows")
}

fn byte(sum: i32, bits: u32) -> u8 {
    (sum >> bits).clamp(0, 255) as u8
}

/// The first eight values of [`LANES`] rows, which are `width` long, as columns.
#[inline]
fn to_columns(rows: &[u8], width: usize, columns: &mut [[u8; LANES]; 8]) {
    for y in (0..LANES).step_by(8) {
        let square = std::array::from_fn(|i| eight(&rows[(y + i) * width..]));
        for (column, values) in columns.iter_mut().zip(turn(square)) {
            column[y..y + 8].copy_from_slice(&values.to_le_bytes());
        }
    }
}

/// The way back, for as many rows as there are.
#[inline]
pub(crate) fn to_rows(columns: &[[u8; LANES]; 8], rows: &mut [u8], width: usize) {
    for (y, rows) in rows.chunks_mut(8 * width).enumerate() {
        let square = columns.map(|column| eight(&column[8 * y..]));
        for (row, values) in rows.chunks_mut(width).zip(turn(square)) {
            row[..8].copy_from_slice(&values.to_le_bytes());
        }
    }
}

#[inline(always)]
pub(crate) fn eight(values: &[u8]) -> u64 {
    u64::from_le_bytes(*values.first_chunk().expect("whole squares"))
}

/// Turns 8 x 8 bytes, a row being a number whose lowest byte comes first: swaps its quarters, then theirs, then theirs (H. S. Warren,
/// Hacker's Delight, 7-3).
#[inline(always)]
fn turn(mut rows: [u64; 8]) -> [u64; 8] {
    let mut swap = |row: usize, far: usize, mask: u64| {
        let swapped = ((rows[row] >> (8 * far)) ^ rows[row + far]) & mask;
        rows[row] ^= swapped << (8 * far);
        rows[row + far] ^= swapped;
    };
    for row in [0, 1, 2, 3] {
        swap(row, 4, 0x0000_0000_ffff_ffff);
    }
    for row in [0, 1, 4, 5] {
        swap(row, 2, 0x0000_ffff_0000_ffff);
    }
    for row in [0, 2, 4, 6] {
        swap(row, 1, 0x00ff_00ff_00ff_00ff);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use fast_image_resize::images::{Image, ImageRef};
    use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..length).map(next).collect()
    }

    fn scaled(scaler: &mut Scaler, from: Grid<'_>, across: Span, down: Span) -> Vec<u8> {
        let mut to = vec![0; across.to * down.to * from.channels];
        scaler.scale(from, across, down, &mut to);
        to
    }

    #[test]
    fn the_kernel_is_lanczos_of_three_lobes() {
        use std::f64::consts::PI;
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (PI * x).sin() / (PI * x) };
        for x in (-3500..=3500).map(|i| f64::from(i) / 1000.0).chain([1e-12, -1e-7, 2.999_999_999]) {
            let wanted = if x.abs() < 3.0 { sinc(x) * sinc(x / 3.0) } else { 0.0 };
            assert!((lanczos3(x) - wanted).abs() < 1e-10, "{x}: {} is not {wanted}", lanczos3(x));
        }
    }

    #[test]
    fn noise_of_any_size_becomes_what_fast_image_resize_makes_of_it() {
        let mut scaler = Scaler::default();
        for (width, height, across, down) in [
            (500, 375, (62.5, 375.0, 256), (0.0, 375.0, 256)),
            (250, 188, (31.25, 187.5, 128), (0.0, 187.5, 128)),
            (97, 61, (0.0, 97.0, 33), (0.0, 61.0, 31)),
            (40, 33, (1.5, 36.0, 100), (2.0, 30.0, 65)),
            (700, 3, (0.0, 700.0, 9), (0.0, 3.0, 1)),
            (2, 900, (0.0, 2.0, 5), (0.0, 900.0, 8)),
            (1, 1, (0.0, 1.0, 35), (0.0, 1.0, 2)),
            (64, 64, (0.0, 64.0, 64), (0.0, 64.0, 32)),
        ] {
            for (channels, kind) in [(1, PixelType::U8), (3, PixelType::U8x3)] {
                let values = noise(width * height * channels);
                let span = |(start, length, to)| Span { start, length, to };
                let grid = Grid { values: &values, width, height, channels };
                let got = scaled(&mut scaler, grid, span(across), span(down));
                let mut wanted = Image::new(across.2 as u32, down.2 as u32, kind);
                let source = ImageRef::new(width as u32, height as u32, &values, kind).expect("fits");
                let lanczos = ResizeAlg::Convolution(FilterType::Lanczos3);
                let options = ResizeOptions::new().resize_alg(lanczos).crop(across.0, down.0, across.1, down.1);
                Resizer::new().resize(&source, &mut wanted, &options).expect("fits");
                let worst = got.iter().zip(wanted.buffer()).map(|(a, b)| a.abs_diff(*b)).max();
                // Both round twice, with weights of another precision.
                assert!(worst <= Some(2), "{width} x {height} {channels}: {worst:?}");
                let mut plain = vec![0; got.len()];
                let task = scaler.prepare(grid, span(across), span(down));
                scaler.weigh_plainly(&task, &mut plain);
                assert!(plain == got, "{width} x {height} {channels}: plain loops give other bytes");
            }
        }
    }

    #[test]
    fn what_is_flat_stays_as_it_is_however_far_it_is_scaled() {
        let mut scaler = Scaler::default();
        for value in [0, 1, 127, 254, 255] {
            for (side, to) in [(4000, 3), (300, 256), (50, 333), (7, 7)] {
                let values = vec![value; side * 40];
                let grid = Grid { values: &values, width: side, height: 40, channels: 1 };
                let (across, down) =
                    (Span { start: 0.0, length: side as f64, to }, Span { start: 0.5, length: 39.0, to: 35 });
                assert!(scaled(&mut scaler, grid, across, down).iter().all(|&v| v == value), "{value} {side} {to}");
            }
        }
    }

    #[test]
    fn plain_loops_and_vectors_give_the_same_bytes() {
        let source = noise(40 * LANES);
        for taps in 1..40 {
            let weights: Vec<i16> = (0..taps).map(|k| [16_000, -9_000, 300, -1][k % 4]).collect();
            let mut plain = [0; LANES];
            weigh(&source, LANES, &weights, 15, &mut plain);
            let mut narrow = [0; LANES - 1];
            weigh_narrow(&source, LANES, &weights, 15, &mut narrow);
            assert_eq!(plain[..LANES - 1], narrow);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                let mut vectors = [0; LANES];
                // SAFETY: the processor has AVX2.
                unsafe { avx2::weigh(&source, LANES, &weights, 15, &mut vectors) };
                assert_eq!(plain, vectors);
            }
        }
        let (mut columns, mut rows) = ([[0; LANES]; 8], [0; 9 * LANES]);
        to_columns(&source, 9, &mut columns);
        to_rows(&columns, &mut rows, 9);
        for (y, row) in rows.as_chunks::<9>().0.iter().enumerate() {
            assert_eq!((&row[..8], row[8]), (&source[9 * y..9 * y + 8], 0));
        }
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            let (mut others, mut back) = ([[0; LANES]; 8], [0; 9 * LANES]);
            // SAFETY: the processor has AVX2.
            unsafe {
                avx2::to_columns(&source, 9, &mut others);
                avx2::to_rows(&others, &mut back, 9);
            }
            assert_eq!((others, back), (columns, rows));
        }
    }

    #[test]
    fn weights_are_kept_up_to_a_limit() {
        let mut scaler = Scaler::default();
        for side in 4000..4100 {
            let values = vec![0; side];
            let grid = Grid { values: &values, width: side, height: 1, channels: 1 };
            let across = Span { start: 0.0, length: side as f64, to: 256 };
            scaled(&mut scaler, grid, across, Span { start: 0.0, length: 1.0, to: 2 });
            let held: usize = scaler.kept.values().map(|weights| weights.values.len()).sum();
            assert!(held == scaler.kept_weights && held <= KEPT_WEIGHTS);
        }
    }
}
