//! The pages, as a browser gets them from a real cluster: they say what the command line says, and show what is stored.

mod small;

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use demo_origin::list;
use demo_origin::origin::{Options, Origin};
use demo_origin::pictures::CLASSES;
use demo_origin::rot::Rot;
use small::{dataset, submit, wait};
use support::{Cluster, FreeAddress};

/// What a page's server answered.
struct Answer {
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn status(&self) -> &str {
        self.head.split(' ').nth(1).unwrap_or_default()
    }
}

/// Asks for a page as somebody who calls the server `host`.
fn get_as(host: &str, address: &str, path: &str) -> Answer {
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n"))
}

/// Sends the head of a request, without its end.
fn ask(address: &str, head: &str) -> Answer {
    let mut socket = TcpStream::connect(address).expect("it listens");
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    write!(socket, "{head}Connection: close\r\n\r\n").expect("it reads");
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).expect("it answers");
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a head") + 4;
    let body = bytes.split_off(end);
    Answer { head: String::from_utf8_lossy(&bytes).to_lowercase(), body }
}

/// The page of a server that is there.
fn get(address: &str, path: &str) -> String {
    let answer = get_as(address, address, path);
    assert_eq!(answer.status(), "200", "{path}: {}", answer.text());
    // Nothing from anywhere else, and nothing that the policy would not let run.
    let text = answer.text();
    for foreign in ["src=\"http", "href=\"http", "<style", " style=", "onclick", "javascript:"] {
        assert!(!text.contains(foreign), "{path} has {foreign}");
    }
    assert!(answer.head.contains("content-security-policy: default-src 'none'"), "{}", answer.head);
    assert!(answer.body.len() < 100_000, "{path}: {} bytes", answer.body.len());
    text
}

fn start_pages(cluster: &mut Cluster) -> FreeAddress {
    let address = FreeAddress::loopback();
    let coordinator = format!("http://{}", cluster.address());
    cluster.spawn("web", &["web", "--web-listen", &address.to_string(), "--coordinator", &coordinator]);
    cluster.eventually("the pages are served", |_| TcpStream::connect(address.to_string()).is_ok());
    address
}

/// A number as pages write it.
fn apart(n: u64) -> String {
    let digits = n.to_string();
    let places = digits.char_indices().map(|(i, digit)| match (digits.len() - i) % 3 {
        0 if i > 0 => format!("\u{202f}{digit}"),
        _ => digit.to_string(),
    });
    places.collect()
}

