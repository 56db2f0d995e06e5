//! From a rotted list to a manifest, with real processes, a real origin and real kills.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use proto::outcomes::OutcomeRow;
use proto::{DatasetId, Manifest, Outcome, Rejection, ShardIndex, Stored, table};
use support::Cluster;

fn web(options: Options) -> Origin {
    Origin::serve(options).expect("loopback")
}

/// The list, and the command that makes the dataset `rotted` of it.
fn create(cluster: &Cluster, list: &[Entry]) {
    let urls = cluster.write("urls.txt", &list::to_text(list));
    cluster.gleaner(
        &[
            &["dataset", "create", "rotted", "--urls", &urls, "--size", "64", "--slice-urls", "50"][..],
            &["--set", "limits.timeout_seconds=5", "--set", "limits.connect_timeout_seconds=4"],
        ]
        .concat(),
    );
}

/// Without workers yet. The origin has no more than a part of this machine: its answers must not come too late.
fn start_cluster() -> Cluster {
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_coordinator_with(&["--site-slots", "4"]);
    cluster
}

fn wait(cluster: &Cluster) {
    cluster.gleaner(&["dataset", "wait", "rotted", "--timeout", "120s"]);
}

fn manifest(cluster: &Cluster) -> Manifest {
    Manifest::from_json(cluster.gleaner(&["dataset", "manifest", "rotted"]).as_bytes()).expect("a manifest")
}

/// The latest row of every URL. A later round's shards have higher numbers.
fn rows(cluster: &Cluster, dataset: &DatasetId) -> Vec<OutcomeRow> {
    let store = Path::new(cluster.store());
    let indexes = std::fs::read_dir(store.join(proto::keys::indexes(dataset))).expect("shards are committed");
    let index = |path| ShardIndex::from_json(&std::fs::read(path).expect("an index")).expect("an index");
    let mut indexes: Vec<ShardIndex> = indexes.map(|entry| index(entry.expect("an index").path())).collect();
    indexes.sort_by_key(|index| index.shard);
    let files = indexes.into_iter().map(|index| index.outcomes_file.expect("a worker made it"));
    let read = |key: String| -> Vec<OutcomeRow> {
        table::read(Bytes::from(std::fs::read(store.join(key)).expect("outcomes"))).expect("Parquet")
    };
    let latest: BTreeMap<i64, OutcomeRow> = files.flat_map(|file| read(file.key)).map(|row| (row.key, row)).collect();
    latest.into_values().collect()
}

