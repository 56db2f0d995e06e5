//! From a dataset to a trained model, with real rank processes and real kills.

mod small;

use std::path::Path;

use small::{dataset, step, submit, submit_from, verify, wait};
use support::{Cluster, process::kill};

#[test]
fn a_run_on_two_ranks_learns_and_leaves_a_model() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 2);
    submit(&cluster, "learn", 16, &["ranks.min=2", "ranks.max=2"]);
    wait(&cluster, "learn");
    let run = cluster.json(&["run", "describe", "learn"]);
    assert_eq!((run["state"].as_str(), run["world_size"].as_u64()), (Some("done"), Some(2)), "{run}");
    let validated = run["last_validation"]["top1"].as_f64().expect("a share");
    assert!(validated > 0.4, "5 classes, chance 0.2: {run}");
    assert!(run["test"]["samples"].as_u64() > Some(10), "{run}");
    let done = run["events"].as_array().and_then(|events| events.last()).expect("an event")["event"].clone();
    let model = Path::new(cluster.store()).join(done["model"].as_str().expect("it is named"));
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
    let found = verify(&cluster, "one", "three");
    assert!(found["equal"] == true && found["steps_a"].as_u64() >= Some(60 * 5), "{found}");

    submit(&cluster, "of-old", 1, &["plan=1"]);
    wait(&cluster, "of-old");
    let found = verify(&cluster, "of-old", "one");
    assert!(found["plan_a"] == 1 && found["plan_b"] == 2, "{found}");

    submit(&cluster, "killed", 60, &["ranks.min=2"]);
    for at in [20, 120] {
        cluster.eventually("the run has gone so far", |cluster| step(cluster, "killed") >= at);
        let ranks = cluster.ranks();
        kill(*ranks.first().expect("ranks run"));
    }
    wait(&cluster, "killed");
    let found = verify(&cluster, "killed", "one");
    assert!(found["equal"] == true, "{found}");
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
    let found = verify(&cluster, "disturbed", "undisturbed");
    assert!(found["equal"] == true, "{found}");
    let test = |run| cluster.json(&["run", "describe", run])["test"].clone();
    let (disturbed, undisturbed) = (test("disturbed"), test("undisturbed"));
    let loss = |test: &serde_json::Value| test["loss"].as_f64().expect("a loss");
    assert!((loss(&disturbed) - loss(&undisturbed)).abs() < 1e-3 * loss(&undisturbed), "{disturbed} {undisturbed}");
}

#[test]
fn a_run_goes_on_from_an_older_checkpoint_than_a_damaged_one_and_another_begins_with_its_weights() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 1);
    submit(&cluster, "undisturbed", 7, &["ranks.max=1"]);
    wait(&cluster, "undisturbed");
    submit(&cluster, "run", 7, &["ranks.max=1", "checkpoint.every_epochs=1", "checkpoint.keep=2"]);
    let checkpoints = |cluster: &Cluster| {
        let run = cluster.json(&["run", "describe", "run"]);
        let events = run["events"].as_array().expect("a list").iter().map(|event| event["event"].clone());
        events.filter(|event| event["kind"] == "checkpoint").collect::<Vec<_>>()
    };
    cluster.eventually("there are some checkpoints", |cluster| checkpoints(cluster).len() >= 3);
    cluster.kill("trainer");
    let made = checkpoints(&cluster);
    let newest = made.last().expect("some");
    let folder = Path::new(cluster.store()).join(newest["key"].as_str().expect("a key"));
    let mut tensors = std::fs::read(folder.join("state.safetensors")).expect("it is kept");
    let middle = tensors.len() / 2;
    tensors[middle] ^= 1;
    std::fs::write(folder.join("state.safetensors"), tensors).expect("the folder is writable");
    cluster.start_trainer("another-trainer", 1);
    wait(&cluster, "run");
    let run = cluster.json(&["run", "describe", "run"]);
    let events = run["events"].to_string();
    assert!(events.contains("damaged") && events.contains("SHA-256"), "{events}");
    let found = verify(&cluster, "run", "undisturbed");
    assert!(found["equal"] == true, "{found}");
    // The newest two and the best are kept.
    let best = run["best_checkpoint_step"].as_u64().expect("a number");
    let kept = std::fs::read_dir(Path::new(cluster.store()).join(proto::keys::checkpoints("run"))).expect("a folder");
    // Of those that are removed a folder may be left, empty.
    let kept = kept.flatten().filter(|folder| folder.path().join("state.json").exists());
    let kept = kept.map(|folder| folder.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>();
    assert!(
        best > 0 && kept.len() <= 3 && kept.iter().any(|name| name.starts_with(&format!("{best:08}-"))),
        "{kept:?}"
    );

    let from = format!("run@{best}");
    submit_from(&cluster, "fine", 1, &["ranks.max=1", "train.learning_rate=1e-6"], &["--from", &from]);
    wait(&cluster, "fine");
    let fine = cluster.json(&["run", "describe", "fine"]);
    assert!(fine["events"].to_string().contains(&format!("the weights of run at step {best}")), "{fine}");
    let top1 = |run: &serde_json::Value| run["last_validation"]["top1"].as_f64().expect("a share");
    let of_best =
        made.iter().chain(&checkpoints(&cluster)).find(|made| made["step"] == best).expect("it was made")["top1"]
            .clone();
    assert!(
        (top1(&fine) - of_best.as_f64().expect("a share")).abs() < 0.1,
        "as good as what it began with: {of_best} {fine}"
    );
    let refused = cluster.try_gleaner(&[
        "run",
        "submit",
        "--dataset",
        "small",
        "--set",
        "input.crop=64",
        "--set",
        "train.batch=16",
        "--from",
        "run",
    ]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && said.contains("model.arch = \"alexnet-slim\""), "{said}");
}

#[test]
fn agents_that_were_started_for_a_run_take_no_other_and_end_with_it() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    let for_run = |cluster: &mut Cluster, name: &str, run: &str| {
        cluster.spawn(name, &["trainer", "--advertise-address", "127.0.0.1", "--devices", "cpu", "--run", run]);
    };
    for_run(&mut cluster, "first", "gang");
    for_run(&mut cluster, "second", "gang");
    for_run(&mut cluster, "stranger", "another");
    submit(&cluster, "gang", 3, &["ranks.min=2", "ranks.max=3"]);
    wait(&cluster, "gang");
    let run = cluster.json(&["run", "describe", "gang"]);
    assert_eq!(run["world_size"].as_u64(), Some(2), "the third device is for another run: {run}");
    cluster.eventually("they have ended", |cluster| !cluster.is_alive("first") && !cluster.is_alive("second"));
    assert!(cluster.is_alive("stranger"));
    for agent in ["first", "second"] {
        let said = cluster.log(agent);
        assert!(said.contains("agent ended") && !said.contains("has failed"), "{said}");
    }

    submit(&cluster, "another", 500, &["ranks.max=1"]);
    cluster.eventually("it trains", |cluster| step(cluster, "another") >= 2);
    cluster.gleaner(&["run", "cancel", "another"]);
    cluster.eventually("its agent has ended", |cluster| !cluster.is_alive("stranger"));
    assert!(cluster.log("stranger").contains("run \"another\" was cancelled"), "{}", cluster.log("stranger"));
}
