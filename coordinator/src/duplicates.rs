//! Which kept samples do not count, and which look like another one.
//!
//! All of it is external sorting: a small record of each sample goes into the partition of a [`Spool`] that a hash
//! chooses, and each partition is sorted alone. What stays in memory is one bit for each skipped sample.
//!
//! 1. by content: the same bytes under many URLs, under several classes, or twice in a class;
//! 2. what is left, by bands of the perceptual hash (see [`crate::near`]): pictures that look alike;
//! 3. what is left, by class: those beyond the first `per_class` by key.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use proto::findings::Finding;
use proto::gist::GistSample;
use proto::manifest::{Skip, Skips};
use proto::{DatasetSpec, Duplicates, Split};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::near;
use crate::spool::Spool;

/// One kept sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct SampleId {
    /// Of its URL.
    pub(crate) key: u64,
    pub(crate) shard: u32,
    /// The sample's place in its shard.
    pub(crate) ordinal: u32,
}

/// Another sample, which one is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Like {
    key: u64,
    /// Bits in which the perceptual hashes differ; 0 for the same bytes.
    bits: u8,
}

/// What was found out about one sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct SampleFinding {
    sample: SampleId,
    /// [`NOTHING`]: it is like no other.
    like_key: u64,
    like_bits: u8,
    /// The first reason that holds, by its number; [`COUNTS`]: none.
    reason: u8,
    _unused: [u8; 6],
}

/// In the place of a key.
const NOTHING: u64 = u64::MAX;

/// In the place of a reason: the sample counts, but looks like another one. Comes behind all reasons.
const COUNTS: u8 = u8::MAX;

impl SampleFinding {
    fn new(sample: SampleId, skip: Option<Skip>, like: Option<Like>) -> Self {
        let Like { key, bits } = like.unwrap_or(Like { key: NOTHING, bits: 0 });
        let reason = skip.map_or(COUNTS, |skip| skip as u8);
        Self { sample, like_key: key, like_bits: bits, reason, _unused: [0; 6] }
    }

    /// Why the sample does not count.
    pub(crate) fn skip(&self) -> Option<Skip> {
        Skip::ALL.get(usize::from(self.reason)).copied()
    }

    /// As it is stored.
    pub(crate) fn row(&self) -> Finding {
        let like = (self.like_key != NOTHING).then_some((self.like_key, self.like_bits));
        Finding {
            ordinal: self.sample.ordinal as i32,
            key: self.sample.key as i64,
            skipped: self.skip().map(|skip| skip.name().to_owned()),
            like: like.map(|(key, _)| key as i64),
            bits: like.map(|(_, bits)| i32::from(bits)),
        }
    }
}

/// Of one shard, in the order of its samples.
type ShardFindings = (u32, Vec<SampleFinding>);

/// The result.
pub(crate) struct Findings {
    /// By shard.
    pub(crate) skips: BTreeMap<u32, Skips>,
    /// Some shards at a time.
    pub(crate) by_shard: Box<dyn Iterator<Item = io::Result<Vec<ShardFindings>>>>,
}

/// Gathers the kept samples, then finds.
pub(crate) struct Finder {
    rules: Duplicates,
    per_class: u32,
    /// Where the list says the splits, a picture that others validate or test by is not trained on; else the reverse.
    published_splits: bool,
    folder: Option<PathBuf>,
    contents: Spool,
    findings: Unsorted,
}

/// The findings in whatever order they come.
struct Unsorted {
    skips: BTreeMap<u32, Skips>,
    spool: Spool,
}

impl Unsorted {
    fn push(&mut self, sample: SampleId, skip: Option<Skip>, like: Option<Like>) -> io::Result<()> {
        if skip.is_some() {
            self.skips.entry(sample.shard).or_default().insert(sample.ordinal);
        }
        self.spool.push(sample.shard as u8, &[SampleFinding::new(sample, skip, like).as_bytes()])
    }

    fn is_skipped(&self, sample: SampleId) -> bool {
        self.skips.get(&sample.shard).is_some_and(|skips| skips.contains(sample.ordinal))
    }
}

