use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proto::{Limits, Rejection};
use reqwest::Certificate;
use tokio::time::{Instant, timeout};

use super::client::{FetchConfig, Fetched, Fetcher};
use super::files::Roots;
use super::net::AddressRules;
use super::request::Request;
use super::retry::Retry;
use crate::hosts::HostSignal;

/// With a budget of 1 MiB.
fn config() -> FetchConfig {
    FetchConfig {
        rules: AddressRules::default(),
        roots: Roots::default(),
        name_servers: Vec::new(),
        user_agent: "Gleaner/test".into(),
        agent: "Gleaner".into(),
        proxy: None,
        any_certificate: false,
        authorities: Vec::new(),
        body_budget: 1 << 20,
    }
}

pub(crate) fn fetcher() -> Fetcher {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Fetcher::new(config()).expect("a client")
}

/// One that may reach loopback.
pub(crate) fn fetcher_of_loopback() -> Fetcher {
    let mut fetcher = fetcher();
    fetcher.config.rules.allowed = vec!["127.0.0.0/8".parse().expect("a net")];
    fetcher
}

/// Bytes that may become a picture, as far as their start tells.
fn starting_as_jpeg(length: usize) -> Vec<u8> {
    let mut bytes = vec![7; length];
    bytes[..3].copy_from_slice(&[0xff, 0xd8, 0xff]);
    bytes
}

/// A server that announces a large body to each that asks and sends a little of it in every tenth of a second; `good`
/// has all of it at once.
async fn dripping() -> std::net::SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = vec![0; 4096];
                let length = stream.read(&mut request).await.unwrap_or(0);
                let good = request[..length].starts_with(b"GET /good");
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 900 << 10);
                stream.write_all(head.as_bytes()).await.ok();
                if good {
                    stream.write_all(&starting_as_jpeg(900 << 10)).await.ok();
                }
                while stream.write_all(&[0xff, 0xd8, 0xff, 0xe0]).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn bodies_that_drip_lose_their_part_of_the_budget_when_others_wait_for_it() {
    let (fetcher, limits) = (fetcher_of_loopback(), Limits::default());
    let at = dripping().await;
    let request = |path: &str| Request::new(&format!("http://{at}/{path}")).expect("a URL");
    let (mut liar, mut good) = (request("liar"), request("good"));
    let start = Instant::now();
    let lies = fetcher.fetch(&mut liar, &limits);
    let fetched = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        fetcher.fetch(&mut good, &limits).await
    };
    let (lied, fetched) = tokio::join!(lies, fetched);
    assert!(matches!(fetched, Ok(Fetched::Body(body)) if body.bytes.len() == 900 << 10));
    let lied = lied.expect_err("it does not come");
    assert_eq!((lied.rejection, lied.retry, lied.signal), (Rejection::Timeout, Retry::Never, HostSignal::Failed));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_host_is_not_blamed_for_the_time_that_others_took() {
    let (fetcher, limits) = (fetcher_of_loopback(), Limits { timeout_seconds: 1.0, ..Limits::default() });
    let at = crate::attempt::tests::origin().await;
    for (path, signal) in [("silent", HostSignal::Failed), ("late", HostSignal::Unknown)] {
        let mut request = Request::new(&format!("http://{at}/{path}")).expect("a URL");
        let error = loop {
            match fetcher.fetch(&mut request, &limits).await {
                Ok(Fetched::Redirect) => {}
                fetched => break fetched.expect_err("it says nothing"),
            }
        };
        assert_eq!((error.rejection, error.signal), (Rejection::Timeout, signal), "{path}");
    }
}

/// A server that speaks HTTP/2 alone and answers each request with as many bytes as its path says, its certificate, and
/// the connections that it has taken.
async fn http2() -> (std::net::SocketAddr, Certificate, Arc<AtomicUsize>) {
    let own = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).expect("a certificate");
    let authority = Certificate::from_pem(own.cert.pem().as_bytes()).expect("PEM");
    let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).expect("a key");
    let mut tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .expect("they fit");
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("it is bound");
    let connections = Arc::new(AtomicUsize::new(0));
    let taken = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            taken.fetch_add(1, Ordering::Relaxed);
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let session = acceptor.accept(socket).await.expect("a handshake");
                let mut connection = h2::server::handshake(session).await.expect("HTTP/2");
                while let Some(Ok((request, mut answer))) = connection.accept().await {
                    let length: usize = request.uri().path()[1..].parse().expect("a length");
                    let head = http::Response::builder().header("content-length", length).body(()).expect("a head");
                    let mut body = answer.send_response(head, false).expect("the stream is open");
                    // It goes out as the other side's windows allow.
                    body.send_data(starting_as_jpeg(length).into(), true).expect("the stream is open");
                }
            });
        }
    });
    (address, authority, connections)
}

