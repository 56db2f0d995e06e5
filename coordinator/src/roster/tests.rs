use super::*;
use proto::RunSpec;
use proto::pb::left::Cause;
use proto::pb::rank_message::Message as Said;
use proto::run_event::{Culprit, EventRecord};

mod events;
mod only;

/// A roster, its clock, and what it has decided; the agents answer as real ones do.
struct Scene {
    roster: Roster,
    seconds: f64,
    history: Vec<EventRecord>,
    sent: Vec<(String, Message)>,
    /// The store does not answer: events wait here.
    held: Option<Vec<(String, RunEvent)>>,
}

impl Scene {
    fn new() -> Self {
        Self { roster: Roster::default(), seconds: 0.0, history: Vec::new(), sent: Vec::new(), held: None }
    }

    /// A run of 2 to 2 ranks that detects failures after 4 seconds.
    fn with_run(min: u32, max: u32) -> Self {
        let mut scene = Self::new();
        scene.roster.add(run("r", min, max, scene.now(), &[]));
        scene
    }

    fn now(&self) -> Now {
        Now { at: Duration::from_secs_f64(self.seconds), wall: (self.seconds * 1000.0) as u64 }
    }

    fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Write { run, event } => match &mut self.held {
                    Some(held) => held.push((run, event)),
                    None => self.write(run, event),
                },
                Action::Send { agent, message } => {
                    if let Message::Serve(_) | Message::Join(_) = message {
                        let written = self.history.iter().any(|r| matches!(r.event, RunEvent::Generation { .. }));
                        assert!(written, "nothing is done before it is written");
                    }
                    self.sent.push((agent, message));
                }
            }
        }
    }

    fn write(&mut self, run: String, event: RunEvent) {
        let (n, at_millis) = (self.history.len() as u64 + 1, self.now().wall);
        self.history.push(EventRecord { format: 1, n, term: 1, nonce: String::new(), at_millis, event });
        let actions = self.roster.written(self.now(), &run);
        self.take(actions);
    }

    /// The store answers again.
    fn release(&mut self) {
        for (run, event) in self.held.take().unwrap_or_default() {
            self.write(run, event);
        }
    }

    fn run(&self) -> &Run {
        self.roster.find("r").expect("it was added")
    }

    fn hello(&mut self, agent: &str, devices: usize, occupied: Vec<pb::Occupied>) {
        self.hello_for("", agent, devices, occupied);
    }

    /// Of an agent that was started for a run.
    fn hello_for(&mut self, only_run: &str, agent: &str, devices: usize, occupied: Vec<pb::Occupied>) {
        let hello = pb::Hello {
            agent: agent.into(),
            advertise_address: format!("{agent}.local"),
            devices: vec!["cpu".into(); devices],
            occupied,
            only_run: only_run.into(),
            ..pb::Hello::default()
        };
        let actions = self.roster.hello(self.now(), &hello);
        self.take(actions);
    }

    /// Lets time pass while these agents beat.
    fn wait(&mut self, seconds: f64, beating: &[&str]) {
        let end = self.seconds + seconds;
        while self.seconds < end {
            self.seconds = (self.seconds + 0.5).min(end);
            for agent in beating {
                self.beat(agent, &[0; 8], false);
            }
            let actions = self.roster.tick(self.now());
            self.take(actions);
        }
    }

    /// An agent says how long each of its processes was silent.
    fn beat(&mut self, agent: &str, silent_millis: &[u64], leaving: bool) {
        let alive =
            Some(pb::RankHeartbeat { activity: pb::rank_heartbeat::Activity::Backward.into(), step: 7, millis: 100 });
        let devices = silent_millis.iter().map(|&silent_millis| pb::DeviceHeartbeat { silent_millis, rank: alive });
        let beat = pb::Heartbeat { devices: devices.collect(), leaving };
        self.roster.heartbeat(self.now(), agent, &beat);
    }

    fn say(&mut self, agent: &str, generation: u64, rank: u32, device: u32, said: Said) {
        let message = Some(said);
        let message = pb::RankMessage { run: "r".into(), generation, rank, device, message, ..Default::default() };
        let actions = self.roster.rank(self.now(), agent, &message);
        self.take(actions);
    }

    fn leave(&mut self, agent: &str, generation: u64, rank: u32, device: u32, cause: Cause, step: u64) {
        let left = pb::Left { cause: cause.into(), step, detail: format!("{cause:?}"), ..Default::default() };
        self.say(agent, generation, rank, device, Said::Left(left));
    }

    /// The first agent serves the newest generation and all its ranks join. Returns them as (agent, device).
    fn start(&mut self, step: u64) -> Vec<DeviceId> {
        let generation = self.run().generation;
        let served = self.sent.iter().rev().find(|(_, message)| matches!(message, Message::Serve(_)));
        let agent = served.expect("a generation was formed").0.clone();
        let serving = pb::Serving { run: "r".into(), generation, port: 29500, error: String::new() };
        let actions = self.roster.serving(self.now(), &agent, &serving);
        self.take(actions);
        let mut members = Vec::new();
        for (agent, message) in &self.sent {
            match message {
                Message::Join(join) if join.generation == generation => {
                    assert_eq!(join.store, format!("{}.local:29500", self.sent_serve()));
                    assert_eq!(join.rank as usize, members.len());
                    members.push(DeviceId { agent: agent.clone(), index: join.device });
                }
                _ => {}
            }
        }
        for (rank, device) in (0u32..).zip(&members) {
            self.say(
                &device.agent,
                generation,
                rank,
                device.index,
                Said::Joined(pb::Joined { step, steps_per_epoch: 10, damaged: vec![] }),
            );
        }
        members
    }

    fn sent_serve(&self) -> &str {
        let served = self.sent.iter().rev().find(|(_, message)| matches!(message, Message::Serve(_)));
        &served.expect("a generation was formed").0
    }

    fn state(&self) -> pb::RunState {
        self.run().state()
    }

    fn last(&self) -> &RunEvent {
        &self.history.last().expect("something was written").event
    }

    fn occupied(&self, device: &DeviceId, generation: u64, rank: u32, joined: bool) -> pb::Occupied {
        pb::Occupied { device: device.index, run: "r".into(), generation, rank, joined, step: 7 }
    }
}

