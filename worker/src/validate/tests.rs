mod odd;

use image::ImageFormat;
use image::{GrayImage, Rgb, RgbImage, Rgba, RgbaImage};
use turbojpeg::{Compressor, Image, PixelFormat, Subsamp};

use proto::ResizeMode;

use super::{ImageFormat as StoredFormat, *};

const SIZE: u32 = 64;

pub(crate) fn rules() -> Rules {
    let limits = Limits { min_bytes: 100, min_side: 16, max_pixels: 1_000_000, max_aspect: 4.0, ..Limits::default() };
    Rules {
        resize: Resize { size: SIZE, ..Resize::default() },
        limits,
        placeholders: Placeholders::default(),
        verify: None,
        flat: false,
        thumbnails: Thumbnails::none(),
    }
}

fn validate(bytes: &[u8]) -> Validation {
    Validator::new().expect("libjpeg-turbo").validate(bytes, &rules())
}

fn rejection(bytes: &[u8]) -> Rejection {
    validate(bytes).outcome.expect_err("a rejection")
}

/// The stored picture's pixels.
fn stored(bytes: &[u8]) -> RgbImage {
    let stored = validate(bytes).outcome.expect("kept");
    let image = turbojpeg::decompress(&stored.image, PixelFormat::RGB).expect("own output");
    RgbImage::from_raw(image.width as u32, image.height as u32, image.pixels).expect("whole")
}

fn distance(a: &RgbImage, b: &RgbImage) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.as_raw().len() as f64
}

/// Smooth, different in every corner, colourful.
pub(crate) fn photo(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let wave = (f64::from(x) * 0.1).sin() * (f64::from(y) * 0.07).cos() * 40.0;
        Rgb([(x * 200 / width) as u8 + 20, (y * 200 / height) as u8 + 20, (128.0 + wave) as u8])
    })
}

fn jpeg_of(pixels: &[u8], width: u32, height: u32, format: PixelFormat, progressive: bool) -> Vec<u8> {
    let mut compressor = Compressor::new().expect("libjpeg-turbo");
    compressor.set_subsamp(if format == PixelFormat::GRAY { Subsamp::Gray } else { Subsamp::Sub2x2 }).expect("allowed");
    compressor.set_progressive(progressive).expect("allowed");
    let (width, height) = (width as usize, height as usize);
    compressor.compress_to_vec(Image { pixels, width, pitch: width * format.size(), height, format }).expect("encodes")
}

pub(crate) fn jpeg(image: &RgbImage) -> Vec<u8> {
    jpeg_of(image.as_raw(), image.width(), image.height(), PixelFormat::RGB, false)
}

pub(crate) fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).expect("encodes");
    bytes.into_inner()
}

