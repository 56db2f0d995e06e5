//! With the channels of each pixel beside each other (NHWC) steps and runs are those with one channel after the other.

use proto::RunSpec;
use tch::{Device, Kind, Tensor};

use super::*;
use crate::learn::step::{self, reference_step};

fn in_nhwc(spec: &str) -> String {
    spec.replace(r#""lanes""#, r#""layout": "nhwc", "lanes""#)
}

#[test]
fn a_step_of_every_network_has_the_same_loss_gradients_and_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let images = Tensor::arange(6 * 3 * 64 * 64, (Kind::Double, Device::Cpu)).square().sin().view([6, 3, 64, 64]);
    let labels = Tensor::from_slice(&[0_i64, 1, 2, 0, 1, 2]);
    let batch = folder.path().join("batch");
    Tensor::write_safetensors(&[("images", &images), ("labels", &labels)], &batch).expect("a folder to write to");
    for network in ["alexnet", "alexnet-bn", "alexnet-2012", "alexnet-slim"] {
        let nchw =
            spec("f64").replace("alexnet-bn", network).replace(r#""lanes": 6, "max": 6"#, r#""lanes": 2, "max": 2"#);
        let strides = |spec: &str| {
            let spec = RunSpec::from_json(spec).expect("a sound spec");
            step::network(&spec, 3, Device::Cpu).parameters()[0].1.stride()
        };
        // [channels, 3, side, side]
        let (one, other) = (strides(&nchw), strides(&in_nhwc(&nchw)));
        assert!(one[3] == 1 && other[1] == 1 && other[3] == 3, "{network}: {one:?}, {other:?}");
        let step = |spec: &str| {
            let out = folder.path().join("out");
            reference_step(&RunSpec::from_json(spec).expect("a sound spec"), 3, &batch, &out).expect("a sound batch");
            let mut tensors = Tensor::read_safetensors(out).expect("own output");
            tensors.sort_by(|(one, _), (other, _)| one.cmp(other));
            tensors
        };
        let (one, other) = (step(&nchw), step(&in_nhwc(&nchw)));
        assert_eq!(one.len(), other.len());
        for ((name, one), (other_name, other)) in one.iter().zip(&other) {
            assert_eq!((name, one.size()), (other_name, other.size()));
            let (difference, size) = ((one - other).norm().double_value(&[]), one.norm().double_value(&[]));
            assert!(difference <= 1e-9 * size, "{network}, {name}: {difference:e} of {size:e}");
        }
    }
}

#[test]
fn a_run_is_the_same_on_two_ranks_and_one_and_goes_on_from_a_checkpoint_of_the_other_layout() {
    let world = World::new();
    let nchw = spec("f64").replace(r#""learning_rate": 0.01"#, r#""learning_rate": 0.001"#);
    let nhwc = in_nhwc(&nchw);
    let expected = world.whole("nchw", &nchw, 1);
    // In parts, whose gradients are added up.
    expected.assert_equals(&world.whole("nhwc", &nhwc.replace("\"epochs\"", "\"micro_batch\": 9, \"epochs\""), 2));
    for (run, before, after) in [("to-nhwc", &nchw, &nhwc), ("to-nchw", &nhwc, &nchw)] {
        let (a, b) = (world.rank(), world.rank());
        let first = world.generation(run, before, 1, &[&a, &b], &[]);
        a.wait_for_step(6);
        first.flags[1].obey(&pb::Leave { run: run.to_owned(), generation: 1, checkpoint: true, abort: false });
        let steps = [a.left(Cause::Asked).step, b.left(Cause::Asked).step];
        let checkpoint = last_checkpoint(&a.all()).expect("a checkpoint was asked for");
        assert_eq!([checkpoint.step; 2], steps);
        let fresh = world.rank();
        let _second = world.generation(run, after, 2, &[&fresh], &[checkpoint]);
        fresh.left(Cause::Finished);
        expected.assert_equals(&world.outcome(run, &[a, b, fresh]));
    }
}
