//! Ranks, agents and networks that fail under a run: how soon the others go on, who is named, and that nothing is lost
//! or doubled.
//!
//! Each agent is a process with one device and an address of its own: on loopback, or in a network namespace.

#![allow(clippy::print_stdout, reason = "the measured times are what people run these tests for, too")]

mod small;

use std::time::{Duration, Instant};

use serde_json::Value;
use small::{dataset, step, submit, verify, wait, wait_for};
use support::Cluster;
use support::net::Net;
use support::process::{parent, signal};

/// `failure_detection` of these runs: `FAILURE_DETECTION` seconds, or 3.
fn detection() -> Duration {
    let given = std::env::var("FAILURE_DETECTION");
    Duration::from_secs(given.map_or(3, |text| text.parse().expect("a number of seconds")))
}

/// Within so much more than that the first collective of the next generation must be done ...
const MARGIN: Duration = Duration::from_secs(2);
/// ... and this is for a machine that has other work.
const SLACK: Duration = Duration::from_secs(4);

/// Three agents at 127.0.0.11, .12 and .13.
fn agents(cluster: &mut Cluster) -> Vec<Machine> {
    (0..3)
        .map(|n| {
            let machine =
                Machine { name: format!("trainer-{n}"), address: format!("127.0.0.{}", 11 + n), namespace: None };
            machine.start(cluster);
            machine
        })
        .collect()
}

struct Machine {
    name: String,
    address: String,
    namespace: Option<String>,
}

impl Machine {
    fn start(&self, cluster: &mut Cluster) {
        let args = ["trainer", "--devices", "cpu", "--advertise-address", &self.address];
        cluster.spawn_in(self.namespace.as_deref(), &self.name, &args);
    }

    fn rank(&self, cluster: &Cluster) -> u32 {
        let agent = cluster.pid(&self.name);
        let of_it = |pid: &u32| parent(*pid) == Some(agent);
        cluster.ranks().into_iter().find(of_it).expect("its rank runs")
    }
}

/// The run with its newest generation, which has so many ranks and trains.
fn settled(cluster: &Cluster, run: &str, ranks: u64) -> u64 {
    let mut seen = None;
    cluster.eventually(&format!("{run} trains on {ranks} ranks"), |cluster| {
        let now = cluster.json(&["run", "describe", run]);
        let (generation, step) = (now["generation"].as_u64().unwrap_or(0), now["step"].as_u64().unwrap_or(0));
        if now["world_size"] != ranks || now["state"] != "running" {
            seen = None;
            return false;
        }
        // It moves, so all of them have joined.
        match seen {
            Some((same, from)) if same == generation => step > from + 3,
            _ => {
                seen = Some((generation, step));
                false
            }
        }
    });
    seen.expect("it was seen").0
}

/// The machine of a rank in the newest generation.
fn machine_of<'a>(cluster: &Cluster, run: &str, rank: usize, machines: &'a [Machine]) -> &'a Machine {
    let events = cluster.json(&["run", "describe", run])["events"].clone();
    let events = events.as_array().expect("a list");
    let formed = events.iter().rfind(|event| event["event"]["kind"] == "generation").expect("one was formed");
    let agent = &formed["event"]["members"][rank]["agent"];
    let status = cluster.json(&["status"]);
    let agents = status["agents"].as_array().expect("a list");
    let address = &agents.iter().find(|other| other["agent"] == *agent).expect("it is connected")["address"];
    machines.iter().find(|machine| address == &machine.address).expect("one of ours")
}

/// Disturbs the run, and looks how it goes on: the survivors' first collective in time, and the culprit named.
fn disturb(
    cluster: &mut Cluster,
    run: &str,
    what: &str,
    victim: (&Machine, usize),
    within: Duration,
    act: impl FnOnce(&mut Cluster),
) {
    let generation = settled(cluster, run, 3);
    let now = support::seconds_of_day();
    act(cluster);
    let mut took = None;
    cluster.eventually(&format!("generation {} after {what}", generation + 1), |cluster| {
        took = cluster.agreed(run, generation + 1).map(|at| Duration::from_secs_f64((at - now).rem_euclid(86_400.0)));
        took.is_some()
    });
    let took = took.expect("it was seen");
    println!("{what}: the next generation's first collective was done after {:.2} s", took.as_secs_f64());
    assert!(took <= within + MARGIN + SLACK, "{what}: {took:?}");
    let culprit = failures(cluster, run).pop().expect("a failure")["culprit"].clone();
    let (machine, rank) = victim;
    assert_eq!(
        (culprit["address"].as_str(), culprit["rank"].as_u64()),
        (Some(machine.address.as_str()), Some(rank as u64))
    );
    assert!(
        culprit["device"] == "cpu" && culprit["activity"].as_str().is_some_and(|activity| !activity.is_empty()),
        "{culprit}"
    );
    let silent = Duration::from_millis(culprit["silent_millis"].as_u64().expect("a number"));
    assert!(silent + Duration::from_millis(10) >= within, "{what}: {culprit}");
}

