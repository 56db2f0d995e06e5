//! From stored images to network input: decode, crop, mirror, change the light, normalise.
//!
//! What is done to a sample depends on seed, epoch and the sample's key alone. Pixels travel as bytes; they become numbers on the device.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use proto::Sample;
use proto::run_spec::Input;
use tch::{Device, Kind, Tensor};

use crate::random;

/// A decoded image.
#[derive(Debug)]
pub(crate) struct Image {
    /// As in the store.
    pub key: u64,
    /// The place of its class in the manifest.
    pub label: u32,
    /// Rows of pixels of red, green, blue; width and height are the stored size.
    pub pixels: Vec<u8>,
}

/// Decodes JPEGs, on one thread.
pub(crate) struct Decoder {
    jpeg: turbojpeg::Decompressor,
    size: usize,
}

impl Decoder {
    /// For images of `size` x `size` pixels.
    pub(crate) fn new(size: u32) -> Result<Self> {
        Ok(Self { jpeg: turbojpeg::Decompressor::new()?, size: size as usize })
    }

    /// Decodes one sample, which must be of the size that this decoder is for.
    pub(crate) fn decode(&mut self, sample: &Sample) -> Result<Image> {
        let Sample { key, label, ref jpeg } = *sample;
        let context = || format!("sample {key}");
        let size = self.size;
        let header = self.jpeg.read_header(jpeg).with_context(context)?;
        let (width, height) = (header.width, header.height);
        ensure!(
            (width, height) == (size, size),
            "sample {key} has {width} x {height} pixels instead of {size} x {size}"
        );
        let mut pixels = vec![0; 3 * size * size];
        let format = turbojpeg::PixelFormat::RGB;
        let image = turbojpeg::Image { pixels: &mut pixels[..], width, pitch: 3 * width, height, format };
        self.jpeg.decompress(jpeg, image).with_context(context)?;
        Ok(Image { key, label, pixels })
    }
}

/// How samples become input.
#[derive(Debug, Clone)]
pub(crate) enum Views {
    /// A random place, perhaps mirrored, in random light: for each epoch (from 0) and sample another one.
    Training { input: Input, seed: u64, epoch: u64 },
    /// The centre.
    Evaluation { crop: u32 },
}

/// What of one image is looked at.
#[derive(Debug, Clone, Copy, PartialEq)]
struct View {
    left: usize,
    top: usize,
    flip: bool,
    brightness: f32,
}

impl Views {
    fn crop(&self) -> usize {
        match self {
            Views::Training { input, .. } => input.crop as usize,
            Views::Evaluation { crop } => *crop as usize,
        }
    }

    fn of(&self, key: u64, size: u32) -> View {
        match *self {
            Views::Evaluation { crop } => {
                let margin = (size - crop) as usize / 2;
                View { left: margin, top: margin, flip: false, brightness: 1.0 }
            }
            Views::Training { ref input, seed, epoch } => {
                let draws = random::key(&[seed, epoch, key]);
                let places = u64::from(size - input.crop) + 1;
                View {
                    left: random::below(draws, 0, places) as usize,
                    top: random::below(draws, 1, places) as usize,
                    flip: input.flip && random::below(draws, 2, 2) == 1,
                    brightness: 1.0 + input.brightness as f32 * (2.0 * random::uniform(draws, 3) - 1.0),
                }
            }
        }
    }
}

/// Samples as they go to the device.
#[derive(Debug)]
pub(crate) struct Pixels {
    /// [samples, crop, crop, 3], bytes.
    pub pixels: Tensor,
    /// [samples], 32-bit floats: what pixel values are multiplied by.
    pub brightness: Tensor,
    /// [samples], 64-bit integers.
    pub labels: Tensor,
    /// The samples' keys.
    pub keys: Vec<u64>,
}

impl Pixels {
    /// Cuts the views out of images of `size` x `size` pixels.
    pub(crate) fn cut(images: &[Arc<Image>], size: u32, views: &Views) -> Self {
        let crop = views.crop();
        let pitch = 3 * size as usize;
        let mut pixels = Vec::with_capacity(images.len() * 3 * crop * crop);
        let mut brightness = Vec::with_capacity(images.len());
        for image in images {
            let view = views.of(image.key, size);
            for row in image.pixels.chunks_exact(pitch).skip(view.top).take(crop) {
                let row = &row[3 * view.left..3 * (view.left + crop)];
                match view.flip {
                    false => pixels.extend_from_slice(row),
                    true => pixels.extend(row.as_chunks::<3>().0.iter().rev().flatten()),
                }
            }
            brightness.push(view.brightness);
        }
        let labels: Vec<i64> = images.iter().map(|image| i64::from(image.label)).collect();
        let (n, side) = (images.len() as i64, crop as i64);
        Self {
            pixels: Tensor::from_slice(&pixels).reshape([n, side, side, 3]),
            brightness: Tensor::from_slice(&brightness),
            labels: Tensor::from_slice(&labels),
            keys: images.iter().map(|image| image.key).collect(),
        }
    }

