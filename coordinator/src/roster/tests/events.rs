//! Events that are written late, and whom they blame.

use super::*;

#[test]
fn a_run_shows_nothing_that_is_not_written_and_frees_no_device_before() {
    let mut scene = Scene::with_run(1, 1);
    scene.roster.add(run("next", 1, 1, scene.now(), &[]));
    scene.held = Some(Vec::new());
    scene.hello("a", 1, vec![]);
    assert_eq!((scene.state(), scene.run().generation), (pb::RunState::Waiting, 0));
    assert!(scene.sent.is_empty(), "{:?}", scene.sent);
    scene.release();
    scene.start(0);
    scene.held = Some(Vec::new());
    let made = |step| pb::Checkpointed { step, key: format!("c{step}"), digests: Default::default(), top1: None };
    scene.say("a", 1, 0, 0, Said::Checkpointed(made(5)));
    scene.say("a", 1, 0, 0, Said::Finished(pb::Finished { key: "m".into(), digests: Default::default() }));
    scene.leave("a", 1, 0, 0, Cause::Finished, 10);
    scene.wait(2.0, &["a"]);
    assert_eq!((scene.state(), scene.run().checkpoints.len()), (pb::RunState::Running, 0));
    assert_eq!(scene.roster.find("next").map(Run::state), Some(pb::RunState::Waiting));
    assert_eq!(scene.held.as_ref().map(Vec::len), Some(1), "one event of a run at a time");
    scene.release();
    assert_eq!((scene.state(), scene.run().checkpoints.len()), (pb::RunState::Done, 1));
    assert!(scene.sent.iter().any(|(_, message)| is_kill(message, 0)));
    scene.wait(2.0, &["a"]);
    assert_eq!(scene.roster.find("next").map(Run::state), Some(pb::RunState::Running));
}

#[test]
fn an_event_that_waits_does_not_keep_a_failure_from_being_acted_upon() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 2, vec![]);
    scene.start(0);
    scene.held = Some(Vec::new());
    let made = pb::Checkpointed { step: 5, key: "c".into(), digests: Default::default(), top1: None };
    scene.say("a", 1, 0, 0, Said::Checkpointed(made));
    scene.leave("a", 1, 1, 1, Cause::Exited, 0);
    assert!(matches!(scene.sent.last(), Some((_, Message::Leave(leave))) if leave.abort), "the survivor is aborted");
    scene.leave("a", 1, 0, 0, Cause::Collective, 5);
    scene.wait(1.0, &["a"]);
    assert_eq!(scene.history.len(), 1);
    scene.release();
    assert!(matches!(scene.history[1].event, RunEvent::Checkpoint { .. }));
    assert_eq!(failed(&scene.history[2].event), (1, Some(1), 5));
    assert_eq!(scene.start(5), [device("a", 0)]);
}

#[test]
fn an_agent_that_comes_back_while_a_generation_is_being_written_keeps_its_reserved_device() {
    let mut scene = Scene::with_run(1, 1);
    scene.held = Some(Vec::new());
    scene.hello("a", 1, vec![]);
    scene.roster.add(run("next", 1, 1, scene.now(), &[]));
    scene.hello("a", 1, vec![]);
    scene.wait(2.0, &["a"]);
    assert_eq!(scene.roster.find("next").map(Run::state), Some(pb::RunState::Waiting));
    scene.release();
    assert_eq!(scene.start(0), [device("a", 0)]);
}

#[test]
fn the_first_rank_that_fails_by_itself_is_to_blame_whatever_the_others_do_then() {
    let mut scene = Scene::with_run(1, 4);
    scene.hello("a", 3, vec![]);
    scene.hello("b", 1, vec![]);
    scene.start(0);
    scene.leave("a", 1, 1, 1, Cause::Collective, 7);
    scene.leave("a", 1, 2, 2, Cause::Error, 7);
    // Rank 0 hangs in its abort, and the machine of rank 3 goes away.
    scene.roster.disconnected("b");
    scene.wait(6.0, &["a"]);
    let RunEvent::Failure { culprit: Some(culprit), reason, .. } = &scene.history[1].event else { panic!("a culprit") };
    assert_eq!(culprit.rank, 2);
    assert!(reason.contains("Error") && !reason.contains("in time"), "{reason}");
}

