//! Datasets over real gRPC, with a folder as the store.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::time::Duration;

use common::{Cluster, PATIENCE, get, put, put_shard, shard_id};
use object_store::ObjectStore;
use proto::manifest::{Skip, Skips};
use proto::pb::{self, DatasetState, FailureKind};
use proto::{Split, Stored, keys};
use tonic::Code;

/// Three classes; 5 URLs are gone; one picture stands twice in its class, one in two classes.
fn list() -> String {
    let mut list = String::from("# a list\n");
    for i in 0..120 {
        list += &format!("n{}\thttp://h{i}/picture{i}\n", i % 3);
    }
    list += "n0\thttp://h0/picture0/again\nn0\thttp://h/shared\nn1\thttp://h/shared/again\n";
    for i in 0..5 {
        list += &format!("n1\tgone:{i}\n");
    }
    list + "no tab here\n"
}

async fn listed(store: &dyn ObjectStore, folder: &str) -> Vec<String> {
    use futures::TryStreamExt;
    let found: Vec<_> = store.list(Some(&folder.into())).try_collect().await.expect("lists");
    found.into_iter().map(|meta| meta.location.to_string()).collect()
}

#[tokio::test]
async fn a_list_becomes_a_manifest_that_counts_every_url_and_outlives_the_coordinator() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let created = cluster.create("birds", "request-1", 50, &list()).await.expect("a good list");
    assert_eq!((created.urls, created.shards, created.bad_lines), (128, 3, 1));
    assert_eq!(created.bad_line_examples, ["list:130: no tab between synset and URL"]);
    assert_eq!(cluster.create("birds", "request-1", 50, &list()).await.expect("repeated"), created);
    let other = cluster.create("birds", "request-2", 50, &list()).await.expect_err("the name is taken");
    assert_eq!(other.code(), Code::AlreadyExists);

    cluster.work().await;
    let dataset = cluster.sealed("birds").await;
    assert_eq!(dataset.state(), DatasetState::Ready, "{}", dataset.error);
    assert_eq!(dataset.outcomes, [("kept".to_owned(), 123), ("not_found".to_owned(), 5)].into());
    assert_eq!(dataset.skipped, [("duplicate".to_owned(), 1), ("several_classes".to_owned(), 2)].into());
    assert_eq!(dataset.classes.iter().map(|class| class.urls).collect::<Vec<_>>(), [42, 46, 40]);
    let counted: u64 = dataset.classes.iter().map(|class| class.train + class.validation + class.test).sum();
    assert_eq!(counted, 120);

    let manifest = cluster.manifest("birds").await;
    let (mut kept, mut skipped, mut pixels, mut sum) = (0, 0, 0, 0);
    for shard in &manifest.shards {
        let skips = match &shard.skips {
            Some(file) => Skips::from_bytes(&get(&*cluster.store, &file.key).await),
            None => Skips::default(),
        };
        for (split, tar) in &shard.tars {
            let bytes = get(&*cluster.store, &tar.key).await;
            let mut ordinal = tar.first;
            for block in &tar.blocks {
                let part = bytes.slice(block.offset as usize..(block.offset + block.length) as usize);
                let samples = proto::shard::read_block(&part).expect("a block");
                assert_eq!(samples.len(), block.samples as usize);
                let before = kept;
                for sample in samples {
                    if skips.contains(ordinal) {
                        skipped += 1;
                        let content = String::from_utf8(sample.image.to_vec()).expect("text");
                        assert!(["shared", "picture0"].contains(&content.as_str()), "{content}");
                    } else {
                        kept += 1;
                        if *split == Split::Train {
                            (pixels, sum) = (pixels + 1, sum + sample.key);
                        }
                    }
                    ordinal += 1;
                }
                assert_eq!(kept - before, block.kept);
            }
        }
    }
    assert_eq!((kept, skipped), (120, 3));
    assert!((manifest.mean[0] - sum as f64 / f64::from(pixels) / 255.0).abs() < 1e-12);
    assert_eq!(manifest.skipped[&Skip::Duplicate], 1);
    cluster.stop().await;

    let cluster = Cluster::start(folder.path(), 30.0).await;
    assert_eq!(cluster.dataset("birds").await.expect("recovered"), dataset);
    assert_eq!(cluster.create("birds", "request-1", 50, &list()).await.expect("repeated"), created);
    let deleted = pb::DeleteDatasetRequest { name: "birds".to_owned() };
    cluster.datasets().delete_dataset(deleted).await.expect("exists");
    assert_eq!(cluster.dataset("birds").await.expect_err("deleted").code(), Code::NotFound);
    cluster.create("birds", "request-3", 50, &list()).await.expect("the name is free at once");
    cluster.stop().await;
}

