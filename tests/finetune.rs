//! Runs that begin with weights which are there, the best of their own, and runs that end earlier or go on for longer.

#![allow(clippy::print_stdout, reason = "the accuracies are what people run these tests for, too")]

mod small;

use std::collections::BTreeMap;
use std::path::Path;

use demo_origin::list;
use demo_origin::origin::{Options, Origin};
use demo_origin::pictures::CLASSES;
use demo_origin::rot::Rot;
use safetensors::SafeTensors;
use serde_json::Value;
use small::{dataset, submit, submit_from, wait};
use support::Cluster;

/// Makes the dataset `other` of these classes, with 30 pictures each.
fn other_dataset(cluster: &Cluster, classes: &[usize]) {
    let origin = Origin::serve(Options { seed: 12, ..Options::default() }).expect("loopback");
    let list: String = (0..30 * classes.len() as u64)
        .map(|n| {
            let class = classes[n as usize % classes.len()];
            format!("{}\t{}\n", CLASSES[class].synset, list::url(Rot::Good, (class, n), n, &origin))
        })
        .collect();
    let urls = cluster.write("other.txt", &list);
    let args = ["--validation", "0.2", "--test", "0.2", "--size", "72", "--wait", "--timeout", "120s"];
    cluster.gleaner(&[&["dataset", "create", "other", "--urls", &urls], &args[..]].concat());
}

/// A run's model: its tensors' values by name, row by row, and its description.
fn model(cluster: &Cluster, run: &str, weights: &str) -> (BTreeMap<String, Vec<Vec<u8>>>, Value) {
    let folder = cluster.path(&format!("{run}-{weights}"));
    cluster.gleaner(&["run", "model", run, "--weights", weights, "--to", &folder.display().to_string()]);
    let read = |name: &str| std::fs::read(folder.join(name)).expect("it was fetched");
    let bytes = read("model.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let rows = tensors.iter().map(|(name, view)| {
        let size = view.data().len() / view.shape()[0];
        (name.to_owned(), view.data().chunks(size).map(<[u8]>::to_vec).collect())
    });
    (rows.collect(), serde_json::from_slice(&read("model.json")).expect("JSON"))
}

fn classes(description: &Value) -> Vec<&str> {
    let classes = description["classes"].as_array().expect("a list");
    classes.iter().map(|class| class["synset"].as_str().expect("a name")).collect()
}

fn describe(cluster: &Cluster, run: &str) -> Value {
    cluster.json(&["run", "describe", run])
}

#[test]
fn classes_keep_their_rows_of_the_last_layer_whatever_their_places_and_unknown_ones_begin_anew() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    // As many classes as the other dataset has: two of them, in other places, and three that are new.
    let mixed = [9, 3, 7, 1, 8];
    other_dataset(&cluster, &mixed);
    cluster.start_trainer("trainer", 1);
    submit(&cluster, "base", 3, &["ranks.max=1"]);
    wait(&cluster, "base");
    let (base, of_base) = model(&cluster, "base", "last");
    // Less than the last bit of any weight, however small.
    let still = ["dataset=other", "ranks.max=1", "train.learning_rate=1e-30", "train.weight_decay=0"];
    let file = cluster.path("base-last").join("model.safetensors").display().to_string();
    for (run, from) in [("of-run", "base"), ("of-file", file.as_str())] {
        submit_from(&cluster, run, 1, &still, &["--from", from]);
        wait(&cluster, run);
        let (tuned, of_tuned) = model(&cluster, run, "last");
        assert_eq!(tuned["features.3.weight"], base["features.3.weight"], "{run}");
        let (theirs, own) = (classes(&of_base), classes(&of_tuned));
        assert_eq!(own.len(), theirs.len());
        let place = |synset: &str| theirs.iter().position(|other| *other == synset);
        assert_eq!(own.iter().filter(|synset| place(synset).is_some()).count(), 2, "{own:?} of {theirs:?}");
        for name in ["classifier.6.weight", "classifier.6.bias"] {
            for (row, synset) in tuned[name].iter().zip(&own) {
                match place(synset) {
                    Some(there) => assert_eq!(*row, base[name][there], "{run} {name} {synset}"),
                    None => assert!(!base[name].contains(row), "{run} {name} {synset} is new"),
                }
            }
        }
        let events = describe(&cluster, run)["events"].to_string();
        assert!(events.contains("those of 2 classes, while 3 classes that are not known there are new"), "{events}");
    }
    let args = ["run", "submit", "--dataset", "small", "--set", "train.batch=16", "--set", "input.crop=64"];
    let refused = cluster.try_gleaner(&[&args[..], &["--from", &file]].concat());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && said.contains("there is no tensor classifier.1.norm.bias"), "{said}");
    let json = cluster.path("base-last").join("model.json");
    let renamed = json.with_extension("safetensors.copy.safetensors");
    std::fs::copy(&json, &renamed).expect("a folder to write to");
    let refused = cluster.try_gleaner(&[&args[..], &["--from", &renamed.display().to_string()]].concat());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && said.contains("is no safetensors file"), "{said}");
    cluster.gleaner(&["fsck"]);
}

