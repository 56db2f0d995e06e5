//! Sealing: committed indexes become a manifest. Classes, counts, mean and deviation, and the samples to skip.
//!
//! Duplicates are found by an external sort: a small record of each kept sample goes into the partition that its content's
//! hash chooses, and each partition is sorted alone. What stays in memory is one bit for each skipped sample.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use bytes::Bytes;
use proto::manifest::{Manifest, ManifestBlock, ManifestClass, ManifestShard, ManifestTar, Skip, Skips};
use proto::outcomes::{self, OutcomeRow};
use proto::shard::{Moments, StoredFile, sha256_hex};
use proto::{DatasetSpec, ShardIndex, Split, keys};
use tokio::runtime::Handle;

use crate::spool::Spool;
use crate::store::{Created, Store, StoreError, nonce};

/// The same bytes under more URLs than this are a placeholder which nobody had listed.
const MANY_URLS: usize = 20;

/// Shards whose outcomes are read at the same time.
const PARALLEL: usize = 8;

/// Why there is no manifest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SealError {
    /// Nothing to train on; it would be the same each time.
    #[error("no training image is left: {0}")]
    Empty(String),
    /// What a worker committed is not what it must be; it would be the same each time.
    #[error("{key}: {what}")]
    Corrupt { key: String, what: String },
    /// Worth another try.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// Worth another try.
    #[error("temporary file: {0}")]
    Local(#[from] std::io::Error),
}

/// What is to be sealed.
#[derive(Debug, Clone)]
pub(crate) struct Sealing {
    pub(crate) dataset: String,
    pub(crate) spec: DatasetSpec,
    /// Of the manifest.
    pub(crate) version: u32,
    /// That it covers.
    pub(crate) rounds: u32,
    /// Numbers of all shards of those rounds.
    pub(crate) shards: Vec<u32>,
    pub(crate) urls_per_class: BTreeMap<String, u64>,
    /// For temporary files.
    pub(crate) folder: Option<PathBuf>,
}

/// Makes the manifest and puts it in place; of two coordinators that do so at once, both return the one that stands. Blocks its
/// thread; `handle` does the store's part.
pub(crate) fn seal(handle: &Handle, store: &Store, sealing: &Sealing) -> Result<Manifest, SealError> {
    let Sealing { dataset, spec, version, .. } = sealing;
    let indexes = read_indexes(handle, store, sealing)?;
    let labels: HashMap<&str, u32> =
        spec.classes.iter().zip(0..).map(|(class, label)| (class.synset.as_str(), label)).collect();

    let mut spool = Spool::new(sealing.folder.clone());
    each_shard(handle, store, indexes.values(), |index, file, samples| {
        for (ordinal, row) in (0u32..).zip(samples) {
            let record = Record::of(row, index.shard, ordinal, &labels).map_err(|what| corrupt(file, what))?;
            spool.push(record.sha256[0], &[&record.encode()])?;
        }
        Ok(())
    })?;
    let (skips, skipped) = find_skips(spool)?;

    let mut totals = Totals::new(spec.classes.len());
    let mut skipped_blocks: HashMap<(u32, Split), Vec<u32>> = HashMap::new();
    for index in indexes.values() {
        totals.add(index).map_err(|error| corrupt(&keys::index(dataset, index.shard), error))?;
    }
    // Only shards with skipped samples are read a second time, to take those samples' part away again.
    each_shard(
        handle,
        store,
        indexes.values().filter(|index| skips.contains_key(&index.shard)),
        |index, _, samples| {
            let skip = &skips[&index.shard];
            for (ordinal, row) in (0u32..).zip(samples) {
                if let (true, Some(split), Some(&label)) =
                    (skip.contains(ordinal), row.split(), labels.get(row.synset.as_str()))
                {
                    totals.remove(split, label, &row.moments());
                    let blocks = index.tars.get(&split).map_or(&[][..], |tar| &tar.blocks);
                    let offset = row.offset.unwrap_or(0).max(0) as u64;
                    let at = blocks.partition_point(|block| block.offset <= offset).saturating_sub(1);
                    let counts = skipped_blocks.entry((index.shard, split)).or_insert_with(|| vec![0; blocks.len()]);
                    if let Some(count) = counts.get_mut(at) {
                        *count += 1;
                    }
                }
            }
            Ok(())
        },
    )?;

    if totals.samples.iter().all(|class| class[Split::Train as usize] == 0) {
        let counts: Vec<String> = totals.outcomes.iter().map(|(outcome, urls)| format!("{outcome} {urls}")).collect();
        return Err(SealError::Empty(format!("of the dataset's URLs came {}", counts.join(", "))));
    }
    let (mean, std) = totals.train.mean_and_std();
    let nonce = nonce();
    let mut manifest = Manifest {
        format: 1,
        nonce: nonce.clone(),
        dataset: dataset.clone(),
        version: *version,
        rounds: sealing.rounds,
        resize: spec.resize,
        classes: classes(sealing, &totals),
        outcomes: totals.outcomes,
        skipped,
        mean,
        std,
        shards: Vec::new(),
    };
    for index in indexes.values().filter(|index| index.tars.values().any(|tar| tar.samples > 0)) {
        let skips = match skips.get(&index.shard) {
            None => None,
            Some(skips) => {
                let (key, bytes) =
                    (keys::skips(dataset, *version, index.shard), Bytes::copy_from_slice(skips.as_bytes()));
                let file = StoredFile { key, bytes: bytes.len() as u64, sha256: sha256_hex(&bytes) };
                handle.block_on(store.put(&file.key, bytes))?;
                Some(file)
            }
        };
        let tars = manifest_tars(index, &skipped_blocks);
        manifest.shards.push(ManifestShard { shard: index.shard, skips, tars });
    }
    let key = keys::manifest(dataset, *version);
    match handle.block_on(store.create(&key, manifest.to_json().into(), &nonce))? {
        Created::Won => Ok(manifest),
        Created::Lost(theirs) => Manifest::from_json(&theirs).map_err(|error| corrupt(&key, error)),
    }
}