#[tokio::test]
async fn a_sealed_dataset_is_recovered_from_its_manifest_and_not_from_its_indexes() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let created = cluster.create("birds", "request-1", 50, &list()).await.expect("a good list");
    cluster.work().await;
    let sealed = cluster.sealed("birds").await;
    for shard in 0..created.shards {
        put(&*cluster.store, &keys::index(&shard_id(&created.dataset, shard)), "rubbish").await;
    }
    cluster.kill();
    let cluster = Cluster::start(folder.path(), 30.0).await;
    assert_eq!(cluster.dataset("birds").await.expect("recovered"), sealed);
    cluster.stop().await;
}

#[tokio::test]
async fn a_new_coordinator_adopts_leases_that_are_renewed_and_grants_the_rest_after_a_lease_time() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 2.0).await;
    cluster.create("birds", "request-1", 50, &list()).await.expect("a good list");
    let wait = Duration::from_millis(100);
    let (held, dropped) = (cluster.lease(wait).await.expect("one"), cluster.lease(wait).await.expect("two"));
    cluster.kill();

    let cluster = Cluster::start(folder.path(), 2.0).await;
    assert_eq!(cluster.renew(&held).await, 2000, "adopted");
    assert_eq!(cluster.dataset("birds").await.expect("recovered").outcomes["kept"], 1, "progress is live");
    assert_eq!(cluster.lease(wait).await, None, "an unknown worker may still hold the others");
    // The others are free two seconds after the start; the adopted one must be renewed until then.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(cluster.renew(&held).await, 2000);
    let granted = cluster.lease(PATIENCE).await.expect("after a lease time");
    assert_ne!(granted.shard, held.shard);
    assert!(granted.attempt.starts_with("2."), "{}", granted.attempt);
    // The worker of the first term was late, but its index is there first.
    let (late, mine) = if granted.shard == dropped.shard { (dropped, granted) } else { (granted.clone(), granted) };
    put_shard(&*cluster.store, &late).await;
    put_shard(&*cluster.store, &mine).await;
    assert_eq!(cluster.complete(&mine).await, late.attempt);
    assert_eq!(cluster.renew(&held).await, 2000);
    put_shard(&*cluster.store, &held).await;
    cluster.complete(&held).await;
    assert_eq!(cluster.renew(&held).await, 0, "a committed shard's lease is over");
    cluster.work().await;
    let dataset = cluster.sealed("birds").await;
    assert_eq!(dataset.state(), DatasetState::Ready, "{}", dataset.error);
    if late.attempt != mine.attempt {
        let swept = async {
            while listed(&*cluster.store, &format!("datasets/{}/outcomes", late.dataset)).await.len() > 3 {
                tokio::time::sleep(wait).await;
            }
        };
        tokio::time::timeout(PATIENCE, swept).await.expect("what the losing attempt left is removed");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_shard_whose_worker_died_after_its_index_is_not_made_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.5).await;
    cluster.create("birds", "request-1", 1000, &list()).await.expect("a good list");
    let lease = cluster.lease(PATIENCE).await.expect("the only one");
    put_shard(&*cluster.store, &lease).await;
    let dataset = cluster.sealed("birds").await;
    assert_eq!((dataset.state(), dataset.shards_committed), (DatasetState::Ready, 1));
    cluster.stop().await;
}

