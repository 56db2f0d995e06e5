//! A cluster over TLS, with real processes: who is let in, and certificates and authorities that are replaced
//! meanwhile.
#![allow(clippy::print_stdout, reason = "measured figures")]

mod small;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use proto::dial::{Dial, Dialled};
use proto::pb::RenewLeaseRequest;
use proto::pb::fetch_service_client::FetchServiceClient;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use support::{Authority, Cluster, FreeAddress, Pair, binary, process};

/// The exit codes of a command that was refused, and of one that could not reach its coordinator.
const REFUSED: Option<i32> = Some(1);
const UNREACHED: Option<i32> = Some(5);

fn write_pair(cluster: &Cluster, name: &str, pair: &Pair) -> [String; 2] {
    [cluster.write(&format!("{name}.pem"), &pair.cert), cluster.write(&format!("{name}.key"), &pair.key)]
}

/// A cluster whose command line and workers come over TLS and trust `authority`, which is in `ca.pem`. Nothing is
/// started.
fn cluster_of(authority: &Authority) -> Cluster {
    let mut cluster = Cluster::new(None, Vec::new());
    let coordinator = format!("https://{}", cluster.address());
    cluster.set_env("GLEANER_COORDINATOR", &coordinator);
    let ca = cluster.write("ca.pem", &authority.pem());
    cluster.set_env("GLEANER_TLS_CA", &ca);
    write_pair(&cluster, "server", &authority.issue("127.0.0.1"));
    cluster
}

/// The coordinator's flags, with the files of [`cluster_of`].
fn flags(cluster: &Cluster, mode: &str) -> Vec<String> {
    let path = |name: &str| cluster.path(name).display().to_string();
    ["--tls".into(), mode.into(), "--tls-cert".into(), path("server.pem"), "--tls-key".into(), path("server.key")]
        .into()
}

fn start_coordinator(cluster: &mut Cluster, flags: &[String]) {
    cluster.start_coordinator_with(&flags.iter().map(String::as_str).collect::<Vec<_>>());
}

