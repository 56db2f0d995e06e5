//! `DatasetService`: for people.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::GetRange;
use proto::control::{Decision, Priority};
use proto::manifest::{DamagedShard, Manifest};
use proto::pb::control_dataset_request;
use proto::pb::dataset_service_server::DatasetService;
use proto::pb::{self, DatasetState};
use proto::{DatasetId, Rejection, Split, keys};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::fetch::millis;
use super::upload;
use crate::datasets::control::Wanted;
use crate::datasets::{Dataset, Datasets, Revision, Stage};
use crate::error::Error;
use crate::ledger::Counts;
use crate::runs::Runs;

/// Bytes of an object in one message.
const CHUNK: usize = 1 << 20;

/// Between two messages to one watcher.
const WATCH_PERIOD: Duration = Duration::from_secs(1);

/// Between two questions whether a watcher's dataset has changed.
const WATCH_POLL: Duration = Duration::from_millis(100);

/// See `dataset.proto`.
pub(crate) struct DatasetApi(pub(crate) Arc<Datasets>, pub(crate) Arc<Runs>);

#[tonic::async_trait]
impl DatasetService for DatasetApi {
    async fn create_dataset(
        &self,
        request: Request<Streaming<pb::CreateDatasetRequest>>,
    ) -> Result<Response<pb::CreateDatasetResponse>, Status> {
        Ok(Response::new(upload::create(&self.0, request.into_inner()).await?))
    }

    async fn refresh_dataset(
        &self,
        request: Request<Streaming<pb::CreateDatasetRequest>>,
    ) -> Result<Response<pb::CreateDatasetResponse>, Status> {
        Ok(Response::new(upload::refresh(&self.0, request.into_inner()).await?))
    }

    async fn get_dataset(&self, request: Request<pb::GetDatasetRequest>) -> Result<Response<pb::Dataset>, Status> {
        let (dataset, counts) = self.0.find(&request.into_inner().name)?;
        Ok(Response::new(message(&self.0, &dataset, counts)))
    }

