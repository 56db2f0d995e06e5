//! Bytes to a stored sample, or the reason why not: known placeholders, limits on bytes, the header's limits on pixels,
//! a full decode, resize, colours to sRGB, flat pictures, encode. Alpha is laid over white, of an animation the first
//! frame counts.

use std::borrow::Cow;
use std::io::{Cursor, ErrorKind};
use std::sync::LazyLock;

use anyhow::Context;
use bytes::Bytes;
use image::ImageFormat as Format;
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder, ImageError, ImageReader};
use proto::caught::caught;
use proto::dataset_spec::Verify;
use proto::shard::Moments;
use proto::{Chroma, Color, Filter, ImageFormat, Limits, Reencode, Rejection, Resize, ResizeMode};
use sha2::{Digest, Sha256};

use crate::decode_memory::Room;
use crate::format::{format_of, is_cut_riff, unsupported, webp_fits};
use crate::mend;
use crate::placeholder::Placeholders;
use crate::thumbnail::Thumbnails;
use pixels::{Codec, Colours, Conversions, DecodeAs, Frame, Hasher, Picture, Pixels, Shrinker, ToSrgb};
use pixels::{is_flat, moments, orientation, png_gamma};

/// What decoders may hold beside a picture's pixels.
const DECODERS_OWN: u64 = 16 << 20;

/// What a dataset asks of its pictures.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) resize: Resize,
    pub(crate) limits: Limits,
    pub(crate) placeholders: Placeholders,
    /// What the list says of each picture's bytes.
    pub(crate) verify: Option<Verify>,
    /// Whether a picture of one colour is stored.
    pub(crate) flat: bool,
    pub(crate) thumbnails: Thumbnails,
}

/// How a thumbnail is made: of at most 128 pixels a side, of whatever can be decoded.
static THUMBNAIL: LazyLock<Rules> = LazyLock::new(|| Rules {
    resize: Resize { size: 128, mode: ResizeMode::Fit, upscale: false, quality: 75, ..Resize::default() },
    limits: Limits { min_bytes: 0, min_side: 1, max_aspect: f64::INFINITY, ..Limits::default() },
    placeholders: Placeholders::default(),
    verify: None,
    flat: true,
    thumbnails: Thumbnails::none(),
});

/// What was learned of a body.
#[derive(Debug)]
pub(crate) struct Validation {
    pub(crate) sha256: [u8; 32],
    /// Width and height as fetched, upright, once the header was read.
    pub(crate) size: Option<(u32, u32)>,
    pub(crate) phash: Option<u64>,
    pub(crate) outcome: Result<Stored, Rejection>,
    /// More about the outcome.
    pub(crate) detail: Option<&'static str>,
    /// A small picture of what is rejected, as a JPEG.
    pub(crate) thumbnail: Option<Bytes>,
}

impl Validation {
    /// Of a body that could not be read as a picture.
    pub(crate) fn undecodable(sha256: [u8; 32]) -> Self {
        Self { sha256, size: None, phash: None, outcome: Err(Rejection::Undecodable), detail: None, thumbnail: None }
    }
}

/// A picture as it will be stored.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) image: Bytes,
    /// Of the pixels that were encoded: what a decoder gives back differs by JPEG's own rounding.
    pub(crate) moments: Moments,
}

/// Why a body is not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Rejected(Rejection),
    /// It must be decoded alone.
    Alone,
}

impl From<Rejection> for Refusal {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected(rejection)
    }
}

/// Finds room for so many bytes, which decoding takes.
pub(crate) type FindRoom<'a> = &'a mut dyn FnMut(u64) -> Room;

/// Validates bodies, with the codecs and buffers of one thread.
#[derive(Debug)]
pub(crate) struct Validator {
    codec: Codec,
    shrinker: Shrinker,
    hasher: Hasher,
    pixels: Pixels,
    conversions: Conversions,
    /// That of the picture at hand.
    conversion: Option<ToSrgb>,
}

