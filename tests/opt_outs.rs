//! What owners say against the use of their pictures, seen from their side: what says no is not asked for, and is in no
//! dataset.

#![allow(clippy::print_stdout, reason = "what was counted is what people run these tests for, too")]

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use demo_origin::pictures::picture;
use proto::outcomes::OutcomeRow;
use proto::{Manifest, Stored, table};
use support::Cluster;
use support::net::name_server;

const ROBOTS: &str = "/robots.txt";
const TDM: &str = "/.well-known/tdmrep.json";
const WORKERS: usize = 4;

/// A web server that is whatever host it is called by, and counts what is asked of each.
struct Origin {
    port: u16,
    picture: Vec<u8>,
    asked: Mutex<HashMap<(String, String), usize>>,
}

/// The status and headers, and the body, of what a host answers; None: a picture.
fn said(host: &str, path: &str, port: u16) -> Option<(String, String)> {
    let text = |text: &str| Some(("200 OK".to_owned(), text.to_owned()));
    let header = |header: &str| Some((format!("200 OK\r\n{header}"), String::new()));
    match (host, path) {
        ("robots.test", ROBOTS) => text("User-agent: *\nDisallow: /no/*.jpg\n\nUser-agent: other\nDisallow: /"),
        ("named.test", ROBOTS) => text("User-agent: *\nAllow: /\n\nUser-agent: gleaner\nDisallow: /"),
        ("signal.test", ROBOTS) => text("User-agent: *\nContent-Signal: search=yes, ai-train=no\nAllow: /"),
        ("usage.test", ROBOTS) => text("User-agent: *\nContent-Usage: train-ai=n\nContent-Usage: /yes/ train-ai=y"),
        ("tdm.test", TDM) => text(r#"[{"location": "/no/", "tdm-reservation": 1}]"#),
        ("moved.test", ROBOTS) => {
            Some((format!("301 Moved\r\nLocation: http://www.moved.test:{port}{ROBOTS}"), String::new()))
        }
        ("www.moved.test", ROBOTS) => text("User-agent: *\nDisallow: /no/"),
        ("sick.test", ROBOTS) => Some(("503 Unavailable".to_owned(), String::new())),
        ("page.test", _) if !path.ends_with(".jpg") => text("<!doctype html><title>Disallow: /</title>"),
        ("leads.test", _) if path.starts_with("/no/") => {
            Some((format!("302 Found\r\nLocation: http://robots.test:{port}{path}"), String::new()))
        }
        ("own.test", _) if path.starts_with("/no/") => {
            Some((format!("302 Found\r\nLocation: http://own.test:{port}/hidden{path}"), String::new()))
        }
        ("own.test", ROBOTS) => text("User-agent: *\nDisallow: /hidden/"),
        ("tag.test", _) if path.starts_with("/no/") => header("X-Robots-Tag: noai"),
        ("tdm-header.test", _) if path.starts_with("/no/") => header("TDM-Reservation: 1"),
        ("usage-header.test", _) if path.starts_with("/no/") => header("Content-Usage: search=y, train-ai=n"),
        ("signal-header.test", _) if path.starts_with("/no/") => header("Content-Signal: ai-train=no"),
        ("large.test", ROBOTS) => text("User-agent: *\nDisallow: /no/"),
        (_, ROBOTS | TDM) => Some(("404 Not Found".to_owned(), String::new())),
        _ => None,
    }
}

impl Origin {
    fn start() -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let origin = Arc::new(Self { port, picture: picture(1, 0, 0), asked: Mutex::default() });
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

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().transpose()?.unwrap_or_default();
        let path = first.split(' ').nth(1).unwrap_or("/").to_owned();
        let mut host = String::new();
        while let Some(line) = lines.next().transpose()?.filter(|line| !line.is_empty()) {
            if let Some((_, value)) = line.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("host")) {
                value.trim().split(':').next().unwrap_or_default().clone_into(&mut host);
            }
        }
        self.asked(|asked| *asked.entry((host.clone(), path.clone())).or_insert(0) += 1);
        let number: u32 = path.bytes().fold(7, |number, byte| number.wrapping_mul(31).wrapping_add(byte.into()));
        let jpeg = [&self.picture[..2], &[0xff, 0xfe, 0, 6], &number.to_be_bytes(), &self.picture[2..]].concat();
        let (head, body) = match said(&host, &path, self.port) {
            Some((head, body)) if path.ends_with(".jpg") && body.is_empty() && head.starts_with("200") => (head, jpeg),
            Some((head, body)) => (head, body.into_bytes()),
            None => ("200 OK".to_owned(), jpeg),
        };
        let head = format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), &body].concat())
    }

    fn asked<T>(&self, look: impl FnOnce(&mut HashMap<(String, String), usize>) -> T) -> T {
        look(&mut self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How often a host was asked for paths that begin so.
    fn count(&self, host: &str, path: &str) -> usize {
        let fits = |(of, at): &(String, String)| of == host && at.starts_with(path);
        self.asked(|asked| asked.iter().filter(|(of, _)| fits(of)).map(|(_, times)| times).sum())
    }

    /// Lines of a list: so many pictures below a folder of a host.
    fn lines(&self, host: &str, folder: &str, pictures: usize) -> String {
        (0..pictures).map(|n| format!("n{}\thttp://{host}:{}/{folder}/{n}.jpg\n", n % 2, self.port)).collect()
    }
}

/// What became of each URL: its outcome, and what more is said of it.
fn outcomes(cluster: &Cluster, name: &str) -> BTreeMap<String, (String, Option<String>)> {
    cluster.gleaner(&["dataset", "wait", name, "--timeout", "120s"]);
    let manifest = cluster.gleaner(&["dataset", "manifest", name]);
    let manifest = Manifest::from_json(manifest.as_bytes()).expect("a manifest");
    let files = manifest.shards.iter().filter_map(|shard| shard.outcomes.as_ref());
    let read = |key: &str| std::fs::read(std::path::Path::new(cluster.store()).join(key)).expect("outcomes");
    let rows = files.flat_map(|file| table::read::<OutcomeRow>(read(&file.key).into()).expect("own output"));
    let of = |row: OutcomeRow| (row.url.split('/').skip(2).collect::<Vec<_>>().join("/"), (row.outcome, row.detail));
    rows.map(of).collect()
}

fn create(cluster: &Cluster, name: &str, list: &str, more: &[&str]) {
    let urls = cluster.write(&format!("{name}.txt"), list);
    let always = ["dataset", "create", name, "--urls", &urls, "--size", "64", "--slice-urls", "20"];
    cluster.gleaner(&[&always, more].concat());
}

#[test]
fn what_says_no_is_not_asked_for_and_each_file_is_fetched_once_for_all_workers() {
    let (origin, dns) = (Origin::start(), name_server());
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_coordinator_with(&["--site-slots", "4", "--site-budget", "large.test=8/60"]);
    for n in 0..WORKERS {
        let flags = ["worker", "--allow-net", "127.0.0.0/8", "--dns", &dns, "--connections", "16"];
        cluster.spawn(&format!("worker-{n}"), &flags);
    }
    // Where the no is, what is said of it, and how many requests a picture that it meets costs.
    let refusals = [
        ("robots.test", "robots.txt", 0),
        ("named.test", "robots.txt", 0),
        ("signal.test", "content-signal in robots.txt", 0),
        ("usage.test", "content-usage in robots.txt", 0),
        ("tdm.test", "tdmrep.json", 0),
        ("moved.test", "robots.txt", 0),
        ("leads.test", "robots.txt", 1),
        ("own.test", "robots.txt", 1),
        ("tag.test", "x-robots-tag", 1),
        ("tdm-header.test", "tdm-reservation", 1),
        ("usage-header.test", "content-usage", 1),
        ("signal-header.test", "content-signal", 1),
        ("large.test", "robots.txt", 0),
    ];
    let all_refused = ["named.test", "signal.test"];
    let mut list: String = refusals.iter().map(|(host, ..)| origin.lines(host, "no", 2)).collect();
    let allowed = refusals.iter().filter(|(host, ..)| !all_refused.contains(host)).map(|(host, ..)| *host);
    list.extend(allowed.clone().chain(["page.test"]).map(|host| origin.lines(host, "yes", 2)));
    list += &origin.lines("large.test", "more", 200);
    list += &origin.lines("sick.test", "no", 2);
    create(&cluster, "one", &list, &["--set", "limits.retries=1"]);
    let outcomes_of_one = outcomes(&cluster, "one");
    let at = |host: &str, path: &str| format!("{host}:{}/{path}", origin.port);
    for (host, signal, requests) in refusals {
        for n in 0..2 {
            let (outcome, detail) = &outcomes_of_one[&at(host, &format!("no/{n}.jpg"))];
            assert_eq!((outcome.as_str(), detail.as_deref()), ("opted_out", Some(signal)), "{host}");
        }
        assert_eq!(origin.count(host, "/no/"), 2 * requests, "{host}");
    }
    assert_eq!(origin.count("own.test", "/hidden/"), 0, "a redirect leads to what may not be asked for");
    for (url, (outcome, detail)) in outcomes_of_one.iter().filter(|(url, _)| !url.contains("/no/")) {
        assert_eq!((outcome.as_str(), detail), ("kept", &None), "{url}");
    }
    // A site in trouble is none that says no, and nothing is asked of it meanwhile.
    let (outcome, detail) = &outcomes_of_one[&at("sick.test", "no/0.jpg")];
    assert_eq!((outcome.as_str(), detail.as_deref()), ("http_status", Some("robots.txt")));
    assert_eq!(origin.count("sick.test", "/no/"), 0);
    let makers = cluster.json(&["dataset", "describe", "one"]);
    println!("kept {}, {} URLs", makers["outcomes"]["kept"], outcomes_of_one.len());

    let once = |what: &str| {
        for host in refusals.map(|(host, ..)| host).into_iter().chain(["www.moved.test"]) {
            assert_eq!(origin.count(host, ROBOTS), 1, "{host}: {what}");
            let tdm = if all_refused.contains(&host) || host == "www.moved.test" { 0 } else { 1 };
            assert_eq!(origin.count(host, TDM), tdm, "{host}: {what}");
        }
    };
    once("four workers");
    let pictures = || refusals.iter().map(|(host, ..)| origin.count(host, "/no/")).sum::<usize>();
    let before = pictures();
    create(&cluster, "two", &list, &["--set", "limits.retries=0"]);
    assert_eq!(outcomes(&cluster, "two").len(), outcomes_of_one.len());
    once("a second dataset");
    assert_eq!(pictures(), before + 2 * 6, "only where a header says it");

    // Whoever respects nothing takes everything, and asks for no file.
    create(&cluster, "three", &list, &["--respect", "none"]);
    let sick = origin.count("sick.test", ROBOTS);
    let outcomes_of_three = outcomes(&cluster, "three");
    assert!(outcomes_of_three.values().all(|(outcome, _)| outcome == "kept"), "{outcomes_of_three:?}");
    once("a dataset that respects nothing");
    assert_eq!(origin.count("sick.test", ROBOTS), sick);

    // Some of it.
    create(&cluster, "four", &list, &["--respect", "tdm,x-robots-tag"]);
    let outcomes_of_four = outcomes(&cluster, "four");
    let refused: Vec<&str> = outcomes_of_four.values().filter_map(|(_, detail)| detail.as_deref()).collect();
    let count = |signal| refused.iter().filter(|detail| **detail == signal).count();
    let counts = [count("tdmrep.json"), count("tdm-reservation"), count("x-robots-tag"), refused.len()];
    assert_eq!(counts, [2, 2, 2, 6]);
}
