//! A shard's tar files, in WebDataset's layout. Bytes in, bytes out.
//!
//! A sample is three members of a tar, one after the other: `KEY.jpg` or `KEY.png`, `KEY.cls` (its label in decimal),
//! `KEY.json` (where it came from, and the columns of its list that travel with it), KEY being 12 digits. One without a
//! class, or with several, has no `KEY.cls`; one with a caption has `KEY.txt`, too. A tar is cut into blocks of whole
//! samples, a few MB each, which can be read by range and understood alone.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::format::FormatError;
use crate::{ImageFormat, columns};

/// A tar's block is closed once it has this many bytes.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// One stored image with its label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The URL's ordinal in the catalog: names the sample within its dataset, for ever.
    pub key: u64,
    /// The place of its class in the dataset's spec.
    pub label: u32,
    /// The encoded image, whose first bytes tell what it is ([`ImageFormat::of`]).
    pub image: Bytes,
}

/// What stands beside a sample, for people and other tools.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Its class; empty: it has none, or several, which are among its columns.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub synset: String,
    /// As in the list.
    pub url: String,
    /// SHA-256 of the bytes as fetched, in hex.
    pub sha256: String,
    /// Of the image as fetched.
    pub width: u32,
    /// Of the image as fetched.
    pub height: u32,
    /// The [columns](crate::columns) of the list that travel with it, as text: further members of the object.
    #[serde(skip)]
    pub columns: String,
}

/// A part of a tar that holds whole samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// From the tar's start, in bytes.
    pub offset: u64,
    /// In bytes.
    pub length: u64,
    /// Samples in it.
    pub samples: u32,
}

/// Sums over the pixels of stored images, as integers, so that the order of adding cannot change them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moments {
    /// Pixels summed over.
    pub pixels: u64,
    /// Of each channel's values (0 to 255), in the order red, green, blue.
    pub sum: [u64; 3],
    /// Of their squares.
    pub sum_of_squares: [u64; 3],
}

impl Moments {
    /// Adds `other`. Those of one shard always fit; nonsense that somebody has written stops at the largest numbers.
    pub fn add(&mut self, other: &Moments) {
        self.pixels = self.pixels.saturating_add(other.pixels);
        for channel in 0..3 {
            self.sum[channel] = self.sum[channel].saturating_add(other.sum[channel]);
            self.sum_of_squares[channel] = self.sum_of_squares[channel].saturating_add(other.sum_of_squares[channel]);
        }
    }

    /// Takes away `other`, which must have been added.
    pub fn subtract(&mut self, other: &Moments) {
        self.pixels -= other.pixels;
        for channel in 0..3 {
            self.sum[channel] -= other.sum[channel];
            self.sum_of_squares[channel] -= other.sum_of_squares[channel];
        }
    }
}

/// The same over all shards of a dataset: a hundred million large pictures have more than 64 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    pixels: u128,
    sum: [u128; 3],
    sum_of_squares: [u128; 3],
}

impl Sums {
    /// Adds `more`.
    pub fn add(&mut self, more: &Moments) {
        self.pixels += u128::from(more.pixels);
        for channel in 0..3 {
            self.sum[channel] += u128::from(more.sum[channel]);
            self.sum_of_squares[channel] += u128::from(more.sum_of_squares[channel]);
        }
    }

    /// Takes away what must have been added.
    pub fn subtract(&mut self, part: &Moments) {
        self.pixels = self.pixels.saturating_sub(part.pixels.into());
        for channel in 0..3 {
            self.sum[channel] = self.sum[channel].saturating_sub(part.sum[channel].into());
            let squares = &mut self.sum_of_squares[channel];
            *squares = squares.saturating_sub(part.sum_of_squares[channel].into());
        }
    }

    /// Mean and standard deviation of each channel, on the scale of 0 to 1; of no pixels, 0 and 1.
    pub fn mean_and_std(&self) -> ([f64; 3], [f64; 3]) {
        let (mut mean, mut std) = ([0.0; 3], [1.0; 3]);
        if self.pixels > 0 {
            let n = self.pixels as f64;
            for channel in 0..3 {
                let m = self.sum[channel] as f64 / n;
                let variance = (self.sum_of_squares[channel] as f64 / n - m * m).max(0.0);
                mean[channel] = m / 255.0;
                // A channel without any variation must not divide by zero.
                std[channel] = (variance.sqrt() / 255.0).max(1e-3);
            }
        }
        (mean, std)
    }
}