fn corrupt(key: &str, what: impl std::fmt::Display) -> SealError {
    SealError::Corrupt { key: key.to_owned(), what: what.to_string() }
}

fn read_indexes(handle: &Handle, store: &Store, sealing: &Sealing) -> Result<BTreeMap<u32, ShardIndex>, SealError> {
    let wanted = sealing.shards.iter().map(|&shard| keys::index(&sealing.dataset, shard)).collect();
    let mut indexes = BTreeMap::new();
    for (key, json) in handle.block_on(store.get_all(wanted))? {
        let index = ShardIndex::from_json(&json).map_err(|error| corrupt(&key, error))?;
        indexes.insert(index.shard, index);
    }
    if let Some(&missing) = sealing.shards.iter().find(|shard| !indexes.contains_key(shard)) {
        handle.block_on(store.need(&keys::index(&sealing.dataset, missing)))?;
    }
    Ok(indexes)
}

/// Reads the outcomes of many shards and hands out each one's samples in the order of its bitmap.
fn each_shard<'a>(
    handle: &Handle,
    store: &Store,
    indexes: impl Iterator<Item = &'a ShardIndex>,
    mut each: impl FnMut(&ShardIndex, &str, &[OutcomeRow]) -> Result<(), SealError>,
) -> Result<(), SealError> {
    let with_rows: Vec<(&ShardIndex, &StoredFile)> =
        indexes.filter_map(|index| Some((index, index.outcomes_file.as_ref()?))).collect();
    for group in with_rows.chunks(PARALLEL) {
        let reads = group.iter().map(|(_, file)| store.need(&file.key));
        for ((index, file), bytes) in group.iter().zip(handle.block_on(futures::future::join_all(reads))) {
            let bytes = bytes?;
            if sha256_hex(&bytes) != file.sha256 {
                return Err(corrupt(&file.key, "its bytes are not those that the index names"));
            }
            let rows = outcomes::read(bytes).map_err(|error| corrupt(&file.key, error))?;
            let samples = samples(index, rows).map_err(|what| corrupt(&file.key, what))?;
            each(index, &file.key, &samples)?;
        }
    }
    Ok(())
}

