//! Decoded images in a device's own memory, so that a later epoch neither decodes them nor sends their pixels again:
//! the device is told where each crop lies, and cuts it out (`gather`).
//!
//! An epoch needs each image once, so those that came first are as good as any others: none is ever evicted. Images
//! lie one after the other in slabs, each as large as all before it, so that a batch is gathered from few of them. A
//! device that has no memory for a further slab keeps what it has, and is asked again after a while: what filled it may be
//! gone, such as another process, or what cuDNN tried out.
//!
//! **An image is found only after its pixels were put on the device's stream.** What reads them is put there later, so
//! the device has them by then.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use input::augment::{Augmentation, Crop};
use input::color::ColorJitter;
use input::image::Image;
use tch::{Device, Tensor};
use tracing::warn;

use super::cache::ImageId;
use super::gather::{DeviceCrop, gather};
use crate::torch::{Result, tensor};

/// Bytes of the first slab: whole pixels, so that half of two slabs is one.
const SLAB: u64 = 255 << 20;
/// A GPU keeps so many bytes free for what a step may need later.
const SPARE: i64 = 2 << 30;
/// After a device had no memory for a slab it is asked for none for so long.
const PAUSE: Duration = Duration::from_secs(60);

/// The images that one device keeps.
#[derive(Debug)]
pub(crate) struct DevicePixels {
    device: Device,
    /// Bytes of the first slab, and of the least one that is tried when the device has no memory for a larger one.
    slab: u64,
    allocate: Allocate,
    pause: Duration,
    state: Mutex<State>,
}

/// Memory for so many bytes, if the device has it.
type Allocate = fn(i64, Device) -> Result<Option<Tensor>>;

#[derive(Debug)]
struct State {
    /// Each [pixels, 3], bytes.
    slabs: Vec<Tensor>,
    /// Pixels at the end of the last slab that no image has.
    free: i64,
    /// How many bytes further slabs may have.
    budget: u64,
    /// When the device had no memory for a slab, if it is not to be asked again yet.
    refused: Option<Instant>,
    /// None as long as its pixels are on their way.
    images: HashMap<ImageId, Option<DeviceImage>>,
}

/// An image on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceImage {
    /// The sample's key.
    pub key: u64,
    /// The index of its class in the manifest.
    pub label: u32,
    grey: f32,
    size: (usize, usize),
    slab: usize,
    first: i64,
}

impl DeviceImage {
    /// What a batch needs of it.
    ///
    /// # Errors
    /// If it is smaller than the crop, and not scaled.
    pub(crate) fn crop(&self, augmentation: &Augmentation) -> anyhow::Result<(DeviceCrop, ColorJitter)> {
        let Crop { left, top, width, height, flip, jitter } = augmentation.crop_of(self.key, self.size, self.grey)?;
        let (row, width, height) = (self.size.0 as i64, width as i64, height as i64);
        let first = self.first + top as i64 * row + left as i64;
        let (first, column) = if flip { (first + width - 1, -1) } else { (first, 1) };
        Ok((DeviceCrop { slab: self.slab, first, row, column, height, width }, jitter))
    }
}

impl DevicePixels {
    /// Of a device that may keep so many bytes.
    pub(crate) fn new(device: Device, budget: u64) -> Self {
        Self::with(device, budget, SLAB, |bytes, device| tensor::reserved(bytes, SPARE, device))
    }

    fn with(device: Device, budget: u64, slab: u64, allocate: Allocate) -> Self {
        let state = State { slabs: Vec::new(), free: 0, budget, refused: None, images: HashMap::new() };
        Self { device, slab, allocate, pause: PAUSE, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image, if the device has it.
    pub(crate) fn find(&self, id: ImageId) -> Option<DeviceImage> {
        self.state().images.get(&id).copied().flatten()
    }

    /// Whether there may be room for an image of that many bytes.
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        let state = self.state();
        let budget = if self.may_ask(&state) { state.budget } else { 0 };
        (3 * state.free as u64).max(budget) >= bytes as u64
    }

    fn may_ask(&self, state: &State) -> bool {
        state.refused.is_none_or(|refused| refused.elapsed() >= self.pause)
    }

    /// Puts the image on the device, if there is room. Returns whether it is there or on its way.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn keep(&self, id: ImageId, image: &Image) -> Result<bool> {
        let pixels = (image.width * image.height) as i64;
        let (slab, first, mut place) = {
            let mut state = self.state();
            if state.images.contains_key(&id) {
                return Ok(true);
            }
            if state.free < pixels && self.may_ask(&state) {
                self.grow(&mut state, 3 * pixels as u64)?;
            }
            let Some(last) = state.slabs.last().filter(|_| state.free >= pixels) else { return Ok(false) };
            let first = last.size()[0] - state.free;
            let place = last.narrow(0, first, pixels);
            state.free -= pixels;
            state.images.insert(id, None);
            (state.slabs.len() - 1, first, place)
        };
        let sent = tensor::sent_bytes(&image.pixels, self.device)?;
        place.f_copy_(&sent.f_view([-1, 3])?)?;
        let Image { key, label, width, height, .. } = *image;
        let kept = DeviceImage { key, label, grey: image.grey(), size: (width, height), slab, first };
        self.state().images.insert(id, Some(kept));
        Ok(true)
    }