/// Writes one tar. Its bytes are handed out piece by piece ([`TarWriter::take`]), so that a large tar is uploaded while
/// it grows.
#[derive(Debug, Default)]
pub struct TarWriter {
    pending: Vec<u8>,
    hasher: Sha256,
    taken: u64,
    blocks: Vec<Block>,
    open: OpenBlock,
}

/// The block that still grows.
#[derive(Debug, Default, Clone, Copy)]
struct OpenBlock {
    offset: u64,
    samples: u32,
}

impl TarWriter {
    /// A tar without samples.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one sample. Returns the offset and length of the encoded image within the tar.
    pub fn append(&mut self, sample: &Sample, origin: &Origin) -> (u64, u64) {
        let key = format!("{:012}", sample.key);
        let mut json = serde_json::to_vec(origin).expect("strings and numbers only");
        if let Some(columns) = origin.columns.strip_prefix('{') {
            json.pop();
            json.push(b',');
            json.extend_from_slice(columns.as_bytes());
        }
        let offset = self.member(&format!("{key}.{}", ImageFormat::of(&sample.image).ending()), &sample.image);
        if !origin.synset.is_empty() {
            self.member(&format!("{key}.cls"), sample.label.to_string().as_bytes());
        }
        if let Some(caption) = columns::caption(&origin.columns) {
            self.member(&format!("{key}.txt"), caption.as_bytes());
        }
        self.member(&format!("{key}.json"), &json);
        self.open.samples += 1;
        if self.position() - self.open.offset >= BLOCK_BYTES {
            self.close_block();
        }
        (offset, sample.image.len() as u64)
    }

    /// The bytes written since the last call.
    pub fn take(&mut self) -> Bytes {
        self.take_up_to(usize::MAX)
    }

    /// The first so many of them; the others are left for the next call.
    pub fn take_up_to(&mut self, bytes: usize) -> Bytes {
        let left = self.pending.split_off(bytes.min(self.pending.len()));
        let taken = std::mem::replace(&mut self.pending, left);
        self.hasher.update(&taken);
        self.taken += taken.len() as u64;
        taken.into()
    }

    /// Bytes that [`TarWriter::take`] would return.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Ends the tar. Returns its last bytes, its length, its SHA-256 in hex, and its blocks.
    pub fn finish(mut self) -> (Bytes, u64, String, Vec<Block>) {
        if self.open.samples > 0 {
            self.close_block();
        }
        // Two empty records end a tar (POSIX.1-1988).
        self.pending.extend_from_slice(&[0; 1024]);
        let rest = self.take();
        (rest, self.taken, hex::encode(self.hasher.finalize()), self.blocks)
    }

    fn position(&self) -> u64 {
        self.taken + self.pending.len() as u64
    }

    fn close_block(&mut self) {
        let end = self.position();
        self.blocks.push(Block {
            offset: self.open.offset,
            length: end - self.open.offset,
            samples: self.open.samples,
        });
        self.open = OpenBlock { offset: end, samples: 0 };
    }

    fn member(&mut self, name: &str, data: &[u8]) -> u64 {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).expect("12 digits and an ending fit a header");
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        // The same samples make the same bytes, whenever and by whomever they are written.
        header.set_mtime(0);
        header.set_cksum();
        self.pending.extend_from_slice(header.as_bytes());
        let offset = self.position();
        self.pending.extend_from_slice(data);
        let end = self.position();
        self.pending.resize(self.pending.len() + (end.next_multiple_of(512) - end) as usize, 0);
        offset
    }
}

