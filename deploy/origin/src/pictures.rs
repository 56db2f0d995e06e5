//! Labelled pictures without a download: drawings of Twemoji on cluttered backgrounds, as JPEGs of photo size.
//!
//! A picture is a pure function of (seed, class, number), the same on every machine. The graphics are Twemoji's, CC-BY
//! 4.0.

use std::sync::OnceLock;

use turbojpeg::{Compressor, Image, PixelFormat, Subsamp};
use twemoji_assets::png::PngTwemojiAsset;

/// One class of pictures.
pub struct Class {
    /// ImageNet's id.
    pub synset: &'static str,
    /// For people.
    pub name: &'static str,
    /// The emoji of which each picture shows one.
    pub drawings: &'static [&'static str],
}

const fn class(synset: &'static str, name: &'static str, drawings: &'static [&'static str]) -> Class {
    Class { synset, name, drawings }
}

/// Things of everyday life, most of them in an office.
pub const CLASSES: [Class; 20] = [
    class("n02084071", "dog", &["🐕", "🐶", "🐩", "🦮", "🐕‍🦺"]),
    class("n02121808", "cat", &["🐈", "🐱", "🐈‍⬛", "😺", "😸", "😾"]),
    class("n01503061", "bird", &["🐦", "🐧", "🐤", "🦜", "🦢", "🦩", "🦉", "🦅", "🦆", "🕊"]),
    class("n07747607", "orange", &["🍊"]),
    class("n07739125", "apple", &["🍎", "🍏"]),
    class("n03614007", "keyboard", &["⌨"]),
    class("n03793489", "computer mouse", &["🖱"]),
    class("n03782006", "monitor", &["🖥"]),
    class("n02870526", "book", &["📕", "📗", "📘", "📙", "📖", "📚"]),
    class("n03906997", "pen", &["🖊", "🖋"]),
    class("n03908204", "pencil", &["✏"]),
    class("n03001627", "chair", &["🪑", "💺"]),
    class("n04373894", "sword", &["🗡", "⚔"]),
    class("n03147509", "cup", &["☕", "🍵", "🥤"]),
    class("n04197391", "shirt", &["👕", "👔", "🎽"]),
    class("n04200000", "shoe", &["👞", "👟", "👠", "👡", "👢", "🥾", "🥿"]),
    class("n02960352", "car", &["🚗", "🚘", "🚕", "🚖", "🚙"]),
    class("n03222176", "door", &["🚪"]),
    class("n02834778", "bicycle", &["🚲"]),
    class("n04507155", "umbrella", &["☂", "☔", "🌂"]),
];

/// Shapes of photos on the web (width, height) and how many of 20 pictures have them.
const SIZES: [(usize, usize, u32); 6] =
    [(500, 375, 9), (375, 500, 5), (500, 333, 3), (333, 500, 1), (500, 500, 1), (640, 480, 1)];

/// Pixels, three bytes each, rows without gaps.
pub struct Picture {
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
    /// `width * height * 3` bytes.
    pub rgb: Vec<u8>,
}

/// Picture `n` of `class` as a JPEG of quality 85 to 95.
pub fn picture(seed: u64, class: usize, n: u64) -> Vec<u8> {
    let mut random = Random::new(&[seed, class as u64, n, 1]);
    let subsamp = if random.below(8) == 0 { Subsamp::None } else { Subsamp::Sub2x2 };
    draw(seed, class, n).jpeg(85 + random.below(11) as i32, subsamp, false)
}

/// Picture `n` of `class` before it is compressed.
///
/// # Panics
/// If there is no such class.
pub fn draw(seed: u64, class: usize, n: u64) -> Picture {
    let random = &mut Random::new(&[seed, class as u64, n, 0]);
    let mut deal = random.below(SIZES.iter().map(|size| size.2).sum());
    let &(width, height, _) = SIZES
        .iter()
        .find(|size| {
            let here = deal < size.2;
            deal = deal.wrapping_sub(size.2);
            here
        })
        .expect("the deal is under the sum");
    let mut picture = Picture { width, height, rgb: vec![0; width * height * 3] };
    picture.gradient(random);
    for _ in 0..6 + random.below(11) {
        picture.shape(random);
    }
    picture.drawing(&drawings()[class], random);
    picture.light_and_noise(random);
    picture
}

