//! The last part of the way, on the device: bytes to normalised numbers, in the light that was drawn for each sample.

use tch::{Device, Kind, Tensor};

use super::batch::{GREY, Light, Pixels};
use crate::torch::tensor::{self, Element};

/// Turns [`Pixels`] into the network's input.
#[derive(Debug)]
pub(crate) struct Normalise {
    mean: [f64; 3],
    std: [f64; 3],
    device: Device,
    kind: Kind,
}

impl Normalise {
    /// With mean and standard deviation of each channel, on the scale of 0 to 1.
    pub(crate) fn new(mean: [f64; 3], std: [f64; 3], device: Device, kind: Kind) -> Self {
        Self { mean, std, device, kind }
    }

    /// Where the input is.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// The input of the network, [samples, 3, crop, crop], and the labels.
    ///
    /// Bytes travel to a device, a quarter of what numbers would be, and while it still computes.
    pub(crate) fn apply(&self, batch: &Pixels) -> Result<(Tensor, Tensor), tch::TchError> {
        let input = match (self.device, self.kind) {
            (Device::Cpu, Kind::Float) => self.on_cpu::<f32>(batch),
            (Device::Cpu, Kind::Double) => self.on_cpu::<f64>(batch),
            _ => self.on_device(batch)?,
        };
        Ok((input, batch.labels.f_to_device_(self.device, Kind::Int64, true, false)?))
    }

    fn on_device(&self, batch: &Pixels) -> Result<Tensor, tch::TchError> {
        let channels =
            |of: [f64; 3]| Tensor::from_slice(&of).f_to_kind(self.kind)?.f_to_device(self.device)?.f_view([3, 1, 1]);
        let lights: Vec<f32> = batch.lights.iter().flat_map(|light| [light.gain, light.grey, light.offset]).collect();
        let lights =
            Tensor::from_slice(&lights).f_to_kind(self.kind)?.f_to_device(self.device)?.f_view([-1, 3, 1, 1, 1])?;
        let pixels = batch.pixels.f_to_device_(self.device, Kind::Uint8, true, false)?.f_permute([0, 3, 1, 2])?;
        let input = pixels.f_contiguous()?.f_to_kind(self.kind)?.f_div_scalar(255.0)?;
        let mut lit = input.f_mul(&lights.f_select(1, 0)?)?.f_add(&lights.f_select(1, 2)?)?;
        if batch.lights.iter().any(|light| light.grey != 0.0) {
            let weights = channels(GREY.map(f64::from))?;
            let grey = (&input * weights).f_sum_dim_intlist([1_i64].as_slice(), true, self.kind)?;
            lit = lit.f_add(&grey.f_mul(&lights.f_select(1, 1)?)?)?;
        }
        lit.f_clamp_(0.0, 1.0)?.f_sub_(&channels(self.mean)?)?.f_div_(&channels(self.std)?)
    }

    /// The same in one pass over the pixels.
    fn on_cpu<T: Element>(&self, batch: &Pixels) -> Tensor {
        let size = batch.pixels.size();
        let (samples, area) = (size[0] as usize, (size[1] * size[2]) as usize);
        let threads = (tch::get_num_threads().max(1) as usize).min(samples.max(1));
        tensor::filled(&[size[0], 3, size[1], size[2]], |input: &mut [T]| {
            tensor::bytes(&batch.pixels, |pixels| {
                let share = samples.div_ceil(threads).max(1);
                let of_lights = batch.lights.chunks(share);
                let parts = of_lights.zip(pixels.chunks(3 * area * share)).zip(input.chunks_mut(3 * area * share));
                std::thread::scope(|scope| {
                    let mut parts =
                        parts.map(|((lights, pixels), input)| move || self.part(lights, pixels, input, area));
                    let first = parts.next();
                    for part in parts {
                        scope.spawn(part);
                    }
                    if let Some(mut first) = first {
                        first();
                    }
                });
            });
        })
    }

