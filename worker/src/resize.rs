//! Pixels to the stored square: shorter side scaled to the target, centre cut out, turned upright; and what is measured on it.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use proto::shard::Moments;

/// Buffers above this many bytes are given back after use: one huge picture must not stay in memory for ever.
pub(crate) const KEPT_BUFFER: usize = 16 << 20;

/// A decoded image: RGB, 8 bits a channel, not yet turned upright.
#[derive(Debug, Default)]
pub(crate) struct Pixels {
    buffer: Vec<u8>,
    width: u32,
    height: u32,
    orientation: u8,
}

impl Pixels {
    /// Makes it an image of this size and EXIF orientation, its content unspecified.
    pub(crate) fn reset(&mut self, width: u32, height: u32, orientation: u8) {
        (self.width, self.height, self.orientation) = (width, height, orientation);
        let length = self.length();
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
    }

    /// Takes the pixels of another decoder.
    pub(crate) fn replace(&mut self, rgb: Vec<u8>, width: u32, height: u32, orientation: u8) {
        self.buffer = rgb;
        self.reset(width, height, orientation);
    }

    pub(crate) fn rgb(&self) -> &[u8] {
        &self.buffer[..self.length()]
    }

    pub(crate) fn rgb_mut(&mut self) -> &mut [u8] {
        let length = self.length();
        &mut self.buffer[..length]
    }

    /// Gives a large buffer back.
    pub(crate) fn release(&mut self) {
        if self.buffer.capacity() > KEPT_BUFFER {
            *self = Self::default();
        }
    }

    fn length(&self) -> usize {
        self.width as usize * self.height as usize * 3
    }
}

/// Resizes for one thread, with its buffers.
#[derive(Debug, Default)]
pub(crate) struct Shrinker {
    resizer: Resizer,
    square: Vec<u8>,
    turned: Vec<u8>,
}

impl Shrinker {
    /// The stored square: the largest centred square of `pixels`, scaled (up or down) to `size` x `size` with Lanczos' filter
    /// over all source pixels, upright. RGB, valid until the next call.
    pub(crate) fn cover(&mut self, pixels: &Pixels, size: u32) -> Result<&[u8], fast_image_resize::ResizeError> {
        let length = size as usize * size as usize * 3;
        self.square.resize(length, 0);
        let options = ResizeOptions::new()
            .resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3))
            .fit_into_destination(Some((0.5, 0.5)));
        resize(&mut self.resizer, (pixels.rgb(), pixels.width, pixels.height), (&mut self.square, size), &options)?;
        if self.resizer.size_of_internal_buffers() > KEPT_BUFFER {
            self.resizer.reset_internal_buffers();
        }
        if pixels.orientation <= 1 {
            return Ok(&self.square);
        }
        self.turned.resize(length, 0);
        turn(&self.square, size as usize, pixels.orientation, &mut self.turned);
        Ok(&self.turned)
    }
}

/// Hashes stored squares, for one thread.
#[derive(Debug)]
pub(crate) struct Hasher {
    resizer: Resizer,
    /// Cosines of the frequencies 1 to 8 over [`HASHED_SIDE`] points.
    basis: [[f32; HASHED_SIDE]; 8],
}

const HASHED_SIDE: usize = 32;

impl Hasher {
    pub(crate) fn new() -> Self {
        let wave = |frequency: usize, x: usize| {
            ((2 * x + 1) as f32 * frequency as f32 * std::f32::consts::PI / (2 * HASHED_SIDE) as f32).cos()
        };
        Self { resizer: Resizer::default(), basis: std::array::from_fn(|u| std::array::from_fn(|x| wave(u + 1, x))) }
    }

    /// A 64-bit perceptual hash after C. Zauner's pHash (2010): the 8 x 8 lowest frequencies, without the constant ones, of the
    /// 32 x 32 luma image's cosine transform, a bit for each that is above their median. Pictures that look alike differ in few
    /// bits.
    pub(crate) fn phash(&mut self, square: &[u8], size: u32) -> Result<u64, fast_image_resize::ResizeError> {
        const N: usize = HASHED_SIDE;
        let mut small = [0; N * N * 3];
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Box));
        resize(&mut self.resizer, (square, size, size), (&mut small, N as u32), &options)?;
        let mut luma = [[0f32; N]; N];
        for (value, pixel) in luma.as_flattened_mut().iter_mut().zip(small.chunks_exact(3)) {
            *value = 0.299 * f32::from(pixel[0]) + 0.587 * f32::from(pixel[1]) + 0.114 * f32::from(pixel[2]);
        }
        let rows: [[f32; 8]; N] = std::array::from_fn(|y| {
            std::array::from_fn(|u| luma[y].iter().zip(&self.basis[u]).map(|(value, wave)| value * wave).sum())
        });
        let coefficients: [f32; 64] =
            std::array::from_fn(|i| (0..N).map(|y| rows[y][i % 8] * self.basis[i / 8][y]).sum());
        let mut sorted = coefficients;
        sorted.sort_by(f32::total_cmp);
        let median = (sorted[31] + sorted[32]) / 2.0;
        Ok(coefficients.iter().fold(0, |hash, &c| hash << 1 | u64::from(c > median)))
    }
}

fn resize(
    resizer: &mut Resizer,
    (source, width, height): (&[u8], u32, u32),
    (target, size): (&mut [u8], u32),
    options: &ResizeOptions,
) -> Result<(), fast_image_resize::ResizeError> {
    let fits = "buffers are made to fit";
    let source = ImageRef::new(width, height, source, PixelType::U8x3).expect(fits);
    let mut target = Image::from_slice_u8(size, size, target, PixelType::U8x3).expect(fits);
    resizer.resize(&source, &mut target, options)
}