impl Picture {
    /// This picture as a JPEG.
    pub fn jpeg(&self, quality: i32, subsamp: Subsamp, progressive: bool) -> Vec<u8> {
        compress(&self.rgb, self.width, self.height, PixelFormat::RGB, |c| {
            c.set_quality(quality)?;
            c.set_subsamp(subsamp)?;
            c.set_progressive(progressive)
        })
    }

    /// Between four random colours, one in each corner.
    fn gradient(&mut self, random: &mut Random) {
        let corners: [[i32; 3]; 4] = std::array::from_fn(|_| random.colour());
        let (width, height) = (self.width as i32, self.height as i32);
        for (y, row) in self.rgb.chunks_exact_mut(self.width * 3).enumerate() {
            let edge = |top: usize, bottom: usize, c: usize| {
                (corners[top][c] << 16) + ((corners[bottom][c] - corners[top][c]) << 16) / height * y as i32
            };
            let mut value: [i32; 3] = std::array::from_fn(|c| edge(0, 2, c));
            let step: [i32; 3] = std::array::from_fn(|c| (edge(1, 3, c) - value[c]) / width);
            for pixel in row.chunks_exact_mut(3) {
                for c in 0..3 {
                    pixel[c] = (value[c] >> 16) as u8;
                    value[c] += step[c];
                }
            }
        }
    }

    /// One piece of clutter: an ellipse, a turned bar or a triangle, more or less opaque.
    fn shape(&mut self, random: &mut Random) {
        let (width, height) = (self.width as f32, self.height as f32);
        let (x, y) = (random.unit() * width, random.unit() * height);
        let side = width.min(height);
        let (a, b) = ((0.02 + 0.2 * random.unit()) * side, (0.02 + 0.2 * random.unit()) * side);
        let colour = random.colour();
        let alpha = 100 + random.below(157) as i32;
        let corners: Vec<(f32, f32)> = match random.below(3) {
            0 => {
                for row in (y - b).max(0.0) as usize..((y + b) as usize).min(self.height) {
                    let dy = (row as f32 - y) / b;
                    let half = a * (1.0 - dy * dy).max(0.0).sqrt();
                    self.span(row, x - half, x + half, colour, alpha);
                }
                return;
            }
            1 => {
                let (cos, sin) = turn(random.unit() * 4.0 - 2.0);
                let corner = |u: f32, v: f32| (x + u * cos - v * sin, y + u * sin + v * cos);
                vec![corner(-a, -b), corner(a, -b), corner(a, b), corner(-a, b)]
            }
            _ => (0..3)
                .map(|_| (x + (random.unit() - 0.5) * 0.5 * side, y + (random.unit() - 0.5) * 0.5 * side))
                .collect(),
        };
        let top = corners.iter().map(|c| c.1).fold(f32::MAX, f32::min).max(0.0) as usize;
        let bottom = corners.iter().map(|c| c.1).fold(0.0, f32::max) as usize;
        for row in top..bottom.min(self.height) {
            let middle = row as f32 + 0.5;
            let (mut left, mut right) = (f32::MAX, f32::MIN);
            for (i, &(x0, y0)) in corners.iter().enumerate() {
                let (x1, y1) = corners[(i + 1) % corners.len()];
                if (y0 <= middle) != (y1 <= middle) {
                    let cross = x0 + (middle - y0) / (y1 - y0) * (x1 - x0);
                    (left, right) = (left.min(cross), right.max(cross));
                }
            }
            self.span(row, left, right, colour, alpha);
        }
    }

    fn span(&mut self, row: usize, left: f32, right: f32, colour: [i32; 3], alpha: i32) {
        let (left, right) = (left.max(0.0) as usize, (right.max(0.0) as usize).min(self.width));
        if left < right {
            let start = row * self.width;
            for pixel in self.rgb[(start + left) * 3..(start + right) * 3].chunks_exact_mut(3) {
                for c in 0..3 {
                    pixel[c] = ((i32::from(pixel[c]) * (256 - alpha) + colour[c] * alpha) >> 8) as u8;
                }
            }
        }
    }

