//! A store that is replaced, restored or damaged under a living cluster, with real processes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use proto::{Manifest, Split, Stored};
use serde_json::Value;
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

/// Waits for the dataset's end: what `describe` then says.
fn ready(cluster: &Cluster, name: &str) -> Value {
    cluster.gleaner(&["dataset", "wait", name, "--timeout", "90s"]);
    cluster.json(&["dataset", "describe", name])
}

/// A dataset of so many URLs in slices of ten, with its end.
fn create_large(cluster: &Cluster, urls: &str) -> Value {
    let urls = cluster.write("urls.txt", urls);
    cluster.gleaner(&["dataset", "create", "some", "--urls", &urls, "--size", "64", "--slice-urls", "10"]);
    ready(cluster, "some")
}

/// The objects of the dataset's folder `kind`.
fn objects(cluster: &Cluster, kind: &str) -> impl Iterator<Item = PathBuf> {
    let dataset = cluster.json(&["dataset", "describe", "some"])["dataset"].as_str().expect("its id").to_owned();
    let folder = Path::new(cluster.store()).join("datasets").join(dataset).join(kind);
    std::fs::read_dir(folder).expect("a folder").map(|file| file.expect("a file").path())
}

/// The only one of them that belongs to a shard.
fn object(cluster: &Cluster, kind: &str, shard: u32) -> PathBuf {
    let of_it = |name: &str| name.starts_with(&format!("{shard:06}"));
    let is_its = |path: &PathBuf| of_it(&path.file_name().expect("it has one").to_string_lossy());
    objects(cluster, kind).find(is_its).expect("the shard has one")
}

