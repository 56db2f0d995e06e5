//! A store that fails, loses answers, tears listings and is full for a while: what that may cost is time.

mod small;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use object_store::local::LocalFileSystem;
use proto::outcomes::OutcomeRow;
use proto::{Manifest, ShardIndex, Stored, table};
use support::{Cluster, Faults, FaultyStore, Injected, Rules, S3};

/// A cluster on a bucket that fails as `faults` say; its objects lie in `folder`.
struct Faulty {
    cluster: Cluster,
    faults: Faults,
    folder: tempfile::TempDir,
    _server: S3,
}

impl Faulty {
    /// Its coordinator has started, and nothing has gone wrong yet.
    fn start(seed: u64) -> Self {
        let (folder, faults) = (tempfile::tempdir().expect("a temporary folder"), Faults::new(seed));
        let store = LocalFileSystem::new_with_prefix(folder.path()).expect("it is there");
        let server = S3::serve(Arc::new(FaultyStore::new(Arc::new(store), faults.clone())));
        let mut cluster = Cluster::new(Some("s3://bucket/cluster"), server.environment());
        cluster.start_coordinator();
        Self { cluster, faults, folder, _server: server }
    }

    fn create(&self, list: &[Entry]) {
        let urls = self.cluster.write("urls.txt", &list::to_text(list));
        self.cluster.gleaner(&["dataset", "create", "some", "--urls", &urls, "--size", "64", "--slice-urls", "20"]);
    }

    fn committed(&self) -> u64 {
        self.cluster.json(&["dataset", "describe", "some"])["shards_committed"].as_u64().expect("a number")
    }

    /// Waits until the dataset is ready. Each URL must then have its outcome, once.
    fn assert_whole(&self, list: &[Entry]) {
        self.cluster.gleaner(&["dataset", "wait", "some", "--timeout", "180s"]);
        let manifest = self.cluster.gleaner(&["dataset", "manifest", "some"]);
        let manifest = Manifest::from_json(manifest.as_bytes()).expect("a manifest");
        let store = self.folder.path().join("cluster");
        let read = |path: &Path| std::fs::read(path).expect("a file of the store");
        let mut seen = BTreeMap::<(String, String), u32>::new();
        let indexes = store.join(proto::keys::indexes(&manifest.dataset));
        for index in std::fs::read_dir(indexes).expect("shards are committed") {
            let index = ShardIndex::from_json(&read(&index.expect("a file").path())).expect("an index");
            let file = index.outcomes_file.expect("a worker made it");
            let rows: Vec<OutcomeRow> = table::read(Bytes::from(read(&store.join(file.key)))).expect("Parquet");
            rows.into_iter().for_each(|row| *seen.entry((row.url, row.outcome)).or_default() += 1);
        }
        let outcome = |entry: &Entry| if entry.rot == Rot::Good { "kept" } else { "not_found" };
        let expected = list.iter().map(|entry| ((entry.url.clone(), outcome(entry).to_owned()), 1)).collect();
        assert_eq!(seen, expected);
        self.faults.set(Rules::default());
        self.cluster.gleaner(&["fsck", "--deep"]);
    }
}

/// URLs of which every third shows a picture.
fn urls(count: u64, origin: &Origin) -> Vec<Entry> {
    let entry = |n: u64| {
        let rot = if n.is_multiple_of(3) { Rot::Good } else { Rot::Gone };
        let url = list::url(rot, (0, n), n, origin);
        Entry { synset: "n02084071", url, rot, picture: (0, n), counts: rot == Rot::Good }
    };
    (0..count).map(entry).collect()
}

#[test]
fn a_dataset_is_whole_though_requests_fail_answers_are_lost_and_the_coordinator_is_killed() {
    let origin = Origin::serve(Options { seed: 21, delay: Duration::from_millis(200), ..Options::default() });
    let origin = origin.expect("loopback");
    let list = urls(200, &origin);
    let mut faulty = Faulty::start(1);
    let rules = Rules { failed: 0.1, lost: 0.1, torn: 0.1, delay: Duration::from_millis(20), ..Rules::default() };
    faulty.faults.set(rules);
    faulty.create(&list);
    faulty.cluster.start_worker_with("worker-1", &["--connections", "8"]);
    faulty.cluster.eventually("some shards are committed", |_| faulty.committed() > 1);
    faulty.cluster.kill("coordinator");
    faulty.cluster.start_coordinator();
    faulty.cluster.kill("worker-1");
    faulty.cluster.start_worker_with("worker-2", &["--connections", "8"]);
    faulty.assert_whole(&list);
    let Injected { failed, lost, .. } = faulty.faults.injected();
    assert!(failed > 10 && lost > 5, "{failed} {lost}");
}

#[test]
fn a_full_store_holds_up_a_dataset_until_there_is_room() {
    let origin = Origin::serve(Options { seed: 22, ..Options::default() }).expect("loopback");
    let list = urls(60, &origin);
    let mut faulty = Faulty::start(2);
    faulty.create(&list);
    faulty.faults.set(Rules { full: true, ..Rules::default() });
    faulty.cluster.start_worker("worker");
    faulty.cluster.eventually("a write is refused", |_| faulty.faults.injected().refused > 3);
    assert_eq!(faulty.committed(), 0);
    faulty.faults.set(Rules::default());
    faulty.assert_whole(&list);
}

