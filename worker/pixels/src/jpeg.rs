//! JPEG by libjpeg-turbo: decoding, scaled down where that is enough and to the planes that the file holds where it can
//! be, and encoding.

use bytes::Bytes;
use image::metadata::Orientation;
use proto::{Chroma, Rejection, Resize};
use turbojpeg::{
    Colorspace, Compressor, DecompressHeader, Decompressor, Image, PixelFormat, ScalingFactor, Subsamp, YuvImage,
};

use super::colour::Colours;
use super::markers::{self, Markers};
use super::resize::{KEPT_BUFFER, Layout, Picture, Pixels};

/// A progressive JPEG may redraw so many pixels in all of its scans, within these numbers of scans: files of more are
/// made to burn time, and those that are not have ten or so.
const SCANNED_PIXELS: u64 = 2_000_000_000;
const MAX_SCANS: (u64, u64) = (20, 200);

/// A decoder and an encoder with their buffers, for one thread.
#[derive(Debug)]
pub struct Codec {
    decompressor: Decompressor,
    compressor: Compressor,
    cmyk: Vec<u8>,
    encoded: Vec<u8>,
}

/// What a JPEG says of itself before its pixels.
#[derive(Debug)]
pub struct Header {
    pub width: u32,
    pub height: u32,
    pub orientation: Orientation,
    pub colours: Option<Colours>,
    colorspace: Colorspace,
    subsamp: Subsamp,
    lossless: bool,
    /// All of it has to be read before any of its pixels is known.
    several_scans: bool,
    /// The same picture without what libjpeg warned of in the header.
    repaired: Option<Vec<u8>>,
}

/// How a JPEG is decoded.
#[derive(Debug, Clone, Copy)]
pub struct DecodeAs {
    /// The picture will be scaled down by as much: it is decoded at 1/2, 1/4 or 1/8 of its size if that is enough
    /// (other eighths are slower than the whole).
    pub reduction: u32,
    /// As RGB, even if the file's own planes could be scaled.
    pub rgb: bool,
}

impl Codec {
    /// One that encodes as the default settings say.
    ///
    /// # Errors
    /// If libjpeg-turbo has no memory.
    pub fn new() -> turbojpeg::Result<Self> {
        let (decompressor, compressor) = (Decompressor::new()?, Compressor::new()?);
        let mut codec = Self { decompressor, compressor, cmyk: Vec::new(), encoded: Vec::new() };
        codec.encode_as(&Resize::default())?;
        Ok(codec)
    }

    /// Reads the header alone.
    pub fn header(&mut self, bytes: &[u8]) -> Result<Header, Rejection> {
        let mut repaired = None;
        let header = match self.read_header(bytes) {
            Err(error) if is_warning_of_form(&error) => self.read_header(repaired.insert(markers::repair(bytes))),
            header => header,
        };
        let header = header.map_err(|e| rejection_of(&e, bytes))?;
        let Markers { orientation, several_scans, colours } = Markers::read(bytes);
        let pixels = |side: usize| u32::try_from(side).map_err(|_| Rejection::TooManyPixels);
        Ok(Header {
            width: pixels(header.width)?,
            height: pixels(header.height)?,
            orientation,
            colours,
            colorspace: header.colorspace,
            subsamp: header.subsamp,
            lossless: header.is_lossless,
            several_scans,
            repaired,
        })
    }

    /// With a fresh decompressor: a used one keeps the last picture's tables, and after a header that failed it refuses
    /// every other one.
    fn read_header(&mut self, bytes: &[u8]) -> turbojpeg::Result<DecompressHeader> {
        self.decompressor = Decompressor::new()?;
        self.decompressor.read_header(bytes)
    }

    /// Decodes into `into`. Every pixel must be there: what libjpeg warns of are mostly pixels that it made up, and
    /// then the picture is rejected. Returns whether there was nothing to warn of at all.
    pub fn decode(
        &mut self,
        bytes: &[u8],
        header: &Header,
        how: DecodeAs,
        into: &mut Pixels,
    ) -> Result<bool, Rejection> {
        let read = header.repaired.as_deref().unwrap_or(bytes);
        let mut result = self.try_decode(read, header, how, into);
        if header.repaired.is_none() && result.as_ref().is_err_and(is_warning_of_form) {
            let repaired = markers::repair(bytes);
            result = self.read_header(&repaired).and_then(|_| self.try_decode(&repaired, header, how, into));
            if result.is_ok() {
                return Ok(false);
            }
        }
        match result {
            Ok(()) => Ok(header.repaired.is_none()),
            Err(error) if is_harmless(&error, bytes) => Ok(false),
            Err(error) => Err(rejection_of(&error, bytes)),
        }
    }

