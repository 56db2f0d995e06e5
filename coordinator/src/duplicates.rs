//! Which kept samples do not count, and which look like another one.
//!
//! All of it is external sorting: a small record of each sample goes into the partition of a [`Spool`] that a hash chooses, and
//! each partition is sorted alone. What stays in memory is one bit for each skipped sample.
//!
//! 1. by content: the same bytes under many URLs, under several classes, or twice in a class;
//! 2. what is left, by bands of the perceptual hash (see [`crate::near`]): pictures that look alike;
//! 3. what is left, by class: those beyond the first `per_class` by key.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use proto::Duplicates;
use proto::findings::Finding;
use proto::manifest::{Skip, Skips};
use proto::outcomes::OutcomeRow;

use crate::near;
use crate::spool::Spool;

/// Where a sample is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Of the URL.
    pub(crate) key: u64,
    pub(crate) shard: u32,
    /// The sample's place in its shard.
    pub(crate) ordinal: u32,
}

/// What was found out about one sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mark {
    place: (u32, u32),
    /// The first reason that holds; none: it counts, but looks like another one.
    order: u8,
    like: Option<(u64, u8)>,
    key: u64,
    pub(crate) skip: Option<Skip>,
}

/// A mark that is no skip comes behind all that are.
const LOOKS_LIKE: u8 = u8::MAX;

impl Mark {
    const BYTES: usize = 26;

    fn new(place: Place, skip: Option<Skip>, like: Option<(u64, u8)>) -> Self {
        let order = skip.map_or(LOOKS_LIKE, |skip| skip as u8);
        Self { place: (place.shard, place.ordinal), order, like, key: place.key, skip }
    }

