//! Sealing: committed indexes become a manifest. Classes, counts, mean and deviation, and the samples to skip.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use proto::findings::Finding;
use proto::index::StoredFile;
use proto::manifest::{Manifest, ManifestBlock, ManifestClass, ManifestShard, ManifestTar};
use proto::round::Round;
use proto::shard::{Moments, Sums, sha256_hex};
use proto::{DatasetId, DatasetSpec, FormatError, OutcomeCounts, ShardIndex, Split, Stored, keys, table};
use tokio::runtime::Handle;

use crate::duplicates::{Finder, Findings, SampleFinding, SampleId};
use crate::error::Error;
use crate::gists::{Gists, name};
use crate::history::{History, HistoryError, Tolerance, corrupt};
use crate::puts::Puts;
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
    /// What seals has not come to its end.
    #[error("{0}")]
    Broken(Error),
}

impl SealError {
    /// Whether another try would end the same way, unless somebody does something about it.
    pub(crate) fn is_final(&self) -> bool {
        use Error::{Damaged, Panicked};
        let too_damaged = matches!(self, Self::History(HistoryError::TooDamaged { .. }));
        too_damaged || matches!(self, Self::Round(Damaged(_) | Panicked(_)) | Self::Broken(Panicked(_)))
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
    /// The version before: what it covers is not read again. None: all is read.
    pub(crate) base: Option<Arc<Manifest>>,
}

/// Makes the manifest and puts it in place; of two coordinators that do so at once, both return the one that stands.
/// Blocks its thread; `handle` does the store's part.
pub(crate) fn seal(handle: &Handle, store: &Store, sealing: &Sealing) -> Result<Manifest, SealError> {
    let Sealing { dataset, spec, version, rounds, base, .. } = sealing;
    let (nonce, base) = (nonce(), base.as_deref());
    let history = History::new(handle, store, (dataset, spec), rounds, &sealing.tolerance);
    let mut gists = Gists::find(&history, *version, &nonce, base)?;
    let mut puts = Puts::new(handle, store);

    let mut totals = Totals::new(spec.classes.len());
    let mut finder = Finder::new(spec, sealing.folder.clone());
    let mut indexes = BTreeMap::new();
    gists.latest_first(Some(&mut puts), |gist, latest, _| -> Result<(), SealError> {
        for (row, _) in gist.rows.iter().zip(latest).filter(|(_, latest)| **latest) {
            totals.outcomes[row.label as usize].add(row.outcome, 1);
        }
        for (ordinal, ((row, found), latest)) in (0u32..).zip(gist.rows.iter().zip(&gist.samples).zip(latest)) {
            let sample = SampleId { shard: gist.index.shard, ordinal, key: row.key.max(0) as u64 };
            let pushed = finder.push(sample, row.label, found, *latest);
            pushed?.map_err(|what| corrupt(&name(dataset, &gist.index), what))?;
        }
        let mut index = gist.index;
        totals.add(&index);
        index.forget_classes();
        indexes.insert(index.shard, index);
        Ok(())
    })?;
    puts.finish()?;
    let damaged = history.damaged();
    indexes.retain(|shard, _| !damaged.contains_key(shard));
    let found = finder.find()?;

    let skipped_blocks = subtract_skipped(&gists, &found, &mut totals)?;
    let (mean, std) = totals.train.mean_and_std();
    let mut manifest = Manifest {
        format: 1,
        nonce: nonce.clone(),
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
    let before = handle.block_on(Before::of(store, base, gists.written_before()))?;
    let mut put = |key: String, bytes: Bytes, before: Option<&StoredFile>| match before {
        // The version before has put the same.
        Some(before) if (before.bytes, &before.sha256) == (bytes.len() as u64, &sha256_hex(&bytes)) => {
            Ok(before.clone())
        }
        _ => puts.put(key, bytes),
    };
    let Findings { mut skips, by_shard: mut findings } = found;
    for round in rounds {
        for shard in round.shards() {
            let skips = match skips.remove(&shard) {
                Some(skips) => {
                    let bytes = Bytes::copy_from_slice(skips.as_bytes());
                    let key = keys::skips(&dataset.shard(shard), *version, &manifest.nonce);
                    Some(put(key, bytes, before.file(shard, |named| &named.skips))?)
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
            let file = put(key, table::write(&rows)?.into(), before.file(shard, |named| &named.findings))?;
            if let Ok(at) = manifest.shards.binary_search_by_key(&shard, |named| named.shard) {
                manifest.shards[at].findings = Some(file);
            }
        }
    }
    puts.finish()?;
    let list = gists.list()?.to_json();
    handle.block_on(store.put(&keys::gist_list(dataset, *version, &nonce), list.into()))?;
    let key = keys::manifest(dataset, *version);
    match handle.block_on(store.create(&key, &manifest))? {
        Created::Won => Ok(manifest),
        Created::Lost(theirs) => Ok(Manifest::from_json(&theirs).map_err(|error| corrupt(&key, error))?),
    }
}

/// What the version before has put for its shards and is still there as it was.
#[derive(Default)]
struct Before<'a> {
    shards: HashMap<u32, &'a ManifestShard>,
    /// Keys.
    whole: HashSet<String>,
}

impl<'a> Before<'a> {
    async fn of(store: &Store, base: Option<&'a Manifest>, written: Option<i64>) -> Result<Self, StoreError> {
        let Some((base, written)) = base.zip(written) else { return Ok(Self::default()) };
        let files = || base.shards.iter().flat_map(|shard| shard.skips.iter().chain(&shard.findings));
        let folders: BTreeSet<&str> = files().filter_map(|file| folder_of(&file.key)).collect();
        let lengths: HashMap<&str, u64> = files().map(|file| (file.key.as_str(), file.bytes)).collect();
        let mut whole = HashSet::new();
        for folder in folders {
            for object in store.objects(folder).await? {
                let key = object.location.to_string();
                let is_as_it_was = object.last_modified.timestamp_micros() <= written;
                if is_as_it_was && lengths.get(key.as_str()) == Some(&object.size) {
                    whole.insert(key);
                }
            }
        }
        Ok(Self { shards: base.shards.iter().map(|named| (named.shard, named)).collect(), whole })
    }

    fn file(&self, shard: u32, of: impl Fn(&ManifestShard) -> &Option<StoredFile>) -> Option<&StoredFile> {
        let file = of(self.shards.get(&shard)?).as_ref()?;
        self.whole.contains(&file.key).then_some(file)
    }
}

/// The folder of a version's files: that of `.../000003-<nonce>/skips/000007.bits`.
fn folder_of(key: &str) -> Option<&str> {
    Some(key.rsplit_once('/')?.0.rsplit_once('/')?.0)
}

/// Takes the part of skipped samples away from the totals. Returns how many are skipped in each block.
fn subtract_skipped(
    gists: &Gists<'_>,
    found: &Findings,
    totals: &mut Totals,
) -> Result<HashMap<(u32, Split), Vec<u32>>, SealError> {
    let mut skipped_blocks: HashMap<(u32, Split), Vec<u32>> = HashMap::new();
    let is_wanted = |shard| found.skips.contains_key(&shard);
    gists.again(is_wanted, |gist| -> Result<(), SealError> {
        let shard = gist.index.shard;
        let Some(skips) = found.skips.get(&shard) else { return Ok(()) };
        for (ordinal, (row, sample)) in (0u32..).zip(gist.rows.iter().zip(&gist.samples)) {
            if !skips.contains(ordinal) {
                continue;
            }
            totals.remove(sample.split, row.label, &sample.moments);
            let blocks = gist.index.tars.get(&sample.split).map_or(0, |tar| tar.blocks.len());
            let counts = skipped_blocks.entry((shard, sample.split)).or_insert_with(|| vec![0; blocks]);
            if let Some(count) = counts.get_mut(sample.block as usize) {
                *count += 1;
            }
        }
        Ok(())
    })?;
    Ok(skipped_blocks)
}

/// Sums over all shards.
struct Totals {
    /// By label and outcome.
    outcomes: Vec<OutcomeCounts>,
    /// By label and split.
    samples: Vec<[u64; 3]>,
    train: Sums,
}

impl Totals {
    fn new(classes: usize) -> Self {
        Self {
            outcomes: vec![OutcomeCounts::default(); classes],
            samples: vec![[0; 3]; classes],
            train: Sums::default(),
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

#[cfg(test)]
mod tests;
