//! The objects of one dataset, for commands that look into it: through the coordinator, which every user can reach, or,
//! with `--store`, straight from the store, for which no coordinator need run.

use std::collections::{HashMap, HashSet};
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::findings::Finding;
use proto::index::StoredFile;
use proto::manifest::{ManifestShard, Skips};
use proto::outcomes::{OutcomeRow, closed_rows};
use proto::pb::ReadObjectRequest;
use proto::{DatasetId, Manifest, Rejection, ShardIndex, Stored, keys, table};
use tonic::Status;

use crate::client::{Cluster, ClusterArgs, answer, insist};
use crate::complete;
use crate::exit::{Ended, Exit};
use crate::store;

/// A coordinator that sends an object must send something at least so often.
const SILENCE: Duration = Duration::from_secs(30);

/// Shards whose files are read ahead.
const AHEAD: usize = 4;

/// Which dataset, and the way to it.
#[derive(Debug, clap::Args)]
pub(super) struct DatasetArgs {
    /// The dataset's name
    #[arg(add = complete::datasets())]
    pub(super) name: String,
    /// Read straight from the cluster's store (a folder, s3://, gs:// or az://) instead of through the coordinator
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
    #[command(flatten)]
    pub(super) cluster: ClusterArgs,
}

/// What became of one URL.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) shard: u32,
    pub(crate) row: OutcomeRow,
    pub(crate) finding: Option<Finding>,
}

impl Found {
    /// Why it does not count although it was kept.
    pub(crate) fn skipped(&self) -> Option<&String> {
        self.finding.as_ref()?.skipped.as_ref()
    }

    /// The key of the one whose picture it is or looks like.
    pub(crate) fn like(&self) -> Option<i64> {
        self.finding.as_ref()?.like
    }
}

/// Reads the objects of one dataset.
#[derive(Debug, Clone)]
pub(crate) enum Reader {
    Coordinator { cluster: Box<Cluster>, name: String },
    Store { store: Arc<dyn ObjectStore>, dataset: DatasetId },
}

impl Reader {
    pub(super) async fn open(from: &DatasetArgs) -> Result<Self> {
        let name = from.name.clone();
        let Some(location) = &from.store else {
            return Ok(Self::Coordinator { cluster: Box::new(Cluster::new(&from.cluster)?), name });
        };
        let store = store::open(location)?;
        let listed = store.list_with_delimiter(Some(&Path::from(keys::DATASETS))).await;
        let listed = listed.with_context(|| format!("cannot list {location}"))?;
        for folder in listed.common_prefixes {
            let Ok(dataset) = folder.filename().unwrap_or_default().parse::<DatasetId>() else { continue };
            if *dataset != *name && dataset.name() != name {
                continue;
            }
            if store.head(&Path::from(keys::tombstone(&dataset))).await.is_err()
                && store.head(&Path::from(keys::round(&dataset, 1))).await.is_ok()
            {
                return Ok(Self::Store { store, dataset });
            }
        }
        Err(Ended::error(Exit::NotFound, format!("no dataset in {location} is called {name:?}")))
    }

    /// The dataset of that name, through the coordinator.
    pub(crate) fn through(cluster: Cluster, name: &str) -> Self {
        Self::Coordinator { cluster: Box::new(cluster), name: name.to_owned() }
    }

    /// A manifest; version 0 is the latest.
    pub(crate) async fn manifest(&self, version: u32) -> Result<Manifest> {
        let json = match self {
            Self::Coordinator { cluster, name } => {
                insist(async || super::manifest_json(cluster, name, version).await).await?
            }
            Self::Store { store, dataset } => {
                let folder = Path::from(keys::manifests(dataset));
                let listed: Vec<_> = store.list_with_delimiter(Some(&folder)).await?.objects;
                let versions = listed.iter().filter_map(|object| keys::number(object.location.as_ref()).ok());
                let found = match version {
                    0 => versions.max().and_then(|version| u32::try_from(version).ok()),
                    given => versions.into_iter().find(|&there| there == u64::from(given)).map(|_| given),
                };
                let version = found.ok_or_else(|| {
                    let what = if version == 0 { String::new() } else { format!(" of version {version}") };
                    Ended::error(Exit::NotFound, format!("dataset {dataset} has no manifest{what}"))
                })?;
                self.get(&keys::manifest(dataset, version)).await?.to_vec()
            }
        };
        Ok(Manifest::from_json(&json)?)
    }

    /// A whole object.
    pub(super) async fn get(&self, key: &str) -> Result<Bytes> {
        self.read(key, 0..0).await
    }

