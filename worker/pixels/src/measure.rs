//! What is measured on a stored picture: sums over its pixels, and a hash by which it is found again.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeError, ResizeOptions, Resizer};
use proto::shard::Moments;

use super::resize::{GREY, Picture};

/// A picture is flat if no channel's standard deviation reaches this (of 255).
const FLAT_DEVIATION: f64 = 1.0;

/// The moments of a picture's red, green and blue.
pub fn moments(picture: &Picture<'_>) -> Moments {
    match picture.planes() {
        None => of_rgb(picture.values),
        Some(planes) => of_planes(picture, planes),
    }
}

/// Whether a picture with these moments shows nothing.
pub fn is_flat(moments: &Moments) -> bool {
    let n = moments.pixels as f64;
    (0..3).all(|channel| {
        let mean = moments.sum[channel] as f64 / n;
        moments.sum_of_squares[channel] as f64 / n - mean * mean < FLAT_DEVIATION * FLAT_DEVIATION
    })
}

/// The sum of some values and that of their squares, in lanes so that the compiler can use vectors. Nothing here can
/// wrap; the wrapping operations keep checks out of the vectors.
#[derive(Debug, Clone, Copy)]
struct Lanes<const N: usize> {
    sum: [u16; N],
    squares: [u32; N],
}

/// So many values of 255 fit 16 bits.
const ROUNDS: usize = 257;

impl<const N: usize> Lanes<N> {
    const NONE: Self = Self { sum: [0; N], squares: [0; N] };

    #[inline(always)]
    fn add(&mut self, values: impl Fn(usize) -> u16) {
        for lane in 0..N {
            let value = values(lane);
            self.sum[lane] = self.sum[lane].wrapping_add(value);
            self.squares[lane] = self.squares[lane].wrapping_add(u32::from(value.wrapping_mul(value)));
        }
    }
}

fn of_rgb(rgb: &[u8]) -> Moments {
    /// 16 pixels: whole vectors, and whole pixels.
    const LANES: usize = 48;
    let mut moments = Moments { pixels: rgb.len() as u64 / 3, ..Moments::default() };
    for part in rgb.chunks(LANES * ROUNDS) {
        let mut lanes = Lanes::<LANES>::NONE;
        let (whole, rest) = part.as_chunks::<LANES>();
        whole.iter().for_each(|values| lanes.add(|lane| u16::from(values[lane])));
        for lane in 0..LANES {
            moments.sum[lane % 3] += u64::from(lanes.sum[lane]);
            moments.sum_of_squares[lane % 3] += u64::from(lanes.squares[lane]);
        }
        for (i, &value) in rest.iter().enumerate() {
            moments.sum[i % 3] += u64::from(value);
            moments.sum_of_squares[i % 3] += u64::from(value) * u64::from(value);
        }
    }
    moments
}

/// What chroma adds to one colour along a row: as bytes to add and to subtract, which saturate as colours do, and of
/// which a vector holds twice as many as of signed numbers.
#[derive(Debug)]
struct Shift {
    more: Vec<u8>,
    less: Vec<u8>,
}

impl Shift {
    /// Of a row of chroma, by what each pair of its values adds.
    #[inline(always)]
    fn set(&mut self, blue: &[u8], red: &[u8], added: impl Fn(i16, i16) -> i16) {
        let chroma = |value: u8| i16::from(value) - i16::from(GREY);
        for (((&blue, &red), more), less) in blue.iter().zip(red).zip(&mut self.more).zip(&mut self.less) {
            let added = added(chroma(blue), chroma(red));
            (*more, *less) = (added.max(0) as u8, (-added).max(0) as u8);
        }
    }

    /// Twice as long, each value twice.
    #[inline(always)]
    fn widen_to(&self, wide: &mut Self) {
        for (narrow, wide) in [(&self.more, &mut wide.more), (&self.less, &mut wide.less)] {
            for (&value, two) in narrow.iter().zip(wide.as_chunks_mut::<2>().0) {
                *two = [value; 2];
            }
        }
    }
}

/// `chroma` times `factor` 65,536ths, rounded: what a vector has an instruction for.
#[inline(always)]
fn times(chroma: i16, factor: i16) -> i16 {
    (((i32::from(2 * chroma) * i32::from(factor)) >> 16) as i16 + 1) >> 1
}