#[tokio::test]
async fn bodies_that_wait_for_memory_hold_up_no_others_of_their_http2_connection() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (address, authority, connections) = http2().await;
    let rules = AddressRules { allowed: vec!["127.0.0.0/8".parse().expect("a net")] };
    let config = FetchConfig { rules, authorities: vec![authority], ..config() };
    let fetcher = Fetcher::new(config).expect("a client");
    let limits = Limits { timeout_seconds: 30.0, ..Limits::default() };
    let fetch = async |length: usize| {
        let mut request = Request::new(&format!("https://{address}/{length}")).expect("a URL");
        match fetcher.fetch(&mut request, &limits).await.expect("it answers") {
            Fetched::Body(body) if body.bytes.len() == length => body,
            other => panic!("{length} bytes were asked for: {other:?}"),
        }
    };
    let whole_budget = fetch(8 << 20).await;
    // Each gives its share back as soon as it is whole.
    let waiting = futures::future::join_all((0..40).map(async |_| drop(fetch(1 << 20).await)));
    let others = async {
        // By now those wait, with all that the connection lets them send unread.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let small = futures::future::join_all((0..40).map(|_| fetch(100_000)));
        timeout(Duration::from_secs(10), small).await.expect("they do not wait for those that wait");
        drop(whole_budget);
    };
    tokio::join!(waiting, others);
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}

/// A proxy that answers what it is asked for in plain text with a picture of 7,000 bytes, and leads everything else to
/// one address; and what it was asked for.
async fn proxy(to: std::net::SocketAddr) -> (std::net::SocketAddr, Arc<std::sync::Mutex<Vec<String>>>) {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("it is bound");
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let heard = Arc::clone(&heard);
            tokio::spawn(async move {
                let mut socket = BufReader::new(socket);
                let (mut head, mut line) = (Vec::new(), String::new());
                while socket.read_line(&mut line).await.expect("a head") > 2 {
                    head.push(std::mem::take(&mut line).trim().to_owned());
                }
                let first = head.first().cloned().unwrap_or_default();
                let with_password =
                    head.iter().any(|line| line.to_ascii_lowercase().starts_with("proxy-authorization: basic"));
                heard.lock().expect("nothing panics").push(format!("{first} {with_password}"));
                if first.starts_with("CONNECT ") {
                    socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.expect("it is open");
                    let mut server = tokio::net::TcpStream::connect(to).await.expect("it listens");
                    let _ = tokio::io::copy_bidirectional(&mut socket, &mut server).await;
                } else {
                    let head = "HTTP/1.1 200 OK\r\nContent-Length: 7000\r\nConnection: close\r\n\r\n";
                    socket.write_all(head.as_bytes()).await.expect("it is open");
                    socket.write_all(&starting_as_jpeg(7000)).await.expect("it is open");
                }
            });
        }
    });
    (address, asked)
}

#[tokio::test]
async fn a_proxy_looks_names_up_and_any_certificate_is_taken_if_that_is_said() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (address, ..) = http2().await;
    let (at, asked) = proxy(address).await;
    // Nobody but the proxy knows the name, and loopback is not permitted.
    let proxy = Some(format!("http://me:word@{at}").parse().expect("an address"));
    let fetch = async |any_certificate: bool, url: &str| {
        let fetcher =
            Fetcher::new(FetchConfig { proxy: proxy.clone(), any_certificate, ..config() }).expect("a client");
        let mut request = Request::new(url).expect("a URL");
        let fetched = fetcher.fetch(&mut request, &Limits::default()).await;
        fetched.map(|fetched| matches!(fetched, Fetched::Body(body) if body.bytes.len() == 7000))
    };
    assert_eq!(fetch(false, "http://only.proxy.invalid/7000").await, Ok(true));
    let refused = fetch(false, "https://only.proxy.invalid/7000").await.expect_err("nobody knows the authority");
    assert_eq!(refused.rejection, Rejection::Tls);
    assert_eq!(fetch(true, "https://only.proxy.invalid/7000").await, Ok(true));
    let blocked = fetch(true, "http://10.0.0.1/").await.expect_err("a private address");
    assert_eq!(blocked.rejection, Rejection::BlockedAddress);
    let asked = asked.lock().expect("nothing panics").clone();
    assert_eq!(asked[0], "GET http://only.proxy.invalid/7000 HTTP/1.1 true");
    assert!(asked[1..].iter().all(|first| first == "CONNECT only.proxy.invalid:443 HTTP/1.1 true"), "{asked:?}");
}

