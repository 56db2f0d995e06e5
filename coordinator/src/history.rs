//! What became of each URL so far: the outcomes of committed shards, read from the latest round to the first, so that a
//! URL's first row is *the* outcome and all others are superseded.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use proto::index::StoredFile;
use proto::outcomes::{OutcomeRow, closed_rows};
use proto::round::Round;
use proto::shard::sha256_hex;
use proto::{DatasetId, Rejection, ShardIndex, Stored, keys, slice, table};
use tokio::runtime::Handle;

use crate::error::Error;
use crate::store::{Store, StoreError};

/// Shards whose outcomes are read at the same time.
const PARALLEL: usize = 8;

/// Why what became of URLs cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HistoryError {
    /// What was committed is not what it must be; it would be the same each time.
    #[error("{key}: {what}")]
    Corrupt { key: String, what: String },
    /// Worth another try.
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl From<HistoryError> for Error {
    fn from(error: HistoryError) -> Self {
        match error {
            HistoryError::Store(error) => Self::Store(error),
            error @ HistoryError::Corrupt { .. } => Self::Local(error.to_string()),
        }
    }
}

/// A dataset's committed shards.
pub(crate) struct History<'a> {
    pub(crate) handle: &'a Handle,
    pub(crate) store: &'a Store,
    pub(crate) dataset: &'a DatasetId,
    pub(crate) rounds: &'a [Round],
}

/// One bit for each key that has been handed out; none if there is one round, which has each key once.
#[derive(Debug, Default)]
pub(crate) struct Seen(pub(crate) Vec<u64>);

impl Seen {
    fn new(rounds: &[Round]) -> Self {
        let keys = rounds.last().filter(|_| rounds.len() > 1).map_or(0, |last| last.first_key + last.new_urls);
        Self(vec![0; keys.div_ceil(64) as usize])
    }

    /// Whether the key is there.
    pub(crate) fn contains(&self, key: i64) -> bool {
        self.0.get(key as usize / 64).is_some_and(|word| word & (1 << (key % 64)) != 0)
    }

    /// Whether the key is new.
    pub(crate) fn insert(&mut self, key: i64) -> bool {
        let Some(word) = self.0.get_mut(key as usize / 64) else { return true };
        let new = *word & (1 << (key % 64)) == 0;
        *word |= 1 << (key % 64);
        new
    }
}