    fn try_decode(
        &mut self,
        bytes: &[u8],
        header: &Header,
        DecodeAs { reduction, rgb }: DecodeAs,
        into: &mut Pixels,
    ) -> turbojpeg::Result<()> {
        let scale = header.scale(reduction);
        let pixels = u64::from(header.width) * u64::from(header.height);
        let scans = (SCANNED_PIXELS / pixels.max(1)).clamp(MAX_SCANS.0, MAX_SCANS.1);
        self.decompressor.set_scan_limit(scans as u32)?;
        self.decompressor.set_scaling_factor(scale)?;
        let (width, height) = (scale.scale(header.width as usize), scale.scale(header.height as usize));
        let size = (width as u32, height as u32);
        let layout = if rgb { Layout::Rgb } else { header.layout() };
        let pixels = into.reset(layout, size, header.orientation);
        match header.colorspace {
            Colorspace::CMYK | Colorspace::YCCK => {
                self.cmyk.resize(width * height * 4, 0);
                let pitch = width * 4;
                let image = Image { pixels: self.cmyk.as_mut_slice(), width, pitch, height, format: PixelFormat::CMYK };
                let result = self.decompressor.decompress(bytes, image);
                cmyk_to_rgb(&self.cmyk, pixels);
                self.cmyk.clear();
                self.cmyk.shrink_to(KEPT_BUFFER);
                result
            }
            _ if layout == Layout::Rgb => {
                let image = Image { pixels, width, pitch: width * 3, height, format: PixelFormat::RGB };
                self.decompressor.decompress(bytes, image)
            }
            _ => {
                let image = YuvImage { pixels, width, align: 1, height, subsamp: header.subsamp };
                self.decompressor.decompress_to_yuv(bytes, image)
            }
        }
    }

    /// Pictures are encoded so from now on.
    pub fn encode_as(&mut self, resize: &Resize) -> turbojpeg::Result<()> {
        self.compressor.set_quality(i32::from(resize.quality))?;
        self.compressor.set_optimize(resize.optimize)?;
        self.compressor.set_subsamp(match resize.chroma {
            Chroma::Halved => Subsamp::Sub2x2,
            Chroma::Full => Subsamp::None,
        })
    }

    /// Encodes a picture; one of planes has chroma of half the size in any case.
    pub fn encode(&mut self, picture: &Picture<'_>) -> turbojpeg::Result<Bytes> {
        let most = self.most(picture.width, picture.height)?;
        if self.encoded.len() < most {
            self.encoded.resize(most, 0);
        }
        let (width, height, pixels) = (picture.width as usize, picture.height as usize, picture.values);
        let length = match picture.layout {
            Layout::Rgb => {
                let image = Image { pixels, width, pitch: width * 3, height, format: PixelFormat::RGB };
                self.compressor.compress_to_slice(image, &mut self.encoded)?
            }
            _ => {
                let image = YuvImage { pixels, width, align: 1, height, subsamp: Subsamp::Sub2x2 };
                self.compressor.compress_yuv_to_slice(image, &mut self.encoded)?
            }
        };
        let encoded = Bytes::copy_from_slice(&self.encoded[..length]);
        if self.encoded.len() > KEPT_BUFFER {
            self.encoded = Vec::new();
        }
        Ok(encoded)
    }

    /// No picture of this size is encoded to more bytes.
    pub fn most(&self, width: u32, height: u32) -> turbojpeg::Result<usize> {
        self.compressor.buf_len(width as usize, height as usize)
    }
}

impl Header {
    /// The scale at which it is decoded.
    fn scale(&self, reduction: u32) -> ScalingFactor {
        match reduction {
            _ if self.lossless => ScalingFactor::ONE,
            8.. => ScalingFactor::ONE_EIGHTH,
            4.. => ScalingFactor::ONE_QUARTER,
            2.. => ScalingFactor::ONE_HALF,
            _ => ScalingFactor::ONE,
        }
    }

