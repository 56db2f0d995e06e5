//! Runs whose decoded images stay in the device's own memory are those of any others. Here the CPU is the device, which
//! is the same code.

use tch::Device;

use super::*;
use crate::data::batch::{Batch, Pixels};
use crate::learn::job::Job;
use crate::torch::Double;

/// Bytes of a decoded image.
const IMAGE: u64 = (3 * SIZE * SIZE) as u64;

/// With all that is drawn for a sample.
fn jittered() -> String {
    let input = r#""input": {"crop": 64, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}"#;
    spec("f64").replace(r#""input": {"crop": 64}"#, input)
}

/// All batches of a run, which is gone through `times` times with the same images kept.
fn batches(world: &World, spec: &str, times: usize) -> Vec<Batch> {
    let job = Job::open(&world.context(), &world.join("run", spec, 1, (0, 1), 0)).expect("a sound spec");
    let mut all = Vec::new();
    for _ in 0..times {
        let mut batches = job.loader(Split::Train).train(&job.spec, 0..6, 0).expect("threads start");
        all.extend((0..job.steps()).map(|_| batches.next(|| false).expect("all of them").expect("a sound dataset")));
    }
    all
}

fn on_device(batch: &Batch) -> usize {
    batch.pixels.on_device.iter().flat_map(|on_device| &on_device.crops).flatten().count()
}

#[test]
fn batches_from_the_device_from_the_host_and_from_both_have_the_same_bytes() {
    let scaled = jittered().replace(r#""crop": 64"#, r#""crop": 64, "cut": "resized""#);
    for spec in [jittered(), scaled] {
        have_the_same_bytes(&spec);
    }
}

fn have_the_same_bytes(spec: &str) {
    let mut world = World::new();
    let of_host = batches(&world, spec, 2);
    assert!(of_host.iter().all(|batch| batch.pixels.on_device.is_none()));
    for (images, expected) in [(60, 30..90), (150, 150..151), (1000, 150..151)] {
        world.device_cache_bytes = images * IMAGE;
        let batches = batches(&world, spec, 2);
        let last: usize = batches[35..].iter().map(on_device).sum();
        assert!(expected.contains(&last), "{last} of an epoch's 150 samples with room for {images}");
        for (one, other) in of_host.iter().zip(&batches) {
            assert_eq!(
                (one.step, &one.pixels.keys, &one.pixels.jitters),
                (other.step, &other.pixels.keys, &other.pixels.jitters)
            );
            assert_eq!(one.pixels.labels, other.pixels.labels);
            assert_eq!(one.pixels.pixels, other.pixels.on(Device::Cpu).expect("all within the slabs"));
            let whole = other.pixels.part(0, 25);
            let mut ahead = other.pixels.part(0, 25);
            ahead.send_ahead(&Double { room: 1, ..Double::default() }.copies()).expect("room");
            for other in [whole, ahead] {
                let (half, rest) = (other.part(3, 12), one.pixels.part(3, 12));
                assert_eq!(rest.pixels, half.on(Device::Cpu).expect("all within the slabs"), "a part of a batch");
                assert_eq!(rest.labels, half.labels);
                let jitters = |pixels: &Pixels| pixels.jitters_on(Device::Cpu).expect("numbers");
                assert_eq!(jitters(&rest), jitters(&half));
            }
        }
    }
}

#[test]
fn a_run_whose_images_stay_on_the_device_learns_the_same_bit_by_bit() {
    let mut world = World::new();
    let spec = jittered().replace("\"epochs\"", "\"micro_batch\": 12, \"epochs\"");
    let of_host = world.whole("of-host", &spec, 1);
    let losses = |outcome: &Outcome| -> BTreeMap<(String, u64), u64> {
        let points = outcome.metrics.iter().filter(|point| point.kind != "step");
        points.map(|point| ((point.kind.clone(), point.step), point.loss.to_bits())).collect()
    };
    for (run, images, world_size) in [("some", 60, 1), ("all", 1000, 1), ("of-two", 1000, 2)] {
        world.device_cache_bytes = images * IMAGE;
        let ranks: Vec<Rank> = (0..world_size).map(|_| world.rank()).collect();
        // The reader is ahead of a dataset as small as this one, and finds nothing on the device until it begins anew.
        let first = world.generation(run, &spec, 1, &ranks.iter().collect::<Vec<_>>(), &[]);
        ranks[0].wait_for_step(6);
        first.flags[0].obey(&pb::Leave { run: run.to_owned(), generation: 1, checkpoint: false, abort: false });
        for rank in &ranks {
            rank.left(Cause::Asked);
        }
        let _second = world.generation(run, &spec, 2, &ranks.iter().collect::<Vec<_>>(), &[]);
        for rank in &ranks {
            rank.left(Cause::Finished);
        }
        let outcome = world.outcome(run, &ranks);
        of_host.assert_equals(&outcome);
        if world_size == 1 {
            assert_eq!(losses(&of_host), losses(&outcome), "{run}");
            assert!(of_host.tensors.iter().zip(&outcome.tensors).all(|((_, one), (_, other))| one == other), "{run}");
        }
    }
}
