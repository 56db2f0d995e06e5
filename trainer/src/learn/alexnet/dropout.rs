//! Which units are dropped: a function of the sample's key, the layer and the unit, the same on every device and any
//! number of ranks.

use std::mem::MaybeUninit;

use tch::{Device, Kind, Tensor};

use crate::data::random;
use crate::torch::tensor;

/// Drops units of `x` [samples, units] with this probability and scales up the rest, by 16 random bits per unit.
pub(super) fn drop_units(x: &Tensor, probability: f64, layer: u64, keys: &[u64]) -> Tensor {
    let threshold = (probability * 65536.0).round() as u64;
    if threshold == 0 {
        return x.shallow_clone();
    }
    let keys: Vec<u64> = keys.iter().map(|&key| random::key(&[key, layer])).collect();
    let scale = (65536.0 / (65536 - threshold) as f64) as f32;
    let units = x.size()[1];
    let mask = match x.device() {
        Device::Cpu => mask_on_host(&keys, units as usize, threshold, scale),
        device => mask_on(device, &keys, units, threshold as i64, scale),
    };
    x * mask.to_kind(x.kind())
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
fn mask_on(device: Device, keys: &[u64], units: i64, threshold: i64, scale: f32) -> Tensor {
    let keys: Vec<i64> = keys.iter().map(|&key| key as i64).collect();
    let keys = tensor::sent(&Tensor::from_slice(&keys), device).expect("a device takes numbers").unsqueeze(1);
    let index = Tensor::arange((units + 3) / 4, (Kind::Int64, device)).unsqueeze(0);
    let bits = random::bits_on(&keys, &index).unsqueeze(2);
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
        let masks = drop_units(&ones, 0.5, 0, &[7, 8, 7]);
        assert_eq!(masks.get(0), masks.get(2));
        assert_ne!(masks.get(0), masks.get(1));
        assert_ne!(masks, drop_units(&ones, 0.5, 1, &[7, 8, 7]));
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
            assert_eq!(mask_on(Device::Cpu, &keys, units as i64, threshold as i64, 1.5), host, "{units} {threshold}");
        }
    }
}
