use super::*;

fn headers(values: &[&str]) -> HeaderMap {
    values.iter().map(|value| ("x-robots-tag".parse().expect("a name"), value.parse().expect("a value"))).collect()
}

#[test]
fn opt_outs_count_if_they_are_said_to_all_or_to_us() {
    for yes in [
        "noai",
        "NoImageAI",
        "noarchive, noindex",
        "gleaner: noai",
        "*: noai",
        "none",
        "unavailable_after: 2099, noai",
        "noarchive, unavailable_after: 2099, noai",
        "max-image-preview:large, noai",
    ] {
        assert!(opted_out(&headers(&[yes])), "{yes}");
    }
    for no in ["", "all", "nofollow", "otherbot: noindex, noai", "unavailable_after: noindex"] {
        assert!(!opted_out(&headers(&[no])), "{no}");
    }
    assert!(opted_out(&headers(&["otherbot: noindex", "noai"])));
}

/// With a budget of 1 MiB.
fn config() -> FetchConfig {
    FetchConfig {
        rules: AddressRules::default(),
        name_servers: Vec::new(),
        user_agent: "Gleaner/test".into(),
        honour_opt_outs: true,
        authorities: Vec::new(),
        body_budget: 1 << 20,
    }
}

fn fetcher() -> Fetcher {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Fetcher::new(config()).expect("a client")
}

#[tokio::test]
async fn large_bodies_wait_for_their_share_of_the_budget_and_gain_the_time() {
    let (fetcher, limits) = (fetcher(), Limits::default());
    let start = Instant::now();
    let mut deadline = start;
    let mut small = Body::new();
    fetcher.reserve(&mut small, ALLOWANCE, &limits, &mut deadline).await.expect("no wait");
    assert!(small.share.is_none() && deadline == start);

    // More than there is: it gets all of it, rather than nothing for ever.
    let mut large = Body::new();
    fetcher.reserve(&mut large, 8 << 20, &limits, &mut deadline).await.expect("all of it");
    assert_eq!(fetcher.budget.available_permits(), 0);

    let mut other = Body::new();
    let mut deadline = start;
    let waits = fetcher.reserve(&mut other, 1 << 20, &limits, &mut deadline);
    let ends = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(large);
    };
    tokio::join!(waits, ends).0.expect("its turn");
    assert!(deadline >= start + Duration::from_millis(50) && other.room == 1 << 20);
}

#[tokio::test]
async fn bodies_of_unknown_length_grow_together_and_one_at_a_time_past_the_budget() {
    const MAX: usize = 8 << 20;
    let (fetcher, limits) = (fetcher(), Limits::default());
    let start = Instant::now();
    let mut deadline = start;
    let (mut one, mut two) = (Body::new(), Body::new());
    for body in [&mut one, &mut two] {
        fetcher.grow(body, MAX, &limits, &mut deadline).await.expect("room");
    }
    assert_eq!((one.room, two.room, fetcher.budget.available_permits()), (512 << 10, 512 << 10, 512));
    fetcher.grow(&mut one, MAX, &limits, &mut deadline).await.expect("room");
    assert_eq!((one.room, fetcher.budget.available_permits()), (1 << 20, 0));
    fetcher.grow(&mut one, MAX, &limits, &mut deadline).await.expect("room");
    assert!(one.room == MAX && deadline - start < Duration::from_millis(50));

    let mut deadline = start;
    let waits = fetcher.grow(&mut two, MAX, &limits, &mut deadline);
    let ends = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(one);
    };
    tokio::join!(waits, ends).0.expect("its turn");
    assert!(two.room == MAX && deadline >= start + Duration::from_millis(50));
    drop(two);
    assert_eq!(fetcher.budget.available_permits(), 1024);
}

#[tokio::test]
async fn who_waits_for_the_budget_waits_no_longer_than_a_url_may_take() {
    let (fetcher, limits) = (fetcher(), Limits { timeout_seconds: 0.2, ..Limits::default() });
    let mut deadline = Instant::now();
    let mut bodies = [Body::new(), Body::new()];
    fetcher.reserve(&mut bodies[0], 8 << 20, &limits, &mut deadline).await.expect("all of it");
    let failure = fetcher.reserve(&mut bodies[1], 1 << 20, &limits, &mut deadline).await.expect_err("nothing is left");
    assert_eq!((failure.rejection, failure.ending), (Rejection::Timeout, Ending::Unknown));
    assert_eq!(fetcher.waiting.load(Ordering::Relaxed), 0);
}

/// Bytes that may become a picture, as far as their start tells.
fn starting_as_jpeg(length: usize) -> Vec<u8> {
    let mut bytes = vec![7; length];
    bytes[..3].copy_from_slice(&[0xff, 0xd8, 0xff]);
    bytes
}

