//! `make soak`: a cluster of real processes, of which something is killed, stopped, cut off or confused every second,
//! over a store that fails. In the end each URL has its outcome, no site was asked faster than it may be, and `gleaner
//! fsck` finds nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use demo_origin::list;
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use object_store::local::LocalFileSystem;
use proto::outcomes::OutcomeRow;
use proto::{Manifest, ShardIndex, Stored, table};
use support::process::signal;
use support::{Cluster, Faults, FaultyStore, Flow, FreeAddress, Rules, S3, Wire};

const WORKERS: usize = 4;
/// Requests at a time that a site bears.
const SLOTS: usize = 3;
const RATE: usize = 60;
/// For what must come to pass in the end.
const PATIENCE: Duration = Duration::from_secs(300);
/// Longer than a lease, after which others do what whoever stands still has begun.
const PAST_THE_LEASE: Duration = Duration::from_secs(5);

struct Soak {
    cluster: Cluster,
    /// Each worker's own way to the coordinator.
    wires: Vec<Wire>,
    faults: Faults,
    random: fastrand::Rng,
    done: BTreeMap<&'static str, u64>,
    begun: Instant,
    /// What went wrong when, in seconds.
    story: Vec<String>,
    /// A worker stands still. What it has asked for stays open at the origin until it reads on.
    reads_nothing: Arc<AtomicBool>,
}

impl Soak {
    fn coordinator_flags() -> [String; 4] {
        ["--site-slots", &SLOTS.to_string(), "--site-rate", &RATE.to_string()].map(str::to_owned)
    }

    fn start_coordinator(&mut self) {
        let flags = Self::coordinator_flags();
        // Reading a store that fails takes some tries.
        self.cluster.start_coordinator_with(&flags.each_ref().map(String::as_str));
    }

    fn start_worker(&mut self, n: usize) {
        let coordinator = format!("http://{}", self.wires[n].address());
        let flags = ["--connections", "8", "--coordinator", &coordinator];
        self.cluster.start_worker_with(&format!("worker-{n}"), &flags);
    }

    fn pick(&mut self) -> (usize, String) {
        let n = self.random.usize(..WORKERS);
        (n, format!("worker-{n}"))
    }

    fn still(&mut self, name: &str, time: Duration) {
        signal(self.cluster.pid(name), "STOP");
        std::thread::sleep(time);
        signal(self.cluster.pid(name), "CONT");
    }

    /// What has ended by itself, as a coordinator that has seen a higher term does, is started again.
    fn revive(&mut self) {
        if !self.cluster.is_alive("coordinator") {
            self.cluster.kill("coordinator");
            self.start_coordinator();
        }
        for n in 0..WORKERS {
            if !self.cluster.is_alive(&format!("worker-{n}")) {
                self.cluster.kill(&format!("worker-{n}"));
                self.start_worker(n);
            }
        }
    }

