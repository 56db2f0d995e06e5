//! One dataset: its spec, the rounds of its catalog, the shards, and the manifests that name them.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use futures::{StreamExt, TryStreamExt};
use proto::control::Control;
use proto::findings::Finding;
use proto::manifest::{Manifest, ManifestBlock, ManifestShard, Skips};
use proto::round::Round;
use proto::{DatasetId, DatasetSpec, OutcomeCounts, ShardIndex, Split, Stored, keys, table};

use super::shard::Checked;
use super::{Audit, PARALLEL, same};
use crate::damage::Labels;
use crate::datasets::was_committed;
use crate::store::StoreError;

impl Audit {
    /// Checks a dataset; the number of its committed shards. None: it is deleted, or was never committed.
    pub(super) async fn check_dataset(&self, id: &DatasetId) -> Result<Option<u64>, StoreError> {
        let folder = keys::dataset(id);
        let is_live = |keys: &[String]| !keys.contains(&keys::tombstone(id)) && was_committed(id, keys);
        if !is_live(&self.listing.keys(&folder)) {
            return Ok(None);
        }
        let shards = self.check_live(id).await?;
        // It may have been deleted meanwhile.
        if self.has_found(&folder) && !is_live(&self.store.list(&folder).await?) {
            self.forget(&folder);
            return Ok(None);
        }
        Ok(Some(shards))
    }

    async fn check_live(&self, id: &DatasetId) -> Result<u64, StoreError> {
        let parse = |json: bytes::Bytes| {
            let text = str::from_utf8(&json).map_err(|error| error.to_string())?;
            DatasetSpec::from_json(text).map_err(|error| error.to_string())
        };
        let spec = self.object(&keys::dataset_spec(id), parse).await?;
        let manifests = self.manifests(id).await?;
        let sealed = manifests.values().map(|manifest| manifest.rounds).max().unwrap_or(0);
        let rounds = self.rounds(id, sealed).await?;
        for key in self.listing.keys(&keys::controls(id)) {
            self.object(&key, |json| Control::from_json(&json).map_err(|error| error.to_string())).await?;
        }
        let Some(spec) = spec else { return Ok(0) };
        let labels: Labels<'_> =
            spec.classes.iter().zip(0..).map(|(class, label)| (class.synset.as_str(), label)).collect();
        let shards = rounds.iter().flat_map(|round| round.shards().map(move |shard| (round, shard)));
        let checks = shards.map(|(round, shard)| self.check_shard(id, &labels, round, shard, round.round <= sealed));
        let mut checked = futures::stream::iter(checks).buffer_unordered(PARALLEL);
        let (mut indexes, mut gists) = (BTreeMap::new(), BTreeMap::new());
        while let Some(shard) = checked.try_next().await? {
            let Some(Checked { index, gist }) = shard else { continue };
            gists.extend(gist.map(|gist| (index.shard, gist)));
            indexes.insert(index.shard, index);
        }
        drop(checked);
        let named: HashSet<u64> = rounds.iter().flat_map(Round::shards).map(u64::from).collect();
        for key in self.listing.keys(&keys::indexes(id)) {
            if !keys::number(&key).is_ok_and(|n| named.contains(&n)) {
                self.found(&key, "no round has such a shard");
            }
        }
        for manifest in manifests.values() {
            self.check_manifest(id, manifest, &rounds, &indexes).await?;
        }
        self.check_gists(id, manifests.values(), &gists).await?;
        if let Some(latest) = manifests.values().next_back() {
            let damaged: BTreeSet<u32> = latest.damaged.iter().map(|damaged| damaged.shard).collect();
            let is_left_out = |key: &str| {
                let part = key.strip_prefix(&keys::dataset(id)).is_some_and(|rest| {
                    ["/index/", "/outcomes/", "/shards/", "/slices/"].iter().any(|folder| rest.starts_with(folder))
                });
                part && keys::number(key).is_ok_and(|n| u32::try_from(n).is_ok_and(|n| damaged.contains(&n)))
            };
            self.leave_out(is_left_out);
        }
        Ok(indexes.len() as u64)
    }

