//! One shard: its slice, its index, and what that names.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use proto::columns::has_several_classes;
use proto::dataset_spec::UNLABELLED;
use proto::gist::Gist;
use proto::index::Tar;
use proto::outcomes::OutcomeRow;
use proto::round::Round;
use proto::shard::{sha256_hex, split_block};
use proto::{DatasetId, OutcomeCounts, ShardIndex, Split, keys, slice};
use sha2::{Digest, Sha256};

use super::Audit;
use crate::damage::{self, Labels};
use crate::store::StoreError;

/// What is known of a shard whose index can be read.
pub(super) struct Checked {
    pub(super) index: ShardIndex,
    /// The digest of its gist, if it was looked at deeply and is not closed.
    pub(super) gist: Option<String>,
}

impl Audit {
    /// Checks a shard; its index, if that can be read. `sealed`: a manifest names it, so it must be committed.
    pub(super) async fn check_shard(
        &self,
        id: &DatasetId,
        labels: &Labels<'_>,
        round: &Round,
        shard: u32,
        sealed: bool,
    ) -> Result<Option<Checked>, StoreError> {
        let of = id.shard(shard);
        let slice = &round.slices[(shard - round.first_slice) as usize];
        let entries = |bytes: Bytes| {
            if sha256_hex(&bytes) != slice.sha256 {
                return Err("its bytes are not those that its round names".to_owned());
            }
            let text = slice::unpack(&bytes).map_err(|error| error.to_string())?;
            let keys = slice::entries(&text).map(|entry| entry.map(|entry| entry.key as i64));
            let keys = keys.collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
            match keys.len() == slice.urls as usize {
                true => Ok(keys),
                false => Err(format!("it has {} URLs, and its round names {}", keys.len(), slice.urls)),
            }
        };
        let entries = self.object(&keys::slice(&of), entries).await?;
        let key = keys::index(&of);
        let index = match damage::find_index(&self.store, &of).await? {
            Some(Ok(index)) => index,
            Some(Err(damaged)) => {
                self.found(&damaged.key, damaged.what);
                return Ok(None);
            }
            None => {
                if sealed {
                    self.found(&key, "it is gone");
                }
                return Ok(None);
            }
        };
        if index.outcomes.total() != u64::from(slice.urls) {
            self.found(&key, format!("it counts {} URLs, and its round {}", index.outcomes.total(), slice.urls));
        }
        for (split, tar) in &index.tars {
            let blocks: u32 = tar.blocks.iter().map(|block| block.samples).sum();
            if (blocks, tar.per_class.total()) != (tar.samples, tar.samples) {
                self.found(&key, format!("its blocks or classes for {split} do not have its {} samples", tar.samples));
            }
            if let Some((label, _)) = tar.per_class.iter().find(|(label, _)| *label as usize >= labels.len()) {
                self.found(&key, format!("it counts label {label}, but the dataset has {} classes", labels.len()));
            }
        }
        let rows = match &index.outcomes_file {
            Some(file) => {
                self.object(&file.key, |bytes| {
                    let rows = damage::outcome_rows(labels, &index, file, bytes)?;
                    let counts: OutcomeCounts = rows.iter().filter_map(|row| Some((row.outcome().ok()?, 1))).collect();
                    if counts != index.outcomes {
                        return Err("its outcomes are not those that its index counts".to_owned());
                    }
                    Ok(rows)
                })
                .await?
            }
            None => None,
        };
        if let (Some(rows), Some(entries), Some(file)) = (&rows, &entries, &index.outcomes_file) {
            let mut keys: (Vec<i64>, Vec<i64>) = (rows.iter().map(|row| row.key).collect(), entries.clone());
            keys.0.sort_unstable();
            keys.1.sort_unstable();
            if keys.0 != keys.1 {
                self.found(&file.key, "its URLs are not those of its slice");
            }
        }
        for (split, tar) in &index.tars {
            match self.length(&tar.key).await? {
                Some(length) if length == tar.bytes => {
                    if self.deep {
                        self.check_tar(*split, tar, labels, rows.as_deref()).await?;
                    }
                }
                Some(length) => {
                    self.found(&tar.key, format!("it has {length} bytes, and its index names {}", tar.bytes));
                }
                None => self.found(&tar.key, "it is gone"),
            }
        }
        let gist = rows.filter(|_| self.deep).and_then(|mut rows| {
            let gist = Gist::new(index.clone(), &mut rows, |synset| labels.get(synset).copied());
            gist.ok().map(|gist| gist.digest())
        });
        Ok(Some(Checked { index, gist }))
    }