    /// Gives a command until it ends with one of these codes, while whoever ends is started again.
    fn insist(&mut self, what: &str, command: &[&str], codes: &[i32]) {
        let begun = Instant::now();
        loop {
            self.revive();
            let output = self.cluster.try_gleaner(command);
            if output.status.code().is_some_and(|code| codes.contains(&code)) {
                return;
            }
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                begun.elapsed() < PATIENCE,
                "not within {PATIENCE:?}: {what}: {command:?}: {}: {said}",
                output.status
            );
        }
    }

    /// One thing that goes wrong.
    fn disturb(&mut self, datasets: &[String]) {
        let begun = Instant::now();
        let (n, worker) = self.pick();
        let dataset = datasets[self.random.usize(..datasets.len())].as_str();
        let what = match self.random.u32(..112) {
            0..25 => {
                self.cluster.kill(&worker);
                self.start_worker(n);
                "worker killed"
            }
            25..35 => {
                // Without a look at how it ends: it may have no handler yet.
                signal(self.cluster.pid(&worker), "TERM");
                self.cluster.eventually("it ends", |cluster| !cluster.is_alive(&worker));
                self.cluster.kill(&worker);
                self.start_worker(n);
                "worker ended"
            }
            35..45 => {
                self.reads_nothing.store(true, Ordering::Relaxed);
                self.still(&worker, PAST_THE_LEASE);
                std::thread::sleep(Duration::from_millis(200));
                self.reads_nothing.store(false, Ordering::Relaxed);
                "worker stopped"
            }
            45..60 => {
                self.cluster.kill("coordinator");
                self.start_coordinator();
                "coordinator killed"
            }
            60..65 => {
                self.still("coordinator", PAST_THE_LEASE);
                "coordinator stopped"
            }
            65..72 => {
                self.another_coordinator();
                "two coordinators"
            }
            72..85 => {
                let share = |random: &mut fastrand::Rng| f64::from(random.u32(..15)) / 100.0;
                let (failed, lost, torn) = (share(&mut self.random), share(&mut self.random), share(&mut self.random));
                let delay = Duration::from_millis(self.random.u64(..100));
                self.faults.set(Rules { failed, lost, torn, delay, ..Rules::default() });
                "store changed"
            }
            85..90 => {
                self.faults.set(Rules { full: true, ..Rules::default() });
                std::thread::sleep(Duration::from_secs(3));
                self.faults.set(Rules::default());
                "store full"
            }
            90..94 => {
                self.wires[n].set(Flow::Waits);
                std::thread::sleep(PAST_THE_LEASE);
                self.wires[n].set(Flow::Passes);
                "network cut"
            }
            94..98 => {
                self.wires[n].set(Flow::Answerless);
                std::thread::sleep(PAST_THE_LEASE);
                self.wires[n].set(Flow::Passes);
                "answers held up"
            }
            98..102 => {
                self.wires[n].set(Flow::Resets);
                std::thread::sleep(Duration::from_millis(self.random.u64(..2000)));
                self.wires[n].set(Flow::Passes);
                "connections reset"
            }
            _ => {
                let command = ["pause", "resume", "refresh", "gc"][self.random.usize(..4)];
                // Each may be refused, as a pause of what is ready is; none may do harm.
                let _ = match command {
                    "gc" => self.cluster.try_gleaner(&["gc"]),
                    command => self.cluster.try_gleaner(&["dataset", command, dataset]),
                };
                command
            }
        };
        *self.done.entry(what).or_default() += 1;
        self.story.push(format!(
            "{:.2} to {:.2}: {what} ({worker})",
            (begun - self.begun).as_secs_f64(),
            self.begun.elapsed().as_secs_f64()
        ));
    }

    /// A second coordinator begins a term beside the first, serves for a while, and is killed.
    fn another_coordinator(&mut self) {
        let address = FreeAddress::loopback().to_string();
        let flags = Self::coordinator_flags();
        let command = ["coordinator", "--listen", &address];
        self.cluster.spawn("coordinator-2", &[&command[..], &flags.each_ref().map(String::as_str)].concat());
        std::thread::sleep(Duration::from_millis(self.random.u64(500..4000)));
        self.cluster.kill("coordinator-2");
    }
}

/// The outcomes of a dataset's URLs: of each, what its rounds made of it, and in how many shards it stands.
fn outcomes(store: &Path, manifest: &Manifest) -> BTreeMap<String, Vec<String>> {
    let read = |path: &Path| std::fs::read(path).expect("a file of the store");
    let mut seen = BTreeMap::<String, Vec<String>>::new();
    for index in std::fs::read_dir(store.join(proto::keys::indexes(&manifest.dataset))).expect("shards are committed") {
        let index = ShardIndex::from_json(&read(&index.expect("a file").path())).expect("an index");
        let file = index.outcomes_file.expect("a worker made it");
        let rows: Vec<OutcomeRow> = table::read(Bytes::from(read(&store.join(file.key)))).expect("Parquet");
        rows.into_iter().for_each(|row| seen.entry(row.url).or_default().push(row.outcome));
    }
    seen
}

