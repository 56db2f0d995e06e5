//! The bytes that rotten and unusual URLs serve.

use std::io::{Cursor, Write};
use std::sync::OnceLock;

use bytes::Bytes;
use flate2::{Compress, Compression, Crc, FlushCompress};
use image::codecs::gif::GifEncoder;
use image::{DynamicImage, ImageFormat, RgbImage};
use turbojpeg::{Colorspace, PixelFormat, Subsamp};

use crate::pictures::{Picture, Random, compress, draw};
use crate::rot::Rot;

/// The picture that `rot` shows, in the format in which it does.
pub(super) fn photo(rot: Rot, seed: u64, class: usize, n: u64) -> Vec<u8> {
    let picture = draw(seed, class, n);
    match rot {
        Rot::Png => encode(picture, ImageFormat::Png),
        Rot::Webp => encode(picture, ImageFormat::WebP),
        Rot::Bmp => encode(picture, ImageFormat::Bmp),
        Rot::Tiff => encode(picture, ImageFormat::Tiff),
        Rot::Gif => gif(picture),
        Rot::AlphaPng => alpha_png(picture),
        Rot::Exif => on_its_side(&picture),
        Rot::Cmyk => cmyk(&picture),
        Rot::Grey => picture.jpeg(90, Subsamp::Gray, false),
        Rot::Progressive => picture.jpeg(90, Subsamp::Sub2x2, true),
        Rot::Thumbnail => thumbnail(picture),
        _ => crate::pictures::picture(seed, class, n),
    }
}

fn image(picture: Picture) -> DynamicImage {
    let (width, height) = (picture.width as u32, picture.height as u32);
    RgbImage::from_raw(width, height, picture.rgb).expect("rows without gaps").into()
}

fn write(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).expect("the format takes 8-bit colours, memory takes all");
    bytes.into_inner()
}

fn encode(picture: Picture, format: ImageFormat) -> Vec<u8> {
    write(&image(picture), format)
}

/// At the encoder's fastest: the choice of the palette would take seconds.
fn gif(picture: Picture) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = GifEncoder::new_with_speed(&mut bytes, 30);
    let frame = image::Frame::new(image(picture).into_rgba8());
    encoder.encode_frame(frame).expect("memory takes all");
    drop(encoder);
    bytes
}

/// Opaque in the middle, clear in the corners.
fn alpha_png(picture: Picture) -> Vec<u8> {
    let mut image = image(picture).into_rgba8();
    let (width, height) = (i64::from(image.width()), i64::from(image.height()));
    for (x, y, pixel) in image.enumerate_pixels_mut() {
        let (dx, dy) = (2 * i64::from(x) - width, 2 * i64::from(y) - height);
        let from_middle = (dx * dx * 256 / (width * width)) + (dy * dy * 256 / (height * height));
        pixel.0[3] = (512 - from_middle * 3 / 2).clamp(0, 255) as u8;
    }
    write(&image.into(), ImageFormat::Png)
}

/// Turned to the left by 90 degrees, with the EXIF orientation (6) that turns it back.
fn on_its_side(picture: &Picture) -> Vec<u8> {
    let (width, height) = (picture.height, picture.width);
    let mut turned = Picture { width, height, rgb: Vec::with_capacity(picture.rgb.len()) };
    for y in 0..height {
        for x in 0..width {
            let from = (x * picture.width + picture.width - 1 - y) * 3;
            turned.rgb.extend_from_slice(&picture.rgb[from..from + 3]);
        }
    }
    // A TIFF header and one directory of one entry: orientation (0x112), a 16-bit number, 6.
    let exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    with_segment(&turned.jpeg(90, Subsamp::Sub2x2, false), 0xe1, exif)
}

/// `jpeg` with one more segment directly after its start.
pub(super) fn with_segment(jpeg: &[u8], marker: u8, data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u16 + 2).to_be_bytes();
    [&jpeg[..2], &[0xff, marker], &length, data, &jpeg[2..]].concat()
}

