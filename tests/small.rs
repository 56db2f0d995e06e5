//! A small dataset, and runs on it.

#![allow(dead_code, unreachable_pub, reason = "a module of several test binaries, each of which uses a part")]

use std::ops::Range;
use std::time::Duration;

use demo_origin::list;
use demo_origin::origin::{Options, Origin};
use demo_origin::pictures::CLASSES;
use demo_origin::rot::Rot;
use serde_json::Value;
use support::Cluster;

/// Makes the dataset `small`: 5 classes of 40 pictures, 64 x 64.
pub fn dataset(cluster: &mut Cluster) {
    cluster.start_worker("worker");
    let origin = Origin::serve(Options { seed: 11, ..Options::default() }).expect("loopback");
    create(cluster, &list(&origin));
}

/// The list of `small`, whose pictures are at this origin.
pub fn list(origin: &Origin) -> String {
    list_of(0..200, origin)
}

/// A list of these of the origin's pictures, of the classes of `small`.
pub fn list_of(numbers: Range<u64>, origin: &Origin) -> String {
    let line = |n: u64| {
        let class = n as usize % 5;
        format!("{}\t{}\n", CLASSES[class].synset, list::url(Rot::Good, (class, n), n, origin))
    };
    numbers.map(line).collect()
}

/// Makes the dataset `small` of its list.
pub fn create(cluster: &Cluster, list: &str) {
    let urls = cluster.write("urls.txt", list);
    let splits = ["--validation", "0.15", "--test", "0.15", "--size", "72", "--slice-urls", "50"];
    let wait = ["--wait", "--timeout", "120s"];
    cluster.gleaner(&[&["dataset", "create", "small", "--urls", &urls], &splits[..], &wait].concat());
}

/// Submits a run on `small` that takes `epochs` epochs of 9 steps or so.
pub fn submit(cluster: &Cluster, name: &str, epochs: u32, set: &[&str]) {
    submit_from(cluster, name, epochs, set, &[]);
}

/// The same, with more arguments.
pub fn submit_from(cluster: &Cluster, name: &str, epochs: u32, set: &[&str], more: &[&str]) {
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
    cluster.gleaner(&[&["run", "submit", "-f", &spec, "--name", name], &set[..], more].concat());
}

/// Waits until a run is done.
pub fn wait(cluster: &Cluster, run: &str) {
    wait_for(cluster, run, Duration::from_secs(180));
}

/// The same, for at most so long.
pub fn wait_for(cluster: &Cluster, run: &str, timeout: Duration) {
    cluster.gleaner(&["run", "wait", run, "--timeout", &format!("{}s", timeout.as_secs())]);
}

/// Steps applied.
pub fn step(cluster: &Cluster, run: &str) -> u64 {
    cluster.json(&["run", "describe", run])["step"].as_u64().unwrap_or(0)
}

/// What `run verify` says, whether they are equal or not.
pub fn verify(cluster: &Cluster, a: &str, b: &str) -> Value {
    let output = cluster.try_gleaner(&["run", "verify", a, b, "-o", "json"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(output.status.code(), Some(i32::from(found["equal"] != true)), "{found}");
    found
}