    /// The rounds, as far as they follow each other; so many must be there.
    async fn rounds(&self, id: &DatasetId, sealed: u32) -> Result<Vec<Round>, StoreError> {
        // Not from the listing, which may be older than the indexes that it has of the latest round.
        let there = self.store.list(&keys::rounds(id)).await?;
        let last = there.iter().filter_map(|key| keys::number(key).ok()).max();
        let last = last.and_then(|last| u32::try_from(last).ok()).unwrap_or(0).max(sealed).max(1);
        let mut rounds: Vec<Round> = Vec::new();
        for number in 1..=last {
            let key = keys::round(id, number);
            let parse = |json: bytes::Bytes| {
                let round = Round::from_json(&json).map_err(|error| error.to_string())?;
                same("it is round", round.round, Some(number))?;
                follows(&round, rounds.last()).map(|()| round)
            };
            let Some(round) = self.object(&key, parse).await? else { break };
            rounds.push(round);
        }
        Ok(rounds)
    }

    async fn manifests(&self, id: &DatasetId) -> Result<BTreeMap<u32, Manifest>, StoreError> {
        let mut manifests = BTreeMap::new();
        let folder = keys::manifests(id);
        let is_manifest = |key: &&str| key.get(folder.len() + 1..).is_some_and(|name| !name.contains('/'));
        for key in self.listing.under(&folder).map(|(key, _)| key).filter(is_manifest) {
            let version = keys::number(key).ok().and_then(|n| u32::try_from(n).ok());
            let parse = |json: bytes::Bytes| {
                let manifest = Manifest::from_json(&json).map_err(|error| error.to_string())?;
                same("it is version", manifest.version, version)?;
                same("it is a manifest of", manifest.dataset.to_string(), Some(id.to_string()))?;
                Ok(manifest)
            };
            if let Some(manifest) = self.object(key, parse).await? {
                manifests.insert(manifest.version, manifest);
            }
        }
        Ok(manifests)
    }

    async fn check_manifest(
        &self,
        id: &DatasetId,
        manifest: &Manifest,
        rounds: &[Round],
        indexes: &BTreeMap<u32, ShardIndex>,
    ) -> Result<(), StoreError> {
        let key = keys::manifest(id, manifest.version);
        let covered = rounds.get(..manifest.rounds as usize);
        let Some(covered) = covered else {
            // What is wrong with the catalog is a finding already, if it is damaged.
            self.found(&key, format!("it covers {} rounds, of which {} can be read", manifest.rounds, rounds.len()));
            return Ok(());
        };
        let shards = covered.iter().flat_map(|round| round.shards().map(|shard| (round.round, shard)));
        if !manifest.shards.iter().map(|shard| (shard.round, shard.shard)).eq(shards) {
            self.found(&key, "its shards are not those of the rounds that it covers");
        }
        if let Err(what) = adds_up(manifest, covered) {
            self.found(&key, what);
        }
        let check = async |named: &ManifestShard| -> Result<(), StoreError> {
            let skips = match &named.skips {
                Some(file) => self.file(file, |bytes| Ok(Skips::from_bytes(&bytes))).await?,
                None => Some(Skips::default()),
            };
            if let Some(file) = &named.findings {
                let rows = |bytes| table::read::<Finding>(bytes).map(drop).map_err(|error| error.to_string());
                self.file(file, rows).await?;
            }
            if let (Some(skips), Some(index), false) =
                (skips, indexes.get(&named.shard), manifest.is_damaged(named.shard))
                && let Err(what) = names(named, index, &skips)
            {
                self.found(&key, format!("shard {}: {what}", named.shard));
            }
            Ok(())
        };
        futures::stream::iter(&manifest.shards).map(check).buffer_unordered(PARALLEL).try_collect().await
    }
}