fn failures(cluster: &Cluster, run: &str) -> Vec<Value> {
    let events = cluster.json(&["run", "describe", run])["events"].clone();
    let events = events.as_array().expect("a list").iter().map(|event| event["event"].clone());
    events.filter(|event| event["kind"] == "failure").collect()
}

/// Ends the disturbed run, and trains as many steps undisturbed.
fn assert_same_samples(cluster: &Cluster, disturbed: &str) {
    cluster.gleaner(&["run", "cancel", disturbed]);
    cluster
        .eventually("it is cancelled", |cluster| cluster.json(&["run", "describe", disturbed])["state"] == "cancelled");
    let steps = step(cluster, disturbed);
    let epochs =
        steps.div_ceil(cluster.json(&["run", "describe", disturbed])["steps_per_epoch"].as_u64().expect("a number"));
    submit(cluster, "undisturbed", epochs as u32, &["ranks.max=1"]);
    wait(cluster, "undisturbed");
    let found = verify(cluster, disturbed, "undisturbed");
    assert_eq!((found["steps_a"].as_u64(), found["steps_equal"].as_u64()), (Some(steps), Some(steps)), "{found}");
    println!("{disturbed}: {steps} steps on the same samples as undisturbed");
    cluster.gleaner(&["fsck"]);
}

#[test]
fn ranks_and_agents_that_die_or_hang_are_noticed_in_time_and_named() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    let machines = agents(&mut cluster);
    let seconds = format!("ranks.failure_detection_seconds={}", detection().as_secs());
    submit(&cluster, "run", 9999, &[&seconds, "checkpoint.every_epochs=20"]);

    settled(&cluster, "run", 3);
    let victim = machine_of(&cluster, "run", 2, &machines);
    disturb(&mut cluster, "run", "kill -9 of a rank", (victim, 2), Duration::ZERO, |cluster| {
        signal(victim.rank(cluster), "KILL");
    });

    settled(&cluster, "run", 3);
    let victim = machine_of(&cluster, "run", 0, &machines);
    disturb(
        &mut cluster,
        "run",
        "kill -9 of the agent that serves the store",
        (victim, 0),
        Duration::ZERO,
        |cluster| {
            cluster.kill(&victim.name);
        },
    );
    victim.start(&mut cluster);

    settled(&cluster, "run", 3);
    let victim = machine_of(&cluster, "run", 1, &machines);
    disturb(&mut cluster, "run", "SIGSTOP of a rank", (victim, 1), detection(), |cluster| {
        signal(victim.rank(cluster), "STOP");
    });

    settled(&cluster, "run", 3);
    let victim = machine_of(&cluster, "run", 0, &machines);
    disturb(&mut cluster, "run", "SIGSTOP of the agent that serves the store", (victim, 0), detection(), |cluster| {
        signal(cluster.pid(&victim.name), "STOP");
    });
    signal(cluster.pid(&victim.name), "CONT");
    settled(&cluster, "run", 3);
    assert_same_samples(&cluster, "run");
}