#[test]
fn pages_say_what_the_command_line_says_and_show_the_stored_pictures() {
    let mut cluster = Cluster::start();
    let pages = start_pages(&mut cluster).to_string();
    assert!(get(&pages, "/").contains("Nothing here yet"));
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 1);
    submit(&cluster, "one", 4, &["ranks.max=1"]);
    wait(&cluster, "one");
    submit(&cluster, "two", 4, &["ranks.max=1", "train.learning_rate=0.01"]);
    wait(&cluster, "two");

    let described = cluster.json(&["dataset", "describe", "small"]);
    let home = get(&pages, "/");
    for link in ["/datasets/small", "/runs/one", "/runs/two", "All is quiet"] {
        assert!(home.contains(link), "{link}: {home}");
    }
    let page = get(&pages, "/datasets/small");
    for class in described["classes"].as_array().expect("classes") {
        for count in ["train", "validation", "test"] {
            let cell = format!("<td class=\"n\">{}</td>", apart(class[count].as_u64().expect("a count")));
            assert!(page.contains(&cell), "{cell}: {page}");
        }
    }
    for (outcome, urls) in described["outcomes"].as_object().expect("outcomes") {
        let urls = apart(urls.as_u64().expect("a count"));
        assert!(page.contains(&format!("?outcome={outcome}")) && page.contains(&urls), "{outcome} {urls}: {page}");
    }

    // All pictures of the sheet are stored ones, of the class that was asked for.
    let synset = described["classes"][2]["synset"].as_str().expect("a synset");
    let sheet = get(&pages, &format!("/datasets/small?class={synset}"));
    let pictures: Vec<&str> = sheet.split("src=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    let pictures: Vec<&str> = pictures.into_iter().filter(|address| address.contains("/pictures/")).collect();
    assert!(pictures.len() >= 20, "{sheet}");
    let names = described["classes"][2]["name"].as_str().filter(|name| !name.is_empty()).unwrap_or(synset);
    assert_eq!(sheet.matches(&format!("alt=\"{names}, sample")).count(), pictures.len(), "{sheet}");
    for picture in [pictures[0], pictures[pictures.len() - 1]] {
        let answer = get_as(&pages, &pages, picture);
        assert!(answer.status() == "200" && answer.head.contains("image/jpeg"), "{}", answer.head);
        let header = turbojpeg::read_header(&answer.body).expect("a JPEG");
        assert_eq!(header.width.min(header.height), 72);
    }
    for gone in ["/datasets/small/pictures/1/0/train/99/0.jpg", "/datasets/small/pictures/1/0/train/0/x.jpg"] {
        assert_eq!(get_as(&pages, &pages, gone).status(), "404", "{gone}");
    }

    let kept = described["outcomes"]["kept"].as_u64().expect("a count");
    let urls = get(&pages, "/datasets/small/urls?outcome=kept");
    assert!(urls.contains(&format!("{} of 200 URLs", apart(kept))), "{urls}");
    assert!(get(&pages, "/datasets/small/urls?url=%3Cscript%3E").contains("0 of 200 URLs"));

    let run = cluster.json(&["run", "describe", "one"]);
    let page = get(&pages, "/runs/one");
    let test = format!("test top-1 {:.1} %", 100.0 * run["test"]["top1"].as_f64().expect("a share"));
    assert!(page.contains(&test) && page.contains("done. Step"), "{test}: {page}");
    assert_eq!(page.matches("<figure class=\"chart\"").count(), 4, "{page}");
    let explained = cluster.json(&["run", "explain", "one"]);
    assert!(page.contains(&format!("bound by {}", explained["bound_by"].as_str().expect("a word"))), "{page}");
    let logged = cluster.gleaner(&["run", "logs", "one"]);
    assert!(get(&pages, "/runs/one/logs").contains(&format!("The newest {} lines", logged.lines().count())));
    let compared = get(&pages, "/compare?a=one&b=two");
    assert!(compared.contains("train.learning_rate") && !compared.contains("model.width"), "{compared}");
    assert_eq!(get_as(&pages, &pages, "/compare?a=one").status(), "400");

    // A third run like these would take as long.
    let spec = cluster.path("one.toml").display().to_string();
    let planned = cluster.json(&["run", "submit", "-f", &spec, "--name", "three", "--dry-run"]);
    let seconds = planned["seconds"].as_f64().expect("it is known");
    assert!((0.1..600.0).contains(&seconds) && planned["steps_per_epoch"] == run["steps_per_epoch"], "{planned}");

    nonsense(&pages);
    for missing in ["/datasets/none", "/runs/none", "/nothing"] {
        assert_eq!(get_as(&pages, &pages, missing).status(), "404", "{missing}");
    }

    // Once the cluster is gone, its store alone says the same, and stays as it is.
    let shown = ["/datasets/small", "/datasets/small/urls?outcome=kept", "/runs/one", "/runs/one/logs"];
    let before = shown.map(|path| get(&pages, path));
    for role in ["web", "trainer", "worker", "coordinator"] {
        cluster.terminate(role);
    }
    let stored = objects(Path::new(cluster.store()));
    let address = FreeAddress::loopback().to_string();
    let store = cluster.store().to_owned();
    cluster.spawn("after", &["web", "--web-listen", &address, "--store", &store]);
    cluster.eventually("the store is shown", |_| {
        TcpStream::connect(&address).is_ok() && get_as(&address, &address, "/").status() == "200"
    });
    // A running coordinator may know newer points of a curve than were stored.
    let told = |page: &str| page.split("<section id=\"curves\"").next().map(str::to_owned);
    for (path, before) in shown.iter().zip(&before) {
        assert!(told(&get(&address, path)) == told(before), "{path}");
    }
    assert_eq!(get_as(&address, &address, pictures[0]).status(), "200");
    cluster.terminate("after");
    assert_eq!(objects(Path::new(cluster.store())), stored);
    let none = cluster.try_gleaner(&["web", "--store", "/nowhere"]);
    assert!(String::from_utf8_lossy(&none.stderr).contains("there is no such folder"), "{none:?}");
}

