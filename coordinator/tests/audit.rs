//! What an audit finds in a store: nothing where all adds up, each damaged object, and garbage alone.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{Cluster, PATIENCE, get, keys_under, put, shard_id};
use coordinator::audit::{self, AuditError, Report};
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::gist::{self, GistList, GistWriter};
use proto::index::StoredFile;
use proto::run_event::{EventRecord, Member, RunEvent};
use proto::shard::sha256_hex;
use proto::stored_run::StoredRun;
use proto::tombstone::Tombstone;
use proto::{DatasetId, Split, Stored, keys};
use serde_json::json;

/// Two rounds of a dataset with skips and findings, one dataset that is being fetched, and a run that is done.
async fn whole() -> (Arc<InMemory>, DatasetId) {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.5).await;
    let pictures = (0..40).map(|i| format!("n{}\thttp://h{i}/{i}/a\n", i % 2));
    let same = (0..3).map(|i| format!("n0\thttp://h{i}/{}/b\n", i * 2));
    let list: String = pictures.chain(same).chain((0..4).map(|i| format!("n1\tgone:{i}\n"))).collect();
    let created = cluster.create("birds", "request-1", 20, &list).await.expect("a good list");
    cluster.work().await;
    cluster.sealed("birds").await;
    cluster.refresh("birds", "request-2", Some("n1\thttp://h/new\n")).await.expect("it is ready");
    cluster.work().await;
    let skipped = cluster.sealed("birds").await.skipped;
    assert_eq!(skipped["duplicate"], 3);
    let open = cluster.create("open", "request-3", 20, "n0\thttp://h/0\n").await.expect("a good list");
    assert!(cluster.lease(PATIENCE).await.is_some());
    let id = shard_id(&created.dataset, 0).dataset;
    submit(&*cluster.store, &id).await;
    put(&*cluster.store, &keys::outcomes(&shard_id(&open.dataset, 0), "1.1".parse().expect("an attempt")), "half")
        .await;
    let copy = copy(&*cluster.store).await;
    cluster.stop().await;
    (copy, id)
}

/// Writes a run as a coordinator and its ranks leave it: two checkpoints that it keeps, and its model.
async fn submit(store: &dyn ObjectStore, dataset: &DatasetId) {
    let manifest = keys::manifest(dataset, 1);
    let sha256 = sha256_hex(&get(store, &manifest).await);
    let stored = json!({
        "nonce": "n", "request_id": "r", "dataset": dataset.to_string(), "manifest_key": manifest,
        "manifest_sha256": sha256, "steps_per_epoch": 2, "spec": { "dataset": "birds", "checkpoint": { "keep": 2 } },
    });
    let stored = StoredRun::from_json(stored.to_string().as_bytes()).expect("a run");
    put(store, &keys::run_spec("r"), stored.to_json()).await;
    let mut events = vec![
        RunEvent::Submitted { request_id: "r".to_owned(), start: None },
        RunEvent::Generation { generation: 1, members: vec![Member { agent: "a".to_owned(), device: 0 }] },
    ];
    let mut digests = BTreeMap::new();
    for (folder, step) in
        [(keys::checkpoint("r", 2, 1, "x"), 2), (keys::checkpoint("r", 4, 1, "x"), 4), (keys::model("r", 1, "x"), 6)]
    {
        let content = format!("weights at step {step}");
        put(store, &format!("{folder}/model.safetensors"), content.clone()).await;
        digests.insert("model.safetensors".to_owned(), sha256_hex(content.as_bytes()));
        let digests = digests.clone();
        events.push(match step {
            6 => RunEvent::Done { model: folder, digests },
            step => RunEvent::Checkpoint { step, key: folder, digests, top1: None },
        });
    }
    for (n, event) in (1..).zip(events) {
        let record = EventRecord { format: 1, n, term: 1, nonce: "n".to_owned(), at_millis: 0, event };
        put(store, &keys::event("r", n), record.to_json()).await;
    }
}

async fn objects(store: &dyn ObjectStore) -> Vec<String> {
    let listed: Vec<_> = store.list(None).try_collect().await.expect("lists");
    let mut keys: Vec<String> = listed.into_iter().map(|meta| meta.location.to_string()).collect();
    keys.sort();
    keys
}

async fn copy(from: &dyn ObjectStore) -> Arc<InMemory> {
    let store = InMemory::new();
    for key in objects(from).await {
        put(&store, &key, get(from, &key).await).await;
    }
    Arc::new(store)
}

async fn check(store: &Arc<InMemory>, deep: bool) -> Report {
    audit::check(Arc::clone(store) as Arc<dyn ObjectStore>, deep).await.expect("a cluster's store")
}

#[tokio::test]
async fn a_whole_store_has_no_findings_and_another_folder_is_no_store() {
    let (store, _) = whole().await;
    let report = check(&store, true).await;
    assert_eq!((report.findings, report.left_out), (vec![], vec![]));
    assert_eq!((report.terms, report.datasets, report.shards, report.runs), (1, 2, 4, 1));
    assert_eq!((report.objects, report.cluster.len()), (objects(&*store).await.len() as u64, 32));
    let none = audit::check(Arc::new(InMemory::new()), false).await;
    assert!(matches!(none, Err(AuditError::NoCluster(_))));
}

