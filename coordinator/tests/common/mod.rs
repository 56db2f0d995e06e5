//! A coordinator over loopback with a folder as its store, and a worker written by hand.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use proto::index::{ClassCounts, StoredFile, Tar};
use proto::outcomes::OutcomeRow;
use proto::pb::create_dataset_request::{Part, Source, Start};
use proto::pb::dataset_service_client::DatasetServiceClient;
use proto::pb::fetch_service_client::FetchServiceClient;
use proto::pb::{self, DatasetState, FailureKind};
use proto::rejection::KEPT;
use proto::shard::{Moments, Origin, TarWriter, sha256_hex};
use proto::{
    Attempt, DatasetId, DatasetSpec, OutcomeCounts, Rejection, Sample, ShardId, ShardIndex, Split, Stored, keys, table,
};
use sha2::{Digest, Sha256};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// Nothing in these tests takes so long.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running coordinator.
pub struct Cluster {
    pub channel: Channel,
    pub store: Arc<dyn ObjectStore>,
    shutdown: CancellationToken,
    pub running: JoinHandle<anyhow::Result<()>>,
}

impl Cluster {
    /// Starts on what is in the folder.
    pub async fn start(folder: &Path, lease_seconds: f64) -> Self {
        let store = LocalFileSystem::new_with_prefix(folder).expect("the folder exists");
        Self::start_on(Arc::new(store), lease_seconds).await
    }

    /// Starts on a store.
    pub async fn start_on(store: Arc<dyn ObjectStore>, lease_seconds: f64) -> Self {
        Self::start_as(Self::config(lease_seconds), store).await
    }

    /// Settings of a coordinator that is open to everybody.
    pub fn config(lease_seconds: f64) -> coordinator::Config {
        let sites = coordinator::SiteBudgets::default();
        coordinator::Config {
            lease_seconds,
            spool_folder: None,
            largest_list: 1 << 30,
            tokens: None,
            tls_client_names: Vec::new(),
            service_accounts: Vec::new(),
            insecure: false,
            sites,
        }
    }

    /// Starts on a store with settings.
    pub async fn start_as(config: coordinator::Config, store: Arc<dyn ObjectStore>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(coordinator::run(
            config,
            Arc::clone(&store),
            coordinator::Doorway::plain(listener),
            shutdown.clone(),
        ));
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a URL");
        let channel = endpoint.connect().await.expect("the port is bound");
        Self { channel, store, shutdown, running }
    }

