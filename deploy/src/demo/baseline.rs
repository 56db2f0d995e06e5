//! What a model must beat to have learned anything: the nearest class mean of tiny pictures.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use proto::manifest::{Manifest, Skips};
use proto::{Sample, Split, shard};
use turbojpeg::{Decompressor, Image, PixelFormat, ScalingFactor};

/// Pictures are compared at this many pixels a side.
const SIDE: usize = 16;
const VALUES: usize = SIDE * SIDE * 3;

/// Top-1 accuracy on the test split of the class whose mean training picture, at 16 x 16 pixels, is nearest
/// (Euclidean).
///
/// # Errors
/// If the store does not hold what the manifest names.
pub(super) async fn nearest_class_mean(store: &dyn ObjectStore, manifest: &Manifest) -> Result<f64> {
    let mut sums: BTreeMap<u32, (Vec<f64>, f64)> = BTreeMap::new();
    for (label, picture) in pictures(store, manifest, Split::Train).await? {
        let (sum, n) = sums.entry(label).or_insert_with(|| (vec![0.0; VALUES], 0.0));
        sum.iter_mut().zip(&picture).for_each(|(sum, value)| *sum += value);
        *n += 1.0;
    }
    let means: Vec<(u32, Vec<f64>)> =
        sums.into_iter().map(|(label, (sum, n))| (label, sum.iter().map(|s| s / n).collect())).collect();
    let test = pictures(store, manifest, Split::Test).await?;
    ensure!(!test.is_empty() && !means.is_empty(), "the manifest has no training or no test samples");
    let distance = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
    let right = test.iter().filter(|(label, picture)| {
        let nearest = means.iter().min_by(|a, b| distance(&a.1, picture).total_cmp(&distance(&b.1, picture)));
        nearest.is_some_and(|(guess, _)| guess == label)
    });
    Ok(right.count() as f64 / test.len() as f64)
}

/// The label and the shrunken pixels of every sample of `split` that counts.
async fn pictures(store: &dyn ObjectStore, manifest: &Manifest, split: Split) -> Result<Vec<(u32, Vec<f64>)>> {
    let (mut pictures, mut decompressor) = (Vec::new(), Decompressor::new()?);
    for shard in &manifest.shards {
        let Some(tar) = shard.tars.get(&split) else { continue };
        let skips = match &shard.skips {
            Some(file) => Skips::from_bytes(&store.get(&Path::from(file.key.as_str())).await?.bytes().await?),
            None => Skips::default(),
        };
        let mut ordinal = tar.first;
        for block in &tar.blocks {
            let range = block.offset..block.offset + block.length;
            let bytes = store.get_range(&Path::from(tar.key.as_str()), range).await?;
            for sample in shard::read_block(&bytes).with_context(|| tar.key.clone())? {
                if !skips.contains(ordinal) {
                    pictures.push((sample.label, shrink(&mut decompressor, &sample)?));
                }
                ordinal += 1;
            }
        }
    }
    Ok(pictures)
}

/// The mean of each cell of a 16 x 16 grid over the picture, for each channel. A large picture is decoded at an eighth
/// of its size: a pixel is the mean of 8 x 8 then.
fn shrink(decompressor: &mut Decompressor, sample: &Sample) -> Result<Vec<f64>> {
    let header = decompressor.read_header(&sample.image)?;
    let is_large = header.width.min(header.height) >= 8 * SIDE;
    let scale = if is_large { ScalingFactor::ONE_EIGHTH } else { ScalingFactor::ONE };
    decompressor.set_scaling_factor(scale)?;
    let (width, height) = (scale.scale(header.width), scale.scale(header.height));
    let mut pixels = vec![0; 3 * width * height];
    let format = PixelFormat::RGB;
    let image = Image { pixels: &mut pixels[..], width, pitch: 3 * width, height, format };
    decompressor.decompress(&sample.image, image)?;
    let mut sums = vec![0.0; VALUES];
    let mut counts = vec![0.0; VALUES];
    for y in 0..height {
        for x in 0..width {
            let cell = (y * SIDE / height * SIDE + x * SIDE / width) * 3;
            let pixel = (y * width + x) * 3;
            for channel in 0..3 {
                sums[cell + channel] += f64::from(pixels[pixel + channel]);
                counts[cell + channel] += 1.0;
            }
        }
    }
    Ok(sums.iter().zip(&counts).map(|(sum, count): (&f64, &f64)| sum / count.max(1.0)).collect())
}