/// With an EXIF segment after the first marker.
fn with_orientation(jpeg: &[u8], orientation: u8, big_endian: bool) -> Vec<u8> {
    let mut tiff = Vec::new();
    if big_endian {
        tiff.extend(b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0");
        tiff.extend([orientation, 0, 0, 0, 0, 0, 0]);
    } else {
        tiff.extend(b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0");
        tiff.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
    }
    let length = (2 + 6 + tiff.len()) as u16;
    let mut out = jpeg[..2].to_vec();
    out.extend([0xff, 0xe1]);
    out.extend(length.to_be_bytes());
    out.extend(b"Exif\0\0");
    out.extend(tiff);
    out.extend(&jpeg[2..]);
    out
}

#[test]
fn every_format_gives_the_same_picture() {
    let image = photo(150, 100);
    let reference = stored(&encoded(image.clone(), ImageFormat::Png));
    for format in [ImageFormat::Gif, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::WebP] {
        // A GIF has 256 colours.
        let far = if format == ImageFormat::Gif { 8.0 } else { 0.0 };
        let bytes = encoded(image.clone(), format);
        assert!(distance(&stored(&bytes), &reference) <= far, "{format:?}");
        assert_eq!(validate(&bytes).size, Some((150, 100)), "{format:?}");
    }
    for progressive in [false, true] {
        let bytes = jpeg_of(image.as_raw(), 150, 100, PixelFormat::RGB, progressive);
        assert!(distance(&stored(&bytes), &reference) < 2.0, "progressive: {progressive}");
    }
    // Four times the target, so that it is decoded at a quarter.
    let large = stored(&jpeg(&image::imageops::resize(&image, 600, 400, image::imageops::FilterType::CatmullRom)));
    assert!(distance(&large, &reference) < 2.0);
}

#[test]
fn grey_cmyk_16_bit_and_alpha_become_rgb() {
    let image = photo(120, 90);
    let reference = stored(&encoded(image.clone(), ImageFormat::Png));

    let grey: GrayImage = DynamicImage::from(image.clone()).into_luma8();
    let of_grey = stored(&jpeg_of(grey.as_raw(), 120, 90, PixelFormat::GRAY, false));
    assert!(of_grey.pixels().all(|p| p[0].abs_diff(p[1]) <= 1 && p[1].abs_diff(p[2]) <= 1));

    // As Adobe writes it (libjpeg-turbo adds the marker): inks inverted, here without black.
    let inks: Vec<u8> = image.pixels().flat_map(|p| [p[0], p[1], p[2], 255]).collect();
    let cmyk = jpeg_of(&inks, 120, 90, PixelFormat::CMYK, false);
    assert!(distance(&stored(&cmyk), &reference) < 3.0);

    let deep = encoded(DynamicImage::from(image.clone()).into_rgb16(), ImageFormat::Png);
    assert!(distance(&stored(&deep), &reference) <= 1.0);

    // The left half is opaque, the right one is not there: white.
    let alpha = RgbaImage::from_fn(120, 90, |x, y| {
        let [r, g, b] = image.get_pixel(x, y).0;
        Rgba([r, g, b, if x < 60 { 255 } else { 0 }])
    });
    let of_alpha = stored(&encoded(alpha, ImageFormat::Png));
    assert!(of_alpha.get_pixel(50, 30).0.iter().all(|&v| v >= 250));
    assert!(of_alpha.get_pixel(10, 30).0.iter().zip(reference.get_pixel(10, 30).0).all(|(a, b)| a.abs_diff(b) < 12));
}

#[test]
fn every_exif_orientation_is_turned_upright() {
    let image = photo(160, 120);
    let plain = jpeg(&image);
    for orientation in 1..=8 {
        let mut upright = DynamicImage::from(image.clone());
        upright.apply_orientation(Orientation::from_exif(orientation).expect("1 to 8"));
        let wanted = stored(&encoded(upright.into_rgb8(), ImageFormat::Png));
        for big_endian in [true, false] {
            let turned = with_orientation(&plain, orientation, big_endian);
            assert!(distance(&stored(&turned), &wanted) < 2.0, "orientation {orientation}");
            let size = if orientation < 5 { (160, 120) } else { (120, 160) };
            assert_eq!(validate(&turned).size, Some(size), "orientation {orientation}");
        }
    }
}

#[test]
fn an_orientation_counts_as_whatever_integer_it_was_written() {
    let image = photo(160, 120);
    let plain = jpeg(&image);
    let wanted = stored(&encoded(image::imageops::rotate90(&image), ImageFormat::Png));
    let as_type = |kind: u8, big_endian: bool| {
        let mut turned = with_orientation(&plain, 6, big_endian);
        // Behind the marker, its length, "Exif\0\0", the header, the number of entries and the tag.
        let at = 2 + 4 + 6 + 8 + 2 + 2;
        turned[at + usize::from(big_endian)] = kind;
        if big_endian {
            let value: &[u8] = if matches!(kind, 4 | 9) {
                &[0, 0, 0, 6]
            } else if matches!(kind, 3 | 8) {
                &[0, 6]
            } else {
                &[6, 0]
            };
            turned[at + 6..][..value.len()].copy_from_slice(value);
        }
        turned
    };
    for kind in [1, 3, 4, 6, 8, 9] {
        for big_endian in [true, false] {
            let turned = as_type(kind, big_endian);
            assert!(distance(&stored(&turned), &wanted) < 2.0, "type {kind}, big endian: {big_endian}");
        }
    }
    // Text and fractions are none, nor is what is no orientation.
    let reference = stored(&plain);
    for odd in
        [as_type(2, false), as_type(5, true), with_orientation(&plain, 9, true), with_orientation(&plain, 0, false)]
    {
        assert!(distance(&stored(&odd), &reference) < 0.01);
    }
    for cut in 0..60 {
        let _ = validate(&[&as_type(4, true)[..cut], &plain[2..]].concat());
    }
}

#[test]
fn each_mode_stores_its_size_in_either_format() {
    for (mode, size) in [
        (ResizeMode::Cover, (64, 64)),
        (ResizeMode::Fit, (64, 48)),
        (ResizeMode::Pad, (64, 64)),
        (ResizeMode::KeepRatio, (85, 64)),
        (ResizeMode::None, (161, 121)),
    ] {
        // Odd sides, whose last pixel of chroma covers one pixel; lying on its side as well.
        let upright = photo(161, 121);
        let on_its_side = with_orientation(&jpeg(&image::imageops::rotate270(&upright)), 6, true);
        let bytes = [jpeg(&upright), on_its_side, encoded(upright, ImageFormat::Png)];
        let pictures = [StoredFormat::Png, StoredFormat::Jpg].map(|format| {
            let resize = Resize { size: SIZE, mode, format, ..Resize::default() };
            let rules = Rules { resize, ..rules() };
            let mut validator = Validator::new().expect("libjpeg-turbo");
            bytes.each_ref().map(|bytes| {
                let stored = validator.validate(bytes, &rules).outcome.expect("kept");
                assert_eq!(StoredFormat::of(&stored.image), format);
                assert_eq!(stored.moments.pixels, u64::from(size.0) * u64::from(size.1), "{mode:?}");
                match format {
                    StoredFormat::Png => image::load_from_memory(&stored.image).expect("own output").into_rgb8(),
                    StoredFormat::Jpg => {
                        let image = turbojpeg::decompress(&stored.image, PixelFormat::RGB).expect("own output");
                        RgbImage::from_raw(image.width as u32, image.height as u32, image.pixels).expect("whole")
                    }
                }
            })
        });
        for picture in pictures.as_flattened() {
            assert_eq!(picture.dimensions(), size, "{mode:?}");
            assert!(distance(picture, &pictures[0][2]) < 2.5, "{mode:?}: {}", distance(picture, &pictures[0][2]));
        }
    }
}

#[test]
fn what_is_already_as_it_would_be_stored_is_stored_as_it_came_if_that_is_wanted() {
    let fits = jpeg(&photo(SIZE, SIZE));
    let progressive = jpeg_of(photo(SIZE, SIZE).as_raw(), SIZE, SIZE, PixelFormat::RGB, true);
    let grey: GrayImage = DynamicImage::from(photo(SIZE, SIZE)).into_luma8();
    let mut validator = Validator::new().expect("libjpeg-turbo");
    for (bytes, kept) in [
        (fits.clone(), true),
        (progressive, true),
        (jpeg(&photo(SIZE + 1, SIZE)), false),
        (with_orientation(&fits, 3, true), false),
        (jpeg_of(grey.as_raw(), SIZE, SIZE, PixelFormat::GRAY, false), false),
        (encoded(photo(SIZE, SIZE), ImageFormat::Png), false),
        // Metadata of more bytes than any picture of this size.
        ([&fits[..2], &[0xff, 0xe5, 0xff, 0xff], &[7; 65_533], &fits[2..]].concat(), false),
    ] {
        for reencode in [Reencode::Always, Reencode::Needed] {
            let rules = Rules { resize: Resize { size: SIZE, reencode, ..Resize::default() }, ..rules() };
            let stored = validator.validate(&bytes, &rules).outcome.expect("kept");
            assert_eq!(stored.image == bytes, kept && reencode == Reencode::Needed);
        }
    }
    let rules = Rules { resize: Resize { size: SIZE, reencode: Reencode::Needed, ..Resize::default() }, ..rules() };
    let cut = validator.validate(&fits[..fits.len() * 2 / 3], &rules).outcome.expect_err("it is cut");
    assert_eq!(cut, Rejection::Truncated);
}

#[test]
fn white_around_a_flat_picture_does_not_hide_it() {
    let resize = Resize { size: SIZE, mode: ResizeMode::Pad, ..Resize::default() };
    let flat = jpeg(&RgbImage::from_pixel(300, 200, Rgb([90, 100, 110])));
    let validation = Validator::new().expect("libjpeg-turbo").validate(&flat, &Rules { resize, ..rules() });
    assert_eq!(validation.outcome.expect_err("flat"), Rejection::Flat);
}

#[test]
fn a_picture_that_is_cut_is_truncated_wherever_that_is() {
    let image = photo(200, 150);
    for bytes in [
        jpeg(&image),
        jpeg_of(image.as_raw(), 200, 150, PixelFormat::RGB, true),
        with_orientation(&jpeg(&image), 6, true),
        encoded(image.clone(), ImageFormat::Png),
        encoded(image.clone(), ImageFormat::Gif),
        encoded(image.clone(), ImageFormat::Bmp),
        encoded(image.clone(), ImageFormat::WebP),
    ] {
        assert!(validate(&bytes).outcome.is_ok());
        for share in [0.3, 0.5, 0.9] {
            let cut = &bytes[..(bytes.len() as f64 * share) as usize];
            assert_eq!(rejection(cut), Rejection::Truncated, "{:?} at {share}", &bytes[..4]);
        }
    }
}

#[test]
fn a_picture_with_a_damaged_middle_is_undecodable() {
    for bytes in [jpeg(&photo(200, 150)), encoded(photo(200, 150), ImageFormat::Png)] {
        let mut damaged = bytes.clone();
        let middle = bytes.len() / 2;
        for byte in &mut damaged[middle..middle + 40] {
            *byte = byte.wrapping_mul(31).wrapping_add(7) & 0x7f;
        }
        assert_eq!(rejection(&damaged), Rejection::Undecodable, "{:?}", &bytes[..4]);
    }
}

#[test]
fn limits_are_read_from_the_header_before_anything_is_decoded() {
    let mut huge = encoded(photo(100, 100), ImageFormat::Png);
    // Width and height of the first chunk, and its checksum, which a decoder looks at first.
    huge[16..24].copy_from_slice(&[0, 0, 0x4e, 0x20, 0, 0, 0x4e, 0x20]);
    let mut crc = flate2::Crc::new();
    crc.update(&huge[12..29]);
    huge[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    assert_eq!(rejection(&huge), Rejection::TooManyPixels);
    assert_eq!(validate(&huge).size, Some((20_000, 20_000)));

    assert_eq!(rejection(&encoded(photo(200, 15), ImageFormat::Bmp)), Rejection::TooFewPixels);
    assert_eq!(rejection(&jpeg(&photo(100, 401))), Rejection::Aspect);
    assert_eq!(rejection(&jpeg(&photo(2000, 600))), Rejection::TooManyPixels);
}

#[test]
fn what_is_no_photo_is_told_apart() {
    assert_eq!(rejection(b""), Rejection::TooSmall);
    assert_eq!(rejection(&encoded(RgbImage::new(1, 1), ImageFormat::Gif)), Rejection::TooSmall);
    assert_eq!(rejection(&b"<!DOCTYPE html><html>".repeat(20)), Rejection::NotAnImage);
    let svg = [&b"<svg xmlns='http://www.w3.org/2000/svg'>"[..], &b"<path d='M0 0'/>".repeat(40)].concat();
    let validation = validate(&svg);
    assert_eq!((validation.outcome.map(drop), validation.detail), (Err(Rejection::UnsupportedFormat), Some("svg")));
    let noise: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    assert_eq!(rejection(&noise), Rejection::NotAnImage);
    assert_eq!(rejection(&[&[0xff, 0xd8, 0xff, 0xe0][..], &noise, &[0xff, 0xd9]].concat()), Rejection::Undecodable);
    assert_eq!(rejection(&jpeg(&RgbImage::from_pixel(300, 300, Rgb([90, 100, 110])))), Rejection::Flat);
}

#[test]
fn a_known_placeholder_is_named_before_any_other_reason() {
    let bytes = encoded(RgbImage::new(1, 1), ImageFormat::Gif);
    let listed = format!("{} a single pixel", proto::shard::sha256_hex(&bytes));
    let rules = Rules { placeholders: Placeholders::parse(&listed).expect("a list"), ..rules() };
    let validation = Validator::new().expect("libjpeg-turbo").validate(&bytes, &rules);
    assert_eq!(validation.outcome.expect_err("listed"), Rejection::Placeholder);
}

#[test]
fn a_few_of_those_that_are_rejected_for_what_is_seen_are_kept_small() {
    let listed = encoded(RgbImage::from_pixel(30, 20, Rgb([200, 0, 0])), ImageFormat::Png);
    let line = format!("{} a red card", proto::shard::sha256_hex(&listed));
    let placeholders = Placeholders::parse(&line).expect("a list");
    let rules = Rules { placeholders, thumbnails: Thumbnails::of_shard(), ..rules() };
    let mut validator = Validator::new().expect("libjpeg-turbo");
    let mut seen = |bytes: &[u8]| {
        let Validation { outcome, thumbnail, .. } = validator.validate(bytes, &rules);
        let size = thumbnail.map(|jpeg| turbojpeg::read_header(&jpeg).expect("a JPEG")).map(|it| (it.width, it.height));
        (outcome.map(drop), size)
    };
    assert_eq!(seen(&listed), (Err(Rejection::Placeholder), Some((30, 20))));
    let flat = jpeg(&RgbImage::from_pixel(500, 250, Rgb([90, 100, 110])));
    for _ in 0..4 {
        assert_eq!(seen(&flat), (Err(Rejection::Flat), Some((128, 64))));
    }
    assert_eq!(seen(&flat), (Err(Rejection::Flat), None), "there are enough");
    assert_eq!(seen(&encoded(RgbImage::new(1, 1), ImageFormat::Gif)), (Err(Rejection::TooSmall), Some((1, 1))));
    assert_eq!(seen(&b"<html>".repeat(5)), (Err(Rejection::TooSmall), None), "there is nothing to be seen");
    let whole = jpeg(&photo(200, 100));
    assert_eq!(seen(&whole[..whole.len() / 2]), (Err(Rejection::Truncated), None));
    assert_eq!(seen(&whole), (Ok(()), None));
}

#[test]
fn no_bytes_after_a_magic_number_panic_or_leave_a_validator_unfit() {
    let good = jpeg(&photo(100, 80));
    let mut validator = Validator::new().expect("libjpeg-turbo");
    let mut seed = 1u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize
    };
    let originals = [
        good.clone(),
        encoded(photo(50, 50), ImageFormat::Png),
        encoded(photo(50, 50), ImageFormat::Gif),
        encoded(photo(50, 50), ImageFormat::Tiff),
        encoded(photo(50, 50), ImageFormat::WebP),
        encoded(photo(50, 50), ImageFormat::Bmp),
    ];
    for round in 0..600 {
        let mut bytes = originals[round % originals.len()].clone();
        for _ in 0..1 + random() % 8 {
            let at = random() % bytes.len();
            bytes[at] = random() as u8;
        }
        let _ = validator.validate(&bytes, &rules());
    }
    assert!(validator.validate(&good, &rules()).outcome.is_ok());
}

/// Prints what one core needs for the pictures of a tar: `GLEANER_PHOTOS=photos.tar cargo test -p gleaner-worker --
/// --ignored --nocapture cpu_time`.
#[test]
#[ignore = "a measurement; needs a tar of photos"]
fn cpu_time_of_decode_resize_and_encode() {
    let path = std::env::var("GLEANER_PHOTOS").expect("GLEANER_PHOTOS names a tar");
    let mut archive = tar::Archive::new(std::fs::File::open(path).expect("a tar"));
    let mut photos = Vec::new();
    for entry in archive.entries().expect("a tar") {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry.expect("whole"), &mut bytes).expect("whole");
        // Folders stand in a tar too.
        if !bytes.is_empty() {
            photos.push(bytes);
        }
    }
    let rules = Rules { resize: Resize::default(), limits: Limits::default(), ..rules() };
    let mut validator = Validator::new().expect("libjpeg-turbo");
    let mut times: Vec<(&str, f64)> = Vec::new();
    const ROUNDS: usize = 5;
    let n = (ROUNDS * photos.len()) as f64;
    let mut measure = |name: &'static str, work: &mut dyn FnMut(&[u8])| {
        let start = std::time::Instant::now();
        (0..ROUNDS).for_each(|_| photos.iter().for_each(|photo| work(photo)));
        times.push((name, start.elapsed().as_secs_f64() * 1000.0 / n));
    };
    let mut rejected = Vec::new();
    measure("all", &mut |photo| rejected.extend(validator.validate(photo, &rules).outcome.err()));
    rejected.truncate(rejected.len() / ROUNDS);
    measure("sha256", &mut |photo| {
        std::hint::black_box(Sha256::digest(photo));
    });
    let Validator { codec, shrinker, hasher, pixels, .. } = &mut validator;
    let decode = |codec: &mut Codec, pixels: &mut Pixels, photo: &[u8]| {
        let header = codec.header(photo).expect("a photo");
        let frame = Frame::new(&rules.resize, (header.width, header.height), u64::MAX).expect("a photo");
        let _ = codec.decode(photo, &header, DecodeAs { reduction: frame.reduction, rgb: false }, pixels);
        frame
    };
    measure("decode", &mut |photo| {
        decode(codec, pixels, photo);
    });
    let mut frame = None;
    measure("decode + resize", &mut |photo| {
        let found = frame.insert(decode(codec, pixels, photo));
        shrinker.shrink(pixels, found);
    });
    let picture = shrinker.shrink(pixels, &frame.expect("a photo"));
    measure("encode", &mut |_| {
        let _ = codec.encode(&picture);
    });
    measure("moments", &mut |_| {
        std::hint::black_box(moments(&picture));
    });
    measure("phash", &mut |_| {
        let _ = hasher.phash(&picture);
    });
    let lines: String = times.iter().map(|(name, ms)| format!("{name}: {ms:.3} ms\n")).collect();
    eprintln!("{} photos, rejected: {rejected:?}; one core, a photo:\n{lines}", photos.len());
}

