//! Whatever device computes a step, the same comes of it.

use proto::RunSpec;
use tch::{Cuda, Device, Kind, Tensor};

use super::*;
use crate::learn::step;
use crate::torch::device::allow_tf32_convolutions;

/// How far a step may be from that of a CPU in f64: the norm of the difference, as a share of the norm, of every
/// gradient, weight and statistic. A GPU takes other ways to convolve, some of which round more.
fn tolerance(device: Device, precision: &str) -> f64 {
    match (precision, device) {
        ("f64", _) => 1e-9,
        (_, Device::Cpu) => 1e-4,
        _ => 1e-3,
    }
}

#[test]
fn a_step_of_every_network_is_the_same_on_a_cpu_and_on_a_gpu_in_both_layouts() {
    // Enough samples in a lane that what is divided by their deviations in a norm is not mostly rounding.
    let images = Tensor::arange(24 * 3 * 64 * 64, (Kind::Double, Device::Cpu)).square().sin().view([24, 3, 64, 64]);
    let labels = Tensor::arange(24, (Kind::Int64, Device::Cpu)).remainder(3);
    let mut devices = vec![Device::Cpu];
    if Cuda::device_count() == 0 {
        eprintln!("skipped: no GPU is here; a CPU in f64 is compared with itself in NHWC and in f32");
    } else {
        devices.push(Device::Cuda(0));
    }
    allow_tf32_convolutions(false).expect("libtorch has it");
    for network in ["alexnet", "alexnet-bn", "alexnet-2012", "alexnet-slim"] {
        let step = |device: Device, precision: &str, layout: &str| -> Named {
            let lanes = format!(r#""layout": "{layout}", "lanes": 2, "max": 2"#);
            let spec = spec(precision).replace("alexnet-bn", network).replace(r#""lanes": 6, "max": 6"#, &lanes);
            let spec = RunSpec::from_json(&spec).expect("a sound spec");
            step::prepare(device, spec.ranks.precision).expect("a device");
            step::stepped(&spec, 3, device, (&images, &labels)).expect("a sound batch")
        };
        let expected = step(Device::Cpu, "f64", "nchw");
        for &device in &devices {
            let ways = [("f64", "nhwc"), ("f32", "nchw"), ("f64", "nchw"), ("f32", "nhwc")];
            for (precision, layout) in ways.into_iter().take(if device.is_cuda() { 4 } else { 2 }) {
                let (mut most, found) = ((0.0, String::new()), step(device, precision, layout));
                assert_eq!(expected.len(), found.len());
                for ((name, one), (other_name, other)) in expected.iter().zip(found) {
                    assert_eq!((name, one.size()), (&other_name, other.size()));
                    let size = one.norm().double_value(&[]);
                    let difference = (one - other.to_kind(Kind::Double)).norm().double_value(&[]);
                    assert!(size.is_finite() && difference.is_finite(), "{network}, {name}: {size}, {difference}");
                    let share = if difference == 0.0 { 0.0 } else { difference / size };
                    if share > most.0 {
                        most = (share, other_name);
                    }
                }
                eprintln!("{network} in {precision}, {layout} on {device:?}: at most {:.1e} away, {}", most.0, most.1);
                assert!(
                    most.0 <= tolerance(device, precision),
                    "{network}, {precision}, {layout}, {device:?}: {most:?}"
                );
            }
        }
    }
}
