//! Pods that are known by the tokens of their service accounts, with real processes over TLS. The API server is a
//! double: it answers TokenReviews as Kubernetes does, of tokens that the test writes down.
#![allow(clippy::print_stdout, reason = "measured figures")]

mod small;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use support::net::Net;
use support::{Authority, Cluster, Wire, binary};

/// What the coordinator shows of itself.
const OWN: &str = "own.account.token";
/// Who may what.
const ACCOUNTS: &str = "admin=gleaner/ci,worker=gleaner/worker,trainer=gleaner/trainer,viewer=gleaner/looker";

/// The double of an API server.
#[derive(Default)]
struct Kubernetes {
    /// Account and pod by token.
    known: Mutex<BTreeMap<String, (String, String)>>,
    broken: AtomicBool,
    asked: AtomicU32,
}

impl Kubernetes {
    fn serve(self: &Arc<Self>, authority: &Authority) -> SocketAddr {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let pair = authority.issue("127.0.0.1");
        let cert = CertificateDer::from_pem_slice(pair.cert.as_bytes()).expect("PEM");
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).expect("PEM");
        let tls = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![cert], key).expect("a pair");
        let (tls, listener) = (Arc::new(tls), TcpListener::bind("127.0.0.1:0").expect("loopback"));
        let address = listener.local_addr().expect("bound");
        let this = Arc::clone(self);
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let (this, tls) = (Arc::clone(&this), Arc::clone(&tls));
                std::thread::spawn(move || this.answer(socket, tls));
            }
        });
        address
    }

    /// One question.
    fn answer(&self, socket: TcpStream, tls: Arc<ServerConfig>) -> Option<()> {
        let mut stream = BufReader::new(StreamOwned::new(ServerConnection::new(tls).ok()?, socket));
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if stream.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let mut body = vec![0; header("content-length:")?.parse().ok()?];
        stream.read_exact(&mut body).ok()?;
        self.asked.fetch_add(1, Ordering::Relaxed);
        let is_ours = head.starts_with("POST /apis/authentication.k8s.io/v1/tokenreviews ")
            && header("authorization:") == Some(&format!("Bearer {OWN}"));
        let (status, answer) = match (self.broken.load(Ordering::Relaxed), is_ours) {
            (true, _) => ("503 Service Unavailable", json!({"kind": "Status", "message": "etcd is away"})),
            (_, false) => ("403 Forbidden", json!({"kind": "Status", "message": "may not create tokenreviews"})),
            (false, true) => ("201 Created", self.review(&serde_json::from_slice(&body).ok()?)),
        };
        let answer = answer.to_string();
        let length = answer.len();
        let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n");
        let stream = stream.get_mut();
        stream.write_all(format!("{head}connection: close\r\n\r\n{answer}").as_bytes()).ok()?;
        stream.conn.send_close_notify();
        stream.flush().ok()
    }

    /// A token as a pod has it, which is known from now on; its file.
    fn pod(&self, cluster: &Cluster, account: &str, pod: &str) -> String {
        let token = format!("header.{}.signature", pod.replace('-', "_"));
        self.known.lock().expect("no panic").insert(token.clone(), (account.to_owned(), pod.to_owned()));
        cluster.write(pod, &token)
    }

    fn review(&self, question: &Value) -> Value {
        let Value::String(token) = &question["spec"]["token"] else { return json!({"kind": "Status"}) };
        let known = self.known.lock().expect("no panic");
        let status = match (known.get(token), question["spec"]["audiences"] == json!(["gleaner"])) {
            (Some((account, pod)), true) => json!({
                "authenticated": true, "audiences": ["gleaner"],
                "user": {"username": format!("system:serviceaccount:{account}"), "uid": "1", "groups": ["system:authenticated"],
                         "extra": {"authentication.kubernetes.io/pod-name": [pod]}},
            }),
            _ => json!({"authenticated": false, "error": "[invalid bearer token]"}),
        };
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": question["spec"], "status": status})
    }
}

/// A list of so many pictures, each at its own URL.
fn pictures(count: u64, origin: &Origin) -> String {
    let entry = |n: u64| {
        let url = list::url(Rot::Good, (0, n), n, origin);
        Entry { synset: "n02084071", url, rot: Rot::Good, picture: (0, n), counts: true }
    };
    list::to_text(&(0..count).map(entry).collect::<Vec<_>>())
}

