//! Whatever device computes a step, the same comes of it; and a device with a clock says how long it was busy.

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

#[test]
fn the_share_of_the_time_in_which_rank_0s_device_was_busy_is_in_its_points_and_none_where_it_has_no_clock() {
    let world = World::new();
    // Checkpoints only where epochs end: what comes after one counts as what comes after a validation.
    let spec = spec("f64").replace(r#""every_epochs": 2.0"#, r#""every_epochs": 9.0"#);
    let without = world.whole("without", &spec, 1);
    assert!(!without.metrics.is_empty() && without.metrics.iter().all(|point| point.device.is_none()));
    // Idle for half a second, at gradients for 0.3 s, idle for 0.1 s, and at their application for 0.1 s.
    let (mut at, mut marks) = (0.0, [0.5, 0.3, 0.1, 0.1].into_iter().cycle());
    let clock = move || {
        at += marks.next().expect("they go round");
        torch::MomentDouble { at, ..torch::MomentDouble::default() }
    };
    let ranks = [world.rank_with(None, Some(Box::new(clock))), world.rank()];
    let _generation = world.generation("with", &spec, 1, &ranks.each_ref(), &[]);
    for rank in &ranks {
        rank.left(Cause::Finished);
    }
    let with = world.outcome("with", &ranks);
    let mut epochs = 0;
    for point in &with.metrics {
        // Nothing is known of the time before an epoch's first step.
        let expected = match (point.kind.as_str(), point.step % 5) {
            ("train", _) => Some(5.0 * 0.4 / (5.0 - 0.5)),
            ("step", 1) => Some(0.4 / 0.5),
            ("step", _) => Some(0.4),
            _ => None,
        };
        epochs += u32::from(point.kind == "train");
        let is_near = match (point.device, expected) {
            (Some(share), Some(expected)) => (share - expected).abs() < 1e-9,
            (share, expected) => share == expected,
        };
        assert!(is_near, "{expected:?}: {point:?}");
    }
    assert_eq!(epochs, 4);
    without.assert_equals(&with);
}