impl Validator {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let codec = Codec::new().context("libjpeg-turbo")?;
        let (shrinker, hasher, pixels, conversions) =
            (Shrinker::default(), Hasher::default(), Pixels::default(), Conversions::default());
        Ok(Self { codec, shrinker, hasher, pixels, conversions, conversion: None })
    }

    pub(crate) fn validate(&mut self, bytes: &[u8], rules: &Rules) -> Validation {
        let anywhere = &mut |_| Room::Here;
        self.validate_within(anywhere, Sha256::digest(bytes).into(), bytes, rules).expect("there is no limit")
    }

    /// Validates a body with this hash, once there is `room`; none if it must be decoded alone.
    pub(crate) fn validate_within(
        &mut self,
        room: FindRoom<'_>,
        sha256: [u8; 32],
        bytes: &[u8],
        rules: &Rules,
    ) -> Option<Validation> {
        let mut validation = Validation::undecodable(sha256);
        validation.outcome = match rules.placeholders.contains(&sha256) {
            true => Err(Rejection::Placeholder),
            false => match self.try_store(bytes, rules, room, &mut validation) {
                Ok(stored) => Ok(stored),
                Err(Refusal::Rejected(rejection)) => Err(rejection),
                Err(Refusal::Alone) => return None,
            },
        };
        if let Err(rejection) = validation.outcome
            && rules.thumbnails.take(rejection)
        {
            let mut of_thumbnail = Validation::undecodable(sha256);
            let thumbnail = self.try_store(bytes, &THUMBNAIL, room, &mut of_thumbnail);
            validation.thumbnail = thumbnail.ok().map(|stored| stored.image);
        }
        self.pixels.release();
        self.shrinker.release();
        Some(validation)
    }

    /// Stores a picture. A decoder that panics on somebody's bytes costs this picture, not the thread.
    fn try_store(
        &mut self,
        bytes: &[u8],
        rules: &Rules,
        room: FindRoom<'_>,
        validation: &mut Validation,
    ) -> Result<Stored, Refusal> {
        let stored = caught(|| self.store(bytes, rules, room, validation));
        stored.unwrap_or_else(|_| {
            if let Ok(fresh) = Self::new() {
                *self = fresh;
            }
            Err(Rejection::Undecodable.into())
        })
    }

    fn store(
        &mut self,
        bytes: &[u8],
        rules: &Rules,
        room: FindRoom<'_>,
        validation: &mut Validation,
    ) -> Result<Stored, Refusal> {
        let (limits, resize) = (&rules.limits, &rules.resize);
        if (bytes.len() as u64) < limits.min_bytes {
            return Err(Rejection::TooSmall.into());
        }
        if bytes.len() as u64 > limits.max_bytes {
            return Err(Rejection::TooLarge.into());
        }
        self.codec.encode_as(resize).map_err(|_| Rejection::Undecodable)?;
        let mut keep_bytes = false;
        validation.detail = format_of(bytes).map_or_else(|| unsupported(bytes), |_| None);
        let format = format_of(bytes).ok_or(match validation.detail {
            Some(_) => Rejection::UnsupportedFormat,
            None => Rejection::NotAnImage,
        })?;
        let frame = if format == Format::Jpeg {
            let header = self.codec.header(bytes)?;
            let size = upright(header.width, header.height, header.orientation);
            let frame = frame(size, rules, validation)?;
            enter(room, header.held_bytes(frame.reduction))?;
            self.find_conversion(rules, header.colours.as_ref());
            // Halved chroma of an odd side would lie half a pixel off.
            let odd = frame.width % 2 + frame.height % 2 > 0;
            let other = resize.format != ImageFormat::Jpg || resize.chroma != Chroma::Halved;
            let rgb = other || resize.filter != Filter::Lanczos3 || odd || self.conversion.is_some();
            let how = DecodeAs { reduction: frame.reduction, rgb };
            let sound = self.codec.decode(bytes, &header, how, &mut self.pixels)?;
            keep_bytes = resize.reencode == Reencode::Needed
                && sound
                && self.conversion.is_none()
                && resize.format == ImageFormat::Jpg
                && header.is_plain()
                && frame.keeps(size)
                && self.codec.most(size.0, size.1).is_ok_and(|most| bytes.len() <= most);
            frame
        } else {
            self.decode_mended(bytes, format, rules, room, validation)?
        };
        let mut picture = self.shrinker.shrink(&self.pixels, &frame);
        let converted = self.conversion.as_ref().and_then(|conversion| conversion.convert(picture.values));
        picture.values = converted.as_deref().unwrap_or(picture.values);
        let moments = moments(&picture);
        if !rules.flat && is_flat(&without_margins(moments, &frame)) {
            return Err(Rejection::Flat.into());
        }
        let image = match resize.format {
            _ if keep_bytes => Bytes::copy_from_slice(bytes),
            ImageFormat::Jpg => self.codec.encode(&picture).map_err(|_| Rejection::Undecodable)?,
            ImageFormat::Png => png(&picture).map_err(|_| Rejection::Undecodable)?,
        };
        validation.phash = self.hasher.phash(&picture).ok();
        Ok(Stored { image, moments })
    }

    /// Finds how a picture's colours become those that are stored.
    fn find_conversion(&mut self, rules: &Rules, colours: Option<&Colours>) {
        self.conversion =
            colours.filter(|_| rules.resize.color == Color::Srgb).and_then(|colours| self.conversions.of(colours));
    }

    /// Every format but JPEG, also if the file is a little broken beside its pixels.
    fn decode_mended(
        &mut self,
        bytes: &[u8],
        format: Format,
        rules: &Rules,
        room: FindRoom<'_>,
        validation: &mut Validation,
    ) -> Result<Frame, Refusal> {
        let whole = if format == Format::Gif { mend::gif(bytes) } else { Cow::Borrowed(bytes) };
        let decoded = self.decode_other(&whole, format, rules, room, validation);
        let mended = match decoded {
            Err(Refusal::Rejected(Rejection::Truncated | Rejection::Undecodable)) if format == Format::Png => {
                mend::png(bytes)
            }
            _ => None,
        };
        match mended.map(|mended| self.decode_other(&mended, format, rules, room, validation)) {
            // It is broken in its pixels, too.
            None | Some(Err(Refusal::Rejected(Rejection::Truncated | Rejection::Undecodable))) => decoded,
            Some(mended) => mended,
        }
    }

    /// By the `image` crate.
    fn decode_other(
        &mut self,
        bytes: &[u8],
        format: Format,
        rules: &Rules,
        room: FindRoom<'_>,
        validation: &mut Validation,
    ) -> Result<Frame, Refusal> {
        if format == Format::WebP && is_cut_riff(bytes) {
            return Err(Rejection::Truncated.into());
        }
        let memory = |most: u64| {
            let mut limits = image::Limits::no_limits();
            limits.max_alloc = Some(most);
            limits
        };
        let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
        // Before the size is known: for a profile or a table, which may be packed.
        reader.limits(memory(bytes.len() as u64 * 2 + DECODERS_OWN));
        let mut decoder = reader.into_decoder().map_err(|e| rejection_of(&e))?;
        let (width, height) = decoder.dimensions();
        let exif = decoder.exif_metadata().ok().flatten().and_then(|exif| orientation(&exif));
        let orientation = exif.or_else(|| decoder.orientation().ok()).unwrap_or(Orientation::NoTransforms);
        let profile = decoder.icc_profile().ok().flatten().map(Colours::Profile);
        let gamma = || if format == Format::Png { png_gamma(bytes) } else { None };
        self.find_conversion(rules, profile.or_else(gamma).as_ref());
        let frame = frame(upright(width, height, orientation), rules, validation)?;
        if format == Format::WebP && !webp_fits(bytes, (width, height)) {
            return Err(Rejection::Undecodable.into());
        }
        let (needed, own) = held_bytes(u64::from(width) * u64::from(height), decoder.color_type());
        enter(room, needed + own)?;
        // A frame may be said to be larger than the picture.
        decoder.set_limits(memory(needed + own + DECODERS_OWN)).map_err(|e| rejection_of(&e))?;
        let image = DynamicImage::from_decoder(decoder).map_err(|e| rejection_of(&e))?;
        let rgb = if image.color().has_alpha() { over_white(image) } else { image.into_rgb8().into_raw() };
        self.pixels.replace(rgb, (width, height), orientation);
        Ok(frame)
    }
}