#[test]
fn a_machine_whose_network_is_cut_is_left_behind_and_comes_back() {
    let Some(net) = Net::start(3) else { return };
    let mut cluster = Cluster::listening_at(&net.gateway());
    cluster.start_coordinator_with(&["--insecure"]);
    dataset(&mut cluster);
    let machines: Vec<Machine> = (0..3)
        .map(|n| Machine { name: format!("trainer-{n}"), address: net.address(n), namespace: Some(net.name(n)) })
        .collect();
    // Found by the route to the coordinator, by the interface's name, and told.
    for (machine, address) in
        machines.iter().zip([&[][..], &["--interface", "eth0"], &["--advertise-address", &net.address(2)]])
    {
        let args = [&["trainer", "--devices", "cpu"], address].concat();
        cluster.spawn_in(machine.namespace.as_deref(), &machine.name, &args);
    }
    let seconds = format!("ranks.failure_detection_seconds={}", detection().as_secs());
    submit(&cluster, "run", 9999, &[&seconds]);
    settled(&cluster, "run", 3);
    let victim = machine_of(&cluster, "run", 0, &machines);
    let number = machines.iter().position(|machine| machine.name == victim.name).expect("one of them");
    disturb(&mut cluster, "run", "cut network of the agent that serves the store", (victim, 0), detection(), |_| {
        net.cut(number)
    });
    net.mend(number);
    settled(&cluster, "run", 3);
    assert_same_samples(&cluster, "run");
}

#[test]
fn agents_come_and_go_in_order_without_a_failure() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    let machines = agents(&mut cluster);
    cluster.kill(&machines[1].name);
    cluster.kill(&machines[2].name);
    submit(&cluster, "run", 9999, &["ranks.min=2"]);
    cluster.eventually("it says what it waits for", |cluster| {
        let run = cluster.json(&["run", "describe", "run"]);
        run["state"] == "waiting"
            && run["reason"].as_str().is_some_and(|reason| reason.starts_with("needs 2 ranks; 1 devices are free"))
    });
    machines[1].start(&mut cluster);
    settled(&cluster, "run", 2);
    machines[2].start(&mut cluster);
    settled(&cluster, "run", 3);
    signal(cluster.pid(&machines[0].name), "TERM");
    settled(&cluster, "run", 2);
    cluster.eventually("the agent has ended", |cluster| !cluster.is_alive(&machines[0].name));
    // A rank alone that is told to end leaves in order, too, and is replaced.
    let rank = machines[1].rank(&cluster);
    signal(rank, "TERM");
    cluster.eventually("the rank has ended", |_| parent(rank).is_none());
    settled(&cluster, "run", 2);
    assert!(failures(&cluster, "run").is_empty(), "{:?}", failures(&cluster, "run"));
    assert_same_samples(&cluster, "run");
}

/// `make soak-train`: something is killed every ten seconds for `SECONDS`.
#[test]
#[ignore = "takes a quarter of an hour"]
fn soak() {
    let begun = Instant::now();
    let seconds: u64 = std::env::var("SECONDS_OF_KILLS").map_or(300, |text| text.parse().expect("a number of seconds"));
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    let machines = agents(&mut cluster);
    let calibration = Instant::now();
    submit(&cluster, "calibration", 20, &[]);
    wait(&cluster, "calibration");
    // Undisturbed it would take these seconds, and the kills hold it up for some more.
    let epochs = (seconds as f64 / calibration.elapsed().as_secs_f64() * 20.0).ceil() as u32;
    submit(&cluster, "undisturbed", epochs, &["ranks.max=1"]);
    wait_for(&cluster, "undisturbed", Duration::from_secs(1800));
    submit(&cluster, "killed", epochs, &["ranks.failure_detection_seconds=3"]);
    cluster.eventually("it trains", |cluster| step(cluster, "killed") > 0);
    let (kills_begun, mut kills) = (Instant::now(), 0);
    while kills_begun.elapsed() < Duration::from_secs(seconds)
        && cluster.json(&["run", "describe", "killed"])["state"] != "done"
    {
        std::thread::sleep(Duration::from_secs(10));
        let victim = &machines[kills % 3];
        match kills % 2 {
            0 => {
                cluster.kill(&victim.name);
                victim.start(&mut cluster);
            }
            _ => match cluster.ranks().first() {
                Some(rank) => signal(*rank, "KILL"),
                None => continue,
            },
        }
        kills += 1;
    }
    wait_for(&cluster, "killed", Duration::from_secs(1800));
    let run = cluster.json(&["run", "describe", "killed"]);
    let found = verify(&cluster, "killed", "undisturbed");
    let (generations, equal) = (&run["generation"], u8::from(found["equal"] == true));
    let (steps, seconds) = (&found["steps_equal"], begun.elapsed().as_secs());
    println!(
        "soak-train: kills={kills} generations={generations} steps={steps} ledger_equal={equal} seconds={seconds}"
    );
    assert_eq!((run["state"].as_str(), equal), (Some("done"), 1), "{found}");
}