    /// Ends it orderly.
    pub async fn stop(self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.running).await.expect("in time");
        ended.expect("no panic").expect("an orderly end");
    }

    /// Ends it as a kill would: no goodbye.
    pub fn kill(self) {
        self.running.abort();
    }

    pub fn datasets(&self) -> DatasetServiceClient<Channel> {
        DatasetServiceClient::new(self.channel.clone())
    }

    pub fn fetch(&self) -> FetchServiceClient<Channel> {
        FetchServiceClient::new(self.channel.clone())
    }

    /// Creates a dataset from a list.
    pub async fn create(
        &self,
        name: &str,
        request_id: &str,
        slice_urls: u32,
        list: &str,
    ) -> Result<pb::CreateDatasetResponse, Status> {
        self.create_with(name, request_id, &DatasetSpec { slice_urls, ..DatasetSpec::default() }, list).await
    }

    /// Likewise, with any spec.
    pub async fn create_with(
        &self,
        name: &str,
        request_id: &str,
        spec: &DatasetSpec,
        list: &str,
    ) -> Result<pb::CreateDatasetResponse, Status> {
        let stream = requests(name, request_id, spec.to_json(), Some(list));
        Ok(without_rows(self.datasets().create_dataset(stream).await?.into_inner()))
    }

    /// Opens another round, perhaps with a list of new URLs.
    pub async fn refresh(
        &self,
        name: &str,
        request_id: &str,
        list: Option<&str>,
    ) -> Result<pb::CreateDatasetResponse, Status> {
        let stream = requests(name, request_id, String::new(), list);
        Ok(without_rows(self.datasets().refresh_dataset(stream).await?.into_inner()))
    }

    /// Likewise, without a list, however much is damaged.
    pub async fn accept_damage(&self, name: &str, request_id: &str) -> Result<pb::CreateDatasetResponse, Status> {
        self.refresh_with(name, Start { request_id: request_id.to_owned(), accept_damage: true, ..Start::default() })
            .await
    }

    /// Likewise, for all that may come back.
    pub async fn refresh_all(&self, name: &str, request_id: &str) -> Result<pb::CreateDatasetResponse, Status> {
        self.refresh_with(name, Start { request_id: request_id.to_owned(), all: true, ..Start::default() }).await
    }

    async fn refresh_with(&self, name: &str, start: Start) -> Result<pb::CreateDatasetResponse, Status> {
        let start = Start { name: name.to_owned(), ..start };
        let stream = tokio_stream::once(pb::CreateDatasetRequest { part: Some(Part::Start(start)) });
        Ok(self.datasets().refresh_dataset(stream).await?.into_inner())
    }

    pub async fn dataset(&self, name: &str) -> Result<pb::Dataset, Status> {
        Ok(self.datasets().get_dataset(pb::GetDatasetRequest { name: name.to_owned() }).await?.into_inner())
    }

    /// Watches until the dataset is ready or failed.
    pub async fn sealed(&self, name: &str) -> pb::Dataset {
        let watch = async {
            let request = pb::GetDatasetRequest { name: name.to_owned() };
            let mut stream = self.datasets().watch_dataset(request).await.expect("exists").into_inner();
            let mut last = None;
            while let Some(dataset) = stream.message().await.expect("watches") {
                last = Some(dataset);
            }
            last.expect("at least one")
        };
        let dataset = tokio::time::timeout(PATIENCE, watch).await.expect("in time");
        assert!(matches!(dataset.state(), DatasetState::Ready | DatasetState::Failed));
        dataset
    }

    pub async fn manifest(&self, name: &str) -> proto::Manifest {
        self.manifest_version(name, 0).await
    }

    pub async fn manifest_version(&self, name: &str, version: u32) -> proto::Manifest {
        let request = pb::GetManifestRequest { name: name.to_owned(), version };
        let mut stream = self.datasets().get_manifest(request).await.expect("exists").into_inner();
        let mut json = Vec::new();
        while let Some(chunk) = stream.message().await.expect("streams") {
            json.extend_from_slice(&chunk.json);
        }
        proto::Manifest::from_json(&json).expect("a manifest")
    }

    /// Waits for a shard of many sites.
    pub async fn lease(&self, wait: Duration) -> Option<pb::Lease> {
        self.lease_as("w1", wait).await
    }

    /// Waits for a shard of one large site alone.
    pub async fn lease_large(&self, wait: Duration) -> Option<pb::Lease> {
        self.ask_lease("w1", true, wait).await
    }

    /// The same for any, as another worker.
    pub async fn lease_any_as(&self, worker: &str, wait: Duration) -> Option<pb::Lease> {
        match self.ask_lease(worker, true, Duration::ZERO).await {
            Some(lease) => Some(lease),
            None => self.lease_as(worker, wait).await,
        }
    }

    /// The same for one of many sites, as another worker.
    pub async fn lease_as(&self, worker: &str, wait: Duration) -> Option<pb::Lease> {
        self.ask_lease(worker, false, wait).await
    }

    async fn ask_lease(&self, worker: &str, large: bool, wait: Duration) -> Option<pb::Lease> {
        let (worker, wait_millis) = (worker.to_owned(), wait.as_millis() as u64);
        let request = pb::LeaseShardRequest { term_seen: 0, worker, wait_millis, large };
        self.fetch().lease_shard(request).await.expect("answers").into_inner().lease
    }

    /// Makes every shard that is there, until no dataset wants more.
    pub async fn work(&self) {
        let work = async {
            loop {
                if let Some(lease) = self.lease_any_as("w1", Duration::from_millis(100)).await {
                    put_shard(&*self.store, &lease).await;
                    self.complete(&lease).await;
                } else if self.are_sealed().await {
                    return;
                }
            }
        };
        tokio::time::timeout(PATIENCE, work).await.expect("in time");
    }

    /// Whether all datasets are ready or failed.
    pub async fn are_sealed(&self) -> bool {
        let all = self.datasets().list_datasets(pb::ListDatasetsRequest {}).await.expect("answers").into_inner();
        all.datasets.iter().all(|dataset| matches!(dataset.state(), DatasetState::Ready | DatasetState::Failed))
    }

    pub async fn complete(&self, lease: &pb::Lease) -> String {
        let request = pb::CompleteShardRequest {
            term_seen: 0,
            worker: "w1".to_owned(),
            dataset: lease.dataset.clone(),
            shard: lease.shard,
            attempt: lease.attempt.clone(),
            good: vec![format!("http://h{}/good", lease.shard)],
        };
        self.fetch().complete_shard(request).await.expect("answers").into_inner().committed
    }

    /// The lease's new duration; 0: it is over.
    pub async fn renew(&self, lease: &pb::Lease) -> u64 {
        self.renew_message(lease).await.duration_millis
    }

    pub async fn renew_message(&self, lease: &pb::Lease) -> pb::RenewLeaseResponse {
        let request = pb::RenewLeaseRequest {
            term_seen: 0,
            worker: "w1".to_owned(),
            dataset: lease.dataset.clone(),
            shard: lease.shard,
            attempt: lease.attempt.clone(),
            outcomes: [("kept".to_owned(), 1)].into(),
            kept: [(0, 1)].into(),
            ..pb::RenewLeaseRequest::default()
        };
        self.fetch().renew_lease(request).await.expect("answers").into_inner()
    }

    pub async fn release(&self, lease: &pb::Lease, kind: FailureKind, text: &str) {
        self.release_as("w1", lease, kind, text).await;
    }

    pub async fn release_as(&self, worker: &str, lease: &pb::Lease, kind: FailureKind, text: &str) {
        let request = pb::ReleaseLeaseRequest {
            term_seen: 0,
            worker: worker.to_owned(),
            dataset: lease.dataset.clone(),
            shard: lease.shard,
            attempt: lease.attempt.clone(),
            failure: Some(pb::Failure { kind: kind.into(), text: text.to_owned() }),
        };
        self.fetch().release_lease(request).await.expect("answers");
    }
}