/// Goes on once there is room for so many bytes.
fn enter(room: FindRoom<'_>, bytes: u64) -> Result<(), Refusal> {
    match room(bytes) {
        Room::Here => Ok(()),
        Room::Alone => Err(Refusal::Alone),
        Room::Nowhere => Err(Rejection::TooManyPixels.into()),
    }
}

/// How many bytes a picture of so many pixels takes at its worst: as it is decoded and as it is made 8-bit RGB; and
/// what its decoder may hold of it meanwhile.
fn held_bytes(pixels: u64, color: ColorType) -> (u64, u64) {
    let decoded = u64::from(color.bytes_per_pixel());
    let (rgb, rgba) = (3, 4);
    let worst = match color {
        ColorType::Rgb8 => rgb,
        ColorType::Rgba8 => rgba + rgb,
        _ if color.has_alpha() => (decoded + rgba).max(rgba + rgb),
        _ => decoded + rgb,
    };
    (pixels.saturating_mul(worst), pixels.saturating_mul(decoded + rgba))
}

/// The size of a picture that is turned upright.
fn upright(width: u32, height: u32, orientation: Orientation) -> (u32, u32) {
    if orientation.to_exif() >= 5 { (height, width) } else { (width, height) }
}

fn check_size(width: u32, height: u32, limits: &Limits) -> Result<(), Rejection> {
    let (shorter, longer) = (width.min(height), width.max(height));
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        Err(Rejection::TooManyPixels)
    } else if shorter < limits.min_side.max(1) {
        Err(Rejection::TooFewPixels)
    } else if f64::from(longer) > f64::from(shorter) * limits.max_aspect {
        Err(Rejection::Aspect)
    } else {
        Ok(())
    }
}