/// Turns a square so that EXIF's orientation (2 to 8) becomes upright.
fn turn(from: &[u8], side: usize, orientation: u8, to: &mut [u8]) {
    let last = side - 1;
    for y in 0..side {
        for x in 0..side {
            let (from_x, from_y) = match orientation {
                2 => (last - x, y),
                3 => (last - x, last - y),
                4 => (x, last - y),
                5 => (y, x),
                6 => (y, last - x),
                7 => (last - y, last - x),
                8 => (last - y, x),
                _ => (x, y),
            };
            let (source, target) = ((from_y * side + from_x) * 3, (y * side + x) * 3);
            to[target..target + 3].copy_from_slice(&from[source..source + 3]);
        }
    }
}

/// Sums over RGB pixels, in eight lanes a channel so that the compiler can use vectors.
pub(crate) fn moments(rgb: &[u8]) -> Moments {
    const LANES: usize = 24;
    // 255 squared times this is the last that fits 32 bits.
    const ROUNDS: usize = 65_536;
    let mut moments = Moments { pixels: rgb.len() as u64 / 3, ..Moments::default() };
    for part in rgb.chunks(LANES * ROUNDS) {
        let (mut sum, mut squares) = ([0u32; LANES], [0u32; LANES]);
        let whole = part.chunks_exact(LANES);
        let rest = whole.remainder();
        for lanes in whole {
            for lane in 0..LANES {
                let value = u32::from(lanes[lane]);
                sum[lane] += value;
                squares[lane] += value * value;
            }
        }
        for lane in 0..LANES {
            moments.sum[lane % 3] += u64::from(sum[lane]);
            moments.sum_of_squares[lane % 3] += u64::from(squares[lane]);
        }
        for (i, &value) in rest.iter().enumerate() {
            moments.sum[i % 3] += u64::from(value);
            moments.sum_of_squares[i % 3] += u64::from(value) * u64::from(value);
        }
    }
    moments
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::imageops::{FilterType::Lanczos3, crop_imm, resize};
    use image::{Rgb, RgbImage};

    fn photo(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let wave = |a: f32, b: f32| ((x as f32 * a).sin() * (y as f32 * b).cos() * 100.0 + 128.0) as u8;
            Rgb([wave(0.05, 0.03), wave(0.02, 0.11), (x * 255 / width) as u8])
        })
    }

    fn pixels(image: &RgbImage) -> Pixels {
        let mut pixels = Pixels::default();
        pixels.replace(image.as_raw().clone(), image.width(), image.height(), 1);
        pixels
    }

    #[test]
    fn the_centre_is_scaled_as_the_image_crate_scales_it() {
        for (width, height, size) in [(300, 200, 100), (200, 320, 96), (60, 40, 64), (128, 128, 128)] {
            let image = photo(width, height);
            let side = width.min(height);
            let centre = crop_imm(&image, (width - side) / 2, (height - side) / 2, side, side).to_image();
            let wanted = resize(&centre, size, size, Lanczos3);
            let mut shrinker = Shrinker::default();
            let got = shrinker.cover(&pixels(&image), size).expect("fits");
            let worst = got.iter().zip(wanted.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
            // Beyond the crop's edge one filter sees pixels and the other none.
            let inner = |i: usize| {
                let (x, y) = (i / 3 % size as usize, i / 3 / size as usize);
                let edge = 8..size as usize - 8;
                edge.contains(&x) && edge.contains(&y)
            };
            let inside = (0..got.len()).filter(|&i| inner(i)).map(|i| got[i].abs_diff(wanted.as_raw()[i])).max();
            assert!(inside <= Some(2) && worst <= Some(12), "{width}x{height} to {size}: {inside:?} {worst:?}");
        }
    }

    #[test]
    fn moments_are_the_sums_that_a_plain_loop_finds() {
        let image = photo(201, 97);
        let mut wanted = Moments { pixels: 201 * 97, ..Moments::default() };
        for pixel in image.pixels() {
            for channel in 0..3 {
                wanted.sum[channel] += u64::from(pixel[channel]);
                wanted.sum_of_squares[channel] += u64::from(pixel[channel]).pow(2);
            }
        }
        assert_eq!(moments(image.as_raw()), wanted);
        let white = vec![255; 24 * 65_536 + 3];
        assert_eq!(moments(&white).sum_of_squares, [255 * 255 * white.len() as u64 / 3; 3]);
    }

    #[test]
    fn the_hash_of_a_picture_survives_a_change_of_size_and_light_but_not_of_content() {
        let (mut shrinker, mut hasher) = (Shrinker::default(), Hasher::new());
        let mut hash =
            |image: &RgbImage| hasher.phash(shrinker.cover(&pixels(image), 128).expect("fits"), 128).expect("fits");
        let image = photo(400, 400);
        let first = hash(&image);
        let mut lighter = resize(&image, 250, 250, Lanczos3);
        lighter.pixels_mut().for_each(|p| p.0 = p.0.map(|v| v.saturating_add(10)));
        let mirrored = image::imageops::flip_vertical(&photo(400, 300));
        assert!((first ^ hash(&lighter)).count_ones() <= 6);
        assert!((first ^ hash(&mirrored)).count_ones() >= 16);
    }
}
