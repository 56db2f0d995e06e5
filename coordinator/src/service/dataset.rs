//! `DatasetService`: for people.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::{StreamExt, TryStreamExt};
use proto::manifest::Manifest;
use proto::pb::create_dataset_request::{Part, Start};
use proto::pb::dataset_service_server::DatasetService;
use proto::pb::{self, DatasetState};
use proto::{DatasetSpec, Split, keys};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use crate::catalog::{Catalog, Round};
use crate::datasets::{Dataset, Datasets, Stage};
use crate::error::Error;
use crate::ledger::Counts;
use crate::list::ListOptions;

/// A caller that sends nothing for so long has lost its list.
const IDLE: Duration = Duration::from_secs(600);

/// Slices that are uploaded at the same time.
const UPLOADS: usize = 8;

/// Bytes of a manifest in one message.
const CHUNK: usize = 1 << 20;

/// Between two messages to one watcher.
const WATCH_PERIOD: Duration = Duration::from_secs(1);

/// How often a watcher's dataset is looked at.
const WATCH_LOOK: Duration = Duration::from_millis(100);

/// See `dataset.proto`.
pub(crate) struct DatasetApi(pub(crate) Arc<Datasets>);

#[tonic::async_trait]
impl DatasetService for DatasetApi {
    async fn create_dataset(
        &self,
        request: Request<Streaming<pb::CreateDatasetRequest>>,
    ) -> Result<Response<pb::CreateDatasetResponse>, Status> {
        Ok(Response::new(create(&self.0, request.into_inner()).await?))
    }

    async fn get_dataset(&self, request: Request<pb::GetDatasetRequest>) -> Result<Response<pb::Dataset>, Status> {
        let (dataset, counts) = self.0.find(&request.into_inner().name)?;
        Ok(Response::new(message(&dataset, counts)))
    }

    async fn list_datasets(
        &self,
        _: Request<pb::ListDatasetsRequest>,
    ) -> Result<Response<pb::ListDatasetsResponse>, Status> {
        let datasets = self.0.all().iter().map(|(dataset, counts)| message(dataset, *counts)).collect();
        Ok(Response::new(pb::ListDatasetsResponse { datasets }))
    }

    type WatchDatasetStream = ReceiverStream<Result<pb::Dataset, Status>>;