/// Takes note of a picture's size, upright, and finds what is stored of it.
fn frame(size: (u32, u32), rules: &Rules, validation: &mut Validation) -> Result<Frame, Rejection> {
    validation.size = Some(size);
    check_size(size.0, size.1, &rules.limits)?;
    Frame::new(&rules.resize, size, rules.limits.max_pixels)
}

/// Without the white around a padded picture, which would hide that it is flat.
fn without_margins(mut moments: Moments, frame: &Frame) -> Moments {
    let (width, height) = frame.stored();
    let margins = u64::from(width) * u64::from(height) - u64::from(frame.width) * u64::from(frame.height);
    let white = Moments { pixels: margins, sum: [margins * 255; 3], sum_of_squares: [margins * 255 * 255; 3] };
    moments.subtract(&white);
    moments
}

fn png(picture: &Picture<'_>) -> image::ImageResult<Bytes> {
    let mut bytes = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    encoder.write_image(picture.values, picture.width, picture.height, ExtendedColorType::Rgb8)?;
    Ok(bytes.into())
}

fn over_white(image: DynamicImage) -> Vec<u8> {
    let rgba = image.into_rgba8().into_raw();
    let mut rgb = Vec::with_capacity(rgba.len() / 4 * 3);
    for pixel in rgba.chunks_exact(4) {
        let alpha = u32::from(pixel[3]);
        rgb.extend(
            pixel[..3].iter().map(|&value| ((u32::from(value) * alpha + 255 * (255 - alpha) + 127) / 255) as u8),
        );
    }
    rgb
}

fn rejection_of(error: &ImageError) -> Rejection {
    if matches!(error, ImageError::Limits(_)) {
        return Rejection::TooManyPixels;
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let io = match error.downcast_ref::<ImageError>() {
            Some(ImageError::IoError(io)) => Some(io),
            _ => error.downcast_ref::<std::io::Error>(),
        };
        // The GIF decoder has an end of its own, which only its text tells.
        if io.is_some_and(|io| io.kind() == ErrorKind::UnexpectedEof) || error.to_string() == "Unexpected End of File" {
            return Rejection::Truncated;
        }
        cause = error.source();
    }
    Rejection::Undecodable
}

#[cfg(test)]
pub(crate) mod tests;