/// Each value of chroma stands for the 2 x 2 pixels that it covers.
fn of_planes(picture: &Picture<'_>, [luma, blue, red]: [(&[u8], usize); 3]) -> Moments {
    let (width, height) = (picture.width as usize, picture.height as usize);
    let mut moments = Moments { pixels: width as u64 * height as u64, ..Moments::default() };
    let shifts = |width: usize| [0; 3].map(|_| Shift { more: vec![0; width], less: vec![0; width] });
    let (mut narrow, mut wide) = (shifts(blue.1), shifts(luma.1));
    for (y, luma) in luma.0.chunks_exact(luma.1).take(height).enumerate() {
        if y % 2 == 0 {
            let at = y / 2 * blue.1..(y / 2 + 1) * blue.1;
            let (blue, red) = (&blue.0[at.clone()], &red.0[at]);
            // JFIF 1.02: 1.402 of red chroma; -0.344136 of blue and -0.714136 of red; 1.772 of blue.
            narrow[0].set(blue, red, |_, red| red + times(red, 26_345));
            narrow[1].set(blue, red, |blue, red| times(blue, -22_554) + times(red, 18_734) - red);
            narrow[2].set(blue, red, |blue, _| 2 * blue + times(blue, -14_942));
            narrow.iter().zip(&mut wide).for_each(|(narrow, wide)| narrow.widen_to(wide));
        }
        for (channel, shift) in wide.iter().enumerate() {
            let (sum, squares) = of_row(&luma[..width], &shift.more[..width], &shift.less[..width]);
            moments.sum[channel] += sum;
            moments.sum_of_squares[channel] += squares;
        }
    }
    moments
}

/// Of luma with what chroma adds to it, which is within a byte's limits.
#[inline(always)]
fn of_row(luma: &[u8], more: &[u8], less: &[u8]) -> (u64, u64) {
    const LANES: usize = 16;
    const PART: usize = LANES * ROUNDS;
    let (mut sum, mut squares) = (0, 0);
    let value = |luma: u8, more: u8, less: u8| u16::from(luma.saturating_add(more).saturating_sub(less));
    for ((luma, more), less) in luma.chunks(PART).zip(more.chunks(PART)).zip(less.chunks(PART)) {
        let mut lanes = Lanes::<LANES>::NONE;
        let (luma, last_luma) = luma.as_chunks::<LANES>();
        let (more, last_more) = more.as_chunks::<LANES>();
        let (less, last_less) = less.as_chunks::<LANES>();
        for ((luma, more), less) in luma.iter().zip(more).zip(less) {
            lanes.add(|lane| value(luma[lane], more[lane], less[lane]));
        }
        sum += lanes.sum.iter().map(|&sum| u64::from(sum)).sum::<u64>();
        squares += lanes.squares.iter().map(|&squares| u64::from(squares)).sum::<u64>();
        for ((&luma, &more), &less) in last_luma.iter().zip(last_more).zip(last_less) {
            let value = u64::from(value(luma, more, less));
            (sum, squares) = (sum + value, squares + value * value);
        }
    }
    (sum, squares)
}

/// Hashes pictures, for one thread.
#[derive(Debug)]
pub struct Hasher {
    resizer: Resizer,
    /// Cosines of the frequencies 1 to 8 over [`HASHED_SIDE`] points.
    basis: [[f32; HASHED_SIDE]; 8],
}

const HASHED_SIDE: usize = 32;

impl Default for Hasher {
    fn default() -> Self {
        let wave = |frequency: usize, x: usize| {
            ((2 * x + 1) as f32 * frequency as f32 * std::f32::consts::PI / (2 * HASHED_SIDE) as f32).cos()
        };
        Self { resizer: Resizer::default(), basis: std::array::from_fn(|u| std::array::from_fn(|x| wave(u + 1, x))) }
    }
}