    async fn watch_dataset(
        &self,
        request: Request<pb::GetDatasetRequest>,
    ) -> Result<Response<Self::WatchDatasetStream>, Status> {
        let (dataset, _) = self.0.find(&request.into_inner().name)?;
        let (sender, receiver) = mpsc::channel(1);
        let datasets = Arc::clone(&self.0);
        tokio::spawn(async move { watch(&datasets, &dataset.id, &sender).await });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type GetManifestStream = futures::stream::Iter<std::vec::IntoIter<Result<pb::ManifestChunk, Status>>>;

    async fn get_manifest(
        &self,
        request: Request<pb::GetManifestRequest>,
    ) -> Result<Response<Self::GetManifestStream>, Status> {
        let pb::GetManifestRequest { name, version } = request.into_inner();
        let (dataset, _) = self.0.find(&name)?;
        let version = match (&dataset.stage, version) {
            (Stage::Ready(manifest), 0) => manifest.version,
            (_, 0) => return Err(Error::NotFound(format!("dataset {name:?} has no manifest yet")).into()),
            (_, given) => given,
        };
        let json = self.0.store.get(&keys::manifest(&dataset.id, version)).await.map_err(Error::from)?;
        let json =
            json.ok_or_else(|| Error::NotFound(format!("dataset {name:?} has no manifest of version {version}")))?;
        let pieces: Vec<_> =
            json.chunks(CHUNK).map(|piece| Ok(pb::ManifestChunk { json: json.slice_ref(piece) })).collect();
        Ok(Response::new(futures::stream::iter(pieces)))
    }

    async fn delete_dataset(
        &self,
        request: Request<pb::DeleteDatasetRequest>,
    ) -> Result<Response<pb::DeleteDatasetResponse>, Status> {
        self.0.delete(&request.into_inner().name).await?;
        Ok(Response::new(pb::DeleteDatasetResponse {}))
    }
}

/// What the caller streams, on its way to the thread that parses it.
enum Piece {
    Source(String),
    Data(Bytes),
    /// Without this, the stream was cut and nothing counts.
    End,
}

async fn create(
    datasets: &Arc<Datasets>,
    mut stream: Streaming<pb::CreateDatasetRequest>,
) -> Result<pb::CreateDatasetResponse, Error> {
    let Some(Part::Start(start)) = next(&mut stream).await? else {
        return Err(Error::Invalid("the first message must be `start`".to_owned()));
    };
    if start.request_id.is_empty() {
        return Err(Error::Invalid("start.request_id is empty".to_owned()));
    }
    if !keys::is_name(&start.name) || start.name.len() > 54 {
        let rule = "1 to 54 of a-z 0-9 - . , beginning and ending with a letter or digit";
        return Err(Error::Invalid(format!("name = {:?}: must be {rule}", start.name)));
    }
    let spec = DatasetSpec::from_json(if start.spec_json.is_empty() { "{}" } else { &start.spec_json })?;
    let name = datasets.lock_name(&start.name).await;
    if let Some(dataset) = datasets.by_request(&start.request_id) {
        return Ok(response(&dataset.id, &dataset.rounds[0]));
    }
    if datasets.find(&start.name).is_ok() {
        return Err(Error::Exists(format!("a dataset is called {:?} already", start.name)));
    }
    let id = format!("{}-{}", start.name, &crate::store::nonce()[..8]);

    let (pieces, received) = mpsc::channel(32);
    let (slices, cut) = mpsc::channel(UPLOADS);
    let parse = tokio::task::spawn_blocking({
        let (folder, start) = (datasets.folder.clone(), start.clone());
        move || parse(spec, folder, &start, Pieces::new(received), &slices)
    });
    let pump = pump(datasets, &start, stream, pieces);
    let upload = ReceiverStream::new(cut)
        .map(|(number, bytes)| {
            let (key, store) = (keys::slice(&id, number), &datasets.store);
            async move { store.put(&key, bytes).await }
        })
        .buffer_unordered(UPLOADS)
        .try_collect::<()>();
    let (pumped, uploaded, parsed) = tokio::join!(pump, upload, parse);
    // Of several errors the first cause: the upload's ends the parsing, a bad list ends the pumping.
    let made = match (uploaded, parsed) {
        (Err(error), _) => Err(error.into()),
        (Ok(()), Err(error)) => Err(Error::Local(error.to_string())),
        (Ok(()), Ok(Err(Error::Aborted(what)))) => Err(pumped.err().unwrap_or(Error::Aborted(what))),
        (Ok(()), Ok(parsed)) => parsed,
    };
    let datasets = Arc::clone(datasets);
    // A caller that goes away must not cut this in the middle.
    let tail = tokio::spawn(async move {
        let _name = name;
        let committed = match made {
            Ok((spec, round)) => datasets.commit(&id, spec, round.clone()).await.map(|()| round),
            Err(error) => Err(error),
        };
        committed.map(|round| response(&id, &round)).inspect_err(|_| {
            tokio::spawn(async move {
                if let Err(error) = datasets.remove_unborn(&id).await {
                    warn!(dataset = id, %error, "cannot remove slices of a list that failed");
                }
            });
        })
    });
    tail.await.map_err(|error| Error::Local(error.to_string()))?
}

async fn next(stream: &mut Streaming<pb::CreateDatasetRequest>) -> Result<Option<Part>, Error> {
    let message = tokio::time::timeout(IDLE, stream.message()).await;
    let message = message.map_err(|_| Error::Aborted("nothing was sent for ten minutes".to_owned()))?;
    let message = message.map_err(|status| Error::Aborted(status.message().to_owned()))?;
    message
        .map(|message| message.part.ok_or_else(|| Error::Invalid("a message without any part".to_owned())))
        .transpose()
}

/// Hands the caller's stream, then the lists in the own store, to the parser.
async fn pump(
    datasets: &Datasets,
    start: &Start,
    mut stream: Streaming<pb::CreateDatasetRequest>,
    pieces: mpsc::Sender<Piece>,
) -> Result<(), Error> {
    // The parser has ended, and says why.
    let over = |_| Error::Aborted("the list was not read to its end".to_owned());
    while let Some(part) = next(&mut stream).await? {
        let piece = match part {
            Part::Start(_) => return Err(Error::Invalid("a second `start`".to_owned())),
            Part::Source(source) => Piece::Source(source.name),
            Part::Data(data) => Piece::Data(data),
        };
        pieces.send(piece).await.map_err(over)?;
    }
    for key in &start.store_keys {
        let Some(mut bytes) = datasets.store.stream(key).await? else {
            return Err(Error::Invalid(format!("store_keys: there is no object {key:?}")));
        };
        pieces.send(Piece::Source(key.clone())).await.map_err(over)?;
        while let Some(data) = bytes.next().await {
            let data = data.map_err(|error| Error::Aborted(format!("{key}: {error}")))?;
            pieces.send(Piece::Data(data)).await.map_err(over)?;
        }
    }
    pieces.send(Piece::End).await.map_err(over)
}

fn parse(
    spec: DatasetSpec,
    folder: Option<std::path::PathBuf>,
    start: &Start,
    mut pieces: Pieces,
    slices: &mpsc::Sender<(u32, Bytes)>,
) -> Result<(DatasetSpec, Round), Error> {
    let options = ListOptions {
        format: start.format(),
        synset_column: start.synset_column.clone(),
        url_column: start.url_column.clone(),
    };
    let mut catalog = Catalog::new(&spec, folder);
    while let Some(name) = pieces.next_source()? {
        catalog.read(&name, &mut pieces, &options)?;
    }
    catalog.cut(spec, &start.request_id, slices)
}

/// The pieces as one reader per source.
struct Pieces {
    received: mpsc::Receiver<Piece>,
    data: Bytes,
    /// What stands behind the current source.
    ahead: Option<Piece>,
}

impl Pieces {
    fn new(received: mpsc::Receiver<Piece>) -> Self {
        Self { received, data: Bytes::new(), ahead: None }
    }