#[tokio::test]
async fn a_url_that_kills_its_workers_is_found_in_smaller_and_smaller_slices() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.2).await;
    cluster.create("birds", "request-1", 1000, &list()).await.expect("a good list");
    let mut failures = 0;
    let work = async {
        while !cluster.are_sealed().await {
            let worker = format!("w{failures}");
            let Some(lease) = cluster.lease_any_as(&worker, Duration::from_millis(100)).await else { continue };
            let slice = get(&*cluster.store, &proto::keys::slice(&shard_id(&lease.dataset, lease.shard))).await;
            if proto::slice::unpack(&slice).expect("a slice").contains("/picture77\n") {
                failures += 1;
                cluster.release_as(&worker, &lease, FailureKind::Slice, "a decoder died").await;
            } else {
                put_shard(&*cluster.store, &lease).await;
                cluster.complete(&lease).await;
            }
        }
    };
    tokio::time::timeout(PATIENCE * 2, work).await.expect("in time");
    let dataset = cluster.sealed("birds").await;
    assert_eq!(dataset.state(), DatasetState::Ready, "{}", dataset.error);
    let counts = [("kept", 122), ("not_found", 5), ("slice_failed", 1)];
    assert_eq!(dataset.outcomes, counts.map(|(name, n)| (name.to_owned(), n)).into());
    // 1,000, 100, 10 and one.
    assert_eq!((failures, dataset.rounds, dataset.automatic_rounds), (20, 4, 3));
    assert!(dataset.troubles.iter().any(|trouble| trouble.text.contains("a decoder died")), "{:?}", dataset.troubles);
    cluster.stop().await;
}

#[tokio::test]
async fn faults_that_are_not_the_slices_are_said_and_close_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.2).await;
    cluster.create("birds", "request-1", 1000, &list()).await.expect("a good list");
    for n in 0..12 {
        let worker = format!("w{}", n % 4);
        let lease = cluster.lease_as(&worker, PATIENCE).await.expect("given again");
        let kind = [FailureKind::Store, FailureKind::Worker, FailureKind::WayOut][n % 3];
        cluster.release_as(&worker, &lease, kind, "the disk is full").await;
    }
    let dataset = cluster.dataset("birds").await.expect("exists");
    assert_eq!((dataset.state(), dataset.shards_committed), (DatasetState::Fetching, 0));
    assert!(dataset.outcomes.is_empty(), "{:?}", dataset.outcomes);
    let troubles = &dataset.troubles;
    assert_eq!((troubles.len(), troubles.iter().map(|trouble| trouble.count).sum::<u64>()), (12, 12), "{troubles:?}");
    assert!(troubles.iter().all(|trouble| trouble.text == "slice 0: the disk is full"), "{troubles:?}");
    cluster.work().await;
    let dataset = cluster.sealed("birds").await;
    assert_eq!((dataset.outcomes["kept"], dataset.automatic_rounds), (123, 0));
    let left: Vec<&str> = dataset.troubles.iter().map(|trouble| trouble.worker.as_str()).collect();
    assert!(!left.contains(&"w1"), "it has made the shard: {left:?}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_worker_is_told_what_lately_gave_pictures_to_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    cluster.create("birds", "request-1", 50, &list()).await.expect("a good list");
    let lease = cluster.lease(PATIENCE).await.expect("one of three");
    put_shard(&*cluster.store, &lease).await;
    cluster.complete(&lease).await;
    let mine = cluster.lease(PATIENCE).await.expect("one of two");
    let others = cluster.lease_as("w2", PATIENCE).await.expect("the last one");
    assert_eq!((mine.probes.len(), others.probes), (0, vec![format!("http://h{}/good", lease.shard)]));
    cluster.stop().await;
}