/// `gleaner status` with nothing but this environment: its exit code, and what it said.
fn status(env: &[(&str, &str)]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = Command::new(binary())
        .arg("status")
        .env_clear()
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("the binary under test");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

/// Pictures, each at its own URL.
fn pictures(count: u64, origin: &Origin) -> String {
    let entry = |n: u64| {
        let url = list::url(Rot::Good, (0, n), n, origin);
        Entry { synset: "n02084071", url, rot: Rot::Good, picture: (0, n), counts: true }
    };
    list::to_text(&(0..count).map(entry).collect::<Vec<_>>())
}

#[test]
fn a_dataset_is_fetched_with_certificates_and_whoever_lacks_one_is_told_what_to_do() {
    let (authority, stranger) = (Authority::new("ours"), Authority::new("a stranger's"));
    let mut cluster = cluster_of(&authority);
    let [cert, key] = write_pair(&cluster, "anna", &authority.issue("anna.people"));
    cluster.set_env("GLEANER_TLS_CERT", &cert);
    cluster.set_env("GLEANER_TLS_KEY", &key);
    let ca = cluster.path("ca.pem").display().to_string();
    let mut flags = flags(&cluster, "require");
    flags.extend(["--tls-client-ca".into(), ca.clone()]);
    flags.extend(["--tls-client-names".into(), "worker=*.workers,submitter=anna.people".into()]);
    start_coordinator(&mut cluster, &flags);
    let worker = write_pair(&cluster, "worker", &authority.issue("one.workers"));
    cluster.start_worker_with("worker", &["--tls-cert", &worker[0], "--tls-key", &worker[1]]);
    let origin = Origin::serve(Options { seed: 1, ..Options::default() }).expect("loopback");
    let urls = cluster.write("urls.txt", &pictures(40, &origin));
    cluster.gleaner(&["dataset", "create", "birds", "--urls", &urls, "--size", "64", "--wait", "--timeout", "60s"]);
    assert_eq!(cluster.json(&["dataset", "describe", "birds"])["outcomes"]["kept"], 40);

    let (plain, tls) = (format!("http://{}", cluster.address()), format!("https://{}", cluster.address()));
    let (code, said) = status(&[("GLEANER_COORDINATOR", &plain)]);
    assert!(code == REFUSED && said.contains("TLS alone") && said.contains("https://"), "{code:?} {said}");
    let (code, said) = status(&[("GLEANER_COORDINATOR", &tls), ("GLEANER_TLS_CA", &ca)]);
    assert!(code == REFUSED && said.contains("--tls-cert"), "{code:?} {said}");

    let with = |ca: &str, pair: &[String; 2]| {
        let pair = [("GLEANER_TLS_CERT", &*pair[0]), ("GLEANER_TLS_KEY", &*pair[1])];
        status(&[("GLEANER_COORDINATOR", &tls), ("GLEANER_TLS_CA", ca), pair[0], pair[1]])
    };
    assert_eq!(with(&ca, &[cert, key.clone()]).0, Some(0));
    let (code, said) = with(&ca, &write_pair(&cluster, "eve", &authority.issue("eve.people")));
    assert!(code == REFUSED && said.contains("eve.people") && said.contains("--tls-client-names"), "{code:?} {said}");
    let (code, said) = with(&ca, &write_pair(&cluster, "forged", &stranger.issue("anna.people")));
    assert!(code != Some(0), "{said}");
    let other = cluster.write("other.pem", &stranger.pem());
    let (code, said) = with(&other, &worker);
    assert!(code == UNREACHED && said.contains("--tls-ca"), "{code:?} {said}");
    let (code, said) = with(&ca, &[worker[0].clone(), key]);
    assert!(code == REFUSED && said.contains("do not belong together"), "{code:?} {said}");
}

#[test]
fn while_a_cluster_is_rolled_both_kinds_of_callers_are_served_and_a_plain_coordinator_says_that_it_is_one() {
    let authority = Authority::new("ours");
    let mut cluster = cluster_of(&authority);
    let flags = flags(&cluster, "allow");
    start_coordinator(&mut cluster, &flags);
    let (plain, tls) = (format!("http://{}", cluster.address()), format!("https://{}", cluster.address()));
    let ca = cluster.path("ca.pem").display().to_string();
    assert_eq!(status(&[("GLEANER_COORDINATOR", &plain)]).0, Some(0));
    assert_eq!(status(&[("GLEANER_COORDINATOR", &tls), ("GLEANER_TLS_CA", &ca)]).0, Some(0));
    cluster.terminate("coordinator");

    let mut rolled_back = Cluster::start();
    let tls = format!("https://{}", rolled_back.address());
    let (code, said) = status(&[("GLEANER_COORDINATOR", &tls), ("GLEANER_TLS_CA", &ca)]);
    assert!(code == UNREACHED && said.contains("TLS"), "{code:?} {said}");
    rolled_back.terminate("coordinator");
}

#[test]
fn flags_that_would_let_in_anybody_are_refused() {
    let authority = Authority::new("ours");
    let cluster = cluster_of(&authority);
    let ca = cluster.path("ca.pem").display().to_string();
    let refused = |flags: &[String], what: &str| {
        let flags: Vec<&str> =
            ["coordinator", "--listen", "127.0.0.1:0"].into_iter().chain(flags.iter().map(|f| &**f)).collect();
        let output = cluster.try_gleaner(&flags);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains(what), "{flags:?}: {} {said}", output.status);
    };
    let tls = flags(&cluster, "require");
    refused(&[&tls[..], &["--tls-client-ca".into(), ca.clone()]].concat(), "--tls-client-names");
    refused(
        &[&tls[..], &["--tls-client-ca".into(), ca.clone(), "--tls-client-names".into(), String::new()]].concat(),
        "ROLE=NAME",
    );
    refused(
        &[&tls[..], &["--tls-client-ca".into(), ca, "--tls-client-names".into(), "worker=".into()]].concat(),
        "worker=*",
    );
    refused(&tls[2..], "--tls require");
    refused(&tls[..2], "--tls-cert");
}

/// A cluster of which coordinator, caller and command line know the authority `old`, with the coordinator's flags. Each
/// side has a file of authorities, for they are replaced at different times.
fn cluster_to_rotate(old: &Authority, metrics: &FreeAddress) -> (Cluster, Vec<String>) {
    let mut cluster = cluster_of(old);
    let client_ca = cluster.write("client-ca.pem", &old.pem());
    // Certificate and key in one file, which is replaced at once: a command line that reads them between would fail.
    let pair = cluster.write("caller.pem", &whole(old.issue("one.callers")));
    cluster.set_env("GLEANER_TLS_CERT", &pair);
    cluster.set_env("GLEANER_TLS_KEY", &pair);
    let mut flags = flags(&cluster, "require");
    let names = ["worker", "trainer", "admin"].map(|role| format!("{role}=*.callers")).join(",");
    flags.extend(["--tls-client-ca".into(), client_ca, "--tls-client-names".into(), names]);
    flags.extend(["--metrics-listen".into(), metrics.to_string()]);
    start_coordinator(&mut cluster, &flags);
    (cluster, flags)
}

