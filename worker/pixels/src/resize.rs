//! Pixels to their stored form: cut, scaled with a filter over all source pixels, turned upright, padded.
//!
//! A JPEG holds luma and, mostly at half the size, two planes of chroma. To scale these planes as they are is exact (an
//! image and its planes cover the same area) and saves what else is most of the work beside decoding: raising chroma to
//! full size, the way to RGB, scaling twice as many values, and all the way back to be encoded.

use image::metadata::Orientation;

use super::frame::Frame;
use super::scale::{Grid, Scaler, Span};

/// Buffers above this many bytes are given back after use: one huge picture must not stay in memory for ever.
pub(crate) const KEPT_BUFFER: usize = 16 << 20;

const WHITE: u8 = 255;
/// Chroma without colour.
pub(crate) const GREY: u8 = 128;

/// How the 8-bit values of an image stand in memory, rows without gaps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Layout {
    /// Red, green, blue, pixel by pixel.
    #[default]
    Rgb,
    /// Luma alone.
    Grey,
    /// A plane of luma, one of blue and one of red chroma, as in a JPEG. Chroma has one value for `across` x `down`
    /// pixels; luma has columns and rows beyond the image so that both are whole.
    Ycc {
        /// 1, 2 or 4.
        across: u32,
        /// Likewise.
        down: u32,
    },
}

/// One part of a layout.
#[derive(Debug, Clone, Copy)]
struct Plane {
    start: usize,
    width: u32,
    height: u32,
    channels: u32,
    /// Pixels of the image for one of the plane's.
    across: u32,
    down: u32,
}

impl Layout {
    /// Chroma of half the size in both directions, as nearly all photos have it.
    pub const HALVED: Layout = Layout::Ycc { across: 2, down: 2 };

    /// Its planes, for an image of this size, and the bytes of all together.
    fn planes(self, (width, height): (u32, u32)) -> (Vec<Plane>, usize) {
        let (across, down, parts) = match self {
            Layout::Rgb => (1, 1, &[(3, 1, 1)][..]),
            Layout::Grey => (1, 1, &[(1, 1, 1)][..]),
            Layout::Ycc { across, down } => (across, down, &[(1, 1, 1), (1, across, down), (1, across, down)][..]),
        };
        let (width, height) = (width.next_multiple_of(across), height.next_multiple_of(down));
        let mut length = 0;
        let planes = parts.iter().map(|&(channels, across, down)| {
            let plane = Plane { start: length, width: width / across, height: height / down, channels, across, down };
            length += plane.length();
            plane
        });
        (planes.collect(), length)
    }
}

impl Plane {
    fn length(&self) -> usize {
        self.width as usize * self.height as usize * self.channels as usize
    }

    fn of<'a>(&self, values: &'a [u8]) -> &'a [u8] {
        &values[self.start..self.start + self.length()]
    }

    fn grid<'a>(&self, values: &'a [u8]) -> Grid<'a> {
        let (width, height, channels) = (self.width as usize, self.height as usize, self.channels as usize);
        Grid { values: self.of(values), width, height, channels }
    }
}

/// A decoded image, not yet turned upright.
#[derive(Debug, Default)]
pub struct Pixels {
    buffer: Vec<u8>,
    layout: Layout,
    size: (u32, u32),
    /// EXIF's, or 0.
    orientation: u8,
}

impl Pixels {
    /// Makes it an image of this layout, size and orientation, its content unspecified, and returns its bytes.
    pub fn reset(&mut self, layout: Layout, size: (u32, u32), orientation: Orientation) -> &mut [u8] {
        (self.layout, self.size, self.orientation) = (layout, size, orientation.to_exif());
        let (_, length) = layout.planes(size);
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        &mut self.buffer[..length]
    }

    /// Takes the RGB pixels of another decoder.
    pub fn replace(&mut self, rgb: Vec<u8>, size: (u32, u32), orientation: Orientation) {
        self.buffer = rgb;
        self.reset(Layout::Rgb, size, orientation);
    }

    /// Gives a large buffer back.
    pub fn release(&mut self) {
        if self.buffer.capacity() > KEPT_BUFFER {
            *self = Self::default();
        }
    }
}

/// An image as it is stored, upright, before it is encoded.
#[derive(Debug, Clone, Copy)]
pub struct Picture<'a> {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// [`Layout::Rgb`] or [`Layout::HALVED`].
    pub layout: Layout,
    /// As the layout says, rows without gaps.
    pub values: &'a [u8],
}

