//! What an origin sees of many workers: together they keep each site's budget, and find out what a site bears.

#![allow(clippy::print_stdout, reason = "what was counted is what people run these tests for, too")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use demo_origin::pictures::picture;
use proto::round::Round;
use support::Cluster;
use support::net::name_server;
use support::process::signal;

/// Before each answer.
const DELAY: Duration = Duration::from_millis(100);

/// What was asked of one site.
#[derive(Debug, Clone, Default)]
struct Seen {
    arrivals: Vec<Instant>,
    open: usize,
    peak: usize,
    throttled: usize,
    /// Requests that it would answer at once, by a bucket that is filled evenly.
    bucket: f64,
}

impl Seen {
    /// Requests per second, at the most, in any five seconds.
    fn rate(&self) -> f64 {
        let seconds = Duration::from_secs(5);
        let within = |from: &Instant| self.arrivals.iter().filter(|at| *at >= from && **at < *from + seconds).count();
        // The first one opens the time, and is of the time before.
        (self.arrivals.iter().map(within).max().unwrap_or(0).saturating_sub(1)) as f64 / seconds.as_secs_f64()
    }
}

/// A web server that is whatever host it is called by, and counts by site: the last two labels.
struct Origin {
    port: u16,
    /// Requests a second above which a site answers 429.
    limits: HashMap<&'static str, f64>,
    picture: Vec<u8>,
    seen: Mutex<HashMap<String, Seen>>,
}

impl Origin {
    fn start(limits: &[(&'static str, f64)]) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let limits = limits.iter().copied().collect();
        let origin = Arc::new(Self { port, limits, picture: picture(1, 0, 0), seen: Mutex::default() });
        let this = Arc::clone(&origin);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let this = Arc::clone(&this);
                // A peer that goes away is no matter of the server.
                std::thread::spawn(move || this.serve(stream).ok());
            }
        });
        origin
    }

    fn seen<T>(&self, site: &str, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(self.seen.lock().unwrap_or_else(PoisonError::into_inner).entry(site.to_owned()).or_default())
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().transpose()?.unwrap_or_default();
        let mut host = String::new();
        while let Some(line) = lines.next().transpose()?.filter(|line| !line.is_empty()) {
            if let Some((_, value)) = line.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("host")) {
                value.trim().split(':').next().unwrap_or_default().clone_into(&mut host);
            }
        }
        let site = host.rsplitn(3, '.').take(2).collect::<Vec<_>>();
        let site = site.into_iter().rev().collect::<Vec<_>>().join(".");
        let now = Instant::now();
        let limit = self.limits.get(site.as_str());
        let throttled = self.seen(&site, |seen| {
            let since = seen.arrivals.last().map_or(1.0, |last| (now - *last).as_secs_f64());
            seen.arrivals.push(now);
            seen.open += 1;
            seen.peak = seen.peak.max(seen.open);
            let Some(limit) = limit else { return false };
            seen.bucket = (seen.bucket + since * limit).min(*limit);
            let throttled = seen.bucket < 1.0;
            (seen.bucket, seen.throttled) =
                if throttled { (seen.bucket, seen.throttled + 1) } else { (seen.bucket - 1.0, seen.throttled) };
            throttled
        });
        std::thread::sleep(DELAY);
        // Whoever has the whole answer may ask again.
        self.seen(&site, |seen| seen.open -= 1);
        if throttled {
            return stream.write_all(b"HTTP/1.1 429 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        let path = first.split(' ').nth(1).unwrap_or("/");
        if let Some((host, number)) = path.strip_prefix("/to/").and_then(|to| to.split_once('/')) {
            let (port, length) = (self.port, "Content-Length: 0\r\nConnection: close");
            let moved = format!("HTTP/1.1 302 Found\r\nLocation: http://{host}:{port}/{number}\r\n{length}\r\n\r\n");
            return stream.write_all(moved.as_bytes());
        }
        let number: u32 = path[1..].parse().unwrap_or(0);
        let jpeg = [&self.picture[..2], &[0xff, 0xfe, 0, 6], &number.to_be_bytes(), &self.picture[2..]].concat();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", jpeg.len());
        stream.write_all(&[head.as_bytes(), &jpeg].concat())
    }

    fn lines(&self, host: &str, numbers: std::ops::Range<u32>) -> String {
        self.lines_with(host, "", numbers)
    }

    fn lines_with(&self, host: &str, path: &str, numbers: std::ops::Range<u32>) -> String {
        numbers.map(|n| format!("n{}\thttp://{host}:{}/{path}{n}\n", n % 3, self.port)).collect()
    }

    /// Shows what a site saw, and fails if that was more than its budget.
    fn check(&self, site: &str, requests: usize, slots: usize, rate: f64) {
        let seen = self.seen(site, |seen| seen.clone());
        println!("{site}: {} requests, {} at once, {:.1} a second", seen.arrivals.len(), seen.peak, seen.rate());
        assert!(seen.arrivals.len() >= requests, "{site}: {}", seen.arrivals.len());
        assert!(seen.peak <= slots, "{site}: {} at once", seen.peak);
        // Requests that are evenly spaced arrive with some jitter.
        assert!(seen.rate() <= rate * 1.05, "{site}: {:.1} a second", seen.rate());
    }
}