/// Whatever is asked of the pages, they have an answer, and it is no fault of their own.
fn nonsense(pages: &str) {
    const ROUTES: [&str; 13] = [
        "/datasets/*",
        "/datasets/*/urls",
        "/datasets/*/rejected/*/*/*",
        "/datasets/*/changes/*/*",
        "/datasets/*/pictures/*/*/*/*/*",
        "/runs/*",
        "/runs/*/logs",
        "/runs/*/mistakes",
        "/runs/*/try",
        "/runs/*/model.onnx",
        "/compare",
        "/*",
        "/*/*/*",
    ];
    const PARTS: [&str; 24] = [
        "small",
        "one",
        "two",
        "1",
        "0",
        "2",
        "-1",
        "18446744073709551616",
        "1e9",
        "train",
        "test",
        "0.jpg",
        "k3.jpg",
        ".",
        "..",
        "%2e%2e%2fspec.json",
        "%00",
        "%ff%fe",
        "%F0%9F%90%95",
        "%3Cscript%3E",
        "a%0d%0aset-cookie:x=1",
        "'%22--",
        "~",
        "",
    ];
    const NAMES: [&str; 12] =
        ["outcome", "url", "class", "a", "b", "page", "version", "split", "host", "code", "sort", "%5B%5D"];
    let mut random = fastrand::Rng::with_seed(7);
    let mut answers = BTreeMap::<String, u32>::new();
    for _ in 0..400 {
        let part = |random: &mut fastrand::Rng| match random.u8(..) {
            0..16 => "x".repeat(random.usize(1..6_000)),
            _ => PARTS[random.usize(..PARTS.len())].to_owned(),
        };
        let route = ROUTES[random.usize(..ROUTES.len())];
        let mut path: String = route.split_inclusive('*').map(|piece| piece.replace('*', &part(&mut random))).collect();
        for n in 0..random.usize(..4) {
            let name = NAMES[random.usize(..NAMES.len())];
            path += &format!("{}{name}={}", if n == 0 { '?' } else { '&' }, part(&mut random));
        }
        let answer = get_as(pages, pages, &path);
        let status = answer.status().to_owned();
        assert!(["200", "400", "404", "414", "431"].contains(&&*status), "{path}: {status} {}", answer.text());
        let is_page = answer.head.contains("text/html");
        assert!(!(is_page && answer.text().contains("<script>")), "{path}: {}", answer.text());
        assert!(answer.head.contains("nosniff") && !answer.head.contains("set-cookie"), "{path}: {}", answer.head);
        *answers.entry(status).or_default() += 1;
    }
    assert!(answers["200"] > 10 && answers["404"] > 20, "{answers:?}");
}

/// All files below a folder, with what says whether one was written again.
fn objects(folder: &Path) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    let each = entries.flat_map(|entry| {
        let (path, about) = (entry.path(), entry.metadata().expect("it is there"));
        match about.is_dir() {
            true => objects(&path).into_iter().collect(),
            false => vec![(path, (about.len(), about.modified().expect("a time")))],
        }
    });
    each.collect()
}