    /// One of the class's drawings: 30 to 75 % of the shorter side, turned by up to 30 degrees, inside of the central
    /// square (a centre crop is usual), its colours shaken.
    fn drawing(&mut self, drawings: &[Sprite], random: &mut Random) {
        let sprite = &drawings[random.below(drawings.len() as u32) as usize];
        let gains: [u32; 3] = std::array::from_fn(|_| 192 + random.below(96));
        let sprite: Vec<[u32; 4]> = sprite
            .iter()
            .map(|&[r, g, b, a]| {
                // Premultiplied colours cannot exceed their alpha.
                let shake = |value: u8, gain: u32| ((u32::from(value) * gain) >> 8).min(u32::from(a));
                [shake(r, gains[0]), shake(g, gains[1]), shake(b, gains[2]), u32::from(a)]
            })
            .collect();
        let side = self.width.min(self.height) as f32;
        let size = side * (0.3 + 0.45 * random.unit());
        let room = (side - size) / 2.0;
        let x = self.width as f32 / 2.0 + room * (2.0 * random.unit() - 1.0);
        let y = self.height as f32 / 2.0 + room * (2.0 * random.unit() - 1.0);
        // The tangent of 30 degrees.
        let (cos, sin) = turn(0.577 * (2.0 * random.unit() - 1.0));
        let reach = size / 2.0 * (cos + sin.abs()) + 1.0;
        let scale = SPRITE as f32 / size;
        let fixed = |value: f32| (value * 65536.0) as i32;
        let (along, across) = (fixed(cos * scale), fixed(-sin * scale));
        let (left, right) = ((x - reach).max(0.0) as usize, ((x + reach) as usize).min(self.width));
        for row in (y - reach).max(0.0) as usize..((y + reach) as usize).min(self.height) {
            let (dx, dy) = (left as f32 - x, row as f32 - y);
            // The drawing has a transparent frame of one pixel.
            let middle = 1.0 + SPRITE as f32 / 2.0;
            let mut u = fixed(middle + (dx * cos + dy * sin) * scale);
            let mut v = fixed(middle + (dy * cos - dx * sin) * scale);
            let start = row * self.width;
            for pixel in self.rgb[(start + left) * 3..(start + right) * 3].chunks_exact_mut(3) {
                let (column, line) = (u >> 16, v >> 16);
                let inside = 0..FRAMED as i32 - 1;
                if inside.contains(&column) && inside.contains(&line) {
                    let at = line as usize * FRAMED + column as usize;
                    let (fu, fv) = ((u >> 8 & 255) as u32, (v >> 8 & 255) as u32);
                    let value = |c: usize| {
                        let upper = sprite[at][c] * (256 - fu) + sprite[at + 1][c] * fu;
                        let lower = sprite[at + FRAMED][c] * (256 - fu) + sprite[at + FRAMED + 1][c] * fu;
                        (upper * (256 - fv) + lower * fv) >> 16
                    };
                    let through = 255 - value(3);
                    if through < 255 {
                        for (c, byte) in pixel.iter_mut().enumerate() {
                            *byte = (value(c) + u32::from(*byte) * through / 255).min(255) as u8;
                        }
                    }
                }
                u += along;
                v += across;
            }
        }
    }

    /// Brightness and contrast of the whole picture, and a sensor's noise.
    fn light_and_noise(&mut self, random: &mut Random) {
        let (gain, offset) = (176 + random.below(112) as i32, random.below(60) as i32 - 20);
        let amplitude = 3 + random.below(8) as i32;
        let light: [i32; 256] = std::array::from_fn(|value| ((value as i32 * gain) >> 8) + offset);
        for pixels in self.rgb.chunks_mut(8) {
            for (byte, noise) in pixels.iter_mut().zip(random.bits().to_le_bytes()) {
                let noise = ((i32::from(noise) - 128) * amplitude) >> 7;
                *byte = (light[usize::from(*byte)] + noise).clamp(0, 255) as u8;
            }
        }
    }
}

