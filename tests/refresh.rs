//! A dataset over several rounds, with real processes: what failed once is fetched again, classes that have enough
//! stop, and what is exported is what the manifest counts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use demo_origin::pictures::picture;
use proto::shard::split_block;
use serde_json::Value;
use support::Cluster;

/// Serves pictures under `/good`; what is under `/weak` answers 503 and what is under `/silent` nothing, until it has
/// recovered.
struct Server {
    address: String,
    recovered: AtomicBool,
    asked: Mutex<HashMap<String, u32>>,
    /// Drawn ahead, because drawing takes a while: some of three classes.
    pictures: [Vec<Vec<u8>>; 3],
}

/// Pictures of a class that look different.
const DRAWN: u32 = 24;

impl Server {
    fn start() -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let draw = |class| (0..DRAWN).map(|n| picture(1, class, n.into())).collect();
        let pictures = [0, 1, 2].map(draw);
        let server = Arc::new(Self { address, recovered: false.into(), asked: Mutex::default(), pictures });
        let this = Arc::clone(&server);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let this = Arc::clone(&this);
                // A peer that goes away is no matter of the server.
                std::thread::spawn(move || this.serve(stream).ok());
            }
        });
        server
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().transpose()?.unwrap_or_default();
        while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        // What the site says of machines is no picture.
        if path != "/robots.txt" && path != "/.well-known/tdmrep.json" {
            *self.asked.lock().unwrap_or_else(PoisonError::into_inner).entry(path.clone()).or_default() += 1;
        }
        let (kind, number) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
        let well = self.recovered.load(Ordering::Relaxed);
        let (status, body) = match kind {
            "silent" if !well => {
                stream.set_read_timeout(Some(Duration::from_secs(30)))?;
                return stream.read(&mut [0]).map(drop);
            }
            "weak" if !well => ("503 Service Unavailable", Vec::new()),
            "good" | "weak" | "silent" => {
                std::thread::sleep(Duration::from_millis(20));
                let class = ["good", "weak", "silent"].iter().position(|name| *name == kind).unwrap_or(0);
                ("200 OK", self.picture(class, number.parse().unwrap_or(0)))
            }
            _ => ("404 Not Found", Vec::new()),
        };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), &body].concat())
    }

    /// The bytes of no two are the same: each has its number as a comment behind its start.
    fn picture(&self, class: usize, number: u32) -> Vec<u8> {
        let jpeg = &self.pictures[class][(number % DRAWN) as usize];
        [&jpeg[..2], &[0xff, 0xfe, 0, 6], &number.to_be_bytes(), &jpeg[2..]].concat()
    }

    /// Lines of a list.
    fn list(&self, synset: &str, kind: &str, numbers: std::ops::Range<u32>) -> String {
        numbers.map(|n| format!("{synset}\thttp://{}/{kind}/{n}\n", self.address)).collect()
    }

    fn asked(&self) -> HashMap<String, u32> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn create(cluster: &Cluster, list: &str, more: &[&str]) {
    let urls = cluster.write("urls.txt", list);
    let limits = ["--set", "limits.timeout_seconds=15", "--set", "limits.connect_timeout_seconds=10"];
    let base = ["dataset", "create", "birds", "--urls", &urls, "--size", "64", "--wait", "--timeout", "120s"];
    cluster.gleaner(&[&base[..], &limits, more].concat());
}

/// The URLs that have an outcome, by their lines of JSON.
fn outcomes(cluster: &Cluster, more: &[&str]) -> Vec<Value> {
    let text = cluster.gleaner(&[&["dataset", "outcomes", "birds", "-o", "json"], more].concat());
    text.lines().map(|line| serde_json::from_str(line).expect("JSON lines")).collect()
}

/// All files under a folder with their contents, by their paths in it.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(within) = folders.pop() {
        for entry in std::fs::read_dir(folder.join(&within)).expect("a folder") {
            let path = within.join(entry.expect("an entry").file_name());
            match std::fs::read(folder.join(&path)) {
                Ok(bytes) => drop(found.insert(path.display().to_string(), bytes)),
                Err(_) => folders.push(path),
            }
        }
    }
    found
}

