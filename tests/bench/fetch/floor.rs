//! The codec floor: decode, resize and encode by the fastest libraries, on one thread, and nothing else.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use turbojpeg::{Colorspace, Compressor, Decompressor, PixelFormat, ScalingFactor, Subsamp};

const SIZE: usize = 256;
/// Passes over the photos that one measurement takes.
const PASSES: usize = 3;

/// The photos and the codecs with their buffers.
pub(crate) struct Floor {
    photos: Vec<Bytes>,
    decompressor: Decompressor,
    compressor: Compressor,
    resizer: Resizer,
    pixels: Vec<u8>,
    square: Vec<u8>,
    encoded: Vec<u8>,
}

impl Floor {
    /// For those of `photos` that can be decoded to RGB: turbojpeg decodes CMYK to nothing else.
    pub(crate) fn new(photos: &[Bytes]) -> Result<Self> {
        let mut compressor = Compressor::new()?;
        compressor.set_quality(95)?;
        compressor.set_subsamp(Subsamp::Sub2x2)?;
        let mut decompressor = Decompressor::new()?;
        let mut rgb = Vec::new();
        for photo in photos {
            let colours = decompressor.read_header(photo).context("a photo")?.colorspace;
            if !matches!(colours, Colorspace::CMYK | Colorspace::YCCK) {
                rgb.push(photo.clone());
            }
        }
        ensure!(!rgb.is_empty(), "no photo is RGB");
        let encoded = vec![0; compressor.buf_len(SIZE, SIZE)?];
        let (resizer, square) = (Resizer::new(), vec![0; SIZE * SIZE * 3]);
        let mut floor = Self { photos: rgb, decompressor, compressor, resizer, pixels: Vec::new(), square, encoded };
        // Once for the caches.
        floor.pass()?;
        Ok(floor)
    }

    /// CPU seconds of this thread per 1000 photos.
    pub(crate) fn seconds_per_1000(&mut self) -> Result<f64> {
        let start = thread_seconds()?;
        for _ in 0..PASSES {
            self.pass()?;
        }
        Ok((thread_seconds()? - start) * 1000.0 / (PASSES * self.photos.len()) as f64)
    }

    fn pass(&mut self) -> Result<()> {
        for photo in &self.photos {
            let header = self.decompressor.read_header(photo)?;
            let scale = match header.width.min(header.height) / SIZE {
                8.. => ScalingFactor::ONE_EIGHTH,
                4.. => ScalingFactor::ONE_QUARTER,
                2.. => ScalingFactor::ONE_HALF,
                _ => ScalingFactor::ONE,
            };
            self.decompressor.set_scaling_factor(scale)?;
            let (width, height) = (scale.scale(header.width), scale.scale(header.height));
            let length = width * height * 3;
            if self.pixels.len() < length {
                self.pixels.resize(length, 0);
            }
            let (pixels, format) = (&mut self.pixels[..length], PixelFormat::RGB);
            let image = turbojpeg::Image { pixels: &mut *pixels, width, pitch: width * 3, height, format };
            self.decompressor.decompress(photo, image)?;

            let source = ImageRef::new(width as u32, height as u32, pixels, PixelType::U8x3)?;
            let mut target = Image::from_slice_u8(SIZE as u32, SIZE as u32, &mut self.square, PixelType::U8x3)?;
            let options = ResizeOptions::new()
                .resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3))
                .fit_into_destination(Some((0.5, 0.5)));
            self.resizer.resize(&source, &mut target, &options)?;

            let pixels = self.square.as_slice();
            let image = turbojpeg::Image { pixels, width: SIZE, pitch: SIZE * 3, height: SIZE, format };
            std::hint::black_box(self.compressor.compress_to_slice(image, &mut self.encoded)?);
        }
        Ok(())
    }
}

fn thread_seconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").context("the kernel counts no CPU time")?;
    let nanos: f64 = text.split_whitespace().next().context("schedstat is empty")?.parse()?;
    Ok(nanos / 1e9)
}