fn run(name: &str, min: u32, max: u32, now: Now, events: &[EventRecord]) -> Run {
    let mut spec = RunSpec::from_toml("dataset = \"d\"").expect("one line is enough");
    (spec.ranks.min, spec.ranks.max, spec.ranks.failure_detection_seconds) = (min, max, 4.0);
    let sources = Sources { manifest_key: "key".into(), manifest_sha256: "sha".into(), ..Sources::default() };
    Run::recovered(now, name, spec, sources, 10, events)
}

fn device(agent: &str, index: u32) -> DeviceId {
    DeviceId { agent: agent.into(), index }
}

fn is_kill(message: &Message, device: u32) -> bool {
    matches!(message, Message::Kill(kill) if kill.device == device)
}

#[test]
fn a_run_waits_for_its_ranks_then_trains_and_frees_its_devices_when_it_is_done() {
    let mut scene = Scene::with_run(2, 2);
    scene.hello("a", 1, vec![]);
    scene.wait(3.0, &["a"]);
    assert_eq!(scene.state(), pb::RunState::Waiting);
    assert_eq!(scene.run().reason, "needs 2 ranks; 1 devices are free, on 1 agents");
    scene.hello("b", 1, vec![]);
    assert_eq!(scene.start(0), [device("a", 0), device("b", 0)]);
    assert_eq!(scene.state(), pb::RunState::Running);
    scene.say("a", 1, 0, 0, Said::Stepped(pb::Stepped { step: 5, metrics: vec![] }));
    scene.say("b", 1, 1, 0, Said::Stepped(pb::Stepped { step: 4, metrics: vec![] }));
    assert_eq!(scene.run().step, 5, "rank 0 alone speaks for the run");
    let made = pb::Checkpointed { step: 5, key: "c".into(), digests: Default::default(), top1: None };
    scene.say("a", 1, 0, 0, Said::Checkpointed(made));
    assert!(matches!(scene.last(), RunEvent::Checkpoint { step: 5, .. }));
    scene.say("a", 1, 0, 0, Said::Finished(pb::Finished { key: "m".into(), digests: Default::default() }));
    assert!(matches!(scene.last(), RunEvent::Done { .. }));
    scene.leave("a", 1, 0, 0, Cause::Finished, 10);
    assert_eq!(scene.roster.agents["a"].devices[0].occupant, None);
    scene.wait(5.0, &["a", "b"]);
    assert_eq!(scene.roster.agents["b"].devices[0].occupant, None, "it did not leave by itself");
    assert_eq!(scene.history.len(), 3);
}

