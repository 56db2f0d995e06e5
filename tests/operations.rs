//! What operators do to a cluster, and what they see of it: with real processes.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use proto::outcomes::OutcomeRow;
use proto::{Manifest, ShardIndex, Stored, table};
use support::{Cluster, FreeAddress};

fn web(options: Options) -> Origin {
    Origin::serve(options).expect("loopback")
}

/// URLs of which every `good`th shows a picture, each another one; the others are gone.
fn urls(count: u64, good: u64, origin: &Origin) -> Vec<Entry> {
    let entry = |n: u64| {
        let rot = if n.is_multiple_of(good) { Rot::Good } else { Rot::Gone };
        let url = list::url(rot, (0, n), n, origin);
        Entry { synset: "n02084071", url, rot, picture: (0, n), counts: rot == Rot::Good }
    };
    (0..count).map(entry).collect()
}

/// Status and body of `GET path`; none while nobody listens.
fn get(address: &str, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

/// The sum of a metric's values over all its labels.
fn metric(text: &str, name: &str) -> Option<f64> {
    let of = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        (series.split('{').next() == Some(name)).then(|| value.parse::<f64>().ok())?
    };
    let values: Vec<f64> = text.lines().filter_map(of).collect();
    (!values.is_empty()).then(|| values.iter().sum())
}

#[test]
fn workers_come_and_go_in_the_middle_of_a_dataset_each_uses_its_connections_and_nothing_is_lost() {
    const URLS: u64 = 500;
    const CONNECTIONS: usize = 6;
    // The origin's pause, not this machine's cores, is what a worker with few connections is bound by; so most URLs are
    // gone.
    let origin = web(Options { seed: 11, delay: Duration::from_millis(700), ..Options::default() });
    let list = urls(URLS, 10, &origin);
    let mut cluster = Cluster::start();
    let connections = CONNECTIONS.to_string();
    let start = |cluster: &mut Cluster, n: u32| {
        cluster.start_worker_with(&format!("worker-{n}"), &["--connections", &connections]);
    };
    start(&mut cluster, 1);
    let urls = cluster.write("urls.txt", &list::to_text(&list));
    cluster.gleaner(&["dataset", "create", "many", "--urls", &urls, "--size", "64", "--slice-urls", "20"]);

    // Requests that the origin is at: what a slow web gives is bound by them, however fast this machine is.
    let open = || origin.hosts().iter().map(|host| origin.host(host).open).sum::<usize>();
    cluster.eventually("a worker uses all its connections", |_| open() == CONNECTIONS);
    (2..=4).for_each(|n| start(&mut cluster, n));
    cluster.eventually("all four use theirs", |_| open() > 3 * CONNECTIONS);
    for n in 2..=4 {
        let took = cluster.terminate(&format!("worker-{n}"));
        assert!(took < Duration::from_secs(15), "worker-{n} took {took:?} to leave");
    }
    let state = cluster.json(&["dataset", "describe", "many"])["state"].clone();
    assert_eq!(state, "fetching", "they left in the middle");
    cluster.eventually("one alone uses its connections", |_| open() == CONNECTIONS);

    for n in 5..=7 {
        start(&mut cluster, n);
    }
    cluster.gleaner(&["dataset", "wait", "many", "--timeout", "180s"]);
    let json = cluster.gleaner(&["dataset", "manifest", "many"]);
    let manifest = Manifest::from_json(json.as_bytes()).expect("a manifest");
    let store = Path::new(cluster.store());
    let mut seen = BTreeMap::<(String, String), u32>::new();
    for index in std::fs::read_dir(store.join(proto::keys::indexes(&manifest.dataset))).expect("shards are committed") {
        let index = std::fs::read(index.expect("an entry").path()).expect("an index");
        let file = ShardIndex::from_json(&index).expect("an index").outcomes_file.expect("a worker made it");
        let rows: Vec<OutcomeRow> =
            table::read(Bytes::from(std::fs::read(store.join(file.key)).expect("outcomes"))).expect("Parquet");
        // What those that left had not got to is fetched by others.
        let rows = rows.into_iter().filter(|row| row.outcome != "unfetched");
        rows.for_each(|row| *seen.entry((row.url, row.outcome)).or_default() += 1);
    }
    let expected = |entry: Entry| {
        let outcome = if entry.rot == Rot::Good { "kept" } else { "not_found" };
        ((entry.url, outcome.to_owned()), 1)
    };
    assert_eq!(seen, list.into_iter().map(expected).collect(), "each URL has its outcome, once");
}

