//! The gists of a dataset's shards: what versions of its manifest have left for the ones that follow.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt};
use proto::gist::{Gist, GistObject};
use proto::{DatasetId, Manifest, keys};

use super::{Audit, PARALLEL};
use crate::gists::{parse_list, unpack};
use crate::store::StoreError;

impl Audit {
    /// Checks the gists that the manifests' lists name; if deeply, against `digests`, those of the shards' own.
    pub(super) async fn check_gists(
        &self,
        id: &DatasetId,
        manifests: impl Iterator<Item = &Manifest>,
        digests: &BTreeMap<u32, String>,
    ) -> Result<(), StoreError> {
        // Versions share objects, but need not use the same shards of one.
        let mut objects: BTreeMap<String, (GistObject, BTreeSet<u32>)> = BTreeMap::new();
        for manifest in manifests {
            let list = keys::gist_list(id, manifest.version, &manifest.nonce);
            let folder = keys::gists_of(id, manifest.version, &manifest.nonce);
            // Older programs left none.
            if !self.listing.has(&list) && self.listing.under(&folder).next().is_none() {
                continue;
            }
            let Some(list) = self.object(&list, |json| parse_list(manifest, &json)).await? else { continue };
            for object in list.objects {
                let shards = object.shards.clone();
                let (_, all) = objects.entry(object.file.key.clone()).or_insert_with(|| (object, BTreeSet::new()));
                all.extend(shards);
            }
        }
        let check = async |(object, shards): &(GistObject, BTreeSet<u32>)| -> Result<(), StoreError> {
            let parse = |bytes: bytes::Bytes| {
                let gists = unpack(id, object.round, &object.file, &bytes)?;
                are_those_of(&gists, shards, digests)
            };
            self.object(&object.file.key, parse).await.map(drop)
        };
        futures::stream::iter(objects.values()).map(check).buffer_unordered(PARALLEL).try_collect().await
    }
}

/// Whether gists are there for these shards, and say what the shards say.
fn are_those_of(gists: &[Gist], shards: &BTreeSet<u32>, digests: &BTreeMap<u32, String>) -> Result<(), String> {
    let there: BTreeSet<u32> = gists.iter().map(|gist| gist.index.shard).collect();
    if let Some(shard) = shards.difference(&there).next() {
        return Err(format!("it has no gist of shard {shard}"));
    }
    let of_these = gists.iter().filter(|gist| shards.contains(&gist.index.shard));
    let differs = |gist: &&Gist| digests.get(&gist.index.shard).is_some_and(|digest| *digest != gist.digest());
    match of_these.into_iter().find(differs) {
        Some(gist) => {
            Err(format!("its gist of shard {} is not what that shard's index and rows say", gist.index.shard))
        }
        None => Ok(()),
    }
}