impl Finder {
    /// As the dataset's spec wants it; `folder` is where samples are spooled.
    pub(crate) fn new(spec: &DatasetSpec, folder: Option<PathBuf>) -> Self {
        let DatasetSpec { duplicates: rules, per_class, .. } = *spec;
        let published_splits = !spec.splits.column.is_empty();
        let findings = Unsorted { skips: BTreeMap::new(), spool: Spool::new(folder.clone()) };
        Self { rules, per_class, published_splits, contents: Spool::new(folder.clone()), findings, folder }
    }

    /// Takes in a kept sample; `latest`: its URL was not fetched again later. The inner error is one that cannot be
    /// right.
    pub(crate) fn push(
        &mut self,
        sample: SampleId,
        label: u32,
        found: &GistSample,
        latest: bool,
    ) -> io::Result<Result<(), String>> {
        if !latest {
            self.findings.push(sample, Some(Skip::Superseded), None)?;
            return Ok(Ok(()));
        }
        if found.several_classes {
            self.findings.push(sample, Some(Skip::SeveralClasses), None)?;
            return Ok(Ok(()));
        }
        let Some(sha256) = found.sha256 else {
            return Ok(Err(format!("row {}: a kept row without SHA-256", sample.key)));
        };
        let content = Content {
            sha256,
            sample,
            phash: found.phash.unwrap_or(0),
            label,
            has_phash: found.phash.is_some().into(),
            train: (found.split == Split::Train).into(),
            _unused: [0; 2],
        };
        self.contents.push(sha256[0], &[content.as_bytes()])?;
        Ok(Ok(()))
    }

    pub(crate) fn find(self) -> io::Result<Findings> {
        let Self { rules, per_class, published_splits, folder, contents, mut findings } = self;
        let bands: Vec<u64> = near::bands(u64::MAX, rules.near_bits + 1).collect();
        let mut pictures = Spool::new(folder.clone());
        let mut classes = Spool::new(folder.clone());
        for partition in contents.into_partitions() {
            let mut contents: Vec<Content> = records(&partition?);
            // Unless the list says the splits, the same bytes are of the same one.
            contents.sort_unstable_by_key(|content| (content.sha256, content.label, content.train, content.sample));
            for same in contents.chunk_by(|a, b| a.sha256 == b.sha256) {
                let (reason, from) = skip_of_same(same, rules.many_urls as usize);
                for content in &same[from..] {
                    let others = same.iter().filter(|other| other.sample != content.sample);
                    let like = others.map(|other| Like { key: other.sample.key, bits: 0 }).min();
                    findings.push(content.sample, Some(reason), like)?;
                }
                for &Content { sample, label, phash, has_phash, train, .. } in &same[..from] {
                    if has_phash != 0 {
                        let picture = Picture { hash: phash, sample, train: train.into() };
                        pictures.push(near::partition(phash, bands[0]), &[picture.as_bytes()])?;
                    }
                    if per_class > 0 {
                        let member = Member { sample, label: label.into() };
                        classes.push(label as u8, &[member.as_bytes()])?;
                    }
                }
            }
        }
        find_near(pictures, &bands, rules.near_bits, published_splits, &folder, &mut findings)?;
        for partition in classes.into_partitions() {
            let mut members: Vec<Member> = records(&partition?);
            members.retain(|member| !findings.is_skipped(member.sample));
            members.sort_unstable_by_key(|member| (member.label, member.sample));
            for class in members.chunk_by(|a, b| a.label == b.label) {
                for member in class.iter().skip(per_class as usize) {
                    findings.push(member.sample, Some(Skip::ClassFull), None)?;
                }
            }
        }
        let by_shard = findings.spool.into_partitions().map(|partition| {
            let mut all: Vec<SampleFinding> = records(&partition?);
            let place = |finding: &SampleFinding| (finding.sample.shard, finding.sample.ordinal);
            all.sort_unstable_by_key(|of| (place(of), of.reason, of.like_key, of.like_bits));
            // Of several findings about one sample the first counts.
            all.dedup_by_key(|finding| place(finding));
            let shards = all.chunk_by(|a, b| a.sample.shard == b.sample.shard);
            Ok(shards.map(|of| (of[0].sample.shard, of.to_vec())).collect())
        });
        Ok(Findings { skips: findings.skips, by_shard: Box::new(by_shard) })
    }
}

