use std::collections::HashMap;
use std::net::SocketAddr;

use object_store::memory::InMemory;
use proto::Rejection;
use proto::pb::SiteShare;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::attempt::tests::{origin, tools};
use crate::fetch::tests::{fetcher, fetcher_of_loopback};

#[tokio::test]
async fn urls_that_fail_again_and_again_do_not_make_their_host_look_dead() {
    let dispatcher = Arc::clone(&tools(Arc::new(InMemory::new())).await.dispatcher);
    let (at, spec) = (origin().await, DatasetSpec::default());
    let fetch = async |paths: &[&str]| {
        let entry = |path: &&str| SliceEntry { url: format!("http://{at}/{path}"), ..SliceEntry::default() };
        let mut batch = dispatcher.batch(paths.iter().map(entry).collect(), &spec, false, false);
        let mut outcomes = Vec::new();
        for _ in paths {
            outcomes.push(batch.next().await.expect("one for each").body.map(drop));
        }
        outcomes
    };
    // Nine failures in a row, of three URLs.
    assert_eq!(fetch(&["sick"; 3]).await, [Err(Rejection::HttpStatus); 3]);
    let start = Instant::now();
    assert_eq!(fetch(&["good/1"]).await, [Ok(())]);
    assert!(start.elapsed() < Duration::from_secs(1), "it was paused: {:?}", start.elapsed());
}

#[tokio::test]
async fn a_url_whose_task_panics_is_rejected() {
    let dispatcher = Arc::new(Dispatcher::new(fetcher(), 1, Arc::new(WayOut::new(Vec::new()))));
    let entry = SliceEntry { url: "http://a.example/".to_owned(), ..SliceEntry::default() };
    let mut batch = dispatcher.batch(vec![entry], &DatasetSpec::default(), false, false);
    let job = dispatcher.hosts().take_out(Instant::now(), |_| true).pop().expect("it waits");
    let panics = tokio::spawn(async move {
        let _job = job;
        panic!("a bug");
    });
    assert!(panics.await.is_err_and(|error| error.is_panic()));
    let result = batch.next().await.expect("a result");
    assert_eq!((result.entry.url.as_str(), result.body.map(drop)), ("http://a.example/", Err(Rejection::Protocol)));
    assert!(batch.shared.all_started.is_cancelled());
}

/// A server that breaks its first response to each path off in the way that the path names, and then gives the
/// picture; and how often it was asked for which path.
async fn breaks_off_once() -> (SocketAddr, Arc<Mutex<HashMap<String, u32>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let at = listener.local_addr().expect("bound");
    let asked = Arc::new(Mutex::new(HashMap::new()));
    let counts = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.expect("a request");
            let path = String::from_utf8_lossy(&request[..length]).split(' ').nth(1).expect("a path").to_owned();
            let times = {
                let mut counts = counts.lock().expect("no panic");
                let times = counts.entry(path.clone()).or_insert(0);
                *times += 1;
                *times
            };
            let response: &[u8] = match (path.as_str(), times) {
                ("/body", 1) => b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf",
                ("/chunk", 1) => b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf",
                ("/closed", 1) => b"",
                ("/reset", 1) => {
                    stream.set_zero_linger().expect("allowed");
                    continue;
                }
                ("/garbage", _) => b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
                _ => b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalfhalf",
            };
            stream.write_all(response).await.expect("it is open");
            stream.shutdown().await.ok();
        }
    });
    (at, asked)
}

#[tokio::test]
async fn what_breaks_off_is_tried_again() {
    let dispatcher = Arc::clone(&tools(Arc::new(InMemory::new())).await.dispatcher);
    let (at, asked) = breaks_off_once().await;
    let paths = ["/body", "/chunk", "/closed", "/reset", "/garbage"];
    let entry = |path: &str| SliceEntry { url: format!("http://{at}{path}"), ..SliceEntry::default() };
    let mut batch = dispatcher.batch(paths.into_iter().map(entry).collect(), &DatasetSpec::default(), false, false);
    for _ in paths {
        let FetchResult { entry, body, .. } = batch.next().await.expect("one for each");
        let wanted = if entry.url.ends_with("garbage") { Err(Rejection::Protocol) } else { Ok(b"halfhalf".to_vec()) };
        assert_eq!(body.map(|(body, _)| body.bytes), wanted, "{}", entry.url);
    }
    let asked = asked.lock().expect("no panic");
    assert_eq!(paths.map(|path| asked[path]), [2, 2, 2, 2, 1]);
}

/// What a server answers, and whether that is all of it: if not, nothing more comes.
const ANSWERS: [(&str, bool); 8] = [
    ("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalfhalf", true),
    ("HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone", true),
    (
        "HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nmore\r\n0\r\n\r\n",
        true,
    ),
    // It has no time to answer at all, to end its answer, or to end the page of an error.
    ("", false),
    ("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf", false),
    ("HTTP/1.1 404 Not Found\r\nContent-Length: 8\r\n\r\nhalf", false),
    // Nobody waits for the end.
    ("HTTP/1.1 404 Not Found\r\nContent-Length: 100000\r\n\r\n", false),
    ("HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n", false),
];

