//! Faults that are the cluster's own, and not the web's: no way out, a typo in the settings, a store that fails,
//! workers that are told to leave. With real processes: nothing that can be fetched is lost, nothing is fetched twice,
//! and what is wrong is said.

#![allow(clippy::print_stdout, reason = "measured figures")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use demo_origin::pictures::picture;
use serde_json::Value;
use support::Cluster;

/// Hosts of the lists.
const HOSTS: u32 = 60;
/// Pictures that look different.
const DRAWN: u32 = 16;

/// Serves a picture for each number, or, at another address but the same port, a portal's page for everything.
struct Web {
    port: u16,
    delay: Duration,
    pictures: Vec<Vec<u8>>,
    asked: Mutex<HashMap<String, u32>>,
}

impl Web {
    fn start(delay: Duration) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let pictures = (0..DRAWN).map(|n| picture(1, 0, n.into())).collect();
        let web = Arc::new(Self { port, delay, pictures, asked: Mutex::default() });
        let portal = TcpListener::bind(("127.0.0.9", port)).expect("the same port of another address");
        for (listener, is_portal) in [(listener, false), (portal, true)] {
            let web = Arc::clone(&web);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let web = Arc::clone(&web);
                    // A peer that goes away is no matter of the server.
                    std::thread::spawn(move || web.serve(stream, is_portal).ok());
                }
            });
        }
        web
    }

    fn serve(&self, mut stream: TcpStream, is_portal: bool) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().transpose()?.unwrap_or_default();
        while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let body = match is_portal {
            true => "<html>Please log in</html>".repeat(400).into_bytes(),
            false => {
                *self.asked.lock().unwrap_or_else(PoisonError::into_inner).entry(path.clone()).or_default() += 1;
                std::thread::sleep(self.delay);
                self.picture(path.trim_start_matches('/').parse().unwrap_or(0))
            }
        };
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), &body].concat())
    }

    /// The bytes of no two are the same: each has its number as a comment behind its start.
    fn picture(&self, number: u32) -> Vec<u8> {
        let jpeg = &self.pictures[(number % DRAWN) as usize];
        [&jpeg[..2], &[0xff, 0xfe, 0, 6], &number.to_be_bytes(), &jpeg[2..]].concat()
    }

    /// So many URLs of [`HOSTS`] hosts in this domain, whose names a name server must know.
    fn named(&self, domain: &str, urls: u32) -> String {
        (0..urls).map(|n| format!("n1\thttp://h{}.{domain}:{}/{n}\n", n % HOSTS, self.port)).collect()
    }

    /// So many of this machine's address.
    fn plain(&self, urls: u32) -> String {
        (0..urls).map(|n| format!("n1\thttp://127.0.0.1:{}/{n}\n", self.port)).collect()
    }

    /// How often each URL was asked for.
    fn asked(&self) -> HashMap<String, u32> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a name server says of every name.
#[derive(Debug, Clone, Copy)]
enum Says {
    NoSuchName = 3,
    Web = 1,
    Portal = 9,
}

/// A name server.
struct Names {
    address: String,
    says: Arc<AtomicU8>,
}

