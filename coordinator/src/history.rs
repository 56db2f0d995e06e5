//! What became of each URL so far: the outcomes of committed shards. Of several rows of a URL that of the latest round
//! is *the* outcome, and all others are superseded.
//!
//! A shard that is damaged is noted, and its URLs come as `unfetched`, out of its slice.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use proto::manifest::DamagedShard;
use proto::outcomes::{OutcomeRow, closed_rows};
use proto::round::{Round, Slice};
use proto::shard::sha256_hex;
use proto::{Attempt, DatasetId, DatasetSpec, Rejection, ShardIndex, Split, keys, slice};
use tokio::runtime::Handle;
use tracing::warn;

use crate::damage::{self, Labels, Read};
use crate::error::Error;
use crate::store::{Store, StoreError};

/// Shards whose outcomes are read at the same time.
const PARALLEL: usize = 8;
/// Indexes that are read at the same time.
const INDEXES: usize = 32;

/// Why what became of URLs cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HistoryError {
    /// An object was sound when it was read first, and is not any more.
    #[error("{key}: {what}")]
    Corrupt { key: String, what: String },
    /// So much at once is not damage.
    #[error(
        "{damaged} of {shards} shards seem damaged, so the store may be another one, restored in part, or read without \
         the rights; shard {}: {}: {}. Mend that, then refresh the dataset; to leave such shards out and fetch their \
         URLs again: gleaner dataset refresh {dataset} --accept-damage", first.shard, first.key, first.what
    )]
    TooDamaged { dataset: String, damaged: usize, shards: usize, first: DamagedShard },
    /// Worth another try.
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl From<HistoryError> for Error {
    fn from(error: HistoryError) -> Self {
        match error {
            HistoryError::Store(error) => Self::Store(error),
            error @ HistoryError::Corrupt { .. } => Self::Local(error.to_string()),
            error @ HistoryError::TooDamaged { .. } => Self::Damaged(error.to_string()),
        }
    }
}

/// How much damage a reader goes on with: one shard, and 1 % of them, beside those that are known.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tolerance {
    /// Those that the latest manifest leaves out.
    pub(crate) known: HashSet<u32>,
    /// Somebody has said that any is.
    pub(crate) any: bool,
}

/// A dataset's committed shards.
pub(crate) struct History<'a> {
    pub(crate) handle: &'a Handle,
    pub(crate) store: &'a Store,
    pub(crate) dataset: &'a DatasetId,
    pub(crate) rounds: &'a [Round],
    labels: Labels<'a>,
    tolerance: &'a Tolerance,
    damaged: RefCell<BTreeMap<u32, DamagedShard>>,
}

/// One bit for each key that has been handed out; none if there is one round, which has each key once.
#[derive(Debug, Default)]
pub(crate) struct Seen(pub(crate) Vec<u64>);