    /// Adds a slab with room for so many bytes, if budget and device allow one.
    fn grow(&self, state: &mut State, bytes: u64) -> Result<()> {
        let of_all = 3 * state.slabs.iter().map(|slab| slab.size()[0] as u64).sum::<u64>();
        let (mut size, mut refused) = (of_all.max(self.slab).min(state.budget), false);
        while size >= bytes && (!refused || size >= self.slab) {
            let pixels = size as i64 / 3;
            if let Some(slab) = (self.allocate)(3 * pixels, self.device)? {
                state.slabs.push(slab.f_view([pixels, 3])?);
                (state.free, state.budget, state.refused) = (pixels, state.budget - size, None);
                return Ok(());
            }
            refused = true;
            size /= 2;
        }
        if refused && state.refused.replace(Instant::now()).is_none() {
            warn!(bytes = of_all, "the device has no memory for more decoded images; it keeps those that it has");
        }
        if bytes <= self.slab {
            // The others are hardly smaller: nobody need try again soon, and if the budget is spent, nobody at all.
            state.free = 0;
            if !refused {
                state.budget = 0;
            }
        }
        Ok(())
    }

    /// The pixels of a batch, [samples, crop, crop, 3]: those of samples with a crop from the device, those of the others
    /// from `host`, where they lie in their order.
    ///
    /// # Errors
    /// If the device fails.
    pub(crate) fn gather(&self, host: &Tensor, crops: &[Option<DeviceCrop>]) -> Result<Tensor> {
        let slabs: Vec<Tensor> = self.state().slabs.iter().map(Tensor::shallow_clone).collect();
        gather(&slabs, host, crops, self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    use input::augment::Augmenter;
    use proto::Split;
    use proto::run_spec::{Cut, Input};

    use crate::data::plan::SampleId;
    use crate::data::random;

    fn id(n: u64) -> ImageId {
        (Split::Train, SampleId { block: n as u32, sample: 0 })
    }

    fn image(key: u64) -> Image {
        let draw = |i, below| random::below(random::key(&[key]), i, below);
        let (width, height) = (20 + draw(0, 15) as usize, 20 + draw(1, 9) as usize);
        let pixels = (0..3 * width * height).map(|i| draw(2 + i as u64, 256) as u8).collect();
        Image::new(key, key as u32 % 5, (width, height), pixels)
    }

    fn augmentations() -> impl Iterator<Item = Augmentation> {
        let input = |crop, flip, contrast| Input { crop, flip, contrast, saturation: 0.3, ..Input::default() };
        let inputs = [input(16, true, 0.0), input(20, true, 0.4), input(7, false, 0.0)];
        let training =
            inputs.into_iter().zip(0..).map(|(input, epoch)| Augmentation::Training { input, seed: 3, epoch });
        training.chain([16, 20].map(|crop| Augmentation::Evaluation { crop }))
    }

    /// The bytes of a batch of these images as the host writes them, and as they are gathered: those that `on_device`
    /// has from there. And how many these are.
    fn both(images: &[Image], augmentation: &Augmentation, on_device: &DevicePixels) -> (Tensor, Tensor, usize) {
        let crop = augmentation.crop();
        let (mut all, mut host, mut crops) = (Vec::new(), Vec::new(), Vec::new());
        for image in images {
            let mut bytes = vec![0; 3 * crop * crop];
            let jitter =
                Augmenter::new().and_then(|mut to| to.apply(image, augmentation, &mut bytes)).expect("large enough");
            let kept = on_device.find(id(image.key)).map(|kept| {
                assert_eq!((kept.key, kept.label), (image.key, image.label));
                kept.crop(augmentation).expect("large enough")
            });
            assert!(kept.is_none_or(|(_, other)| other == jitter), "{augmentation:?}, {}", image.key);
            all.extend_from_slice(&bytes);
            if kept.is_none() {
                host.extend(bytes);
            }
            crops.push(kept.map(|(crop, _)| crop));
        }
        let tensor = |bytes: &[u8]| Tensor::from_slice(bytes).view([-1, crop as i64, crop as i64, 3]);
        let host = match host.is_empty() {
            true => Tensor::zeros([0, crop as i64, crop as i64, 3], (Kind::Uint8, Device::Cpu)),
            false => tensor(&host),
        };
        let gathered = on_device.gather(&host, &crops).expect("all within the slabs");
        (tensor(&all), gathered, crops.iter().flatten().count())
    }

    #[test]
    fn what_is_gathered_is_what_the_host_writes_byte_by_byte() {
        let images: Vec<Image> = (0..60).map(image).collect();
        for budget in [0, 30 * 3 * 27 * 24, 1 << 20] {
            let pixels = DevicePixels::new(Device::Cpu, budget);
            for image in images.iter().rev().step_by(2).chain(images.iter().step_by(2)) {
                pixels.keep(id(image.key), image).expect("memory");
            }
            for augmentation in augmentations() {
                let (host, gathered, found) = both(&images, &augmentation, &pixels);
                assert_eq!(host, gathered, "{augmentation:?}");
                let expected = [0..=0, 20..=40, 60..=60][(budget > 0) as usize + (budget == 1 << 20) as usize].clone();
                assert!(expected.contains(&found), "{found} of {budget} bytes");
            }
        }
    }

    thread_local! {
        /// What the device has left in the test below.
        static LEFT: std::cell::Cell<i64> = const { std::cell::Cell::new(0) };
    }

    #[test]
    fn a_device_that_has_no_memory_left_keeps_what_it_has_in_slabs_of_different_sizes() {
        let images: Vec<Image> = (0..60).map(image).collect();
        LEFT.set(35_000);
        let pixels = DevicePixels::with(Device::Cpu, 1 << 30, 9_999, |bytes, device| {
            if bytes > LEFT.get() {
                return Ok(None);
            }
            LEFT.set(LEFT.get() - bytes);
            tensor::reserved(bytes, 0, device)
        });
        let kept = images.iter().filter(|image| pixels.keep(id(image.key), image).expect("no failure")).count();
        let sizes: Vec<i64> = pixels.state().slabs.iter().map(|slab| slab.size()[0]).collect();
        assert_eq!(
            sizes,
            [3333, 3333, 3333],
            "twice as many bytes were too many for the third, and half as many too few for a fourth"
        );
        assert!((10..20).contains(&kept) && !pixels.has_room(1), "{kept} images");
        for augmentation in augmentations() {
            let (host, gathered, found) = both(&images, &augmentation, &pixels);
            assert_eq!((host, found), (gathered, kept), "{augmentation:?}");
            // Without any from the host, and from one slab alone.
            for count in [kept, 3] {
                let (host, gathered, found) = both(&images[..count], &augmentation, &pixels);
                assert_eq!((host, found), (gathered, count), "{augmentation:?}");
            }
        }
    }

    #[test]
    fn a_device_that_had_no_memory_is_asked_again_after_a_while_and_not_before() {
        let images: Vec<Image> = (0..60).map(image).collect();
        LEFT.set(0);
        let mut pixels = DevicePixels::with(Device::Cpu, 1 << 30, 9_999, |bytes, device| {
            if bytes > LEFT.get() { Ok(None) } else { tensor::reserved(bytes, 0, device) }
        });
        let keep = |pixels: &DevicePixels, i: usize| pixels.keep(id(images[i].key), &images[i]).expect("no failure");
        assert!(!keep(&pixels, 0));
        LEFT.set(1 << 20);
        assert!(!pixels.has_room(1) && !keep(&pixels, 1), "it was asked a moment ago");
        pixels.pause = Duration::ZERO;
        assert!(pixels.has_room(1) && keep(&pixels, 2));
        assert_eq!(
            (both(&images[2..3], &Augmentation::Evaluation { crop: 16 }, &pixels).2, pixels.state().refused),
            (1, None)
        );
    }

    #[test]
    fn crops_that_the_device_scales_are_those_that_the_host_scales_byte_by_byte() {
        let images: Vec<Image> = (0..100).map(image).collect();
        let pixels = DevicePixels::new(Device::Cpu, 1 << 20);
        for image in images.iter().skip(10) {
            assert!(pixels.keep(id(image.key), image).expect("memory"));
        }
        // To less than a third, and to the double.
        for (crop, min_area) in [(16, 0.08), (9, 0.5), (3, 0.5), (40, 0.1), (24, 1.0)] {
            let input = Input { crop, min_area, cut: Cut::Resized, contrast: 0.3, ..Input::default() };
            let augmentation = Augmentation::Training { input, seed: 1, epoch: 4 };
            let (host, gathered, found) = both(&images, &augmentation, &pixels);
            assert_eq!(found, 90, "more than are scaled at once");
            assert_eq!(host, gathered, "to {crop} x {crop} pixels");
        }
    }

    #[test]
    fn an_image_is_kept_once_and_nothing_is_cut_of_what_is_too_small() {
        let pixels = DevicePixels::new(Device::Cpu, 1 << 20);
        let (one, other) = (image(1), image(2));
        assert!(pixels.has_room(one.pixels.len()) && pixels.find(id(1)).is_none());
        assert!(pixels.keep(id(1), &one).expect("memory"));
        assert!(pixels.keep(id(1), &other).expect("memory"), "it is there");
        let kept = pixels.find(id(1)).expect("it was kept");
        assert_eq!((kept.key, kept.size), (1, (one.width, one.height)));
        let small = kept.crop(&Augmentation::Evaluation { crop: 300 }).expect_err("it is smaller");
        assert!(format!("{small:#}").contains("sample 1"), "{small:#}");
    }
}