/// Reads the samples of one block, in order, without copying the images.
///
/// # Errors
/// If the bytes are not whole samples in [`TarWriter`]'s layout.
pub fn read_block(block: &Bytes) -> Result<Vec<Sample>, FormatError> {
    let bad = |what: &str| FormatError(format!("tar block of {} bytes: {what}", block.len()));
    let mut archive = tar::Archive::new(block.as_ref());
    let mut samples = Vec::new();
    let mut open: Option<(u64, Bytes, Option<u32>)> = None;
    for entry in archive.entries().map_err(|e| bad(&e.to_string()))? {
        let entry = entry.map_err(|e| bad(&e.to_string()))?;
        let path = entry.path_bytes();
        let name = std::str::from_utf8(&path).map_err(|_| bad("a member's name is not UTF-8"))?;
        let (key, ending) = name.split_once('.').ok_or_else(|| bad(&format!("member {name:?} has no ending")))?;
        let key: u64 = key.parse().map_err(|_| bad(&format!("member {name:?} is not named by a key")))?;
        let start = usize::try_from(entry.raw_file_position()).map_err(|_| bad("too large"))?;
        let end = usize::try_from(entry.size()).ok().and_then(|size| start.checked_add(size));
        let data = match end {
            Some(end) if end <= block.len() => block.slice(start..end),
            _ => return Err(bad(&format!("member {name:?} is cut short"))),
        };
        match (ending, &mut open) {
            ("jpg" | "png", None) => open = Some((key, data, None)),
            ("cls", Some((of, _, label @ None))) if *of == key => {
                let text = std::str::from_utf8(&data).map_err(|_| bad(&format!("member {name:?} is not UTF-8")))?;
                *label = Some(text.trim().parse().map_err(|_| bad(&format!("member {name:?} holds no label")))?);
            }
            ("txt", Some((of, ..))) if *of == key => {}
            ("json", Some((of, _, None))) if *of == key => {
                return Err(bad(&format!("sample {key} has no class, so that nothing can be trained on it")));
            }
            ("json", Some((of, _, Some(_)))) if *of == key => {
                if let Some((key, image, Some(label))) = open.take() {
                    samples.push(Sample { key, label, image });
                }
            }
            _ => return Err(bad(&format!("member {name:?} is out of order"))),
        }
    }
    match open {
        None => Ok(samples),
        Some((key, ..)) => Err(bad(&format!("sample {key} is cut short"))),
    }
}

/// One sample as it stands in its tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawSample {
    /// The URL's ordinal in the catalog.
    pub key: u64,
    /// The place of its class in the dataset's spec; [`u32::MAX`]: it has none, or several.
    pub label: u32,
    /// The ending of its image's name, without the dot.
    pub ending: String,
    /// The encoded image.
    pub image: Bytes,
    /// All its members with their headers: what another tar takes over as it is.
    pub members: Bytes,
}

impl RawSample {
    /// The bytes of its member with this ending; None: it has none.
    pub fn member(&self, ending: &str) -> Option<Bytes> {
        let mut archive = tar::Archive::new(self.members.as_ref());
        let mut members = archive.entries().ok()?.filter_map(Result::ok);
        let found = members.find(|member| member.path_bytes().ends_with(format!(".{ending}").as_bytes()))?;
        let start = usize::try_from(found.raw_file_position()).ok()?;
        let end = start.checked_add(usize::try_from(found.size()).ok()?)?;
        (end <= self.members.len()).then(|| self.members.slice(start..end))
    }
}

/// Cuts a block into its samples, in order, without copying anything.
///
/// # Errors
/// If the bytes are not whole samples.
pub fn split_block(block: &Bytes) -> Result<Vec<RawSample>, FormatError> {
    let bad = |what: String| FormatError(format!("tar block of {} bytes: {what}", block.len()));
    let mut archive = tar::Archive::new(block.as_ref());
    let mut samples: Vec<RawSample> = Vec::new();
    let mut start = 0;
    for entry in archive.entries().map_err(|e| bad(e.to_string()))? {
        let entry = entry.map_err(|e| bad(e.to_string()))?;
        let path = entry.path_bytes();
        let name = std::str::from_utf8(&path).map_err(|_| bad("a member's name is not UTF-8".to_owned()))?;
        let named = name.split_once('.').and_then(|(key, ending)| Some((key.parse::<u64>().ok()?, ending)));
        let (key, ending) = named.ok_or_else(|| bad(format!("member {name:?} is not named by a key")))?;
        let data = entry.raw_file_position() as usize;
        let end = usize::try_from(entry.size()).ok().and_then(|size| data.checked_add(size));
        let padded = end.and_then(|end| end.checked_next_multiple_of(512)).filter(|padded| *padded <= block.len());
        let (Some(end), Some(padded)) = (end, padded) else {
            return Err(bad(format!("member {name:?} is cut short")));
        };
        match samples.last_mut() {
            Some(sample) if sample.key == key => {
                sample.members = block.slice(start..padded);
                if ending == "cls" {
                    let text = std::str::from_utf8(&block[data..end]).ok().and_then(|text| text.trim().parse().ok());
                    sample.label = text.ok_or_else(|| bad(format!("member {name:?} holds no label")))?;
                }
            }
            _ => {
                start = data.saturating_sub(512);
                let (ending, image) = (ending.to_owned(), block.slice(data..end));
                let members = block.slice(start..padded);
                samples.push(RawSample { key, label: u32::MAX, ending, image, members });
            }
        }
    }
    Ok(samples)
}

