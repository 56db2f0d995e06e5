//! A store that breaks the coordinator's own code, or hangs, over real gRPC: what that touches says so, and everything
//! else goes on.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Cluster, PATIENCE};
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};
use proto::pb::DatasetState;
use proto::pb::dataset_service_server::DatasetServiceServer;
use tonic::server::NamedService;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

#[derive(Debug, Clone, Copy)]
enum How {
    Panics,
    Hangs,
    Fails,
}

/// A store in memory that does not do what it should where the operation and its key have all words of a rule.
#[derive(Debug, Default)]
struct Broken {
    inner: InMemory,
    rules: Mutex<Vec<(Vec<String>, How)>>,
}

impl Broken {
    fn set(&self, rules: &[(&[&str], How)]) {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        *self.rules.lock().expect("no panic under it") = rules.iter().map(|(of, how)| (words(of), *how)).collect();
    }

    fn rule(&self, operation: &str, key: &str) -> Option<How> {
        let rules = self.rules.lock().expect("no panic under it");
        let fits = |words: &Vec<String>| words.iter().all(|word| operation == word || key.contains(word.as_str()));
        rules.iter().find(|(words, _)| fits(words)).map(|(_, how)| *how)
    }

    async fn pass(&self, operation: &str, key: &str) -> object_store::Result<()> {
        match self.rule(operation, key) {
            Some(How::Panics) => panic!("{operation} {key} is odd"),
            Some(How::Hangs) => std::future::pending().await,
            Some(How::Fails) => Err(object_store::Error::Generic { store: "Broken", source: "out of order".into() }),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Broken")
    }
}

#[tonic::async_trait]
impl ObjectStore for Broken {
    async fn put_opts(&self, at: &Path, payload: PutPayload, how: PutOptions) -> object_store::Result<PutResult> {
        self.pass("put", at.as_ref()).await?;
        self.inner.put_opts(at, payload, how).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        how: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, how).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.pass("get", at.as_ref()).await?;
        self.inner.get_opts(at, options).await
    }

    fn delete_stream(
        &self,
        at: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(at)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let folder = prefix.map_or("", Path::as_ref);
        match self.rule("list", folder) {
            Some(How::Panics) => panic!("list {folder} is odd"),
            Some(How::Hangs) => futures::stream::pending().boxed(),
            Some(How::Fails) => {
                let error = object_store::Error::Generic { store: "Broken", source: "out of order".into() };
                futures::stream::once(std::future::ready(Err(error))).boxed()
            }
            None => self.inner.list(prefix),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.pass("list", prefix.map_or("", Path::as_ref)).await?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Pictures, and one whose server says nothing.
fn list(name: &str) -> String {
    let pictures = (0..40).map(|i| format!("n{}\thttp://h{name}{i}/{name}{i}\n", i % 2));
    pictures.chain([format!("n0\thttp://late/{name}\n")]).collect()
}

#[tokio::test]
async fn a_coordinator_one_of_whose_tasks_panics_ends_with_an_error_that_names_the_task() {
    let store = Arc::new(Broken::default());
    let cluster = Cluster::start_on(store.clone(), 0.5).await;
    cluster.create("birds", "request-1", 100, &list("b")).await.expect("a good list");
    let lease = cluster.lease(PATIENCE).await.expect("a slice");
    store.set(&[(&["get", &lease.dataset, "/index/"], How::Panics)]);
    let ended = tokio::time::timeout(PATIENCE, cluster.running).await.expect("once the lease is over");
    let error = format!("{:#}", ended.expect("`run` itself does not panic").expect_err("the task has ended"));
    assert!(error.contains("the task that ends leases") && error.contains("is odd"), "{error}");
}

#[tokio::test]
async fn a_dataset_whose_sealing_panics_fails_with_the_words_and_others_are_sealed() {
    let store = Arc::new(Broken::default());
    let cluster = Cluster::start_on(store.clone(), 30.0).await;
    // In the task itself; in the thread that seals; in the one that looks for what may come back.
    for (n, operation, place) in [("a", "list", "/manifests"), ("b", "put", "/gists/"), ("c", "list", "/outcomes")] {
        let made = cluster.create(&format!("birds-{n}"), &format!("request-{n}"), 100, &list(n)).await;
        let made = made.expect("a good list");
        store.set(&[(&[operation, place, &made.dataset], How::Panics)]);
        cluster.create(&format!("cats-{n}"), &format!("request-cats-{n}"), 100, &list(n)).await.expect("a good list");
        cluster.work().await;
        let failed = cluster.sealed(&format!("birds-{n}")).await;
        assert_eq!(failed.state(), DatasetState::Failed, "{place}");
        assert!(failed.error.contains("panicked") && failed.error.contains("is odd"), "{}", failed.error);
        let other = cluster.sealed(&format!("cats-{n}")).await;
        assert_eq!((other.state(), other.outcomes["kept"]), (DatasetState::Ready, 40), "{place}");
        // Once the program is mended, or what it stumbles over is gone, somebody asks again.
        store.set(&[]);
        cluster.refresh(&format!("birds-{n}"), &format!("request-{n}-2"), None).await.expect("it has failed");
        cluster.work().await;
        assert_eq!(cluster.sealed(&format!("birds-{n}")).await.state(), DatasetState::Ready, "{place}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_store_that_hangs_at_one_shard_keeps_no_other_lease_from_its_end() {
    let store = Arc::new(Broken::default());
    let cluster = Cluster::start_on(store.clone(), 0.5).await;
    cluster.create("birds", "request-1", 100, &list("b")).await.expect("a good list");
    let stuck = cluster.lease_as("w1", PATIENCE).await.expect("a slice");
    store.set(&[(&["get", &stuck.dataset, "/index/"], How::Hangs)]);
    // So late that the first one is being looked at.
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.create("cats", "request-2", 100, &list("c")).await.expect("a good list");
    let lost = cluster.lease_as("w2", PATIENCE).await.expect("a slice");
    let again = cluster.lease_as("w3", Duration::from_secs(10)).await.expect("its lease is over, and it is free");
    assert_eq!((&again.dataset, again.shard), (&lost.dataset, lost.shard));
    assert_ne!(again.attempt, lost.attempt);
    cluster.stop().await;
}

#[tokio::test]
async fn a_coordinator_whose_store_does_not_answer_is_not_ready_until_it_does() {
    let store = Arc::new(Broken::default());
    let cluster = Cluster::start_on(store.clone(), 0.5).await;
    let until = async |wanted: ServingStatus| {
        let mut health = HealthClient::new(cluster.channel.clone());
        let service = <DatasetServiceServer<()> as NamedService>::NAME.to_owned();
        let watch = async {
            let mut all = health.watch(HealthCheckRequest { service }).await.expect("is known").into_inner();
            while all.message().await.expect("watches").expect("goes on").status() != wanted {}
        };
        tokio::time::timeout(PATIENCE, watch).await.expect("in time");
    };
    until(ServingStatus::Serving).await;
    store.set(&[(&["list", "coordinator/terms"], How::Fails)]);
    until(ServingStatus::NotServing).await;
    store.set(&[]);
    until(ServingStatus::Serving).await;
    cluster.stop().await;
}
