use super::*;

fn headers(values: &[&str]) -> HeaderMap {
    values.iter().map(|value| ("x-robots-tag".parse().expect("a name"), value.parse().expect("a value"))).collect()
}

#[test]
fn opt_outs_count_if_they_are_said_to_all_or_to_us() {
    for yes in
        ["noai", "NoImageAI", "noarchive, noindex", "gleaner: noai", "*: noai", "none", "unavailable_after: 2099, noai"]
    {
        assert!(opted_out(&headers(&[yes])), "{yes}");
    }
    for no in ["", "all", "nofollow", "otherbot: noindex, noai", "unavailable_after: noindex"] {
        assert!(!opted_out(&headers(&[no])), "{no}");
    }
    assert!(opted_out(&headers(&["otherbot: noindex", "noai"])));
}

#[tokio::test]
async fn large_bodies_wait_for_their_share_of_the_budget_and_gain_the_time() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let fetcher = Fetcher::new(FetchConfig {
        rules: AddressRules::default(),
        user_agent: "Gleaner/test".into(),
        honour_opt_outs: true,
        body_budget: 1 << 20,
    })
    .expect("a client");
    let start = Instant::now();
    let (mut room, mut deadline) = (ALLOWANCE, start);
    let mut small = Body::from(Vec::new());
    fetcher.reserve(&mut small, ALLOWANCE, &mut room, &mut deadline).await;
    assert!(small._share.is_none() && deadline == start);

    // More than there is: it gets all of it, rather than nothing for ever.
    let mut large = Body::from(Vec::new());
    fetcher.reserve(&mut large, 8 << 20, &mut room, &mut deadline).await;
    assert_eq!(fetcher.budget.available_permits(), 0);

    let mut other = Body::from(Vec::new());
    let (mut room, mut deadline) = (ALLOWANCE, start);
    let waits = fetcher.reserve(&mut other, 1 << 20, &mut room, &mut deadline);
    let ends = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(large);
    };
    tokio::join!(waits, ends);
    assert!(deadline >= start + Duration::from_millis(50) && room == 1 << 20);
}