/// Four inks, as much black as can be, inverted as Adobe does: 255 is no ink.
fn cmyk(picture: &Picture) -> Vec<u8> {
    let inks: Vec<u8> = picture
        .rgb
        .chunks_exact(3)
        .flat_map(|rgb| {
            let light = rgb.iter().copied().max().unwrap_or(0).max(1);
            let ink = |value: u8| (u16::from(value) * 255 / u16::from(light)) as u8;
            [ink(rgb[0]), ink(rgb[1]), ink(rgb[2]), light]
        })
        .collect();
    compress(&inks, picture.width, picture.height, PixelFormat::CMYK, |c| {
        c.set_quality(90)?;
        c.set_subsamp(Subsamp::None)?;
        c.set_colorspace(Colorspace::CMYK)
    })
}

/// Small, but with 8 kB of a camera's remarks, so that counting bytes does not tell.
fn thumbnail(picture: Picture) -> Vec<u8> {
    let small = image::imageops::thumbnail(&image(picture).into_rgb8(), 60, 45);
    let small = Picture { width: 60, height: 45, rgb: small.into_raw() };
    with_segment(&small.jpeg(90, Subsamp::Sub2x2, false), 0xed, &[b' '; 8_000])
}

/// A GIF of one transparent pixel, the web's oldest.
pub(super) const TINY_GIF: &[u8] =
    b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff!\xf9\x04\x01\0\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;";

/// The picture that says that a photo is gone: grey, with a few dark bars for words. About 2.3 kB, or 132 kB with a
/// heavy grain.
pub(super) fn placeholder(large: bool) -> Bytes {
    static BOTH: [OnceLock<Bytes>; 2] = [OnceLock::new(), OnceLock::new()];
    BOTH[usize::from(large)]
        .get_or_init(|| {
            let (width, height) = if large { (640, 480) } else { (240, 180) };
            let mut random = Random::new(&[0, 3]);
            let mut rgb = vec![230; width * height * 3];
            for (i, byte) in rgb.iter_mut().enumerate() {
                let (x, y) = (i / 3 * 100 / width % 100, i / 3 / width * 100 / height);
                if (14..86).contains(&x) && (40..60).contains(&y) && y % 8 < 4 && x / 2 % 7 != 6 {
                    *byte = 120;
                }
                if large {
                    *byte -= random.below(52) as u8;
                }
            }
            let quality = if large { 90 } else { 40 };
            Picture { width, height, rgb }.jpeg(quality, Subsamp::Sub2x2, false).into()
        })
        .clone()
}

/// A page of about 9 kB, different for each path.
pub(super) fn html(path: &str) -> Vec<u8> {
    let mut page = format!("<!DOCTYPE html>\n<html><head><title>{path}</title></head><body>\n");
    for n in 0..120 {
        page += &format!("<p>{n}: This page has moved. Please log in to see more photos.</p>\n");
    }
    (page + "</body></html>\n").into_bytes()
}

/// `length` bytes that depend on `n` and mean nothing. The first two are no format's magic.
pub(super) fn random_bytes(n: u64, length: usize) -> Vec<u8> {
    let mut random = Random::new(&[n, 4]);
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| random.bits().to_le_bytes()).collect();
    bytes[..2].copy_from_slice(&[0x81, 0x82]);
    bytes
}

/// A grey PNG of 20,000 x 20,000 black pixels.
pub(super) fn png_bomb() -> Bytes {
    static BOMB: OnceLock<Bytes> = OnceLock::new();
    BOMB.get_or_init(|| {
        const SIDE: u32 = 20_000;
        let row = 1 + SIDE as usize;
        let mut data = vec![0x78, 0x01];
        data.extend(deflated_zeros(row * 100, SIDE as usize / 100));
        // Adler-32 of zeros: the first sum stays 1, the second counts the bytes.
        let count = (row * SIDE as usize % 65_521) as u32;
        data.extend(((count << 16) | 1).to_be_bytes());
        let header = [&SIDE.to_be_bytes()[..], &SIDE.to_be_bytes(), &[8, 0, 0, 0, 0]].concat();
        let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
        for (kind, data) in [(b"IHDR", &header), (b"IDAT", &data), (b"IEND", &Vec::new())] {
            let mut crc = Crc::new();
            crc.update(kind);
            crc.update(data);
            png.extend((data.len() as u32).to_be_bytes());
            png.extend([&kind[..], data, &crc.sum().to_be_bytes()].concat());
        }
        png.into()
    })
    .clone()
}

