//! Runs with `ranks.graphs` are those without. Here the CPU is the device, which computes once more what a GPU replays;
//! all else is the same code.

use super::*;

pub(super) fn with_graphs(spec: &str) -> String {
    spec.replace(r#""lanes""#, r#""graphs": true, "lanes""#)
}

#[test]
fn a_run_on_two_ranks_is_the_same_bit_by_bit() {
    let world = World::new();
    // Three shapes of steps.
    let spec = spec("f64").replace(r#""lanes": 6, "max": 6"#, r#""lanes": 7, "max": 7"#);
    let (one, other) = (world.whole("without", &spec, 2), world.whole("with", &with_graphs(&spec), 2));
    assert_eq!(one.ledger, other.ledger);
    assert_eq!(one.tensors.len(), other.tensors.len());
    for ((name, mine), (other_name, others)) in one.tensors.iter().zip(&other.tensors) {
        assert_eq!(name, other_name);
        assert!(mine == others, "{name}: {:e}", (mine - others).abs().max().double_value(&[]));
    }
    let losses = |outcome: &Outcome| -> Vec<(String, u64, u64)> {
        let points = outcome.metrics.iter().filter(|point| point.kind != "step");
        points.map(|point| (point.kind.clone(), point.step, point.loss.to_bits())).collect()
    };
    assert_eq!(losses(&one), losses(&other));
}
