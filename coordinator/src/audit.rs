//! What in a store does not add up ([`check`]), and what nobody needs any more ([`garbage`], [`remove`]). Both read the
//! store alone, whether or not a cluster works on it: what is listed may have gone and what is missing may have come by
//! the time that it is looked at, so each finding is looked at twice.
//!
//! `dataset`, `shard`, `gists` and `run` check one of what their names say; `garbage` finds what can be removed.

mod dataset;
mod garbage;
mod gists;
mod run;
mod shard;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectMeta, ObjectStore};
use proto::cluster::ClusterRecord;
use proto::index::StoredFile;
use proto::shard::sha256_hex;
use proto::term::TermRecord;
use proto::{DatasetId, Stored, keys};
use serde::Serialize;

pub use self::garbage::{Garbage, garbage, remove};
use crate::damage;
use crate::store::{Store, StoreError};

/// Objects that are looked at at the same time.
const PARALLEL: usize = 16;

/// Something that does not add up.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// The object's key.
    pub key: String,
    /// What is wrong with it.
    pub what: String,
}

/// What a check has found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// The id of the store's cluster.
    pub cluster: String,
    /// Coordinators' terms that have begun.
    pub terms: u64,
    /// Datasets that were checked.
    pub datasets: u64,
    /// Committed shards of them.
    pub shards: u64,
    /// Runs that were checked.
    pub runs: u64,
    /// All objects of the cluster.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// In the order of their keys.
    pub findings: Vec<Finding>,
    /// Damaged objects that the latest manifest of their dataset leaves out.
    pub left_out: Vec<Finding>,
}

/// Why a store cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// No coordinator has ever used it.
    #[error("{0} is no cluster's store: it has neither cluster.json nor coordinator/terms")]
    NoCluster(String),
    /// It does not answer, or refuses a request.
    #[error("{0}")]
    Store(String),
}

impl From<StoreError> for AuditError {
    fn from(error: StoreError) -> Self {
        Self::Store(error.to_string())
    }
}

/// Checks every object of a cluster against what names it. `deep`: tars are read, too.
///
/// # Errors
/// If the store is no cluster's, or cannot be read.
pub async fn check(store: Arc<dyn ObjectStore>, deep: bool) -> Result<Report, AuditError> {
    let audit = Audit { deep, ..Audit::read(Store::new(store)).await? };
    let mut report = Report {
        objects: audit.listing.0.len() as u64,
        bytes: audit.listing.0.values().map(|object| object.size).sum(),
        ..Report::default()
    };
    let cluster = |json: Bytes| ClusterRecord::from_json(&json).map_err(|error| error.to_string());
    if audit.listing.has(keys::CLUSTER) {
        report.cluster = audit.object(keys::CLUSTER, cluster).await?.map(|cluster| cluster.id).unwrap_or_default();
    }
    report.terms = audit.check_terms().await?;
    for folder in audit.listing.folders(keys::DATASETS) {
        match folder.parse::<DatasetId>() {
            Ok(id) => {
                if let Some(shards) = audit.check_dataset(&id).await? {
                    report.datasets += 1;
                    report.shards += shards;
                }
            }
            Err(error) => audit.found(&format!("{}/{folder}", keys::DATASETS), error.to_string()),
        }
    }
    for folder in audit.listing.folders(keys::RUNS) {
        report.runs += u64::from(audit.check_run(&folder).await?);
    }
    let found = audit.found.into_inner().unwrap_or_else(PoisonError::into_inner);
    (report.findings, report.left_out) = (found.findings.into_iter().collect(), found.left_out.into_iter().collect());
    Ok(report)
}

/// What all checks share.
struct Audit {
    store: Store,
    deep: bool,
    listing: Listing,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    findings: BTreeSet<Finding>,
    left_out: BTreeSet<Finding>,
}

impl Audit {
    /// With a listing of the cluster's objects.
    async fn read(store: Store) -> Result<Self, AuditError> {
        let mut listing = BTreeMap::new();
        let folders = ["coordinator", keys::DATASETS, keys::RUNS];
        for folder in folders {
            let there = store.objects(folder).await?;
            listing.extend(there.into_iter().map(|object| (object.location.to_string(), object)));
        }
        if let Some(object) = store.head(keys::CLUSTER).await? {
            listing.insert(keys::CLUSTER.to_owned(), object);
        }
        let listing = Listing(listing);
        if !listing.has(keys::CLUSTER) && listing.under(keys::TERMS).next().is_none() {
            return Err(AuditError::NoCluster(store.name()));
        }
        Ok(Self { store, deep: false, listing, found: Mutex::default() })
    }