#[test]
fn rejected_pictures_copies_and_changes_between_versions_can_be_looked_at() {
    let mut cluster = Cluster::start();
    let pages = start_pages(&mut cluster).to_string();
    cluster.start_worker("worker");
    let origin = Origin::serve(Options { seed: 5, ..Options::default() }).expect("loopback");
    let line = |(rot, picture, n): (Rot, u64, u64)| {
        let class = picture as usize % 2;
        format!("{}\t{}\n", CLASSES[class].synset, list::url(rot, (class, picture), n, &origin))
    };
    let good = (0..20).map(|n| (Rot::Good, n, n));
    let rotted = (20..26).map(|n| (Rot::Placeholder, n, n)).chain([(Rot::Copy, 3, 26), (Rot::NotFound, 27, 27)]);
    let urls = cluster.write("urls.txt", &good.chain(rotted).map(line).collect::<String>());
    let flags = ["--size", "72", "--validation", "0", "--test", "0", "--wait", "--timeout", "60s"];
    cluster.gleaner(&[&["dataset", "create", "rotted", "--urls", &urls], &flags[..]].concat());

    let images = |page: &str| -> Vec<String> {
        let sources = page.split("<img src=\"").skip(1).filter_map(|rest| rest.split('"').next());
        sources.map(str::to_owned).collect()
    };
    let picture = |path: &String| {
        let answer = get_as(&pages, &pages, path);
        assert!(answer.status() == "200" && answer.head.contains("image/jpeg"), "{path}: {}", answer.head);
        answer.body
    };
    let small = images(&get(&pages, "/datasets/rotted/urls?outcome=too_small"));
    assert_eq!(small.len(), 4, "a few are enough: {small:?}");
    for address in &small {
        let header = turbojpeg::read_header(&picture(address)).expect("a JPEG");
        assert!(address.contains("/rejected/1/") && header.width.max(header.height) <= 128, "{address}");
    }
    assert!(images(&get(&pages, "/datasets/rotted/urls?outcome=not_found")).is_empty());
    let copies = get(&pages, "/datasets/rotted/urls?outcome=duplicate");
    let [copy, original] = &images(&copies)[..] else { panic!("side by side: {copies}") };
    assert!(copy.contains("/k26.jpg") && original.contains("/k3.jpg") && copies.contains("like 3"), "{copies}");
    assert_eq!(picture(copy), picture(original));
    let all = get(&pages, "/datasets/rotted/urls");
    for section in ["id=\"ended\"", "id=\"hosts\"", "id=\"sizes\"", "id=\"times\""] {
        assert!(all.contains(section), "{section}: {all}");
    }

    let more: String = (30..35).map(|n| (Rot::Good, n, n)).map(line).collect();
    let more = cluster.write("more.txt", &more);
    cluster.gleaner(&["dataset", "refresh", "rotted", "--urls", &more, "--wait", "--timeout", "60s"]);
    assert!(get(&pages, "/datasets/rotted").contains("/datasets/rotted/changes/1/2"));
    let changes = get(&pages, "/datasets/rotted/changes/1/2");
    assert!(changes.contains("5 samples added, 0 removed"), "{changes}");
    assert_eq!(get_as(&pages, &pages, "/datasets/rotted/changes/1/7").status(), "404");

    let sheet = cluster.path("sheet.png");
    let rows = cluster.json(&["dataset", "sample", "rotted", "--to", &sheet.display().to_string()]);
    let rows: Vec<(&str, u64)> = rows
        .as_array()
        .expect("rows")
        .iter()
        .map(|row| (row["synset"].as_str().expect("a synset"), row["pictures"].as_u64().expect("a count")))
        .collect();
    assert_eq!(rows, [(CLASSES[0].synset, 8), (CLASSES[1].synset, 8)]);
    let size = image::image_dimensions(&sheet).expect("a PNG");
    assert_eq!(size, (8 * 132 + 4, 2 * 132 + 4));
    let unknown = cluster.try_gleaner(&["dataset", "sample", "rotted", "--to", "x.png", "--synset", "n0"]);
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("has no such class"), "{unknown:?}");
}

/// Another run in the store, with all of the first one's objects but for the name in them.
fn copy_run(runs: &Path, from: &str, to: &str) {
    for path in objects(&runs.join(from)).into_keys() {
        let copy = runs.join(to).join(path.strip_prefix(runs.join(from)).expect("it is below"));
        std::fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder to write to");
        let bytes = std::fs::read(&path).expect("it is there");
        let json =
            path.extension().is_some_and(|extension| extension == "json").then(|| String::from_utf8(bytes.clone()));
        let named =
            json.and_then(Result::ok).map(|json| json.replace(&format!("runs/{from}/"), &format!("runs/{to}/")));
        std::fs::write(copy, named.map_or(bytes, String::into_bytes)).expect("a folder to write to");
    }
}

/// `POINTS=1000000`: as many as a run stores in eleven days.
#[test]
fn a_long_run_and_a_list_of_two_hundred_open_in_under_a_second() {
    let points: u64 = std::env::var("POINTS").map_or(60_000, |points| points.parse().expect("a number"));
    let mut cluster = Cluster::start();
    dataset(&mut cluster);
    cluster.start_trainer("trainer", 1);
    submit(&cluster, "long", 2, &["ranks.max=1"]);
    wait(&cluster, "long");
    let point = cluster.json(&["run", "metrics", "long", "--kind", "train"])[0].clone();
    for role in ["trainer", "worker", "coordinator"] {
        cluster.terminate(role);
    }
    let runs = Path::new(cluster.store()).join("runs");
    (1..200).for_each(|n| copy_run(&runs, "long", &format!("twin-{n}")));
    // A minute's points in each object, as trainers store them.
    for minute in 0..points / 60 {
        let line = |second: u64| {
            let mut point = point.clone();
            point["kind"] = "step".into();
            point["step"] = (100 + 60 * minute + second).into();
            format!("{point}\n")
        };
        let file = runs.join(format!("long/metrics/000001-{:06}.jsonl", 1_000 + minute));
        std::fs::write(file, (0..60).map(line).collect::<String>()).expect("a folder to write to");
    }
    let open = |pages: &str, path: &str| {
        let asked = Instant::now();
        let page = get(pages, path);
        (page, asked.elapsed().as_secs_f64())
    };
    let mut seconds = Vec::new();
    for _ in 0..2 {
        cluster.start_coordinator();
        let pages = start_pages(&mut cluster).to_string();
        let (page, long) = open(&pages, "/runs/long");
        assert!(page.matches("<figure class=\"chart\"").count() == 4, "{page}");
        let (home, list) = open(&pages, "/");
        assert!(home.matches("<a href=\"/runs/").count() >= 50, "{home}");
        seconds.push((long, list));
        cluster.terminate("web");
        cluster.terminate("coordinator");
    }
    let [first, again] = [seconds[0], seconds[1]];
    println!("web: points={points} first={:.2}s again={:.2}s runs=200 list={:.2}s", first.0, again.0, again.1);
    assert!(again.0 < 1.0 && again.1 < 1.0, "{seconds:?}");
}