/// Compresses rows without gaps to a JPEG with the options that `set` sets.
///
/// # Panics
/// If libjpeg-turbo cannot combine the options with the pixels' format.
pub fn compress(
    pixels: &[u8],
    width: usize,
    height: usize,
    format: PixelFormat,
    set: impl FnOnce(&mut Compressor) -> turbojpeg::Result<()>,
) -> Vec<u8> {
    let image = Image { pixels, width, pitch: width * format.size(), height, format };
    Compressor::new()
        .and_then(|mut compressor| {
            set(&mut compressor)?;
            compressor.compress_to_vec(image)
        })
        .expect("options fit the format and the buffer its size")
}

/// Cosine and sine of the angle with this tangent, between -90 and 90 degrees. Unlike a library's sine, a square root
/// is rounded the same everywhere.
fn turn(tangent: f32) -> (f32, f32) {
    let cos = 1.0 / (1.0 + tangent * tangent).sqrt();
    (cos, tangent * cos)
}

/// Pixels a side of a drawing, and with its transparent frame.
const SPRITE: usize = 72;
const FRAMED: usize = SPRITE + 2;

/// `FRAMED` x `FRAMED` pixels, red, green and blue multiplied by alpha.
type Sprite = Vec<[u8; 4]>;

/// The drawings of each class, decoded once.
fn drawings() -> &'static [Vec<Sprite>] {
    static DRAWINGS: OnceLock<Vec<Vec<Sprite>>> = OnceLock::new();
    DRAWINGS.get_or_init(|| CLASSES.iter().map(|class| class.drawings.iter().map(|e| sprite(e)).collect()).collect())
}

fn sprite(emoji: &str) -> Sprite {
    let asset = PngTwemojiAsset::from_emoji(emoji).expect("the classes name drawings that exist");
    let image = image::load_from_memory(asset.data.0).expect("the assets are PNGs").into_rgba8();
    let mut sprite = vec![[0; 4]; FRAMED * FRAMED];
    for (x, y, &image::Rgba([r, g, b, a])) in image.enumerate_pixels() {
        let times = |value: u8| (u16::from(value) * u16::from(a) / 255) as u8;
        sprite[(y as usize + 1) * FRAMED + x as usize + 1] = [times(r), times(g), times(b), a];
    }
    sprite
}

/// SplitMix64 (Steele, Lea and Flood, 2014): small, fast, and one state is as good as another.
pub struct Random(u64);

impl Random {
    /// A stream that depends on every one of `parts`.
    pub fn new(parts: &[u64]) -> Self {
        parts.iter().fold(Self(0), |mut state, part| Self(state.bits() ^ part.wrapping_mul(0xd6e8_feb8_6659_fd93)))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..end`.
    pub fn below(&mut self, end: u32) -> u32 {
        (((self.bits() >> 32) * u64::from(end)) >> 32) as u32
    }

    /// Uniform in `[0, 1)`.
    fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 24) as f32
    }

    fn colour(&mut self) -> [i32; 3] {
        std::array::from_fn(|_| self.below(256) as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_a_function_of_seed_class_and_number() {
        assert_eq!(picture(1, 2, 3), picture(1, 2, 3));
        let others = [picture(1, 2, 3), picture(2, 2, 3), picture(1, 3, 3), picture(1, 2, 4)];
        for (i, one) in others.iter().enumerate() {
            assert!(others[i + 1..].iter().all(|other| one != other));
        }
    }

    #[test]
    fn pictures_of_every_class_are_of_a_photos_size() {
        for class in 0..CLASSES.len() {
            for n in 0..4 {
                let jpeg = picture(0, class, n);
                assert!((12_000..250_000).contains(&jpeg.len()), "{} bytes", jpeg.len());
                let header = turbojpeg::read_header(&jpeg).expect("a JPEG");
                assert!(header.width.min(header.height) >= 333, "{header:?}");
            }
        }
    }

    #[test]
    fn synsets_are_unique() {
        let synsets: std::collections::HashSet<_> = CLASSES.iter().map(|class| class.synset).collect();
        assert_eq!(synsets.len(), CLASSES.len());
    }
}