#[tokio::test]
async fn a_coordinator_that_hears_of_a_higher_term_refuses_and_ends_once_it_is_in_the_store() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    assert!(cluster.lease(Duration::ZERO).await.is_none(), "its term has begun");
    put(&*cluster.store, &proto::keys::term(2), "{}").await;
    let request = pb::LeaseShardRequest { term_seen: 2, worker: "w1".to_owned(), wait_millis: 0, large: false };
    let refused = cluster.fetch().lease_shard(request).await.expect_err("its term is 1");
    assert_eq!(refused.code(), Code::Unavailable);
    let ended = tokio::time::timeout(PATIENCE, cluster.running).await.expect("in time").expect("no panic");
    assert!(ended.expect_err("fenced").to_string().contains("term 2"));
}

#[tokio::test]
async fn above_a_term_that_the_store_has_lost_a_coordinator_goes_on_with_the_leases_that_it_hears_renewed() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    cluster.create("birds", "request-1", 1000, &list()).await.expect("a good list");
    let lease = cluster.lease(PATIENCE).await.expect("the only one");
    let request = pb::LeaseShardRequest { term_seen: 6, worker: "w2".to_owned(), wait_millis: 0, large: false };
    let asked = async || cluster.fetch().lease_shard(request.clone()).await;
    assert_eq!(asked().await.expect_err("its term is 1").code(), Code::Unavailable);
    let answered = async {
        loop {
            match asked().await {
                Ok(answer) => break answer.into_inner().term,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, answered).await.expect("in time"), 7);
    assert!(cluster.renew(&lease).await > 0, "its shard is still its own");
    cluster.release(&lease, FailureKind::Worker, "told to leave").await;
    assert_eq!(cluster.lease(PATIENCE).await.expect("free again").attempt, "7.2");
    cluster.stop().await;
}

#[tokio::test]
async fn what_an_earlier_coordinator_commits_while_the_next_one_begins_is_found_when_it_is_asked_for_again() {
    let (folder, aside) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let created = cluster.create("birds", "request-1", 1000, &list()).await.expect("a good list");
    cluster.kill();
    let (there, moved) = (folder.path().join(keys::dataset(&shard_id(&created.dataset, 0).dataset)), aside.path());
    std::fs::rename(&there, moved.join("birds")).expect("the same disk");
    let cluster = Cluster::start(folder.path(), 0.5).await;
    assert!(cluster.dataset("birds").await.is_err());
    std::fs::rename(moved.join("birds"), &there).expect("the same disk");
    assert_eq!(cluster.create("birds", "request-1", 1000, &list()).await.expect("committed"), created);
    assert_eq!(
        cluster.create("birds", "request-2", 1000, &list()).await.expect_err("there").code(),
        Code::AlreadyExists
    );
    cluster.work().await;
    assert_eq!(cluster.sealed("birds").await.outcomes["kept"], 123);
    cluster.stop().await;
}

#[tokio::test]
async fn a_caller_of_another_cluster_is_refused_until_it_knows_better() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let own = proto::cluster::OwnCluster::default();
    let channel = proto::cluster::OfCluster::new(cluster.channel.clone(), own.clone());
    let mut fetch = proto::pb::fetch_service_client::FetchServiceClient::new(channel);
    let request = pb::LeaseShardRequest { term_seen: 0, worker: "w1".to_owned(), wait_millis: 0, large: false };
    fetch.lease_shard(request.clone()).await.expect("it does not know its cluster yet");
    own.set("another".to_owned());
    let stranger = pb::LeaseShardRequest { term_seen: 6, ..request.clone() };
    let refused = fetch.lease_shard(stranger).await.expect_err("of another cluster");
    assert!(proto::cluster::is_stranger(&refused) && refused.message().contains("--store"), "{refused}");
    let json = get(&*cluster.store, keys::CLUSTER).await;
    own.set(proto::cluster::ClusterRecord::from_json(&json).expect("the coordinator's").id);
    assert_eq!(
        fetch.lease_shard(request).await.expect("of the same").into_inner().term,
        1,
        "term 6 is no matter of it"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_coordinator_commits_nothing_once_a_higher_term_is_in_the_store() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.5).await;
    assert!(cluster.lease(Duration::ZERO).await.is_none(), "its term has begun");
    put(&*cluster.store, &proto::keys::term(2), "{}").await;
    let refused = cluster.create("birds", "request-1", 50, &list()).await.expect_err("its term is 1");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let keys = listed(&*cluster.store, "datasets").await;
    assert!(!keys.iter().any(|key| key.contains("/catalog/")), "{keys:?}");
}

