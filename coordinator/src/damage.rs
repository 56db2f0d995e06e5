//! Damage: committed objects that are gone, or are not what those that name them say. It is a finding with a name, and
//! not the end of a dataset. What seems damaged is read once more, whole, so that a torn answer is not taken for it,
//! and what a GET does not find is damage only if a listing does not have it either.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use proto::index::StoredFile;
use proto::manifest::DamagedShard;
use proto::outcomes::OutcomeRow;
use proto::shard::{Moments, sha256_hex};
use proto::{ShardId, ShardIndex, Split, Stored, keys, table};

use crate::store::{Store, StoreError};

/// What was read of a shard, or what is wrong with it.
pub(crate) type Read<T> = Result<T, DamagedShard>;

/// Labels by synset.
pub(crate) type Labels<'a> = HashMap<&'a str, u32>;

/// Whole reads after which something is damaged.
pub(crate) const READS: usize = 2;

/// What `parse` makes of an object that another one names, or what is wrong with it.
pub(crate) async fn read<T>(
    store: &Store,
    key: &str,
    parse: impl Fn(Bytes) -> Result<T, String>,
) -> Result<Result<T, String>, StoreError> {
    Ok(match find(store, key, parse).await? {
        Some(read) => read,
        None => {
            store.confirm_gone(key).await?;
            Err("it is gone".to_owned())
        }
    })
}

/// The same of an object that is part of a shard.
pub(crate) async fn read_of<T>(
    store: &Store,
    of: &ShardId,
    key: &str,
    parse: impl Fn(Bytes) -> Result<T, String>,
) -> Result<Read<T>, StoreError> {
    Ok(read(store, key, parse).await?.map_err(|what| damaged(of, key, what)))
}

/// A shard's index; none if there is no such object.
pub(crate) async fn find_index(store: &Store, of: &ShardId) -> Result<Option<Read<ShardIndex>>, StoreError> {
    let key = keys::index(of);
    let found = find(store, &key, |json| parse_index(of, &json)).await?;
    Ok(found.map(|read| read.map_err(|what| damaged(of, &key, what))))
}

/// The index of a shard that was committed.
pub(crate) async fn read_index(store: &Store, of: &ShardId) -> Result<Read<ShardIndex>, StoreError> {
    read_of(store, of, &keys::index(of), |json| parse_index(of, &json)).await
}

/// The same from the first bytes that were read of it.
pub(crate) async fn known_index(store: &Store, of: &ShardId, json: &[u8]) -> Result<Read<ShardIndex>, StoreError> {
    match parse_index(of, json) {
        Ok(index) => Ok(Ok(index)),
        Err(_) => read_index(store, of).await,
    }
}

/// The rows of a shard's outcomes, if they are those of which its index tells.
pub(crate) fn outcome_rows(
    labels: &Labels<'_>,
    index: &ShardIndex,
    file: &StoredFile,
    bytes: Bytes,
) -> Result<Vec<OutcomeRow>, String> {
    if sha256_hex(&bytes) != file.sha256 {
        return Err("its bytes are not those that its index names".to_owned());
    }
    let rows = table::read(bytes).map_err(|error| error.to_string())?;
    check_rows(labels, index, &rows).map(|()| rows)
}

/// Whether rows are those of which the index tells.
pub(crate) fn check_rows(labels: &Labels<'_>, index: &ShardIndex, rows: &[OutcomeRow]) -> Result<(), String> {
    let mut samples: BTreeMap<Split, (u32, Moments)> = BTreeMap::new();
    for row in rows {
        row.outcome().map(drop).map_err(|error| error.to_string())?;
        if !labels.contains_key(row.synset.as_str()) {
            return Err(format!("row {}: {:?} is no class of the dataset", row.key, row.synset));
        }
        if let Some(split) = row.split() {
            let (samples, moments) = samples.entry(split).or_default();
            *samples += 1;
            moments.add(&row.moments());
        }
    }
    for split in Split::ALL {
        let found = samples.get(&split).copied().unwrap_or_default();
        let tar = index.tars.get(&split).map_or_else(Default::default, |tar| (tar.samples, tar.moments));
        if found != tar {
            let (rows, samples) = (found.0, tar.0);
            return Err(format!("the {rows} rows that are kept for {split} are not the tar's {samples} samples"));
        }
    }
    match index.outcomes.total() == rows.len() as u64 {
        true => Ok(()),
        false => Err(format!("it has {} rows, and its index {}", rows.len(), index.outcomes.total())),
    }
}

