//! Tokens, as processes have them: what is refused, what is revoked, and what works without a word.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use demo_origin::list;
use demo_origin::origin::{Options, Origin};
use demo_origin::pictures::CLASSES;
use demo_origin::rot::Rot;
use support::{Cluster, FreeAddress, PATIENCE, binary};

/// Makes a token: its file and its line.
fn token(cluster: &Cluster, name: &str, role: &str) -> (String, String) {
    let file = cluster.path(&format!("{name}.token")).display().to_string();
    let line = cluster.gleaner(&["token", "new", "--role", role, "--name", name, "--to", &file]);
    (file, line)
}

/// A coordinator with tokens; the test itself is an admin.
fn start(more: &[(&str, &str)]) -> (Cluster, Vec<String>) {
    let mut cluster = Cluster::new(None, Vec::new());
    let (admin, line) = token(&cluster, "test", "admin");
    cluster.set_env("GLEANER_TOKEN_FILE", &admin);
    let more: Vec<(String, String)> = more.iter().map(|(name, role)| token(&cluster, name, role)).collect();
    let lines: String = more.iter().map(|(_, line)| line.as_str()).collect();
    let tokens = cluster.write("tokens", &(line + &lines));
    cluster.start_coordinator_with(&["--tokens", &tokens]);
    (cluster, more.into_iter().map(|(file, _)| file).collect())
}