    fn found(&self, key: &str, what: impl Into<String>) {
        let finding = Finding { key: key.to_owned(), what: what.into() };
        self.found.lock().unwrap_or_else(PoisonError::into_inner).findings.insert(finding);
    }

    /// Findings about objects of which `is_left_out` says so are no news.
    fn leave_out(&self, is_left_out: impl Fn(&str) -> bool) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let all = std::mem::take(&mut found.findings);
        let (known, news): (Vec<_>, Vec<_>) = all.into_iter().partition(|finding| is_left_out(&finding.key));
        found.left_out.extend(known);
        found.findings.extend(news);
    }

    /// Whether anything under a folder does not add up.
    fn has_found(&self, folder: &str) -> bool {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.findings.iter().any(|finding| finding.key.starts_with(&format!("{folder}/")))
    }

    /// Forgets all findings under a folder: it has changed meanwhile.
    fn forget(&self, folder: &str) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.findings.retain(|finding| !finding.key.starts_with(&format!("{folder}/")));
    }

    /// Reads an object that must be there; if it is not what it must be, that is a finding.
    async fn object<T>(&self, key: &str, parse: impl Fn(Bytes) -> Result<T, String>) -> Result<Option<T>, StoreError> {
        let read = damage::read(&self.store, key, parse).await?;
        Ok(read.map_err(|what| self.found(key, what)).ok())
    }

    /// Reads a file that another object names.
    async fn file<T>(
        &self,
        file: &StoredFile,
        parse: impl Fn(Bytes) -> Result<T, String>,
    ) -> Result<Option<T>, StoreError> {
        self.object(&file.key, |bytes| {
            if (bytes.len() as u64, sha256_hex(&bytes)) != (file.bytes, file.sha256.clone()) {
                return Err("its bytes are not those that it was named with".to_owned());
            }
            parse(bytes)
        })
        .await
    }

    /// The length of an object, which may have come since the listing.
    async fn length(&self, key: &str) -> Result<Option<u64>, StoreError> {
        match self.listing.0.get(key) {
            Some(object) => Ok(Some(object.size)),
            None => Ok(self.store.head(key).await?.map(|object| object.size)),
        }
    }

    async fn check_terms(&self) -> Result<u64, StoreError> {
        let terms: Vec<&str> = self.listing.under(keys::TERMS).map(|(key, _)| key).collect();
        let check = async |key: &str| {
            let number = keys::number(key).ok();
            self.object(key, |json| {
                let record = TermRecord::from_json(&json).map_err(|error| error.to_string())?;
                same("it is the record of term", record.term, number)
            })
            .await
            .map(drop)
        };
        futures::stream::iter(&terms).map(|key| check(key)).buffer_unordered(PARALLEL).try_collect::<()>().await?;
        Ok(terms.len() as u64)
    }
}

/// The cluster's objects by key, as they were when the audit began.
struct Listing(BTreeMap<String, ObjectMeta>);

impl Listing {
    fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// The objects under a folder, at any depth.
    fn under(&self, folder: &str) -> impl Iterator<Item = (&str, &ObjectMeta)> {
        let folder = format!("{folder}/");
        let from = self.0.range(folder.clone()..);
        from.take_while(move |(key, _)| key.starts_with(&folder)).map(|(key, object)| (key.as_str(), object))
    }

    fn keys(&self, folder: &str) -> Vec<String> {
        self.under(folder).map(|(key, _)| key.to_owned()).collect()
    }

    /// Names of a folder's folders.
    fn folders(&self, folder: &str) -> BTreeSet<String> {
        let inner = |key: &str| Some(key.get(folder.len() + 1..)?.split_once('/')?.0.to_owned());
        self.under(folder).filter_map(|(key, _)| inner(key)).collect()
    }
}

/// Whether an object is the one that its key says.
fn same<T: PartialEq + std::fmt::Display>(what: &str, found: T, wanted: Option<T>) -> Result<(), String> {
    match wanted.as_ref() == Some(&found) {
        true => Ok(()),
        false => Err(format!("{what} {found}")),
    }
}