/// The start, and the list in pieces.
pub fn requests(
    name: &str,
    request_id: &str,
    spec_json: String,
    list: Option<&str>,
) -> impl futures::Stream<Item = pb::CreateDatasetRequest> + Send + 'static {
    let start = Start { request_id: request_id.to_owned(), name: name.to_owned(), spec_json, ..Start::default() };
    let mut parts = vec![Part::Start(start)];
    if let Some(list) = list {
        parts.push(Part::Source(Source { name: "list".to_owned() }));
        parts.extend(list.as_bytes().chunks(100).map(|piece| Part::Data(Bytes::copy_from_slice(piece))));
    }
    tokio_stream::iter(parts.into_iter().map(|part| pb::CreateDatasetRequest { part: Some(part) }))
}

pub async fn keys_under(store: &dyn ObjectStore, folder: &str) -> Vec<String> {
    let listed: Vec<_> = store.list(Some(&Key::from(folder))).try_collect().await.expect("lists");
    listed.into_iter().map(|meta| meta.location.to_string()).collect()
}

pub async fn get(store: &dyn ObjectStore, key: &str) -> Bytes {
    store.get(&Key::from(key)).await.expect(key).bytes().await.expect(key)
}

pub async fn put(store: &dyn ObjectStore, key: &str, bytes: impl Into<Bytes>) {
    store.put(&Key::from(key), bytes.into().into()).await.expect(key);
}

/// What the worker makes of a URL: `http://h.../<content>/...` is an image of that content; `http://late/<content>` is
/// one from shard 2 on, and before that its server says nothing; that of `http://silent/` never does; any other is gone.
fn content(url: &str, shard: u32) -> Result<&str, Rejection> {
    match url.split_once("://").and_then(|(_, rest)| rest.split_once('/')) {
        Some(("late", _)) if shard < 2 => Err(Rejection::Timeout),
        Some(("silent", _)) => Err(Rejection::Timeout),
        Some((host, path)) if host == "late" || host.starts_with('h') => Ok(path.split('/').next().unwrap_or_default()),
        _ => Err(Rejection::NotFound),
    }
}

/// The shard of a message.
pub fn shard_id(dataset: &str, shard: u32) -> ShardId {
    dataset.parse::<DatasetId>().expect("the coordinator's").shard(shard)
}

/// Makes a shard as a worker does: tars, outcomes, then the index.
pub async fn put_shard(store: &dyn ObjectStore, lease: &pb::Lease) {
    put_shard_as("w1", store, lease).await;
}