/// A server that shows these certificates, its own first, and answers everything with a picture of 7,000 bytes.
async fn showing(chain: Vec<rcgen::Certificate>, key: rcgen::KeyPair) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    let chain = chain.iter().map(|certificate| certificate.der().clone()).collect();
    let tls = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).expect("they fit");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let url = format!("https://{}/", listener.local_addr().expect("it is bound"));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let Ok(mut session) = acceptor.accept(socket).await else { continue };
            let _ = session.read(&mut [0; 4096]).await;
            let head = b"HTTP/1.1 200 OK\r\nContent-Length: 7000\r\nConnection: close\r\n\r\n";
            session.write_all(&[&head[..], &starting_as_jpeg(7000)].concat()).await.ok();
            session.shutdown().await.ok();
        }
    });
    url
}

#[tokio::test]
async fn a_certificate_is_taken_if_it_counts_for_the_name_and_today_and_a_known_authority_is_behind_it() {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
    let _ = rustls::crypto::ring::default_provider().install_default();
    let key = || KeyPair::generate().expect("a key");
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        params
    };
    let named = |name: &str| CertificateParams::new(vec![name.to_owned()]).expect("a name");
    let (known_key, known_params) = (key(), authority("known"));
    let known = known_params.self_signed(&known_key).expect("a certificate");
    let known = (Certificate::from_pem(known.pem().as_bytes()).expect("PEM"), Issuer::new(known_params, known_key));
    let between = || {
        let (key, params) = (key(), authority("between"));
        let certificate = params.signed_by(&key, &known.1).expect("a certificate");
        (certificate, Issuer::new(params, key))
    };
    let (mut expired, mut early) = (named("127.0.0.1"), named("127.0.0.1"));
    (expired.not_before, expired.not_after) = (date_time_ymd(2019, 1, 1), date_time_ymd(2020, 1, 1));
    (early.not_before, early.not_after) = (date_time_ymd(3019, 1, 1), date_time_ymd(3020, 1, 1));
    let mut cases = Vec::new();
    for (what, params, is_good) in [
        ("good", named("127.0.0.1"), true),
        ("run out", expired, false),
        ("of tomorrow", early, false),
        ("of another name", named("other.example"), false),
    ] {
        let key = key();
        cases.push((what, vec![params.signed_by(&key, &known.1).expect("a certificate")], key, is_good));
    }
    for (what, is_shown) in [("by one between", true), ("by one between that is not shown", false)] {
        let (key, (certificate, issuer)) = (key(), between());
        let own = named("127.0.0.1").signed_by(&key, &issuer).expect("a certificate");
        cases.push((what, std::iter::once(own).chain(is_shown.then_some(certificate)).collect(), key, is_shown));
    }
    let own = key();
    cases.push(("by itself", vec![named("127.0.0.1").self_signed(&own).expect("a certificate")], own, false));

    let rules = AddressRules { allowed: vec!["127.0.0.0/8".parse().expect("a net")] };
    for (what, chain, key, is_good) in cases {
        let url = showing(chain, key).await;
        for any_certificate in [false, true] {
            let (rules, authorities) = (rules.clone(), vec![known.0.clone()]);
            let config = FetchConfig { rules, authorities, any_certificate, ..config() };
            let mut request = Request::new(&url).expect("a URL");
            let fetched = Fetcher::new(config).expect("a client").fetch(&mut request, &Limits::default()).await;
            match is_good || any_certificate {
                true => assert!(matches!(fetched, Ok(Fetched::Body(body)) if body.bytes.len() == 7000), "{what}"),
                false => assert_eq!(fetched.expect_err(what).rejection, Rejection::Tls, "{what}"),
            }
        }
    }
}
