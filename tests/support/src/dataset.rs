//! A dataset as workers and a coordinator leave it in a store, made by hand: for tests and benches that begin with one.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use proto::index::StoredFile;
use proto::manifest::{ManifestBlock, ManifestClass, ManifestShard, ManifestTar, Skips};
use proto::shard::{Origin, TarWriter, sha256_hex};
use proto::{Attempt, DatasetId, Manifest, OutcomeCounts, Resize, Sample, Split, Stored, keys};

/// What [`write`] writes. Keys count up from 0, in the order of shards, splits and samples; the label of key `k` is `k
/// % classes`.
pub struct Dataset<'a> {
    /// `<name>-<uid>`.
    pub dataset: &'a DatasetId,
    /// Number of classes, whose synsets are `n0`, `n1` and so on.
    pub classes: u32,
    /// Pixels of a picture's sides, as its manifest tells.
    pub size: u32,
    /// For each shard, how many samples of which splits it has.
    pub shards: &'a [&'a [(Split, u32)]],
    /// Whether a sample is skipped, by its split and its place in that split's tar.
    pub skipped: &'a dyn Fn(Split, u32) -> bool,
    /// The JPEG of a sample, by its key and its label.
    pub picture: &'a dyn Fn(u64, u32) -> Bytes,
    /// The mean and the standard deviation of the training pixels, as its manifest tells.
    pub moments: ([f64; 3], [f64; 3]),
}

/// Writes tars, skips and the manifest, which has version 1, into the folder `store`.
///
/// # Panics
/// If the folder cannot be written to.
pub fn write(store: &Path, made: &Dataset<'_>) -> (Manifest, StoredFile) {
    let (mut key, mut shards) = (0, Vec::new());
    let mut classes: Vec<ManifestClass> = (0..made.classes)
        .map(|n| ManifestClass {
            synset: format!("n{n}"),
            name: format!("class {n}"),
            urls: 0,
            outcomes: OutcomeCounts::default(),
            samples: BTreeMap::new(),
        })
        .collect();
    for (shard, splits) in (0..).zip(made.shards) {
        let (mut tars, mut first, mut skips) = (BTreeMap::new(), 0, Skips::default());
        for &(split, samples) in *splits {
            let mut tar = TarWriter::new();
            for place in 0..samples {
                let label = (key % u64::from(made.classes)) as u32;
                let class = &mut classes[label as usize];
                let (width, height) = (made.size, made.size);
                let origin = Origin {
                    synset: class.synset.clone(),
                    url: format!("http://x/{key}"),
                    sha256: format!("{key:x}"),
                    width,
                    height,
                    columns: String::new(),
                };
                tar.append(&Sample { key, label, image: (made.picture)(key, label) }, &origin);
                class.urls += 1;
                match (made.skipped)(split, place) {
                    true => skips.insert(first + place),
                    false => *class.samples.entry(split).or_default() += 1,
                }
                key += 1;
            }
            let mut bytes = tar.take().to_vec();
            let (rest, _, sha256, written) = tar.finish();
            bytes.extend_from_slice(&rest);
            let name = keys::tar(&made.dataset.shard(shard), split, Attempt { term: 1, n: 1 });
            put(store, &name, &bytes);
            let mut begin = 0;
            let block = |block: &proto::shard::Block| {
                let places = begin..begin + block.samples;
                begin = places.end;
                let kept = places.filter(|&place| !(made.skipped)(split, place)).count() as u32;
                ManifestBlock { offset: block.offset, length: block.length, samples: block.samples, kept }
            };
            let blocks = written.iter().map(block).collect();
            tars.insert(split, ManifestTar { key: name, sha256, first, blocks });
            first += samples;
        }
        let skips = Some(put(store, &keys::skips(&made.dataset.shard(shard), 1, "0"), skips.as_bytes()));
        shards.push(ManifestShard { shard, round: 1, outcomes: None, findings: None, skips, tars });
    }
    let manifest = Manifest {
        format: 1,
        nonce: "0".to_owned(),
        dataset: made.dataset.clone(),
        version: 1,
        rounds: 1,
        resize: Resize { size: made.size, quality: 90, ..Resize::default() },
        smallest_side: made.size,
        classes,
        outcomes: OutcomeCounts::default(),
        skipped: BTreeMap::new(),
        near_duplicates: 0,
        damaged: Vec::new(),
        mean: made.moments.0,
        std: made.moments.1,
        shards,
    };
    let file = put(store, &keys::manifest(made.dataset, 1), &manifest.to_json());
    (manifest, file)
}