#[test]
fn a_rank_that_does_not_leave_is_to_blame_if_nobody_failed_by_itself() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 2, vec![]);
    scene.start(0);
    scene.leave("a", 1, 0, 0, Cause::Collective, 7);
    scene.wait(5.0, &["a"]);
    assert_eq!(failed(&scene.history[1].event), (1, Some(1), 7));
}

#[test]
fn a_run_that_was_not_declared_failed_before_its_coordinator_died_is_tried_once_more() {
    let mut scene = Scene::with_run(1, 1);
    scene.hello("a", 1, vec![]);
    for generation in 1..=3 {
        scene.start(0);
        scene.leave("a", generation, 0, 0, Cause::Error, 0);
        scene.wait(9.0, &["a"]);
    }
    let failed = scene.history.pop().expect("the run has failed");
    assert!(matches!(failed.event, RunEvent::Failed { .. }));
    let mut next = Scene::new();
    next.roster.add(run("r", 1, 1, next.now(), &scene.history));
    next.history = scene.history;
    next.hello("a", 1, vec![]);
    next.wait(1.5, &["a"]);
    next.start(0);
    next.leave("a", 4, 0, 0, Cause::Error, 0);
    assert!(matches!(next.last(), RunEvent::Failed { .. }), "{:?}", next.last());
}

#[test]
fn a_run_that_is_resumed_at_a_step_forgets_what_came_after_it() {
    let mut scene = Scene::with_run(1, 1);
    scene.hello("a", 1, vec![]);
    scene.start(0);
    for step in [10, 20, 30] {
        let made = pb::Checkpointed { step, key: step.to_string(), digests: Default::default(), top1: None };
        scene.say("a", 1, 0, 0, Said::Checkpointed(made));
    }
    let actions = scene.roster.cancel("r");
    scene.take(actions);
    // Its agent is away, and will come back with the training state of step 30.
    scene.leave("a", 1, 0, 0, Cause::Asked, 30);
    let actions = scene.roster.resume("r", "again".into(), (Some(20), None));
    scene.take(actions);
    let held = scene.occupied(&device("a", 0), 1, 0, false);
    scene.hello("a", 1, vec![held]);
    assert!(scene.sent.iter().any(|(_, message)| is_kill(message, 0)), "what it holds is of no use");
    scene.wait(1.5, &["a"]);
    scene.start(20);
    let join = scene.sent.iter().rev().find_map(|(_, m)| if let Message::Join(join) = m { Some(join) } else { None });
    let offered: Vec<u64> = join.expect("it joins").checkpoints.iter().map(|checkpoint| checkpoint.step).collect();
    assert_eq!((scene.run().step, offered), (20, vec![20, 10]));
    let run = run("r", 1, 1, scene.now(), &scene.history);
    assert_eq!(run.checkpoints.len(), 2, "the history says the same");
}

#[test]
fn a_run_whose_loss_is_not_finite_is_not_tried_again_until_somebody_resumes_it() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 2, vec![]);
    scene.start(0);
    scene.leave("a", 1, 1, 1, Cause::Diverged, 7);
    scene.leave("a", 1, 0, 0, Cause::Collective, 7);
    assert_eq!((scene.state(), failures(&scene), scene.history.len()), (pb::RunState::Failed, 1, 3));
    assert!(
        matches!(scene.last(), RunEvent::Failed { reason } if reason.contains("rank 1") && reason.contains("Diverged"))
    );
    let actions = scene.roster.resume("r", "again".into(), (None, None));
    scene.take(actions);
    scene.wait(1.5, &["a"]);
    assert_eq!(scene.run().generation, 2);
}