    fn part<T: Element>(&self, lights: &[Light], pixels: &[u8], input: &mut [T], area: usize) {
        // The same light as the sample before has the same tables.
        let mut tables: Option<(Light, Box<[[T; 256]; 3]>)> = None;
        for ((light, pixels), input) in lights.iter().zip(pixels.chunks(3 * area)).zip(input.chunks_mut(3 * area)) {
            let (red, rest) = input.split_at_mut(area);
            let (green, blue) = rest.split_at_mut(area);
            let pixels = pixels.as_chunks::<3>().0.iter().zip(red).zip(green).zip(blue);
            if light.grey != 0.0 {
                let normal = |channel: usize, value: f32| {
                    T::of((f64::from(value.clamp(0.0, 1.0)) - self.mean[channel]) / self.std[channel])
                };
                for (((pixel, red), green), blue) in pixels {
                    let [r, g, b] = pixel.map(|byte| f32::from(byte) / 255.0);
                    let shared = light.grey * (GREY[0] * r + GREY[1] * g + GREY[2] * b) + light.offset;
                    *red = normal(0, light.gain * r + shared);
                    *green = normal(1, light.gain * g + shared);
                    *blue = normal(2, light.gain * b + shared);
                }
                continue;
            }
            let of_light = match tables.take() {
                Some((of, tables)) if of == *light => tables,
                _ => Box::new(self.tables(*light)),
            };
            let [r, g, b] = &*of_light;
            for (((pixel, red), green), blue) in pixels {
                *red = r[usize::from(pixel[0])];
                *green = g[usize::from(pixel[1])];
                *blue = b[usize::from(pixel[2])];
            }
            tables = Some((*light, of_light));
        }
    }

    /// What each value of a byte becomes in each channel.
    fn tables<T: Element>(&self, light: Light) -> [[T; 256]; 3] {
        std::array::from_fn(|channel| {
            std::array::from_fn(|byte| {
                let lit = (f64::from(light.gain) * byte as f64 / 255.0 + f64::from(light.offset)).clamp(0.0, 1.0);
                T::of((lit - self.mean[channel]) / self.std[channel])
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(lights: Vec<Light>) -> Pixels {
        let samples = lights.len() as i64;
        let values: Vec<u8> = (0..samples * 4 * 4 * 3).map(|i| (i * 37 % 256) as u8).collect();
        Pixels {
            pixels: Tensor::from_slice(&values).view([samples, 4, 4, 3]),
            lights,
            labels: Tensor::zeros([samples], (Kind::Int64, Device::Cpu)),
            keys: vec![0; samples as usize],
        }
    }

    #[test]
    fn cpu_and_device_compute_the_same() {
        let light = |gain, grey, offset| Light { gain, grey, offset };
        let lights =
            [light(1.2, 0.0, -0.1), light(0.5, 0.3, 0.2), Light::default(), Light::default(), light(0.7, -0.2, 0.0)];
        for kind in [Kind::Float, Kind::Double] {
            let normalise = Normalise::new([0.4, 0.5, 0.6], [0.2, 0.25, 0.3], Device::Cpu, kind);
            let batch = batch(lights.to_vec());
            let (one, _) = normalise.apply(&batch).expect("shapes agree");
            let other = normalise.on_device(&batch).expect("shapes agree");
            assert_eq!((one.size(), one.kind()), (other.size(), kind));
            let difference = (one - other).abs().max().double_value(&[]);
            assert!(difference < 1e-5, "{kind:?}: {difference}");
        }
    }

    #[test]
    fn a_pixel_is_lit_held_within_its_range_and_normalised() {
        let normalise = Normalise::new([0.0, 0.5, 1.0], [1.0, 0.5, 2.0], Device::Cpu, Kind::Double);
        let batch = batch(vec![Light::default(), Light { gain: 2.0, grey: 0.0, offset: 0.0 }]);
        let (input, _) = normalise.apply(&batch).expect("shapes agree");
        // The second pixel's bytes are 111, 148, 185; the first of the other sample begins at 48 * 37 % 256 = 240.
        for (place, wanted) in [
            ([0, 0, 0, 1], 111.0 / 255.0),
            ([0, 1, 0, 1], (148.0 / 255.0 - 0.5) / 0.5),
            ([0, 2, 0, 1], (185.0 / 255.0 - 1.0) / 2.0),
            ([1, 0, 0, 0], 1.0),
        ] {
            let found = input.double_value(&place);
            assert!((found - wanted).abs() < 1e-12, "{place:?}: {found} instead of {wanted}");
        }
    }
}
