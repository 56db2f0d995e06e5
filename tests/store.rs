//! A store that is replaced, restored or damaged under a living cluster, with real processes.

use std::path::Path;

use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use support::Cluster;

fn web(seed: u64) -> Origin {
    Origin::serve(Options { seed, ..Options::default() }).expect("loopback")
}

/// URLs of pictures.
fn urls(numbers: std::ops::Range<u64>, origin: &Origin) -> String {
    let entry = |n: u64| {
        let url = list::url(Rot::Good, (0, n), n, origin);
        Entry { synset: "n02084071", url, rot: Rot::Good, picture: (0, n), counts: true }
    };
    list::to_text(&numbers.map(entry).collect::<Vec<_>>())
}

/// A dataset of 20 pictures in two shards, with its end.
fn create(cluster: &Cluster, name: &str, origin: &Origin) {
    let urls = cluster.write("urls.txt", &urls(0..20, origin));
    let shape = ["--size", "64", "--slice-urls", "10", "--wait", "--timeout", "60s"];
    cluster.gleaner(&[&["dataset", "create", name, "--urls", &urls], &shape[..]].concat());
    assert_eq!(cluster.json(&["dataset", "describe", name])["outcomes"]["kept"], 20);
}

/// Starts coordinators until the last one's term is the sixth; the others are killed.
fn reach_term_six(cluster: &mut Cluster) {
    for _ in 0..5 {
        cluster.start_coordinator();
        cluster.kill("coordinator");
    }
    cluster.start_coordinator();
    assert_eq!(cluster.json(&["status"])["term"], 6);
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a temporary folder is writable");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        match source.is_dir() {
            true => copy(&source, &target),
            false => drop(std::fs::copy(source, target).expect("a file")),
        }
    }
}

#[test]
fn who_has_seen_term_six_serves_the_first_term_of_a_store_that_has_replaced_the_old_one() {
    let origin = web(31);
    let mut cluster = Cluster::new(None, Vec::new());
    reach_term_six(&mut cluster);
    cluster.start_worker("worker");
    cluster.start_trainer("agent", 1);
    let agents = |cluster: &Cluster| cluster.json(&["status"])["agents"].as_array().map_or(0, Vec::len);
    cluster.eventually("the agent has come", |cluster| agents(cluster) == 1);
    create(&cluster, "before", &origin);

    cluster.kill("coordinator");
    std::fs::rename(cluster.store(), cluster.path("old")).expect("nobody minds");
    cluster.start_coordinator();
    create(&cluster, "after", &origin);
    cluster.eventually("the agent has come back", |cluster| agents(cluster) == 1);
    assert_eq!(cluster.json(&["status"])["term"], 1);
    assert!(["coordinator", "worker", "agent"].into_iter().all(|name| cluster.is_alive(name)));
    for name in ["worker", "agent"] {
        assert!(cluster.log(name).contains("the store has been replaced"), "{name}: {}", cluster.log(name));
    }
}

#[test]
fn a_store_that_was_restored_goes_on_in_a_term_above_those_that_it_has_lost() {
    let origin = web(32);
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_coordinator();
    cluster.kill("coordinator");
    copy(Path::new(cluster.store()), &cluster.path("backup"));
    for _ in 0..4 {
        cluster.start_coordinator();
        cluster.kill("coordinator");
    }
    cluster.start_coordinator();
    cluster.start_worker("worker");
    create(&cluster, "before", &origin);

    cluster.kill("coordinator");
    std::fs::remove_dir_all(cluster.store()).expect("nobody minds");
    std::fs::rename(cluster.path("backup"), cluster.store()).expect("the same disk");
    cluster.start_coordinator();
    create(&cluster, "after", &origin);
    assert_eq!(cluster.json(&["status"])["term"], 7);
    assert!(cluster.is_alive("coordinator") && cluster.is_alive("worker"));
}
