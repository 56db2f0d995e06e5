//! Sealing: committed indexes become a manifest. Classes, counts, mean and deviation, and the samples to skip.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use bytes::Bytes;
use proto::findings::Finding;
use proto::index::StoredFile;
use proto::manifest::{Manifest, ManifestBlock, ManifestClass, ManifestShard, ManifestTar};
use proto::outcomes::OutcomeRow;
use proto::round::Round;
use proto::shard::{Moments, sha256_hex};
use proto::{DatasetId, DatasetSpec, FormatError, OutcomeCounts, ShardIndex, Split, Stored, keys, table};
use tokio::runtime::Handle;

use crate::duplicates::{Finder, Findings, SampleFinding, SampleId};
use crate::error::Error;
use crate::history::{History, HistoryError, Tolerance, corrupt};
use crate::store::{Created, Store, StoreError, nonce};

/// Why there is no manifest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SealError {
    /// What workers committed cannot be read, or too much of it is damaged.
    #[error("{0}")]
    History(#[from] HistoryError),
    /// Worth another try.
    #[error("another round: {0}")]
    Round(Error),
    /// Findings cannot be encoded.
    #[error("{0}")]
    Format(#[from] FormatError),
    /// Worth another try.
    #[error("temporary file: {0}")]
    Local(#[from] std::io::Error),
}

impl SealError {
    /// Whether another try would end the same way, unless somebody does something about it.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::History(HistoryError::TooDamaged { .. }) | Self::Round(Error::Damaged(_)))
    }
}

impl From<StoreError> for SealError {
    fn from(error: StoreError) -> Self {
        Self::History(error.into())
    }
}

/// What is to be sealed.
#[derive(Debug, Clone)]
pub(crate) struct Sealing {
    pub(crate) dataset: DatasetId,
    pub(crate) spec: DatasetSpec,
    /// Of the manifest.
    pub(crate) version: u32,
    /// That it covers: all of whose shards are committed.
    pub(crate) rounds: Vec<Round>,
    /// For temporary files.
    pub(crate) folder: Option<PathBuf>,
    pub(crate) tolerance: Tolerance,
}

/// Makes the manifest and puts it in place; of two coordinators that do so at once, both return the one that stands.
/// Blocks its thread; `handle` does the store's part.
pub(crate) fn seal(handle: &Handle, store: &Store, sealing: &Sealing) -> Result<Manifest, SealError> {
    let Sealing { dataset, spec, version, rounds, .. } = sealing;
    let history = History::new(handle, store, (dataset, spec), rounds, &sealing.tolerance);
    let mut indexes = history.indexes()?;
    let label = |index: &ShardIndex, row: &OutcomeRow| {
        let what = || format!("row {}: {:?} is no class of the dataset", row.key, row.synset);
        history.label(row).ok_or_else(|| corrupt(&name(dataset, index), what()))
    };

    let mut totals = Totals::new(spec.classes.len());
    let mut finder = Finder::new(spec, sealing.folder.clone());
    history.latest_first(&indexes, |index, rows| -> Result<(), SealError> {
        for (row, _) in rows.iter().filter(|(_, latest)| *latest) {
            let outcome = row.outcome().map_err(|error| corrupt(&name(dataset, index), error))?;
            totals.outcomes[label(index, row)? as usize].add(outcome, 1);
        }
        for (ordinal, (row, latest)) in (0u32..).zip(&samples(rows)) {
            let sample = SampleId { shard: index.shard, ordinal, key: row.key.max(0) as u64 };
            let label = label(index, row)?;
            let pushed = finder.push(sample, label, row, *latest);
            pushed?.map_err(|what| corrupt(&name(dataset, index), what))?;
        }
        Ok(())
    })?;
    let damaged = history.damaged();
    indexes.retain(|shard, _| !damaged.contains_key(shard));
    let found = finder.find()?;

    indexes.values().for_each(|index| totals.add(index));
    let skipped_blocks = subtract_skipped(&history, &indexes, &found, &label, &mut totals)?;
    let (mean, std) = totals.train.mean_and_std();
    let mut manifest = Manifest {
        format: 1,
        nonce: nonce(),
        dataset: dataset.clone(),
        version: *version,
        rounds: rounds.len() as u32,
        resize: spec.resize,
        smallest_side: spec.resize.smallest_side(&spec.limits),
        outcomes: totals.all_outcomes(),
        classes: classes(sealing, totals),
        skipped: BTreeMap::new(),
        near_duplicates: 0,
        mean,
        std,
        shards: Vec::new(),
        damaged: damaged.into_values().collect(),
    };
    let put = |key: String, bytes: Bytes| -> Result<StoredFile, SealError> {
        let file = StoredFile { key, bytes: bytes.len() as u64, sha256: sha256_hex(&bytes) };
        handle.block_on(store.put(&file.key, bytes))?;
        Ok(file)
    };
    let Findings { mut skips, by_shard: mut findings } = found;
    for round in rounds {
        for shard in round.shards() {
            let skips = match skips.remove(&shard) {
                Some(skips) => {
                    let bytes = Bytes::copy_from_slice(skips.as_bytes());
                    Some(put(keys::skips(&dataset.shard(shard), *version, &manifest.nonce), bytes)?)
                }
                None => None,
            };
            let index = indexes.get(&shard);
            manifest.shards.push(ManifestShard {
                shard,
                round: round.round,
                outcomes: index.and_then(|index| index.outcomes_file.clone()),
                findings: None,
                skips,
                tars: index.map_or_else(BTreeMap::new, |index| manifest_tars(index, &skipped_blocks)),
            });
        }
    }
    while let Some(partition) = findings.next().transpose()? {
        for (shard, rows) in partition {
            for row in &rows {
                match row.skip() {
                    Some(skip) => *manifest.skipped.entry(skip).or_default() += 1,
                    None => manifest.near_duplicates += 1,
                }
            }
            let rows: Vec<Finding> = rows.iter().map(SampleFinding::row).collect();
            let key = keys::findings(&dataset.shard(shard), *version, &manifest.nonce);
            let file = put(key, table::write(&rows)?.into())?;
            if let Ok(at) = manifest.shards.binary_search_by_key(&shard, |named| named.shard) {
                manifest.shards[at].findings = Some(file);
            }
        }
    }
    let key = keys::manifest(dataset, *version);
    match handle.block_on(store.create(&key, &manifest))? {
        Created::Won => Ok(manifest),
        Created::Lost(theirs) => Ok(Manifest::from_json(&theirs).map_err(|error| corrupt(&key, error))?),
    }
}

/// For errors about a shard's rows.
fn name(dataset: &DatasetId, index: &ShardIndex) -> String {
    index.outcomes_file.as_ref().map_or_else(|| keys::slice(&dataset.shard(index.shard)), |file| file.key.clone())
}

/// Reads the shards with skipped samples a second time, to take those samples' part away from the totals. Returns how
/// many are skipped in each block.
fn subtract_skipped(
    history: &History<'_>,
    indexes: &BTreeMap<u32, ShardIndex>,
    found: &Findings,
    label: &impl Fn(&ShardIndex, &OutcomeRow) -> Result<u32, HistoryError>,
    totals: &mut Totals,
) -> Result<HashMap<(u32, Split), Vec<u32>>, SealError> {
    let mut skipped_blocks: HashMap<(u32, Split), Vec<u32>> = HashMap::new();
    let with_skips = indexes.values().filter(|index| found.skips.contains_key(&index.shard));
    history.each(with_skips, |index, rows| -> Result<(), SealError> {
        let skips = &found.skips[&index.shard];
        if history.damaged().contains_key(&index.shard) {
            return Err(corrupt(&name(history.dataset, index), "it was damaged while it was sealed").into());
        }
        let samples = samples(rows.into_iter().map(|row| (row, true)).collect());
        for (_, (row, _)) in (0u32..).zip(&samples).filter(|(ordinal, _)| skips.contains(*ordinal)) {
            let Some(split) = row.split() else { continue };
            totals.remove(split, label(index, row)?, &row.moments());
            let blocks = index.tars.get(&split).map_or(&[][..], |tar| &tar.blocks);
            let offset = row.offset.unwrap_or(0).max(0) as u64;
            let at = blocks.partition_point(|block| block.offset <= offset).saturating_sub(1);
            let counts = skipped_blocks.entry((index.shard, split)).or_insert_with(|| vec![0; blocks.len()]);
            if let Some(count) = counts.get_mut(at) {
                *count += 1;
            }
        }
        Ok(())
    })?;
    Ok(skipped_blocks)
}

/// The kept rows in the order of the shard's samples: split by split, each in the order of its tar.
fn samples(mut rows: Vec<(OutcomeRow, bool)>) -> Vec<(OutcomeRow, bool)> {
    rows.retain(|(row, _)| row.split().is_some());
    rows.sort_by_key(|(row, _)| (row.split(), row.offset));
    rows
}

/// Sums over all shards.
struct Totals {
    /// By label and outcome.
    outcomes: Vec<OutcomeCounts>,
    /// By label and split.
    samples: Vec<[u64; 3]>,
    train: Moments,
}

impl Totals {
    fn new(classes: usize) -> Self {
        Self {
            outcomes: vec![OutcomeCounts::default(); classes],
            samples: vec![[0; 3]; classes],
            train: Moments::default(),
        }
    }

    fn all_outcomes(&self) -> OutcomeCounts {
        let mut all = OutcomeCounts::default();
        self.outcomes.iter().for_each(|of_class| all.merge(of_class));
        all
    }

    fn add(&mut self, index: &ShardIndex) {
        for (&split, tar) in &index.tars {
            for (label, samples) in tar.per_class.iter() {
                self.samples[label as usize][split as usize] += u64::from(samples);
            }
        }
        if let Some(tar) = index.tars.get(&Split::Train) {
            self.train.add(&tar.moments);
        }
    }

    fn remove(&mut self, split: Split, label: u32, moments: &Moments) {
        let samples = &mut self.samples[label as usize][split as usize];
        *samples = samples.saturating_sub(1);
        if split == Split::Train {
            self.train.subtract(moments);
        }
    }
}

fn classes(sealing: &Sealing, totals: Totals) -> Vec<ManifestClass> {
    let mut urls = BTreeMap::<&str, u64>::new();
    for (synset, more) in sealing.rounds.iter().flat_map(|round| &round.urls_per_class) {
        *urls.entry(synset).or_default() += more;
    }
    let counts = totals.samples.into_iter().zip(totals.outcomes);
    let class = |(class, (samples, outcomes)): (&proto::Class, ([u64; 3], OutcomeCounts))| ManifestClass {
        synset: class.synset.clone(),
        name: class.name.clone(),
        urls: urls.get(class.synset.as_str()).copied().unwrap_or(0),
        outcomes,
        samples: Split::ALL.into_iter().map(|split| (split, samples[split as usize])).collect(),
    };
    sealing.spec.classes.iter().zip(counts).map(class).collect()
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