fn stderr(cluster: &Cluster, args: &[&str]) -> (Option<i32>, String) {
    let output = cluster.try_gleaner(args);
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn who_has_no_token_or_the_wrong_one_is_told_what_is_missing() {
    let (mut cluster, files) = start(&[("anna", "submitter"), ("vera", "viewer"), ("workers", "worker")]);
    let [anna, vera, workers] = &files[..] else { panic!("three") };
    let none = cluster.write("none", "gleaner_0000");
    let (code, said) = stderr(&cluster, &["status", "--token-file", &none]);
    assert!(code == Some(1) && said.contains("not known here") && !said.contains("0000"), "{code:?} {said}");
    let (_, said) = stderr(&cluster, &["dataset", "delete", "birds", "-y", "--token-file", vera]);
    assert!(said.contains("vera is a viewer") && said.contains("submitter or admin"), "{said}");
    cluster.gleaner(&["status", "--token-file", vera]);
    let list = cluster.write("list", "a http://127.0.0.1:9/1\na http://127.0.0.1:9/2\n");
    cluster.gleaner(&["dataset", "create", "birds", "--urls", &list, "--token-file", anna]);

    // A worker with a viewer's token gets nothing, and one with a worker's gets the slice.
    cluster.start_worker_with("wrong", &["--token-file", vera]);
    cluster.eventually("the wrong worker says why", |cluster| cluster.log("wrong").contains("vera is a viewer"));
    let status = |cluster: &Cluster| cluster.json(&["status", "--token-file", vera]);
    assert_eq!(status(&cluster)["workers"].as_array().map(Vec::len), Some(0));
    cluster.start_worker_with("right", &["--token-file", workers]);
    cluster
        .eventually("the right one is heard", |cluster| status(cluster)["workers"].as_array().map(Vec::len) == Some(1));
    cluster.gleaner(&["dataset", "delete", "birds", "-y", "--token-file", anna]);
    for role in ["coordinator", "wrong", "right"] {
        let log = cluster.log(role);
        for file in &files {
            let secret = std::fs::read_to_string(file).expect("a token");
            assert!(!log.contains(secret.trim()), "{role} has logged a token");
        }
    }
}

#[test]
fn a_token_is_never_sent_where_others_could_read_it() {
    let cluster = Cluster::new(None, Vec::new());
    let (file, _) = token(&cluster, "anna", "submitter");
    let (code, said) =
        stderr(&cluster, &["status", "--coordinator", "http://gleaner.example:7070", "--token-file", &file]);
    assert!(code == Some(2) && said.contains("https://"), "{code:?} {said}");
    let mode = std::fs::metadata(&file).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let (code, said) = stderr(&cluster, &["token", "new", "--role", "admin", "--name", "b", "--to", &file]);
    assert!(code == Some(1) && said.contains("exists"), "{code:?} {said}");
}

#[test]
fn a_coordinator_is_open_to_other_machines_only_if_somebody_says_so() {
    let mut cluster = Cluster::listening_at("0.0.0.0");
    let address = cluster.address().to_owned();
    let (code, said) = stderr(&cluster, &["coordinator", "--listen", &address]);
    assert!(code == Some(1) && said.contains("--insecure") && said.contains("--tokens"), "{code:?} {said}");
    let (code, said) = stderr(&cluster, &["local", "--listen", &address, "--workers", "0", "--ranks", "0"]);
    assert!(code == Some(2) && said.contains("--insecure"), "{code:?} {said}");
    let wrong = cluster.write("tokens", "anna boss 00\n");
    let (code, said) = stderr(&cluster, &["coordinator", "--insecure", "--listen", &address, "--tokens", &wrong]);
    assert!(code == Some(1) && said.contains("line 1") && said.contains("boss"), "{code:?} {said}");
    cluster.start_coordinator_with(&["--insecure"]);
}

#[test]
fn tokens_are_replaced_and_revoked_under_a_running_fetch() {
    let (mut cluster, metrics) = (Cluster::new(None, Vec::new()), FreeAddress::loopback());
    let (admin, admin_line) = token(&cluster, "test", "admin");
    cluster.set_env("GLEANER_TOKEN_FILE", &admin);
    let [(stays, stays_line), (goes, goes_line), (next, next_line)] =
        ["stays", "goes", "next"].map(|name| token(&cluster, name, "worker"));
    let tokens = cluster.write("tokens", &[admin_line.as_str(), &stays_line, &goes_line].concat());
    let slow = ["--site-rate", "40", "--metrics-listen", &metrics];
    cluster.start_coordinator_with(&[&["--tokens", &tokens], &slow[..]].concat());
    let origin = Origin::serve(Options { seed: 3, ..Options::default() }).expect("loopback");
    let line = |n: u64| format!("{}\t{}\n", CLASSES[0].synset, list::url(Rot::Good, (0, n), n, &origin));
    let urls = cluster.write("urls", &(0..600).map(line).collect::<String>());
    cluster.gleaner(&["dataset", "create", "birds", "--urls", &urls, "--slice-urls", "60", "--size", "64"]);
    cluster.start_worker_with("stays", &["--token-file", &stays]);
    cluster.start_worker_with("goes", &["--token-file", &goes]);
    let leases = |cluster: &Cluster| cluster.json(&["status"])["shards_leased"].as_u64().unwrap_or(0);
    cluster.eventually("both work", |cluster| cluster.json(&["status"])["workers"].as_array().map(Vec::len) == Some(2));
    assert!(leases(&cluster) > 0);

    // The new token is known before it is shown, and the old one until it is shown no more: nothing is refused.
    let refused = || {
        let mut socket = std::net::TcpStream::connect(&*metrics).expect("it listens");
        let ask = format!("GET /metrics HTTP/1.1\r\nHost: {metrics}\r\nConnection: close\r\n\r\n");
        std::io::Write::write_all(&mut socket, ask.as_bytes()).expect("asked");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("answered");
        let lines = answer.lines().filter(|line| line.starts_with("gleaner_calls_refused_total{"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let write = |lines: &[&str]| {
        cluster.write("tokens.new", &lines.concat());
        std::fs::rename(cluster.path("tokens.new"), cluster.path("tokens")).expect("the same folder");
        std::thread::sleep(Duration::from_secs(3));
    };
    write(&[&admin_line, &stays_line, &goes_line, &next_line]);
    std::fs::rename(&next, &stays).expect("the same folder");
    write(&[&admin_line, &goes_line, &next_line]);
    assert_eq!(refused(), Vec::<String>::new(), "a token was replaced under a running worker");

    write(&[&admin_line, &next_line]);
    cluster.eventually("whoever was thrown out is refused", |_| refused().iter().any(|line| line.contains("Unauth")));
    cluster.gleaner(&["dataset", "wait", "birds", "--timeout", "100s"]);
    let workers = cluster.json(&["status"])["workers"].clone();
    assert!(workers[0]["seen_millis_ago"].as_u64().is_some_and(|millis| millis < 60_000), "{workers}");
    let dataset = cluster.json(&["dataset", "describe", "birds"]);
    assert_eq!(dataset["outcomes"].as_object().map(|all| all.values().filter_map(|n| n.as_u64()).sum()), Some(600u64));
    assert!(cluster.is_alive("stays"));
}

/// `gleaner local`, killed when it is dropped.
struct Local(Child);

impl Drop for Local {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_local_cluster_is_its_users_alone_and_works_without_a_word() {
    let folder = tempfile::tempdir().expect("a folder");
    let runtime = folder.path().join("run");
    std::fs::create_dir(&runtime).expect("made");
    let (address, pages) = (FreeAddress::loopback(), FreeAddress::loopback());
    let gleaner = |runtime: &Path, args: &[&str]| {
        let mut command = Command::new(support::binary());
        command.args(args).env("XDG_RUNTIME_DIR", runtime).env("HOME", runtime).env_remove("XDG_CONFIG_HOME");
        command
            .env("GLEANER_COORDINATOR", format!("http://{address}"))
            .env("GLEANER_STORE", folder.path().join("store"));
        command.stdin(Stdio::null());
        command
    };
    let flags = ["--exit-with-stdin", "--listen", &address, "--web-listen", &pages, "--workers", "1", "--ranks", "0"];
    let log = std::fs::File::create(folder.path().join("log")).expect("a log");
    let mut local = gleaner(&runtime, &[&["local"], &flags[..]].concat());
    let mut local = Local(local.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).spawn().expect("the binary"));
    let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
    let begun = Instant::now();
    let workers = loop {
        let output = gleaner(&runtime, &["status", "-o", "json"]).output().expect("the binary");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        match status["workers"].as_array() {
            Some(workers) if !workers.is_empty() => break workers.clone(),
            _ => assert!(begun.elapsed() < PATIENCE, "{}", log()),
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    assert_eq!(workers.len(), 1);

    let file = runtime.join("gleaner").join(address.port().to_string());
    let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&file), mode(&runtime.join("gleaner"))), (0o600, 0o700));
    let token = std::fs::read_to_string(&file).expect("a token");
    assert!(token.starts_with("gleaner_") && !log().contains(token.trim()));
    let nowhere = folder.path().join("nowhere");
    let output = gleaner(&nowhere, &["status"]).output().expect("the binary");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("GLEANER_TOKEN_FILE"), "another user: {said}");
    let mut page = std::net::TcpStream::connect(&*pages).expect("the pages");
    std::io::Write::write_all(
        &mut page,
        format!("GET / HTTP/1.1\r\nHost: {pages}\r\nConnection: close\r\n\r\n").as_bytes(),
    )
    .expect("asked");
    let mut answer = String::new();
    page.read_to_string(&mut answer).expect("answered");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    drop(local.0.stdin.take());
    let ended = local.0.wait().expect("our child");
    assert!(ended.success(), "{}", log());
    let left: Vec<_> = std::fs::read_dir(runtime.join("gleaner")).expect("a folder").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_context_is_made_of_what_a_secret_of_kubernetes_holds() {
    let (mut cluster, files) = start(&[("vera", "viewer")]);
    let home = cluster.path("home");
    // A double of kubectl, which knows one Secret.
    let script = "#!/bin/sh\n\
        [ \"$1 $2 $3 $4 $5\" = 'get secret vera --namespace lab' ] || { echo \"Error: secrets $3 not found\" >&2; exit 1; }\n\
        echo \"{\\\"kind\\\":\\\"Secret\\\",\\\"data\\\":{\\\"token\\\":\\\"$(base64 -w0 \"$VERA\")\\\"}}\"\n";
    let kubectl = cluster.write("kubectl", script);
    std::fs::set_permissions(&kubectl, std::fs::Permissions::from_mode(0o755)).expect("its owner");
    let path = format!("{}:{}", cluster.path("").display(), std::env::var("PATH").expect("a PATH"));
    for (name, value) in [("PATH", path.as_str()), ("VERA", &files[0]), ("HOME", &home.display().to_string())] {
        cluster.set_env(name, value);
    }
    // What is no absolute path counts as not set.
    cluster.set_env("XDG_CONFIG_HOME", "");
    let address = format!("http://{}", cluster.address());
    let import = |secret: &str| {
        let args =
            ["config", "import-kubernetes", "lab", "--namespace", "lab", "--secret", secret, "--coordinator", &address];
        stderr(&cluster, &args)
    };
    let (code, said) = import("anna");
    assert!(code == Some(1) && said.contains("lab/anna") && said.contains("secrets anna not found"), "{code:?} {said}");
    let (code, said) = import("vera");
    assert!(code == Some(0) && said.contains("use-context lab"), "{code:?} {said}");
    let token = home.join(".config/gleaner/lab/token");
    assert_eq!(std::fs::metadata(&token).expect("it is there").permissions().mode() & 0o777, 0o600);
    // The context's token counts, and it is a viewer's.
    let by_context = |args: &[&str]| {
        let mut command = Command::new(binary());
        command.args(args).args(["--context", "lab"]).env_clear().env("HOME", &home).stdin(Stdio::null());
        command.output().expect("the binary under test")
    };
    assert!(by_context(&["status"]).status.success());
    let said = String::from_utf8_lossy(&by_context(&["dataset", "delete", "birds", "-y"]).stderr).into_owned();
    assert!(said.contains("vera is a viewer"), "{said}");
}
