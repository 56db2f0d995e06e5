//! The stored pictures of a dataset, read out of its shards by byte range.

use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use proto::manifest::{ManifestShard, ManifestTar, Skips};
use proto::{Manifest, Split};

use super::page::{Failure, missing};
use super::source::Source;

/// Where one stored picture is found, and what it is.
pub(super) struct Found {
    pub(super) address: String,
    pub(super) key: u64,
    pub(super) label: usize,
    pub(super) split: Split,
}

/// One place from which pictures are taken.
struct Place<'a> {
    shard: &'a ManifestShard,
    split: Split,
    tar: &'a ManifestTar,
    block: usize,
}

/// Up to `most` pictures that count, from blocks all over the dataset, from the `page`th choice of them on; of `class` alone, if given.
/// Reads at most `most` blocks.
pub(super) async fn sheet(
    source: &Source,
    name: &str,
    manifest: &Manifest,
    class: Option<usize>,
    (most, page): (usize, usize),
) -> Result<Vec<Found>> {
    let places: Vec<Place<'_>> = manifest
        .shards
        .iter()
        .flat_map(|shard| shard.tars.iter().map(move |(&split, tar)| (shard, split, tar)))
        .flat_map(|(shard, split, tar)| (0..tar.blocks.len()).map(move |block| Place { shard, split, tar, block }))
        .filter(|place| place.tar.blocks[place.block].kept > 0)
        .collect();
    let looks = places.len().min(if class.is_some() { most } else { most.div_ceil(6) });
    let each = if class.is_some() { most } else { 6 };
    let mut found = Vec::new();
    for look in 0..looks {
        // Evenly spread; the next page begins beside them.
        let place = &places[(look * places.len() / looks + page) % places.len()];
        let block = place.tar.blocks[place.block];
        let samples = source.block(name, &place.tar.key, block.offset, block.length).await?;
        let skips = match &place.shard.skips {
            Some(file) => Skips::from_bytes(&source.object(name, &file.key, 0, 0).await?),
            None => Skips::default(),
        };
        let counting = counting(&skips, place, samples.len());
        let address = |n: usize, ending: &str| {
            let Manifest { version, .. } = manifest;
            let (shard, split, block) = (place.shard.shard, place.split.name(), place.block);
            format!("/datasets/{name}/pictures/{version}/{shard}/{split}/{block}/{n}.{ending}")
        };
        let wanted = samples
            .iter()
            .enumerate()
            .filter(|(n, sample)| counting[*n] && class.is_none_or(|class| sample.label as usize == class));
        found.extend(wanted.take(each).map(|(n, sample)| Found {
            address: address(n, &sample.ending),
            key: sample.key,
            label: sample.label as usize,
            split: place.split,
        }));
        if found.len() >= most {
            break;
        }
    }
    found.truncate(most);
    Ok(found)
}

/// Which samples of a block count.
fn counting(skips: &Skips, place: &Place<'_>, samples: usize) -> Vec<bool> {
    let before: u32 = place.tar.blocks[..place.block].iter().map(|block| block.samples).sum();
    (0..samples as u32).map(|n| !skips.contains(place.tar.first + before + n)).collect()
}

/// One picture as it is stored.
pub(super) async fn picture(
    State(source): State<Source>,
    Path((name, version, shard, split, block, file)): Path<(String, u32, u32, String, usize, String)>,
) -> Result<Response, Failure> {
    let dataset = source.dataset(&name).await?;
    let manifest: Arc<Manifest> = source.manifest(&dataset, version).await?;
    let place = || {
        let split = Split::from_str(&split).ok()?;
        let shard = manifest.shards.iter().find(|of| of.shard == shard)?;
        let tar = shard.tars.get(&split)?;
        Some((tar, *tar.blocks.get(block)?))
    };
    let Some((tar, block)) = place() else { return Ok(missing("there is no such picture")) };
    let samples = source.block(&name, &tar.key, block.offset, block.length).await?;
    let (n, _) = file.split_once('.').context("a picture's name has an ending")?;
    let Some(sample) = n.parse::<usize>().ok().and_then(|n| samples.get(n)) else {
        return Ok(missing("there is no such picture"));
    };
    let kind = match sample.ending.as_str() {
        "jpg" => "image/jpeg",
        "png" => "image/png",
        "webp" => "image/webp",
        _ => "application/octet-stream",
    };
    // A version never changes.
    let headers = [(CONTENT_TYPE, kind), (CACHE_CONTROL, "private, max-age=86400, immutable")];
    Ok((headers, sample.image.clone()).into_response())
}