    fn encode(&self) -> [u8; Self::BYTES] {
        let (like, bits) = self.like.unwrap_or((u64::MAX, 0));
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.place.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.place.1.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.key.to_le_bytes());
        bytes[16..24].copy_from_slice(&like.to_le_bytes());
        bytes[24..].copy_from_slice(&[self.order, bits]);
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let place = Place { shard: u32_at(bytes, 0), ordinal: u32_at(bytes, 4), key: u64_at(bytes, 8) };
        let like = Some(u64_at(bytes, 16)).filter(|&key| key != u64::MAX).map(|key| (key, bytes[25]));
        Self::new(place, Skip::ALL.into_iter().find(|skip| *skip as u8 == bytes[24]), like)
    }

    /// As it is stored.
    pub(crate) fn finding(&self) -> Finding {
        Finding {
            ordinal: self.place.1 as i32,
            key: self.key as i64,
            skipped: self.skip.map(|skip| skip.name().to_owned()),
            like: self.like.map(|(key, _)| key as i64),
            bits: self.like.map(|(_, bits)| i32::from(bits)),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// Of one shard, in the order of its samples.
type ShardMarks = (u32, Vec<Mark>);

/// The result.
pub(crate) struct Found {
    /// By shard.
    pub(crate) skips: BTreeMap<u32, Skips>,
    /// Some shards' marks at a time.
    pub(crate) findings: Box<dyn Iterator<Item = io::Result<Vec<ShardMarks>>>>,
}

/// Gathers the kept samples, then finds.
pub(crate) struct Finder {
    rules: Duplicates,
    per_class: u32,
    folder: Option<PathBuf>,
    contents: Spool,
    marks: Marks,
}

struct Marks {
    skips: BTreeMap<u32, Skips>,
    spool: Spool,
}

impl Marks {
    fn push(&mut self, mark: Mark) -> io::Result<()> {
        let (shard, ordinal) = mark.place;
        if mark.skip.is_some() {
            self.skips.entry(shard).or_default().insert(ordinal);
        }
        self.spool.push(shard as u8, &[&mark.encode()])
    }

    fn is_skipped(&self, place: Place) -> bool {
        self.skips.get(&place.shard).is_some_and(|skips| skips.contains(place.ordinal))
    }
}

impl Finder {
    pub(crate) fn new(rules: Duplicates, per_class: u32, folder: Option<PathBuf>) -> Self {
        let marks = Marks { skips: BTreeMap::new(), spool: Spool::new(folder.clone()) };
        Self { rules, per_class, contents: Spool::new(folder.clone()), marks, folder }
    }

    /// Takes in a kept sample; `latest`: its URL was not fetched again later. The inner error is a row that cannot be right.
    pub(crate) fn keep(
        &mut self,
        place: Place,
        label: u32,
        row: &OutcomeRow,
        latest: bool,
    ) -> io::Result<Result<(), String>> {
        if !latest {
            self.marks.push(Mark::new(place, Some(Skip::Superseded), None))?;
            return Ok(Ok(()));
        }
        let Some(sha256) = unhex(row.sha256.as_deref().unwrap_or_default()) else {
            return Ok(Err(format!("row {}: a kept row without SHA-256", row.key)));
        };
        let phash = row.phash.as_deref().and_then(|hash| u64::from_str_radix(hash, 16).ok());
        let train = row.split() == Some(proto::Split::Train);
        let record = Record { sha256, label, place, train, phash };
        self.contents.push(sha256[0], &[&record.encode()])?;
        Ok(Ok(()))
    }

    pub(crate) fn find(self) -> io::Result<Found> {
        let Self { rules, per_class, folder, contents, mut marks } = self;
        let bands: Vec<u64> = near::bands(u64::MAX, rules.near_bits + 1).collect();
        let mut looks = Spool::new(folder.clone());
        let mut classes = Spool::new(folder.clone());
        for partition in contents.into_partitions() {
            let mut records = decode(&partition?, Record::decode);
            records.sort_unstable();
            for same in records.chunk_by(|a, b| a.sha256 == b.sha256) {
                let (reason, from) = judge(same, rules.many_urls as usize);
                for record in &same[from..] {
                    let others = same.iter().filter(|other| other.place != record.place);
                    let like = others.map(|other| (other.place.key, 0)).min();
                    marks.push(Mark::new(record.place, Some(reason), like))?;
                }
                for record in &same[..from] {
                    if let Some(hash) = record.phash {
                        let look = Look { hash, place: record.place, train: record.train };
                        looks.push(near::partition(hash, bands[0]), &[&look.encode()])?;
                    }
                    if per_class > 0 {
                        let entry = Entry { label: record.label, place: record.place };
                        classes.push(record.label as u8, &[&entry.encode()])?;
                    }
                }
            }
        }
        find_near(looks, &bands, rules.near_bits, &folder, &mut marks)?;
        for partition in classes.into_partitions() {
            let mut entries = decode(&partition?, Entry::decode);
            entries.retain(|entry| !marks.is_skipped(entry.place));
            entries.sort_unstable();
            for class in entries.chunk_by(|a, b| a.label == b.label) {
                for entry in class.iter().skip(per_class as usize) {
                    marks.push(Mark::new(entry.place, Some(Skip::ClassFull), None))?;
                }
            }
        }
        let findings = marks.spool.into_partitions().map(|partition| {
            let mut all = decode(&partition?, Mark::decode);
            all.sort_unstable();
            // Of several marks of one sample the first counts.
            all.dedup_by_key(|mark| mark.place);
            Ok(all.chunk_by(|a, b| a.place.0 == b.place.0).map(|of| (of[0].place.0, of.to_vec())).collect())
        });
        Ok(Found { skips: marks.skips, findings: Box::new(findings) })
    }
}

fn decode<const N: usize, T>(partition: &[u8], one: impl Fn(&[u8; N]) -> T) -> Vec<T> {
    partition.as_chunks().0.iter().map(one).collect()
}

/// Which samples of one content, sorted by label and key, are skipped: all from a place on.
fn judge(same: &[Record], many_urls: usize) -> (Skip, usize) {
    let several = same.first().map(|record| record.label) != same.last().map(|record| record.label);
    match same.len() {
        n if n > many_urls => (Skip::ManyUrls, 0),
        _ if several => (Skip::SeveralClasses, 0),
        _ => (Skip::Duplicate, 1),
    }
}

/// Marks what looks alike, one band of the hash after the other.
fn find_near(
    mut looks: Spool,
    bands: &[u64],
    bits: u32,
    folder: &Option<PathBuf>,
    marks: &mut Marks,
) -> io::Result<()> {
    for (at, &band) in bands.iter().enumerate() {
        let mut next = Spool::new(folder.clone());
        for partition in looks.into_partitions() {
            let mut looks = decode(&partition?, Look::decode);
            looks.sort_unstable();
            if let Some(&band) = bands.get(at + 1) {
                for look in &looks {
                    next.push(near::partition(look.hash, band), &[&look.encode()])?;
                }
            }
            let groups: Vec<&[Look]> = looks.chunk_by(|a, b| a.hash == b.hash).collect();
            let hashes: Vec<u64> = groups.iter().map(|group| group[0].hash).collect();
            // Equal hashes meet in each band, so the first one is enough.
            let mut nearest: Vec<Nearest> =
                groups.iter().map(|group| if at == 0 { Nearest::of(group, 0) } else { Nearest::default() }).collect();
            near::pairs(&hashes, band, bits, &mut |a, b| {
                let distance = (hashes[a] ^ hashes[b]).count_ones() as u8;
                nearest[a].take(Nearest::of(groups[b], distance));
                nearest[b].take(Nearest::of(groups[a], distance));
            });
            for (group, nearest) in groups.iter().zip(nearest) {
                for look in *group {
                    let (skip, like) = match (look.train, nearest.train) {
                        (false, Some(like)) => (Some(Skip::NearTraining), Some(like)),
                        (false, None) => (None, nearest.other),
                        (true, like) => (None, like),
                    };
                    // Of two that count, the second one is told of.
                    if let Some(like) = like.filter(|&(key, _)| skip.is_some() || key < look.place.key) {
                        marks.push(Mark::new(look.place, skip, Some(like)))?;
                    }
                }
            }
        }
        looks = next;
    }
    Ok(())
}

/// The lowest key, and in how many bits it differs, of the pictures that are alike: those that train, and the others.
#[derive(Debug, Clone, Copy, Default)]
struct Nearest {
    train: Option<(u64, u8)>,
    other: Option<(u64, u8)>,
}

impl Nearest {
    /// A group is sorted by key.
    fn of(group: &[Look], distance: u8) -> Self {
        let first = |train| group.iter().find(|look| look.train == train).map(|look| (look.place.key, distance));
        Self { train: first(true), other: first(false) }
    }

    fn take(&mut self, other: Self) {
        let lower = |a: Option<(u64, u8)>, b: Option<(u64, u8)>| a.into_iter().chain(b).min();
        *self = Self { train: lower(self.train, other.train), other: lower(self.other, other.other) };
    }
}

/// One kept sample, as it is sorted by content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Record {
    sha256: [u8; 32],
    label: u32,
    place: Place,
    train: bool,
    phash: Option<u64>,
}

/// As it is sorted by its look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Look {
    hash: u64,
    place: Place,
    train: bool,
}

