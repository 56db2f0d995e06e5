//! Augmentation: crops a part of a stored image, scales and flips it, and draws its color jitter.
//!
//! What is drawn for a sample depends on seed, epoch and the sample's key alone. The pixels are the same whether the
//! image was cached or not.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use proto::run_spec::{Cut, Input};
use proto::{ImageFormat, Sample};

use crate::color::ColorJitter;
use crate::image::Image;
use crate::jpeg::{self, Area};
use crate::random;

/// How samples become input.
#[derive(Debug, Clone)]
pub enum Augmentation {
    /// A random crop, flip and color jitter, drawn anew for each epoch (from 0) and sample.
    Training {
        /// What may be drawn.
        input: Input,
        /// The run's.
        seed: u64,
        /// From 0.
        epoch: u64,
    },
    /// The centre crop.
    Evaluation {
        /// Its side, in pixels.
        crop: u32,
    },
}

/// What was drawn for one image.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Transform {
    area: Area,
    flip: bool,
    brightness: f32,
    contrast: f32,
    saturation: f32,
}

/// What an image gives to a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Crop {
    /// The first column of the area that is cut out.
    pub left: usize,
    /// Its first row.
    pub top: usize,
    /// Its columns; the area is scaled if it has not the size of the crop.
    pub width: usize,
    /// Its rows.
    pub height: usize,
    /// Whether its columns are in reverse.
    pub flip: bool,
    /// What becomes of its colors.
    pub jitter: ColorJitter,
}

/// What each random number of a sample decides.
mod draw {
    pub(super) const LEFT: u64 = 0;
    pub(super) const TOP: u64 = 1;
    pub(super) const FLIP: u64 = 2;
    pub(super) const BRIGHTNESS: u64 = 3;
    pub(super) const CONTRAST: u64 = 4;
    pub(super) const SATURATION: u64 = 5;
    /// Two for each attempt to draw a size.
    pub(super) const SHAPES: u64 = 6;
}

impl Augmentation {
    /// Side of the network's input.
    pub fn crop(&self) -> usize {
        match self {
            Augmentation::Training { input, .. } => input.crop as usize,
            Augmentation::Evaluation { crop } => *crop as usize,
        }
    }

    /// What [`Augmenter::apply`] makes of an image of that key, width, height and mean grey, for who does it elsewhere.
    ///
    /// # Errors
    /// If the image is smaller than the crop, and not scaled.
    pub fn crop_of(&self, key: u64, (width, height): (usize, usize), grey: f32) -> Result<Crop> {
        let transform = self.transform(key, width, height).with_context(|| format!("sample {key}"))?;
        let Transform { area: Area { left, top, width, height }, flip, .. } = transform;
        Ok(Crop { left, top, width, height, flip, jitter: transform.color_jitter(|| grey) })
    }

    /// Whether the color jitter of a part depends on the whole image.
    fn needs_whole_image(&self) -> bool {
        matches!(self, Augmentation::Training { input, .. } if input.contrast > 0.0)
    }

    fn transform(&self, key: u64, width: usize, height: usize) -> Result<Transform> {
        let crop = self.crop();
        let scales = matches!(self, Augmentation::Training { input, .. } if input.cut == Cut::Resized);
        ensure!(
            scales || width.min(height) >= crop,
            "it has {width} x {height} pixels, of which input.crop = {crop} cannot be cut"
        );
        let Augmentation::Training { input, seed, epoch } = self else {
            let area = Area { left: (width - crop) / 2, top: (height - crop) / 2, width: crop, height: crop };
            return Ok(Transform { area, flip: false, brightness: 1.0, contrast: 1.0, saturation: 1.0 });
        };
        let draws = random::key(&[*seed, *epoch, key]);
        let (w, h) = match input.cut {
            Cut::Translate => (crop, crop),
            Cut::Resized => random_size(draws, input, width, height),
        };
        let place = |draw, room: usize| random::below(draws, draw, room as u64 + 1) as usize;
        let around_one = |draw, by: f64| 1.0 + by as f32 * (2.0 * random::uniform(draws, draw) - 1.0);
        Ok(Transform {
            area: Area { left: place(draw::LEFT, width - w), top: place(draw::TOP, height - h), width: w, height: h },
            flip: input.flip && random::below(draws, draw::FLIP, 2) == 1,
            brightness: around_one(draw::BRIGHTNESS, input.brightness),
            contrast: around_one(draw::CONTRAST, input.contrast),
            saturation: around_one(draw::SATURATION, input.saturation),
        })
    }
}