/// Starts a coordinator that takes nobody but over TLS, and asks this API server who pods are; the file of its
/// authority. The test itself comes with the token of a file.
fn start(cluster: &mut Cluster, authority: &Authority, api: &str, token: &str, more: &[&str]) -> String {
    let ca = cluster.write("ca.crt", &authority.pem());
    cluster.write("token", OWN);
    cluster.set_env("GLEANER_COORDINATOR", &format!("https://{}", cluster.address()));
    cluster.set_env("GLEANER_TLS_CA", &ca);
    cluster.set_env("GLEANER_TOKEN_FILE", token);
    let (host, _) = cluster.address().rsplit_once(':').expect("HOST:PORT");
    let pair = authority.issue(host);
    let [cert, key] = [cluster.write("server.pem", &pair.cert), cluster.write("server.key", &pair.key)];
    let folder = cluster.path("").display().to_string();
    let tls = ["--tls", "require", "--tls-cert", &cert, "--tls-key", &key];
    let kubernetes = ["--kubernetes-api", api, "--kubernetes-account", &folder];
    cluster.start_coordinator_with(&[&tls[..], &kubernetes, more].concat());
    ca
}

#[test]
fn pods_are_known_by_their_accounts_and_put_out_when_kubernetes_knows_them_no_more() {
    let authority = Authority::new("ours");
    let kubernetes = Arc::new(Kubernetes::default());
    let api = format!("https://{}", kubernetes.serve(&authority));
    let mut cluster = Cluster::new(None, Vec::new());
    let pod = |cluster: &Cluster, account: &str, pod: &str| kubernetes.pod(cluster, account, pod);
    let admin = pod(&cluster, "gleaner:ci", "ci-0");
    let ca = start(&mut cluster, &authority, &api, &admin, &["--service-accounts", ACCOUNTS]);

    let origin = Origin::serve(Options { seed: 5, ..Options::default() }).expect("loopback");
    let urls = cluster.write("urls.txt", &pictures(40, &origin));
    let make = |cluster: &Cluster, name: &str| {
        let flags = ["--size", "64", "--slice-urls", "10", "--wait", "--timeout", "60s"];
        cluster.gleaner(&[&["dataset", "create", name, "--urls", &urls], &flags[..]].concat());
        assert_eq!(cluster.json(&["dataset", "describe", name])["outcomes"]["kept"], 40);
    };
    let worker = pod(&cluster, "gleaner:worker", "worker-0");
    cluster.start_worker_with("worker", &["--token-file", &worker]);
    let begun = Instant::now();
    make(&cluster, "first");
    let (seconds, asked) = (begun.elapsed().as_secs_f64(), kubernetes.asked.load(Ordering::Relaxed));

    let refused = |cluster: &Cluster, file: &str, code: i32, said: &str| {
        let answer = cluster.try_gleaner(&["status", "--token-file", file]);
        let text = String::from_utf8_lossy(&answer.stderr);
        assert!(answer.status.code() == Some(code) && text.contains(said), "{said}: {text}");
    };
    refused(&cluster, &worker, 1, "worker");
    let other = pod(&cluster, "default:worker", "stranger-0");
    refused(&cluster, &other, 1, "the service account default/worker is none of the coordinator's --service-accounts");
    let unknown = cluster.write("unknown", "header.unknown.signature");
    refused(&cluster, &unknown, 1, "Kubernetes does not know the token");
    let garbage = cluster.write("garbage", "what-is-no-token");
    refused(&cluster, &garbage, 1, "the token is not known here");

    // While the API server is away, whom it has known goes on; of others nothing can be said.
    kubernetes.broken.store(true, Ordering::Relaxed);
    make(&cluster, "second");
    let late = pod(&cluster, "gleaner:looker", "late-0");
    refused(&cluster, &late, 5, "Kubernetes does not say now whose the token is");
    assert!(cluster.log("coordinator").contains("etcd is away"), "whoever runs the cluster is told why");
    kubernetes.broken.store(false, Ordering::Relaxed);

    // What a pod has open ends when it is gone.
    cluster.terminate("worker");
    cluster.gleaner(&["dataset", "create", "third", "--urls", &urls, "--size", "64"]);
    let looker = pod(&cluster, "gleaner:looker", "looker-0");
    let coordinator = format!("https://{}", cluster.address());
    let mut watch = Command::new(binary())
        .args(["dataset", "watch", "third", "--token-file", &looker, "--coordinator", &coordinator, "--tls-ca", &ca])
        .stdout(Stdio::null())
        .spawn()
        .expect("the binary under test");
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(watch.try_wait().expect("a child"), None, "the stream goes on");
    kubernetes
        .known
        .lock()
        .expect("no panic")
        .retain(|token, _| !token.contains("looker") && !token.contains("worker"));
    let gone = Instant::now();
    let ended = watch.wait().expect("a child");
    let put_out = gone.elapsed().as_secs_f64();
    assert_eq!(ended.code(), Some(1), "refused");
    refused(&cluster, &worker, 1, "Kubernetes does not know the token");
    println!("ACCOUNTS: questions={asked} seconds={seconds:.1} put_out_s={put_out:.1}");
    assert!(put_out < 6.0 && f64::from(asked) < 8.0 + seconds, "{asked} questions in {seconds} s, {put_out} s");
}

