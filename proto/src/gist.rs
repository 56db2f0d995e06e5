//! The gist of a shard: what sealing needs of its index and its outcomes, in a tenth of the time that those take to
//! read. Each version of a manifest leaves the gists of the shards that it has read, so that the next one reads those
//! of new shards alone.
//!
//! Gists lie together in objects (see [`crate::keys::gists`]), each with shards of one round; a [`GistList`] beside the
//! manifest names the objects that hold all of its shards, older versions' among them. They say nothing that the shards
//! do not say: where one is gone, damaged or of another format, its shards are read instead.
//!
//! An object is packed by zstd. In it stand a [`Head`] and then the gists, each a JSON document behind its length and
//! the columns of the rows, all numbers little-endian.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::columns::has_several_classes;
use crate::format::{FormatError, stored};
use crate::index::StoredFile;
use crate::outcomes::OutcomeRow;
use crate::rejection::{outcome_name, parse_outcome};
use crate::shard::{Moments, sha256_hex};
use crate::{DatasetId, Outcome, ShardIndex, Split};

/// The number of the format of objects of gists that this program reads and writes.
const FORMAT: u32 = 1;

/// Which objects hold the gists of a version's shards. Shards that are damaged, or whose slice was closed, have none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GistList {
    /// Of this format: 1.
    pub format: u32,
    /// Whose shards they are.
    pub dataset: DatasetId,
    /// Of the manifest.
    pub version: u32,
    /// When the latest of the version's skips, findings and gists was written, in microseconds since 1970 by the
    /// store's clock: one that was written later is not the one that was named.
    pub written_micros: i64,
    /// Each shard is in one of them at the most.
    pub objects: Vec<GistObject>,
}

stored!(GistList, "list of gists", format);

/// An object with gists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GistObject {
    /// The object.
    pub file: StoredFile,
    /// The round of its shards.
    pub round: u32,
    /// Those of its shards whose gist still holds, in order.
    pub shards: Vec<u32>,
}

/// An object as a listing has it. Committed objects never change: one that looks otherwise than it did is read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// Its length.
    pub bytes: u64,
    /// In microseconds since 1970, by the store's clock.
    pub modified_micros: i64,
}

/// What sealing needs of one shard.
#[derive(Debug, Clone, PartialEq)]
pub struct Gist {
    /// The shard's.
    pub index: ShardIndex,
    /// Of the index and the outcomes, as they were read; none: they were not listed at that time.
    pub marks: Option<[Mark; 2]>,
    /// The rows of the samples, in the order of the samples, then all others.
    pub rows: Vec<GistRow>,
    /// In the order of their ordinals.
    pub samples: Vec<GistSample>,
}

/// What became of one URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GistRow {
    /// Its ordinal in the catalog.
    pub key: i64,
    /// Of its class.
    pub label: u32,
    /// What became of it.
    pub outcome: Outcome,
    /// Of the last answer.
    pub http_status: Option<i32>,
}

/// More about a kept one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GistSample {
    /// Its split.
    pub split: Split,
    /// The list has it under several classes.
    pub several_classes: bool,
    /// Of the bytes as fetched; none if the row has none that can be read.
    pub sha256: Option<[u8; 32]>,
    /// The perceptual hash.
    pub phash: Option<u64>,
    /// The place of its block in the tar of its split.
    pub block: u32,
    /// Of the stored image.
    pub moments: Moments,
}

/// What an object of gists begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    format: u32,
    dataset: DatasetId,
    round: u32,
    shards: u32,
}

/// What a gist begins with.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GistHead {
    index: ShardIndex,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    marks: Option<[Mark; 2]>,
    /// Names and statuses of HTTP, of which the rows have the places.
    outcomes: Vec<(String, Option<i32>)>,
    rows: u32,
    samples: u32,
}

const SEVERAL_CLASSES: u8 = 1 << 2;
const HAS_PHASH: u8 = 1 << 3;
const HAS_SHA256: u8 = 1 << 4;

