//! Which units are dropped: a function of the sample's key, the layer and the unit, the same on every device and any
//! number of ranks.

use std::mem::MaybeUninit;

use tch::{Device, Kind, Tensor};

use crate::data::random;
use crate::torch::{Result, tensor};

/// One random key for each sample, or what dropout makes of it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Keys<'a> {
    /// The samples' own.
    Host(&'a [u64]),
    /// That of each layer and sample, [layers, samples], on the device: see [`of_layers`].
    Device(&'a Tensor),
}

/// Drops units of `x` [samples, units] with this probability and scales up the rest, by 16 random bits per unit.
pub(super) fn drop_units(x: &Tensor, probability: f64, layer: u64, keys: Keys<'_>) -> Tensor {
    let threshold = (probability * 65536.0).round() as u64;
    if threshold == 0 {
        return x.shallow_clone();
    }
    let scale = (65536.0 / (65536 - threshold) as f64) as f32;
    let units = x.size()[1];
    let mask = match (keys, x.device()) {
        (Keys::Device(keys), _) => mask_on(&keys.get(layer as i64), units, threshold as i64, scale),
        (Keys::Host(keys), Device::Cpu) => mask_on_host(&of_layer(layer, keys), units as usize, threshold, scale),
        (Keys::Host(keys), device) => {
            let keys = sent(&of_layer(layer, keys), device).expect("a device takes numbers");
            mask_on(&keys, units, threshold as i64, scale)
        }
    };
    x * mask.to_kind(x.kind())
}

/// The keys of so many layers for samples with these keys, [layers, samples], on a device.
pub(super) fn of_layers(layers: u64, keys: &[u64], device: Device) -> Result<Tensor> {
    let all: Vec<u64> = (0..layers).flat_map(|layer| of_layer(layer, keys)).collect();
    Ok(sent(&all, device)?.f_view([layers as i64, -1])?)
}

fn of_layer(layer: u64, keys: &[u64]) -> Vec<u64> {
    keys.iter().map(|&key| random::key(&[key, layer])).collect()
}

fn sent(keys: &[u64], device: Device) -> Result<Tensor> {
    let keys: Vec<i64> = keys.iter().map(|&key| key as i64).collect();
    tensor::sent(&Tensor::from_slice(&keys), device)
}

fn mask_on_host(keys: &[u64], units: usize, threshold: u64, scale: f32) -> Tensor {
    tensor::filled(&[keys.len() as i64, units as i64], |mask: &mut [MaybeUninit<f32>]| {
        for (key, row) in keys.iter().zip(mask.chunks_mut(units)) {
            random::write_mask(*key, threshold, scale, row);
        }
    })
}

/// The same in a device's integers, of the keys alone: nobody waits there for 16 bits of each unit to be made on the
/// host and sent.
fn mask_on(keys: &Tensor, units: i64, threshold: i64, scale: f32) -> Tensor {
    let device = keys.device();
    let index = Tensor::arange((units + 3) / 4, (Kind::Int64, device)).unsqueeze(0);
    let bits = random::bits_on(&keys.unsqueeze(1), &index).unsqueeze(2);
    let parts = Tensor::arange(4, (Kind::Int64, device)) * 16;
    let values = bits.bitwise_right_shift(&parts).bitwise_and(0xffff).flatten(1, 2).narrow(1, 0, units);
    values.ge(threshold).to_kind(Kind::Float) * f64::from(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_depends_on_the_sample_and_not_on_its_place() {
        let ones = Tensor::ones([3, 1001], (Kind::Double, Device::Cpu));
        let masks = drop_units(&ones, 0.5, 0, Keys::Host(&[7, 8, 7]));
        assert_eq!(masks.get(0), masks.get(2));
        assert_ne!(masks.get(0), masks.get(1));
        assert_ne!(masks, drop_units(&ones, 0.5, 1, Keys::Host(&[7, 8, 7])));
        let sent = of_layers(2, &[7, 8, 7], Device::Cpu).expect("there is memory");
        for layer in [0, 1] {
            let host = drop_units(&ones, 0.5, layer, Keys::Host(&[7, 8, 7]));
            assert_eq!(drop_units(&ones, 0.5, layer, Keys::Device(&sent)), host);
        }
        let kept = masks.count_nonzero(None).int64_value(&[]) as f64 / 3003.0;
        assert!((kept - 0.5).abs() < 0.05, "{kept} kept");
        assert_eq!(masks.max().double_value(&[]), 2.0);
    }

    #[test]
    fn a_device_drops_the_same_units_as_the_host() {
        // Integers of a device have a sign.
        let keys = [0, 7, 1 << 63, u64::MAX, 0x9e37_79b9_7f4a_7c15];
        for (units, threshold) in [(1, 1), (4, 0x8000), (1001, 0x4ccd), (9216, 0xe666)] {
            let host = mask_on_host(&keys, units, threshold, 1.5);
            let keys = sent(&keys, Device::Cpu).expect("there is memory");
            assert_eq!(mask_on(&keys, units as i64, threshold as i64, 1.5), host, "{units} {threshold}");
        }
    }
}