/// The kept rows in the order of the shard's samples: split by split, each in the order of its tar.
fn samples(index: &ShardIndex, rows: Vec<OutcomeRow>) -> Result<Vec<OutcomeRow>, String> {
    let mut kept: Vec<OutcomeRow> = rows.into_iter().filter(|row| row.split().is_some()).collect();
    kept.sort_by_key(|row| (row.split(), row.offset));
    for split in Split::ALL {
        let (mut rows, mut moments) = (0, Moments::default());
        for row in kept.iter().filter(|row| row.split() == Some(split)) {
            rows += 1;
            moments.add(&row.moments());
        }
        let (samples, expected) =
            index.tars.get(&split).map_or_else(Default::default, |tar| (tar.samples, tar.moments));
        if (rows, moments) != (samples, expected) {
            return Err(format!("the {rows} rows that are kept for {split} are not the tar's {samples} samples"));
        }
    }
    Ok(kept)
}

/// What is sorted: one kept sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Record {
    sha256: [u8; 32],
    label: u32,
    key: u64,
    shard: u32,
    ordinal: u32,
}

impl Record {
    const BYTES: usize = 52;

    fn of(row: &OutcomeRow, shard: u32, ordinal: u32, labels: &HashMap<&str, u32>) -> Result<Self, String> {
        let digits = row.sha256.as_deref().unwrap_or_default().as_bytes();
        let sha256 = unhex(digits).ok_or_else(|| format!("row {}: a kept row without SHA-256", row.key))?;
        let label = labels.get(row.synset.as_str());
        let label = *label.ok_or_else(|| format!("row {}: {:?} is no class of the dataset", row.key, row.synset))?;
        Ok(Self { sha256, label, key: row.key.max(0) as u64, shard, ordinal })
    }

    fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..32].copy_from_slice(&self.sha256);
        bytes[32..36].copy_from_slice(&self.label.to_le_bytes());
        bytes[36..44].copy_from_slice(&self.key.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.shard.to_le_bytes());
        bytes[48..].copy_from_slice(&self.ordinal.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
            std::array::from_fn(|i| bytes[at + i])
        }
        Self {
            sha256: part(bytes, 0),
            label: u32::from_le_bytes(part(bytes, 32)),
            key: u64::from_le_bytes(part(bytes, 36)),
            shard: u32::from_le_bytes(part(bytes, 44)),
            ordinal: u32::from_le_bytes(part(bytes, 48)),
        }
    }
}

fn unhex(digits: &[u8]) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// Skipped samples: by shard, and how many by reason.
type Skipped = (BTreeMap<u32, Skips>, BTreeMap<Skip, u64>);

fn find_skips(spool: Spool) -> Result<Skipped, std::io::Error> {
    let (mut skips, mut counts): Skipped = Default::default();
    for partition in spool.into_partitions() {
        let partition = partition?;
        let (records, _) = partition.as_chunks::<{ Record::BYTES }>();
        let mut records: Vec<Record> = records.iter().map(Record::decode).collect();
        records.sort_unstable();
        for same in records.chunk_by(|a, b| a.sha256 == b.sha256) {
            if let Some((reason, from)) = judge(same) {
                for record in &same[from..] {
                    skips.entry(record.shard).or_default().insert(record.ordinal);
                }
                *counts.entry(reason).or_default() += (same.len() - from) as u64;
            }
        }
    }
    Ok((skips, counts))
}

/// Which samples of one content, sorted by label and key, are skipped: all from a place on.
fn judge(same: &[Record]) -> Option<(Skip, usize)> {
    let several = same.first()?.label != same.last()?.label;
    match same.len() {
        1 => None,
        n if n > MANY_URLS => Some((Skip::ManyUrls, 0)),
        _ if several => Some((Skip::SeveralClasses, 0)),
        _ => Some((Skip::Duplicate, 1)),
    }
}

/// Sums over all shards.
struct Totals {
    outcomes: BTreeMap<String, u64>,
    /// By label and split.
    samples: Vec<[u64; 3]>,
    train: Moments,
}

