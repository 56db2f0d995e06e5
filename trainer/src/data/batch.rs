//! Samples on their way to the device.

use std::sync::Arc;

use input::color::ColorJitter;
use tch::{Device, Kind, Tensor};

use super::device_pixels::DevicePixels;
use super::gather::DeviceCrop;
use crate::torch::Result;

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
    /// [samples, crop, crop, 3], bytes, in the host's memory: of all samples but those whose pixels the device has.
    pub pixels: Tensor,
    /// Which these are, if there are any.
    pub on_device: Option<OnDevice>,
    /// The color jitter of each sample.
    pub jitters: Vec<ColorJitter>,
    /// [samples], 64-bit integers.
    pub labels: Tensor,
    /// The samples' keys.
    pub keys: Vec<u64>,
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
    /// The bytes of all samples on the device, [samples, crop, crop, 3].
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
        }
    }
}
