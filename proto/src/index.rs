//! The index of a shard: the object that commits it (see [`crate::keys::index`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Split;
use crate::format::stored;
use crate::shard::{Block, Moments};

/// The object that commits a shard: names its files, their checksums, counts, moments and blocks. Put with put-if-absent;
/// whatever it does not name is no part of the dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardIndex {
    /// Of this format: 1.
    pub version: u32,
    /// The writer's own random word: tells a put that was retried from one that lost.
    pub nonce: String,
    /// Who wrote it: a worker's name, or "coordinator" for a slice that failed.
    pub writer: String,
    /// The shard's number.
    pub shard: u32,
    /// `<term>.<n>`.
    pub attempt: String,
    /// URLs of the slice by outcome's name; they add up to the slice.
    pub outcomes: BTreeMap<String, u64>,
    /// A tar for each split that has samples.
    pub tars: BTreeMap<Split, Tar>,
    /// The Parquet file with one row per URL; none for a slice that failed.
    pub outcomes_file: Option<StoredFile>,
}

stored!(ShardIndex, "shard index", version, nonce);

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
    /// Its samples by label; classes without any at the end may be missing.
    pub per_class: Vec<u32>,
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
