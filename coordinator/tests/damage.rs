//! Damaged objects, over real gRPC: what cannot be read is said, and nothing is lost that can be restored.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::time::Duration;

use common::{Cluster, PATIENCE, get, keys_under, put, put_shard, shard_id};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use proto::keys;
use proto::pb::DatasetState;
use tonic::Code;

fn list() -> String {
    (0..30).map(|i| format!("n{}\thttp://h{i}/{i}\n", i % 2)).collect()
}

#[tokio::test]
async fn a_dataset_of_which_too_much_is_damaged_fails_and_is_sealed_once_that_is_mended() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let created = cluster.create("birds", "request-1", 10, &list()).await.expect("a good list");
    let mut indexes = Vec::new();
    for _ in 0..3 {
        let lease = cluster.lease(PATIENCE).await.expect("one of three");
        put_shard(&*cluster.store, &lease).await;
        let key = keys::index(&shard_id(&created.dataset, lease.shard));
        indexes.push((key.clone(), get(&*cluster.store, &key).await));
        if indexes.len() == 3 {
            for (key, _) in &indexes[..2] {
                put(&*cluster.store, key, "rubbish").await;
            }
        }
        cluster.complete(&lease).await;
    }
    let failed = cluster.sealed("birds").await;
    assert_eq!(failed.state(), DatasetState::Failed);
    assert!(failed.error.contains("2 of 3 shards") && failed.error.contains("--accept-damage"), "{}", failed.error);
    let refused = cluster.refresh("birds", "request-2", None).await.expect_err("it is not mended");
    assert_eq!((refused.code(), refused.message()), (Code::FailedPrecondition, &*failed.error));
    put(&*cluster.store, &indexes[0].0, indexes[0].1.clone()).await;
    put(&*cluster.store, &indexes[1].0, indexes[1].1.clone()).await;
    assert_eq!(cluster.refresh("birds", "request-3", None).await.expect("it is mended").round, 0);
    let ready = cluster.sealed("birds").await;
    assert_eq!((ready.state(), ready.outcomes["kept"], ready.damaged.len()), (DatasetState::Ready, 30, 0));
    cluster.stop().await;
}

#[tokio::test]
async fn shards_of_which_even_the_slices_are_gone_are_left_out_when_somebody_says_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let created = cluster.create("birds", "request-1", 10, &list()).await.expect("a good list");
    for n in 0..3 {
        let lease = cluster.lease(PATIENCE).await.expect("one of three");
        put_shard(&*cluster.store, &lease).await;
        if n == 2 {
            for of in [0, 1].map(|shard| shard_id(&created.dataset, shard)) {
                put(&*cluster.store, &keys::index(&of), "rubbish").await;
                cluster.store.delete(&Path::from(keys::slice(&of))).await.expect("it is there");
            }
        }
        cluster.complete(&lease).await;
    }
    assert_eq!(cluster.sealed("birds").await.state(), DatasetState::Failed);
    assert_eq!(cluster.accept_damage("birds", "request-2").await.expect("agreed").round, 0, "nobody knows its URLs");
    let ready = cluster.sealed("birds").await;
    assert_eq!((ready.state(), ready.outcomes["kept"], ready.damaged.len()), (DatasetState::Ready, 10, 2));
    cluster.stop().await;
}

#[tokio::test]
async fn garbage_in_the_place_of_an_index_is_no_shard_and_its_urls_are_dealt_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.5).await;
    let created = cluster.create("birds", "request-1", 10, &list()).await.expect("a good list");
    let lease = cluster.lease(PATIENCE).await.expect("one of three");
    let of = shard_id(&created.dataset, lease.shard);
    put(&*cluster.store, &keys::index(&of), "rubbish").await;
    assert_eq!(cluster.complete(&lease).await, "0.0", "nobody's attempt");
    let described = cluster.dataset("birds").await.expect("exists");
    assert_eq!((described.damaged.len(), described.outcomes["unfetched"]), (1, 10));
    cluster.work().await;
    let ready = cluster.sealed("birds").await;
    assert_eq!((ready.state(), ready.outcomes["kept"], ready.automatic_rounds), (DatasetState::Ready, 30, 1));
    assert_eq!((ready.damaged[0].shard, &ready.damaged[0].key), (lease.shard, &keys::index(&of)));
    cluster.stop().await;
}

#[tokio::test]
async fn a_dataset_whose_catalog_is_damaged_is_shown_and_is_there_again_once_that_is_restored() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut cluster = Cluster::start(folder.path(), 0.5).await;
    let created = cluster.create("birds", "request-1", 10, &list()).await.expect("a good list");
    cluster.work().await;
    cluster.sealed("birds").await;
    let id = shard_id(&created.dataset, 0).dataset;
    let before = keys_under(&*cluster.store, &keys::dataset(&id)).await.len();
    for key in [keys::round(&id, 1), keys::dataset_spec(&id)] {
        let whole = get(&*cluster.store, &key).await;
        for is_gone in [true, false] {
            match is_gone {
                true => cluster.store.delete(&Path::from(key.as_str())).await.expect("it is there"),
                false => put(&*cluster.store, &key, whole.slice(..whole.len() / 2)).await,
            }
            cluster.stop().await;
            cluster = Cluster::start(folder.path(), 0.5).await;
            let failed = cluster.sealed("birds").await;
            assert_eq!(failed.state(), DatasetState::Failed);
            assert!(failed.error.contains(&key), "{}", failed.error);
            let refused = cluster.refresh("birds", "request-2", None).await.expect_err("it cannot be read");
            assert_eq!(refused.code(), Code::FailedPrecondition);
            let taken = cluster.create("birds", "request-3", 10, &list()).await.expect_err("the name is taken");
            assert_eq!(taken.code(), Code::AlreadyExists);
        }
        // Longer than whatever is dead takes to be removed.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        put(&*cluster.store, &key, whole).await;
    }
    assert_eq!(keys_under(&*cluster.store, &keys::dataset(&id)).await.len(), before);
    cluster.stop().await;
    let cluster = Cluster::start(folder.path(), 0.5).await;
    let ready = cluster.sealed("birds").await;
    assert_eq!((ready.state(), ready.outcomes["kept"]), (DatasetState::Ready, 30));
    // A manifest that is damaged is made anew.
    put(&*cluster.store, &keys::manifest(&id, 1), "rubbish").await;
    cluster.stop().await;
    let cluster = Cluster::start(folder.path(), 0.5).await;
    let ready = cluster.sealed("birds").await;
    assert_eq!((ready.state(), ready.outcomes["kept"], ready.manifest_version), (DatasetState::Ready, 30, 2));
    cluster.stop().await;
}
