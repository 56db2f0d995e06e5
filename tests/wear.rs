//! Strangers who only take: uploads that send nothing, connections that say nothing, a worker that leases and never
//! renews. The others' work goes on.
#![allow(clippy::print_stdout, reason = "measured figures")]

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use proto::dial::Dial;
use proto::pb::create_dataset_request::{Part, Start};
use proto::pb::dataset_service_client::DatasetServiceClient;
use proto::pb::fetch_service_client::FetchServiceClient;
use proto::pb::{CreateDatasetRequest, LeaseShardRequest};
use support::Cluster;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Uploads that begin and send nothing more: as many as tokio has threads for blocking work.
const IDLE_UPLOADS: usize = 512;
/// Connections that say nothing, or a part of what HTTP/2 begins with: fewer where fewer files may be open.
const SILENT: u64 = 4_000;

fn web() -> Origin {
    Origin::serve(Options { seed: 5, ..Options::default() }).expect("loopback")
}

/// Pictures, each at its own URL.
fn pictures(count: u64, origin: &Origin) -> String {
    let entry = |n: u64| {
        let url = list::url(Rot::Good, (0, n), n, origin);
        Entry { synset: "n02084071", url, rot: Rot::Good, picture: (0, n), counts: true }
    };
    list::to_text(&(0..count).map(entry).collect::<Vec<_>>())
}

/// How long something took, in milliseconds.
fn millis(work: impl FnOnce()) -> u128 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_millis()
}

/// Creates a dataset of so many pictures, and waits until it is ready.
fn make(cluster: &Cluster, name: &str, pictures: u64, urls: &str) {
    cluster.gleaner(&["dataset", "create", name, "--urls", urls, "--size", "64", "--slice-urls", "10"]);
    cluster.gleaner(&["dataset", "wait", name, "--timeout", "100s"]);
    assert_eq!(cluster.json(&["dataset", "describe", name])["outcomes"]["kept"], pictures);
}

/// Files and connections that a role has open.
fn open_files(cluster: &Cluster, role: &str) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", cluster.pid(role))).expect("it lives").count()
}

#[test]
fn uploads_and_connections_on_which_nothing_comes_keep_nobody_from_work() {
    let limit = rlimit::increase_nofile_limit(20_000).expect("the limit of open files");
    let origin = web();
    let mut cluster = Cluster::start();
    cluster.start_worker("worker");
    let urls = cluster.write("urls.txt", &pictures(30, &origin));
    let before = millis(|| make(&cluster, "before", 30, &urls));
    let files = open_files(&cluster, "coordinator");

    let runtime = Runtime::new().expect("threads");
    let address = format!("http://{}", cluster.address());
    // A client's own limit of streams on one connection is the coordinator's: three connections have room for all.
    let channels: Vec<_> = runtime.block_on(async {
        let dial = Dial::new(&address).expect("an address");
        let mut channels = Vec::new();
        for _ in 0..3 {
            channels.push(dial.connect().await.expect("it listens"));
        }
        channels
    });
    let uploads: Vec<_> = (0..IDLE_UPLOADS)
        .map(|n| {
            let mut client = DatasetServiceClient::new(channels[n % channels.len()].clone());
            runtime.spawn(async move {
                let (send, sent) = tokio::sync::mpsc::channel(1);
                let start = Start { request_id: format!("idle-{n}"), name: format!("idle-{n}"), ..Start::default() };
                let _ = send.send(CreateDatasetRequest { part: Some(Part::Start(start)) }).await;
                let answer = client.create_dataset(ReceiverStream::new(sent)).await;
                drop(send);
                answer
            })
        })
        .collect();
    let silent: Vec<TcpStream> = (0..SILENT.min(limit / 4))
        .map(|n| {
            let mut socket = TcpStream::connect(cluster.address()).expect("it listens");
            if n % 4 == 3 {
                socket.write_all(b"PRI * HTTP/2").expect("it is connected");
            }
            socket
        })
        .collect();
    let most = open_files(&cluster, "coordinator");

    let during = millis(|| make(&cluster, "during", 30, &urls));
    let status = millis(|| drop(cluster.gleaner(&["status"])));
    // The one that was silent for longest has made room for each that came meanwhile.
    let ended = uploads.iter().filter(|upload| upload.is_finished()).count();
    assert!(ended <= 8, "{ended} uploads ended");
    cluster.eventually("who says nothing is sent away", |cluster| open_files(cluster, "coordinator") < files + 100);
    println!(
        "WEAR: idle_uploads={IDLE_UPLOADS} silent_connections={} dataset_ms_before={before} dataset_ms_during={during} \
         status_ms_during={status} open_files_before={files} open_files_at_once={most} open_files_after={}",
        silent.len(),
        open_files(&cluster, "coordinator")
    );
    assert!(during < before * 3 + 5_000, "{before} ms became {during} ms");
    cluster.terminate("coordinator");
}

#[test]
fn a_worker_that_leases_everything_and_never_renews_keeps_nobody_from_work() {
    let origin = web();
    let mut cluster = Cluster::start();
    let urls = cluster.write("urls.txt", &pictures(60, &origin));
    let runtime = Runtime::new().expect("threads");
    let dial = Dial::new(&format!("http://{}", cluster.address())).expect("an address");
    let (taken, leases) = tokio::sync::mpsc::unbounded_channel();
    runtime.spawn(async move {
        let mut client = FetchServiceClient::new(dial.channel());
        for n in 0.. {
            // Slices of large sites, and the others.
            let large = n % 2 == 0;
            let request = LeaseShardRequest { worker: "greedy".to_owned(), large, ..Default::default() };
            match client.lease_shard(request).await {
                Ok(response) if response.get_ref().lease.is_some() => drop(taken.send(())),
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    });
    cluster.gleaner(&["dataset", "create", "wanted", "--urls", &urls, "--size", "64", "--slice-urls", "5"]);
    // Whoever lets leases end is asked less often; so it never has all of them.
    cluster.eventually("slices are leased by nobody who works", |_| leases.len() >= 4);
    let took = millis(|| {
        cluster.start_worker("worker");
        cluster.gleaner(&["dataset", "wait", "wanted", "--timeout", "110s"]);
    });
    let described = cluster.json(&["dataset", "describe", "wanted"]);
    println!("WEAR: greedy_leases={} dataset_ms={took} rounds={}", leases.len(), described["rounds"]);
    assert_eq!(described["outcomes"]["kept"], 60, "{}", described["outcomes"]);
    // It goes on taking; what ends the test must not be that it stopped.
    assert!(!leases.is_closed());
    let mut leases = tokio_stream::wrappers::UnboundedReceiverStream::new(leases);
    assert!(runtime.block_on(leases.next()).is_some());
}
