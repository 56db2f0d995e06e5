//! Steps of the work on pixels with the 256-bit vectors of x86-64 processors, where the compiler finds none by itself.

#![allow(unsafe_code, reason = "vectors are loaded and stored by address")]

use std::arch::x86_64::*;

use super::lanczos::{self, LANES, eight, lanes};

/// As [`lanczos::weigh`]: two values of a lane at a time.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn weigh(source: &[u8], stride: usize, weights: &[i16], bits: u32, weighed: &mut [u8; LANES]) {
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

/// As [`lanczos::to_columns`]: rows y and y + 16 in the two halves of a vector.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn to_columns(rows: &[u8], width: usize, columns: &mut [[u8; LANES]; 8]) {
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

/// As [`lanczos::to_rows`].
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn to_rows(columns: &[[u8; LANES]; 8], rows: &mut [u8], width: usize) {
    if rows.len() < (LANES - 1) * width + 8 {
        return lanczos::to_rows(columns, rows, width);
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

/// As `measure::of_row`, for whole vectors: no row is so long that a sum would not fit.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn of_row(luma: &[[u8; LANES]], more: &[[u8; LANES]], less: &[[u8; LANES]]) -> (u64, u64) {
    let zero = _mm256_setzero_si256();
    let (mut sums, mut squares) = (zero, zero);
    for ((luma, more), less) in luma.iter().zip(more).zip(less) {
        let values = _mm256_subs_epu8(_mm256_adds_epu8(load(luma), load(more)), load(less));
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(values, zero));
        for words in [_mm256_unpacklo_epi8(values, zero), _mm256_unpackhi_epi8(values, zero)] {
            squares = _mm256_add_epi32(squares, _mm256_madd_epi16(words, words));
        }
    }
    let (mut fours, mut eights) = ([0; LANES], [0; LANES]);
    store(sums, &mut fours);
    store(squares, &mut eights);
    let sum = fours.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).sum();
    (sum, eights.as_chunks().0.iter().map(|&bytes| u64::from(u32::from_le_bytes(bytes))).sum())
}