    async fn list_datasets(
        &self,
        _: Request<pb::ListDatasetsRequest>,
    ) -> Result<Response<pb::ListDatasetsResponse>, Status> {
        let datasets = {
            let message = |(dataset, counts): &(Dataset, Counts)| message(&self.0, dataset, *counts);
            self.0.all().iter().map(message).collect()
        };
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

    type GetManifestStream = BoxStream<'static, Result<pb::ManifestChunk, Status>>;

    async fn get_manifest(
        &self,
        request: Request<pb::GetManifestRequest>,
    ) -> Result<Response<Self::GetManifestStream>, Status> {
        let pb::GetManifestRequest { name, version } = request.into_inner();
        let (dataset, _) = self.0.find(&name)?;
        let version = match (&dataset.manifest, version) {
            (Some(manifest), 0) => manifest.version,
            (None, 0) => return Err(Error::NotFound(format!("dataset {name:?} has no manifest yet")).into()),
            (_, given) => given,
        };
        // As it comes from the store, and no faster than the caller takes it: a manifest can be large, and callers
        // many.
        let json = self.0.store.stream(&keys::manifest(&dataset.id, version), None).await.map_err(Error::from)?;
        let json =
            json.ok_or_else(|| Error::NotFound(format!("dataset {name:?} has no manifest of version {version}")))?;
        Ok(Response::new(pieces(json).map_ok(|json| pb::ManifestChunk { json }).boxed()))
    }

    type ReadObjectStream = BoxStream<'static, Result<pb::ObjectChunk, Status>>;

    async fn read_object(
        &self,
        request: Request<pb::ReadObjectRequest>,
    ) -> Result<Response<Self::ReadObjectStream>, Status> {
        let pb::ReadObjectRequest { name, key, offset, length } = request.into_inner();
        let (dataset, _) = self.0.find(&name)?;
        let inside = key.strip_prefix(&keys::dataset(&dataset.id)).is_some_and(|rest| rest.starts_with('/'));
        if !inside || key.split('/').any(|part| part == ".." || part.is_empty()) {
            return Err(Error::Invalid(format!("key = {key:?}: must be an object of dataset {name:?}")).into());
        }
        let range = match (offset, length) {
            (0, 0) => None,
            (_, 0) => Some(GetRange::Offset(offset)),
            _ => Some(GetRange::Bounded(offset..offset.saturating_add(length))),
        };
        let found = self.0.store.stream(&key, range).await.map_err(Error::from)?;
        let found = found.ok_or_else(|| Error::NotFound(format!("there is no object {key:?}")))?;
        Ok(Response::new(pieces(found).map_ok(|data| pb::ObjectChunk { data }).boxed()))
    }

    async fn control_dataset(
        &self,
        request: Request<pb::ControlDatasetRequest>,
    ) -> Result<Response<pb::Dataset>, Status> {
        let pb::ControlDatasetRequest { name, decision } = request.into_inner();
        self.0.control(&name, wanted(decision)?).await?;
        let (dataset, counts) = self.0.find(&name)?;
        Ok(Response::new(message(&self.0, &dataset, counts)))
    }

    async fn delete_dataset(
        &self,
        request: Request<pb::DeleteDatasetRequest>,
    ) -> Result<Response<pb::DeleteDatasetResponse>, Status> {
        self.1.delete_dataset(&request.into_inner().name).await?;
        Ok(Response::new(pb::DeleteDatasetResponse {}))
    }
}

fn wanted(decision: Option<control_dataset_request::Decision>) -> Result<Wanted, Error> {
    use control_dataset_request::Decision as Asked;
    let priority = |number| match pb::Priority::try_from(number) {
        Ok(pb::Priority::Low) => Ok(Priority::Low),
        Ok(pb::Priority::Normal) => Ok(Priority::Normal),
        Ok(pb::Priority::High) => Ok(Priority::High),
        _ => Err(Error::Invalid("priority: must be low, normal or high".to_owned())),
    };
    Ok(match decision.ok_or_else(|| Error::Invalid("decision: there is none".to_owned()))? {
        Asked::Pause(_) => Wanted::Decision(Decision::Pause),
        Asked::Resume(_) => Wanted::Decision(Decision::Resume),
        Asked::Finish(finish) => Wanted::FinishAfter(Duration::from_millis(finish.after_millis)),
        Asked::Priority(number) => Wanted::Decision(Decision::Priority(priority(number)?)),
    })
}

/// An object's bytes in pieces that fit into messages: a store's own may be larger.
fn pieces<E: std::fmt::Display>(
    object: impl Stream<Item = Result<Bytes, E>>,
) -> impl Stream<Item = Result<Bytes, Status>> {
    let pieces = object.map_err(|error| Status::unavailable(error.to_string())).map_ok(|bytes| {
        let pieces =
            (0..bytes.len()).step_by(CHUNK).map(move |from| Ok(bytes.slice(from..bytes.len().min(from + CHUNK))));
        futures::stream::iter(pieces)
    });
    pieces.try_flatten()
}

async fn watch(datasets: &Datasets, id: &DatasetId, sender: &mpsc::Sender<Result<pb::Dataset, Status>>) {
    let mut sent: Option<(Revision, tokio::time::Instant)> = None;
    loop {
        let revision = datasets.revision(id);
        let due = sent.is_none_or(|(last, at)| revision != Some(last) && at.elapsed() >= WATCH_PERIOD);
        // A dataset is large: it is copied only to be sent.
        if due || revision.is_none_or(|revision| revision.is_final) {
            let Ok((dataset, counts)) = datasets.find(id) else {
                let _ = sender.send(Err(Error::NotFound(format!("dataset {id} has been deleted")).into())).await;
                return;
            };
            let revision = dataset.revision();
            if sender.send(Ok(message(datasets, &dataset, counts))).await.is_err() || revision.is_final {
                return;
            }
            sent = Some((revision, tokio::time::Instant::now()));
        }
        tokio::select! {
            () = sender.closed() => return,
            () = tokio::time::sleep(WATCH_POLL) => {}
        }
    }
}

fn message(datasets: &Datasets, dataset: &Dataset, counts: Counts) -> pb::Dataset {
    let shards: u32 = dataset.rounds.iter().map(|round| round.slices.len() as u32).sum();
    let (state, error) = match &dataset.stage {
        Stage::Fetching => (DatasetState::Fetching, ""),
        Stage::Sealing => (DatasetState::Sealing, ""),
        Stage::Ready => (DatasetState::Ready, ""),
        Stage::Failed(error) => (DatasetState::Failed, error.as_str()),
    };
    let manifest = dataset.manifest.as_ref();
    let mean_and_std = |of: fn(&Manifest) -> [f64; 3]| manifest.map_or_else(Vec::new, |m| of(m).to_vec());
    pb::Dataset {
        name: dataset.id.name().to_owned(),
        dataset: dataset.id.to_string(),
        state: state.into(),
        error: error.to_owned(),
        spec_json: dataset.spec_json.clone(),
        urls: dataset.urls(),
        shards,
        shards_committed: shards - counts.waiting - counts.leased,
        shards_leased: counts.leased,
        outcomes: (&dataset.outcomes_so_far()).into(),
        manifest_version: manifest.map_or(0, |manifest| manifest.version),
        classes: match manifest {
            Some(manifest) => {
                manifest.classes.iter().map(|class| sealed_class(class, dataset.spec.per_class)).collect()
            }
            None => unsealed_classes(dataset),
        },
        skipped: manifest.map_or_else(HashMap::new, |manifest| {
            manifest.skipped.iter().map(|(reason, samples)| (reason.name().to_owned(), *samples)).collect()
        }),
        mean: mean_and_std(|manifest| manifest.mean),
        std: mean_and_std(|manifest| manifest.std),
        rounds: dataset.rounds.len() as u32,
        near_duplicates: manifest.map_or(0, |manifest| manifest.near_duplicates),
        troubles: datasets.troubles(Some(&dataset.id)),
        automatic_rounds: dataset.automatic_rounds(),
        damaged: dataset.damaged().map(damaged_shard).collect(),
        large_sites: datasets.large_sites(dataset),
        paused: dataset.controls.paused,
        priority: match dataset.controls.priority {
            Priority::Low => pb::Priority::Low,
            Priority::Normal => pb::Priority::Normal,
            Priority::High => pb::Priority::High,
        }
        .into(),
        finishes_after_millis: dataset
            .finishes_after()
            .filter(|_| matches!(dataset.stage, Stage::Fetching))
            .map(millis),
    }
}

fn damaged_shard(DamagedShard { shard, key, what }: &DamagedShard) -> pb::DamagedShard {
    pb::DamagedShard { shard: *shard, key: key.clone(), what: what.clone() }
}

fn sealed_class(class: &proto::manifest::ManifestClass, per_class: u32) -> pb::ClassCount {
    let unfetched = class.outcomes.of(Err(Rejection::ClassFull));
    let samples = |split| class.samples.get(&split).copied().unwrap_or(0);
    pb::ClassCount {
        synset: class.synset.clone(),
        name: class.name.clone(),
        urls: class.urls,
        train: samples(Split::Train),
        validation: samples(Split::Validation),
        test: samples(Split::Test),
        short: if unfetched == 0 { u64::from(per_class).saturating_sub(class.total()) } else { 0 },
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