fn put(store: &Path, key: &str, bytes: &[u8]) -> StoredFile {
    let path = store.join(key);
    std::fs::create_dir_all(path.parent().expect("a key has a folder")).expect("the store is a folder");
    std::fs::write(path, bytes).expect("the store is a folder");
    StoredFile { key: key.to_owned(), bytes: bytes.len() as u64, sha256: sha256_hex(bytes) }
}

/// A JPEG of `width` x `height` pixels with noise in all sizes, as photographs have it: it is about as long as one of
/// them. Each seed gives another one.
///
/// # Panics
/// If it has no pixels.
pub fn picture(seed: u64, width: usize, height: usize) -> Bytes {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut pixels = vec![128.0_f32; 3 * width * height];
    for cell in [64, 32, 16, 8, 4, 2] {
        let (columns, rows) = (width / cell + 2, height / cell + 2);
        // Colour changes more slowly than light.
        let channels = if cell < 16 { 1 } else { 3 };
        let noise: Vec<f32> = (0..columns * rows * channels).map(|_| random.f32() - 0.5).collect();
        let strength = (cell as f32).sqrt() * 7.0;
        for (i, value) in pixels.iter_mut().enumerate() {
            let (x, y, channel) = (i / 3 % width, i / 3 / width, i % 3 % channels);
            let (fx, fy) = ((x % cell) as f32 / cell as f32, (y % cell) as f32 / cell as f32);
            let at = |x: usize, y: usize| noise[(y * columns + x) * channels + channel];
            let (x, y) = (x / cell, y / cell);
            let row = |y| at(x, y) * (1.0 - fx) + at(x + 1, y) * fx;
            *value += strength * (row(y) * (1.0 - fy) + row(y + 1) * fy);
        }
    }
    let pixels: Vec<u8> = pixels.into_iter().map(|value| value as u8).collect();
    let format = turbojpeg::PixelFormat::RGB;
    let image = turbojpeg::Image { pixels: &pixels[..], width, pitch: 3 * width, height, format };
    let jpeg = turbojpeg::compress(image, 90, turbojpeg::Subsamp::Sub2x2).expect("pixels are an image");
    Bytes::copy_from_slice(&jpeg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::shard::read_block;

    #[test]
    fn blocks_skips_and_counts_tell_of_what_the_tars_hold() {
        let folder = tempfile::tempdir().expect("a folder");
        let made = Dataset {
            dataset: &"d-1".parse().expect("an id"),
            classes: 3,
            size: 16,
            shards: &[&[(Split::Train, 7), (Split::Test, 2)], &[(Split::Train, 4)]],
            skipped: &|split, place| split == Split::Train && place == 2,
            picture: &|key, _| picture(key, 16, 16),
            moments: ([0.5; 3], [0.25; 3]),
        };
        let (manifest, file) = write(folder.path(), &made);
        let json = std::fs::read(folder.path().join(&file.key)).expect("the manifest");
        assert_eq!(
            (Manifest::from_json(&json).expect("a manifest"), sha256_hex(&json)),
            (manifest.clone(), file.sha256)
        );
        assert_eq!((manifest.samples(Split::Train), manifest.samples(Split::Test)), (9, 2));
        let mut key = 0;
        for shard in &manifest.shards {
            let skips = std::fs::read(folder.path().join(&shard.skips.as_ref().expect("a file").key)).expect("skips");
            let skips = Skips::from_bytes(&skips);
            for tar in shard.tars.values() {
                let bytes = Bytes::from(std::fs::read(folder.path().join(&tar.key)).expect("a tar"));
                assert_eq!(sha256_hex(&bytes), tar.sha256);
                let mut place = tar.first;
                for block in &tar.blocks {
                    let range = block.offset as usize..(block.offset + block.length) as usize;
                    let samples = read_block(&bytes.slice(range)).expect("a block");
                    let kept = (place..).take(samples.len()).filter(|&place| !skips.contains(place)).count();
                    assert_eq!((samples.len(), kept), (block.samples as usize, block.kept as usize));
                    for sample in samples {
                        assert_eq!((sample.key, sample.label), (key, (key % 3) as u32));
                        assert_eq!(turbojpeg::read_header(&sample.image).expect("a JPEG").width, 16);
                        (key, place) = (key + 1, place + 1);
                    }
                }
            }
        }
        assert_eq!(key, 13, "all were read");
        assert_ne!(picture(1, 16, 16), picture(2, 16, 16));
    }
}