/// How long after the end of a first request, which is answered so, the next one came that had to wait for its place.
async fn pause_after(answer: &'static str) -> Duration {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let at = listener.local_addr().expect("bound");
    let (came, mut next_came) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let came = came.clone();
            tokio::spawn(async move {
                let mut request = vec![0; 4096];
                while let Ok(length @ 1..) = stream.read(&mut request).await {
                    let is_first = request[..length].starts_with(b"GET /first");
                    if !is_first {
                        came.send(Instant::now()).expect("the test waits");
                    }
                    let answer = if is_first { answer } else { ANSWERS[0].0 };
                    stream.write_all(answer.as_bytes()).await.expect("it is open");
                }
            });
        }
    });
    let dispatcher = Arc::new(Dispatcher::new(fetcher_of_loopback(), 4, Arc::new(WayOut::new(Vec::new()))));
    tokio::spawn(Arc::clone(&dispatcher).dispatch());
    let (timeout_seconds, retries) = (0.5, 0);
    let limits = Limits { timeout_seconds, retries, ..Limits::default() };
    let spec = DatasetSpec { limits, respect: Vec::new(), ..DatasetSpec::default() };
    let entry = |path: &str| SliceEntry { url: format!("http://{at}/{path}"), ..SliceEntry::default() };
    let mut batch = dispatcher.batch(vec![entry("first"), entry("second")], &spec, false, false);
    {
        let (mut hosts, now) = (dispatcher.hosts(), Instant::now());
        assert_eq!(hosts.demands(now).len(), 1);
        let one = SiteShare { slots: 1, site_slots: 1, known: true, ..SiteShare::default() };
        hosts.lend(now, now, Duration::from_secs(3600), &[one]);
        dispatcher.wake(hosts);
    }
    let first = batch.next().await.expect("a result");
    let ended = Instant::now();
    assert!(first.entry.url.ends_with("first"));
    next_came.recv().await.expect("it comes").saturating_duration_since(ended)
}

#[tokio::test]
async fn who_ends_a_request_before_its_answer_keeps_its_place_until_the_server_can_have_heard() {
    let pauses = futures::future::join_all(ANSWERS.map(|(answer, _)| pause_after(answer))).await;
    for ((answer, is_whole), pause) in ANSWERS.into_iter().zip(pauses) {
        let millis = pause.as_millis();
        assert!(if is_whole { millis < 700 } else { millis >= 900 }, "{millis} ms after {answer:?}");
    }
}

/// For so long a signed URL is good.
const SIGNED_FOR: Duration = Duration::from_secs(1);

/// A server at two addresses, whose first one redirects to signed URLs of the second one, which takes its time.
async fn signs() -> SocketAddr {
    let listener = TcpListener::bind("0.0.0.0:0").await.expect("all addresses");
    let port = listener.local_addr().expect("bound").port();
    let start = Instant::now();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.unwrap_or(0);
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                let path = request.split(' ').nth(1).unwrap_or("/");
                let now = start.elapsed();
                let response = match path.strip_prefix("/signed?") {
                    None => {
                        let to = format!("http://127.0.0.2:{port}/signed?{}", now.as_millis());
                        format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n")
                    }
                    Some(at) if now > Duration::from_millis(at.parse().expect("own URL")) + SIGNED_FOR => {
                        "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n".to_owned()
                    }
                    Some(_) => {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n".to_owned()
                    }
                };
                stream.write_all(format!("{response}Connection: close\r\n\r\n").as_bytes()).await.ok();
                stream.shutdown().await.ok();
            });
        }
    });
    SocketAddr::from(([127, 0, 0, 1], port))
}

#[tokio::test]
async fn a_signature_that_expires_while_its_url_waits_for_its_site_is_asked_for_again() {
    let at = signs().await;
    let dispatcher = Arc::new(Dispatcher::new(fetcher_of_loopback(), 64, Arc::new(WayOut::new(Vec::new()))));
    tokio::spawn(Arc::clone(&dispatcher).dispatch());
    let lending = Arc::clone(&dispatcher);
    tokio::spawn(async move {
        loop {
            {
                let (mut hosts, now) = (lending.hosts(), Instant::now());
                let four = SiteShare { slots: 4, site_slots: 4, known: true, ..SiteShare::default() };
                let shares = vec![four; hosts.demands(now).len()];
                hosts.lend(now, now, Duration::from_secs(3600), &shares);
                lending.wake(hosts);
            }
            sleep(Duration::from_millis(10)).await;
        }
    });
    // Twice as many as are answered while their signatures are good.
    let entry = |n| SliceEntry { key: n, url: format!("http://{at}/{n}"), ..SliceEntry::default() };
    let spec = DatasetSpec { respect: Vec::new(), ..DatasetSpec::default() };
    let mut batch = dispatcher.batch((0..80).map(entry).collect(), &spec, false, false);
    for _ in 0..80 {
        let result = batch.next().await.expect("one for each");
        let (status, body) = (result.info.status, result.body.map(drop));
        assert_eq!((status, body), (Some(200), Ok(())), "{}", result.entry.url);
    }
}