/// Width and height of a random crop (the Inception networks' augmentation, Szegedy et al., 2015, as torchvision's
/// `RandomResizedCrop` draws it): its area is a uniform share of the image's, the logarithm of its aspect ratio
/// uniform. If none of ten fits, the largest part with the nearest ratio.
fn random_size(draws: u64, input: &Input, width: usize, height: usize) -> (usize, usize) {
    let (w, h) = (width as f64, height as f64);
    let ratio = input.max_aspect.ln();
    for attempt in 0..10 {
        let uniform = |i| f64::from(random::uniform(draws, draw::SHAPES + 2 * attempt + i));
        let area = w * h * (input.min_area + (1.0 - input.min_area) * uniform(0));
        let aspect = (ratio * (2.0 * uniform(1) - 1.0)).exp();
        let (part_w, part_h) = ((area * aspect).sqrt().round() as usize, (area / aspect).sqrt().round() as usize);
        if (1..=width).contains(&part_w) && (1..=height).contains(&part_h) {
            return (part_w, part_h);
        }
    }
    let aspect = (w / h).clamp(1.0 / input.max_aspect, input.max_aspect);
    let fitting = |side: f64, most: usize| (side.round() as usize).clamp(1, most);
    (fitting(h * aspect, width).min(width), fitting(w / aspect, height).min(height))
}

impl Transform {
    /// Brightness scales; contrast blends with the mean grey of the whole image; saturation blends with the pixel's own
    /// grey. All three are one linear map, clamped once at the end, where torchvision clamps after each.
    fn color_jitter(&self, grey: impl FnOnce() -> f32) -> ColorJitter {
        let Self { brightness, contrast, saturation, .. } = *self;
        let gain = brightness * contrast;
        ColorJitter {
            gain: gain * saturation,
            grey: gain * (1.0 - saturation),
            offset: if contrast == 1.0 { 0.0 } else { (1.0 - contrast) * brightness * grey() },
        }
    }
}

/// Decodes and augments on one thread, in buffers that it keeps.
pub struct Augmenter {
    decoder: jpeg::Decoder,
    pixels: Vec<u8>,
    resizer: Resizer,
}

impl Augmenter {
    /// An augmenter without buffers yet.
    ///
    /// # Errors
    /// If libjpeg-turbo has no memory.
    pub fn new() -> Result<Self> {
        Ok(Self { decoder: jpeg::Decoder::new()?, pixels: Vec::new(), resizer: Resizer::new() })
    }

    /// Decodes a whole sample.
    ///
    /// # Errors
    /// If its bytes are no picture; the error names the sample, as do the others.
    pub fn decode(&mut self, sample: &Sample) -> Result<Arc<Image>> {
        let Sample { key, label, ref image } = *sample;
        let context = || format!("sample {key}");
        let (size, pixels) = match ImageFormat::of(image) {
            ImageFormat::Jpg => {
                let all = |width, height| Ok(Area { left: 0, top: 0, width, height });
                let mut pixels = Vec::new();
                let (size, _) = self.decoder.decode(image, all, &mut pixels).with_context(context)?;
                (size, pixels)
            }
            ImageFormat::Png => png(image).with_context(context)?,
        };
        Ok(Arc::new(Image::new(key, label, size, pixels)))
    }

    /// Augments a decoded image and writes crop x crop x 3 bytes.
    ///
    /// # Errors
    /// If the image is smaller than the crop.
    pub fn apply(&mut self, image: &Image, augmentation: &Augmentation, into: &mut [u8]) -> Result<ColorJitter> {
        let Image { key, width, height, ref pixels, .. } = *image;
        let transform = augmentation.transform(key, width, height).with_context(|| format!("sample {key}"))?;
        write(
            &mut self.resizer,
            (pixels, Area { left: 0, top: 0, width, height }),
            &transform,
            augmentation.crop(),
            into,
        )?;
        Ok(transform.color_jitter(|| image.grey()))
    }

    /// The same, from an encoded sample: decodes no more than the crop, if that is possible.
    ///
    /// # Errors
    /// As those of both.
    pub fn decode_and_apply(
        &mut self,
        sample: &Sample,
        augmentation: &Augmentation,
        into: &mut [u8],
    ) -> Result<ColorJitter> {
        if augmentation.needs_whole_image() || ImageFormat::of(&sample.image) == ImageFormat::Png {
            let image = self.decode(sample)?;
            return self.apply(&image, augmentation, into);
        }
        let Sample { key, ref image, .. } = *sample;
        let context = || format!("sample {key}");
        let mut transform = None;
        let wanted = |width, height| Ok(transform.insert(augmentation.transform(key, width, height)?).area);
        let (_, part) = self.decoder.decode(image, wanted, &mut self.pixels).with_context(context)?;
        let transform = transform.with_context(context)?;
        write(&mut self.resizer, (&self.pixels, part), &transform, augmentation.crop(), into)?;
        Ok(transform.color_jitter(|| 0.0))
    }
}