/// The same as another worker. To one that is called `deaf` nobody answers.
pub async fn put_shard_as(worker: &str, store: &dyn ObjectStore, lease: &pb::Lease) {
    let spec = DatasetSpec::from_json(&lease.spec_json).expect("the coordinator's");
    let attempt: Attempt = lease.attempt.parse().expect("the coordinator's");
    let of = shard_id(&lease.dataset, lease.shard);
    let slice = get(store, &keys::slice(&of)).await;
    let text = String::from_utf8(zstd::decode_all(&slice[..]).expect("zstd")).expect("UTF-8");
    let mut tars: BTreeMap<Split, (TarWriter, ClassCounts, Moments)> = BTreeMap::new();
    let mut wanted = lease.wanted.clone();
    let (mut rows, mut counts) = (Vec::new(), OutcomeCounts::default());
    for line in text.lines() {
        let [key, synset, url] = line.splitn(3, '\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let key: u64 = key.parse().expect("a number");
        let mut row =
            OutcomeRow { key: key as i64, synset: synset.to_owned(), url: url.to_owned(), ..OutcomeRow::default() };
        let label = spec.classes.iter().position(|class| class.synset == synset).expect("a class") as u32;
        let full = wanted.get(&label) == Some(&0);
        let fetched = match worker {
            _ if full => Err(Rejection::ClassFull),
            "deaf" => Err(Rejection::Timeout),
            _ => content(url, lease.shard),
        };
        row.outcome = fetched.map_or_else(Rejection::name, |_| KEPT).to_owned();
        if let Ok(content) = fetched {
            wanted.entry(label).and_modify(|wanted| *wanted -= 1);
            let sha: [u8; 32] = Sha256::digest(content).into();
            let split = spec.splits.split_of(&sha);
            let (writer, per_class, moments) = tars.entry(split).or_default();
            let sample = Sample { key, label, image: Bytes::copy_from_slice(content.as_bytes()) };
            let origin = Origin {
                synset: synset.to_owned(),
                url: url.to_owned(),
                sha256: hex::encode(sha),
                width: 1,
                height: 1,
                columns: String::new(),
            };
            let (offset, length) = writer.append(&sample, &origin);
            per_class.add(label);
            let of_one = Moments { pixels: 1, sum: [key; 3], sum_of_squares: [key * key; 3] };
            moments.add(&of_one);
            row.set_moments(&of_one);
            // `name~0123456789abcdef` looks so.
            row.phash = content.split_once('~').map(|(_, look)| look.to_owned());
            row.sha256 = Some(hex::encode(sha));
            row.split = Some(split.name().to_owned());
            row.tar = Some(keys::tar(&of, split, attempt));
            row.offset = Some(offset as i64);
            row.length = Some(length as i64);
        }
        counts.add(fetched.map(drop), 1);
        rows.push(row);
    }
    let mut index = ShardIndex {
        version: 1,
        nonce: format!("{:032x}", attempt.n),
        writer: worker.to_owned(),
        shard: lease.shard,
        attempt,
        outcomes: counts,
        tars: BTreeMap::new(),
        outcomes_file: None,
    };
    for (split, (mut writer, per_class, moments)) in tars {
        let mut bytes = writer.take().to_vec();
        let (rest, length, sha256, blocks) = writer.finish();
        bytes.extend_from_slice(&rest);
        let key = keys::tar(&of, split, attempt);
        put(store, &key, bytes).await;
        let samples = per_class.total();
        index.tars.insert(split, Tar { key, bytes: length, sha256, samples, per_class, blocks, moments });
    }
    let file = table::write(&rows).expect("encodes");
    let key = keys::outcomes(&of, attempt);
    index.outcomes_file = Some(StoredFile { key: key.clone(), bytes: file.len() as u64, sha256: sha256_hex(&file) });
    put(store, &key, file).await;
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    let key = Key::from(keys::index(&of));
    // Somebody else may have been first; that is the coordinator's to say.
    let _ = store.put_opts(&key, index.to_json().into(), options).await;
}

/// Without what is shown of a list, which a repeated request does not read.
fn without_rows(response: pb::CreateDatasetResponse) -> pb::CreateDatasetResponse {
    pb::CreateDatasetResponse { understood: Vec::new(), preview: Vec::new(), ..response }
}
