//! What is measured, and what is waited for, at the end of an epoch and of a run.

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
