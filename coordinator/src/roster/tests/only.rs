//! Agents that were started for one run.

use super::*;

#[test]
fn an_agent_that_was_started_for_a_run_serves_no_other_and_hears_how_it_ended() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello_for("other", "a", 2, vec![]);
    scene.wait(3.0, &["a"]);
    assert_eq!(scene.run().generation, 0);
    assert!(scene.run().reason.starts_with("needs 1 ranks; 0 devices are free"), "{}", scene.run().reason);
    scene.hello_for("r", "b", 1, vec![]);
    scene.wait(3.0, &["a", "b"]);
    let members = scene.start(0);
    assert!(members.len() == 1 && members[0].agent == "b", "{members:?}");
    // It could grow, and what is free is another's.
    scene.wait(10.0, &["a", "b"]);
    assert_eq!((scene.run().generation, scene.roster.end_for("b")), (1, pb::RunState::Unspecified));
    scene.hello("c", 1, vec![]);
    scene.wait(1.0, &["a", "b", "c"]);
    assert!(scene.sent.iter().any(|(agent, message)| agent == "b" && matches!(message, Message::Leave(_))), "it grows");
    scene.leave("b", 1, 0, 0, Cause::Asked, 3);
    scene.wait(3.0, &["a", "b", "c"]);
    let mut agents: Vec<String> = scene.start(3).into_iter().map(|device| device.agent).collect();
    agents.sort();
    assert_eq!(agents, ["b", "c"]);

    let actions = scene.roster.cancel("r");
    scene.take(actions);
    scene.leave("b", 2, 0, 0, Cause::Asked, 5);
    scene.leave("c", 2, 1, 0, Cause::Asked, 5);
    scene.wait(1.0, &["a", "b", "c"]);
    let ends = ["a", "b", "c"].map(|agent| scene.roster.end_for(agent));
    assert_eq!(ends, [pb::RunState::Unspecified, pb::RunState::Cancelled, pb::RunState::Unspecified]);
}
