//! Decisions about datasets after they were created, over real gRPC, with a folder as the store.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::time::Duration;

use common::{Cluster, PATIENCE, put_shard};
use proto::pb::control_dataset_request::{Decision, Finish, Pause, Resume};
use proto::pb::{self, DatasetState, Priority};
use tonic::{Code, Status};

fn list(name: &str, urls: u32) -> String {
    (0..urls).map(|i| format!("n{}\thttp://h{name}{i}.com/{name}{i}\n", i % 3)).collect()
}

async fn decide(cluster: &Cluster, name: &str, decision: Decision) -> Result<pb::Dataset, Status> {
    let request = pb::ControlDatasetRequest { name: name.to_owned(), decision: Some(decision) };
    Ok(cluster.datasets().control_dataset(request).await?.into_inner())
}

#[tokio::test]
async fn a_paused_dataset_is_not_leased_and_stays_paused_over_a_restart_until_it_is_resumed() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.5).await;
    cluster.create("birds", "request-1", 50, &list("b", 100)).await.expect("a good list");
    assert!(decide(&cluster, "birds", Decision::Pause(Pause {})).await.expect("it is there").paused);
    assert!(cluster.lease(Duration::from_millis(200)).await.is_none());
    cluster.stop().await;

    let cluster = Cluster::start(folder.path(), 0.5).await;
    assert!(cluster.dataset("birds").await.expect("it is there").paused);
    assert!(cluster.lease(Duration::from_millis(1500)).await.is_none());
    for _ in 0..2 {
        assert!(!decide(&cluster, "birds", Decision::Resume(Resume {})).await.expect("it is there").paused);
    }
    cluster.work().await;
    assert_eq!(cluster.sealed("birds").await.outcomes["kept"], 100);
    let unknown = decide(&cluster, "cats", Decision::Pause(Pause {})).await.expect_err("there is none");
    assert_eq!(unknown.code(), Code::NotFound);
    cluster.stop().await;
}

#[tokio::test]
async fn a_finished_dataset_is_sealed_with_what_it_has_and_a_refresh_fetches_the_rest() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    cluster.create("birds", "request-1", 50, &list("b", 200)).await.expect("a good list");
    let finish = |after_millis| Decision::Finish(Finish { after_millis });
    let later = decide(&cluster, "birds", finish(3_600_000)).await.expect("it is fetched");
    assert!(later.finishes_after_millis.is_some_and(|millis| (3_590_000..=3_600_000).contains(&millis)));
    let done = cluster.lease(PATIENCE).await.expect("a slice");
    put_shard(&*cluster.store, &done).await;
    cluster.complete(&done).await;
    let held = cluster.lease(PATIENCE).await.expect("a slice");
    assert!(!cluster.renew_message(&held).await.finish, "there is an hour left");

    for _ in 0..2 {
        decide(&cluster, "birds", finish(0)).await.expect("it is fetched");
    }
    assert!(cluster.lease(Duration::from_millis(200)).await.is_none());
    let told = cluster.renew_message(&held).await;
    assert!(told.finish && told.duration_millis > 0, "it commits what it has");
    put_shard(&*cluster.store, &held).await;
    cluster.complete(&held).await;
    let sealed = cluster.sealed("birds").await;
    assert_eq!(sealed.state(), DatasetState::Ready, "{}", sealed.error);
    assert_eq!(sealed.outcomes, [("kept".to_owned(), 100), ("unfetched".to_owned(), 100)].into());
    assert_eq!((sealed.rounds, sealed.finishes_after_millis), (1, None));
    decide(&cluster, "birds", finish(0)).await.expect("a call that is repeated after its answer was lost");
    cluster.stop().await;

    let cluster = Cluster::start(folder.path(), 30.0).await;
    assert_eq!(cluster.dataset("birds").await.expect("it is there").state(), DatasetState::Ready);
    let refreshed = cluster.refresh("birds", "request-2", None).await.expect("something is left");
    assert_eq!(refreshed.retried, [("unfetched".to_owned(), 100)].into());
    cluster.work().await;
    assert_eq!(cluster.sealed("birds").await.outcomes["kept"], 200);
    let error = decide(&cluster, "birds", finish(0)).await.expect_err("nothing is being fetched");
    assert_eq!(error.code(), Code::FailedPrecondition);
    cluster.stop().await;
}

#[tokio::test]
async fn a_small_dataset_does_not_wait_behind_a_large_one_and_a_high_priority_gets_more() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    cluster.create("large", "request-1", 10, &list("l", 1000)).await.expect("a good list");
    cluster.create("small", "request-2", 10, &list("s", 200)).await.expect("a good list");
    let of_small = async |leases: u32| {
        let mut of_small = 0;
        for _ in 0..leases {
            let lease = cluster.lease(PATIENCE).await.expect("a slice");
            of_small += u32::from(lease.dataset.starts_with("small"));
        }
        of_small
    };
    assert_eq!(of_small(10).await, 5);
    let prior = decide(&cluster, "small", Decision::Priority(Priority::High.into())).await.expect("it is there");
    assert_eq!(prior.priority(), Priority::High);
    assert_eq!(of_small(10).await, 8);
    let wrong = decide(&cluster, "small", Decision::Priority(9)).await.expect_err("there is no such priority");
    assert_eq!(wrong.code(), Code::InvalidArgument);
    cluster.stop().await;
}
