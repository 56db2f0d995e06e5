//! Images of 8-bit values, scaled: with Lanczos' filter of three lobes unless another one is asked for.
//!
//! fast_image_resize does that on every processor but those with AVX2: there our own code takes a seventh off the CPU
//! time of a photo's whole way from JPEG to JPEG, because it keeps weights, which the crate works out anew for each
//! plane, and has vectors for rows of single values.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod kernel;
mod plain;
mod weights;

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3};
use fast_image_resize::{Filter, FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};

use kernel::lanczos3;
use proto::Filter as Kind;

/// An image: rows of pixels without gaps, each of `channels` values: 1 or 3.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid<'a> {
    pub(super) values: &'a [u8],
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) channels: usize,
}

/// A part of one side of an image, in pixels, and how many it becomes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Span {
    pub(super) start: f64,
    pub(super) length: f64,
    pub(super) to: usize,
}

impl Span {
    fn is_whole(&self, of: usize) -> bool {
        self.start == 0.0 && self.length == of as f64 && self.to == of
    }
}

/// Scales for one thread, with its buffers.
#[derive(Debug, Default)]
pub(super) struct Scaler {
    #[cfg(target_arch = "x86_64")]
    avx2: avx2::Scaler,
    resizer: Resizer,
}

impl Scaler {
    /// The part of `from` that the spans name, scaled into `to`, which has `across.to` x `down.to` pixels.
    pub(super) fn scale(&mut self, filter: Kind, from: Grid<'_>, across: Span, down: Span, to: &mut [u8]) {
        if across.is_whole(from.width) && down.is_whole(from.height) {
            return to.copy_from_slice(from.values);
        }
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            #[allow(unsafe_code, reason = "the processor has AVX2")]
            return unsafe { self.avx2.scale(filter, from, across, down, to) };
        }
        match filter {
            Kind::Lanczos3 => self.scale_by_crate(from, across, down, to),
            Kind::Area | Kind::Bilinear => plain::scale(filter, from, across, down, to),
        }
    }

    fn scale_by_crate(&mut self, from: Grid<'_>, across: Span, down: Span, to: &mut [u8]) {
        match from.channels {
            3 => self.scale_typed::<U8x3>(from, across, down, to),
            _ => self.scale_typed::<U8>(from, across, down, to),
        }
    }

    /// The crate's `resize` would have its code for pixels of all types compiled here, which takes minutes.
    fn scale_typed<P: PixelTrait>(&mut self, from: Grid<'_>, across: Span, down: Span, to: &mut [u8]) {
        let fits = "buffers are made to fit";
        let source = TypedImageRef::<P>::from_buffer(from.width as u32, from.height as u32, from.values).expect(fits);
        let mut target = TypedImage::<P>::from_buffer(across.to as u32, down.to as u32, to).expect(fits);
        let lanczos = FilterType::Custom(Filter::new("Lanczos3", lanczos3, 3.0).expect("its support is positive"));
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(lanczos));
        let options = options.crop(across.start, down.start, across.length, down.length);
        self.resizer.resize_typed(&source, &mut target, &options).expect(fits);
    }

    /// Gives large buffers back.
    pub(super) fn release(&mut self, most: usize) {
        if self.resizer.size_of_internal_buffers() > most {
            self.resizer.reset_internal_buffers();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..length).map(next).collect()
    }

    /// By our own code, where the processor has what it wants, and by the crate.
    fn scaled(scaler: &mut Scaler, from: Grid<'_>, across: Span, down: Span) -> [Vec<u8>; 2] {
        let mut own = vec![0; across.to * down.to * from.channels];
        let mut by_crate = own.clone();
        scaler.scale(Kind::Lanczos3, from, across, down, &mut own);
        scaler.scale_by_crate(from, across, down, &mut by_crate);
        [own, by_crate]
    }

    #[test]
    fn noise_of_any_size_becomes_what_the_crate_makes_of_it() {
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
            for channels in [1, 3] {
                let values = noise(width * height * channels);
                let span = |(start, length, to)| Span { start, length, to };
                let grid = Grid { values: &values, width, height, channels };
                let [own, by_crate] = scaled(&mut scaler, grid, span(across), span(down));
                let worst = own.iter().zip(&by_crate).map(|(a, b)| a.abs_diff(*b)).max();
                // Both round twice, with weights of another precision.
                assert!(worst <= Some(2), "{width} x {height} {channels}: {worst:?}");
            }
        }
    }

    #[test]
    fn every_processor_makes_the_same_of_noise() {
        let mut scaler = Scaler::default();
        for (width, height, across, down) in [
            (500, 375, (62.5, 375.0, 256), (0.0, 375.0, 256)),
            (97, 61, (0.0, 97.0, 33), (0.0, 61.0, 31)),
            (40, 33, (1.5, 36.0, 100), (2.0, 30.0, 65)),
            (1, 1, (0.0, 1.0, 35), (0.0, 1.0, 2)),
        ] {
            for (filter, channels) in [(Kind::Area, 1), (Kind::Area, 3), (Kind::Bilinear, 1), (Kind::Bilinear, 3)] {
                let values = noise(width * height * channels);
                let span = |(start, length, to)| Span { start, length, to };
                let grid = Grid { values: &values, width, height, channels };
                let (across, down) = (span(across), span(down));
                let mut own = vec![0; across.to * down.to * channels];
                let mut plainly = own.clone();
                scaler.scale(filter, grid, across, down, &mut own);
                plain::scale(filter, grid, across, down, &mut plainly);
                assert!(own == plainly, "{filter:?} {width} x {height} {channels}");
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
                for scaled in scaled(&mut scaler, grid, across, down) {
                    assert!(scaled.iter().all(|&v| v == value), "{value} {side} {to}");
                }
            }
        }
    }
}