impl Gist {
    /// Of a shard's index and all of its rows, which are brought into the gist's order; `label`: of a synset.
    ///
    /// # Errors
    /// If a row cannot be right.
    pub fn new(
        index: ShardIndex,
        rows: &mut [OutcomeRow],
        label: impl Fn(&str) -> Option<u32>,
    ) -> Result<Self, String> {
        // The samples' order: split by split, each in the order of its tar.
        rows.sort_by_key(|row| match row.split() {
            Some(split) => (false, Some(split), row.offset),
            None => (true, None, None),
        });
        let mut gist = Self { index, marks: None, rows: Vec::with_capacity(rows.len()), samples: Vec::new() };
        for row in rows {
            let unknown = || format!("row {}: {:?} is no class of the dataset", row.key, row.synset);
            let label = label(&row.synset).ok_or_else(unknown)?;
            let outcome = row.outcome().map_err(|error| error.to_string())?;
            gist.rows.push(GistRow { key: row.key, label, outcome, http_status: row.http_status });
            let Some(split) = row.split() else { continue };
            let blocks = gist.index.tars.get(&split).map_or(&[][..], |tar| &tar.blocks);
            let offset = row.offset.unwrap_or(0).max(0) as u64;
            let mut sha256 = [0; 32];
            let is_hex = hex::decode_to_slice(row.sha256.as_deref().unwrap_or_default(), &mut sha256).is_ok();
            gist.samples.push(GistSample {
                split,
                several_classes: row.columns.as_deref().is_some_and(has_several_classes),
                sha256: is_hex.then_some(sha256),
                phash: row.phash.as_deref().and_then(|hash| u64::from_str_radix(hash, 16).ok()),
                block: blocks.partition_point(|block| block.offset <= offset).saturating_sub(1) as u32,
                moments: row.moments(),
            });
        }
        Ok(gist)
    }

    /// A digest of what it says, however its shard's objects were listed.
    pub fn digest(&self) -> String {
        let mut bytes = Vec::new();
        Self { marks: None, ..self.clone() }.encode(&mut bytes);
        sha256_hex(&bytes)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let Self { index, marks, rows, samples } = self;
        let (mut kinds, mut places) = (BTreeMap::new(), Vec::new());
        for row in rows {
            let next = kinds.len() as u32;
            let place: &mut u32 = kinds.entry((outcome_name(row.outcome), row.http_status)).or_insert(next);
            places.extend(place.to_le_bytes());
        }
        let mut outcomes = vec![(String::new(), None); kinds.len()];
        for ((name, http_status), place) in kinds {
            outcomes[place as usize] = (name.to_owned(), http_status);
        }
        let head = GistHead {
            index: index.clone(),
            marks: *marks,
            outcomes,
            rows: rows.len() as u32,
            samples: samples.len() as u32,
        };
        push_json(out, &head);
        let mut before = 0;
        for row in rows {
            // Keys follow each other closely, and zstd finds more in the distances.
            out.extend(row.key.wrapping_sub(before).to_le_bytes());
            before = row.key;
        }
        rows.iter().for_each(|row| out.extend(row.label.to_le_bytes()));
        out.extend(places);
        out.extend(samples.iter().map(|sample| {
            let flag = |is: bool, flag| if is { flag } else { 0 };
            sample.split as u8
                | flag(sample.several_classes, SEVERAL_CLASSES)
                | flag(sample.phash.is_some(), HAS_PHASH)
                | flag(sample.sha256.is_some(), HAS_SHA256)
        }));
        samples.iter().for_each(|sample| out.extend(sample.block.to_le_bytes()));
        samples.iter().for_each(|sample| out.extend(sample.sha256.unwrap_or_default()));
        samples.iter().for_each(|sample| out.extend(sample.phash.unwrap_or_default().to_le_bytes()));
        for column in 0..7 {
            samples.iter().for_each(|sample| out.extend(numbers(&sample.moments)[column].to_le_bytes()));
        }
    }

    fn decode(bytes: &mut &[u8]) -> Result<Self, FormatError> {
        let GistHead { index, marks, outcomes, rows, samples } = take_json(bytes)?;
        let (n, s) = (rows as usize, samples as usize);
        if s > n {
            return Err(wrong("it has more samples than rows"));
        }
        let kind =
            |(name, http_status): &(String, Option<i32>)| Ok((parse_outcome(name).map_err(wrong)?, *http_status));
        let kinds = outcomes.iter().map(kind).collect::<Result<Vec<(Outcome, Option<i32>)>, FormatError>>()?;
        let mut key = 0i64;
        let keys = words(take(bytes, n * 8)?).map(|distance| {
            key = key.wrapping_add(distance as i64);
            key
        });
        let keys: Vec<i64> = keys.collect();
        let labels = halves(take(bytes, n * 4)?);
        let places = halves(take(bytes, n * 4)?);
        let rows = keys.into_iter().zip(labels).zip(places).map(|((key, label), place)| {
            let kind = kinds.get(place as usize).ok_or_else(|| wrong("a row has an outcome without name"))?;
            let (outcome, http_status) = *kind;
            Ok(GistRow { key, label, outcome, http_status })
        });
        let rows = rows.collect::<Result<Vec<_>, FormatError>>()?;
        let flags = take(bytes, s)?;
        let blocks = halves(take(bytes, s * 4)?);
        let sha256s = take(bytes, s * 32)?.as_chunks::<32>().0;
        let phashes = words(take(bytes, s * 8)?);
        let moments: Vec<u64> = words(take(bytes, s * 56)?).collect();
        let parts = flags.iter().zip(blocks).zip(sha256s).zip(phashes).enumerate();
        let samples = parts.map(|(at, (((&flags, block), &sha256), phash))| {
            let split = Split::ALL.get(usize::from(flags & 3)).ok_or_else(|| wrong("a sample has no split"))?;
            Ok(GistSample {
                split: *split,
                several_classes: flags & SEVERAL_CLASSES != 0,
                sha256: (flags & HAS_SHA256 != 0).then_some(sha256),
                phash: (flags & HAS_PHASH != 0).then_some(phash),
                block,
                moments: moments_of(std::array::from_fn(|column| moments[column * s + at])),
            })
        });
        let samples = samples.collect::<Result<Vec<_>, FormatError>>()?;
        Ok(Self { index, marks, rows, samples })
    }
}