impl<'a> Picture<'a> {
    /// Luma and the two planes of chroma, with the width of each, if it is made of them.
    pub fn planes(&self) -> Option<[(&'a [u8], usize); 3]> {
        let (planes, _) = self.layout.planes((self.width, self.height));
        let planes: [Plane; 3] = planes.try_into().ok()?;
        Some(planes.map(|plane| (plane.of(self.values), plane.width as usize)))
    }
}

/// Resizes for one thread, with its buffers.
#[derive(Debug, Default)]
pub struct Shrinker {
    scaler: Scaler,
    stored: Vec<u8>,
    scaled: Vec<u8>,
    turned: Vec<u8>,
}

impl Shrinker {
    /// `pixels` as `frame` has them stored: RGB stays RGB, all else becomes [`Layout::HALVED`], for which the frame's
    /// sides must be even. Valid until the next call.
    pub fn shrink(&mut self, pixels: &Pixels, frame: &Frame) -> Picture<'_> {
        let layout = if pixels.layout == Layout::Rgb { Layout::Rgb } else { Layout::HALVED };
        let (width, height) = frame.stored();
        let (from, _) = pixels.layout.planes(pixels.size);
        let (to, length) = layout.planes((width, height));
        self.stored.resize(length, 0);
        let lies = pixels.orientation >= 5;
        for (i, to) in to.iter().enumerate() {
            match from.get(i) {
                // Grey: there is no chroma to scale.
                None => self.stored[to.start..to.start + to.length()].fill(GREY),
                Some(from) => {
                    // Pixels of this plane that the kept part is scaled to.
                    let (wide, high) = (frame.width / to.across, frame.height / to.down);
                    let upright = Frame { width: wide, height: high, ..*frame };
                    let as_it_lies = if lies { upright.turned() } else { upright };
                    let (across, down) = spans(from, pixels.size, &as_it_lies);
                    let source = from.grid(&pixels.buffer);
                    let direct = pixels.orientation <= 1 && (wide, high) == (to.width, to.height);
                    let target = &mut self.stored[to.start..to.start + to.length()];
                    if direct {
                        self.scaler.scale(frame.filter, source, across, down, target);
                        continue;
                    }
                    let channels = to.channels as usize;
                    let length = wide as usize * high as usize * channels;
                    self.scaled.resize(length, 0);
                    self.scaler.scale(frame.filter, source, across, down, &mut self.scaled);
                    let mut scaled = &self.scaled;
                    if pixels.orientation > 1 {
                        self.turned.resize(length, 0);
                        turn(&self.scaled, (wide, high), channels, pixels.orientation, &mut self.turned);
                        scaled = &self.turned;
                    }
                    let around = frame.canvas.map(|side| Around {
                        // Whole pixels of chroma.
                        left: (side - frame.width) / 2 / 2 * 2 / to.across,
                        top: (side - frame.height) / 2 / 2 * 2 / to.down,
                        value: if i == 0 { WHITE } else { GREY },
                    });
                    place(scaled, (wide, high), channels, target, to, around);
                }
            }
        }
        for buffer in [&mut self.scaled, &mut self.turned] {
            buffer.clear();
            buffer.shrink_to(KEPT_BUFFER);
        }
        Picture { width, height, layout, values: &self.stored }
    }

    /// Gives large buffers back.
    pub fn release(&mut self) {
        self.scaler.release(KEPT_BUFFER);
        if self.stored.capacity() > KEPT_BUFFER {
            self.stored = Vec::new();
        }
    }
}

/// What of a plane shows the part of an image of `size` that `frame` keeps, around its centre.
fn spans(plane: &Plane, size: (u32, u32), frame: &Frame) -> (Span, Span) {
    let span = |side: u32, of: u32, kept: f64, to: u32| {
        // The plane's own last pixel may lie half outside of the image.
        let whole = f64::from(side) / f64::from(of);
        Span { start: whole * (1.0 - kept) / 2.0, length: whole * kept, to: to as usize }
    };
    let across = span(size.0, plane.across, frame.kept.0, frame.width);
    (across, span(size.1, plane.down, frame.kept.1, frame.height))
}

/// What is around an image on a larger one.
#[derive(Debug, Clone, Copy)]
struct Around {
    left: u32,
    top: u32,
    value: u8,
}

/// Puts an image onto a larger one: with `around` it, or else at its start and with its last column and row repeated.
fn place(from: &[u8], size: (u32, u32), channels: usize, to: &mut [u8], plane: &Plane, around: Option<Around>) {
    let (row, height) = (size.0 as usize * channels, size.1 as usize);
    let (left, top) = around.map_or((0, 0), |around| (around.left as usize * channels, around.top as usize));
    for (y, target) in to.chunks_exact_mut(plane.width as usize * channels).enumerate() {
        if let Some(Around { value, .. }) = around {
            target.fill(value);
            if !(top..top + height).contains(&y) {
                continue;
            }
        }
        let source = &from[(y - top).min(height - 1) * row..][..row];
        target[left..left + row].copy_from_slice(source);
        if around.is_none() {
            let last = &source[row - channels..];
            target[row..].chunks_exact_mut(channels).for_each(|pixel| pixel.copy_from_slice(last));
        }
    }
}