fn png(bytes: &[u8]) -> Result<((usize, usize), Vec<u8>)> {
    let image = image::load_from_memory_with_format(bytes, image::ImageFormat::Png)?.into_rgb8();
    Ok(((image.width() as usize, image.height() as usize), image.into_raw()))
}

/// Crops, scales and flips to crop x crop pixels. `pixels` are the part `part` of the image.
fn write(
    resizer: &mut Resizer,
    (pixels, part): (&[u8], Area),
    transform: &Transform,
    crop: usize,
    into: &mut [u8],
) -> Result<()> {
    let Transform { area, flip, .. } = *transform;
    let (left, top) = (area.left - part.left, area.top - part.top);
    if (area.width, area.height) == (crop, crop) {
        let rows = pixels.chunks_exact(3 * part.width).skip(top);
        for (row, into) in rows.zip(into.chunks_exact_mut(3 * crop)) {
            into.copy_from_slice(&row[3 * left..3 * (left + crop)]);
            if flip {
                mirror(into);
            }
        }
        return Ok(());
    }
    let source = TypedImageRef::<U8x3>::from_buffer(part.width as u32, part.height as u32, pixels)?;
    let source = TypedCroppedImage::new(source, left as u32, top as u32, area.width as u32, area.height as u32)?;
    let mut target = TypedImage::<U8x3>::from_buffer(crop as u32, crop as u32, into)?;
    // A triangle filter as wide as the scale requires, which Pillow calls bilinear.
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
    resizer.resize_typed(&source, &mut target, &options)?;
    if flip {
        into.chunks_exact_mut(3 * crop).for_each(mirror);
    }
    Ok(())
}

