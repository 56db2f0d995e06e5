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