/// As it is sorted by class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    label: u32,
    place: Place,
}

impl Place {
    const BYTES: usize = 16;

    fn encode(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(&self.key.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.shard.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.ordinal.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Self {
        Self { key: u64_at(bytes, 0), shard: u32_at(bytes, 8), ordinal: u32_at(bytes, 12) }
    }
}

impl Record {
    const BYTES: usize = 46 + Place::BYTES;

    fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..32].copy_from_slice(&self.sha256);
        bytes[32..36].copy_from_slice(&self.label.to_le_bytes());
        bytes[36] = self.train.into();
        bytes[37] = self.phash.is_some().into();
        bytes[38..46].copy_from_slice(&self.phash.unwrap_or(0).to_le_bytes());
        self.place.encode(&mut bytes[46..]);
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        Self {
            sha256: std::array::from_fn(|i| bytes[i]),
            label: u32_at(bytes, 32),
            train: bytes[36] != 0,
            phash: (bytes[37] != 0).then(|| u64_at(bytes, 38)),
            place: Place::decode(&bytes[46..]),
        }
    }
}

impl Look {
    const BYTES: usize = 9 + Place::BYTES;

    fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.hash.to_le_bytes());
        bytes[8] = self.train.into();
        self.place.encode(&mut bytes[9..]);
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        Self { hash: u64_at(bytes, 0), train: bytes[8] != 0, place: Place::decode(&bytes[9..]) }
    }
}

impl Entry {
    const BYTES: usize = 4 + Place::BYTES;

    fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.label.to_le_bytes());
        self.place.encode(&mut bytes[4..]);
        bytes
    }

    fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        Self { label: u32_at(bytes, 0), place: Place::decode(&bytes[4..]) }
    }
}

fn unhex(digits: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests;