/// Packs gists of one round into an object.
#[derive(Debug, Default)]
pub struct GistWriter {
    shards: Vec<u32>,
    bytes: Vec<u8>,
}

impl GistWriter {
    /// Adds one.
    pub fn push(&mut self, gist: &Gist) {
        gist.encode(&mut self.bytes);
        self.shards.push(gist.index.shard);
    }

    /// Bytes so far, before they are packed.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.shards.is_empty()
    }

    /// The shards, and the stored form.
    ///
    /// # Errors
    /// If zstd has no memory.
    pub fn finish(self, dataset: &DatasetId, round: u32) -> std::io::Result<(Vec<u32>, Vec<u8>)> {
        let head = Head { format: FORMAT, dataset: dataset.clone(), round, shards: self.shards.len() as u32 };
        let mut out = Vec::new();
        push_json(&mut out, &head);
        out.extend(self.bytes);
        Ok((self.shards, zstd::encode_all(&out[..], 1)?))
    }
}

/// The gists of an object that holds those of a dataset's round.
///
/// # Errors
/// If it does not, or is of another format.
pub fn read(dataset: &DatasetId, round: u32, packed: &[u8]) -> Result<Vec<Gist>, FormatError> {
    let bytes = zstd::decode_all(packed).map_err(wrong)?;
    let mut rest = &bytes[..];
    let head: Head = take_json(&mut rest)?;
    if head.format != FORMAT {
        return Err(wrong(format!("they are of format {}: this program reads format {FORMAT}", head.format)));
    }
    if (&head.dataset, head.round) != (dataset, round) {
        return Err(wrong(format!("they are of {}, round {}", head.dataset, head.round)));
    }
    let gists = (0..head.shards).map(|_| Gist::decode(&mut rest)).collect::<Result<Vec<_>, _>>()?;
    match rest.is_empty() {
        true => Ok(gists),
        false => Err(wrong("there is something behind them")),
    }
}

fn wrong(what: impl std::fmt::Display) -> FormatError {
    FormatError(format!("gists: {what}"))
}

fn numbers(moments: &Moments) -> [u64; 7] {
    let Moments { pixels, sum: [a, b, c], sum_of_squares: [d, e, f] } = *moments;
    [pixels, a, b, c, d, e, f]
}

fn moments_of([pixels, a, b, c, d, e, f]: [u64; 7]) -> Moments {
    Moments { pixels, sum: [a, b, c], sum_of_squares: [d, e, f] }
}

fn push_json(out: &mut Vec<u8>, value: &impl Serialize) {
    let json = serde_json::to_vec(value).expect("structs of texts, numbers and lists are JSON");
    out.extend((json.len() as u32).to_le_bytes());
    out.extend(json);
}

fn take_json<T: DeserializeOwned>(bytes: &mut &[u8]) -> Result<T, FormatError> {
    let length = halves(take(bytes, 4)?).next().unwrap_or_default();
    serde_json::from_slice(take(bytes, length as usize)?).map_err(wrong)
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Result<&'a [u8], FormatError> {
    let (taken, rest) = bytes.split_at_checked(n).ok_or_else(|| wrong("they are cut"))?;
    *bytes = rest;
    Ok(taken)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word))
}