#[tokio::test]
async fn nothing_exists_after_a_list_that_was_cut_or_is_bad() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.5).await;
    let bad = cluster.create("birds", "request-1", 50, "no tab\n").await.expect_err("no good line");
    assert_eq!(bad.code(), Code::InvalidArgument);
    assert!(bad.message().contains("list:1: no tab"), "{}", bad.message());
    for name in ["Birds", ""] {
        assert_eq!(cluster.create(name, "r", 50, &list()).await.expect_err("bad name").code(), Code::InvalidArgument);
    }
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    use proto::pb::create_dataset_request::{Part, Start};
    let start = Start { request_id: "r".into(), name: "birds".into(), ..Start::default() };
    for part in [Part::Start(start), Part::Data("n1\thttp://h/1\n".into())] {
        sender.send(pb::CreateDatasetRequest { part: Some(part) }).await.expect("open");
    }
    let mut client = cluster.datasets();
    let call =
        tokio::spawn(async move { client.create_dataset(tokio_stream::wrappers::ReceiverStream::new(receiver)).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    call.abort();
    // The name is held until the coordinator has seen the caller go.
    let again = async { cluster.create("birds", "request-2", 50, &list()).await.expect("the name is free") };
    tokio::time::timeout(PATIENCE, again).await.expect("in time");
    assert_eq!(listed(&*cluster.store, "datasets").await.iter().filter(|key| key.ends_with("spec.json")).count(), 1);
    cluster.stop().await;
}

#[tokio::test]
async fn lists_in_the_own_store_are_read_after_the_streamed_ones() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let packed = zstd::encode_all(list().as_bytes(), 1).expect("to memory");
    put(&*cluster.store, "lists/birds.tsv.zst", packed).await;
    use proto::pb::create_dataset_request::{Part, Start};
    let create = |name: &str, key: &str| {
        let start =
            Start { request_id: name.into(), name: name.into(), store_keys: vec![key.into()], ..Start::default() };
        let stream = tokio_stream::iter([pb::CreateDatasetRequest { part: Some(Part::Start(start)) }]);
        let mut client = cluster.datasets();
        async move { client.create_dataset(stream).await }
    };
    assert_eq!(create("birds", "lists/birds.tsv.zst").await.expect("a good list").into_inner().urls, 128);
    for (name, pattern) in [("cats", "lists/"), ("cows", "l?sts/*.tsv.zst")] {
        assert_eq!(create(name, pattern).await.expect("it matches").into_inner().urls, 128);
    }
    let none = create("dogs", "lists/*.gz").await.expect_err("nothing matches");
    assert_eq!(none.code(), Code::InvalidArgument);
    let missing = create("dogs", "lists/dogs").await.expect_err("no such object");
    assert_eq!(missing.code(), Code::InvalidArgument);
    assert!(missing.message().contains("lists/dogs"), "{}", missing.message());
    cluster.stop().await;
}

#[tokio::test]
async fn as_many_slices_of_a_large_site_are_leased_as_its_budget_is_worth_over_all_datasets() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 2.0).await;
    let list = |name: &str| (0..100).map(|i| format!("n{}\thttp://{name}.large.com/{i}\n", i % 3)).collect::<String>();
    cluster.create("birds", "request-1", 50, &(list("a") + "n0\thttp://h/small\n")).await.expect("a good list");
    cluster.create("cats", "request-2", 50, &list("b")).await.expect("a good list");
    let wait = Duration::from_millis(50);
    let mixed = cluster.lease(wait).await.expect("the one of many sites");
    assert_eq!((mixed.shard, cluster.lease(wait).await), (0, None));
    assert_eq!(mixed.budgets.as_ref().and_then(|budgets| budgets.other.as_ref()).map(|other| other.slots), Some(16));
    let mut datasets = Vec::new();
    for _ in 0..4 {
        let lease = cluster.lease_large(PATIENCE).await.expect("a slice of the large site");
        assert_eq!(cluster.lease_large(wait).await, None, "one worker is enough for it");
        put_shard(&*cluster.store, &lease).await;
        cluster.complete(&lease).await;
        datasets.push(lease.dataset);
    }
    datasets.sort();
    datasets.dedup();
    assert_eq!((datasets.len(), cluster.lease_large(wait).await), (2, None));
    cluster.stop().await;
}

