//! Devices that are late: a rank alone goes a step ahead of its own, ranks of many wait for each other's.

use std::sync::atomic::{AtomicU64, Ordering};

use super::graphs::with_graphs;
use super::*;

/// Has not come so far when it is first asked, and has when it is asked again. Counts how often it was by then given
/// another step.
fn late(ahead: &Arc<AtomicU64>) -> Option<Box<dyn FnOnce(Arc<Heartbeat>) -> torch::Fake>> {
    let ahead = ahead.clone();
    Some(Box::new(move |own| {
        let mut asked_at = None;
        Box::new(move || match asked_at.take() {
            None => {
                asked_at = Some(own.step());
                Ok(false)
            }
            Some(step) => {
                ahead.fetch_add(u64::from(own.step() > step), Ordering::Relaxed);
                Ok(true)
            }
        })
    }))
}

#[test]
fn a_rank_alone_goes_a_step_ahead_of_its_device_and_keeps_no_state_whose_loss_it_has_not_heard() {
    let world = World::new();
    let undisturbed = world.whole("undisturbed", &spec("f64"), 1);
    let ahead = Arc::new(AtomicU64::new(0));
    let rank = world.rank_on(late(&ahead));
    let spec = spec("f64").replace(r#""every_epochs": 2.0"#, r#""every_epochs": 0.4"#);
    let _generation = world.generation("run", &spec, 1, &[&rank], &[]);
    rank.left(Cause::Finished);
    assert_eq!(ahead.load(Ordering::Relaxed), 20, "each step is applied before its loss is heard");
    let mut in_epochs = 0;
    for message in rank.all() {
        let Message::Checkpointed(made) = message else { continue };
        let (progress, _) = world.read(&made);
        assert_eq!(progress.sums.samples, 30.0 * (progress.step % 5) as f64, "step {}", progress.step);
        assert_eq!(progress.tail.last().map(|line| line.step), Some(progress.step));
        in_epochs += u32::from(progress.step % 5 != 0);
    }
    assert!(in_epochs > 0, "two of three are due in the middle of an epoch");
    undisturbed.assert_equals(&world.outcome("run", &[rank]));
}

#[test]
fn a_rank_that_was_aborted_a_step_ahead_of_its_device_counts_that_step_in_the_next_generation() {
    let world = World::new();
    let undisturbed = world.whole("undisturbed", &spec("f64"), 1);
    let rank = world.rank_on(late(&Arc::default()));
    let first = world.generation("run", &spec("f64"), 1, &[&rank], &[]);
    rank.wait_for_step(7);
    first.flags[0].abort();
    assert!(rank.left(Cause::Collective).step >= 7);
    let _second = world.generation("run", &spec("f64"), 2, &[&rank], &[]);
    rank.left(Cause::Finished);
    undisturbed.assert_equals(&world.outcome("run", &[rank]));
}

#[test]
fn what_came_of_a_loss_that_is_not_finite_is_neither_kept_nor_measured_although_it_was_heard_late() {
    let world = World::new();
    let spec = spec("f32").replace(r#""learning_rate": 0.01"#, r#""learning_rate": 1e60"#);
    let diverged = |what: &str, spec: &str| {
        let rank = world.rank_on(late(&Arc::default()));
        let _generation = world.generation("run", spec, 1, &[&rank], &[]);
        let left = rank.left(Cause::Diverged);
        assert!(left.detail.contains("the loss of step 1 is"), "{what}: {left:?}");
        assert_eq!(left.step, 0, "{what}: no whole state is left");
        for message in rank.all() {
            let validated = |stepped: &pb::Stepped| stepped.metrics.iter().any(|point| point.kind == "validation");
            let wrong = match &message {
                Message::Checkpointed(_) | Message::Finished(_) => true,
                Message::Stepped(stepped) => validated(stepped),
                _ => false,
            };
            assert!(!wrong, "{what}: {message:?}");
        }
    };
    diverged("the next step", &spec);
    // After the step with that loss a checkpoint is due, or the epoch ends.
    diverged("a checkpoint", &spec.replace(r#""every_epochs": 2.0"#, r#""every_epochs": 0.4"#));
    diverged("an epoch's end", &spec.replace(r#""batch": 30"#, r#""batch": 75"#));
}

#[test]
fn a_step_that_fails_on_one_rank_in_its_gradients_or_before_its_counts_is_applied_by_none_and_done_again() {
    fails_on_one_rank(&spec("f64"));
}

#[test]
fn so_is_one_whose_gradients_are_averaged_without_hooks() {
    fails_on_one_rank(&with_graphs(&spec("f64")));
}

fn fails_on_one_rank(spec: &str) {
    let world = World::new();
    let undisturbed = world.whole("undisturbed", spec, 1);
    // How often the device is asked in that step until it fails: while it reduces gradients, or when that is done.
    for (run, fails_at, first) in [("gradients", 500, false), ("counts", 2, true)] {
        let a = world.rank();
        let peer = a.heartbeat.clone();
        let fake = move |own: Arc<Heartbeat>| -> torch::Fake {
            let mut asked = 0;
            Box::new(move || {
                if own.step() != 7 || asked == fails_at {
                    return Ok(true);
                }
                asked += 1;
                assert_eq!(peer.step(), 7, "no step is applied before it is reduced on all ranks");
                if asked < fails_at { Ok(first) } else { Err(torch::Error::Collective("half a bucket".to_owned())) }
            })
        };
        let b = world.rank_on(Some(Box::new(fake)));
        let _first = world.generation(run, spec, 1, &[&a, &b], &[]);
        let (of_b, of_a) = (b.left(Cause::Collective), a.left(Cause::Collective));
        assert_eq!((of_a.step, of_b.step), (7, 7), "{run}");
        assert!(of_b.detail.contains("half a bucket"), "{}", of_b.detail);
        let _second = world.generation(run, spec, 2, &[&a, &b], &[]);
        for rank in [&a, &b] {
            rank.left(Cause::Finished);
        }
        undisturbed.assert_equals(&world.outcome(run, &[a, b]));
    }
}