#[test]
fn a_rank_that_exits_is_named_and_the_next_generation_begins_with_the_survivor() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 2, vec![]);
    assert_eq!(scene.start(0), [device("a", 0), device("a", 1)]);
    scene.say("a", 1, 0, 0, Said::Stepped(pb::Stepped { step: 7, metrics: vec![] }));
    // The survivor's word comes first, but it only felt the other's death.
    scene.leave("a", 1, 1, 1, Cause::Collective, 7);
    let aborts = |(_, message): &&(String, Message)| matches!(message, Message::Leave(leave) if leave.abort);
    assert_eq!(scene.sent.iter().filter(aborts).count(), 1);
    assert!(matches!(scene.last(), RunEvent::Generation { .. }), "who was at fault is not known yet");
    scene.leave("a", 1, 0, 0, Cause::Exited, 0);
    assert_eq!(failed(&scene.history[1].event), (1, Some(0), 7));
    assert_eq!(scene.start(7), [device("a", 1)], "at once, without waiting for a new process");
    assert_eq!(scene.run().generation, 2);
    scene.wait(6.0, &["a"]);
    scene.leave("a", 2, 0, 1, Cause::Asked, 9);
    assert_eq!(scene.start(9), [device("a", 1), device("a", 0)], "rank 0 holds the state");
    assert_eq!(failures(&scene), 1);
}

/// Generation, rank and step of a failure.
fn failed(event: &RunEvent) -> (u64, Option<u32>, u64) {
    match event {
        RunEvent::Failure { generation, culprit, step, .. } => (*generation, culprit.as_ref().map(|c| c.rank), *step),
        other => panic!("{other:?}"),
    }
}

fn failures(scene: &Scene) -> usize {
    scene.history.iter().filter(|record| matches!(record.event, RunEvent::Failure { .. })).count()
}

#[test]
fn an_agent_may_be_away_for_a_moment_but_not_for_long() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 1, vec![]);
    scene.hello("b", 1, vec![]);
    scene.start(0);
    scene.roster.disconnected("b");
    scene.wait(3.0, &["a"]);
    let here = scene.occupied(&device("b", 0), 1, 1, true);
    scene.hello("b", 1, vec![here]);
    scene.wait(3.0, &["a", "b"]);
    assert_eq!((scene.state(), scene.history.len()), (pb::RunState::Running, 1));
    scene.roster.disconnected("b");
    scene.wait(4.5, &["a"]);
    scene.leave("a", 1, 0, 0, Cause::Collective, 3);
    let RunEvent::Failure { culprit: Some(culprit), reason, .. } = &scene.history[1].event else { panic!("a culprit") };
    let Culprit { rank, agent, address, device: on, activity, step, silent_millis } = culprit;
    assert_eq!((*rank, agent.as_str(), address.as_str(), on.as_str()), (1, "b", "b.local", "cpu"));
    assert_eq!((activity.as_str(), *step), ("backward", 7));
    assert!((4000..5000).contains(silent_millis), "{silent_millis}");
    assert!(reason.contains("rank 1 (cpu of agent b at b.local)") && reason.contains("backward"), "{reason}");
    assert_eq!(scene.start(3), [device("a", 0)], "one rank is enough");
}

