//! From bytes to the network's normalised input, with each sample's color jitter, on the device.

use std::mem::MaybeUninit;

use input::color::{ColorJitter, GREY};
use input::normalise::Scale;
use tch::{Device, Kind, Tensor};

use super::batch::Pixels;
use crate::torch::Result;
use crate::torch::tensor::{self, Element};

/// [`Scale::write_f32`], or the same for another kind.
type WritePart<T> = fn(&Scale, &[ColorJitter], &[u8], usize, &mut [MaybeUninit<T>]);

/// Turns [`Pixels`] into the network's input.
#[derive(Debug)]
pub(crate) struct Normalise {
    scale: Scale,
    /// On the device, each [3, 1, 1].
    constants: Constants,
    device: Device,
    kind: Kind,
    /// Whether the input has the channels of a pixel beside each other, as the bytes have.
    nhwc: bool,
}

/// What is the same for every batch: a number for each channel.
#[derive(Debug)]
struct Constants {
    mean: Tensor,
    std: Tensor,
    grey: Tensor,
}

impl Normalise {
    /// With mean and standard deviation of each channel, on the scale of 0 to 1.
    pub(crate) fn new(mean: [f64; 3], std: [f64; 3], device: Device, kind: Kind) -> Result<Self> {
        let channels =
            |of: [f64; 3]| tensor::sent(&Tensor::from_slice(&of).f_to_kind(kind)?.f_view([3, 1, 1])?, device);
        let constants = Constants { mean: channels(mean)?, std: channels(std)?, grey: channels(GREY.map(f64::from))? };
        Ok(Self { scale: Scale { mean, std }, constants, device, kind, nhwc: false })
    }

    /// The same with an input in NHWC, or not.
    pub(crate) fn in_nhwc(self, nhwc: bool) -> Self {
        Self { nhwc, ..self }
    }

    /// The device of the input.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// The input of the network, [samples, 3, crop, crop], and the labels.
    ///
    /// To the device go bytes, a quarter of the size of f32: ahead, or now.
    pub(crate) fn apply(&self, batch: &Pixels) -> Result<(Tensor, Tensor)> {
        batch.arrive()?;
        let pixels = batch.on(self.device)?;
        let input = match (self.device, self.kind) {
            (Device::Cpu, Kind::Float) => self.on_cpu(&pixels, &batch.jitters, Scale::write_f32),
            (Device::Cpu, Kind::Double) => self.on_cpu(&pixels, &batch.jitters, Scale::write_f64),
            _ => self.on_device(&pixels, batch)?,
        };
        // A device's is so already.
        let input = if self.nhwc { tensor::nhwc(&input)? } else { input };
        Ok((input, tensor::sent(&batch.labels, self.device)?))
    }

    fn on_device(&self, pixels: &Tensor, batch: &Pixels) -> Result<Tensor> {
        let Constants { mean, std, grey } = &self.constants;
        let has_grey = batch.jitters.iter().any(|jitter| jitter.grey != 0.0);
        let jitters = batch.jitters_on(self.device)?.f_to_kind(self.kind)?.f_view([-1, 3, 1, 1, 1])?;
        let input = pixels.f_permute([0, 3, 1, 2])?;
        let input = if self.nhwc { input } else { input.f_contiguous()? };
        let input = input.f_to_kind(self.kind)?.f_div_scalar(255.0)?;
        let mut lit = input.f_mul(&jitters.f_select(1, 0)?)?.f_add(&jitters.f_select(1, 2)?)?;
        if has_grey {
            let grey = input.f_mul(grey)?.f_sum_dim_intlist([1_i64].as_slice(), true, self.kind)?;
            lit = lit.f_add(&grey.f_mul(&jitters.f_select(1, 1)?)?)?;
        }
        Ok(lit.f_clamp_(0.0, 1.0)?.f_sub_(mean)?.f_div_(std)?)
    }

    /// The same in one pass over the pixels.
    fn on_cpu<T: Element>(&self, pixels: &Tensor, jitters: &[ColorJitter], write: WritePart<T>) -> Tensor {
        let (scale, size) = (&self.scale, pixels.size());
        let (samples, area) = (size[0] as usize, (size[1] * size[2]) as usize);
        let threads = (tch::get_num_threads().max(1) as usize).min(samples.max(1));
        tensor::filled(&[size[0], 3, size[1], size[2]], |input: &mut [MaybeUninit<T>]| {
            tensor::bytes(pixels, |pixels| {
                let share = samples.div_ceil(threads).max(1);
                let of_jitters = jitters.chunks(share);
                let parts = of_jitters.zip(pixels.chunks(3 * area * share)).zip(input.chunks_mut(3 * area * share));
                std::thread::scope(|scope| {
                    let mut parts =
                        parts.map(|((jitters, pixels), input)| move || write(scale, jitters, pixels, area, input));
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(jitters: Vec<ColorJitter>) -> Pixels {
        let samples = jitters.len() as i64;
        let values: Vec<u8> = (0..samples * 4 * 4 * 3).map(|i| (i * 37 % 256) as u8).collect();
        Pixels {
            on_device: None,
            pixels: Tensor::from_slice(&values).view([samples, 4, 4, 3]),
            jitters,
            labels: Tensor::zeros([samples], (Kind::Int64, Device::Cpu)),
            keys: vec![0; samples as usize],
            ahead: None,
        }
    }

    #[test]
    fn cpu_and_device_compute_the_same() {
        let jitter = |gain, grey, offset| ColorJitter { gain, grey, offset };
        let jitters = [
            jitter(1.2, 0.0, -0.1),
            jitter(0.5, 0.3, 0.2),
            ColorJitter::default(),
            ColorJitter::default(),
            jitter(0.7, -0.2, 0.0),
        ];
        for kind in [Kind::Float, Kind::Double] {
            for (nhwc, strides) in [(false, [48, 16, 4, 1]), (true, [48, 1, 12, 3])] {
                let normalise =
                    Normalise::new([0.4, 0.5, 0.6], [0.2, 0.25, 0.3], Device::Cpu, kind).expect("memory").in_nhwc(nhwc);
                let batch = batch(jitters.to_vec());
                let (one, _) = normalise.apply(&batch).expect("shapes agree");
                let other = normalise.on_device(&batch.pixels, &batch).expect("shapes agree");
                assert_eq!((one.size(), one.kind()), (other.size(), kind));
                assert_eq!([one.stride(), other.stride()], [strides; 2], "{kind:?}");
                let difference = (one - &other).abs().max().double_value(&[]);
                assert!(difference < 1e-5, "{kind:?}: {difference}");
                let again = normalise.on_device(&batch.pixels, &batch).expect("shapes agree");
                assert_eq!(again, other, "a batch leaves what stays on the device as it is");
            }
        }
    }

    #[test]
    fn a_pixel_is_jittered_clamped_and_normalised() {
        let normalise = Normalise::new([0.0, 0.5, 1.0], [1.0, 0.5, 2.0], Device::Cpu, Kind::Double).expect("memory");
        let batch = batch(vec![ColorJitter::default(), ColorJitter { gain: 2.0, grey: 0.0, offset: 0.0 }]);
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
