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
fn fetcher() -> Fetcher {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Fetcher::new(FetchConfig {
        rules: AddressRules::default(),
        name_servers: Vec::new(),
        user_agent: "Gleaner/test".into(),
        honour_opt_outs: true,
        authorities: Vec::new(),
        body_budget: 1 << 20,
    })
    .expect("a client")
}

#[tokio::test]
async fn large_bodies_wait_for_their_share_of_the_budget_and_gain_the_time() {
    let fetcher = fetcher();
    let start = Instant::now();
    let mut deadline = start;
    let mut small = Body::new();
    fetcher.reserve(&mut small, ALLOWANCE, &mut deadline).await;
    assert!(small.share.is_none() && deadline == start);

    // More than there is: it gets all of it, rather than nothing for ever.
    let mut large = Body::new();
    fetcher.reserve(&mut large, 8 << 20, &mut deadline).await;
    assert_eq!(fetcher.budget.available_permits(), 0);

    let mut other = Body::new();
    let mut deadline = start;
    let waits = fetcher.reserve(&mut other, 1 << 20, &mut deadline);
    let ends = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(large);
    };
    tokio::join!(waits, ends);
    assert!(deadline >= start + Duration::from_millis(50) && other.room == 1 << 20);
}

#[tokio::test]
async fn bodies_of_unknown_length_grow_together_and_one_at_a_time_past_the_budget() {
    const MAX: usize = 8 << 20;
    let fetcher = fetcher();
    let start = Instant::now();
    let mut deadline = start;
    let (mut one, mut two) = (Body::new(), Body::new());
    for body in [&mut one, &mut two] {
        fetcher.grow(body, MAX, &mut deadline).await;
    }
    assert_eq!((one.room, two.room, fetcher.budget.available_permits()), (512 << 10, 512 << 10, 512));
    fetcher.grow(&mut one, MAX, &mut deadline).await;
    assert_eq!((one.room, fetcher.budget.available_permits()), (1 << 20, 0));
    fetcher.grow(&mut one, MAX, &mut deadline).await;
    assert!(one.room == MAX && deadline - start < Duration::from_millis(50));

    let mut deadline = start;
    let waits = fetcher.grow(&mut two, MAX, &mut deadline);
    let ends = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(one);
    };
    tokio::join!(waits, ends);
    assert!(two.room == MAX && deadline >= start + Duration::from_millis(50));
    drop(two);
    assert_eq!(fetcher.budget.available_permits(), 1024);
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
