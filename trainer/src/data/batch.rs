//! Samples on their way to the device.

use std::sync::Arc;

use input::color::ColorJitter;
use tch::{Device, Kind, Tensor};

use super::device_pixels::DevicePixels;
use super::gather::DeviceCrop;
use crate::torch::{Arrival, Copies, Result, tensor};

/// A batch that is ready for the device.
#[derive(Debug)]
pub(crate) struct Batch {
    /// As in the request.
    pub step: u64,
    /// As in the request.
    pub samples: u64,
    /// As in the request.
    pub shares: Vec<i64>,
    /// Its samples, in the order of the request.
    pub pixels: Pixels,
}

/// Samples as they go to the device.
#[derive(Debug)]
pub(crate) struct Pixels {
    /// [samples, crop, crop, 3], bytes: of all samples but those whose pixels the device has. In the host's memory, until
    /// they are sent ahead.
    pub pixels: Tensor,
    /// Which these are, if there are any.
    pub on_device: Option<OnDevice>,
    /// The color jitter of each sample.
    pub jitters: Vec<ColorJitter>,
    /// [samples], 64-bit integers, where the pixels are.
    pub labels: Tensor,
    /// The samples' keys.
    pub keys: Vec<u64>,
    /// If it was sent ahead.
    pub ahead: Option<Ahead>,
}

/// What there is of a batch that was sent ahead beside its pixels and labels.
#[derive(Debug)]
pub(crate) struct Ahead {
    jitters: Tensor,
    arrival: Arrival,
}

/// Samples whose pixels the device has.
#[derive(Debug)]
pub(crate) struct OnDevice {
    /// Where it has them.
    pub store: Arc<DevicePixels>,
    /// For each sample of the batch where its crop is, or None if the host has it.
    pub crops: Vec<Option<DeviceCrop>>,
}

impl Pixels {
    /// Begins to copy to the device what the host has of it, while the device is still at what it was given before. A
    /// CPU has it.
    pub(crate) fn send_ahead(&mut self, copies: &Copies) -> Result<()> {
        if !copies.run_beside() {
            return Ok(());
        }
        let staged = |numbers: &Tensor| tensor::staged(numbers, copies.device());
        let host = [self.pixels.shallow_clone(), staged(&self.labels)?, staged(&self.numbers_of_jitters()?)?];
        let ([pixels, labels, jitters], arrival) = copies.send(host)?;
        // The host's memory goes back to where it came from: libtorch gives it out again after the copy.
        (self.pixels, self.labels) = (pixels, labels);
        self.ahead = Some(Ahead { jitters, arrival });
        Ok(())
    }

    /// What this thread gives the device from now on finds there what was sent ahead. To be called before any of it is
    /// used, by the thread that computes.
    pub(crate) fn arrive(&self) -> Result<()> {
        self.ahead.as_ref().map_or(Ok(()), |ahead| ahead.arrival.wait())
    }

    fn numbers_of_jitters(&self) -> Result<Tensor> {
        let numbers: Vec<f32> = self.jitters.iter().flat_map(|of| [of.gain, of.grey, of.offset]).collect();
        Ok(Tensor::from_slice(&numbers).f_view([-1, 3])?)
    }

    /// Gain, grey and offset of each sample on the device, [samples, 3]; after [`Self::arrive`].
    pub(crate) fn jitters_on(&self, device: Device) -> Result<Tensor> {
        match &self.ahead {
            Some(ahead) => Ok(ahead.jitters.shallow_clone()),
            None => tensor::sent(&self.numbers_of_jitters()?, device),
        }
    }

    /// The bytes of all samples on the device, [samples, crop, crop, 3]; after [`Self::arrive`].
    pub(crate) fn on(&self, device: Device) -> Result<Tensor> {
        match &self.on_device {
            Some(OnDevice { store, crops }) => store.gather(&self.pixels, crops),
            None => Ok(self.pixels.f_to_device_(device, Kind::Uint8, true, false)?),
        }
    }

    /// `count` samples from the `start`-th on, in the same memory.
    pub(crate) fn part(&self, start: usize, count: usize) -> Self {
        let (on_device, host) = match &self.on_device {
            Some(OnDevice { store, crops }) => {
                let from_host = |crops: &[Option<DeviceCrop>]| crops.iter().filter(|crop| crop.is_none()).count();
                let own = &crops[start..start + count];
                let on_device = OnDevice { store: store.clone(), crops: own.to_vec() };
                (Some(on_device), (from_host(&crops[..start]), from_host(own)))
            }
            None => (None, (start, count)),
        };
        Self {
            pixels: self.pixels.narrow(0, host.0 as i64, host.1 as i64),
            on_device,
            jitters: self.jitters[start..start + count].to_vec(),
            labels: self.labels.narrow(0, start as i64, count as i64),
            keys: self.keys[start..start + count].to_vec(),
            ahead: self.ahead.as_ref().map(|Ahead { jitters, arrival }| Ahead {
                jitters: jitters.narrow(0, start as i64, count as i64),
                arrival: arrival.clone(),
            }),
        }
    }
}
