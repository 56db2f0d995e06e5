use super::*;
use crate::list::url;
use crate::pictures::picture;
use crate::rot::Rot;

/// One answer: its head, its body, and how the connection ended.
struct Received {
    head: String,
    body: Vec<u8>,
    end: io::Result<()>,
}

/// Asks for `path` on a connection of its own and listens until it ends.
async fn get(host: &str, path: &str) -> Received {
    let mut socket = TcpStream::connect(host).await.expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("it reads");
    let mut bytes = Vec::new();
    let end = socket.read_to_end(&mut bytes).await.map(drop);
    let split = bytes.windows(4).position(|window| window == b"\r\n\r\n").map_or(bytes.len(), |at| at + 4);
    let body = bytes.split_off(split);
    Received { head: String::from_utf8_lossy(&bytes).into_owned(), body, end }
}

async fn rotten(origin: &Origin, rot: Rot) -> Received {
    let url = url(rot, (1, 7), 8, origin);
    let (host, path) = url.trim_start_matches("http://").split_once('/').expect("a path");
    get(host, &format!("/{path}")).await
}

impl Received {
    fn length(&self) -> usize {
        let value = self.head.split("Content-Length: ").nth(1).expect("a length");
        value.split("\r\n").next().and_then(|text| text.parse().ok()).expect("a number")
    }

    fn location(&self) -> &str {
        self.head.split("Location: ").nth(1).and_then(|rest| rest.split("\r\n").next()).expect("a location")
    }
}

#[tokio::test]
async fn statuses_and_whole_bodies_are_as_the_kind_says() {
    let origin = Origin::start(5).await.expect("loopback");
    for (rot, status) in [
        (Rot::Good, "200"),
        (Rot::NotFound, "404"),
        (Rot::Gone, "410"),
        (Rot::Forbidden, "403"),
        (Rot::ServerError, "500"),
        (Rot::Unavailable, "503"),
        (Rot::HtmlAsJpeg, "200"),
        (Rot::TinyGif, "200"),
        (Rot::Thumbnail, "200"),
        (Rot::Empty, "200"),
        (Rot::RandomBytes, "200"),
        (Rot::Truncated, "200"),
        (Rot::OptedOut, "200"),
        (Rot::PngBomb, "200"),
        (Rot::GzipBomb, "200"),
        (Rot::Webp, "200"),
    ] {
        let heard = rotten(&origin, rot).await;
        assert!(heard.head.starts_with(&format!("HTTP/1.1 {status} ")), "{rot:?}: {}", heard.head);
        assert_eq!(heard.length(), heard.body.len(), "{rot:?}");
        assert!(heard.end.is_ok());
    }
    let photo = picture(5, 1, 7);
    for same in [Rot::Good, Rot::Copy, Rot::OtherClass] {
        assert_eq!(rotten(&origin, same).await.body, photo);
    }
    assert!(photo.starts_with(&rotten(&origin, Rot::Truncated).await.body));
    assert!(rotten(&origin, Rot::Unavailable).await.head.contains("\r\nRetry-After: 1\r\n"));
    assert!(rotten(&origin, Rot::OptedOut).await.head.contains("\r\nX-Robots-Tag: noai\r\n"));
    assert!(rotten(&origin, Rot::GzipBomb).await.head.contains("\r\nContent-Encoding: gzip\r\n"));
}

#[tokio::test]
async fn redirects_lead_where_the_kind_says() {
    let origin = Origin::start(5).await.expect("loopback");
    let moved = rotten(&origin, Rot::Moved).await;
    let (host, path) = moved.location().trim_start_matches("http://").split_once('/').expect("a path");
    assert!(origin.hosts()[1..].iter().any(|other| other == host), "{host}");
    assert_eq!(get(host, &format!("/{path}")).await.body, picture(5, 1, 7));

    let first = &origin.hosts()[0];
    for (rot, length) in [(Rot::Placeholder, 2_000..2_600), (Rot::LargePlaceholder, 127_000..137_000)] {
        let there = get(first, rotten(&origin, rot).await.location()).await;
        assert!(length.contains(&there.body.len()), "{rot:?}: {}", there.body.len());
    }
    let page = get(first, rotten(&origin, Rot::HtmlAfterRedirect).await.location()).await;
    assert!(page.body.starts_with(b"<!DOCTYPE html>") && page.body.len() > 5_000);
    let there = rotten(&origin, Rot::Loop).await;
    let back = get(first, there.location()).await;
    assert_eq!(get(first, back.location()).await.location(), there.location());
    assert!(rotten(&origin, Rot::Private).await.location().starts_with("http://10."));
}