#[test]
fn three_epochs_from_weights_that_are_there_are_worth_more_than_three_from_none() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    // Other pictures of the same classes, in other places.
    other_dataset(&cluster, &[4, 3, 2, 1, 0]);
    cluster.start_trainer("trainer", 1);
    submit(&cluster, "base", 40, &["ranks.max=1"]);
    wait(&cluster, "base");
    let sets = ["dataset=other", "ranks.max=1"];
    submit_from(&cluster, "scratch", 3, &sets, &[]);
    submit_from(&cluster, "tuned", 3, &sets, &["--from", "base"]);
    let top1 = |run: &str| {
        wait(&cluster, run);
        describe(&cluster, run)["last_validation"]["top1"].as_f64().expect("a share")
    };
    let (scratch, tuned) = (top1("scratch"), top1("tuned"));
    println!("validation top-1 after three epochs: {tuned:.3}, from scratch {scratch:.3}");
    assert!(tuned > scratch + 0.1, "{tuned} after three epochs, {scratch} from scratch");
}

#[test]
fn the_model_is_the_best_state_and_frozen_parts_stay_as_they_begin() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 1);
    submit(&cluster, "run", 12, &["ranks.max=1", "checkpoint.every_epochs=5", "checkpoint.keep=1"]);
    wait(&cluster, "run");
    let run = describe(&cluster, "run");
    let points: Vec<Value> =
        serde_json::from_str(&cluster.gleaner(&["run", "metrics", "run", "--kind", "validation", "-o", "json"]))
            .expect("a list");
    let top1 = |point: &Value| point["top1"].as_f64().expect("a share");
    let most = points.iter().map(&top1).fold(0.0, f64::max);
    // Of the best the newest, although no checkpoint was due there.
    let best = points.iter().rfind(|point| top1(point) == most).expect("twelve epochs");
    let (_, of_best) = model(&cluster, "run", "best");
    let (_, of_last) = model(&cluster, "run", "last");
    assert_eq!((&of_best["step"], &run["best_checkpoint_step"]), (&best["step"], &best["step"]), "{points:?}");
    assert_eq!(of_last["step"], run["step"]);
    assert_eq!(of_best["test"]["top1"], run["test"]["top1"], "what is tested is what is exported");
    let evaluated = cluster.json(&["run", "evaluate", "run"]);
    let number = |name: &str| evaluated[name].as_f64().expect("a number");
    let tested = run["test"]["top1"].as_f64().expect("a share");
    assert!((number("top1") / number("pictures") - tested).abs() < 1e-6, "{evaluated} {run}");

    let frozen = ["ranks.max=1", "train.freeze=[\"features\"]", "train.head_factor=3"];
    submit_from(&cluster, "frozen", 2, &frozen, &["--from", "run"]);
    wait(&cluster, "frozen");
    let ((begun, _), (ended, _)) = (model(&cluster, "run", "last"), model(&cluster, "frozen", "last"));
    for part in ["weight", "norm.weight", "norm.bias"] {
        let name = format!("features.6.{part}");
        assert_eq!(begun[&name], ended[&name]);
    }
    assert_ne!(begun["classifier.6.weight"], ended["classifier.6.weight"]);
    cluster.gleaner(&["fsck"]);
}

#[test]
fn a_run_ends_when_nothing_gets_better_and_can_be_extended() {
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 2);
    let still = ["ranks.max=2", "train.learning_rate=1e-30", "train.weight_decay=0", "train.stop_after=2"];
    submit(&cluster, "run", 50, &still);
    wait(&cluster, "run");
    let run = describe(&cluster, "run");
    let steps = run["steps_per_epoch"].as_u64().expect("a number");
    // Running statistics of norms move even so, and what they give may get better for a while.
    let done = run["step"].as_u64().expect("a number");
    assert!(done.is_multiple_of(steps) && done >= 3 * steps && done < 50 * steps, "{run}");
    let epochs = |more: u64| (done / steps + more).to_string();
    let refused = cluster.try_gleaner(&["run", "extend", "run", "--epochs", "1"]);
    assert_eq!(refused.status.code(), Some(2), "it has done more");
    cluster.gleaner(&["run", "extend", "run", "--epochs", &epochs(45), "--wait", "--timeout", "180s"]);
    let run = describe(&cluster, "run");
    assert_eq!((run["state"].as_str(), run["step"].as_u64()), (Some("done"), Some(done + 45 * steps)), "{run}");
    assert!(Path::new(cluster.store()).join(proto::keys::run("run")).exists());
    // Both times it left a model; the newer one counts.
    assert_eq!(model(&cluster, "run", "last").1["step"], run["step"]);
    cluster.gleaner(&["fsck"]);
    cluster.gleaner(&["gc", "--grace", "0s"]);
    cluster.gleaner(&["fsck"]);
}
