use std::collections::HashMap;
use std::net::SocketAddr;

use object_store::memory::InMemory;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::attempt::tests::{origin, tools};
use crate::fetch::tests::fetcher;

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