impl Hasher {
    /// A 64-bit perceptual hash after C. Zauner's pHash (2010): the 8 x 8 lowest frequencies, without the constant
    /// ones, of the 32 x 32 luma image's cosine transform, a bit for each that is above their median. Pictures that
    /// look alike differ in few bits.
    pub fn phash(&mut self, picture: &Picture<'_>) -> Result<u64, ResizeError> {
        const N: usize = HASHED_SIDE;
        let mut luma = [[0f32; N]; N];
        let values = luma.as_flattened_mut().iter_mut();
        match picture.planes() {
            Some([(plane, width), ..]) => {
                let mut small = [0; N * N];
                let size = (width as u32, (plane.len() / width) as u32);
                shrink::<U8>(&mut self.resizer, plane, size, &mut small)?;
                values.zip(small).for_each(|(value, small)| *value = f32::from(small));
            }
            None => {
                let mut small = [0; N * N * 3];
                let size = (picture.width, picture.height);
                shrink::<U8x3>(&mut self.resizer, picture.values, size, &mut small)?;
                for (value, pixel) in values.zip(small.as_chunks::<3>().0) {
                    *value = 0.299 * f32::from(pixel[0]) + 0.587 * f32::from(pixel[1]) + 0.114 * f32::from(pixel[2]);
                }
            }
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

/// Means over equal parts.
fn shrink<P: PixelTrait>(
    resizer: &mut Resizer,
    source: &[u8],
    (width, height): (u32, u32),
    target: &mut [u8],
) -> Result<(), ResizeError> {
    let fits = "buffers are made to fit";
    let source = TypedImageRef::<P>::from_buffer(width, height, source).expect(fits);
    let mut target = TypedImage::<P>::from_buffer(HASHED_SIDE as u32, HASHED_SIDE as u32, target).expect(fits);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Box));
    resizer.resize_typed(&source, &mut target, &options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Frame;
    use crate::resize::tests::{photo, pixels};
    use crate::resize::{Layout, Shrinker};
    use image::RgbImage;
    use image::imageops::{FilterType::Lanczos3, resize};
    use proto::Resize;

    fn rgb(image: &RgbImage) -> Picture<'_> {
        Picture { width: image.width(), height: image.height(), layout: Layout::Rgb, values: image.as_raw() }
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
        assert_eq!(moments(&rgb(&image)), wanted);
        let white = RgbImage::from_pixel(257, 193, image::Rgb([255; 3]));
        assert_eq!(moments(&rgb(&white)).sum_of_squares, [255 * 255 * 257 * 193; 3]);
    }

    #[test]
    fn chroma_is_multiplied_as_with_all_digits() {
        for chroma in -128..128 {
            for factor in [26_345, -22_554, 18_734, -14_942] {
                let wanted = (f64::from(chroma) * f64::from(factor) / 65_536.0 + 0.5).floor();
                assert_eq!(f64::from(times(chroma, factor)), wanted, "{chroma} x {factor}");
            }
        }
    }

    #[test]
    fn moments_of_planes_are_those_of_the_pixels_that_they_stand_for() {
        // 3 x 3 pixels: white, but for the last column and row, which are pure red.
        let luma = [255, 255, 76, 76, 255, 255, 76, 76, 76, 76, 76, 76, 76, 76, 76, 76];
        let (blue, red) = ([128, 85, 85, 85], [128, 255, 255, 255]);
        let values = [&luma[..], &blue, &red].concat();
        let found = moments(&Picture { width: 3, height: 3, layout: Layout::HALVED, values: &values });
        assert_eq!(found.pixels, 9);
        assert_eq!(found.sum, [4 * 255 + 5 * 254, 4 * 255, 4 * 255]);
        assert_eq!(found.sum_of_squares[1], 4 * 255 * 255);
    }

    #[test]
    fn the_hash_of_a_picture_survives_a_change_of_size_and_light_but_not_of_content() {
        let (mut shrinker, mut hasher) = (Shrinker::default(), Hasher::default());
        let mut hash = |image: &RgbImage| {
            let frame = Frame::new(&Resize { size: 128, ..Resize::default() }, image.dimensions(), u64::MAX);
            let picture = shrinker.shrink(&pixels(image), &frame.expect("small"));
            hasher.phash(&picture).expect("fits")
        };
        let image = photo(400, 400);
        let first = hash(&image);
        let mut lighter = resize(&image, 250, 250, Lanczos3);
        lighter.pixels_mut().for_each(|p| p.0 = p.0.map(|v| v.saturating_add(10)));
        let mirrored = image::imageops::flip_vertical(&photo(400, 300));
        assert!((first ^ hash(&lighter)).count_ones() <= 6);
        assert!((first ^ hash(&mirrored)).count_ones() >= 16);
    }
}