fn whole(Pair { cert, key }: Pair) -> String {
    cert + &key
}

/// Replaces every certificate and the authority itself, while `role` works and `call` calls, over and over: none of its
/// calls may fail.
fn rotate(
    cluster: &Cluster,
    role: &'static str,
    metrics: &FreeAddress,
    (old, new): (&Authority, &Authority),
    call: impl Fn() -> Result<(), String> + Sync,
) {
    let pids = ["coordinator", role].map(|name| cluster.pid(name));
    let reloads = |role: &str| cluster.log(role).matches("files were read again").count();
    let reloaded = |role: &'static str, change: &dyn Fn()| {
        let before = reloads(role);
        change();
        cluster.eventually("the change is noticed", |_| reloads(role) > before);
    };
    let (over, calls, failed) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let called = call();
                calls.fetch_add(1, Ordering::Relaxed);
                if let Err(error) = called {
                    println!("{error}");
                    failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        // A key alone is half of a pair: what was before goes on.
        let next = new.issue("127.0.0.1");
        cluster.write("server.key", &next.key);
        cluster.eventually("the half pair is refused", |cluster| {
            cluster.log("coordinator").contains("do not belong together")
        });
        let go_on = || {
            let before = calls.load(Ordering::Relaxed);
            cluster.eventually("calls go on", |_| calls.load(Ordering::Relaxed) > before + 2);
        };
        go_on();
        // Both authorities are trusted before anything is signed by the new one, and the old one goes last.
        let both = old.pem() + &new.pem();
        reloaded(role, &|| drop(cluster.write("ca.pem", &both)));
        reloaded("coordinator", &|| {
            cluster.write("client-ca.pem", &both);
            cluster.write("server.pem", &next.cert);
        });
        reloaded(role, &|| {
            let next = cluster.write("caller.pem.next", &whole(new.issue("two.callers")));
            std::fs::rename(next, cluster.path("caller.pem")).expect("same folder");
        });
        reloaded(role, &|| drop(cluster.write("ca.pem", &new.pem())));
        reloaded("coordinator", &|| drop(cluster.write("client-ca.pem", &new.pem())));
        // The caller's connection is older than its new certificate: it is ended, and the next one is made with that.
        let replaced = std::time::Instant::now();
        cluster.eventually("who was trusted for the old authority is put out", |_| {
            scraped(metrics).contains("gleaner_connections_refused_total{reason=\"distrusted\"}")
        });
        println!("TLS: role={role} put_out_seconds={:.1}", replaced.elapsed().as_secs_f64());
        assert!(replaced.elapsed() < Duration::from_secs(5), "{:?}", replaced.elapsed());
        go_on();
        over.store(true, Ordering::Relaxed);
    });
    let (calls, failed) = (calls.into_inner(), failed.into_inner());
    println!("TLS: role={role} rotation_calls={calls} rotation_failed={failed}");
    assert_eq!((failed, pids), (0, ["coordinator", role].map(|name| cluster.pid(name))));
    assert!(["coordinator", role].iter().all(|name| cluster.is_alive(name)));
}

#[test]
fn certificates_and_authorities_are_replaced_under_a_running_fetch_without_a_failed_call_or_a_restart() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let metrics = FreeAddress::loopback();
    let (mut cluster, flags) = cluster_to_rotate(&old, &metrics);
    cluster.start_worker_with("worker", &["--connections", "4"]);
    let worker = cluster.pid("worker");
    let origin = Origin::serve(Options { seed: 3, delay: Duration::from_millis(300), ..Options::default() });
    let origin = origin.expect("loopback");
    let urls = cluster.write("urls.txt", &pictures(400, &origin));
    cluster.gleaner(&["dataset", "create", "many", "--urls", &urls, "--size", "64", "--slice-urls", "20"]);
    rotate(&cluster, "worker", &metrics, (&old, &new), || {
        let output = cluster.try_gleaner(&["status"]);
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    });
    let state = cluster.json(&["dataset", "describe", "many"])["state"].clone();
    assert_eq!(state, "fetching", "all of that was under a running fetch");

    // A new connection of the same worker: nothing is left of the old authority.
    cluster.kill("coordinator");
    start_coordinator(&mut cluster, &flags);
    cluster.gleaner(&["dataset", "wait", "many", "--timeout", "120s"]);
    assert_eq!(cluster.json(&["dataset", "describe", "many"])["outcomes"]["kept"], 400);
    assert_eq!(cluster.pid("worker"), worker);
}