pub(crate) fn damaged(of: &ShardId, key: &str, what: impl Into<String>) -> DamagedShard {
    DamagedShard { shard: of.shard, key: key.to_owned(), what: what.into() }
}

/// A shard's index, if it is that of this shard, and all that it names is its own attempt's.
pub(crate) fn parse_index(of: &ShardId, json: &[u8]) -> Result<ShardIndex, String> {
    let index = ShardIndex::from_json(json).map_err(|error| error.to_string())?;
    if index.shard != of.shard {
        return Err(format!("it is the index of shard {}", index.shard));
    }
    let tars = index.tars.iter().map(|(split, tar)| (&tar.key, keys::tar(of, *split, index.attempt)));
    let outcomes = index.outcomes_file.iter().map(|file| (&file.key, keys::outcomes(of, index.attempt)));
    match tars.chain(outcomes).find(|(named, own)| *named != own) {
        Some((named, _)) => Err(format!("it names {named}, which is not its attempt's ({})", index.attempt)),
        None => Ok(index),
    }
}

async fn find<T>(
    store: &Store,
    key: &str,
    parse: impl Fn(Bytes) -> Result<T, String>,
) -> Result<Option<Result<T, String>>, StoreError> {
    let mut wrong = String::new();
    for _ in 0..READS {
        let Some(bytes) = store.get(key).await? else { return Ok(None) };
        match parse(bytes) {
            Ok(parsed) => return Ok(Some(Ok(parsed))),
            Err(what) => wrong = what,
        }
    }
    Ok(Some(Err(wrong)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;
    use proto::{Attempt, OutcomeCounts};

    use super::*;

    #[test]
    fn no_flipped_bit_makes_an_index_that_of_another_shard_or_attempt() {
        let of = "birds-1".parse::<proto::DatasetId>().expect("an id").shard(7);
        let attempt = Attempt { term: 12, n: 345 };
        let file = StoredFile { key: keys::outcomes(&of, attempt), bytes: 5, sha256: "00".to_owned() };
        let index = ShardIndex {
            version: 1,
            nonce: "n".to_owned(),
            writer: "w".to_owned(),
            shard: of.shard,
            attempt,
            outcomes: OutcomeCounts::default(),
            tars: BTreeMap::new(),
            outcomes_file: Some(file.clone()),
        };
        let whole = index.to_json();
        assert_eq!(parse_index(&of, &whole), Ok(index));
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(index) = parse_index(&of, &flipped) {
                let named = index.outcomes_file.map(|file| file.key);
                assert_eq!((index.shard, index.attempt, named), (7, attempt, Some(file.key.clone())), "bit {bit}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_torn_once_is_read_again_and_what_is_gone_is_named() {
        let store = Store::new(Arc::new(InMemory::new()));
        store.put("a/1", Bytes::from("whole")).await.expect("memory takes it");
        let torn = std::cell::Cell::new(true);
        let parse = |bytes: Bytes| if torn.replace(false) { Err("torn".to_owned()) } else { Ok(bytes) };
        assert_eq!(read(&store, "a/1", parse).await.expect("reads"), Ok(Bytes::from("whole")));
        let refused = read(&store, "a/1", |_| Err::<(), _>("no".to_owned())).await.expect("reads");
        assert_eq!(refused, Err("no".to_owned()));
        assert_eq!(read(&store, "a/2", Ok).await.expect("reads"), Err("it is gone".to_owned()));
    }
}