impl History<'_> {
    /// The indexes of all shards, by number.
    pub(crate) fn indexes(&self) -> Result<BTreeMap<u32, ShardIndex>, HistoryError> {
        let shards = || self.rounds.iter().flat_map(Round::shards);
        let wanted = shards().map(|shard| keys::index(&self.dataset.shard(shard))).collect();
        let mut indexes = BTreeMap::new();
        let mut stored = std::pin::pin!(self.store.get_each(wanted));
        while let Some((key, json)) = self.handle.block_on(stored.try_next())? {
            let index = ShardIndex::from_json(&json).map_err(|error| corrupt(&key, error))?;
            indexes.insert(index.shard, index);
        }
        if let Some(missing) = shards().find(|shard| !indexes.contains_key(shard)) {
            self.handle.block_on(self.store.need(&keys::index(&self.dataset.shard(missing))))?;
        }
        Ok(indexes)
    }

    /// Hands out the rows of each shard, rounds from the last to the first. Of each row, whether it is its URL's
    /// latest.
    pub(crate) fn latest_first<E: From<HistoryError>>(
        &self,
        indexes: &BTreeMap<u32, ShardIndex>,
        mut each: impl FnMut(&ShardIndex, Vec<(OutcomeRow, bool)>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut seen = Seen::new(self.rounds);
        for round in self.rounds.iter().rev() {
            let of_round = round.shards().filter_map(|shard| indexes.get(&shard));
            self.each(of_round, |index, rows| {
                // A round has a URL once.
                let row = |row: OutcomeRow| {
                    let latest = seen.insert(row.key);
                    (row, latest)
                };
                each(index, rows.into_iter().map(row).collect())
            })?;
        }
        Ok(())
    }

    /// The keys that have failed in more rounds than one; what nobody got to has not failed. None if that cannot be.
    pub(crate) fn failed_twice(&self, indexes: &BTreeMap<u32, ShardIndex>) -> Result<Seen, HistoryError> {
        let (mut once, mut twice) = (Seen::new(self.rounds), Seen::new(self.rounds));
        if self.rounds.len() > 1 {
            self.each(indexes.values(), |_, rows| -> Result<(), HistoryError> {
                for row in rows {
                    let Ok(Err(rejection)) = row.outcome() else { continue };
                    let failed = rejection != Rejection::Unfetched && rejection.is_transient(row.http_status);
                    if failed && !once.insert(row.key) {
                        twice.insert(row.key);
                    }
                }
                Ok(())
            })?;
        }
        Ok(twice)
    }

    /// Hands out the rows of some shards; those of a slice that failed are made of its URLs.
    pub(crate) fn each<'a, E: From<HistoryError>>(
        &self,
        indexes: impl Iterator<Item = &'a ShardIndex>,
        mut each: impl FnMut(&ShardIndex, Vec<OutcomeRow>) -> Result<(), E>,
    ) -> Result<(), E> {
        let indexes: Vec<&ShardIndex> = indexes.collect();
        let key = |index: &ShardIndex| match &index.outcomes_file {
            Some(file) => file.key.clone(),
            None => keys::slice(&self.dataset.shard(index.shard)),
        };
        for group in indexes.chunks(PARALLEL) {
            let files: Vec<String> = group.iter().map(|index| key(index)).collect();
            let reads = self.handle.block_on(futures::future::join_all(files.iter().map(|key| self.store.need(key))));
            for ((&index, key), bytes) in group.iter().zip(&files).zip(reads) {
                let bytes = bytes.map_err(HistoryError::from)?;
                let rows = match &index.outcomes_file {
                    Some(file) => outcome_rows(file, bytes)?,
                    None => {
                        let outcome =
                            index.outcomes.iter().next().map_or(Err(Rejection::SliceFailed), |(only, _)| only);
                        closed_rows(&bytes, outcome).map_err(|error| corrupt(key, error))?
                    }
                };
                each(index, rows)?;
            }
        }
        Ok(())
    }

    /// Hands out the synset and URL of every entry of every slice; one that was fetched again comes again.
    pub(crate) fn each_listed<E: From<HistoryError>>(
        &self,
        mut each: impl FnMut(&str, &str) -> Result<(), E>,
    ) -> Result<(), E> {
        let slices: Vec<u32> = self.rounds.iter().flat_map(Round::shards).collect();
        for group in slices.chunks(PARALLEL) {
            let files: Vec<String> = group.iter().map(|&slice| keys::slice(&self.dataset.shard(slice))).collect();
            let reads = self.handle.block_on(futures::future::join_all(files.iter().map(|key| self.store.need(key))));
            for (key, bytes) in files.iter().zip(reads) {
                let text = slice::unpack(&bytes.map_err(HistoryError::from)?).map_err(|error| corrupt(key, error))?;
                for entry in slice::entries(&text) {
                    let entry = entry.map_err(|error| corrupt(key, error))?;
                    each(entry.synset, entry.url)?;
                }
            }
        }
        Ok(())
    }
}

pub(crate) fn corrupt(key: &str, what: impl std::fmt::Display) -> HistoryError {
    HistoryError::Corrupt { key: key.to_owned(), what: what.to_string() }
}

fn outcome_rows(file: &StoredFile, bytes: bytes::Bytes) -> Result<Vec<OutcomeRow>, HistoryError> {
    if sha256_hex(&bytes) != file.sha256 {
        return Err(corrupt(&file.key, "its bytes are not those that the index names"));
    }
    table::read(bytes).map_err(|error| corrupt(&file.key, error))
}
