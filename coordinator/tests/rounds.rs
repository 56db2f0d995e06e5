//! Later rounds of a dataset: refreshes, classes that want more, and what looks alike, over real gRPC.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{Cluster, PATIENCE, get, put, put_shard_as, shard_id};
use proto::findings::Finding;
use proto::manifest::Skip;
use proto::pb::{self, DatasetState, FailureKind};
use proto::{DatasetSpec, Split, keys, table};
use tonic::Code;

fn counts(pairs: &[(&str, u64)]) -> std::collections::HashMap<String, u64> {
    pairs.iter().map(|&(name, n)| (name.to_owned(), n)).collect()
}

/// 30 pictures, 3 whose server says nothing at first, 5 that are gone.
fn list() -> String {
    let pictures = (0..30).map(|i| format!("n{}\thttp://h{i}/{i}\n", i % 2));
    let late = (0..3).map(|i| format!("n0\thttp://late/slow{i}\n"));
    pictures.chain(late).chain((0..5).map(|i| format!("n1\tgone:{i}\n"))).collect()
}

async fn slice(cluster: &Cluster, dataset: &str, shard: u32) -> Vec<String> {
    let bytes = get(&*cluster.store, &keys::slice(&shard_id(dataset, shard))).await;
    let text = String::from_utf8(zstd::decode_all(&bytes[..]).expect("zstd")).expect("UTF-8");
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[tokio::test]
async fn a_refresh_fetches_what_may_come_back_and_what_is_new_and_outlives_a_killed_coordinator() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 0.5).await;
    let created = cluster.create("birds", "request-1", 1000, &list()).await.expect("a good list");
    let early = cluster.refresh("birds", "request-2", None).await.expect_err("it is being fetched");
    assert_eq!(early.code(), Code::FailedPrecondition);
    cluster.work().await;
    let first = cluster.sealed("birds").await;
    assert_eq!(first.outcomes, counts(&[("kept", 30), ("timeout", 3), ("not_found", 5)]));
    assert_eq!((first.rounds, first.automatic_rounds, first.manifest_version), (2, 1, 1), "each had a second try");
    assert_eq!(slice(&cluster, &created.dataset, 1).await.len(), 3);
    // What a coordinator that died in the middle of a refresh has left.
    put(&*cluster.store, &keys::slice(&shard_id(&created.dataset, 2)), "rubbish").await;

    let more = "n0\thttp://h/new\nn0\thttp://h0/0\nn9\thttp://h/new\nn1\thttp://h/new-too\n";
    let refreshed = cluster.refresh("birds", "request-2", Some(more)).await.expect("it is ready");
    assert_eq!((refreshed.round, refreshed.urls, refreshed.known, refreshed.not_chosen), (3, 5, 1, 1));
    assert_eq!(refreshed.retried, counts(&[("timeout", 3)]));
    assert_eq!(cluster.refresh("birds", "request-2", Some(more)).await.expect("repeated"), refreshed);
    let second = slice(&cluster, &created.dataset, 3).await;
    let round_one = slice(&cluster, &created.dataset, 0).await;
    assert_eq!(second.iter().filter(|line| round_one.contains(line)).count(), 3, "under their own keys: {second:?}");
    let mut new: Vec<&str> = second.iter().filter(|line| line.contains("/new")).map(|line| &line[..3]).collect();
    new.sort_unstable();
    assert_eq!(new, ["38\t", "40\t"]);
    let between = cluster.dataset("birds").await.expect("exists");
    assert_eq!((between.state(), between.manifest_version, between.urls), (DatasetState::Fetching, 1, 40));
    assert_eq!(between.outcomes, counts(&[("kept", 30), ("not_found", 5)]), "five wait");
    cluster.kill();

    let cluster = Cluster::start(folder.path(), 0.5).await;
    assert_eq!(cluster.refresh("birds", "request-2", Some(more)).await.expect("repeated"), refreshed);
    cluster.work().await;
    let last = cluster.sealed("birds").await;
    assert_eq!((last.state(), last.manifest_version, last.rounds), (DatasetState::Ready, 2, 3), "{}", last.error);
    assert_eq!(last.outcomes, counts(&[("kept", 35), ("not_found", 5)]));
    let (one, two) = (cluster.manifest_version("birds", 1).await, cluster.manifest("birds").await);
    assert_eq!((one.rounds, two.rounds, two.version), (2, 3, 2));
    assert_eq!(two.outcomes.by_name(), BTreeMap::from([("kept", 35), ("not_found", 5)]));
    let of_class = |class: usize, outcome: &str| two.classes[class].outcomes.by_name().get(outcome).copied();
    assert_eq!((of_class(0, "kept"), of_class(1, "not_found"), of_class(0, "timeout")), (Some(19), Some(5), None));
    assert_eq!(Split::ALL.map(|split| two.samples(split)).iter().sum::<u64>(), 35);
    let nothing = cluster.refresh("birds", "request-3", None).await.expect("nothing is left");
    assert_eq!((nothing.round, nothing.urls), (0, 0));
    let swept = async {
        use object_store::ObjectStoreExt;
        while cluster.store.head(&keys::slice(&shard_id(&created.dataset, 2)).into()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, swept).await.expect("slices of no round are removed");
    cluster.stop().await;
}