/// A cluster whose workers find all names at the origin.
fn cluster(flags: &[&str], workers: usize, connections: &str) -> Cluster {
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_coordinator_with(flags);
    start_workers(&mut cluster, workers, connections);
    cluster
}

fn start_workers(cluster: &mut Cluster, workers: usize, connections: &str) {
    let dns = name_server();
    for n in 0..workers {
        let flags = ["worker", "--allow-net", "127.0.0.0/8", "--dns", &dns, "--connections", connections];
        cluster.spawn(&format!("worker-{n}"), &flags);
    }
}

/// Creates a dataset of small slices.
fn create(cluster: &Cluster, name: &str, list: &str, slice_urls: &str) {
    let urls = cluster.write(&format!("{name}.txt"), list);
    cluster.gleaner(&["dataset", "create", name, "--urls", &urls, "--size", "64", "--slice-urls", slice_urls]);
}

/// How many URLs were kept, once it is ready.
fn kept(cluster: &Cluster, name: &str) -> u64 {
    cluster.gleaner(&["dataset", "wait", name, "--timeout", "120s"]);
    cluster.json(&["dataset", "describe", name])["outcomes"]["kept"].as_u64().unwrap_or(0)
}

#[test]
fn twelve_workers_keep_the_budgets_of_sites_together_over_datasets_and_redirects() {
    let origin = Origin::start(&[]);
    let budgets = ["--site-slots", "4", "--site-rate", "20", "--site-budget", "named.test=2/10,large.test=4/20"];
    let cluster = cluster(&budgets, 12, "3");
    // As many of each as a list has that was not sorted by site; the second dataset meets the same sites, and its other
    // URLs lead to one of them.
    let mut lists = [String::new(), String::new()];
    for slice in 0..12 {
        for (which, list) in (0..).zip(&mut lists) {
            let numbers = |from: u32, each: u32| from + slice * each..from + slice * each + each / 2;
            *list += &origin.lines("www.even.test", numbers(1000 + which * 3, 6));
            for name in 0..5 {
                *list += &origin.lines(&format!("n{name}.named.test"), numbers(2000 + 100 * name + which, 2));
            }
            *list += &origin.lines(&format!("img{}.large.test", slice % 3), numbers(4000 + which * 8, 16));
            *list += &origin.lines(&format!("f{slice}.test"), numbers(5000 + which * 8, 16));
        }
        let to = format!("to/x{}.named.test/", slice % 3);
        lists[1] += &origin.lines_with(&format!("r{slice}.test"), &to, 7000 + slice * 3..7000 + slice * 3 + 3);
    }
    for (name, list) in ["one", "two"].iter().zip(&lists) {
        create(&cluster, name, list, "60");
    }
    for (name, list) in ["one", "two"].iter().zip(&lists) {
        assert_eq!(kept(&cluster, name), list.lines().count() as u64, "{name}");
    }
    origin.check("even.test", 72, 4, 20.0);
    origin.check("named.test", 120 + 36, 2, 10.0);
    origin.check("large.test", 192, 4, 20.0);
    origin.check("f3.test", 16, 4, 20.0);
}

