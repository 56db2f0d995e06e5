use super::*;
use proto::pb::rank_message::Message as Said;

/// A roster, its clock, and what it has decided; the agents answer as real ones do.
struct Scene {
    roster: Roster,
    seconds: f64,
    history: Vec<EventRecord>,
    sent: Vec<(String, Message)>,
}

impl Scene {
    fn new() -> Self {
        Self { roster: Roster::default(), seconds: 0.0, history: Vec::new(), sent: Vec::new() }
    }

    /// A run of 2 to 2 ranks that detects failures after 4 seconds.
    fn with_run(min: u32, max: u32) -> Self {
        let mut scene = Self::new();
        scene.roster.add("r".into(), run(min, max, scene.now(), &[]));
        scene
    }

    fn now(&self) -> Now {
        Now { at: Duration::from_secs_f64(self.seconds), wall: (self.seconds * 1000.0) as u64 }
    }

    fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Write { event, .. } => {
                    let n = self.history.len() as u64 + 1;
                    self.history.push(EventRecord {
                        n,
                        term: 1,
                        nonce: String::new(),
                        at_millis: self.now().wall,
                        event,
                    });
                }
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

    fn hello(&mut self, agent: &str, devices: usize, occupied: Vec<pb::Occupied>) {
        let hello = pb::Hello {
            agent: agent.into(),
            advertise_address: format!("{agent}.local"),
            devices: vec!["cpu".into(); devices],
            occupied,
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
                self.roster.heartbeat(self.now(), agent, &[0; 8]);
            }
            let actions = self.roster.tick(self.now());
            self.take(actions);
        }
    }

    fn say(&mut self, agent: &str, generation: u64, rank: u32, device: u32, said: Said) {
        let message = pb::RankMessage { run: "r".into(), generation, rank, device, message: Some(said) };
        let actions = self.roster.rank(self.now(), agent, &message);
        self.take(actions);
    }

    fn leave(&mut self, agent: &str, generation: u64, rank: u32, device: u32, why: Why, step: u64) {
        let left = pb::Left { why: why.into(), step, detail: format!("{why:?}") };
        self.say(agent, generation, rank, device, Said::Left(left));
    }

    /// The first agent serves the newest generation and all its ranks join. Returns them as (agent, device).
    fn start(&mut self, step: u64) -> Vec<Place> {
        let generation = self.roster.runs["r"].generation;
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
                    members.push((agent.clone(), join.device));
                }
                _ => {}
            }
        }
        for (rank, (agent, device)) in (0u32..).zip(&members) {
            self.say(agent, generation, rank, *device, Said::Joined(pb::Joined { step, steps_per_epoch: 10 }));
        }
        members
    }

    fn sent_serve(&self) -> &str {
        let served = self.sent.iter().rev().find(|(_, message)| matches!(message, Message::Serve(_)));
        &served.expect("a generation was formed").0
    }

    fn state(&self) -> pb::RunState {
        self.roster.runs["r"].state()
    }

    fn last(&self) -> &RunEvent {
        &self.history.last().expect("something was written").event
    }

    fn occupied(&self, place: &Place, generation: u64, rank: u32, joined: bool) -> pb::Occupied {
        pb::Occupied { device: place.1, run: "r".into(), generation, rank, joined, step: 7 }
    }
}

fn run(min: u32, max: u32, now: Now, events: &[EventRecord]) -> Run {
    let mut spec = RunSpec::from_toml("dataset = \"d\"").expect("one line is enough");
    (spec.ranks.min, spec.ranks.max, spec.ranks.failure_detection_seconds) = (min, max, 4.0);
    Run::recovered(now, spec, ("key".into(), "sha".into()), 10, events)
}

fn place(agent: &str, device: u32) -> Place {
    (agent.into(), device)
}

#[test]
fn a_run_waits_for_its_ranks_then_trains_and_frees_its_devices_when_it_is_done() {
    let mut scene = Scene::with_run(2, 2);
    scene.hello("a", 1, vec![]);
    scene.wait(3.0, &["a"]);
    assert_eq!(scene.state(), pb::RunState::Waiting);
    assert_eq!(scene.roster.runs["r"].reason, "needs 2 ranks; 1 devices are free on 1 agents");
    scene.hello("b", 1, vec![]);
    assert_eq!(scene.start(0), [place("a", 0), place("b", 0)]);
    assert_eq!(scene.state(), pb::RunState::Running);
    scene.say("a", 1, 0, 0, Said::Stepped(pb::Stepped { step: 5, metrics: vec![] }));
    scene.say("b", 1, 1, 0, Said::Stepped(pb::Stepped { step: 4, metrics: vec![] }));
    assert_eq!(scene.roster.runs["r"].step, 5, "rank 0 alone speaks for the run");
    let made = pb::Checkpointed { step: 5, key: "c".into(), digests: Default::default() };
    scene.say("a", 1, 0, 0, Said::Checkpointed(made));
    assert!(matches!(scene.last(), RunEvent::Checkpoint { step: 5, .. }));
    scene.say("a", 1, 0, 0, Said::Finished(pb::Finished { key: "m".into(), digests: Default::default() }));
    assert!(matches!(scene.last(), RunEvent::Done { .. }));
    scene.leave("a", 1, 0, 0, Why::Finished, 10);
    assert_eq!(scene.roster.agents["a"].devices[0].occupant, None);
    scene.wait(5.0, &["a", "b"]);
    assert_eq!(scene.roster.agents["b"].devices[0].occupant, None, "it did not leave by itself");
    assert_eq!(scene.history.len(), 3);
}