impl Totals {
    fn new(classes: usize) -> Self {
        Self { outcomes: BTreeMap::new(), samples: vec![[0; 3]; classes], train: Moments::default() }
    }

    fn add(&mut self, index: &ShardIndex) -> Result<(), String> {
        for (outcome, urls) in &index.outcomes {
            *self.outcomes.entry(outcome.clone()).or_default() += urls;
        }
        for (&split, tar) in &index.tars {
            if tar.per_class.len() > self.samples.len() {
                return Err(format!("{} classes, but the dataset has {}", tar.per_class.len(), self.samples.len()));
            }
            for (class, &samples) in self.samples.iter_mut().zip(&tar.per_class) {
                class[split as usize] += u64::from(samples);
            }
        }
        if let Some(tar) = index.tars.get(&Split::Train) {
            self.train.add(&tar.moments);
        }
        Ok(())
    }

    fn remove(&mut self, split: Split, label: u32, moments: &Moments) {
        let samples = &mut self.samples[label as usize][split as usize];
        *samples = samples.saturating_sub(1);
        if split == Split::Train {
            self.train.subtract(moments);
        }
    }
}

fn classes(sealing: &Sealing, totals: &Totals) -> Vec<ManifestClass> {
    let class = |(class, samples): (&proto::Class, &[u64; 3])| ManifestClass {
        synset: class.synset.clone(),
        name: class.name.clone(),
        urls: sealing.urls_per_class.get(&class.synset).copied().unwrap_or(0),
        samples: Split::ALL.into_iter().map(|split| (split, samples[split as usize])).collect(),
    };
    sealing.spec.classes.iter().zip(&totals.samples).map(class).collect()
}

fn manifest_tars(index: &ShardIndex, skipped: &HashMap<(u32, Split), Vec<u32>>) -> BTreeMap<Split, ManifestTar> {
    let mut first = 0;
    let mut tars = BTreeMap::new();
    // A BTreeMap's order is that of the splits, which is that of the bitmap.
    for (&split, tar) in index.tars.iter().filter(|(_, tar)| tar.samples > 0) {
        let skipped = skipped.get(&(index.shard, split));
        let block = |(at, block): (usize, &proto::shard::Block)| ManifestBlock {
            offset: block.offset,
            length: block.length,
            samples: block.samples,
            kept: block.samples.saturating_sub(skipped.map_or(0, |counts| counts[at])),
        };
        let blocks = tar.blocks.iter().enumerate().map(block).collect();
        tars.insert(split, ManifestTar { key: tar.key.clone(), sha256: tar.sha256.clone(), first, blocks });
        first += tar.samples;
    }
    tars
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(content: u8, label: u32, key: u64) -> Record {
        Record { sha256: [content; 32], label, key, shard: (key % 3) as u32, ordinal: key as u32 }
    }

    #[test]
    fn a_sample_is_skipped_for_the_first_reason_that_holds() {
        let mut spool = Spool::new(None);
        let several = [record(1, 0, 4), record(1, 1, 5)];
        let twice = [record(2, 1, 9), record(2, 1, 8), record(2, 1, 3)];
        let everywhere: Vec<Record> =
            (100..100 + MANY_URLS as u64 + 1).map(|key| record(3, key as u32 % 2, key)).collect();
        let alone = [record(4, 0, 1)];
        for record in several.iter().chain(&twice).chain(&everywhere).chain(&alone) {
            spool.push(record.sha256[0], &[&record.encode()]).expect("in memory");
        }
        let (skips, counts) = find_skips(spool).expect("in memory");
        let many = MANY_URLS as u64 + 1;
        assert_eq!(counts, [(Skip::ManyUrls, many), (Skip::SeveralClasses, 2), (Skip::Duplicate, 2)].into());
        let skipped = |key: u64| skips.get(&((key % 3) as u32)).is_some_and(|skips| skips.contains(key as u32));
        assert!([4, 5, 8, 9, 100, 120].into_iter().all(skipped));
        assert!(![1, 3].into_iter().any(skipped), "unique, or the lowest key of its class");
    }
}