#[tokio::test]
async fn workers_share_a_site_between_them_and_a_request_that_was_overtaken_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let ask = async |worker: &str, sequence, held| {
        let site = pb::SiteDemand { site: "a.com".into(), held, wanted: true, ..pb::SiteDemand::default() };
        let request = pb::ShareSitesRequest { term_seen: 0, worker: worker.into(), sequence, sites: vec![site] };
        let answer = cluster.fetch().share_sites(request).await?.into_inner();
        assert!((20_000..=30_000).contains(&answer.duration_millis), "counted from the last look for a later term");
        assert_eq!(answer.sites.len(), 1);
        Ok::<_, tonic::Status>(answer.sites[0])
    };
    let first = ask("w1", 1, 0).await.expect("in order");
    assert_eq!((first.slots, first.site_slots, first.site_requests_per_second), (16, 16, 100.0));
    assert_eq!((first.requests_per_second, first.known, first.delay_millis), (2.0, false, 0));
    assert_eq!(ask("w2", 1, 0).await.expect("in order").slots, 0);
    assert_eq!(ask("w1", 1, 16).await.expect_err("overtaken").code(), Code::Aborted);
    cluster.stop().await;
}

#[tokio::test]
async fn a_round_that_was_not_dealt_by_site_is_finished() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.5).await;
    let created = cluster.create("birds", "request-1", 50, &list()).await.expect("a good list");
    cluster.kill();
    let cluster = Cluster::start(folder.path(), 0.5).await;
    let key = proto::keys::round(&created.dataset.parse().expect("the coordinator's"), 1);
    let round = String::from_utf8(get(&*cluster.store, &key).await.to_vec()).expect("JSON");
    let without = round.replace(r#""large_sites":[],"#, "");
    assert_ne!(round, without, "{round}");
    put(&*cluster.store, &key, without).await;
    cluster.kill();
    let cluster = Cluster::start(folder.path(), 0.5).await;
    cluster.work().await;
    assert_eq!(cluster.sealed("birds").await.state(), DatasetState::Ready);
    cluster.stop().await;
}

#[tokio::test]
async fn a_coordinator_that_ends_when_all_parts_of_sites_had_come_back_leaves_what_it_knew_to_the_next_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let demand = |held, wanted| pb::SiteDemand {
        site: "big.com".to_owned(),
        held,
        wanted,
        requests_per_second: 7.0,
        known: true,
        quiet_millis: 0,
    };
    let share = async |cluster: &Cluster, sequence, demand| {
        let worker = "w1".to_owned();
        let request = pb::ShareSitesRequest { term_seen: 0, worker, sequence, sites: vec![demand] };
        cluster.fetch().share_sites(request).await.expect("a coordinator").into_inner().sites[0]
    };
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let lent = share(&cluster, 1, demand(0, true)).await.slots;
    assert!(lent > 0, "the first one on this store");
    share(&cluster, 2, demand(lent, true)).await;
    share(&cluster, 3, demand(0, false)).await;
    cluster.stop().await;
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let next = share(&cluster, 1, demand(0, true)).await;
    assert_eq!((next.slots, next.requests_per_second, next.known), (lent, 7.0, true));
    cluster.stop().await;
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let next = share(&cluster, 1, demand(0, true)).await;
    assert_eq!((next.slots, next.requests_per_second), (0, 7.0), "a part was out");
    let kept = listed(&*cluster.store, "coordinator/handovers").await;
    assert_eq!(kept, ["coordinator/handovers/000002.json"]);
    cluster.kill();
}