#[test]
fn another_sites_name_is_refused_and_a_coordinator_that_is_away_is_said() {
    let mut cluster = Cluster::start();
    let pages = start_pages(&mut cluster).to_string();
    let rebound = get_as("evil.example", &pages, "/");
    assert_eq!(rebound.status(), "421", "{}", rebound.text());
    assert!(!rebound.text().contains("cluster"), "{}", rebound.text());
    let foreign = ask(&pages, &format!("GET / HTTP/1.1\r\nHost: {pages}\r\nOrigin: http://evil.example\r\n"));
    assert_eq!(foreign.status(), "403", "{}", foreign.text());
    let change = ask(&pages, &format!("POST / HTTP/1.1\r\nHost: {pages}\r\nContent-Length: 0\r\n"));
    assert_eq!(change.status(), "405", "{}", change.text());
    cluster.kill("coordinator");
    let away = get_as(&pages, &pages, "/");
    assert!(away.status() == "503" && away.text().contains("does not answer"), "{}", away.text());
    cluster.start_coordinator();
    cluster.eventually("the pages are back", |_| get_as(&pages, &pages, "/").status() == "200");
}

#[test]
fn where_other_machines_reach_them_pages_want_a_code_once() {
    let mut cluster = Cluster::start();
    let address = FreeAddress::at("0.0.0.0");
    let coordinator = format!("http://{}", cluster.address());
    cluster.spawn("web", &["web", "--web-listen", &address.to_string(), "--coordinator", &coordinator]);
    let pages = format!("127.0.0.1:{}", address.port());
    cluster.eventually("the pages are served", |_| TcpStream::connect(&pages).is_ok());
    let code = |cluster: &Cluster| {
        let log = cluster.log("web");
        log.rsplit_once("/?code=").expect("a code is told").1.trim().to_owned()
    };
    for refused in ["/", "/?code=1", "/style.css", "/datasets/x"] {
        let answer = get_as(&pages, &pages, refused);
        assert!(answer.status() == "401" && !answer.text().contains("Nothing here"), "{refused}: {}", answer.text());
    }
    let first = code(&cluster);
    let entered = get_as(&pages, &pages, &format!("/?code={first}"));
    assert!(entered.status() == "303" && entered.head.contains("location: /\r\n"), "{}", entered.head);
    let cookie = entered.head.split("set-cookie: ").nth(1).and_then(|rest| rest.split(';').next()).expect("a cookie");
    assert!(entered.head.contains("httponly; samesite=strict"), "{}", entered.head);
    let shown = ask(&pages, &format!("GET / HTTP/1.1\r\nHost: {pages}\r\nCookie: {cookie}\r\n"));
    assert!(shown.status() == "200" && shown.text().contains("Nothing here yet"), "{}", shown.text());
    assert_eq!(get_as(&pages, &pages, &format!("/?code={first}")).status(), "401", "it was used");
    assert_ne!(code(&cluster), first, "the next one is told");

    // The browser of whoever starts them is shown the way in.
    let (script, seen) = (cluster.path("browser"), cluster.path("seen"));
    std::fs::write(&script, format!("#!/bin/sh\necho \"$@\" >>{}\n", seen.display())).expect("writable");
    std::fs::set_permissions(&script, Permissions::from_mode(0o755)).expect("our own");
    cluster.set_env("BROWSER", &script.display().to_string());
    let address = FreeAddress::at("0.0.0.0");
    cluster.spawn("shown", &["web", "--open", "--web-listen", &address.to_string(), "--coordinator", &coordinator]);
    let begins = format!("http://127.0.0.1:{}/?code=", address.port());
    let shown = || std::fs::read_to_string(&seen).unwrap_or_default();
    cluster.eventually("the browser is shown them", |_| shown().starts_with(&begins) && shown().ends_with('\n'));
}
