//! The stored pictures of a dataset, read out of its shards by byte range.

use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use proto::manifest::{ManifestShard, ManifestTar, Skips};
use proto::shard::RawSample;
use proto::{Manifest, Split};

use super::page::{Failure, missing};
use super::source::Source;

/// Where one stored picture is found, and what it is.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) address: String,
    pub(super) key: u64,
    pub(super) label: usize,
    pub(super) split: Split,
}

/// One place from which pictures are taken: a block of a tar.
pub(super) struct Place<'a> {
    shard: &'a ManifestShard,
    pub(super) split: Split,
    tar: &'a ManifestTar,
    block: usize,
}

/// All places that have pictures which count.
pub(super) fn places(manifest: &Manifest) -> Vec<Place<'_>> {
    manifest
        .shards
        .iter()
        .flat_map(|shard| shard.tars.iter().map(move |(&split, tar)| (shard, split, tar)))
        .flat_map(|(shard, split, tar)| (0..tar.blocks.len()).map(move |block| Place { shard, split, tar, block }))
        .filter(|place| place.tar.blocks[place.block].kept > 0)
        .collect()
}

/// The pictures of a place that count, with what is stored of them.
pub(super) async fn read(
    source: &Source,
    name: &str,
    manifest: &Manifest,
    place: &Place<'_>,
) -> Result<Vec<(Found, RawSample)>> {
    let block = place.tar.blocks[place.block];
    let samples = source.block(name, &place.tar.key, block.offset, block.length).await?;
    let skips = match &place.shard.skips {
        Some(file) => Skips::from_bytes(&source.object(name, &file.key, 0, 0).await?),
        None => Skips::default(),
    };
    let before: u32 = place.tar.blocks[..place.block].iter().map(|block| block.samples).sum();
    let counts = |n: usize| !skips.contains(place.tar.first + before + n as u32);
    let found = |n: usize, sample: &RawSample| {
        let (version, shard, split) = (manifest.version, place.shard.shard, place.split.name());
        let address =
            format!("/datasets/{name}/pictures/{version}/{shard}/{split}/{}/{n}.{}", place.block, sample.ending);
        Found { address, key: sample.key, label: sample.label as usize, split: place.split }
    };
    let counting = samples.iter().enumerate().filter(|(n, _)| counts(*n));
    Ok(counting.map(|(n, sample)| (found(n, sample), sample.clone())).collect())
}

/// Up to `most` pictures that count, from blocks all over the dataset, from the `page`th choice of them on; of `class`
/// alone, if given. Reads at most `most` blocks.
pub(super) async fn sheet(
    source: &Source,
    name: &str,
    manifest: &Manifest,
    class: Option<usize>,
    (most, page): (usize, usize),
) -> Result<Vec<Found>> {
    let places = places(manifest);
    let looks = places.len().min(if class.is_some() { most } else { most.div_ceil(6) });
    let each = if class.is_some() { most } else { 6 };
    let mut found = Vec::new();
    for look in 0..looks {
        // Evenly spread; the next page begins beside them.
        let place = &places[(look * places.len() / looks + page) % places.len()];
        let here = read(source, name, manifest, place).await?.into_iter().map(|(found, _)| found);
        found.extend(here.filter(|found| class.is_none_or(|class| found.label == class)).take(each));
        if found.len() >= most {
            break;
        }
    }
    found.truncate(most);
    Ok(found)
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
    // By its place in the block, or by the key of its URL.
    let (name, _) = file.split_once('.').context("a picture's name has an ending")?;
    let sample = match name.strip_prefix('k') {
        Some(key) => samples.iter().find(|sample| key.parse() == Ok(sample.key)),
        None => name.parse::<usize>().ok().and_then(|n| samples.get(n)),
    };
    let Some(sample) = sample else { return Ok(missing("there is no such picture")) };
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