#[test]
fn a_report_is_acknowledged_when_what_follows_from_it_is_written_and_counts_once() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 2, vec![]);
    scene.start(0);
    let report = |scene: &mut Scene, sequence, rank, said| {
        let (run, message) = ("r".into(), Some(said));
        let message = pb::RankMessage { sequence, run, generation: 1, rank, device: rank, message };
        let actions = scene.roster.rank(scene.now(), "a", &message);
        scene.take(actions);
    };
    let settled = |scene: &mut Scene| scene.roster.heartbeat(scene.now(), "a", &pb::Heartbeat::default());
    let made = pb::Checkpointed { step: 5, key: "c".into(), digests: Default::default(), top1: None };
    scene.held = Some(Vec::new());
    report(&mut scene, 1, 0, Said::Stepped(pb::Stepped { step: 5, metrics: vec![] }));
    assert_eq!(settled(&mut scene), 1);
    report(&mut scene, 2, 0, Said::Checkpointed(made.clone()));
    assert_eq!(settled(&mut scene), 1, "it is not written yet");
    scene.release();
    assert_eq!(settled(&mut scene), 2);
    report(&mut scene, 2, 0, Said::Checkpointed(made.clone()));
    assert_eq!(scene.history.len(), 2, "it was heard before");

    let left = |cause: Cause, detail: &str| {
        Said::Left(pb::Left { cause: cause.into(), step: 5, detail: detail.into(), ..Default::default() })
    };
    report(&mut scene, 3, 1, left(Cause::Error, "out of memory"));
    assert_eq!(settled(&mut scene), 2, "the other rank has yet to leave");
    // The coordinator dies here. The next one hears of the rank that it is there and has left, then what was not
    // acknowledged.
    let mut next = Scene::new();
    next.roster.add(run("r", 1, 2, next.now(), &scene.history));
    next.history = scene.history;
    let occupied = [0, 1].map(|rank| next.occupied(&device("a", rank), 1, rank, rank == 0)).into();
    next.hello("a", 2, occupied);
    report(&mut next, 2, 0, Said::Checkpointed(made));
    assert_eq!(next.history.len(), 2, "the older coordinator wrote it");
    report(&mut next, 3, 1, left(Cause::Error, "out of memory"));
    report(&mut next, 4, 0, left(Cause::Collective, "aborted"));
    assert!(matches!(&next.history[2].event, RunEvent::Failure { reason, .. } if reason.contains("out of memory")));
    assert!(next.sent.iter().any(|(_, message)| is_kill(message, 1)), "its training state is not trusted");
    assert_eq!(settled(&mut next), 4);
}

#[test]
fn a_rank_is_told_with_what_it_was_at_though_others_take_long_to_leave() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 2, vec![]);
    scene.start(0);
    scene.beat("a", &[0, 0], false);
    scene.leave("a", 1, 1, 1, Cause::Exited, 7);
    // Its process is gone, and its device has no rank until the next generation.
    let there = pb::DeviceHeartbeat { silent_millis: 0, rank: Some(pb::RankHeartbeat::default()) };
    let devices = vec![there, pb::DeviceHeartbeat::default()];
    scene.roster.heartbeat(scene.now(), "a", &pb::Heartbeat { devices, leaving: false });
    scene.leave("a", 1, 0, 0, Cause::Collective, 7);
    let RunEvent::Failure { culprit: Some(culprit), reason, .. } = &scene.history[1].event else { panic!("a culprit") };
    assert_eq!((culprit.rank, culprit.activity.as_str(), culprit.step), (1, "backward", 7), "{reason}");
}

#[test]
fn of_a_rank_whose_agent_a_new_coordinator_never_heard_nobody_says_what_it_was_at() {
    let mut before = Scene::with_run(1, 2);
    before.hello("a", 1, vec![]);
    before.hello("b", 1, vec![]);
    before.start(0);
    let mut scene = Scene::new();
    scene.history = before.history;
    scene.roster.add(run("r", 1, 2, scene.now(), &scene.history));
    let here = scene.occupied(&device("a", 0), 1, 0, true);
    scene.hello("a", 1, vec![here]);
    scene.wait(20.0, &["a"]);
    scene.leave("a", 1, 0, 0, Cause::Collective, 7);
    let RunEvent::Failure { culprit: Some(culprit), reason, .. } = &scene.history[1].event else { panic!("a culprit") };
    assert_eq!((culprit.rank, culprit.activity.as_str()), (1, "unknown"));
    assert!(reason.ends_with("did not come back after the coordinator's restart"), "{reason}");
}