#[tokio::test]
async fn broken_bodies_break_as_the_kind_says() {
    let origin = Origin::start(5).await.expect("loopback");
    let short = rotten(&origin, Rot::ShortBody).await;
    assert!(short.end.is_ok() && short.body.len() < short.length());
    let long = rotten(&origin, Rot::LongBody).await;
    assert!(long.body.len() > long.length());
    let reset = rotten(&origin, Rot::Reset).await;
    assert_eq!(reset.end.expect_err("no orderly end").kind(), io::ErrorKind::ConnectionReset);
    let cut = rotten(&origin, Rot::CutChunk).await;
    assert!(cut.head.contains("Transfer-Encoding: chunked") && cut.body.starts_with(b"8000\r\n"));
    assert!(cut.body.len() < 0x8000);
    assert!(!rotten(&origin, Rot::Garbage).await.head.starts_with("HTTP"));
    let refused = TcpStream::connect(origin.refused()).await.expect_err("nobody listens");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let endless = rotten(&origin, Rot::Endless).await;
    assert!(endless.body.len() >= ENDLESS_BYTES / 0x10000 * 0x10000);
}

#[tokio::test]
async fn slow_answers_outlast_patience_and_count_as_open_until_they_are_left() {
    let origin = Origin::start_with(Options { hosts: 1, ..Options::default() }).await.expect("loopback");
    let patience = Duration::from_millis(700);
    let host = &origin.hosts()[0];
    let (drip, silent) =
        tokio::join!(timeout(patience, rotten(&origin, Rot::Drip)), timeout(patience, rotten(&origin, Rot::Silent)));
    assert!(drip.is_err() && silent.is_err());
    assert_eq!(origin.host(host).peak, 2);
    let left = async {
        while origin.host(host).open > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(10), left).await.expect("both see that the peer has gone");
}

#[tokio::test]
async fn requests_are_counted_and_answered_after_the_delay_one_by_one_on_a_connection() {
    let delay = Duration::from_millis(30);
    let files = tempfile::tempdir().expect("a folder");
    std::fs::write(files.path().join("Photo.JPG"), b"a real one").expect("it is writable");
    let options = Options { hosts: 2, files: Some(files.path().to_owned()), delay, ..Options::default() };
    let origin = Origin::start_with(options).await.expect("loopback");
    let host = &origin.hosts()[1];
    let mut socket = TcpStream::connect(host).await.expect("it listens");
    let begun = Instant::now();
    let request = b"GET /files/Photo.JPG HTTP/1.1\r\nHost: x\r\n\r\n";
    socket.write_all(&[&request[..], request].concat()).await.expect("it reads");
    let mut heard = Vec::new();
    while heard.windows(10).filter(|window| window == b"a real one").count() < 2 {
        assert!(socket.read_buf(&mut heard).await.expect("an answer") > 0);
    }
    assert!(begun.elapsed() >= 2 * delay);
    assert_eq!(origin.requests("/files/Photo.JPG"), 2);
    assert_eq!((origin.host(host).arrivals.len(), origin.host(host).peak), (2, 1));
    for outside in ["/files/../Cargo.toml", "/files/none.jpg", "/photo/20/1/1.jpg", "/photo/1/1.jpg", "/"] {
        assert!(get(host, outside).await.head.starts_with("HTTP/1.1 404 "), "{outside}");
    }
}

#[tokio::test]
async fn a_host_that_is_asked_more_than_it_bears_says_so_and_bears_as_much_again_later() {
    let origin = Origin::start_with(Options { bears: 1.0, hosts: 2, ..Options::default() }).await.expect("loopback");
    let [host, other] = origin.hosts() else { panic!("two hosts") };
    let status = async |host: &str| get(host, "/none").await.head.split(' ').nth(1).map(str::to_owned);
    for wanted in ["404", "429", "429"] {
        assert_eq!(status(host).await.as_deref(), Some(wanted));
    }
    assert_eq!(status(other).await.as_deref(), Some("404"));
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(status(host).await.as_deref(), Some("404"));
    assert_eq!((origin.host(host).throttled, origin.host(other).throttled), (2, 0));
}