#[test]
fn every_role_tells_what_it_does_and_whether_it_is_ready() {
    let origin = web(Options { seed: 2, ..Options::default() });
    let addresses = [(); 3].map(|()| FreeAddress::loopback());
    let [coordinator, worker, trainer] = &addresses;
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_worker_with("worker", &["--metrics-listen", worker]);
    cluster.spawn("trainer", &["trainer", "--devices", "cpu", "--metrics-listen", trainer]);
    for address in [worker, trainer] {
        cluster.eventually("it lives", |_| get(address, "/healthz").is_some_and(|(status, _)| status == 200));
        assert_eq!(get(address, "/readyz").map(|(status, _)| status), Some(503), "without a coordinator");
    }
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", cluster.pid("worker"))).expect("it lives");
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).expect("a limit");
    let files: Vec<u64> = files.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    assert!(files.len() < 2 || files[0] >= files[1].min(65_536), "a role raises its limit of open files: {files:?}");
    cluster.start_coordinator_with(&["--metrics-listen", coordinator]);
    for address in &addresses {
        cluster.eventually("it is ready", |_| get(address, "/readyz").is_some_and(|(status, _)| status == 200));
    }

    let urls = cluster.write("urls.txt", &list::to_text(&urls(60, 1, &origin)));
    cluster.gleaner(&["dataset", "create", "some", "--urls", &urls, "--size", "64", "--wait", "--timeout", "120s"]);
    let submit = ["run", "submit", "--dataset", "some", "--name", "short", "--wait", "--timeout", "200s"];
    // One thread waits for no other, however busy the machine is.
    let sets = [
        "train.epochs=40",
        "ranks.threads=1",
        "train.batch=16",
        "input.crop=64",
        "model.arch=alexnet-slim",
        "model.width=0.1",
    ];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let arguments: Vec<&str> = submit.into_iter().chain(sets).collect();
    // What a run does is told while it does it.
    let figures = std::thread::scope(|scope| {
        let cluster = &cluster;
        let done = scope.spawn(move || cluster.gleaner(&arguments));
        let mut figures = Vec::new();
        while !done.is_finished() {
            let text = get(coordinator, "/metrics").map(|(_, text)| text).unwrap_or_default();
            let point = ["gleaner_run_step", "gleaner_run_ranks", "gleaner_run_loss", "gleaner_run_step_seconds"];
            let point: Vec<f64> = point.iter().filter_map(|name| metric(&text, name)).collect();
            figures.extend((point.len() == 4).then_some(point));
            std::thread::sleep(Duration::from_millis(200));
        }
        done.join().expect("the run ended well");
        figures
    });
    let last = figures.last().expect("the run was seen while it went on");
    assert!(last[0] > 0.0 && last[1] == 1.0 && last[2].is_finite() && last[3] > 0.0, "{figures:?}");

    let read = |address: &str| get(address, "/metrics").expect("it listens").1;
    let of = |text: &str, name: &str| metric(text, name).unwrap_or_else(|| panic!("no {name} in\n{text}"));
    let text = read(worker);
    assert_eq!(of(&text, "gleaner_worker_urls_total"), 60.0);
    assert_eq!(of(&text, "gleaner_worker_decode_seconds_count"), 60.0);
    assert!(
        of(&text, "gleaner_worker_fetched_bytes_total") > 60.0 * 500.0 && of(&text, "gleaner_store_bytes_total") > 0.0
    );
    assert_eq!(of(&text, "gleaner_worker_urls_in_flight"), 0.0);
    let text = read(coordinator);
    assert_eq!((of(&text, "gleaner_coordinator_term"), of(&text, "gleaner_shards_committed_total")), (1.0, 1.0));
    assert_eq!(
        (of(&text, "gleaner_shards"), of(&text, "gleaner_workers"), of(&text, "gleaner_devices")),
        (0.0, 1.0, 1.0)
    );
    assert!(of(&text, "gleaner_store_requests_total") > 16.0, "the check for put-if-absent alone takes more");
    cluster.eventually("an ended run's labels are gone", |_| !read(coordinator).contains("run=\"short\""));
    let text = read(trainer);
    assert_eq!((of(&text, "gleaner_trainer_devices"), of(&text, "gleaner_trainer_ranks_started_total")), (1.0, 1.0));
    let parts = text.lines().filter(|line| line.starts_with("gleaner_store_bytes_total{direction=\"read\"}"));
    let read_by_ranks: f64 = parts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
    assert!(read_by_ranks > 60.0 * 500.0, "an agent counts what its ranks read: {read_by_ranks}");

    cluster.kill("coordinator");
    for address in [worker, trainer] {
        cluster
            .eventually("it is not ready alone", |_| get(address, "/readyz").is_some_and(|(status, _)| status == 503));
        assert_eq!(get(address, "/healthz").map(|(status, _)| status), Some(200));
    }
}