#[test]
fn a_rank_that_exits_is_named_and_the_next_generation_begins_with_the_survivor() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 2, vec![]);
    assert_eq!(scene.start(0), [place("a", 0), place("a", 1)]);
    scene.say("a", 1, 0, 0, Said::Stepped(pb::Stepped { step: 7, metrics: vec![] }));
    // The survivor's word comes first, but it only felt the other's death.
    scene.leave("a", 1, 1, 1, Why::Collective, 7);
    let aborts = |(_, message): &&(String, Message)| matches!(message, Message::Leave(leave) if leave.abort);
    assert_eq!(scene.sent.iter().filter(aborts).count(), 1);
    assert!(matches!(scene.last(), RunEvent::Generation { .. }), "who was at fault is not known yet");
    scene.leave("a", 1, 0, 0, Why::Exited, 0);
    let failure = &scene.history[1].event;
    assert!(matches!(failure, RunEvent::Failure { generation: 1, rank: Some(0), step: 7, .. }), "{failure:?}");
    scene.wait(1.5, &["a"]);
    assert_eq!(scene.start(7), [place("a", 1), place("a", 0)], "rank 0 holds the state");
    assert_eq!(scene.roster.runs["r"].generation, 2);
}

#[test]
fn an_agent_may_be_away_for_a_moment_but_not_for_long() {
    let mut scene = Scene::with_run(1, 2);
    scene.hello("a", 1, vec![]);
    scene.hello("b", 1, vec![]);
    scene.start(0);
    scene.roster.disconnected("b");
    scene.wait(3.0, &["a"]);
    let here = scene.occupied(&place("b", 0), 1, 1, true);
    scene.hello("b", 1, vec![here]);
    scene.wait(3.0, &["a", "b"]);
    assert_eq!((scene.state(), scene.history.len()), (pb::RunState::Running, 1));
    scene.roster.disconnected("b");
    scene.wait(4.5, &["a"]);
    scene.leave("a", 1, 0, 0, Why::Collective, 3);
    assert!(matches!(scene.history[1].event, RunEvent::Failure { rank: Some(1), .. }));
    scene.wait(1.5, &["a"]);
    assert_eq!(scene.start(3), [place("a", 0)], "one rank is enough");
}

#[test]
fn a_silent_rank_is_killed_and_those_that_do_not_leave_are_killed_too() {
    let mut scene = Scene::with_run(2, 2);
    scene.hello("a", 2, vec![]);
    scene.start(0);
    scene.roster.heartbeat(scene.now(), "a", &[0, 4000]);
    let actions = scene.roster.tick(scene.now());
    scene.take(actions);
    let kills = |scene: &Scene, device| {
        let is = |(_, message): &&(String, Message)| *message == Message::Kill(pb::Kill { device });
        scene.sent.iter().filter(is).count()
    };
    assert_eq!((kills(&scene, 0), kills(&scene, 1) > 0), (0, true));
    scene.wait(5.0, &["a"]);
    assert_eq!(kills(&scene, 0), 1);
    assert!(matches!(scene.history[1].event, RunEvent::Failure { rank: Some(1), .. }));
    assert_eq!(scene.roster.runs["r"].generation, 2);
}

#[test]
fn generations_that_fail_without_a_step_between_them_end_the_run() {
    let mut scene = Scene::with_run(1, 1);
    scene.hello("a", 1, vec![]);
    for generation in 1..=3 {
        scene.start(0);
        scene.leave("a", generation, 0, 0, Why::Error, 0);
        scene.wait(9.0, &["a"]);
    }
    assert_eq!(scene.state(), pb::RunState::Failed);
    assert!(matches!(scene.last(), RunEvent::Failed { reason } if reason.contains("WHY") || reason.contains("Error")));
    let actions = scene.roster.resume("r", "again".into());
    scene.take(actions);
    scene.wait(1.5, &["a"]);
    assert_eq!(scene.roster.runs["r"].generation, 4);
}