fn records<T: FromBytes>(partition: &[u8]) -> Vec<T> {
    // Nothing but whole records was pushed.
    partition.chunks_exact(size_of::<T>()).filter_map(|bytes| T::read_from_bytes(bytes).ok()).collect()
}

/// Which samples of one content, sorted by label and key, are skipped: all from a place on.
fn skip_of_same(same: &[Content], many_urls: usize) -> (Skip, usize) {
    let several = same.first().map(|content| content.label) != same.last().map(|content| content.label);
    match same.len() {
        n if n > many_urls => (Skip::ManyUrls, 0),
        _ if several => (Skip::SeveralClasses, 0),
        _ => (Skip::Duplicate, 1),
    }
}

/// Finds what looks alike, one band of the hash after the other.
fn find_near(
    mut pictures: Spool,
    bands: &[u64],
    bits: u32,
    published_splits: bool,
    folder: &Option<PathBuf>,
    findings: &mut Unsorted,
) -> io::Result<()> {
    for (at, &band) in bands.iter().enumerate() {
        let mut next = Spool::new(folder.clone());
        for partition in pictures.into_partitions() {
            let mut pictures: Vec<Picture> = records(&partition?);
            pictures.sort_unstable();
            if let Some(&band) = bands.get(at + 1) {
                for picture in &pictures {
                    next.push(near::partition(picture.hash, band), &[picture.as_bytes()])?;
                }
            }
            let groups: Vec<&[Picture]> = pictures.chunk_by(|a, b| a.hash == b.hash).collect();
            let hashes: Vec<u64> = groups.iter().map(|group| group[0].hash).collect();
            // Equal hashes meet in each band, so the first one is enough.
            let mut alike: Vec<Alike> =
                groups.iter().map(|group| if at == 0 { Alike::of(group, 0) } else { Alike::default() }).collect();
            near::pairs(&hashes, band, bits, &mut |a, b| {
                let distance = (hashes[a] ^ hashes[b]).count_ones() as u8;
                alike[a].add(Alike::of(groups[b], distance));
                alike[b].add(Alike::of(groups[a], distance));
            });
            for (group, alike) in groups.iter().zip(alike) {
                for &Picture { sample, train, .. } in *group {
                    let (same, other, reason) = match train != 0 {
                        true => (alike.train, alike.other, Skip::NearHeldOut),
                        false => (alike.other, alike.train, Skip::NearTraining),
                    };
                    let skip = other.filter(|_| (train != 0) == published_splits).map(|_| reason);
                    let like = if skip.is_some() { other } else { same };
                    // Of two that count, the second one is told of.
                    if let Some(like) = like.filter(|like| skip.is_some() || like.key < sample.key) {
                        findings.push(sample, skip, Some(like))?;
                    }
                }
            }
        }
        pictures = next;
    }
    Ok(())
}

/// The pictures with the lowest keys that look like one: of those that train, and of the others.
#[derive(Debug, Clone, Copy, Default)]
struct Alike {
    train: Option<Like>,
    other: Option<Like>,
}

impl Alike {
    /// A group is sorted by key.
    fn of(group: &[Picture], bits: u8) -> Self {
        let first = |train: bool| {
            let first = group.iter().find(|picture| (picture.train != 0) == train)?;
            Some(Like { key: first.sample.key, bits })
        };
        Self { train: first(true), other: first(false) }
    }

    fn add(&mut self, other: Self) {
        let lower = |a: Option<Like>, b: Option<Like>| a.into_iter().chain(b).min();
        *self = Self { train: lower(self.train, other.train), other: lower(self.other, other.other) };
    }
}

/// A kept sample, as it is sorted by content.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Content {
    sha256: [u8; 32],
    sample: SampleId,
    phash: u64,
    label: u32,
    has_phash: u8,
    train: u8,
    _unused: [u8; 2],
}

/// As it is sorted by what it looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Picture {
    hash: u64,
    sample: SampleId,
    train: u64,
}

/// As it is sorted by class.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Member {
    sample: SampleId,
    label: u64,
}

#[cfg(test)]
mod tests;