#[test]
fn a_run_is_trained_and_recorded_as_any_other_though_requests_fail_and_answers_are_lost_and_late() {
    let mut faulty = Faulty::start(3);
    small::dataset(&mut faulty.cluster);
    faulty.cluster.start_trainer("trainer", 2);
    let whole = ["ranks.min=2", "ranks.max=2", "checkpoint.every_epochs=0.4"];
    small::submit(&faulty.cluster, "undisturbed", 6, &whole);
    small::wait(&faulty.cluster, "undisturbed");
    // Ranks read the dataset anew.
    faulty.cluster.kill("trainer");
    let rules = Rules { failed: 0.1, lost: 0.1, torn: 0.1, delay: Duration::from_millis(20), ..Rules::default() };
    faulty.faults.set(rules);
    faulty.cluster.start_trainer("another-trainer", 2);
    small::submit(&faulty.cluster, "disturbed", 6, &whole);
    small::wait(&faulty.cluster, "disturbed");
    let Injected { failed, lost, .. } = faulty.faults.injected();
    assert!(failed > 10 && lost > 5, "{failed} {lost}");
    faulty.faults.set(Rules::default());
    let found = small::verify(&faulty.cluster, "disturbed", "undisturbed");
    assert!(found["equal"] == true && found["steps_a"].as_u64() >= Some(6 * 5), "{found}");
    // What the coordinator knows of the curve is now what the store has.
    faulty.cluster.kill("coordinator");
    faulty.cluster.start_coordinator();
    let points = |run: &str| {
        let kinds = ["--kind", "train", "--kind", "validation", "--kind", "test"];
        let points = faulty.cluster.json(&[&["run", "metrics", run], &kinds[..]].concat());
        let points = points.as_array().expect("a list").iter();
        points.map(|point| (point["kind"].to_string(), point["step"].as_u64())).collect::<Vec<_>>()
    };
    assert_eq!(points("disturbed"), points("undisturbed"));
    assert_eq!(points("disturbed").len(), 6 + 6 + 1);
}

/// A web server of so many large pictures, which takes its time, and how often each was asked for.
fn large_pictures(count: u64) -> (u16, Arc<Mutex<BTreeMap<u64, u32>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    // To draw some is enough: each has its number as a comment behind its start.
    let drawn: Vec<Bytes> = (0..4).map(|n| support::dataset::picture(n, 1000, 750)).collect();
    let picture = |n: u64| {
        let jpeg = &drawn[(n % 4) as usize];
        Bytes::from([&jpeg[..2], &[0xff, 0xfe, 0, 10], &n.to_be_bytes(), &jpeg[2..]].concat())
    };
    let pictures: Arc<Vec<Bytes>> = Arc::new((0..count).map(picture).collect());
    let asked = Arc::new(Mutex::new(BTreeMap::new()));
    let counts = Arc::clone(&asked);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (pictures, counts) = (Arc::clone(&pictures), Arc::clone(&counts));
            std::thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().expect("a socket")).lines();
                let first = lines.next()?.ok()?;
                while lines.next()?.is_ok_and(|line| !line.is_empty()) {}
                let number = first.split(' ').nth(1).and_then(|path| path.strip_prefix('/')?.parse::<u64>().ok());
                let (status, body) = match number {
                    None => ("404 Not Found", Bytes::new()),
                    Some(number) => {
                        *counts.lock().expect("no panic").entry(number).or_default() += 1;
                        std::thread::sleep(Duration::from_millis(400));
                        ("200 OK", pictures[number as usize].clone())
                    }
                };
                let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                stream.write_all(&[head.as_bytes(), &body].concat()).ok()
            });
        }
    });
    (port, asked)
}

#[test]
fn a_store_that_is_full_in_the_middle_of_a_tar_goes_on_where_it_was() {
    const URLS: u64 = 80;
    let (port, asked) = large_pictures(URLS);
    let mut faulty = Faulty::start(4);
    let list: String = (0..URLS).map(|n| format!("n1\thttp://127.0.0.1:{port}/{n}\n")).collect();
    let urls = faulty.cluster.write("urls.txt", &list);
    let flags = ["--resize", "none", "--validation", "0", "--test", "0", "--slice-urls", "100"];
    faulty.cluster.gleaner(&[&["dataset", "create", "some", "--urls", &urls][..], &flags].concat());
    faulty.cluster.start_worker_with("worker", &["--connections", "4"]);
    let many = || asked.lock().expect("no panic").len() as u64;
    faulty.cluster.eventually("it is in the middle", |_| many() > URLS / 2);
    faulty.faults.set(Rules { full: true, ..Rules::default() });
    faulty.cluster.eventually("a part is refused", |_| faulty.faults.injected().refused > 3);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(faulty.committed(), 0);
    faulty.faults.set(Rules::default());
    faulty.cluster.gleaner(&["dataset", "wait", "some", "--timeout", "60s"]);
    faulty.cluster.gleaner(&["fsck", "--deep"]);
    let outcomes = faulty.cluster.json(&["dataset", "describe", "some"])["outcomes"].clone();
    assert_eq!(outcomes, serde_json::json!({ "kept": URLS }));
    let manifest = faulty.cluster.gleaner(&["dataset", "manifest", "some"]);
    let manifest = Manifest::from_json(manifest.as_bytes()).expect("a manifest");
    let index = faulty.folder.path().join("cluster").join(proto::keys::index(&manifest.dataset.shard(0)));
    let index = ShardIndex::from_json(&std::fs::read(index).expect("it is committed")).expect("an index");
    assert!(index.tars.values().all(|tar| tar.bytes > 2 * (5 << 20)), "of several parts: {:?}", index.tars);
    assert!(asked.lock().expect("no panic").values().all(|times| *times == 1), "nothing was fetched again");
}
