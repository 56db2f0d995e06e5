//! Golden losses: the loss of each network in its first 20 steps, one line a step in `tests/golden/losses.txt`. A
//! change of what is learned shows as a difference in that file. To write it anew after such a change:
//!
//! ```text
//! WRITE_GOLDEN=1 cargo nextest run -p gleaner-trainer golden
//! ```
//!
//! The steps are those of a run: samples in the plan's order, decoded, augmented with everything that the spec has,
//! normalised; forward with dropout and ghost batch norm, loss, backward, clipping, schedule, optimizer, running
//! statistics. Lanes and steps divide the samples, so that the first plan gives the same losses.

use std::sync::Arc;
use std::sync::mpsc::channel;

use super::*;
use crate::learn::control::Heartbeat;
use crate::tests::World;
use crate::torch::Store;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/losses.txt");
const NETWORKS: [&str; 4] = ["alexnet", "alexnet-bn", "alexnet-2012", "alexnet-slim"];
const STEPS: usize = 20;
/// Losses may differ by this share. The runs compute in f64, so that sums in another order, as on another CPU, do not
/// matter: with libtorch's kernels for SSE4.1 in place of those for AVX-512 all 9 digits are the same. A share of 1e-7
/// leaves room for more than that, and is what f32 can hold, so that no change of the mathematics hides below it.
const TOLERANCE: f64 = 1e-7;

fn losses(world: &World, network: &str) -> Vec<f64> {
    let spec = format!(
        r#"{{"dataset": "d", "manifest": 1, "plan": 2, "seed": 5, "model": {{"arch": "{network}", "width": 0.1}},
            "input": {{"crop": 64, "cut": "resized", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}},
            "train": {{"epochs": 4, "batch": 30, "learning_rate": 0.01, "label_smoothing": 0.1, "clip_norm": 5.0}},
            "ranks": {{"lanes": 3, "max": 1, "precision": "f64"}}}}"#
    );
    let store = Store::serve("127.0.0.1").expect("loopback");
    let join = world.join(network, &spec, 1, (0, 1), store.port());
    let mut job = Job::open(&world.context(), &join).expect("a sound spec");
    let flags = ControlFlags::new(&join, Arc::new(Heartbeat::new()));
    let membership =
        Membership::join(&job.context.setup, &job.spec, job.device, &join, &flags).expect("the only rank is here");
    let (to, _reported) = channel();
    let reports = Reports { run: join.run.clone(), generation: 1, rank: 0, to };
    let mut records = Records::new(&job, &join, &membership, &reports);
    let mut batches = job.loader(Split::Train).train(&job.spec, 0..3, 0).expect("threads start");
    let averaging = Averaging::new(&job.spec, &membership.group, &job.model);
    let mut averaging = averaging.map_err(|failure| failure.to_string()).expect("the only rank is here");
    let mut step = || {
        let batch = batches.next(|| false).expect("20 batches").expect("a sound dataset");
        let before = job.progress.sums;
        train_step(&mut job, &membership, &mut averaging, &batch, &flags, &mut records, Instant::now())
            .expect("a sound step");
        let Sums { loss, samples, .. } = job.progress.sums;
        (loss - before.loss) / (samples - before.samples)
    };
    (0..STEPS).map(|_| step()).collect()
}

#[test]
fn golden_losses_of_every_network_are_those_in_the_file() {
    let world = World::new();
    let found: Vec<(&str, Vec<f64>)> = NETWORKS.iter().map(|&network| (network, losses(&world, network))).collect();
    let line = |network: &str, step: usize, loss: f64| format!("{network} {step} {loss:.9}\n");
    if std::env::var_os("WRITE_GOLDEN").is_some() {
        let of = |(network, losses): &(&str, Vec<f64>)| -> String {
            losses.iter().zip(1..).map(|(&loss, step)| line(network, step, loss)).collect()
        };
        let head = "# network, step, loss. Written by: WRITE_GOLDEN=1 cargo nextest run -p gleaner-trainer golden\n";
        let text = head.to_owned() + &found.iter().map(of).collect::<String>();
        std::fs::write(FILE, text).expect("a folder to write to");
        return;
    }
    let text = std::fs::read_to_string(FILE).expect("the golden file");
    let golden: Vec<Vec<&str>> =
        text.lines().filter(|line| !line.starts_with('#')).map(|line| line.split(' ').collect()).collect();
    assert_eq!(golden.len(), NETWORKS.len() * STEPS);
    let found = found
        .iter()
        .flat_map(|(network, losses)| losses.iter().zip(1..).map(move |(loss, step)| (network, step, loss)));
    for ((network, step, &loss), golden) in found.zip(golden) {
        let expected: f64 = golden[2].parse().expect("a number");
        assert_eq!(golden[..2], [*network, &step.to_string()]);
        let difference = (loss - expected).abs() / expected;
        assert!(
            difference < TOLERANCE,
            "{network}, step {step}: {loss:.9}, golden {expected}, differs by {difference:.1e}"
        );
    }
}