#[tokio::test]
async fn what_is_dead_in_several_refreshes_is_asked_less_and_less_often_and_all_at_once_on_request() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut cluster = Cluster::start(folder.path(), 0.5).await;
    let silent = (0..40).map(|i| format!("n0\thttp://silent/{i}\n"));
    let list: String = (0..10).map(|i| format!("n0\thttp://h{i}/{i}\n")).chain(silent).collect();
    let dataset = cluster.create("birds", "request-0", 1000, &list).await.expect("a good list").dataset;
    cluster.work().await;
    // A part is asked by each refresh: what it asks, and what it leaves for later.
    let mut asked: Vec<Vec<String>> = Vec::new();
    for refresh in 1..=7 {
        if refresh == 4 {
            cluster.kill();
            cluster = Cluster::start(folder.path(), 0.5).await;
        }
        cluster.sealed("birds").await;
        let request = format!("request-{refresh}");
        let opened = cluster.refresh("birds", &request, None).await.expect("it is ready");
        assert_eq!(opened.retried.values().sum::<u64>() + opened.left_for_later, 40, "refresh {refresh}");
        cluster.work().await;
        let lines = slice(&cluster, &dataset, opened.round - 1).await;
        assert_eq!(lines.len() as u64, opened.urls);
        asked.push(lines);
    }
    let apart = |refreshes: std::ops::RangeInclusive<usize>| {
        let mut all = asked[refreshes.start() - 1..*refreshes.end()].concat();
        let total = all.len();
        all.sort();
        all.dedup();
        (total, all.len())
    };
    assert_eq!(apart(1..=1), (40, 40), "the first one asks all");
    assert_eq!(apart(2..=3), (40, 40), "each once in two");
    assert_eq!(apart(4..=7), (40, 40), "and each once in four, over a restart");
    assert!(asked[1..].iter().all(|lines| !lines.is_empty() && lines.len() < 40), "{asked:?}");

    cluster.sealed("birds").await;
    let all = cluster.refresh_all("birds", "request-8").await.expect("it is ready");
    assert_eq!((all.retried, all.left_for_later), (counts(&[("timeout", 40)]), 0));
    cluster.work().await;
    let described = cluster.sealed("birds").await;
    assert_eq!((described.rounds, described.automatic_rounds), (10, 1), "what has failed twice is in no automatic one");
    cluster.stop().await;
}

#[tokio::test]
async fn a_class_keeps_so_many_and_opens_what_it_left_when_duplicates_make_it_short() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    // n0 has enough, but among the first that are fetched are many copies; n1 has too few.
    let copies = (0..60).map(|i| format!("n0\thttp://h{i}/copy/{i}\n"));
    let pictures = (0..20).map(|i| format!("n0\thttp://h{i}/{i}\n"));
    let few = (0..6).map(|i| format!("n1\thttp://h{i}/few{i}\n"));
    let list: String = copies.chain(pictures).chain(few).collect();
    let duplicates = proto::Duplicates { many_urls: 100, near_bits: 4 };
    let spec = DatasetSpec { slice_urls: 11, per_class: 10, duplicates, ..DatasetSpec::default() };
    cluster.create_with("birds", "request-1", &spec, &list).await.expect("a good list");
    cluster.work().await;
    let dataset = cluster.sealed("birds").await;
    assert_eq!(dataset.state(), DatasetState::Ready, "{}", dataset.error);
    let counted: Vec<u64> = dataset.classes.iter().map(|class| class.train + class.validation + class.test).collect();
    let short: Vec<u64> = dataset.classes.iter().map(|class| class.short).collect();
    assert_eq!((counted, short), (vec![10, 6], vec![0, 4]));
    assert!(dataset.rounds > 1, "the first round had copies among its eleven");
    assert!(dataset.outcomes["class_full"] > 0, "not all was fetched: {:?}", dataset.outcomes);
    assert_eq!(dataset.outcomes.values().sum::<u64>(), 86, "every URL has one outcome");
    cluster.stop().await;
}

