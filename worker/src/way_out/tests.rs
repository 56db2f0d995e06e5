use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::time::Instant;

use super::*;

fn dead(way: &WayOut, hosts: usize) -> u64 {
    (0..hosts).fold(0, |_, n| way.result(&format!("dead-{n}"), "http://dead/1", false))
}

/// A watched way out, whose probes answer if `alive`; how often they were asked.
fn watched(configured: &[&str]) -> (Arc<WayOut>, Arc<AtomicBool>, Arc<AtomicUsize>) {
    let way = WayOut::new(configured.iter().map(|&url| url.to_owned()).collect());
    let way = Arc::new(WayOut { pause: Duration::from_millis(10), ..way });
    let (alive, asked) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let (this, answers, count) = (Arc::clone(&way), Arc::clone(&alive), Arc::clone(&asked));
    let ask = move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        std::future::ready(answers.load(Ordering::SeqCst))
    };
    tokio::spawn(async move { this.watch(ask, || {}).await });
    (way, alive, asked)
}

#[tokio::test]
async fn a_round_of_dead_hosts_is_believed_because_a_probe_answers() {
    let (way, _, asked) = watched(&["http://alive/1"]);
    let latest = dead(&way, 1000);
    let belief = way.prove(latest).await;
    assert!(belief.holds(1) && belief.holds(latest) && belief.online && belief.proved, "{belief:?}");
    assert!(asked.load(Ordering::SeqCst) < 4, "{asked:?}");
    let few = way.result("dead", "http://dead/2", false);
    let before = asked.load(Ordering::SeqCst);
    assert!(way.prove(few).await.holds(few), "one URL is no reason to ask");
    assert_eq!(asked.load(Ordering::SeqCst), before);
}

#[tokio::test]
async fn without_an_answer_nothing_since_the_last_picture_is_believed_until_there_is_one() {
    let (way, alive, _) = watched(&[]);
    way.result("good", "http://good/1", true);
    let latest = way.result("good", "http://good/2", true);
    alive.store(false, Ordering::SeqCst);
    let lost = dead(&way, MANY_HOSTS);
    way.offline().await;
    let belief = way.prove(lost).await;
    assert!(belief.holds(latest) && !belief.holds(latest + 1) && !belief.holds(lost) && !belief.online, "{belief:?}");
    let waits = tokio::time::timeout(Duration::from_millis(300), way.online()).await;
    assert!(waits.is_err(), "nobody answers");
    alive.store(true, Ordering::SeqCst);
    tokio::time::timeout(Duration::from_secs(20), way.online()).await.expect("it looks again and again");
    let after = way.result("good", "http://good/3", true);
    let belief = way.prove(after).await;
    assert!(belief.holds(latest) && belief.holds(after) && belief.online, "{belief:?}");
    assert!(!belief.holds(latest + 1) && !belief.holds(lost), "what was lost stays so: {belief:?}");
}

#[tokio::test]
async fn one_host_that_dies_with_its_whole_queue_is_compared_before_an_attempt_commits() {
    let (way, alive, _) = watched(&[]);
    let good = way.result("good", "http://good/1", true);
    alive.store(false, Ordering::SeqCst);
    let lost = (0..50).fold(0, |_, _| way.result("good", "http://good/2", false));
    let belief = way.prove(lost).await;
    assert!(belief.holds(good) && !belief.holds(good + 1) && !belief.online, "{belief:?}");
}

#[tokio::test]
async fn a_worker_with_nothing_to_ask_waits_some_times_and_then_believes() {
    let (way, _, asked) = watched(&[]);
    let begun = Instant::now();
    for _ in BLIND_PAUSES {
        dead(&way, MANY_HOSTS);
        way.offline().await;
        way.online().await;
    }
    assert!(begun.elapsed() >= way.pause * BLIND_PAUSES.iter().sum(), "{:?}", begun.elapsed());
    let latest = dead(&way, MANY_HOSTS);
    let belief = way.prove(latest).await;
    assert!(belief.holds(latest) && belief.online && !belief.proved, "{belief:?}");
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    let latest = way.result("good", "http://good/1", true);
    assert!(way.prove(latest).await.proved);
}

#[tokio::test]
async fn a_picture_that_is_slower_than_the_first_dead_hosts_keeps_a_worker_online() {
    let (way, ..) = watched(&[]);
    let dead = dead(&way, MANY_HOSTS);
    tokio::time::sleep(way.pause).await;
    way.result("good", "http://good/1", true);
    assert!(tokio::time::timeout(way.pause * 10, way.offline()).await.is_err(), "the picture came in time");
    assert!(way.prove(dead).await.holds(dead));
}

#[test]
fn probes_are_those_of_others_before_ones_own_one_of_each_host() {
    let way = WayOut::new(vec!["http://named/".to_owned()]);
    for n in 0..20 {
        way.result("h", &format!("http://own-{}/{n}", n % 3), true);
    }
    way.hear(&["http://newest/1".to_owned(), "http://older/1".to_owned()]);
    way.hear(&["http://newest/2".to_owned()]);
    let probes = way.known().probes();
    assert_eq!(
        probes[..4],
        ["http://named/", "http://newest/2", "http://older/1", "http://own-1/19"].map(str::to_owned)
    );
    assert_eq!(probes.len(), 6);
    assert_eq!(way.good(), ["http://own-1/19", "http://own-0/18", "http://own-2/17"]);
}
