//! The index of a shard: the object that commits it (see [`crate::keys::index`]).

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::format::stored;
use crate::shard::{Block, Moments};
use crate::{Attempt, OutcomeCounts, Split};

/// The object that commits a shard: names its files, their checksums, counts, moments and blocks. Put with
/// put-if-absent; whatever it does not name is no part of the dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardIndex {
    /// Of this format: 1.
    pub version: u32,
    /// The writer's own random word: tells a put that was retried from one that lost.
    pub nonce: String,
    /// Who wrote it: a worker's name, or "coordinator" for a slice that it has closed.
    pub writer: String,
    /// The shard's number.
    pub shard: u32,
    /// That made it.
    pub attempt: Attempt,
    /// URLs of the slice by outcome; they add up to the slice.
    pub outcomes: OutcomeCounts,
    /// A tar for each split that has samples.
    pub tars: BTreeMap<Split, Tar>,
    /// The Parquet file with one row per URL. None: the slice failed and was closed, and all its URLs have the same
    /// outcome.
    pub outcomes_file: Option<StoredFile>,
}

stored!(ShardIndex, "shard index", version, nonce);

impl ShardIndex {
    /// Drops what it counts of each class, which is most of it: for those who hold thousands of them.
    pub fn forget_classes(&mut self) {
        self.tars.values_mut().for_each(|tar| tar.per_class = ClassCounts::default());
    }
}

/// One tar of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tar {
    /// Object key.
    pub key: String,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
    /// Its samples.
    pub samples: u32,
    /// Its samples by label.
    pub per_class: ClassCounts,
    /// In order; every sample is in exactly one.
    pub blocks: Vec<Block>,
    /// Over all its samples.
    pub moments: Moments,
}

/// An object with its checksum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Object key.
    pub key: String,
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
}

/// Samples by label. Of a thousand classes most have none in one shard, and are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ClassCounts(BTreeMap<u32, u32>);

impl ClassCounts {
    /// Counts one more sample of a class.
    pub fn add(&mut self, label: u32) {
        *self.0.entry(label).or_default() += 1;
    }

    /// The labels that have samples, in order, and how many.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> {
        self.0.iter().map(|(&label, &samples)| (label, samples))
    }

    /// Samples of all classes.
    pub fn total(&self) -> u32 {
        self.0.values().sum()
    }
}

impl FromIterator<(u32, u32)> for ClassCounts {
    fn from_iter<T: IntoIterator<Item = (u32, u32)>>(counts: T) -> Self {
        Self(counts.into_iter().filter(|(_, samples)| *samples > 0).collect())
    }
}

impl<'de> Deserialize<'de> for ClassCounts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Counts;

        impl<'de> Visitor<'de> for Counts {
            type Value = ClassCounts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("samples by label")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ClassCounts, A::Error> {
                std::iter::from_fn(|| map.next_entry().transpose()).collect()
            }

            /// Older indexes have a number for each class, also for those without samples.
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<ClassCounts, A::Error> {
                let samples = std::iter::from_fn(|| list.next_element().transpose());
                (0..).zip(samples).map(|(label, samples)| Ok((label, samples?))).collect()
            }
        }

        deserializer.deserialize_any(Counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rejection;
    use crate::format::Stored;

    #[test]
    fn an_index_is_read_back_also_one_that_names_every_class() {
        let moments = Moments { pixels: 2, sum: [1, 2, 3], sum_of_squares: [4, 5, 6] };
        let tar = Tar {
            key: "k".to_owned(),
            bytes: 1024,
            sha256: "00ff".to_owned(),
            samples: 3,
            per_class: [(1, 2), (900, 1)].into_iter().collect(),
            blocks: vec![Block { offset: 0, length: 512, samples: 3 }],
            moments,
        };
        let index = ShardIndex {
            version: 1,
            nonce: "n".to_owned(),
            writer: "w1".to_owned(),
            shard: 7,
            attempt: Attempt { term: 9, n: 2 },
            outcomes: [(Ok(()), 3), (Err(Rejection::Dns), 1)].into_iter().collect(),
            tars: [(Split::Train, tar)].into(),
            outcomes_file: Some(StoredFile { key: "o".to_owned(), bytes: 5, sha256: "00".to_owned() }),
        };
        let json = String::from_utf8(index.to_json()).expect("JSON");
        assert!(json.contains(r#""per_class":{"1":2,"900":1}"#) && !json.contains('\n'), "{json}");
        assert_eq!(ShardIndex::from_json(json.as_bytes()).expect("own output"), index);
        let old = json.replace(r#"{"1":2,"900":1}"#, "[0, 3, 0, 0]");
        let counts =
            &ShardIndex::from_json(old.as_bytes()).expect("as it was written once").tars[&Split::Train].per_class;
        assert_eq!((counts.iter().collect::<Vec<_>>(), counts.total()), (vec![(1, 3)], 3));
        let other = json.replace(r#""version":1"#, r#""version":2"#);
        assert!(ShardIndex::from_json(other.as_bytes()).expect_err("another").to_string().contains("of format 2"));
    }
}