#[test]
fn budgets_hold_while_coordinators_are_killed_and_a_worker_stands_still() {
    let origin = Origin::start(&[]);
    let budgets = ["--site-budget", "small.test=3/15,large.test=4/20"];
    let mut cluster = cluster(&budgets, 4, "4");
    let list = origin.lines("a.large.test", 0..240) + &origin.lines("b.small.test", 1000..1080);
    create(&cluster, "one", &list, "90");
    let other = origin.lines("c.small.test", 2000..2080);
    create(&cluster, "two", &other, "90");
    let asked = |site: &str| origin.seen(site, |seen| seen.arrivals.len());
    let many = |site: &'static str, many: usize| move |_: &Cluster| asked(site) >= many;
    cluster.eventually("requests come", many("large.test", 20));
    cluster.kill("coordinator");
    cluster.start_coordinator_with(&budgets);
    cluster.eventually("it goes on", many("large.test", 60));
    cluster.kill("coordinator");
    // Longer than leases last.
    std::thread::sleep(Duration::from_secs(4));
    let before = asked("large.test");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(asked("large.test"), before, "nobody has a part any more");
    cluster.start_coordinator_with(&budgets);
    cluster.eventually("it goes on", many("large.test", before + 20));
    // All of them in turn: one of them has the large site.
    for n in 0..4 {
        signal(cluster.pid(&format!("worker-{n}")), "STOP");
        std::thread::sleep(Duration::from_secs(4));
        signal(cluster.pid(&format!("worker-{n}")), "CONT");
    }
    assert_eq!(kept(&cluster, "one") + kept(&cluster, "two"), 400);
    origin.check("large.test", 240, 4, 20.0);
    origin.check("small.test", 160, 3, 15.0);
}

#[test]
fn four_workers_find_out_what_a_site_bears_and_keep_everything() {
    let origin = Origin::start(&[("tight.test", 2.0)]);
    let cluster = cluster(&[], 4, "16");
    create(&cluster, "tight", &(origin.lines("www.tight.test", 0..60) + &origin.lines("other.test", 100..120)), "20");
    assert_eq!(kept(&cluster, "tight"), 80);
    let seen = origin.seen("tight.test", |seen| seen.clone());
    println!("tight.test: {} requests, {} were answered 429", seen.arrivals.len(), seen.throttled);
    assert!(seen.throttled * 20 <= seen.arrivals.len(), "{} of {}", seen.throttled, seen.arrivals.len());
}

#[test]
fn slices_that_were_not_dealt_by_site_are_finished_within_the_budgets() {
    let origin = Origin::start(&[]);
    let budgets = ["--site-budget", "a.test=2/20,b.test=1/10"];
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_coordinator_with(&budgets);
    create(&cluster, "old", &(origin.lines("a.test", 0..100) + &origin.lines("b.test", 100..140)), "35");
    cluster.kill("coordinator");
    // As an older version has cut it: every site is in each slice.
    let folder = std::fs::read_dir(std::path::Path::new(cluster.store()).join("datasets")).expect("a folder").flatten();
    let id = folder.map(|entry| entry.file_name().into_string().expect("a name")).next().expect("a dataset");
    let id: proto::DatasetId = id.parse().expect("an id");
    let file = |key: String| std::path::Path::new(cluster.store()).join(key);
    let round_file = file(proto::keys::round(&id, 1));
    let mut round =
        <Round as proto::Stored>::from_json(&std::fs::read(&round_file).expect("a round")).expect("a round");
    let slice = |shard| file(proto::keys::slice(&id.shard(shard)));
    let unpack = |shard| proto::slice::unpack(&std::fs::read(slice(shard)).expect("a slice")).expect("a slice");
    let texts: Vec<String> = round.shards().map(unpack).collect();
    let lines: Vec<_> =
        texts.iter().flat_map(|text| proto::slice::entries(text)).map(|line| line.expect("good")).collect();
    let many = round.slices.len();
    for (n, there) in round.slices.iter_mut().enumerate() {
        let mut writer = proto::slice::SliceWriter::new().expect("in memory");
        for line in lines.iter().skip(n).step_by(many) {
            writer.push(line.key, line.synset.as_bytes(), line.url.as_bytes()).expect("in memory");
        }
        there.urls = writer.urls();
        let bytes = writer.finish().expect("in memory");
        there.sha256 = proto::shard::sha256_hex(&bytes);
        std::fs::write(slice(round.first_slice + n as u32), bytes).expect("writes");
    }
    round.large_sites = None;
    std::fs::write(&round_file, proto::Stored::to_json(&round)).expect("writes");
    cluster.start_coordinator_with(&budgets);
    start_workers(&mut cluster, 4, "8");
    assert_eq!(kept(&cluster, "old"), 140);
    origin.check("a.test", 100, 2, 20.0);
    origin.check("b.test", 40, 1, 10.0);
}