    /// How many bytes are in memory at once while it is decoded: its pixels, those of a printer's colours before them,
    /// and all coefficients of a file that tells them in several scans.
    pub fn held_bytes(&self, reduction: u32) -> u64 {
        let pixels =
            |scale: ScalingFactor| scale.scale(self.width as usize) as u64 * scale.scale(self.height as usize) as u64;
        let printed = matches!(self.colorspace, Colorspace::CMYK | Colorspace::YCCK);
        let channels = if printed { 4 } else { 3 };
        let coefficients = if self.several_scans { 2 * channels * pixels(ScalingFactor::ONE) } else { 0 };
        coefficients + pixels(self.scale(reduction)) * if printed { 7 } else { 3 }
    }

    /// Whether an upright image in colour is meant, as [`Codec::encode`] makes it.
    pub fn is_plain(&self) -> bool {
        self.colorspace == Colorspace::YCbCr && self.orientation == Orientation::NoTransforms && !self.lossless
    }

    /// Of the planes in the file.
    fn layout(&self) -> Layout {
        let chroma = |across, down| Layout::Ycc { across, down };
        match (self.colorspace, self.subsamp) {
            _ if self.lossless => Layout::Rgb,
            (Colorspace::Gray, _) => Layout::Grey,
            (Colorspace::YCbCr, Subsamp::None) => chroma(1, 1),
            (Colorspace::YCbCr, Subsamp::Sub2x1) => chroma(2, 1),
            (Colorspace::YCbCr, Subsamp::Sub2x2) => chroma(2, 2),
            (Colorspace::YCbCr, Subsamp::Sub1x2) => chroma(1, 2),
            _ => Layout::Rgb,
        }
    }
}

/// Whether this is a warning about what the file says beside its pixels, which [`markers::repair`] takes out. Only the
/// first warning of a picture has a text, so what else there is to warn of shows when the repaired file is read.
fn is_warning_of_form(error: &turbojpeg::Error) -> bool {
    let turbojpeg::Error::TurboJpegError(text) = error else { return false };
    // A damaged colour profile, an unknown version of JFIF, an unknown transform (libjpeg takes the usual one), a
    // baseline scan that names other coefficients than all, and bytes between segments.
    let of_form =
        ["bad ICC marker", "unknown JFIF revision", "Unknown Adobe color transform", "Invalid SOS parameters"];
    of_form.iter().any(|part| text.contains(part)) || is_before_marker(text, |marker| !matches!(marker, 0xd0..=0xd9))
}

/// Whether every pixel is there all the same. Bytes before the end (0xd9) come after the last pixel.
fn is_harmless(error: &turbojpeg::Error, bytes: &[u8]) -> bool {
    let turbojpeg::Error::TurboJpegError(text) = error else { return false };
    let odd_progression = text.contains("Inconsistent progression sequence") && markers::has_end(bytes);
    odd_progression || is_before_marker(text, |marker| marker == 0xd9)
}

/// Whether the text is "Corrupt JPEG data: 40 extraneous bytes before marker 0xd9", with such a marker.
fn is_before_marker(text: &str, marker: impl Fn(u8) -> bool) -> bool {
    let code = text.split_once("extraneous bytes before marker 0x").map(|(_, code)| code.trim());
    code.and_then(|code| u8::from_str_radix(code, 16).ok()).is_some_and(marker)
}

fn rejection_of(error: &turbojpeg::Error, bytes: &[u8]) -> Rejection {
    let cut = matches!(error, turbojpeg::Error::TurboJpegError(text) if text.contains("Premature end of JPEG"));
    if cut || !markers::has_end(bytes) { Rejection::Truncated } else { Rejection::Undecodable }
}

/// Naive conversion, without regard to what an ink looks like on paper (its ICC profile). Inks are stored inverted, as
/// Adobe does it; browsers take them so even without Adobe's marker.
fn cmyk_to_rgb(cmyk: &[u8], rgb: &mut [u8]) {
    for (ink, pixel) in cmyk.chunks_exact(4).zip(rgb.chunks_exact_mut(3)) {
        let black = u32::from(ink[3]);
        for channel in 0..3 {
            pixel[channel] = ((u32::from(ink[channel]) * black + 127) / 255) as u8;
        }
    }
}