/// Whether a round goes on where the last one ended, and is as large as its slices.
fn follows(round: &Round, last: Option<&Round>) -> Result<(), String> {
    let (slices, keys) = last.map_or((0, 0), |last| (last.shards().end, last.end_key()));
    if round.first_slice < slices {
        return Err(format!("its first slice is {}, when the last round's end at {slices}", round.first_slice));
    }
    if round.first_key != keys {
        return Err(format!("its first key is {}, when the last round's end at {keys}", round.first_key));
    }
    let in_slices: u64 = round.slices.iter().map(|slice| u64::from(slice.urls)).sum();
    match in_slices == round.urls() {
        true => Ok(()),
        false => Err(format!("its slices have {in_slices} URLs, and it {}", round.urls())),
    }
}

/// Whether a manifest's sums are those of its parts.
fn adds_up(manifest: &Manifest, rounds: &[Round]) -> Result<(), String> {
    let mut outcomes = OutcomeCounts::default();
    manifest.classes.iter().for_each(|class| outcomes.merge(&class.outcomes));
    if outcomes != manifest.outcomes {
        return Err("its classes' outcomes are not its outcomes".to_owned());
    }
    let (urls, named): (u64, u64) = (rounds.iter().map(|round| round.new_urls).sum(), outcomes.total());
    // Of a damaged shard whose slice is damaged, too, nobody knows the URLs.
    if named > urls || named < urls && manifest.damaged.is_empty() {
        return Err(format!("{named} URLs have an outcome, of {urls} in the rounds that it covers"));
    }
    let blocks = |split: Option<Split>| {
        let tars = manifest.shards.iter().flat_map(|shard| &shard.tars);
        tars.filter(move |(of, _)| split.is_none_or(|split| split == **of)).flat_map(|(_, tar)| &tar.blocks)
    };
    for split in Split::ALL {
        let (kept, counted) =
            (blocks(Some(split)).map(|block| u64::from(block.kept)).sum::<u64>(), manifest.samples(split));
        if kept != counted {
            return Err(format!("its blocks have {kept} samples for {split}, and its classes {counted}"));
        }
    }
    let skipped: u64 = blocks(None).map(|block| u64::from(block.samples.saturating_sub(block.kept))).sum();
    let reasons: u64 = manifest.skipped.values().sum();
    match skipped == reasons {
        true => Ok(()),
        false => Err(format!("its blocks skip {skipped} samples, and its reasons {reasons}")),
    }
}

/// Whether a manifest names of a shard what the index names.
fn names(named: &ManifestShard, index: &ShardIndex, skips: &Skips) -> Result<(), String> {
    if named.outcomes != index.outcomes_file {
        return Err("its outcomes are not those of its index".to_owned());
    }
    let with_samples = index.tars.iter().filter(|(_, tar)| tar.samples > 0);
    if !named.tars.keys().eq(with_samples.clone().map(|(split, _)| split)) {
        return Err("its splits are not those of its index".to_owned());
    }
    let mut first = 0;
    for ((split, tar), named) in with_samples.zip(named.tars.values()) {
        let block = |block: &ManifestBlock| (block.offset, block.length, block.samples);
        let blocks = tar.blocks.iter().map(|block| (block.offset, block.length, block.samples));
        if (&named.key, &named.sha256, named.first) != (&tar.key, &tar.sha256, first)
            || !named.blocks.iter().map(block).eq(blocks)
        {
            return Err(format!("its tar for {split} is not that of its index"));
        }
        for block in &named.blocks {
            let skipped = (first..first + block.samples).filter(|&sample| skips.contains(sample)).count() as u32;
            if block.kept + skipped != block.samples {
                return Err(format!(
                    "{split}: of a block's {} samples it keeps {} and skips {skipped}",
                    block.samples, block.kept
                ));
            }
            first += block.samples;
        }
    }
    Ok(())
}
