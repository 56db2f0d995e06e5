//! JPEG by libjpeg-turbo: decoding, scaled down where that is enough and to the planes that the file holds where it can be,
//! and encoding.

use bytes::Bytes;
use proto::Rejection;
use turbojpeg::{Colorspace, Compressor, Decompressor, Image, PixelFormat, ScalingFactor, Subsamp, YuvImage};

use super::resize::{KEPT_BUFFER, Layout, Picture, Pixels};

/// A progressive JPEG may redraw so many pixels in all of its scans, within these numbers of scans: files of more are made to burn
/// time, and those that are not have ten or so.
const SCANNED_PIXELS: u64 = 2_000_000_000;
const MAX_SCANS: (u64, u64) = (20, 200);

/// A decoder and an encoder with their buffers, for one thread.
#[derive(Debug)]
pub(crate) struct Codec {
    decompressor: Decompressor,
    compressor: Compressor,
    cmyk: Vec<u8>,
    encoded: Vec<u8>,
}

/// What a JPEG says of itself before its pixels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// EXIF: 1 to 8.
    pub(crate) orientation: u8,
    colorspace: Colorspace,
    subsamp: Subsamp,
    lossless: bool,
    /// Has Adobe's marker: its CMYK values are stored inverted.
    adobe: bool,
    /// All of it has to be read before any of its pixels is known.
    scans: bool,
}

impl Codec {
    pub(crate) fn new() -> turbojpeg::Result<Self> {
        let decompressor = decompressor()?;
        let mut compressor = Compressor::new()?;
        compressor.set_subsamp(Subsamp::Sub2x2)?;
        Ok(Self { decompressor, compressor, cmyk: Vec::new(), encoded: Vec::new() })
    }

    /// Reads the header alone, with a fresh decompressor: a used one keeps the last picture's tables, and after a header that
    /// failed it refuses every other one.
    pub(crate) fn header(&mut self, bytes: &[u8]) -> Result<Header, Rejection> {
        self.decompressor = decompressor().map_err(|_| Rejection::Undecodable)?;
        let header = self.decompressor.read_header(bytes).map_err(|e| rejection_of(&e, bytes))?;
        let Markers { orientation, adobe, scans } = scan_markers(bytes);
        let pixels = |side: usize| u32::try_from(side).map_err(|_| Rejection::TooManyPixels);
        Ok(Header {
            width: pixels(header.width)?,
            height: pixels(header.height)?,
            orientation,
            colorspace: header.colorspace,
            subsamp: header.subsamp,
            lossless: header.is_lossless,
            adobe,
            scans,
        })
    }