fn halves(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|half| u32::from_le_bytes(*half))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Tar;
    use crate::shard::Block;
    use crate::{Attempt, OutcomeCounts, Rejection, Stored};

    fn row(key: i64, sample: Option<(Split, i64)>) -> OutcomeRow {
        let mut row = OutcomeRow { key, synset: format!("n{}", key % 2), ..OutcomeRow::default() };
        row.outcome = if sample.is_some() { "kept" } else { "http_status" }.to_owned();
        row.http_status = sample.is_none().then_some(503);
        if let Some((split, offset)) = sample {
            row.split = Some(split.name().to_owned());
            row.offset = Some(offset);
            row.sha256 = Some(hex::encode([key as u8; 32]));
            row.phash = (key != 4).then(|| format!("{key:016x}"));
            row.set_moments(&Moments { pixels: 9, sum: [1, 2, key as u64], sum_of_squares: [4, 5, 6] });
        }
        row
    }

    fn gist(shard: u32) -> Gist {
        let blocks = vec![Block { offset: 0, length: 512, samples: 1 }, Block { offset: 512, length: 512, samples: 1 }];
        let tar = Tar {
            key: "k".to_owned(),
            bytes: 1024,
            sha256: "00".to_owned(),
            samples: 2,
            per_class: [(0, 2)].into_iter().collect(),
            blocks,
            moments: Moments::default(),
        };
        let index = ShardIndex {
            version: 1,
            nonce: "n".to_owned(),
            writer: "w".to_owned(),
            shard,
            attempt: Attempt { term: 9, n: 2 },
            outcomes: OutcomeCounts::from_iter([(Ok(()), 3), (Err(Rejection::Dns), 1)]),
            tars: BTreeMap::from([(Split::Train, tar)]),
            outcomes_file: None,
        };
        let mut rows = [
            row(7, None),
            row(3, Some((Split::Test, 512))),
            row(4, Some((Split::Train, 1000))),
            row(9, Some((Split::Train, 511))),
        ];
        let label = |synset: &str| ["n0", "n1"].iter().position(|known| *known == synset).map(|at| at as u32);
        let gist = Gist::new(index, &mut rows, label).expect("rows that are right");
        let mark = Mark { bytes: 5, modified_micros: 1_700_000_000_000 };
        Gist { marks: Some([mark; 2]), ..gist }
    }

    #[test]
    fn gists_are_read_back_samples_first_in_their_order() {
        let id: DatasetId = "birds-1".parse().expect("an id");
        let (one, two) = (gist(3), gist(5));
        assert_eq!(one.rows.iter().map(|row| row.key).collect::<Vec<_>>(), [9, 4, 3, 7]);
        assert_eq!(one.samples.iter().map(|sample| sample.block).collect::<Vec<_>>(), [0, 1, 0]);
        assert_eq!(one.samples.iter().map(|sample| sample.phash).collect::<Vec<_>>(), [Some(9), None, Some(3)]);
        let mut writer = GistWriter::default();
        writer.push(&one);
        writer.push(&two);
        let (shards, packed) = writer.finish(&id, 2).expect("memory");
        assert_eq!(shards, [3, 5]);
        assert_eq!(read(&id, 2, &packed).expect("own output"), [one.clone(), two.clone()]);
        assert!(read(&id, 1, &packed).is_err() && read(&"cats-1".parse().expect("an id"), 2, &packed).is_err());
        assert_ne!(one.digest(), two.digest());
        assert_eq!(Gist { marks: None, ..one.clone() }.digest(), one.digest());
        let mut other = one.clone();
        other.samples[2].moments.sum[1] += 1;
        assert_ne!(other.digest(), one.digest());
    }

    #[test]
    fn cut_gists_are_refused_wherever_they_are_cut() {
        let id: DatasetId = "birds-1".parse().expect("an id");
        let mut writer = GistWriter::default();
        writer.push(&gist(3));
        let (_, packed) = writer.finish(&id, 2).expect("memory");
        let bytes = zstd::decode_all(&packed[..]).expect("zstd");
        for end in 0..bytes.len() {
            let packed = zstd::encode_all(&bytes[..end], 1).expect("memory");
            assert!(read(&id, 2, &packed).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_list_of_gists_is_read_back() {
        let file = StoredFile { key: "k".to_owned(), bytes: 5, sha256: "00".to_owned() };
        let list = GistList {
            format: 1,
            dataset: "birds-1".parse().expect("an id"),
            version: 3,
            written_micros: 1_700_000_000_000_000,
            objects: vec![GistObject { file, round: 2, shards: vec![7, 9] }],
        };
        assert_eq!(GistList::from_json(&list.to_json()).expect("own output"), list);
        assert!(GistList::from_json(&GistList { format: 2, ..list }.to_json()).is_err());
    }
}