#[test]
fn a_gif_whose_frame_is_larger_than_the_picture_says_gets_no_memory_for_it() {
    let mut gif = encoded(RgbImage::from_pixel(2600, 2600, Rgb([9, 99, 200])), ImageFormat::Gif);
    gif[6..10].copy_from_slice(&[100, 0, 100, 0]);
    assert_eq!(rejection(&gif), Rejection::TooManyPixels);
}

#[test]
fn a_webp_whose_frame_is_larger_than_the_picture_is_not_decoded() {
    let plain = encoded(photo(300, 200), ImageFormat::WebP);
    assert!(webp_fits(&plain, (300, 200)) && !webp_fits(&plain, (299, 200)) && !webp_fits(&plain, (300, 199)));
    // The same behind a header that says 100 x 100 (WebP's container: sizes less one, 24 bits each).
    let extended = [b"VP8X", &10_u32.to_le_bytes()[..], &[0; 4], &[99, 0, 0, 99, 0, 0], &plain[12..]].concat();
    let whole = [b"RIFF", &(extended.len() as u32 + 4).to_le_bytes()[..], b"WEBP", &extended].concat();
    assert!(!webp_fits(&whole, (100, 100)) && webp_fits(&whole, (300, 200)));
    assert_eq!(rejection(&whole), Rejection::Undecodable);
}

#[test]
fn only_a_jpeg_of_several_scans_is_held_whole_while_it_is_scaled_down() {
    let image = photo(800, 640);
    let header = |progressive| {
        let bytes = jpeg_of(image.as_raw(), 800, 640, PixelFormat::RGB, progressive);
        Codec::new().expect("libjpeg-turbo").header(&bytes).expect("own output")
    };
    let pixels = [800 * 640, 400 * 320, 100 * 80];
    assert_eq!([1, 2, 8].map(|reduction| header(false).held_bytes(reduction)), pixels.map(|pixels| pixels * 3));
    assert_eq!(header(true).held_bytes(8), 800 * 640 * 6 + pixels[2] * 3, "all of its coefficients are held");
}