#[tokio::test]
async fn pictures_that_look_alike_are_told_and_never_stand_in_train_and_test_both() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    // 60 pictures, of which some test and some train, that all look nearly the same; 20 that look like nothing else.
    let alike = (0..60u64).map(|i| format!("n0\thttp://h{i}/a{i}~{:016x}\n", 0xabcd_0000_0000_0000 | (i % 4)));
    let alone =
        (0..20u64).map(|i| format!("n0\thttp://h{i}/b{i}~{:016x}\n", (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let spec = DatasetSpec {
        splits: proto::Splits { validation: 0.2, test: 0.2, ..proto::Splits::default() },
        slice_urls: 25,
        ..DatasetSpec::default()
    };
    let list: String = alike.chain(alone).collect();
    cluster.create_with("birds", "request-1", &spec, &list).await.expect("a good list");
    cluster.work().await;
    let dataset = cluster.sealed("birds").await;
    let manifest = cluster.manifest("birds").await;
    let skipped = manifest.skipped[&Skip::NearTraining];
    assert!(skipped > 5, "{:?}", manifest.skipped);
    assert_eq!(dataset.skipped, counts(&[("near_training", skipped)]));
    assert_eq!(manifest.near_duplicates, dataset.near_duplicates);
    let mut told = Vec::new();
    for shard in &manifest.shards {
        let file = shard.findings.as_ref().expect("each shard has some that are alike");
        told.extend(table::read::<Finding>(get(&*cluster.store, &file.key).await).expect("Parquet"));
    }
    assert_eq!(told.len() as u64, skipped + manifest.near_duplicates);
    assert_eq!(told.len(), 59, "all that look alike but the first that trains");
    assert!(told.iter().all(|finding| finding.like != Some(finding.key) && finding.bits <= Some(4)));
    cluster.stop().await;
}

#[tokio::test]
async fn objects_of_a_dataset_are_read_through_the_coordinator_and_no_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let created = cluster.create("birds", "request-1", 1000, &list()).await.expect("a good list");
    let read = |key: String, offset, length| {
        let mut client = cluster.datasets();
        async move {
            let request = pb::ReadObjectRequest { name: "birds".to_owned(), key, offset, length };
            let mut stream = client.read_object(request).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(chunk) = stream.message().await? {
                bytes.extend_from_slice(&chunk.data);
            }
            Ok::<_, tonic::Status>(bytes)
        }
    };
    let key = keys::dataset_spec(&shard_id(&created.dataset, 0).dataset);
    let whole = get(&*cluster.store, &key).await;
    assert_eq!(read(key.clone(), 0, 0).await.expect("exists"), whole);
    assert_eq!(read(key.clone(), 3, 7).await.expect("exists"), whole[3..10]);
    let missing = keys::index(&shard_id(&created.dataset, 0));
    assert_eq!(read(missing, 0, 0).await.expect_err("not yet").code(), Code::NotFound);
    for other in
        [keys::term(1), format!("datasets/{}/../x", created.dataset), format!("datasets/{}x/y", created.dataset)]
    {
        assert_eq!(read(other.clone(), 0, 0).await.expect_err(&other).code(), Code::InvalidArgument, "{other}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_worker_that_keeps_far_less_than_another_is_told_with_both_yields_while_the_round_lasts() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let list: String =
        (0..1600).map(|i| format!("n0\thttp://{}{i}/{i}\n", if i % 4 == 0 { "g" } else { "h" })).collect();
    cluster.create("birds", "request-1", 100, &list).await.expect("a good list");
    let make = async |worker: &str, slices: u32| {
        for _ in 0..slices {
            let lease = cluster.lease_as(worker, PATIENCE).await.expect("one of sixteen");
            put_shard_as(worker, &*cluster.store, &lease).await;
            cluster.complete(&lease).await;
        }
        cluster.dataset("birds").await.expect("exists").troubles
    };
    assert_eq!(make("w1", 4).await, []);
    assert_eq!(make("deaf", 2).await, [], "that may be chance");
    let troubles = make("deaf", 2).await;
    let told: Vec<_> = troubles.iter().map(|trouble| (&*trouble.worker, trouble.kind(), trouble.count)).collect();
    assert_eq!(told, [("deaf", FailureKind::WayOut, 1)]);
    assert!(troubles[0].text.contains("deaf lately kept 0.0 %") && troubles[0].text.contains("name servers"));
    assert_eq!(make("w1", 2).await.len(), 1, "what another one does changes nothing");
    // The next round begins with what the deaf one has left.
    cluster.work().await;
    let dataset = cluster.sealed("birds").await;
    assert_eq!((dataset.outcomes["kept"], dataset.automatic_rounds), (1200, 1));
    cluster.stop().await;
}