#[test]
fn a_refresh_gets_what_came_back_and_what_is_new_and_exports_hold_what_counts() {
    let server = Server::start();
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let (good, weak) = (server.list("n1", "good", 0..12), server.list("n2", "weak", 0..3));
    let (silent, gone) = (server.list("n2", "silent", 0..1), server.list("n1", "gone", 0..2));
    create(&cluster, &format!("{good}{weak}{silent}{gone}"), &["--slice-urls", "6"]);
    let described = cluster.json(&["dataset", "describe", "birds"]);
    assert_eq!(described["outcomes"]["kept"], 12, "{described}");
    assert_eq!((&described["rounds"], &described["automatic_rounds"]), (&2.into(), &1.into()), "a second try");
    assert_eq!(outcomes(&cluster, &["--outcome", "not_found", "--synset", "n1"]).len(), 2);
    assert_eq!(outcomes(&cluster, &["--limit", "5"]).len(), 5);
    let before = server.asked();

    server.recovered.store(true, Ordering::Relaxed);
    let more = format!("{}{}", server.list("n2", "good", 20..22), server.list("n1", "good", 0..1));
    let more = cluster.write("more.txt", &more);
    cluster.gleaner(&["dataset", "refresh", "birds", "--urls", &more, "--wait", "--timeout", "120s"]);
    let described = cluster.json(&["dataset", "describe", "birds"]);
    assert_eq!((&described["manifest_version"], &described["rounds"]), (&2.into(), &3.into()));
    assert_eq!(described["outcomes"], serde_json::json!({"kept": 18, "not_found": 2}));
    let after = server.asked();
    for (path, times) in &before {
        let again = after[path] > *times;
        assert_eq!(again, path.starts_with("/weak") || path.starts_with("/silent"), "{path}");
    }
    let diff = cluster.json(&["dataset", "diff", "birds", "1", "2"]);
    assert_eq!((&diff["added"], &diff["removed"]), (&6.into(), &0.into()), "{diff}");
    assert_eq!(diff["outcomes"]["kept"], serde_json::json!({"from": 12, "to": 18}));
    let kept = outcomes(&cluster, &["--outcome", "kept"]);
    let urls: BTreeSet<&str> = kept.iter().filter_map(|row| row["url"].as_str()).collect();
    assert_eq!((kept.len(), urls.len()), (18, 18), "each URL once, with its latest outcome");
    let again = cluster.gleaner(&["dataset", "refresh", "birds"]);
    assert!(again.contains("nothing to fetch"), "{again}");

    let export = |form: &str, more: &[&str]| {
        let folder = cluster.path(&format!("out-{form}-{}", more.len()));
        let to = folder.display().to_string();
        cluster.gleaner(&[&["dataset", "export", "birds", "--as", form, "--to", &to], more].concat());
        let refused = cluster.try_gleaner(&["dataset", "export", "birds", "--as", form, "--to", &to]);
        assert_eq!(refused.status.code(), Some(2), "the folder is not empty");
        files(&folder)
    };
    let tree = export("tree", &[]);
    assert_eq!(export("tree", &["--store", cluster.store()]), tree, "through the coordinator as from the store");
    let images: BTreeSet<&Vec<u8>> =
        tree.iter().filter(|(path, _)| path.ends_with(".jpg")).map(|(_, bytes)| bytes).collect();
    assert_eq!((images.len(), tree.len()), (18, 19));
    assert!(tree.keys().any(|path| path.starts_with("train/n2/")), "{:?}", tree.keys());
    let mut in_tars = BTreeSet::new();
    for (path, bytes) in export("webdataset", &[]).into_iter().filter(|(path, _)| path.ends_with(".tar")) {
        for sample in split_block(&Bytes::from(bytes)).unwrap_or_else(|e| panic!("{path}: {e}")) {
            in_tars.insert(sample.image.to_vec());
        }
    }
    assert!(in_tars.iter().eq(images), "the tars hold the same pictures");
    let list = String::from_utf8(export("list", &[])["list.csv"].clone()).expect("UTF-8");
    assert_eq!((list.lines().count(), urls.iter().filter(|url| list.contains(**url)).count()), (19, 18));
}

#[test]
fn a_class_that_has_enough_stops_and_one_that_never_has_is_shown_to_be_short() {
    let server = Server::start();
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let list = server.list("n1", "good", 0..300) + &server.list("n2", "weak", 0..7);
    server.recovered.store(true, Ordering::Relaxed);
    create(&cluster, &list, &["--slice-urls", "10", "--per-class", "12", "--validation", "0", "--test", "0"]);
    let described = cluster.json(&["dataset", "describe", "birds"]);
    let class = |n: usize, field: &str| described["classes"][n][field].as_u64().expect("a number");
    let counted = |n| class(n, "train") + class(n, "validation") + class(n, "test");
    assert_eq!((counted(0), counted(1)), (12, 7), "{described}");
    assert_eq!((class(0, "short"), class(1, "short")), (0, 5));
    let full = described["outcomes"]["class_full"].as_u64().expect("most were not fetched");
    assert!(full > 50, "{described}");
    assert_eq!(server.asked().values().sum::<u32>() as u64, 307 - full, "what is full is not asked for");
    let table = cluster.gleaner(&["dataset", "describe", "birds"]);
    assert!(table.contains("SHORT"), "{table}");
}

#[test]
fn a_dataset_that_is_paused_waits_and_one_that_is_finished_has_what_there_is_and_asks_for_the_rest_later() {
    let server = Server::start();
    let mut cluster = Cluster::start();
    cluster.start_worker_with("worker", &["--connections", "2"]);
    let urls = cluster.write("urls.txt", &server.list("n1", "good", 0..900));
    cluster.gleaner(&["dataset", "create", "birds", "--urls", &urls, "--size", "64", "--slice-urls", "100"]);
    let asked = || u64::from(server.asked().values().sum::<u32>());
    cluster.eventually("the first slice is made", |_| asked() > 50);
    cluster.gleaner(&["dataset", "pause", "birds"]);
    cluster.eventually("what was leased is finished", |cluster| {
        let described = cluster.json(&["dataset", "describe", "birds"]);
        described["shards_leased"] == 0 && described["paused"] == true
    });
    let paused = asked();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(asked(), paused, "nothing is begun");
    assert!(paused < 900, "{paused}");

    cluster.gleaner(&["dataset", "resume", "birds"]);
    cluster.eventually("the next slice is made", |_| asked() > paused + 20);
    cluster.gleaner(&["dataset", "finish", "birds", "--wait", "--timeout", "60s"]);
    let described = cluster.json(&["dataset", "describe", "birds"]);
    let of = |outcome: &str| described["outcomes"][outcome].as_u64().unwrap_or(0);
    assert_eq!((of("kept") + of("unfetched"), of("kept") < 900), (900, true), "{described}");
    assert_eq!((of("kept"), &described["rounds"]), (asked(), &1.into()), "each was asked for once");

    cluster.gleaner(&["dataset", "refresh", "birds", "--wait", "--timeout", "60s"]);
    assert_eq!(cluster.json(&["dataset", "describe", "birds"])["outcomes"]["kept"], 900);
    assert_eq!(asked(), 900);
}