/// A gzip file of 1 GB of zeros.
pub(super) fn gzip_bomb() -> Bytes {
    static BOMB: OnceLock<Bytes> = OnceLock::new();
    BOMB.get_or_init(|| {
        let (part, times) = (10_000_000, 100);
        let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
        gzip.extend(deflated_zeros(part, times));
        let mut one = Crc::new();
        one.update(&vec![0; part]);
        let mut crc = Crc::new();
        (0..times).for_each(|_| crc.combine(&one));
        gzip.write_all(&crc.sum().to_le_bytes()).expect("memory takes all");
        gzip.extend(((part * times) as u32).to_le_bytes());
        gzip.into()
    })
    .clone()
}

/// A deflate stream of `times` parts of `part` zeros each, of which only one is ever compressed.
fn deflated_zeros(part: usize, times: usize) -> Vec<u8> {
    let mut compress = Compress::new(Compression::best(), false);
    let mut once = Vec::with_capacity(part / 500 + 1_000);
    compress.compress_vec(&vec![0; part], &mut once, FlushCompress::Full).expect("zeros compress");
    let mut stream = once.repeat(times);
    // The last block, empty.
    stream.extend([3, 0]);
    stream
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn every_format_decodes_to_the_picture_it_was_made_of() {
        let original = draw(1, 2, 3);
        for rot in [Rot::Good, Rot::Png, Rot::Webp, Rot::Bmp, Rot::Tiff, Rot::Gif, Rot::AlphaPng, Rot::Progressive] {
            let bytes = photo(rot, 1, 2, 3);
            assert!(bytes.len() > 5_000, "{rot:?}");
            let rgb = match image::load_from_memory(&bytes) {
                Ok(image) => image.into_rgb8().into_raw(),
                Err(_) => turbojpeg::decompress(&bytes, PixelFormat::RGB).expect("a JPEG").pixels,
            };
            assert!(difference(&rgb, &original.rgb) < 12, "{rot:?}: {}", difference(&rgb, &original.rgb));
        }
        let inks = turbojpeg::decompress(&photo(Rot::Cmyk, 1, 2, 3), PixelFormat::CMYK).expect("CMYK").pixels;
        let light = |ink: &[u8], c: usize| (u16::from(ink[c]) * u16::from(ink[3]) / 255) as u8;
        let rgb: Vec<u8> = inks.chunks_exact(4).flat_map(|ink| [light(ink, 0), light(ink, 1), light(ink, 2)]).collect();
        assert!(difference(&rgb, &original.rgb) < 12, "{}", difference(&rgb, &original.rgb));
        let grey = turbojpeg::read_header(&photo(Rot::Grey, 1, 2, 3)).expect("a JPEG");
        assert_eq!(grey.colorspace, Colorspace::Gray);
        let side = turbojpeg::decompress(&photo(Rot::Exif, 1, 2, 3), PixelFormat::RGB).expect("a JPEG");
        let side = RgbImage::from_raw(side.width as u32, side.height as u32, side.pixels).expect("rows without gaps");
        let upright = image::imageops::rotate90(&side).into_raw();
        assert!(difference(&upright, &original.rgb) < 12);
    }

    /// The mean difference of two pictures' bytes.
    fn difference(a: &[u8], b: &[u8]) -> u64 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b))).sum::<u64>() / a.len() as u64
    }

    #[test]
    fn bombs_are_small_and_well_formed() {
        let png = png_bomb();
        assert!(png.len() < 500_000, "{}", png.len());
        let reader = image::ImageReader::with_format(Cursor::new(&png[..]), ImageFormat::Png);
        assert_eq!(reader.into_dimensions().expect("a header"), (20_000, 20_000));
        let mut inflate = flate2::read::ZlibDecoder::new(&png[8 + 25 + 8..png.len() - 16]);
        assert_eq!(std::io::copy(&mut inflate, &mut std::io::sink()).expect("a right checksum"), 400_020_000);

        let gzip = gzip_bomb();
        assert!(gzip.len() < 1_200_000, "{}", gzip.len());
        let mut first = vec![1; 40 << 20];
        flate2::read::GzDecoder::new(&gzip[..]).read_exact(&mut first).expect("more than any limit");
        assert!(first.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn one_placeholder_is_under_the_usual_limit_of_bytes_and_one_far_over_it() {
        let (small, large) = (placeholder(false).len(), placeholder(true).len());
        assert!((2_000..2_600).contains(&small) && (127_000..137_000).contains(&large), "{small} {large}");
        assert_eq!(TINY_GIF.len(), 43);
    }
}