#[tokio::test]
async fn every_object_that_is_gone_cut_or_has_another_bit_is_found_by_its_key() {
    let (store, id) = whole().await;
    let last = [keys::manifest(&id, 2), keys::event("r", 5)];
    for key in objects(&*store).await {
        // Nobody can know that there was a later one, or which terms there have been; attempts are not named yet.
        let is_last = last.contains(&key) || key == keys::CLUSTER || key.starts_with(keys::TERMS);
        if key.starts_with("datasets/open") && !key.contains("/slices/") {
            continue;
        }
        let whole = get(&*store, &key).await;
        let mut flipped = whole.to_vec();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 1;
        // Documents have no digest, and most of their bits only say something else.
        let is_document = key.ends_with(".json");
        let harms = [
            (!is_last).then_some(None),
            Some(Some(whole.slice(..middle))),
            (!is_document).then(|| Some(Bytes::from(flipped))),
        ];
        for harm in harms.into_iter().flatten() {
            let store = copy(&*store).await;
            match &harm {
                None => store.delete(&Path::from(key.as_str())).await.expect("it is there"),
                Some(bytes) => put(&*store, &key, bytes.clone()).await,
            }
            let findings = check(&store, true).await.findings;
            let found = findings.iter().any(|finding| finding.key == key);
            assert!(found, "{key} {:?}: {findings:?}", harm.map(|bytes| bytes.len()));
        }
    }
}

#[tokio::test]
async fn gists_that_say_what_their_shards_do_not_are_found_by_a_deep_check() {
    let (store, id) = whole().await;
    let manifest = proto::Manifest::from_json(&get(&*store, &keys::manifest(&id, 1)).await).expect("a manifest");
    let list_key = keys::gist_list(&id, 1, &manifest.nonce);
    let list = GistList::from_json(&get(&*store, &list_key).await).expect("a list");
    let object = list.objects.last().expect("it has some");
    let gists = gist::read(&id, object.round, &get(&*store, &object.file.key).await).expect("gists");
    let plants: [fn(&mut Vec<gist::Gist>); 4] = [
        |gists| gists[0].rows[0].label = 1 - gists[0].rows[0].label,
        |gists| gists[0].samples[0].moments.sum[2] += 1,
        |gists| gists[0].index.outcomes.add(Ok(()), 1),
        |gists| gists.clear(),
    ];
    for (n, plant) in plants.into_iter().enumerate() {
        let (store, mut gists, mut list) = (copy(&*store).await, gists.clone(), list.clone());
        plant(&mut gists);
        let mut writer = GistWriter::default();
        gists.iter().for_each(|gist| writer.push(gist));
        let (_, bytes) = writer.finish(&id, object.round).expect("memory");
        let key = keys::gists(&id, 1, &manifest.nonce, object.round, &sha256_hex(&bytes));
        let at = list.objects.len() - 1;
        list.objects[at].file = StoredFile { key: key.clone(), bytes: bytes.len() as u64, sha256: sha256_hex(&bytes) };
        put(&*store, &key, bytes).await;
        put(&*store, &list_key, list.to_json()).await;
        let found = |report: Report| report.findings.iter().any(|finding| finding.key == key);
        assert!(found(check(&store, true).await), "plant {n}");
        assert_eq!(found(check(&store, false).await), gists.is_empty(), "plant {n}: shards are not compared");
    }
}

#[tokio::test]
async fn garbage_is_what_nobody_can_name_any_more_and_nothing_else() {
    let (store, id) = whole().await;
    let before = objects(&*store).await;
    let attempt = |text: &str| text.parse().expect("an attempt");
    let (dead, cut): (DatasetId, DatasetId) = ("dead-1".parse().expect("an id"), "cut-1".parse().expect("an id"));
    let tombstone = Tombstone { format: 1, nonce: "n".to_owned(), at_millis: 0 }.to_json();
    let lost = [
        keys::outcomes(&id.shard(0), attempt("1.99")),
        keys::tar(&id.shard(0), Split::Train, attempt("1.99")),
        keys::tar(&id.shard(900), Split::Train, attempt("1.98")),
        keys::slice(&id.shard(900)),
        keys::skips(&id.shard(0), 1, "other"),
        keys::findings(&id.shard(0), 2, "other"),
        keys::gists(&id, 1, "other", 1, "00ff"),
        keys::gist_list(&id, 2, "other"),
        keys::slice(&dead.shard(0)),
        keys::index(&dead.shard(0)),
        keys::slice(&cut.shard(0)),
        format!("{}/state.json", keys::checkpoint("r", 1, 1, "old")),
        format!("{}/model.onnx", keys::model("r", 1, "other")),
        format!("{}/model.safetensors", keys::start("r", "other")),
        format!("{}/model.safetensors", keys::start("never", "n")),
        "coordinator/check/0123".to_owned(),
        keys::run_spec("deleted"),
    ];
    let mut planted = lost.to_vec();
    for key in &lost {
        put(&*store, key, "x").await;
    }
    for key in [keys::tombstone(&dead), keys::run_tombstone("deleted")] {
        put(&*store, &key, tombstone.clone()).await;
        planted.push(key);
    }
    planted.sort();
    // A manifest that is being made.
    put(&*store, &keys::skips(&id.shard(0), 3, "being-made"), "x").await;
    put(&*store, &keys::gists(&id, 3, "being-made", 1, "00ff"), "x").await;

    let shared = || Arc::clone(&store) as Arc<dyn ObjectStore>;
    assert!(audit::garbage(shared(), Duration::from_secs(3600)).await.expect("works").is_empty(), "all is too young");
    let garbage = audit::garbage(shared(), Duration::ZERO).await.expect("works");
    assert_eq!(garbage.iter().map(|garbage| garbage.key.clone()).collect::<Vec<_>>(), planted);
    audit::remove(shared(), garbage).await.expect("works");
    let mut after = objects(&*store).await;
    after.retain(|key| !key.contains("being-made"));
    assert_eq!(after, before);
    assert_eq!(check(&store, true).await.findings, []);
    assert!(keys_under(&*store, "coordinator/check").await.is_empty());
}