/// Machines of their own, joined by a bridge, stand for pods: a real cluster is what `make try-cluster` needs.
#[test]
fn each_pod_comes_in_by_its_own_account_a_submitter_by_a_token_and_a_pod_without_either_gets_nothing() {
    let Some(net) = Net::start(4) else { return };
    let [authority, strangers] = ["ours", "a stranger's"].map(Authority::new);
    let kubernetes = Arc::new(Kubernetes::default());
    let api = format!("https://{}", kubernetes.serve(&authority));
    let mut cluster = Cluster::listening_at(&net.gateway());
    let anna = cluster.path("anna").display().to_string();
    let line = cluster.gleaner(&["token", "new", "--role", "submitter", "--name", "anna", "--to", &anna]);
    let tokens = cluster.write("tokens", &line);
    start(&mut cluster, &authority, &api, &anna, &["--service-accounts", ACCOUNTS, "--tokens", &tokens]);

    // Pods that have no token, one of another namespace, and a worker's where a trainer's is wanted.
    let (host, stranger) = (net.gateway(), net.name(3));
    let elsewhere = kubernetes.pod(&cluster, "default:worker", "elsewhere-0");
    let worker = kubernetes.pod(&cluster, "gleaner:worker", "worker-0");
    let other_ca = cluster.write("other.crt", &strangers.pem());
    let net_of_all = format!("{host}/32");
    let fetches = ["worker", "--allow-net", &net_of_all];
    let trains = ["trainer", "--devices", "cpu"];
    let plain = format!("http://{}", cluster.address());
    for (name, role, flags, said) in [
        ("without-token", &fetches[..], &["--token-file", "/dev/null"][..], "token"),
        ("elsewhere", &fetches, &["--token-file", &elsewhere], "default/worker is none of"),
        ("wrong-role", &trains, &["--token-file", &worker], "trainer"),
        ("other-authority", &fetches, &["--token-file", &worker, "--tls-ca", &other_ca], "certificate"),
        ("in-the-clear", &fetches, &["--token-file", &worker, "--coordinator", &plain], "https://"),
    ] {
        cluster.spawn_in(Some(&stranger), name, &[role, flags].concat());
        cluster.eventually(name, |cluster| cluster.log(name).contains(said));
    }

    // Those that have one.
    cluster.spawn_in(Some(&net.name(0)), "worker", &[&fetches[..], &["--token-file", &worker]].concat());
    for n in 1..3 {
        let name = format!("trainer-{n}");
        let token = kubernetes.pod(&cluster, "gleaner:trainer", &name);
        cluster.spawn_in(Some(&net.name(n)), &name, &[&trains[..], &["--token-file", &token]].concat());
    }
    let begun = Instant::now();
    // With one host, which is led to from the other machines.
    let origin = Origin::serve(Options { seed: 11, hosts: 1, ..Options::default() }).expect("loopback");
    let wire = Wire::at(&host, &origin.hosts()[0]);
    small::create(&cluster, &small::list(&origin).replace(&origin.hosts()[0], &wire.address().to_string()));
    let fetched = begun.elapsed().as_secs_f64();
    assert_eq!(cluster.json(&["dataset", "describe", "small"])["outcomes"]["kept"], 200);
    small::submit(&cluster, "run", 2, &["ranks.min=2"]);
    small::wait(&cluster, "run");
    let trained = begun.elapsed().as_secs_f64() - fetched;
    let status = cluster.json(&["status"]);
    let len = |what: &str| status[what].as_array().map(Vec::len);
    assert_eq!([len("workers"), len("agents")], [Some(1), Some(2)], "{status}");
    println!("PODS: refused=5 fetched_s={fetched:.1} trained_s={trained:.1}");
}
