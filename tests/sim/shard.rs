//! What a simulated worker puts into the store: real tars, real outcomes, a real index.

use std::collections::BTreeMap;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use proto::index::{ClassCounts, StoredFile, Tar};
use proto::outcomes::OutcomeRow;
use proto::rejection::outcome_name;
use proto::shard::{Moments, Origin, TarWriter, sha256_hex};
use proto::{
    Attempt, DatasetSpec, Outcome, OutcomeCounts, Rejection, Sample, ShardId, ShardIndex, Split, Stored, keys, table,
};
use sha2::{Digest, Sha256};

use super::store::View;

/// A line of a slice.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) key: u64,
    pub(super) synset: String,
    pub(super) url: String,
}

/// One URL's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    pub(super) outcome: Outcome,
    pub(super) status: Option<i32>,
}

impl From<Rejection> for End {
    fn from(rejection: Rejection) -> Self {
        Self { outcome: Err(rejection), status: None }
    }
}

/// An operation, tried until it succeeds. None: the process is dead.
async fn insist<T, F: Future<Output = object_store::Result<T>>>(view: &View, work: impl Fn() -> F) -> Option<T> {
    loop {
        match work().await {
            Ok(done) => return Some(done),
            Err(_) if view.is_dead() => return None,
            Err(_) => {}
        }
    }
}

pub(super) async fn read(view: &View, key: &str) -> Option<Bytes> {
    let key = Path::from(key);
    insist(view, || async { view.get(&key).await?.bytes().await }).await
}

/// Uploads all that the index names, and returns it.
pub(super) async fn upload(
    view: &View,
    spec: &DatasetSpec,
    (of, attempt, writer): (&ShardId, Attempt, &str),
    ended: &[(Entry, End)],
) -> Option<ShardIndex> {
    let put = |key: String, bytes: Bytes| async move {
        let path = Path::from(key);
        insist(view, || async { view.put(&path, bytes.clone().into()).await.map(drop) }).await
    };
    let mut tars: BTreeMap<Split, (TarWriter, ClassCounts, Moments)> = BTreeMap::new();
    let (mut rows, mut outcomes) = (Vec::new(), OutcomeCounts::default());
    for (entry, end) in ended {
        let mut row = OutcomeRow {
            key: entry.key as i64,
            synset: entry.synset.clone(),
            url: entry.url.clone(),
            outcome: outcome_name(end.outcome).to_owned(),
            http_status: end.status,
            ..OutcomeRow::default()
        };
        if end.outcome.is_ok() {
            let sha: [u8; 32] = Sha256::digest(&entry.url).into();
            let label = spec.classes.iter().position(|class| class.synset == entry.synset).expect("a class") as u32;
            let split = spec.splits.split_of(&sha);
            let (writer, classes, moments) = tars.entry(split).or_default();
            let sample = Sample { key: entry.key, label, image: Bytes::copy_from_slice(entry.url.as_bytes()) };
            let origin = Origin {
                synset: entry.synset.clone(),
                url: entry.url.clone(),
                sha256: hex::encode(sha),
                width: 1,
                height: 1,
                columns: String::new(),
            };
            let (offset, length) = writer.append(&sample, &origin);
            classes.add(label);
            let one = Moments { pixels: 1, sum: [entry.key; 3], sum_of_squares: [entry.key.pow(2); 3] };
            moments.add(&one);
            row.set_moments(&one);
            row.sha256 = Some(hex::encode(sha));
            row.split = Some(split.name().to_owned());
            row.tar = Some(keys::tar(of, split, attempt));
            (row.offset, row.length) = (Some(offset as i64), Some(length as i64));
        }
        outcomes.add(end.outcome, 1);
        rows.push(row);
    }
    let mut index = ShardIndex {
        version: 1,
        nonce: format!("{attempt}-{writer}"),
        writer: writer.to_owned(),
        shard: of.shard,
        attempt,
        outcomes,
        tars: BTreeMap::new(),
        outcomes_file: None,
    };
    for (split, (mut writer, per_class, moments)) in tars {
        let mut bytes = writer.take().to_vec();
        let (rest, length, sha256, blocks) = writer.finish();
        bytes.extend_from_slice(&rest);
        let (key, samples) = (keys::tar(of, split, attempt), per_class.total());
        put(key.clone(), bytes.into()).await?;
        index.tars.insert(split, Tar { key, bytes: length, sha256, samples, per_class, blocks, moments });
    }
    let (file, key) = (table::write(&rows).expect("rows"), keys::outcomes(of, attempt));
    index.outcomes_file = Some(StoredFile { key: key.clone(), bytes: file.len() as u64, sha256: sha256_hex(&file) });
    put(key, file.into()).await?;
    Some(index)
}

/// Puts the index if there is none, and returns the one that stands there.
pub(super) async fn commit(view: &View, of: &ShardId, index: &ShardIndex) -> Option<ShardIndex> {
    let path = Path::from(keys::index(of));
    loop {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        if view.put_opts(&path, index.to_json().into(), options).await.is_ok() {
            return Some(index.clone());
        }
        if view.is_dead() {
            return None;
        }
        if let Ok(found) = view.get(&path).await
            && let Ok(found) = found.bytes().await
        {
            return Some(ShardIndex::from_json(&found).expect("an index"));
        }
    }
}