/// Turns an image so that EXIF's orientation (2 to 8) becomes upright; `width` and `height` are those of the upright
/// one.
fn turn(from: &[u8], (width, height): (u32, u32), channels: usize, orientation: u8, to: &mut [u8]) {
    let (width, height) = (width as usize, height as usize);
    let row = if orientation >= 5 { height } else { width };
    for y in 0..height {
        for x in 0..width {
            let (from_x, from_y) = match orientation {
                2 => (width - 1 - x, y),
                3 => (width - 1 - x, height - 1 - y),
                4 => (x, height - 1 - y),
                5 => (y, x),
                6 => (y, width - 1 - x),
                7 => (height - 1 - y, width - 1 - x),
                8 => (height - 1 - y, x),
                _ => (x, y),
            };
            let (source, target) = ((from_y * row + from_x) * channels, (y * width + x) * channels);
            to[target..target + channels].copy_from_slice(&from[source..source + channels]);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use image::imageops::{FilterType::Lanczos3, crop_imm, resize};
    use image::{Rgb, RgbImage};
    use proto::{Resize, ResizeMode};

    pub(crate) fn photo(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            let wave = |a: f32, b: f32| ((x as f32 * a).sin() * (y as f32 * b).cos() * 100.0 + 128.0) as u8;
            Rgb([wave(0.05, 0.03), wave(0.02, 0.11), (x * 255 / width) as u8])
        })
    }

    pub(crate) fn pixels(image: &RgbImage) -> Pixels {
        let mut pixels = Pixels::default();
        pixels.replace(image.as_raw().clone(), image.dimensions(), Orientation::NoTransforms);
        pixels
    }

    fn frame(size: u32, mode: ResizeMode, of: (u32, u32)) -> Frame {
        Frame::new(&Resize { size, mode, ..Resize::default() }, of, u64::MAX).expect("small")
    }

    #[test]
    fn the_centre_is_scaled_as_the_image_crate_scales_it() {
        for (width, height, size) in [(300, 200, 100), (200, 320, 96), (60, 40, 64), (128, 128, 128)] {
            let image = photo(width, height);
            let side = width.min(height);
            let centre = crop_imm(&image, (width - side) / 2, (height - side) / 2, side, side).to_image();
            let wanted = resize(&centre, size, size, Lanczos3);
            let mut shrinker = Shrinker::default();
            let frame = frame(size, ResizeMode::Cover, (width, height));
            let got = shrinker.shrink(&pixels(&image), &frame).values;
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

    /// Luma and chroma rise from left to right, from the value 40, by 1 in each pixel of the image.
    fn slope(layout: Layout, size: (u32, u32)) -> Pixels {
        let mut pixels = Pixels::default();
        let (planes, _) = layout.planes(size);
        let buffer = pixels.reset(layout, size, Orientation::NoTransforms);
        for plane in planes {
            let start = plane.start;
            for i in 0..plane.length() {
                let x = i % plane.width as usize * plane.across as usize;
                // The middle of the pixels that the value stands for.
                buffer[start + i] = (40.0 + x as f64 + (f64::from(plane.across) - 1.0) / 2.0).round() as u8;
            }
        }
        pixels
    }

    #[test]
    fn luma_and_chroma_of_every_layout_show_the_same_place() {
        for (across, down) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
            for (mode, size) in
                [(ResizeMode::Cover, (150, 101)), (ResizeMode::Fit, (121, 80)), (ResizeMode::None, (76, 52))]
            {
                let frame = frame(60, mode, size);
                let mut shrinker = Shrinker::default();
                let source = slope(Layout::Ycc { across, down }, size);
                let picture = shrinker.shrink(&source, &frame);
                let [(luma, wide), (blue, narrow), _] = picture.planes().expect("planes");
                // Away from the edges, where the filter has less to see.
                for x in 8..narrow - 8 {
                    let middle = f64::from(luma[5 * wide + 2 * x]) / 2.0 + f64::from(luma[5 * wide + 2 * x + 1]) / 2.0;
                    let found = f64::from(blue[3 * narrow + x]);
                    assert!((middle - found).abs() <= 1.5, "{across}x{down} {mode:?} at {x}: {middle} {found}");
                }
            }
        }
    }

    #[test]
    fn a_padded_picture_stands_in_the_middle_of_white() {
        let image = RgbImage::from_pixel(40, 21, Rgb([10, 20, 30]));
        let mut shrinker = Shrinker::default();
        let picture = shrinker.shrink(&pixels(&image), &frame(40, ResizeMode::Pad, (40, 21)));
        let stored = RgbImage::from_raw(40, 40, picture.values.to_vec()).expect("whole");
        for (x, y, pixel) in stored.enumerate_pixels() {
            let inside = (8..29).contains(&y);
            assert_eq!(pixel.0, if inside { [10, 20, 30] } else { [255; 3] }, "{x} {y}");
        }
        // The same by planes: pure colour inside, white around.
        let mut source = Pixels::default();
        source.reset(Layout::HALVED, (40, 22), Orientation::NoTransforms).fill(77);
        let picture = shrinker.shrink(&source, &frame(40, ResizeMode::Pad, (40, 22)));
        let [(luma, _), (blue, _), _] = picture.planes().expect("planes");
        assert_eq!([luma[7 * 40], luma[8 * 40], luma[29 * 40], luma[30 * 40]], [255, 77, 77, 255]);
        assert_eq!([blue[3 * 20], blue[4 * 20], blue[14 * 20], blue[15 * 20]], [128, 77, 77, 128]);
    }
}