/// A server that announces a large body to each that asks and sends a little of it in every tenth of a second; `good` has all of it at
/// once.
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
    let (mut fetcher, limits) = (fetcher(), Limits::default());
    fetcher.config.rules.allowed = vec!["127.0.0.0/8".parse().expect("a net")];
    let at = dripping().await;
    let journey = |path: &str| Journey::new(&format!("http://{at}/{path}")).expect("a URL");
    let (mut liar, mut good) = (journey("liar"), journey("good"));
    let start = Instant::now();
    let lies = fetcher.fetch(&mut liar, &limits);
    let fetched = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        fetcher.fetch(&mut good, &limits).await
    };
    let (lied, fetched) = tokio::join!(lies, fetched);
    assert!(matches!(fetched, Ok(Step::Body(body)) if body.bytes.len() == 900 << 10));
    let lied = lied.expect_err("it does not come");
    assert_eq!((lied.rejection, lied.again, lied.ending), (Rejection::Timeout, Again::Never, Ending::Failed));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_host_is_not_blamed_for_the_time_that_others_took() {
    let (mut fetcher, limits) = (fetcher(), Limits { timeout_seconds: 1.0, ..Limits::default() });
    fetcher.config.rules.allowed = vec!["127.0.0.0/8".parse().expect("a net")];
    let at = crate::attempt::tests::origin().await;
    for (path, ending) in [("silent", Ending::Failed), ("late", Ending::Unknown)] {
        let mut journey = Journey::new(&format!("http://{at}/{path}")).expect("a URL");
        let failure = fetcher.fetch(&mut journey, &limits).await.expect_err("it says nothing");
        assert_eq!((failure.rejection, failure.ending), (Rejection::Timeout, ending), "{path}");
    }
}

#[test]
fn what_was_packed_unasked_is_unpacked_to_its_limit() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut gzip, &[7; 1000]).expect("memory");
    let packed = gzip.finish().expect("memory");
    assert_eq!(gunzip(&packed, 1000), Ok(vec![7; 1000]));
    assert_eq!(gunzip(&packed, 999), Err(Rejection::TooLarge));
    assert_eq!(gunzip(&packed[..packed.len() - 9], 1000), Err(Rejection::Protocol));
    assert_eq!(gunzip(b"plain", 1000), Err(Rejection::Protocol));
}

#[test]
fn retry_after_is_seconds_or_a_date_by_the_servers_own_clock() {
    let parse = |pairs: &[(&str, &str)]| {
        let pairs = pairs.iter().map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value")));
        retry_after(&HeaderMap::from_iter(pairs))
    };
    assert_eq!(parse(&[("retry-after", " 120")]), Some(Duration::from_secs(120)));
    let date = [("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT"), ("date", "Wed, 21 Oct 2015 07:27:30 GMT")];
    assert_eq!(parse(&date), Some(Duration::from_secs(30)));
    assert_eq!(parse(&date[..1]), None, "without the server's clock a date says nothing");
    assert_eq!(parse(&[("retry-after", "soon")]), None);
    assert_eq!(parse(&[("retry-after", "99999999999999999999999")]), None);
    assert_eq!(parse(&[]), None);
}

#[test]
fn what_may_pass_is_tried_again_with_growing_pauses_within_tries_time_and_patience() {
    let limits = Limits::default();
    let journey = || Journey::new("http://a.example/x.jpg").expect("a URL");
    let status = |code: u16, after: Option<&str>| {
        let headers = after.map(|value| (RETRY_AFTER, value.parse().expect("a value")));
        Failure::of_status(StatusCode::from_u16(code).expect("a status"), &headers.into_iter().collect())
    };
    let mut trip = journey();
    let connect = Failure::of_host(Rejection::Connect);
    assert_eq!(trip.try_again(&connect, &limits, 0.0), Some(Duration::from_millis(500)));
    assert_eq!(trip.try_again(&connect, &limits, 1.0), Some(Duration::from_secs(2)));
    assert_eq!(trip.try_again(&connect, &limits, 0.0), None, "two further tries");

    let mut late = Journey { spent: Duration::from_secs(16), ..journey() };
    assert_eq!(late.try_again(&connect, &limits, 0.0), None, "half of its time is gone");

    let after = |failure: Failure| journey().try_again(&failure, &limits, 0.0);
    assert_eq!(after(status(503, Some("7"))), Some(Duration::from_secs(7)));
    assert_eq!(after(status(503, Some("3600"))), None, "longer than a URL's whole time");
    assert_eq!(after(status(429, None)), Some(Duration::from_millis(500)));
    for never in [status(404, Some("1")), status(410, None), status(403, None), Rejection::Tls.into()] {
        assert_eq!(after(never), None, "{never:?}");
    }
    assert_eq!(status(429, Some("3600")).ending, Ending::Limited(LONGEST_HUSH));
    assert_eq!((status(500, None).ending, status(403, None).ending), (Ending::Failed, Ending::Answered));
}

#[test]
fn a_further_try_begins_where_the_list_says() {
    let mut journey = Journey::new("http://a.example/x.jpg").expect("a URL");
    let next = Url::parse("https://b.example:444/y.jpg").expect("a URL");
    journey.visited.push(std::mem::replace(&mut journey.url, next));
    assert_eq!(journey.host(), "b.example:444");
    journey.try_again(&Failure::of_host(Rejection::Timeout), &Limits::default(), 0.5).expect("a try is left");
    assert_eq!((journey.host().as_str(), journey.visited.len()), ("a.example", 0));
}

#[test]
fn http_and_https_share_a_host_and_so_does_the_rooted_name() {
    for same in ["http://a.example/", "https://A.example/", "http://a.example.:80/", "http://u:p@a.example/"] {
        assert_eq!(Journey::new(same).expect("a URL").host(), "a.example", "{same}");
    }
    assert_eq!(Journey::new("http://[::1]:8080/").expect("a URL").host(), "[::1]:8080");
}

/// A server that speaks HTTP/2 alone and answers each request with as many bytes as its path says, its certificate, and the connections
/// that it has taken.
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
        let mut journey = Journey::new(&format!("https://{address}/{length}")).expect("a URL");
        match fetcher.fetch(&mut journey, &limits).await.expect("it answers") {
            Step::Body(body) if body.bytes.len() == length => body,
            step => panic!("{length} bytes were asked for: {step:?}"),
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