#[test]
#[ignore = "make soak"]
fn soak() {
    let number = |name: &str, default: u64| {
        std::env::var(name)
            .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
    };
    let (seed, minutes) = (number("SEED", 1), number("MINUTES", 5));
    let origin =
        Origin::serve(Options { seed, delay: Duration::from_millis(60), ..Options::default() }).expect("loopback");
    let origin = Arc::new(origin);
    let (folder, faults) = (tempfile::tempdir().expect("a temporary folder"), Faults::new(seed));
    let store = LocalFileSystem::new_with_prefix(folder.path()).expect("it is there");
    let server = S3::serve(Arc::new(FaultyStore::new(Arc::new(store), faults.clone())));
    let cluster = Cluster::new(Some("s3://bucket/cluster"), server.environment());
    let (random, reads_nothing) = (fastrand::Rng::with_seed(seed), Arc::default());
    let (done, begun, story) = (BTreeMap::new(), Instant::now(), Vec::new());
    let wires = (0..WORKERS).map(|_| Wire::to(cluster.address())).collect();
    let mut soak = Soak { cluster, wires, faults, random, done, begun, story, reads_nothing };
    let over = Arc::new(AtomicBool::new(false));
    let most_at_once = std::thread::spawn({
        let (over, origin, reads_nothing) = (Arc::clone(&over), Arc::clone(&origin), Arc::clone(&soak.reads_nothing));
        let begun = soak.begun;
        move || {
            let (mut most, mut crowded) = (0, Vec::new());
            while !over.load(Ordering::Relaxed) {
                let open = origin.hosts().iter().map(|host| origin.host(host).open).max().unwrap_or(0);
                if !reads_nothing.load(Ordering::Relaxed) {
                    most = most.max(open);
                    if open > SLOTS {
                        crowded.push(begun.elapsed().as_secs_f64());
                    }
                }
                std::thread::sleep(Duration::from_millis(3));
            }
            (most, crowded)
        }
    });
    soak.start_coordinator();
    (0..WORKERS).for_each(|n| soak.start_worker(n));

    let (begun, mut datasets, mut lists) = (Instant::now(), Vec::new(), Vec::new());
    let mut next = 0;
    while begun.elapsed() < Duration::from_secs(60 * minutes) {
        // A new dataset every half minute, beside those that are not ready.
        if begun.elapsed() >= Duration::from_secs(30 * datasets.len() as u64) {
            let urls = 200 + soak.random.u64(..400);
            let entry = |n: u64| {
                let rot = if n.is_multiple_of(3) { Rot::Gone } else { Rot::Good };
                (list::url(rot, (n as usize % 5, n), n, &origin), if rot == Rot::Good { "kept" } else { "not_found" })
            };
            let list: BTreeMap<String, &str> = (next..next + urls).map(entry).collect();
            next += urls;
            let text: String = list.keys().map(|url| format!("n02084071\t{url}\n")).collect();
            let (name, file) = (format!("soak-{}", datasets.len()), soak.cluster.write("urls.txt", &text));
            let splits = ["--size", "64", "--slice-urls", "20"];
            let create = [&["dataset", "create", &name, "--urls", &file], &splits[..]].concat();
            // That it is there already is what a try whose answer was lost has left.
            soak.insist("a list is taken", &create, &[0, 4]);
            datasets.push(name);
            lists.push(list);
        }
        soak.disturb(&datasets);
        soak.revive();
        std::thread::sleep(Duration::from_millis(soak.random.u64(100..1500)));
    }

    soak.faults.set(Rules::default());
    soak.revive();
    let (mut urls, mut rounds) = (0, 0);
    for (name, list) in datasets.iter().zip(&lists) {
        // What is ready has nothing to resume.
        soak.insist("it goes on", &["dataset", "resume", name], &[0, 4]);
        soak.insist("it is ready", &["dataset", "wait", name, "--timeout", "100s"], &[0]);
        let manifest = soak.cluster.gleaner(&["dataset", "manifest", name]);
        let manifest = Manifest::from_json(manifest.as_bytes()).expect("a manifest");
        let seen = outcomes(&folder.path().join("cluster"), &manifest);
        assert!(seen.keys().eq(list.keys()), "{name}: {} URLs have an outcome, of {}", seen.len(), list.len());
        for (url, outcomes) in seen {
            // What is kept is never asked for again; what is gone may be, by a refresh, and what a round had no time
            // for is.
            let told = outcomes.iter().filter(|outcome| *outcome == list[&url]).count();
            let open = outcomes.iter().filter(|outcome| *outcome == "unfetched").count();
            let right = if list[&url] == "kept" { told == 1 } else { told >= 1 };
            assert!(right && told + open == outcomes.len(), "{name}: {url}: {outcomes:?}, wanted {}", list[&url]);
        }
        urls += list.len();
        rounds += soak.cluster.json(&["dataset", "describe", name])["rounds"].as_u64().expect("a count");
    }
    let found = soak.cluster.try_gleaner(&["fsck", "--deep"]);
    let fsck = String::from_utf8_lossy(&found.stdout).into_owned();
    let killed: u64 = soak.done.iter().filter(|(what, _)| what.contains("killed")).map(|(_, times)| times).sum();
    let disturbed: u64 = soak.done.values().sum();
    over.store(true, Ordering::Relaxed);
    let (peak, crowded) = most_at_once.join().expect("it counts");
    println!(
        "soak: seed={seed} minutes={minutes} kills={killed} disturbances={disturbed} datasets={} rounds={rounds} urls={urls} \
         most_at_once={peak} budget={SLOTS} fsck={}",
        datasets.len(),
        found.status.code().unwrap_or(-1)
    );
    println!("{:?}", soak.done);
    assert!(found.status.success(), "{fsck} {:#?}", soak.story);
    assert!(
        peak <= SLOTS,
        "{peak} requests at once at a site that bears {SLOTS}, at {crowded:.2?} s: {:#?}",
        soak.story
    );
}
