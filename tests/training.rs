//! From a dataset to a trained model, with real rank processes and real kills.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use demo_origin::{origin::Origin, pictures::CLASSES, rot};
use support::{Cluster, kill};

/// The dataset `small`: 5 classes of 40 pictures, 64 x 64.
fn dataset(cluster: &mut Cluster) {
    cluster.start_worker("worker");
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let origin = runtime.block_on(Origin::start(11)).expect("loopback");
    let list: String = (0..200)
        .map(|n| {
            let class = n as usize % 5;
            format!("{}\t{}\n", CLASSES[class].synset, rot::url(rot::Rot::Good, (class, n), n, &origin))
        })
        .collect();
    let urls = cluster.write("urls.txt", &list);
    let splits = ["--validation", "0.15", "--test", "0.15", "--size", "72", "--slice-urls", "50"];
    let wait = ["--wait", "--timeout", "120s"];
    cluster.gleaner(&[&["dataset", "create", "small", "--urls", &urls], &splits[..], &wait].concat());
}

/// Submits a run on `small` that takes `epochs` epochs of 9 steps or so.
fn submit(cluster: &Cluster, name: &str, epochs: u32, set: &[&str]) {
    let spec = cluster.write(
        &format!("{name}.toml"),
        &format!(
            r#"
dataset = "small"
seed = 3
model = {{ arch = "alexnet-slim", width = 0.25, dropout = 0.1 }}
input = {{ crop = 64 }}
train = {{ epochs = {epochs}, batch = 16, learning_rate = 0.02 }}
ranks = {{ min = 1, max = 3, lanes = 4, threads = 1, failure_detection_seconds = 4 }}
"#
        ),
    );
    let set: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
    cluster.gleaner(&[&["run", "submit", "-f", &spec, "--name", name], &set[..]].concat());
}

fn wait(cluster: &Cluster, run: &str) {
    cluster.gleaner(&["run", "wait", run, "--timeout", "120s"]);
}

fn step(cluster: &Cluster, run: &str) -> u64 {
    cluster.json(&["run", "describe", run])["step"].as_u64().unwrap_or(0)
}

/// What was trained on: for each step its samples' count and digest, those of the highest generation.
fn ledger(cluster: &Cluster, run: &str) -> BTreeMap<u64, (u64, String)> {
    let mut lines = BTreeMap::<u64, (u64, (u64, String))>::new();
    let folder = Path::new(&cluster.store).join(proto::keys::ledgers(run));
    for file in std::fs::read_dir(folder).expect("a ledger") {
        let file = file.expect("a file").path();
        let generation = proto::keys::number(&file.display().to_string()).expect("numbered by its generation");
        let ledger: serde_json::Value = serde_json::from_slice(&std::fs::read(file).expect("a file")).expect("JSON");
        for line in ledger["lines"].as_array().expect("lines") {
            let n = |key: &str| line[key].as_u64().unwrap_or_else(|| panic!("no {key} in {line}"));
            let entry = (generation, (n("samples"), line["digest"].to_string()));
            let known = lines.entry(n("step")).or_insert_with(|| entry.clone());
            if known.0 < generation {
                *known = entry;
            }
        }
    }
    lines.into_iter().map(|(step, (_, line))| (step, line)).collect()
}

#[test]
fn a_run_on_two_ranks_learns_and_leaves_a_model() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 2);
    submit(&cluster, "learn", 8, &["ranks.min=2", "ranks.max=2"]);
    wait(&cluster, "learn");
    let run = cluster.json(&["run", "describe", "learn"]);
    assert_eq!((run["state"].as_str(), run["world_size"].as_u64()), (Some("done"), Some(2)), "{run}");
    let validated = run["last_validation"]["top1"].as_f64().expect("a share");
    assert!(validated > 0.4, "5 classes, chance 0.2: {run}");
    assert!(run["test"]["samples"].as_u64() > Some(10), "{run}");
    let model = Path::new(&cluster.store).join(proto::keys::model("learn"));
    let weights = std::fs::read(model.join("model.safetensors")).expect("the model");
    assert!(weights.len() > 100_000);
    assert!(!cluster.gleaner(&["run", "logs", "learn"]).is_empty());
}

#[test]
fn ledgers_are_equal_whatever_the_ranks_and_whoever_is_killed() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 3);
    for (run, world) in [("one", 1), ("three", 3)] {
        submit(&cluster, run, 60, &[&format!("ranks.min={world}"), &format!("ranks.max={world}")]);
        wait(&cluster, run);
    }
    let undisturbed = ledger(&cluster, "one");
    assert!(undisturbed.len() >= 60 * 5, "{undisturbed:?}");
    assert_eq!(undisturbed.keys().copied().collect::<Vec<_>>(), (1..=undisturbed.len() as u64).collect::<Vec<_>>());
    assert_eq!(ledger(&cluster, "three"), undisturbed);

    submit(&cluster, "killed", 60, &["ranks.min=2"]);
    for at in [20, 120] {
        cluster.eventually("the run has gone so far", |cluster| step(cluster, "killed") >= at);
        let ranks = cluster.ranks();
        kill(*ranks.first().expect("ranks run"));
    }
    wait(&cluster, "killed");
    assert_eq!(ledger(&cluster, "killed"), undisturbed);
    let events = cluster.json(&["run", "describe", "killed"])["events"].to_string();
    assert!(events.contains("failure"), "the kills were noticed: {events}");
}

#[test]
fn a_run_survives_its_coordinator_and_its_agent_and_a_cancel() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 1);
    submit(&cluster, "undisturbed", 90, &["ranks.max=1"]);
    wait(&cluster, "undisturbed");

    submit(&cluster, "disturbed", 90, &["ranks.max=1", "checkpoint.every_epochs=0.5"]);
    cluster.eventually("the run has begun", |cluster| step(cluster, "disturbed") >= 2);
    cluster.kill("coordinator");
    cluster.start_coordinator();
    let seen = step(&cluster, "disturbed");
    cluster.eventually("the run goes on", |cluster| step(cluster, "disturbed") > seen);

    // All ranks are lost: back to the last checkpoint.
    cluster.kill("trainer");
    cluster.start_trainer("another-trainer", 1);
    let seen = step(&cluster, "disturbed");
    cluster.eventually("the run goes on", |cluster| step(cluster, "disturbed") > seen);

    cluster.gleaner(&["run", "cancel", "disturbed"]);
    cluster.eventually("it is cancelled", |cluster| {
        cluster.json(&["run", "describe", "disturbed"])["state"] == "cancelled"
    });
    cluster.gleaner(&["run", "resume", "disturbed"]);
    wait(&cluster, "disturbed");
    assert_eq!(ledger(&cluster, "disturbed"), ledger(&cluster, "undisturbed"));
    let test = |run| cluster.json(&["run", "describe", run])["test"].clone();
    let (disturbed, undisturbed) = (test("disturbed"), test("undisturbed"));
    let loss = |test: &serde_json::Value| test["loss"].as_f64().expect("a loss");
    assert!((loss(&disturbed) - loss(&undisturbed)).abs() < 1e-3 * loss(&undisturbed), "{disturbed} {undisturbed}");
}