    /// One after the other.
    pub(crate) fn join(mut parts: Vec<Self>) -> Option<Self> {
        if parts.len() < 2 {
            return parts.pop();
        }
        let all = |of: fn(&Self) -> &Tensor| Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0);
        Some(Self {
            pixels: all(|part| &part.pixels),
            brightness: all(|part| &part.brightness),
            labels: all(|part| &part.labels),
            keys: parts.iter().flat_map(|part| part.keys.iter().copied()).collect(),
        })
    }
}

/// The last part of the way, on the device: bytes to normalised numbers.
#[derive(Debug)]
pub(crate) struct Normalise {
    mean: Tensor,
    std: Tensor,
    device: Device,
    kind: Kind,
}

impl Normalise {
    /// With mean and standard deviation of each channel, on the scale of 0 to 1.
    pub(crate) fn new(mean: [f64; 3], std: [f64; 3], device: Device, kind: Kind) -> Self {
        let channels = |of: [f64; 3]| Tensor::from_slice(&of).reshape([3, 1, 1]).to_kind(kind).to_device(device);
        Self { mean: channels(mean), std: channels(std), device, kind }
    }

    /// The input of the network, [samples, 3, crop, crop], and the labels.
    pub(crate) fn apply(&self, batch: &Pixels) -> Result<(Tensor, Tensor), tch::TchError> {
        let brightness = batch.brightness.f_to_device(self.device)?.f_to_kind(self.kind)?.f_reshape([-1, 1, 1, 1])?;
        let input =
            batch.pixels.f_to_device(self.device)?.f_permute([0, 3, 1, 2])?.f_contiguous()?.f_to_kind(self.kind)?;
        let light = (input * (brightness / 255.0)).f_clamp_(0.0, 1.0)?;
        Ok(((light - &self.mean).f_div_(&self.std)?, batch.labels.f_to_device(self.device)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u32 = 10;

    /// Each pixel's red is its column, its green its row.
    fn image(key: u64) -> Arc<Image> {
        let pixel = |i: u32| [(i % SIZE) as u8, (i / SIZE) as u8, 200];
        Arc::new(Image { key, label: 3, pixels: (0..SIZE * SIZE).flat_map(pixel).collect() })
    }

    fn training(epoch: u64) -> Views {
        Views::Training { input: Input { crop: 8, flip: true, brightness: 0.2 }, seed: 1, epoch }
    }

    #[test]
    fn a_view_is_the_same_wherever_it_is_cut_and_another_in_each_epoch() {
        let images: Vec<_> = (0..40).map(image).collect();
        let together = Pixels::cut(&images, SIZE, &training(0));
        let alone = Pixels::cut(&images[7..8], SIZE, &training(0));
        assert_eq!(together.pixels.narrow(0, 7, 1), alone.pixels);
        assert_ne!(together.pixels, Pixels::cut(&images, SIZE, &training(1)).pixels);
        let corners: std::collections::BTreeSet<(i64, i64)> = (0..40)
            .map(|i| (together.pixels.int64_value(&[i, 0, 0, 0]), together.pixels.int64_value(&[i, 0, 0, 1])))
            .collect();
        assert!(corners.len() > 8, "places and mirrors: {corners:?}");
    }

    #[test]
    fn a_mirrored_view_has_its_columns_in_reverse() {
        let images: Vec<_> = (0..40).map(image).collect();
        let cut = Pixels::cut(&images, SIZE, &training(0));
        let mirrored = (0..40)
            .filter(|&i| {
                let columns: Vec<i64> = (0..8).map(|x| cut.pixels.int64_value(&[i, 0, x, 0])).collect();
                let step = columns[1] - columns[0];
                assert!(columns.windows(2).all(|pair| pair[1] - pair[0] == step), "{columns:?}");
                step == -1
            })
            .count();
        assert!((8..32).contains(&mirrored), "{mirrored} of 40");
    }

    #[test]
    fn evaluation_sees_the_centre_normalised_by_channel() {
        let cut = Pixels::cut(&[image(0)], SIZE, &Views::Evaluation { crop: 4 });
        let normalise = Normalise::new([0.0, 0.5, 1.0], [1.0, 0.5, 2.0], Device::Cpu, Kind::Double);
        let (input, labels) = normalise.apply(&cut).expect("shapes agree");
        assert_eq!((input.size(), labels.int64_value(&[0])), (vec![1, 3, 4, 4], 3));
        let at = |channel, y, x| input.double_value(&[0, channel, y, x]);
        for (found, wanted) in [
            (at(0, 0, 1), 4.0 / 255.0),
            (at(1, 2, 0), (5.0 / 255.0 - 0.5) / 0.5),
            (at(2, 0, 0), (200.0 / 255.0 - 1.0) / 2.0),
        ] {
            assert!((found - wanted).abs() < 1e-7, "{found} instead of {wanted}");
        }
    }
}