/// Flips a bit in the middle of a file.
fn flip(path: &Path) {
    let mut bytes = std::fs::read(path).expect("a file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).expect("the temporary folder is writable");
}

fn damaged(described: &Value) -> Vec<u64> {
    let shards = described["damaged"].as_array().expect("a list").iter();
    shards.map(|damaged| damaged["shard"].as_u64().expect("a number")).collect()
}

#[test]
fn one_flipped_byte_costs_its_shard_which_is_named_and_fetched_again() {
    let origin = web(33);
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    assert_eq!(create_large(&cluster, &urls(0..200, &origin))["outcomes"]["kept"], 200);
    let asked = |n: u64| origin.requests(&format!("/{}/0/{n}/{n}.jpg", Rot::Good.name()));
    let before: Vec<u64> = (0..200).map(asked).collect();

    flip(&object(&cluster, "outcomes", 3));
    let more = cluster.write("more.txt", &urls(200..260, &origin));
    let refreshed = cluster.json(&["dataset", "refresh", "some", "--urls", &more]);
    assert_eq!((&refreshed["urls"], &refreshed["retried"]["unfetched"]), (&70.into(), &10.into()));
    let described = ready(&cluster, "some");
    assert_eq!((&described["outcomes"]["kept"], &described["urls"]), (&260.into(), &260.into()));
    assert_eq!(damaged(&described), [3]);
    let named = &described["damaged"][0];
    assert!(named["key"].as_str().is_some_and(|key| key.contains("/outcomes/000003-")), "{named}");
    assert!(cluster.gleaner(&["dataset", "describe", "some"]).contains("shard 3 is damaged and left out"));
    let again = (0..200).filter(|n| asked(*n) > before[*n as usize]).count();
    assert_eq!(again, 10, "nothing else was asked for again");
    let manifest =
        Manifest::from_json(cluster.gleaner(&["dataset", "manifest", "some"]).as_bytes()).expect("a manifest");
    assert_eq!((manifest.samples(Split::ALL[0]) > 0, manifest.shards[3].tars.len()), (true, 0));
    let kept = cluster.gleaner(&["dataset", "outcomes", "some", "--outcome", "kept", "-o", "json"]);
    assert_eq!(kept.lines().filter(|line| line.contains("\"url\"")).count(), 260);

    // A tar that is gone is found, too; and there is an end.
    std::fs::remove_file(object(&cluster, "shards/train", 5)).expect("it is there");
    cluster.gleaner(&["dataset", "refresh", "some"]);
    let described = ready(&cluster, "some");
    assert_eq!((damaged(&described), &described["outcomes"]["kept"]), (vec![3, 5], &260.into()));
    let refreshed = cluster.json(&["dataset", "refresh", "some"]);
    assert_eq!((&refreshed["round"], &refreshed["urls"]), (&0.into(), &0.into()), "nothing is left to fetch");
    cluster.kill("coordinator");
    cluster.start_coordinator();
    let described = ready(&cluster, "some");
    assert_eq!((damaged(&described), &described["manifest_version"]), (vec![3, 5], &3.into()));
}

#[test]
fn an_index_that_becomes_garbage_while_its_dataset_is_fetched_holds_up_nobody() {
    let origin = Origin::serve(Options { seed: 34, delay: Duration::from_millis(150), ..Options::default() });
    let origin = origin.expect("loopback");
    let mut cluster = Cluster::start();
    cluster.start_worker_with("worker", &["--connections", "4"]);
    let list = cluster.write("urls.txt", &urls(0..200, &origin));
    cluster.gleaner(&["dataset", "create", "some", "--urls", &list, "--size", "64", "--slice-urls", "10"]);
    let committed = |cluster: &Cluster| cluster.json(&["dataset", "describe", "some"])["shards_committed"].as_u64();
    cluster.eventually("some shards are committed", |cluster| committed(cluster) > Some(2));
    let index = objects(&cluster, "index").find(|path| path.extension().is_some_and(|end| end == "json"));
    let index = index.expect("some are committed");
    std::fs::write(&index, "rubbish").expect("the temporary folder is writable");
    cluster.kill("coordinator");
    cluster.start_coordinator();
    let described = ready(&cluster, "some");
    let shard: u64 = index.file_stem().and_then(|name| name.to_str()?.parse().ok()).expect("a number");
    assert_eq!((damaged(&described), &described["outcomes"]["kept"]), (vec![shard], &200.into()));
    assert_eq!(described["automatic_rounds"], 1, "its URLs were fetched again by themselves");
}

#[test]
fn so_much_damage_that_the_store_may_be_wrong_is_left_out_only_if_somebody_says_so() {
    let origin = web(35);
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    create_large(&cluster, &urls(0..200, &origin));
    for shard in [4, 6] {
        std::fs::remove_file(object(&cluster, "index", shard)).expect("it is there");
    }
    let refused = cluster.try_gleaner(&["dataset", "refresh", "some"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(said.contains("2 of 20 shards") && said.contains("--accept-damage"), "{said}");
    cluster.gleaner(&["dataset", "refresh", "some", "--accept-damage"]);
    let described = ready(&cluster, "some");
    assert_eq!((damaged(&described), &described["outcomes"]["kept"]), (vec![4, 6], &200.into()));
    assert_eq!(cluster.json(&["dataset", "refresh", "some"])["round"], 0, "what is known is no news");
}

fn fsck(cluster: &Cluster, flags: &[&str]) -> (bool, Value) {
    let output = cluster.try_gleaner(&[&["fsck", "-o", "json"], flags].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    let report = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    (output.status.success(), report)
}

#[test]
fn garbage_is_removed_while_the_cluster_works_and_nothing_that_it_needs() {
    let origin = Origin::serve(Options { seed: 36, delay: Duration::from_millis(100), ..Options::default() });
    let origin = origin.expect("loopback");
    let mut cluster = Cluster::start();
    let list = cluster.write("urls.txt", &urls(0..300, &origin));
    cluster.gleaner(&["dataset", "create", "some", "--urls", &list, "--size", "64", "--slice-urls", "10"]);
    cluster.gleaner(&["dataset", "create", "dead", "--urls", &list, "--size", "64", "--slice-urls", "10"]);
    cluster.gleaner(&["dataset", "delete", "dead", "-y"]);
    let describe = |cluster: &Cluster| cluster.json(&["dataset", "describe", "some"]);
    for n in 0..3 {
        // A slice each second, so that some are left for the last one, however slowly this asks.
        cluster.start_worker_with(&format!("worker-{n}"), &["--connections", "1"]);
        let before = describe(&cluster)["shards_committed"].as_u64();
        cluster.eventually("shards are committed", |cluster| {
            cluster.gleaner(&["gc", "--grace", "1s"]);
            describe(cluster)["shards_committed"].as_u64() > before.map(|n| n + 3)
        });
        cluster.kill(&format!("worker-{n}"));
    }
    cluster.start_worker("worker");
    assert_eq!(ready(&cluster, "some")["outcomes"]["kept"], 300);
    let (is_whole, report) = fsck(&cluster, &["--deep"]);
    assert!(is_whole, "{report:#}");
    assert_eq!((&report["datasets"], &report["shards"]), (&1.into(), &describe(&cluster)["shards"]));

    // What a lost attempt leaves, if nobody sweeps it.
    let index = object(&cluster, "index", 3);
    let lost = object(&cluster, "outcomes", 3).with_file_name("000003-1.9999.parquet");
    std::fs::write(&lost, "rubbish").expect("the temporary folder is writable");
    assert_eq!(cluster.json(&["gc"])["garbage"], serde_json::json!([]), "it is younger than a day");
    let dry = cluster.json(&["gc", "--grace", "0s", "--dry-run"]);
    assert!(lost.exists() && dry["removed"] == 0 && dry["garbage"][0]["bytes"] == 7, "{dry:#}");
    assert_eq!(cluster.json(&["gc", "--grace", "0s"])["removed"], 1);
    assert!(!lost.exists() && index.exists());
}

#[test]
fn an_audit_names_what_is_damaged_and_a_folder_that_is_no_store() {
    let origin = web(37);
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    create_large(&cluster, &urls(0..200, &origin));
    assert!(fsck(&cluster, &["--deep"]).0);
    let tar = object(&cluster, "shards/train", 7);
    flip(&tar);
    assert!(fsck(&cluster, &[]).0, "its length is the same");
    let (is_whole, report) = fsck(&cluster, &["--deep"]);
    let key = report["findings"][0]["key"].as_str().expect("a finding").to_owned();
    assert!(!is_whole && tar.ends_with(&key), "{report:#}");
    // Without it, its shard is left out, which is no finding any more.
    std::fs::remove_file(&tar).expect("it is there");
    assert!(!fsck(&cluster, &[]).0);
    cluster.gleaner(&["dataset", "refresh", "some"]);
    assert_eq!(ready(&cluster, "some")["outcomes"]["kept"], 200);
    let (is_whole, report) = fsck(&cluster, &["--deep"]);
    assert!(is_whole && report["left_out"][0]["key"] == key, "{report:#}");
    let nowhere = cluster.path("nowhere");
    assert_eq!(cluster.try_gleaner(&["fsck", "--store", &nowhere.display().to_string()]).status.code(), Some(3));
    assert!(!nowhere.exists());
}