/// Kept and rejected URLs, which must be each of the list once and as its rot demands.
fn assert_outcomes(rows: &[OutcomeRow], list: &[Entry], expected: impl Fn(Rot) -> Outcome) {
    let by_url: HashMap<&str, &OutcomeRow> = rows.iter().map(|row| (row.url.as_str(), row)).collect();
    assert_eq!((rows.len(), by_url.len()), (list.len(), list.len()), "every URL has one outcome");
    let wrong: Vec<String> = list
        .iter()
        .filter_map(|entry| {
            let outcome = by_url.get(entry.url.as_str()).expect("every URL has an outcome").outcome().expect("known");
            // So many URLs of one dead port may be more than anybody tries.
            let given_up = entry.rot == Rot::RefusedPort && outcome == Err(Rejection::HostGivenUp);
            (outcome != expected(entry.rot) && !given_up)
                .then(|| format!("{}: {outcome:?}, not {:?}", entry.url, expected(entry.rot)))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_url_of_a_rotted_list_has_its_outcome_and_no_poison_is_counted() {
    let origin = web(Options { seed: 7, ..Options::default() });
    let list = list::rotted(7, 20, &origin);
    let mut cluster = start_cluster();
    // A cluster's own list of placeholders; the demo's manifest finds this one by its many URLs.
    let known = proto::shard::sha256_hex(&Origin::large_placeholder());
    let file = Path::new(cluster.store()).join(worker::PLACEHOLDERS_KEY);
    std::fs::create_dir_all(file.parent().expect("a folder")).expect("the store is a folder");
    std::fs::write(file, format!("{known} the origin's large one\n")).expect("the store is a folder");
    cluster.start_worker("worker");
    create(&cluster, &list);
    wait(&cluster);

    let manifest = manifest(&cluster);
    let rows = rows(&cluster, &manifest.dataset);
    assert_outcomes(&rows, &list, |rot| match rot {
        Rot::LargePlaceholder => Err(Rejection::Placeholder),
        rot => rot.expected(),
    });
    let described = cluster.json(&["dataset", "describe", "rotted"]);
    let total: u64 = described["outcomes"].as_object().expect("a map").values().filter_map(|n| n.as_u64()).sum();
    assert_eq!(total, list.len() as u64, "the table adds up to the list");

    let mut counted = BTreeMap::<&str, u64>::new();
    list.iter().filter(|entry| entry.counts).for_each(|entry| *counted.entry(entry.synset).or_default() += 1);
    for class in &manifest.classes {
        assert_eq!(class.samples.values().sum::<u64>(), counted[class.synset.as_str()], "{}", class.synset);
    }
    assert!(manifest.mean.iter().chain(&manifest.std).all(|value| (0.05..0.95).contains(value)), "{manifest:?}");
}

#[test]
fn a_picture_behind_many_urls_is_a_placeholder_that_the_manifest_skips() {
    let origin = web(Options { seed: 3, ..Options::default() });
    let good = (0..30).map(|n| (Rot::Good, n));
    let list: Vec<Entry> = good
        .chain((30..60).map(|n| (Rot::LargePlaceholder, n)))
        .map(|(rot, n)| {
            let url = list::url(rot, (0, n), n, &origin);
            Entry { synset: "n02084071", url, rot, picture: (0, n), counts: rot == Rot::Good }
        })
        .collect();
    let mut cluster = start_cluster();
    cluster.start_worker("worker");
    create(&cluster, &list);
    wait(&cluster);
    let manifest = manifest(&cluster);
    assert_eq!(manifest.skipped, BTreeMap::from([(proto::manifest::Skip::ManyUrls, 30)]));
    assert_eq!(proto::Split::ALL.map(|split| manifest.samples(split)).iter().sum::<u64>(), 30);
}

#[test]
fn killed_workers_and_coordinators_lose_nothing() {
    // Slow enough that the kills find shards half made.
    let origin = web(Options { seed: 5, delay: Duration::from_millis(300), ..Options::default() });
    let list = list::rotted(5, 20, &origin);
    let mut cluster = start_cluster();
    cluster.start_worker("worker-1");
    create(&cluster, &list);
    let committed = |cluster: &Cluster| cluster.json(&["dataset", "describe", "rotted"])["shards_committed"].as_u64();

    cluster.eventually("the first shard is leased", |cluster| {
        cluster.json(&["dataset", "describe", "rotted"])["shards_leased"].as_u64() > Some(0)
    });
    cluster.kill("worker-1");
    cluster.start_worker("worker-2");
    cluster.eventually("some shards are committed", |cluster| committed(cluster) > Some(1));
    cluster.kill("coordinator");
    cluster.start_coordinator_with(&["--site-slots", "4"]);
    assert!(committed(&cluster) > Some(1), "what was committed still is");
    wait(&cluster);

    let manifest = manifest(&cluster);
    let rows = rows(&cluster, &manifest.dataset);
    assert_outcomes(&rows, &list, Rot::expected);
    let folder = Path::new(cluster.store()).join(format!("datasets/{}/shards", manifest.dataset));
    let tars = |split| std::fs::read_dir(folder.join(split)).expect("tars").count();
    let named: usize = manifest.shards.iter().map(|shard| shard.tars.len()).sum();
    cluster.eventually("nothing is left of the attempts that lost", |_| {
        proto::Split::ALL.iter().map(|split| tars(split.name())).sum::<usize>() == named
    });
}

#[test]
fn wrong_commands_end_with_their_codes_and_say_what_to_do() {
    let cluster = Cluster::start();
    let list = cluster.write("urls.txt", "not a list\nat all\n");
    for (args, code, said) in [
        (&["dataset", "describe", "nobody"][..], 3, "nobody"),
        (&["dataset", "create", "Bad Name", "--urls", &list], 2, "name"),
        (&["dataset", "create", "bad", "--urls", &list], 2, "urls.txt"),
        (&["dataset", "create", "bad", "--urls", "/no/such/file"], 2, "/no/such/file"),
        (&["run", "submit", "--dataset", "nobody"], 3, "nobody"),
        (&["run", "submit", "--dataset", "nobody", "--set", "train.lr=1"], 2, "lr"),
        (&["status", "--coordinator", "127.0.0.1:1"], 5, "--coordinator"),
    ] {
        let output = cluster.try_gleaner(args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), text.contains(said)), (Some(code), true), "gleaner {args:?}: {text}");
    }
}