    fn receive(&mut self) -> io::Result<Piece> {
        let gone = || io::Error::new(io::ErrorKind::ConnectionAborted, "the caller has gone away");
        self.received.blocking_recv().ok_or_else(gone)
    }

    /// Passes over what is left of the current source, to the next; None at the end of the last.
    fn next_source(&mut self) -> Result<Option<String>, Error> {
        io::copy(self, &mut io::sink()).map_err(|error| Error::Aborted(error.to_string()))?;
        Ok(match self.ahead.take() {
            Some(Piece::Source(name)) => Some(name),
            _ => None,
        })
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.data.is_empty() {
            if self.ahead.is_some() {
                return Ok(0);
            }
            match self.receive()? {
                Piece::Data(data) => self.data = data,
                end => self.ahead = Some(end),
            }
        }
        let n = buffer.len().min(self.data.len());
        self.data.copy_to_slice(&mut buffer[..n]);
        Ok(n)
    }
}

fn response(id: &str, round: &Round) -> pb::CreateDatasetResponse {
    pb::CreateDatasetResponse {
        dataset: id.to_owned(),
        urls: round.urls,
        not_chosen: round.not_chosen,
        bad_lines: round.bad_lines,
        bad_line_examples: round.bad_line_examples.clone(),
        shards: round.slices.len() as u32,
    }
}

async fn watch(datasets: &Datasets, id: &str, sender: &mpsc::Sender<Result<pb::Dataset, Status>>) {
    let mut sent: Option<(u64, tokio::time::Instant)> = None;
    loop {
        let revision = datasets.revision(id);
        let due = sent.is_none_or(|(last, at)| revision != Some(last) && at.elapsed() >= WATCH_PERIOD);
        let found = datasets.find(id);
        let over = !matches!(&found, Ok((dataset, _)) if matches!(dataset.stage, Stage::Fetching | Stage::Sealing));
        if due || over {
            let (revision, told) = match found {
                Ok((dataset, counts)) => (dataset.revision, Ok(message(&dataset, counts))),
                Err(_) => (0, Err(Error::NotFound(format!("dataset {id} has been deleted")).into())),
            };
            if sender.send(told).await.is_err() || over {
                return;
            }
            sent = Some((revision, tokio::time::Instant::now()));
        }
        tokio::select! {
            () = sender.closed() => return,
            () = tokio::time::sleep(WATCH_LOOK) => {}
        }
    }
}

fn message(dataset: &Dataset, counts: Counts) -> pb::Dataset {
    let shards: u32 = dataset.rounds.iter().map(|round| round.slices.len() as u32).sum();
    let (state, error, manifest) = match &dataset.stage {
        Stage::Fetching => (DatasetState::Fetching, "", None),
        Stage::Sealing => (DatasetState::Sealing, "", None),
        Stage::Ready(manifest) => (DatasetState::Ready, "", Some(manifest)),
        Stage::Failed(error) => (DatasetState::Failed, error.as_str(), None),
    };
    let mean_and_std = |of: fn(&Manifest) -> [f64; 3]| manifest.map_or_else(Vec::new, |m| of(m).to_vec());
    pb::Dataset {
        name: dataset.name.clone(),
        dataset: dataset.id.to_string(),
        state: state.into(),
        error: error.to_owned(),
        spec_json: dataset.spec_json.clone(),
        urls: dataset.urls(),
        shards,
        shards_committed: shards - counts.waiting - counts.leased,
        shards_leased: counts.leased,
        outcomes: dataset.outcomes_so_far().into_iter().collect(),
        manifest_version: manifest.map_or(0, |manifest| manifest.version),
        classes: match manifest {
            Some(manifest) => manifest.classes.iter().map(sealed_class).collect(),
            None => unsealed_classes(dataset),
        },
        skipped: manifest.map_or_else(HashMap::new, |manifest| {
            manifest.skipped.iter().map(|(reason, samples)| (reason.name().to_owned(), *samples)).collect()
        }),
        mean: mean_and_std(|manifest| manifest.mean),
        std: mean_and_std(|manifest| manifest.std),
    }
}

fn sealed_class(class: &proto::manifest::ManifestClass) -> pb::ClassCount {
    let samples = |split| class.samples.get(&split).copied().unwrap_or(0);
    pb::ClassCount {
        synset: class.synset.clone(),
        name: class.name.clone(),
        urls: class.urls,
        train: samples(Split::Train),
        validation: samples(Split::Validation),
        test: samples(Split::Test),
    }
}

fn unsealed_classes(dataset: &Dataset) -> Vec<pb::ClassCount> {
    let urls = dataset.urls_per_class();
    let class = |class: &proto::Class| pb::ClassCount {
        synset: class.synset.clone(),
        name: class.name.clone(),
        urls: urls.get(&class.synset).copied().unwrap_or(0),
        ..pb::ClassCount::default()
    };
    dataset.spec.classes.iter().map(class).collect()
}