#[test]
fn a_silent_rank_is_killed_and_those_that_do_not_leave_are_killed_too() {
    let mut scene = Scene::with_run(2, 2);
    scene.hello("a", 2, vec![]);
    scene.start(0);
    scene.beat("a", &[0, 4000], false);
    let actions = scene.roster.tick(scene.now());
    scene.take(actions);
    let kills = |scene: &Scene, device| {
        let is = |(_, message): &&(String, Message)| is_kill(message, device);
        scene.sent.iter().filter(is).count()
    };
    assert_eq!((kills(&scene, 0), kills(&scene, 1) > 0), (0, true));
    scene.wait(5.0, &["a"]);
    assert_eq!(kills(&scene, 0), 1);
    assert_eq!(failed(&scene.history[1].event).1, Some(1));
    assert_eq!(scene.run().generation, 2);
}

#[test]
fn generations_that_fail_without_a_step_between_them_end_the_run() {
    let mut scene = Scene::with_run(1, 1);
    scene.hello("a", 1, vec![]);
    for generation in 1..=3 {
        scene.start(0);
        scene.leave("a", generation, 0, 0, Cause::Error, 0);
        scene.wait(9.0, &["a"]);
    }
    assert_eq!(scene.state(), pb::RunState::Failed);
    assert!(
        matches!(scene.last(), RunEvent::Failed { reason } if reason.contains("CAUSE") || reason.contains("Error"))
    );
    let actions = scene.roster.resume("r", "again".into(), (None, None));
    scene.take(actions);
    scene.wait(1.5, &["a"]);
    assert_eq!(scene.run().generation, 4);
}

#[test]
fn a_cancelled_run_leaves_with_a_checkpoint() {
    let mut scene = Scene::with_run(1, 1);
    scene.hello("a", 1, vec![]);
    scene.start(0);
    let actions = scene.roster.cancel("r");
    scene.take(actions);
    assert_eq!(scene.state(), pb::RunState::Cancelling);
    assert!(matches!(&scene.sent.last(), Some((_, Message::Leave(leave))) if leave.checkpoint && !leave.abort));
    let made = pb::Checkpointed { step: 3, key: "c".into(), digests: Default::default(), top1: None };
    scene.say("a", 1, 0, 0, Said::Checkpointed(made));
    scene.leave("a", 1, 0, 0, Cause::Asked, 3);
    assert_eq!((scene.state(), scene.last()), (pb::RunState::Cancelled, &RunEvent::Cancelled));
    assert_eq!(scene.roster.agents["a"].devices[0].occupant, None);
}

#[test]
fn a_run_grows_when_devices_appear_but_not_at_once_again() {
    let mut scene = Scene::with_run(1, 3);
    scene.hello("a", 1, vec![]);
    scene.wait(1.5, &["a"]);
    scene.start(0);
    scene.hello("b", 1, vec![]);
    scene.wait(3.0, &["a", "b"]);
    assert!(!matches!(scene.sent.last(), Some((_, Message::Leave(_)))));
    scene.wait(3.0, &["a", "b"]);
    assert!(matches!(scene.sent.last(), Some((_, Message::Leave(leave))) if !leave.abort && !leave.checkpoint));
    scene.leave("a", 1, 0, 0, Cause::Asked, 5);
    assert_eq!(scene.start(5), [device("a", 0), device("b", 0)]);
    assert_eq!(failures(&scene), 0);
}