#[test]
fn certificates_and_authorities_are_replaced_under_a_running_training_and_an_open_page() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let metrics = FreeAddress::loopback();
    let (mut cluster, _) = cluster_to_rotate(&old, &metrics);
    small::dataset(&mut cluster);
    cluster.terminate("worker");
    cluster.start_trainer("trainer", 2);
    small::submit(&cluster, "run", 400, &["ranks.max=2"]);
    cluster.eventually("it trains", |cluster| small::step(cluster, "run") > 5);
    let page = FreeAddress::loopback().to_string();
    cluster.spawn("web", &["web", "--web-listen", &page]);
    cluster.eventually("the pages are served", |_| TcpStream::connect(&page).is_ok());
    rotate(&cluster, "trainer", &metrics, (&old, &new), || {
        let mut socket = TcpStream::connect(&page).map_err(|error| error.to_string())?;
        write!(socket, "GET /runs/run HTTP/1.1\r\nHost: {page}\r\nConnection: close\r\n\r\n")
            .map_err(|error| error.to_string())?;
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).map_err(|error| error.to_string())?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(answer) }
    });
    let (before, run) = (small::step(&cluster, "run"), cluster.json(&["run", "describe", "run"]));
    assert_eq!((&run["state"], &run["generation"]), (&"running".into(), &1.into()), "no rank was lost: {run}");
    cluster.eventually("it still trains", |cluster| small::step(cluster, "run") > before + 5);
    cluster.gleaner(&["run", "cancel", "run"]);
}

/// What a role says of itself.
fn scraped(address: &FreeAddress) -> String {
    let mut socket = TcpStream::connect(address.to_string()).expect("it listens");
    let ask = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    socket.write_all(ask.as_bytes()).expect("asked");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("answered");
    answer
}

/// CPU seconds that 1,000 renewals cost the coordinator.
fn renewals_cost(cluster: &Cluster, dial: impl AsyncFnOnce() -> Dialled) -> f64 {
    const RENEWALS: u32 = 3_000;
    let cpu = || process::cpu_seconds(cluster.pid("coordinator")).expect("it lives");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a thread");
    let before = runtime.block_on(async {
        let mut client = FetchServiceClient::new(dial().await);
        let request = RenewLeaseRequest {
            worker: "worker".to_owned(),
            dataset: "birds-12345678".to_owned(),
            attempt: "1.1".to_owned(),
            ..RenewLeaseRequest::default()
        };
        client.renew_lease(request.clone()).await.expect("it answers that the lease is over");
        let before = cpu();
        for _ in 0..RENEWALS {
            client.renew_lease(request.clone()).await.expect("it answers that the lease is over");
        }
        before
    });
    (cpu() - before) * 1000.0 / f64::from(RENEWALS)
}

#[test]
fn renewals_over_tls_cost_little_more_than_plain_ones() {
    let authority = Authority::new("ours");
    let mut cluster = cluster_of(&authority);
    let flags = flags(&cluster, "allow");
    start_coordinator(&mut cluster, &flags);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).expect("PEM")).expect("an authority");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = config.expect("versions").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (_keep, config) = tokio::sync::watch::channel(Arc::new(config));
    let (plain, tls) = (format!("http://{}", cluster.address()), format!("https://{}", cluster.address()));
    let plain =
        renewals_cost(&cluster, async || Dial::new(&plain).expect("an address").connect().await.expect("it listens"));
    let tls = renewals_cost(&cluster, async || {
        Dial::over_tls(&tls, config).expect("an address").connect().await.expect("it speaks TLS")
    });
    println!("TLS: cpu_seconds_per_1000_renewals_plain={plain:.3} cpu_seconds_per_1000_renewals_tls={tls:.3}");
    assert!(tls < plain * 3.0 + 0.1, "{plain} became {tls}");
}