    /// Reads a tar through.
    async fn check_tar(
        &self,
        split: Split,
        tar: &Tar,
        labels: &Labels<'_>,
        rows: Option<&[OutcomeRow]>,
    ) -> Result<(), StoreError> {
        let samples: Option<HashMap<u64, u32>> = rows.map(|rows| {
            let of_split = rows.iter().filter(|row| row.split() == Some(split));
            // Samples of no class, or of several, say none.
            let unlabelled = labels.len() == 1 && labels.contains_key(UNLABELLED);
            let says_none = |row: &OutcomeRow| unlabelled || row.columns.as_deref().is_some_and(has_several_classes);
            let label = |row: &OutcomeRow| match says_none(row) {
                true => u32::MAX,
                false => labels.get(row.synset.as_str()).copied().unwrap_or(u32::MAX),
            };
            of_split.map(|row| (row.key.max(0) as u64, label(row))).collect()
        });
        let mut wrong = String::new();
        for _ in 0..damage::READS {
            match self.read_tar(tar, samples.as_ref()).await? {
                Ok(()) => return Ok(()),
                Err(what) => wrong = what,
            }
        }
        self.found(&tar.key, wrong);
        Ok(())
    }

    async fn read_tar(&self, tar: &Tar, rows: Option<&HashMap<u64, u32>>) -> Result<Result<(), String>, StoreError> {
        let Some(mut stream) = self.store.stream(&tar.key, None).await? else {
            return Ok(Err("it is gone".to_owned()));
        };
        let (mut hasher, mut pending, mut offset) = (Sha256::new(), BytesMut::new(), 0);
        let mut blocks = tar.blocks.iter();
        let mut block = blocks.next();
        let mut wrong = Ok(());
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|error| StoreError::new("get", &tar.key, error))?;
            hasher.update(&bytes);
            pending.extend_from_slice(&bytes);
            while let Some(whole) = block.filter(|block| wrong.is_ok() && pending.len() as u64 >= block.length) {
                let bytes = pending.split_to(whole.length as usize).freeze();
                if whole.offset != offset {
                    wrong = Err(format!("its index has a block at {}, where {offset} is the next", whole.offset));
                } else {
                    wrong = check_block(&bytes, whole.samples, rows);
                }
                offset += whole.length;
                block = blocks.next();
            }
            if block.is_none() || wrong.is_err() {
                pending.clear();
            }
        }
        if hex::encode(hasher.finalize()) != tar.sha256 {
            wrong = Err("its bytes are not those that its index names".to_owned());
        }
        Ok(wrong)
    }
}

/// Whether a block has its samples, and they are those of the rows.
fn check_block(bytes: &Bytes, samples: u32, rows: Option<&HashMap<u64, u32>>) -> Result<(), String> {
    let found = split_block(bytes).map_err(|error| error.to_string())?;
    if found.len() as u64 != u64::from(samples) {
        return Err(format!("a block has {} samples, and its index names {samples}", found.len()));
    }
    let stranger = found.iter().find(|sample| rows.is_some_and(|rows| rows.get(&sample.key) != Some(&sample.label)));
    match stranger {
        Some(sample) => Err(format!("sample {} of label {} is not in its outcomes", sample.key, sample.label)),
        None => Ok(()),
    }
}
