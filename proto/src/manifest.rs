//! The manifest: an immutable version of a dataset. Everything that a run reads is named in it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::format::stored;
use crate::index::StoredFile;
use crate::{DatasetId, OutcomeCounts, Resize, Split};

/// An immutable version of a dataset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Of this format: 1.
    pub format: u32,
    /// The writer's own random word.
    pub nonce: String,
    /// Of which it is a version.
    pub dataset: DatasetId,
    /// Counts the dataset's manifests from 1.
    pub version: u32,
    /// Rounds of the catalog that it covers, from the first.
    pub rounds: u32,
    /// How stored images came about.
    pub resize: Resize,
    /// Neither side of a stored image has fewer pixels.
    pub smallest_side: u32,
    /// In the order of the labels.
    pub classes: Vec<ManifestClass>,
    /// URLs by outcome, each by that of the latest round in which it was fetched.
    pub outcomes: OutcomeCounts,
    /// Kept samples that are skipped, by reason.
    pub skipped: BTreeMap<Skip, u64>,
    /// Samples that count although they look like another one with a lower key; the shards' findings name both.
    pub near_duplicates: u64,
    /// Of the training samples that count, on the scale of 0 to 1: red, green, blue.
    pub mean: [f64; 3],
    /// Likewise.
    pub std: [f64; 3],
    /// All of its rounds, in order of their numbers.
    pub shards: Vec<ManifestShard>,
    /// Those of the shards that were committed, and cannot be read any more: they have no samples here, and their URLs
    /// count as unfetched unless a later round has fetched them. In order of their numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<DamagedShard>,
}

stored!(Manifest, "manifest", format, nonce);

/// Why a kept sample does not count. A sample has one reason at the most, the first of these that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Skip {
    /// Its URL was fetched again in a later round.
    Superseded,
    /// The same bytes under so many different URLs that they can only be a placeholder which nobody had listed.
    ManyUrls,
    /// The same bytes under several classes, or a picture that the list has under several, all of which are kept.
    SeveralClasses,
    /// The same bytes as a sample of its class with a lower key.
    Duplicate,
    /// A picture that validates or tests, but looks like one that trains.
    NearTraining,
    /// A picture that trains, but looks like one that validates or tests, where the list says the splits.
    NearHeldOut,
    /// Beyond the first `per_class` of its class by key.
    ClassFull,
}

impl Skip {
    /// Every reason, the first one first.
    pub const ALL: [Skip; 7] = [
        Skip::Superseded,
        Skip::ManyUrls,
        Skip::SeveralClasses,
        Skip::Duplicate,
        Skip::NearTraining,
        Skip::NearHeldOut,
        Skip::ClassFull,
    ];

    /// The stable name.
    pub fn name(self) -> &'static str {
        match self {
            Skip::Superseded => "superseded",
            Skip::ManyUrls => "many_urls",
            Skip::SeveralClasses => "several_classes",
            Skip::Duplicate => "duplicate",
            Skip::NearTraining => "near_training",
            Skip::NearHeldOut => "near_held_out",
            Skip::ClassFull => "class_full",
        }
    }
}

/// A class and its samples that count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestClass {
    /// Its id.
    pub synset: String,
    /// For people.
    pub name: String,
    /// URLs that were listed for it.
    pub urls: u64,
    /// Its URLs by outcome.
    pub outcomes: OutcomeCounts,
    /// Samples by split.
    pub samples: BTreeMap<Split, u64>,
}

impl ManifestClass {
    /// Samples that count, of all splits.
    pub fn total(&self) -> u64 {
        self.samples.values().sum()
    }
}

/// One committed shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestShard {
    /// Its number.
    pub shard: u32,
    /// The round of the catalog that its slice belongs to.
    pub round: u32,
    /// The Parquet file with one row per URL (see [`crate::outcomes`]); none for a slice that failed.
    pub outcomes: Option<StoredFile>,
    /// The Parquet file of what was found about its samples (see [`crate::findings`]); none if nothing was.
    pub findings: Option<StoredFile>,
    /// The bitmap of its samples that are skipped; none if all count. See [`Skips`].
    pub skips: Option<StoredFile>,
    /// A tar for each split that has samples.
    pub tars: BTreeMap<Split, ManifestTar>,
}

/// A shard that is left out because of one of its objects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedShard {
    /// Its number.
    pub shard: u32,
    /// The object's key.
    pub key: String,
    /// What is wrong with it.
    pub what: String,
}

/// One tar of one shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestTar {
    /// Object key.
    pub key: String,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
    /// The place of its first sample in the shard's bitmap of skips.
    pub first: u32,
    /// In order.
    pub blocks: Vec<ManifestBlock>,
}

/// A part of a tar that is read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestBlock {
    /// From the tar's start, in bytes.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
    /// Samples in it.
    pub samples: u32,
    /// Samples in it that count.
    pub kept: u32,
}

impl Manifest {
    /// Whether a shard is left out because it is damaged.
    pub fn is_damaged(&self, shard: u32) -> bool {
        self.damaged.iter().any(|damaged| damaged.shard == shard)
    }

    /// Samples of a split that count.
    pub fn samples(&self, split: Split) -> u64 {
        self.classes.iter().filter_map(|class| class.samples.get(&split)).sum()
    }
}

/// Which samples of one shard are skipped: bit i (bit i % 8 of byte i / 8) is the shard's i-th sample, counting those
/// of the training tar first, then validation, then test.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Skips(Vec<u8>);

impl Skips {
    /// From the stored bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    /// The stored form.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Marks sample `i`.
    pub fn insert(&mut self, i: u32) {
        let byte = i as usize / 8;
        if byte >= self.0.len() {
            self.0.resize(byte + 1, 0);
        }
        self.0[byte] |= 1 << (i % 8);
    }

    /// Whether sample `i` is skipped.
    pub fn contains(&self, i: u32) -> bool {
        self.0.get(i as usize / 8).is_some_and(|byte| byte & (1 << (i % 8)) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Stored;

    #[test]
    fn a_manifest_of_older_programs_names_no_damage() {
        let mut manifest = Manifest {
            format: 1,
            nonce: "n".to_owned(),
            dataset: "birds-1".parse().expect("an id"),
            version: 2,
            rounds: 1,
            resize: Resize::default(),
            smallest_side: 256,
            classes: Vec::new(),
            outcomes: OutcomeCounts::default(),
            skipped: BTreeMap::new(),
            near_duplicates: 0,
            mean: [0.0; 3],
            std: [1.0; 3],
            shards: Vec::new(),
            damaged: Vec::new(),
        };
        let older = manifest.to_json();
        assert!(!String::from_utf8_lossy(&older).contains("damaged"));
        assert_eq!(Manifest::from_json(&older).expect("as it was written once"), manifest);
        manifest.damaged.push(DamagedShard { shard: 7, key: "k".to_owned(), what: "it is gone".to_owned() });
        let read = Manifest::from_json(&manifest.to_json()).expect("own output");
        assert!(read == manifest && read.is_damaged(7) && !read.is_damaged(8));
    }

    #[test]
    fn skips_hold_what_was_inserted_and_nothing_else() {
        let mut skips = Skips::default();
        for i in [0, 9, 1000] {
            skips.insert(i);
        }
        let read = Skips::from_bytes(skips.as_bytes());
        assert_eq!((0..2000).filter(|&i| read.contains(i)).collect::<Vec<_>>(), [0, 9, 1000]);
    }
}