/// Reverses a row of pixels in place. That is faster than copying it in reverse, because memory is first written in
/// long runs.
fn mirror(row: &mut [u8]) {
    row.as_chunks_mut::<3>().0.reverse();
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    const SIZE: usize = 40;

    /// Each pixel's red is its column, its green its row.
    fn image(key: u64) -> Image {
        let pixel = |i: usize| [(i % SIZE) as u8, (i / SIZE) as u8, 200];
        Image::new(key, 3, (SIZE, SIZE), (0..SIZE * SIZE).flat_map(pixel).collect())
    }

    fn training(epoch: u64, input: Input) -> Augmentation {
        Augmentation::Training { input: Input { crop: 32, ..input }, seed: 1, epoch }
    }

    fn cut(key: u64, augmentation: &Augmentation) -> (Vec<u8>, ColorJitter) {
        let mut into = vec![0; 3 * augmentation.crop() * augmentation.crop()];
        let jitter =
            Augmenter::new().expect("memory").apply(&image(key), augmentation, &mut into).expect("large enough");
        (into, jitter)
    }

    #[test]
    fn augmentation_differs_by_sample_and_epoch_and_is_otherwise_the_same() {
        let input = Input::default();
        let augmentation = |epoch| (0..40).map(|key| cut(key, &training(epoch, input.clone()))).collect::<Vec<_>>();
        let (first, second) = (augmentation(0), augmentation(1));
        assert_eq!(first, augmentation(0));
        assert!(first.iter().zip(&second).filter(|(one, other)| one == other).count() < 3);
        let corners: std::collections::BTreeSet<_> = first.iter().map(|(pixels, _)| (pixels[0], pixels[1])).collect();
        assert!(corners.len() > 20, "places and mirrors: {corners:?}");
    }

    #[test]
    fn a_flipped_crop_has_its_columns_in_reverse() {
        for (part, step) in [(Cut::Translate, 1.0), (Cut::Resized, 0.9)] {
            let input = Input { cut: part, ..Input::default() };
            let mirrored = (0..40)
                .filter(|&key| {
                    let (pixels, _) = cut(key, &training(0, input.clone()));
                    let red: Vec<f32> = pixels[..96].chunks(3).map(|pixel| f32::from(pixel[0])).collect();
                    let slope = (red[31] - red[0]) / 31.0;
                    assert!(slope.abs() <= 1.3 && slope.abs() >= if step == 1.0 { 1.0 } else { 0.1 }, "{red:?}");
                    slope < 0.0
                })
                .count();
            assert!((8..32).contains(&mirrored), "{part:?}: {mirrored} of 40");
        }
    }

    #[test]
    fn resized_parts_have_the_areas_and_ratios_that_the_spec_allows() {
        let input = Input { cut: Cut::Resized, min_area: 0.2, max_aspect: 2.0, crop: 32, ..Input::default() };
        let augmentation = training(3, input);
        let mut areas = Vec::new();
        for key in 0..500 {
            let Area { left, top, width, height } = augmentation.transform(key, 300, 200).expect("any size").area;
            assert!(left + width <= 300 && top + height <= 200);
            let (area, ratio) = ((width * height) as f64 / 60_000.0, width as f64 / height as f64);
            assert!((0.19..=1.0).contains(&area) && (0.48..=2.05).contains(&ratio), "{width} x {height}");
            areas.push(area);
        }
        areas.sort_by(f64::total_cmp);
        assert!(areas[0] < 0.25 && (0.45..0.65).contains(&areas[250]), "{} {}", areas[0], areas[250]);
    }

    #[test]
    fn what_is_decoded_in_part_is_what_is_cut_from_the_whole() {
        let pixels: Vec<u8> = (0..3 * 90 * 80).map(|i| (i * i / 7 % 256) as u8).collect();
        let format = turbojpeg::PixelFormat::RGB;
        let picture = turbojpeg::Image { pixels: &pixels[..], width: 90, pitch: 270, height: 80, format };
        let jpeg = turbojpeg::compress(picture, 80, turbojpeg::Subsamp::Sub2x2).expect("an image");
        let jpeg = Bytes::copy_from_slice(&jpeg);
        let mut augmenter = Augmenter::new().expect("memory");
        let one = |contrast, cut| Input { contrast, cut, saturation: 0.4, ..Input::default() };
        let cuts = [one(0.0, Cut::Translate), one(0.0, Cut::Resized), one(0.3, Cut::Resized)];
        let augmentation =
            cuts.into_iter().map(|input| training(1, input)).chain([Augmentation::Evaluation { crop: 32 }]);
        for augmentation in augmentation {
            for key in 0..30 {
                let sample = Sample { key, label: 1, image: jpeg.clone() };
                let (mut part, mut whole) = (vec![0; 3 * 32 * 32], vec![1; 3 * 32 * 32]);
                let jitter = augmenter.decode_and_apply(&sample, &augmentation, &mut part).expect("a JPEG");
                let image = augmenter.decode(&sample).expect("a JPEG");
                assert_eq!(augmenter.apply(&image, &augmentation, &mut whole).expect("large enough"), jitter);
                assert_eq!(part, whole, "{augmentation:?} {key}");
            }
        }
    }

    #[test]
    fn evaluation_sees_the_centre_and_nothing_is_cut_of_what_is_too_small() {
        let (pixels, jitter) = cut(0, &Augmentation::Evaluation { crop: 30 });
        assert_eq!((&pixels[..3], jitter), (&[5, 5, 200][..], ColorJitter::default()));
        let error = Augmentation::Evaluation { crop: 41 }.transform(7, 50, 40).expect_err("too small").to_string();
        assert!(error.contains("50 x 40") && error.contains("input.crop = 41"), "{error}");
    }

    #[test]
    fn color_jitter_is_brightness_contrast_and_saturation_in_turn() {
        let area = Area { left: 0, top: 0, width: 1, height: 1 };
        let jitter = |brightness, contrast, saturation| {
            Transform { area, flip: false, brightness, contrast, saturation }.color_jitter(|| 0.5)
        };
        assert_eq!(jitter(1.0, 1.0, 1.0), ColorJitter::default());
        assert_eq!(jitter(1.5, 1.0, 1.0), ColorJitter { gain: 1.5, ..ColorJitter::default() });
        // At contrast 0 all pixels have the image's mean grey, at saturation 0 each has its own.
        assert_eq!(jitter(1.0, 0.0, 1.0), ColorJitter { gain: 0.0, grey: 0.0, offset: 0.5 });
        assert_eq!(jitter(1.0, 1.0, 0.0), ColorJitter { gain: 0.0, grey: 1.0, offset: 0.0 });
        assert!((image(0).grey() - (0.299 * 19.5 + 0.587 * 19.5 + 0.114 * 200.0) / 255.0).abs() < 1e-4);
    }
}