impl Seen {
    pub(crate) fn new(rounds: &[Round]) -> Self {
        let keys = rounds.last().filter(|_| rounds.len() > 1).map_or(0, Round::end_key);
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

impl<'a> History<'a> {
    pub(crate) fn new(
        handle: &'a Handle,
        store: &'a Store,
        (dataset, spec): (&'a DatasetId, &'a DatasetSpec),
        rounds: &'a [Round],
        tolerance: &'a Tolerance,
    ) -> Self {
        let labels = spec.classes.iter().zip(0..).map(|(class, label)| (class.synset.as_str(), label)).collect();
        Self { handle, store, dataset, rounds, labels, tolerance, damaged: RefCell::default() }
    }

    /// The label of a class.
    pub(crate) fn label(&self, synset: &str) -> Option<u32> {
        self.labels.get(synset).copied()
    }

    /// Whether the dataset has a class of this label.
    pub(crate) fn has_label(&self, label: u32) -> bool {
        (label as usize) < self.labels.len()
    }

    /// What has turned out to be damaged so far, by shard.
    pub(crate) fn damaged(&self) -> BTreeMap<u32, DamagedShard> {
        self.damaged.borrow().clone()
    }

    /// The indexes of these shards, by number. In the place of one that is damaged, or whose tars are, stands that of a
    /// slice of which nothing was fetched.
    pub(crate) fn indexes_of(
        &self,
        shards: impl IntoIterator<Item = u32>,
        tars: &HashMap<String, u64>,
    ) -> Result<BTreeMap<u32, ShardIndex>, HistoryError> {
        let mut indexes = BTreeMap::new();
        let read = futures::stream::iter(shards.into_iter().map(|shard| self.dataset.shard(shard)))
            .map(|of| async move { Ok::<_, StoreError>((of.shard, damage::read_index(self.store, &of).await?)) })
            .buffered(INDEXES);
        let mut read = std::pin::pin!(read);
        while let Some((shard, index)) = self.handle.block_on(read.try_next())? {
            let index = match index.and_then(|index| self.check_index(&index, tars).map(|()| index)) {
                Ok(index) => index,
                Err(damaged) => {
                    self.note(damaged)?;
                    self.stand_in(shard)
                }
            };
            indexes.insert(shard, index);
        }
        Ok(indexes)
    }

    /// Hands out the rows of these shards, some of which are read ahead.
    pub(crate) fn each<'i, E: From<HistoryError>>(
        &self,
        indexes: impl IntoIterator<Item = &'i ShardIndex>,
        mut each: impl FnMut(&ShardIndex, Vec<OutcomeRow>) -> Result<(), E>,
    ) -> Result<(), E> {
        let indexes: Vec<&ShardIndex> = indexes.into_iter().collect();
        for group in indexes.chunks(PARALLEL) {
            let reads = futures::future::join_all(group.iter().map(|index| self.rows(index)));
            for (&index, rows) in group.iter().zip(self.handle.block_on(reads)) {
                match rows.map_err(HistoryError::from)? {
                    Ok(rows) => each(index, rows)?,
                    Err(damaged) => {
                        self.note(damaged)?;
                        let index = self.stand_in(index.shard);
                        let rows = self.handle.block_on(self.rows(&index)).map_err(HistoryError::from)?;
                        // Without its slice, too, nobody knows its URLs.
                        each(&index, rows.unwrap_or_default())?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Hands out synset and URL of every entry of every slice; one that was fetched again comes again. Those of a damaged
    /// slice come from its shard's outcomes.
    pub(crate) fn each_listed<E: From<HistoryError>>(
        &self,
        indexes: &BTreeMap<u32, ShardIndex>,
        mut each: impl FnMut(&str, &str) -> Result<(), E>,
    ) -> Result<(), E> {
        let slices: Vec<u32> = self.rounds.iter().flat_map(Round::shards).collect();
        for group in slices.chunks(PARALLEL) {
            let reads = futures::future::join_all(group.iter().map(|&slice| self.slice(slice)));
            for (slice, text) in group.iter().zip(self.handle.block_on(reads)) {
                match text.map_err(HistoryError::from)? {
                    Ok(text) => {
                        for entry in slice::entries(&text) {
                            let entry = entry.map_err(|error| corrupt(&self.slice_key(*slice), error))?;
                            each(entry.synset, entry.url)?;
                        }
                    }
                    Err(damaged) => {
                        warn!(
                            key = damaged.key,
                            what = damaged.what,
                            "slice is damaged; its URLs come from its outcomes"
                        );
                        self.each(indexes.get(slice), |_, rows| {
                            rows.iter().try_for_each(|row| each(&row.synset, &row.url))
                        })?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The rows of a shard. Those of one that the coordinator has closed come from its slice.
    async fn rows(&self, index: &ShardIndex) -> Result<Read<Vec<OutcomeRow>>, StoreError> {
        let of = self.dataset.shard(index.shard);
        match &index.outcomes_file {
            Some(file) => {
                let parse = |bytes| damage::outcome_rows(&self.labels, index, file, bytes);
                damage::read_of(self.store, &of, &file.key, parse).await
            }
            None => {
                let only = index.outcomes.iter().next().map_or(Err(Rejection::SliceFailed), |(only, _)| only);
                let parse = |bytes: Bytes| {
                    self.check_slice(index.shard, &bytes)?;
                    let rows = closed_rows(&bytes, only).map_err(|error| error.to_string())?;
                    damage::check_rows(&self.labels, index, &rows).map(|()| rows)
                };
                damage::read_of(self.store, &of, &keys::slice(&of), parse).await
            }
        }
    }

    async fn slice(&self, shard: u32) -> Result<Read<String>, StoreError> {
        let parse = |bytes: Bytes| {
            self.check_slice(shard, &bytes)?;
            let text = slice::unpack(&bytes).map_err(|error| error.to_string())?;
            slice::entries(&text).try_for_each(|entry| entry.map(drop)).map_err(|error| error.to_string())?;
            Ok(text)
        };
        damage::read_of(self.store, &self.dataset.shard(shard), &self.slice_key(shard), parse).await
    }

    fn slice_key(&self, shard: u32) -> String {
        keys::slice(&self.dataset.shard(shard))
    }

    /// Lengths of the tars that are there, by their keys.
    pub(crate) fn tars(&self) -> Result<HashMap<String, u64>, StoreError> {
        let mut all = HashMap::new();
        for split in Split::ALL {
            let there = self.handle.block_on(self.store.objects(&keys::tars(self.dataset, split)))?;
            all.extend(there.into_iter().map(|tar| (tar.location.to_string(), tar.size)));
        }
        Ok(all)
    }

    /// Whether the tars that an index names are there.
    pub(crate) fn check_index(&self, index: &ShardIndex, tars: &HashMap<String, u64>) -> Read<()> {
        let of = self.dataset.shard(index.shard);
        for tar in index.tars.values() {
            match tars.get(&tar.key) {
                Some(&length) if length == tar.bytes => {}
                None => return Err(damage::damaged(&of, &tar.key, "it is gone")),
                Some(length) => {
                    let what = format!("it has {length} bytes, and its index names {}", tar.bytes);
                    return Err(damage::damaged(&of, &tar.key, what));
                }
            }
            let classes = self.labels.len();
            if let Some((label, _)) = tar.per_class.iter().find(|(label, _)| *label as usize >= classes) {
                let what = format!("it counts label {label}, but the dataset has {classes} classes");
                return Err(damage::damaged(&of, &keys::index(&of), what));
            }
        }
        Ok(())
    }

    fn check_slice(&self, shard: u32, bytes: &[u8]) -> Result<(), String> {
        match self.slice_of(shard).is_some_and(|slice| slice.sha256 == sha256_hex(bytes)) {
            true => Ok(()),
            false => Err("its bytes are not those that its round names".to_owned()),
        }
    }

    /// The round that a shard is of.
    pub(crate) fn round_of(&self, shard: u32) -> Option<&Round> {
        self.rounds.iter().find(|round| round.shards().contains(&shard))
    }

    fn slice_of(&self, shard: u32) -> Option<&Slice> {
        let round = self.round_of(shard)?;
        round.slices.get((shard - round.first_slice) as usize)
    }

    fn stand_in(&self, shard: u32) -> ShardIndex {
        let urls = self.slice_of(shard).map_or(0, |slice| slice.urls.into());
        ShardIndex {
            version: 1,
            nonce: String::new(),
            writer: String::new(),
            shard,
            attempt: Attempt { term: 0, n: 0 },
            outcomes: [(Err(Rejection::Unfetched), urls)].into_iter().collect(),
            tars: BTreeMap::new(),
            outcomes_file: None,
        }
    }

    fn note(&self, damage: DamagedShard) -> Result<(), HistoryError> {
        let mut all = self.damaged.borrow_mut();
        if all.contains_key(&damage.shard) {
            return Ok(());
        }
        let DamagedShard { shard, key, what } = &damage;
        warn!(dataset = &**self.dataset, shard, key, what, "shard is damaged; it is left out");
        all.insert(damage.shard, damage.clone());
        let damaged = all.keys().filter(|shard| !self.tolerance.known.contains(shard)).count();
        let shards = self.rounds.iter().map(|round| round.slices.len()).sum();
        match !self.tolerance.any && damaged > 1 && damaged * 100 > shards {
            true => {
                let dataset = self.dataset.name().to_owned();
                Err(HistoryError::TooDamaged { dataset, damaged, shards, first: damage })
            }
            false => Ok(()),
        }
    }
}

pub(crate) fn corrupt(key: &str, what: impl std::fmt::Display) -> HistoryError {
    HistoryError::Corrupt { key: key.to_owned(), what: what.to_string() }
}