#[test]
fn a_cancelled_run_leaves_with_a_checkpoint() {
    let mut scene = Scene::with_run(1, 1);
    scene.hello("a", 1, vec![]);
    scene.start(0);
    let actions = scene.roster.cancel(scene.now(), "r");
    scene.take(actions);
    assert_eq!(scene.state(), pb::RunState::Cancelling);
    assert!(matches!(&scene.sent.last(), Some((_, Message::Leave(leave))) if leave.checkpoint && !leave.abort));
    let made = pb::Checkpointed { step: 3, key: "c".into(), digests: Default::default() };
    scene.say("a", 1, 0, 0, Said::Checkpointed(made));
    scene.leave("a", 1, 0, 0, Why::Asked, 3);
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
    scene.wait(5.0, &["a", "b"]);
    assert!(!matches!(scene.sent.last(), Some((_, Message::Leave(_)))));
    scene.wait(6.0, &["a", "b"]);
    assert!(matches!(scene.sent.last(), Some((_, Message::Leave(leave))) if !leave.abort && !leave.checkpoint));
    scene.leave("a", 1, 0, 0, Why::Asked, 5);
    scene.wait(1.5, &["a", "b"]);
    assert_eq!(scene.start(5), [place("a", 0), place("b", 0)]);
    assert!(!scene.history.iter().any(|record| matches!(record.event, RunEvent::Failure { .. })));
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
        scene.roster.add("r".into(), run(1, 2, scene.now(), &scene.history));
        let occupied = scene.occupied(&place("a", 0), 1, 0, true);
        scene.hello("a", 1, vec![occupied]);
        scene.wait(2.0, &["a"]);
        if !lost {
            let occupied = scene.occupied(&place("b", 0), 1, 1, true);
            scene.hello("b", 1, vec![occupied]);
            scene.wait(10.0, &["a", "b"]);
            assert_eq!((scene.roster.runs["r"].generation, scene.history.len()), (1, 1));
            assert_eq!(scene.roster.runs["r"].step, 7);
        } else {
            scene.wait(6.0, &["a"]);
            scene.leave("a", 1, 0, 0, Why::Collective, 7);
            scene.wait(1.5, &["a"]);
            assert!(matches!(scene.history[1].event, RunEvent::Failure { rank: Some(1), step: 7, .. }));
            assert_eq!(scene.start(7), [place("a", 0)]);
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
        scene.roster.add("r".into(), run(1, 1, scene.now(), &scene.history));
        let occupied = scene.occupied(&place("a", 0), 1, 0, false);
        scene.hello("a", 1, if gone { vec![] } else { vec![occupied] });
        scene.wait(1.0, &["a"]);
        scene.say("a", 1, 0, 0, Said::Finished(pb::Finished { key: "m".into(), digests: Default::default() }));
        scene.leave("a", 1, 0, 0, Why::Finished, 10);
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
    scene.roster.add("r".into(), run(2, 2, scene.now(), &scene.history));
    let occupied = vec![scene.occupied(&place("a", 1), 1, 1, false)];
    scene.hello("a", 2, occupied);
    scene.wait(5.5, &["a"]);
    assert!(matches!(scene.history[1].event, RunEvent::Failure { rank: Some(0), step: 7, .. }), "{:?}", scene.history);
    assert!(!scene.sent.iter().any(|(_, message)| matches!(message, Message::Kill(_))), "{:?}", scene.sent);
    assert_eq!(scene.start(7), [place("a", 1), place("a", 0)], "rank 0 holds the state");
}

#[test]
fn of_two_waiting_runs_that_hold_too_little_each_the_first_gets_what_the_later_one_holds() {
    let mut scene = Scene::with_run(2, 2);
    scene.roster.add("later".into(), run(2, 2, scene.now(), &[]));
    let first = scene.occupied(&place("a", 0), 1, 0, false);
    let later = pb::Occupied { run: "later".into(), ..scene.occupied(&place("a", 1), 1, 0, false) };
    scene.hello("a", 2, vec![first, later]);
    scene.wait(2.0, &["a"]);
    let kills = scene.sent.iter().filter(|(_, message)| matches!(message, Message::Kill(_)));
    assert_eq!(kills.count(), 1);
    assert_eq!(scene.start(7), [place("a", 0), place("a", 1)]);
}

#[test]
fn the_queue_is_served_in_order_and_a_run_that_can_never_start_does_not_block_it() {
    let mut scene = Scene::with_run(8, 8);
    let small = run(1, 1, scene.now(), &[]);
    scene.roster.add("small".into(), small);
    scene.hello("a", 2, vec![]);
    scene.wait(2.0, &["a"]);
    assert_eq!(scene.roster.runs["small"].state(), pb::RunState::Running);
    assert_eq!(scene.state(), pb::RunState::Waiting);
}