    /// A part of an object; an empty range stands for all of it.
    pub(super) async fn read(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        match self {
            Self::Coordinator { cluster, name } => {
                let request = ReadObjectRequest {
                    name: name.clone(),
                    key: key.to_owned(),
                    offset: range.start,
                    length: range.end - range.start,
                };
                insist(async || read_object(cluster, request.clone()).await).await.with_context(|| key.to_owned())
            }
            Self::Store { store, .. } => {
                let path = Path::from(key);
                let bytes = match range.is_empty() {
                    true => async { store.get(&path).await?.bytes().await }.await,
                    false => store.get_range(&path, range).await,
                };
                bytes.with_context(|| format!("cannot read {key}"))
            }
        }
    }

    /// An object that a manifest names, whose bytes must be those that it was named with.
    pub(super) async fn file(&self, file: &StoredFile) -> Result<Bytes> {
        let bytes = self.get(&file.key).await?;
        let same = proto::shard::sha256_hex(&bytes) == file.sha256;
        ensure!(same, "{}: its bytes are not those that the manifest names", file.key);
        Ok(bytes)
    }

    /// Which samples of a shard are skipped.
    pub(super) async fn skips(&self, shard: &ManifestShard) -> Result<Skips> {
        Ok(match &shard.skips {
            Some(file) => Skips::from_bytes(&self.file(file).await?),
            None => Skips::default(),
        })
    }

    /// What became of the URLs of a shard; one that the coordinator has closed, or that is damaged, has no file, only
    /// its slice.
    pub(super) async fn rows(&self, manifest: &Manifest, shard: &ManifestShard) -> Result<Vec<OutcomeRow>> {
        let Some(file) = &shard.outcomes else {
            let of = manifest.dataset.shard(shard.shard);
            let key = keys::slice(&of);
            if manifest.is_damaged(shard.shard) {
                let rows = self.get(&key).await.and_then(|slice| Ok(closed_rows(&slice, Err(Rejection::Unfetched))?));
                // Without its slice, too, nobody knows its URLs.
                return Ok(rows.unwrap_or_default());
            }
            let index = ShardIndex::from_json(&self.get(&keys::index(&of)).await?)?;
            let outcome = index.outcomes.iter().next().map_or(Err(Rejection::SliceFailed), |(only, _)| only);
            return closed_rows(&self.get(&key).await?, outcome).with_context(|| key);
        };
        let bytes = self.file(file).await?;
        Ok(tokio::task::spawn_blocking(move || table::read(bytes)).await??)
    }

    /// Hands out each URL once, with its latest outcome and what was found about it, shard by shard, the last round
    /// first.
    pub(crate) async fn each_url(
        &self,
        manifest: &Manifest,
        mut each: impl AsyncFnMut(Found) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let mut shards: Vec<&ManifestShard> = manifest.shards.iter().collect();
        shards.sort_by_key(|shard| (std::cmp::Reverse(shard.round), shard.shard));
        let files = stream::iter(shards).map(async |shard| {
            let found = match &shard.findings {
                Some(file) => table::read::<Finding>(self.file(file).await?)?,
                None => Vec::new(),
            };
            anyhow::Ok((shard, self.rows(manifest, shard).await?, found))
        });
        let mut files = std::pin::pin!(files.buffered(AHEAD));
        // Keys of later rounds, and those of the round that is being read.
        let (mut later, mut current, mut round) = (HashSet::new(), Vec::new(), 0);
        while let Some((shard, rows, found)) = files.try_next().await? {
            if shard.round != round {
                later.extend(current.drain(..));
                round = shard.round;
            }
            let mut found: HashMap<i64, Finding> = found.into_iter().map(|finding| (finding.key, finding)).collect();
            for row in rows {
                if later.contains(&row.key) {
                    continue;
                }
                if round > 1 {
                    current.push(row.key);
                }
                let finding = found.remove(&row.key);
                if each(Found { shard: shard.shard, row, finding }).await?.is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// An object, or a part of it, as the coordinator streams it.
pub(crate) async fn read_object(cluster: &Cluster, request: ReadObjectRequest) -> Result<Bytes, Status> {
    let mut stream = answer(cluster.datasets.clone().read_object(request)).await?;
    let mut bytes = BytesMut::new();
    loop {
        let next = tokio::time::timeout(SILENCE, stream.message()).await;
        match next.map_err(|_| Status::deadline_exceeded("the object stopped half way"))?? {
            Some(chunk) => bytes.extend_from_slice(&chunk.data),
            None => return Ok(bytes.freeze()),
        }
    }
}

/// The kept rows of a shard in the order of its samples.
pub(super) fn samples(mut rows: Vec<OutcomeRow>) -> Vec<OutcomeRow> {
    rows.retain(|row| row.split().is_some());
    rows.sort_by_key(|row| (row.split(), row.offset));
    rows
}