#[test]
fn an_agent_that_is_shut_down_hands_over_and_gets_nothing_new() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 1, vec![]);
    scene.hello("b", 1, vec![]);
    scene.start(0);
    scene.beat("b", &[0], true);
    scene.leave("b", 1, 1, 0, Cause::Asked, 4);
    assert!(matches!(scene.sent.last(), Some((to, Message::Leave(leave))) if to == "a" && !leave.abort));
    scene.leave("a", 1, 0, 0, Cause::Asked, 4);
    assert_eq!(scene.start(4), [device("a", 0)]);
    for _ in 0..20 {
        scene.beat("b", &[0], true);
        scene.wait(0.5, &["a"]);
    }
    assert_eq!((scene.run().generation, failures(&scene)), (2, 0));
}

#[test]
fn an_agent_that_hung_is_free_of_its_rank_and_comes_back_later() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 1, vec![]);
    scene.hello("b", 1, vec![]);
    scene.start(0);
    // "b" serves nothing and says nothing, but its stream stands.
    scene.wait(4.0, &["a"]);
    assert!(scene.sent.iter().any(|(to, message)| to == "b" && is_kill(message, 0)), "when it hears again");
    scene.leave("a", 1, 0, 0, Cause::Collective, 3);
    assert_eq!(scene.start(3), [device("a", 0)]);
    scene.wait(6.0, &["a", "b"]);
    scene.leave("a", 2, 0, 0, Cause::Asked, 5);
    assert_eq!(scene.start(5), [device("a", 0), device("b", 0)]);
    assert_eq!(failures(&scene), 1);
}

#[test]
fn time_in_which_nobody_could_be_heard_is_nobodys_silence() {
    let mut scene = Scene::with_run(1, 1);
    scene.hello("a", 1, vec![]);
    scene.start(0);
    scene.seconds += 60.0;
    scene.roster.discount_stall(scene.now(), Duration::from_secs(59));
    let actions = scene.roster.tick(scene.now());
    scene.take(actions);
    assert_eq!((scene.state(), failures(&scene)), (pb::RunState::Running, 0));
}

#[test]
fn the_newest_checkpoints_and_the_best_are_kept_and_a_damaged_one_is_forgotten() {
    let mut scene = Scene::with_run(1, 1);
    scene.hello("a", 1, vec![]);
    scene.start(0);
    for (step, top1) in [(10, None), (20, Some(0.6)), (30, Some(0.5)), (40, Some(0.4)), (50, None), (60, Some(0.3))] {
        let made = pb::Checkpointed { step, key: step.to_string(), digests: Default::default(), top1 };
        scene.say("a", 1, 0, 0, Said::Checkpointed(made));
    }
    let kept = |run: &Run| run.checkpoints.iter().map(|checkpoint| checkpoint.step).collect::<Vec<_>>();
    assert_eq!(kept(scene.run()), [20, 40, 50, 60], "3 are kept, and the best");
    scene.leave("a", 1, 0, 0, Cause::Exited, 0);
    scene.wait(1.5, &["a"]);
    scene.start(60);
    let damaged = vec![pb::Damaged { key: "60".into(), reason: "rot".into() }];
    scene.say("a", 2, 0, 0, Said::Joined(pb::Joined { step: 50, steps_per_epoch: 10, damaged }));
    assert!(matches!(scene.last(), RunEvent::Damaged { key, .. } if key == "60"));
    let run = run("r", 1, 1, scene.now(), &scene.history);
    assert_eq!((kept(&run), run.best().map(|best| best.step)), (vec![20, 40, 50], Some(20)));
}