    /// Decodes into `into`, at 1/2, 1/4 or 1/8 of the size if `shrinks` says that it will shrink by as much (other eighths
    /// are slower than the whole); as RGB if `rgb` or if the file's own planes are none that can be scaled. The image must be
    /// whole: libjpeg's warnings count, because what they report are pixels that it made up.
    pub(crate) fn decode(
        &mut self,
        bytes: &[u8],
        header: &Header,
        (shrinks, rgb): (u32, bool),
        into: &mut Pixels,
    ) -> Result<(), Rejection> {
        let scale = header.scale(shrinks);
        let pixels = u64::from(header.width) * u64::from(header.height);
        let scans = (SCANNED_PIXELS / pixels.max(1)).clamp(MAX_SCANS.0, MAX_SCANS.1);
        self.decompressor.set_scan_limit(scans as u32).map_err(|_| Rejection::Undecodable)?;
        self.decompressor.set_scaling_factor(scale).map_err(|_| Rejection::Undecodable)?;
        let (width, height) = (scale.scale(header.width as usize), scale.scale(header.height as usize));
        let size = (width as u32, height as u32);
        let layout = if rgb { Layout::Rgb } else { header.layout() };
        let pixels = into.reset(layout, size, header.orientation);
        let result = match header.colorspace {
            Colorspace::CMYK | Colorspace::YCCK => {
                self.cmyk.resize(width * height * 4, 0);
                let pitch = width * 4;
                let image = Image { pixels: self.cmyk.as_mut_slice(), width, pitch, height, format: PixelFormat::CMYK };
                let result = self.decompressor.decompress(bytes, image);
                cmyk_to_rgb(&self.cmyk, header.adobe, pixels);
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
        };
        match result {
            Err(e) if !is_harmless(&e, bytes) => Err(rejection_of(&e, bytes)),
            _ => Ok(()),
        }
    }

    /// Encodes a picture with chroma of half the size, as nearly all photos have it.
    pub(crate) fn encode(&mut self, picture: &Picture<'_>, quality: u8) -> turbojpeg::Result<Bytes> {
        let most = self.most(picture.width, picture.height)?;
        self.compressor.set_quality(i32::from(quality))?;
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
    pub(crate) fn most(&self, width: u32, height: u32) -> turbojpeg::Result<usize> {
        self.compressor.buf_len(width as usize, height as usize)
    }
}

impl Header {
    /// What it is decoded at if it will shrink by so much.
    fn scale(&self, shrinks: u32) -> ScalingFactor {
        match shrinks {
            _ if self.lossless => ScalingFactor::ONE,
            8.. => ScalingFactor::ONE_EIGHTH,
            4.. => ScalingFactor::ONE_QUARTER,
            2.. => ScalingFactor::ONE_HALF,
            _ => ScalingFactor::ONE,
        }
    }

    /// How many pixels are in memory at once while it is decoded.
    pub(crate) fn held_pixels(&self, shrinks: u32) -> u64 {
        let scale = if self.scans { ScalingFactor::ONE } else { self.scale(shrinks) };
        scale.scale(self.width as usize) as u64 * scale.scale(self.height as usize) as u64
    }

    /// Whether an upright image in colour is meant, as [`Codec::encode`] makes it.
    pub(crate) fn is_plain(&self) -> bool {
        self.colorspace == Colorspace::YCbCr && self.orientation <= 1 && !self.lossless
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

fn decompressor() -> turbojpeg::Result<Decompressor> {
    Decompressor::new()
}

/// Warnings about a header's form, which cost no pixel. Only the first warning of an image has a text, so the end is looked at
/// too.
fn is_harmless(error: &turbojpeg::Error, bytes: &[u8]) -> bool {
    let turbojpeg::Error::TurboJpegError(text) = error else { return false };
    let formal = text.contains("Invalid SOS parameters") || text.contains("Inconsistent progression sequence");
    formal && has_end(bytes)
}

fn rejection_of(error: &turbojpeg::Error, bytes: &[u8]) -> Rejection {
    let cut = matches!(error, turbojpeg::Error::TurboJpegError(text) if text.contains("Premature end of JPEG"));
    if cut || !has_end(bytes) { Rejection::Truncated } else { Rejection::Undecodable }
}

/// Whether the last marker is there, perhaps followed by padding.
fn has_end(bytes: &[u8]) -> bool {
    let padding = bytes.iter().rev().take_while(|b| matches!(b, 0 | b'\n' | b'\r' | b' ')).count();
    bytes[..bytes.len() - padding].ends_with(&[0xff, 0xd9])
}

/// Naive conversion; what an ink looks like on paper (its ICC profile) is left aside.
fn cmyk_to_rgb(cmyk: &[u8], inverted: bool, rgb: &mut [u8]) {
    let flip = if inverted { 0 } else { 255 };
    for (ink, pixel) in cmyk.chunks_exact(4).zip(rgb.chunks_exact_mut(3)) {
        let black = u32::from(ink[3] ^ flip);
        for channel in 0..3 {
            let product = u32::from(ink[channel] ^ flip) * black;
            pixel[channel] = ((product + 127) / 255) as u8;
        }
    }
}

/// What the segments before the pixels say.
struct Markers {
    /// EXIF's; 1 if there is none.
    orientation: u8,
    adobe: bool,
    /// More than one scan is to come.
    scans: bool,
}

fn scan_markers(bytes: &[u8]) -> Markers {
    let (mut orientation, mut adobe) = (1, false);
    let (mut progressive, mut components, mut in_first_scan) = (false, None, None);
    let mut at = 2;
    while let Some(&[0xff, marker]) = bytes.get(at..at + 2).and_then(|two| <&[u8; 2]>::try_from(two).ok()) {
        match marker {
            0xff => at += 1,               // fill
            0x01 | 0xd0..=0xd8 => at += 2, // markers without a segment
            0xd9 => break,
            0xda => {
                in_first_scan = bytes.get(at + 4);
                break;
            }
            _ => {
                let Some(&[high, low]) = bytes.get(at + 2..at + 4).and_then(|two| <&[u8; 2]>::try_from(two).ok())
                else {
                    break;
                };
                let length = usize::from(u16::from_be_bytes([high, low]));
                let Some(segment) = bytes.get(at + 4..at + 2 + length.max(2)) else { break };
                match marker {
                    0xe1 => orientation = exif_orientation(segment).unwrap_or(orientation),
                    0xee => adobe |= segment.starts_with(b"Adobe"),
                    // Frames (T.81, table B.1): all but the tables that stand among them.
                    0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => {
                        progressive = matches!(marker & 3, 2);
                        components = segment.get(5);
                    }
                    _ => {}
                }
                at += 2 + length.max(2);
            }
        }
    }
    Markers { orientation, adobe, scans: progressive || in_first_scan != components }
}

/// Tag 0x0112 of the first directory of an EXIF segment (Exif 2.3, 4.6.4).
fn exif_orientation(segment: &[u8]) -> Option<u8> {
    let tiff = segment.strip_prefix(b"Exif\0\0")?;
    let big = match tiff.get(..4)? {
        b"MM\0*" => true,
        b"II*\0" => false,
        _ => return None,
    };
    let short = |at: usize| {
        let two = <[u8; 2]>::try_from(tiff.get(at..at.checked_add(2)?)?).ok()?;
        Some(if big { u16::from_be_bytes(two) } else { u16::from_le_bytes(two) })
    };
    let long = |at: usize| {
        let four = <[u8; 4]>::try_from(tiff.get(at..at.checked_add(4)?)?).ok()?;
        Some(if big { u32::from_be_bytes(four) } else { u32::from_le_bytes(four) })
    };
    let directory = usize::try_from(long(4)?).ok()?;
    for entry in 0..usize::from(short(directory)?) {
        let at = directory.checked_add(2 + entry * 12)?;
        if short(at)? == 0x0112 {
            return u8::try_from(short(at.checked_add(8)?)?).ok().filter(|o| (1..=8).contains(o));
        }
    }
    None
}