impl Names {
    fn start(says: Says) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback");
        let address = socket.local_addr().expect("bound").to_string();
        let says = Arc::new(AtomicU8::new(says as u8));
        let said = Arc::clone(&says);
        std::thread::spawn(move || {
            let mut packet = [0; 1024];
            while let Ok((length, from)) = socket.recv_from(&mut packet) {
                if let Some(answer) = answer(&packet[..length], said.load(Ordering::Relaxed)) {
                    // Whoever has asked may be gone.
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Self { address, says }
    }

    fn say(&self, says: Says) {
        self.says.store(says as u8, Ordering::Relaxed);
    }
}

/// RFC 1035, by hand: the header, the question repeated, and `127.0.0.x` or none.
fn answer(question: &[u8], says: u8) -> Option<Vec<u8>> {
    let end = 12 + question.get(12..)?.iter().position(|&byte| byte == 0)? + 5;
    let is_a = question.get(end - 4..end - 2)? == [0, 1];
    let dead = says == Says::NoSuchName as u8;
    let address = (is_a && !dead).then_some([127, 0, 0, says]);
    let code = if dead { 3 } else { 0 };
    let mut packet = question[..end].to_vec();
    packet[2..12].copy_from_slice(&[0x81, 0x80 | code, 0, 1, 0, u8::from(address.is_some()), 0, 0, 0, 0]);
    if let Some(address) = address {
        packet.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        packet.extend(address);
    }
    Some(packet)
}

fn start_worker(cluster: &mut Cluster, name: &str, names: &Names) {
    cluster.spawn(name, &["worker", "--allow-net", "127.0.0.0/8", "--dns", &names.address]);
}

fn create(cluster: &Cluster, list: &str, slice_urls: u32) {
    let (urls, slice_urls) = (cluster.write("urls.txt", list), slice_urls.to_string());
    cluster.gleaner(&[
        "dataset",
        "create",
        "birds",
        "--urls",
        &urls,
        "--size",
        "64",
        "--slice-urls",
        &slice_urls,
        "--set",
        "limits.timeout_seconds=8",
        "--set",
        "limits.connect_timeout_seconds=4",
    ]);
}

fn wait(cluster: &Cluster) -> Value {
    cluster.gleaner(&["dataset", "wait", "birds", "--timeout", "120s"]);
    cluster.gleaner(&["fsck", "--deep"]);
    describe(cluster)
}

fn describe(cluster: &Cluster) -> Value {
    cluster.json(&["dataset", "describe", "birds"])
}

fn has_trouble(of: &Value, kind: &str, text: &str) -> bool {
    let troubles = of["troubles"].as_array().expect("a list");
    let is_it =
        |trouble: &&Value| trouble["kind"] == kind && trouble["text"].as_str().is_some_and(|said| said.contains(text));
    troubles.iter().any(|trouble| is_it(&trouble))
}

/// One of two workers is led astray by its name server, and the other one fetches everything.
fn led_astray(says: Says) {
    const URLS: u32 = 900;
    let web = Web::start(Duration::from_millis(5));
    let (good, bad) = (Names::start(Says::Web), Names::start(says));
    let mut cluster = Cluster::start();
    create(&cluster, &web.named("example", URLS), 30);
    start_worker(&mut cluster, "astray", &bad);
    start_worker(&mut cluster, "well", &good);
    let begun = Instant::now();
    cluster.eventually("it is said", |cluster| has_trouble(&cluster.json(&["status"]), "way_out", "no way out"));
    let described = wait(&cluster);
    println!("{says:?}: {} in {:?}, {}", described["outcomes"], begun.elapsed(), described["rounds"]);
    assert_eq!(described["outcomes"], serde_json::json!({ "kept": URLS }), "{described}");
    assert!(cluster.log("astray").contains("offline"), "it says so itself");
    let twice = web.asked().values().filter(|times| **times > 1).count();
    assert!(twice < 100, "{twice} URLs were asked for more than once; probes and no others are");
}

#[test]
fn a_worker_whose_name_server_knows_nothing_lands_nothing() {
    led_astray(Says::NoSuchName);
}

#[test]
fn a_worker_behind_a_captive_portal_lands_nothing() {
    led_astray(Says::Portal);
}

#[test]
fn a_worker_alone_waits_for_its_name_server() {
    const URLS: u32 = 300;
    let web = Web::start(Duration::ZERO);
    let names = Names::start(Says::NoSuchName);
    let mut cluster = Cluster::start();
    create(&cluster, &web.named("example", URLS), 100);
    start_worker(&mut cluster, "alone", &names);
    cluster.eventually("it is said", |cluster| has_trouble(&describe(cluster), "way_out", "no way out"));
    names.say(Says::Web);
    let described = wait(&cluster);
    assert_eq!(described["outcomes"], serde_json::json!({ "kept": URLS }), "{described}");
    // Now it knows what it can compare with.
    names.say(Says::Portal);
    let more = cluster.write("more.txt", &web.named("other", URLS));
    cluster.gleaner(&["dataset", "refresh", "birds", "--urls", &more]);
    cluster.eventually("it is said again", |cluster| has_trouble(&describe(cluster), "way_out", "no way out"));
    names.say(Says::Web);
    let described = wait(&cluster);
    assert_eq!(described["outcomes"], serde_json::json!({ "kept": URLS * 2 }), "{described}");
}

#[test]
fn a_typo_in_the_clusters_settings_closes_nothing_and_is_said() {
    const URLS: u32 = 200;
    let web = Web::start(Duration::ZERO);
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_coordinator_with(&["--lease-seconds", "1"]);
    let placeholders = Path::new(cluster.store()).join(worker::PLACEHOLDERS_KEY);
    std::fs::create_dir_all(placeholders.parent().expect("a folder")).expect("the store is a folder");
    std::fs::write(&placeholders, "abc\n").expect("the store is a folder");
    create(&cluster, &web.plain(URLS), 10);
    (0..6).for_each(|n| cluster.start_worker(&format!("worker-{n}")));
    cluster.eventually("it is said", |cluster| {
        let status = cluster.json(&["status"]);
        let failures: u64 =
            status["troubles"].as_array().expect("a list").iter().filter_map(|t| t["count"].as_u64()).sum();
        has_trouble(&status, "worker", "line 1") && failures > 20
    });
    assert!(cluster.gleaner(&["dataset", "describe", "birds"]).contains("placeholders.txt"));
    std::fs::remove_file(&placeholders).expect("it is there");
    let described = wait(&cluster);
    assert_eq!(described["outcomes"], serde_json::json!({ "kept": URLS }), "{described}");
    assert_eq!(described["rounds"], 1, "{described}");
}

#[test]
fn a_store_that_takes_nothing_for_a_while_costs_nothing_and_is_said() {
    const URLS: u32 = 150;
    let web = Web::start(Duration::from_millis(20));
    let mut cluster = Cluster::start();
    create(&cluster, &web.plain(URLS), 30);
    let datasets = std::fs::read_dir(Path::new(cluster.store()).join("datasets")).expect("it was created");
    let dataset: PathBuf = datasets.map(|entry| entry.expect("an entry").path()).next().expect("the only one");
    // Where a folder should be.
    let in_the_way = dataset.join("outcomes");
    std::fs::write(&in_the_way, "").expect("the store is a folder");
    cluster.start_worker("worker");
    cluster.eventually("it is said", |cluster| has_trouble(&describe(cluster), "store", "outcomes/"));
    std::thread::sleep(Duration::from_secs(10));
    assert_eq!(describe(&cluster)["shards_committed"], 0);
    std::fs::remove_file(&in_the_way).expect("it is there");
    let described = wait(&cluster);
    assert_eq!(described["outcomes"], serde_json::json!({ "kept": URLS }), "{described}");
    assert!(web.asked().values().all(|times| *times == 1), "nothing was fetched again: {:?}", web.asked());
}

#[test]
fn workers_that_are_told_to_leave_leave_what_they_have() {
    const URLS: u32 = 400;
    let web = Web::start(Duration::from_millis(50));
    let mut cluster = Cluster::start();
    create(&cluster, &web.plain(URLS), 100);
    for n in 0..3 {
        cluster.start_worker(&format!("worker-{n}"));
        let before = web.asked().len();
        cluster.eventually("it is in the middle of a slice", |_| web.asked().len() > before + 40);
        let took = cluster.terminate(&format!("worker-{n}"));
        println!("worker-{n} has left in {took:?}, after {} URLs", web.asked().len() - before);
        assert!(took < Duration::from_secs(20), "{took:?}");
    }
    cluster.start_worker("last");
    let described = wait(&cluster);
    assert_eq!(described["outcomes"], serde_json::json!({ "kept": URLS }), "{described}");
    let requests: u32 = web.asked().values().sum();
    println!("requests a URL: {:.3}, rounds: {}", f64::from(requests) / f64::from(URLS), described["rounds"]);
    // And two files in which the site says what may be taken from it.
    assert_eq!((web.asked().len(), requests), (URLS as usize + 2, URLS + 2), "nothing was fetched again");
}