/// SHA-256 of `bytes`, in hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn origin() -> Origin {
        let (synset, url, sha256) = ("n1".into(), "http://x/".into(), "00".into());
        Origin { synset, url, sha256, width: 5, height: 7, columns: String::new() }
    }

    /// A sample with the offset and length of its image in the tar.
    type Placed = (Sample, (u64, u64));

    fn write(images: &[Vec<u8>]) -> (Bytes, Vec<Block>, Vec<Placed>) {
        let mut writer = TarWriter::new();
        let (mut bytes, mut samples) = (Vec::new(), Vec::new());
        for (i, image) in images.iter().enumerate() {
            let sample = Sample { key: i as u64 * 3, label: i as u32 % 7, image: Bytes::from(image.clone()) };
            let place = writer.append(&sample, &origin());
            let part = writer.take_up_to(300_000);
            assert!(part.len() == 300_000 || writer.pending() == 0);
            bytes.extend_from_slice(&part);
            samples.push((sample, place));
        }
        let (rest, length, sha256, blocks) = writer.finish();
        bytes.extend_from_slice(&rest);
        assert_eq!((length, sha256), (bytes.len() as u64, sha256_hex(&bytes)));
        (bytes.into(), blocks, samples)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn blocks_hold_every_sample_once_and_in_order(sizes in prop::collection::vec(0usize..900_000, 0..20)) {
            let images: Vec<Vec<u8>> = sizes.iter().map(|&n| vec![n as u8; n]).collect();
            let (tar, blocks, samples) = write(&images);
            let mut read = Vec::new();
            for block in &blocks {
                let bytes = tar.slice(block.offset as usize..(block.offset + block.length) as usize);
                let found = read_block(&bytes).expect("a whole block");
                let raw = split_block(&bytes).expect("a whole block");
                let same = |(raw, sample): (&RawSample, &Sample)| (raw.key, raw.label, &raw.image) == (sample.key, sample.label, &sample.image);
                prop_assert!(raw.len() == found.len() && raw.iter().zip(&found).all(same));
                prop_assert!(raw.iter().all(|raw| raw.member(&raw.ending).as_ref() == Some(&raw.image)));
                prop_assert!(raw.iter().all(|raw| raw.member("json").is_some() && raw.member("txt").is_none()));
                prop_assert_eq!(raw.iter().map(|raw| raw.members.len()).sum::<usize>(), bytes.len());
                prop_assert_eq!(found.len(), block.samples as usize);
                read.extend(found);
            }
            prop_assert!(read.iter().eq(samples.iter().map(|(sample, _)| sample)));
            for (sample, (offset, length)) in samples {
                prop_assert_eq!(&tar[offset as usize..(offset + length) as usize], &sample.image[..]);
            }
        }

        #[test]
        fn bytes_that_are_no_block_are_an_error_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            let bytes = Bytes::from(bytes);
            let _ = (read_block(&bytes), split_block(&bytes));
        }
    }

    #[test]
    fn a_block_that_is_cut_anywhere_is_refused_or_has_fewer_whole_samples() {
        let (tar, blocks, written) = write(&[vec![1; 700], vec![2; 10], vec![3; 513]]);
        let samples: Vec<Sample> = written.into_iter().map(|(sample, _)| sample).collect();
        let whole = blocks[0].length as usize;
        for end in 1..whole {
            if let Ok(found) = read_block(&tar.slice(..end)) {
                assert!(found.len() < samples.len() && samples.starts_with(&found), "cut at {end}");
            }
        }
        assert_eq!(read_block(&tar.slice(..whole)).expect("whole"), samples);
    }

    #[test]
    fn columns_are_members_of_the_json_and_a_caption_is_a_text() {
        let mut writer = TarWriter::new();
        let columns = r#"{"caption":"a dog","boxes":[[1]]}"#.to_owned();
        let sample = Sample { key: 7, label: 3, image: Bytes::from_static(b"\xff\xd8\xff") };
        writer.append(&sample, &Origin { columns: columns.clone(), ..origin() });
        let labelled = writer.take();
        assert_eq!(read_block(&labelled).expect("whole"), std::slice::from_ref(&sample));
        writer.append(&sample, &Origin { columns, synset: String::new(), ..origin() });
        let unlabelled = writer.take();
        let members = |block: &Bytes| -> Vec<(String, String)> {
            let mut archive = tar::Archive::new(block.as_ref());
            let member = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
                let mut entry = entry.expect("whole");
                let mut text = Vec::new();
                std::io::Read::read_to_end(&mut entry, &mut text).expect("whole");
                (entry.path().expect("a name").display().to_string(), String::from_utf8_lossy(&text).into_owned())
            };
            archive.entries().expect("a tar").map(member).collect()
        };
        let named = members(&labelled);
        assert_eq!(named.iter().map(|(name, _)| &name[13..]).collect::<Vec<_>>(), ["jpg", "cls", "txt", "json"]);
        assert_eq!(named[2].1, "a dog");
        let json: serde_json::Value = serde_json::from_str(&named[3].1).expect("JSON");
        assert_eq!((&json["boxes"][0][0], &json["synset"], &json["width"]), (&1.into(), &"n1".into(), &5.into()));
        let named = members(&unlabelled);
        assert_eq!(named.iter().map(|(name, _)| &name[13..]).collect::<Vec<_>>(), ["jpg", "txt", "json"]);
        assert!(!named[2].1.contains("synset"), "{}", named[2].1);
        assert_eq!(split_block(&unlabelled).expect("whole")[0].label, u32::MAX);
        assert!(read_block(&unlabelled).expect_err("no class").to_string().contains("no class"));
    }

    #[test]
    fn a_members_ending_tells_what_the_image_is() {
        for (image, name) in [(&b"\xff\xd8\xff"[..], "000000000000.jpg"), (b"\x89PNG\r\n\x1a\n", "000000000000.png")] {
            let (tar, ..) = write(&[image.to_vec()]);
            assert!(tar.starts_with(name.as_bytes()), "{name}");
            assert_eq!(read_block(&tar.slice(..tar.len() - 1024)).expect("whole")[0].image, image);
        }
    }

    #[test]
    fn moments_give_mean_and_deviation_on_the_scale_of_one() {
        let mut sums = Sums::default();
        sums.add(&Moments { pixels: 2, sum: [255, 0, 510], sum_of_squares: [255 * 255, 0, 2 * 255 * 255] });
        assert_eq!(sums.mean_and_std(), ([0.5, 0.0, 1.0], [0.5, 1e-3, 1e-3]));
    }

    #[test]
    fn a_hundred_million_large_pictures_have_a_mean_and_a_deviation() {
        // A shard of 100,000 pictures of 100 megapixels, half of whose pixels are black, and 1,000 such shards.
        let pixels = 100_000 * 100_000_000;
        let (sum, squares) = (pixels / 2 * 255, pixels / 2 * 255 * 255);
        let shard = Moments { pixels, sum: [sum; 3], sum_of_squares: [squares; 3] };
        let mut sums = Sums::default();
        (0..1000).for_each(|_| sums.add(&shard));
        assert!(sums.sum_of_squares[0] > u64::MAX.into());
        let (mean, std) = sums.mean_and_std();
        assert!(mean.iter().chain(&std).all(|value| (value - 0.5).abs() < 1e-9), "{mean:?} {std:?}");
        (0..1000).for_each(|_| sums.subtract(&shard));
        assert_eq!(sums, Sums::default());
    }
}
