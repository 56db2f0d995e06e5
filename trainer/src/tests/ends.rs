//! What is measured, waited for and said at the end of an epoch, of a run and of a rank.

use std::sync::mpsc::RecvTimeoutError;

use support::{Faults, FaultyStore, Rules};

use super::*;

#[test]
fn a_validation_whose_loss_is_not_finite_ends_the_run_on_all_ranks_alike() {
    let world = World::new();
    // One step an epoch: its own loss is that of the first weights, and those that it makes are not finite.
    let spec = spec("f32").replace(r#""batch": 30"#, r#""batch": 150"#);
    let spec = spec.replace(r#""learning_rate": 0.01"#, r#""learning_rate": 1e60"#);
    let ranks = [world.rank(), world.rank()];
    let _generation = world.generation("run", &spec, 1, &ranks.iter().collect::<Vec<_>>(), &[]);
    for rank in &ranks {
        let left = rank.left(Cause::Diverged);
        assert!(left.detail.contains("the validation loss after step 1 is NaN"), "{left:?}");
        for message in rank.all() {
            let validated = |stepped: &pb::Stepped| stepped.metrics.iter().any(|point| point.kind == "validation");
            assert!(!matches!(&message, Message::Checkpointed(_) | Message::Finished(_)), "{message:?}");
            assert!(!matches!(&message, Message::Stepped(stepped) if validated(stepped)), "{message:?}");
        }
    }
}

#[test]
fn the_best_weights_are_tested_while_the_last_ones_are_on_their_way_to_a_slow_store() {
    let mut world = World::new();
    let rank = world.rank();
    let _generation = world.generation("before", &spec("f64"), 1, &[&rank], &[]);
    rank.left(Cause::Finished);
    let made = rank.all().into_iter().find_map(|message| match message {
        Message::Checkpointed(made) if made.step == 10 => Some(made),
        _ => None,
    });
    let made = made.expect("every second epoch has one");
    // As if nothing later could be better.
    let best = world.with_position(&made, |position| {
        position["progress"]["best"] = serde_json::json!({"step": 10, "top1": 2.0, "epoch": 2});
    });

    let faults = Faults::new(3);
    let under = Path::from(keys::checkpoints("run"));
    faults.set(Rules { under, delay: Duration::from_secs(8), ..Rules::default() });
    world.store = Arc::new(FaultyStore::new(world.store.clone(), faults));
    let ranks = [world.rank(), world.rank()];
    let _generation = world.generation("run", &spec("f64"), 2, &ranks.iter().collect::<Vec<_>>(), &[best]);
    for rank in &ranks {
        rank.left(Cause::Finished);
    }
    let said = ranks[0].all();
    let tested = said.iter().position(
        |message| matches!(message, Message::Stepped(stepped) if stepped.metrics.iter().any(|point| point.kind == "test")),
    );
    let written = said.iter().position(|message| matches!(message, Message::Checkpointed(made) if made.step == 20));
    assert!(tested.expect("a test at the end") < written.expect("the last state is kept"), "{said:?}");
}

#[test]
fn a_rank_whose_device_has_no_memory_left_ends_its_process_and_says_so_by_a_class() {
    let world = World::new();
    for (error, lacking) in [
        (torch::Error::OutOfMemory as fn(String) -> torch::Error, true),
        (torch::Error::Device as fn(String) -> torch::Error, false),
    ] {
        let fake = move |own: Arc<Heartbeat>| -> torch::Fake {
            Box::new(move || if own.step() == 7 { Err(error("2 GiB".to_owned())) } else { Ok(true) })
        };
        let rank = world.rank_on(Some(Box::new(fake)));
        let _generation = world.generation("run", &spec("f32"), 1, &[&rank], &[]);
        let left = rank.left(Cause::Error);
        assert_eq!(left.out_of_memory, lacking, "{left:?}");
        let ended = rank.said.recv_timeout(DEADLINE);
        assert!(matches!(ended, Err(RecvTimeoutError::Disconnected)), "its training thread ends: {ended:?}");
    }
}