#[test]
fn a_new_coordinator_goes_on_with_the_generation_whose_agents_all_come_back() {
    for lost in [false, true] {
        let mut before = Scene::with_run(1, 2);
        before.hello("a", 1, vec![]);
        before.hello("b", 1, vec![]);
        before.start(0);
        let mut scene = Scene::new();
        scene.history = before.history;
        scene.roster.add(run("r", 1, 2, scene.now(), &scene.history));
        let occupied = scene.occupied(&device("a", 0), 1, 0, true);
        scene.hello("a", 1, vec![occupied]);
        scene.wait(2.0, &["a"]);
        if !lost {
            let occupied = scene.occupied(&device("b", 0), 1, 1, true);
            scene.hello("b", 1, vec![occupied]);
            scene.wait(10.0, &["a", "b"]);
            assert_eq!((scene.run().generation, scene.history.len()), (1, 1));
            assert_eq!(scene.run().step, 7);
        } else {
            scene.wait(13.0, &["a"]);
            scene.leave("a", 1, 0, 0, Cause::Collective, 7);
            assert_eq!(failed(&scene.history[1].event), (1, Some(1), 7));
            assert_eq!(scene.start(7), [device("a", 0)]);
        }
    }
}

#[test]
fn a_rank_that_finished_while_its_coordinator_was_away_is_no_failure() {
    for gone in [false, true] {
        let mut before = Scene::with_run(1, 1);
        before.hello("a", 1, vec![]);
        before.start(0);
        let mut scene = Scene::new();
        scene.history = before.history;
        scene.roster.add(run("r", 1, 1, scene.now(), &scene.history));
        let occupied = scene.occupied(&device("a", 0), 1, 0, false);
        scene.hello("a", 1, if gone { vec![] } else { vec![occupied] });
        scene.wait(1.0, &["a"]);
        scene.say("a", 1, 0, 0, Said::Finished(pb::Finished { key: "m".into(), digests: Default::default() }));
        scene.leave("a", 1, 0, 0, Cause::Finished, 10);
        assert_eq!((scene.state(), scene.history.len()), (pb::RunState::Done, 2));
    }
}

#[test]
fn survivors_of_a_generation_that_failed_while_the_coordinator_was_away_are_kept() {
    let mut before = Scene::with_run(2, 2);
    before.hello("a", 2, vec![]);
    before.start(0);
    let mut scene = Scene::new();
    scene.history = before.history;
    scene.roster.add(run("r", 2, 2, scene.now(), &scene.history));
    let occupied = vec![scene.occupied(&device("a", 1), 1, 1, false)];
    scene.hello("a", 2, occupied);
    scene.wait(5.5, &["a"]);
    assert_eq!(failed(&scene.history[1].event), (1, Some(0), 7));
    assert!(!scene.sent.iter().any(|(_, message)| matches!(message, Message::Kill(_))), "{:?}", scene.sent);
    assert_eq!(scene.start(7), [device("a", 1), device("a", 0)], "rank 0 holds the state");
}

#[test]
fn of_two_waiting_runs_that_hold_too_little_each_the_first_gets_what_the_later_one_holds() {
    let mut scene = Scene::with_run(2, 2);
    scene.roster.add(run("later", 2, 2, scene.now(), &[]));
    let first = scene.occupied(&device("a", 0), 1, 0, false);
    let later = pb::Occupied { run: "later".into(), ..scene.occupied(&device("a", 1), 1, 0, false) };
    scene.hello("a", 2, vec![first, later]);
    scene.wait(2.0, &["a"]);
    let kills = scene.sent.iter().filter(|(_, message)| matches!(message, Message::Kill(_)));
    assert_eq!(kills.count(), 1);
    assert_eq!(scene.start(7), [device("a", 0), device("a", 1)]);
}

#[test]
fn the_queue_is_served_in_order_and_a_run_that_can_never_start_does_not_block_it() {
    let mut scene = Scene::with_run(8, 8);
    scene.roster.add(run("small", 1, 1, scene.now(), &[]));
    scene.hello("a", 2, vec![]);
    scene.wait(2.0, &["a"]);
    assert_eq!(scene.roster.find("small").map(Run::state), Some(pb::RunState::Running));
    assert_eq!(scene.state(), pb::RunState::Waiting);
}
