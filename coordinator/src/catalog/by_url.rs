//! Lines by their URLs: those of one URL come together, those of earlier rounds among them.

use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;

use proto::slice::split_tail;
use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::batches::Batch;
use crate::error::Error;
use crate::spool::{PARTITIONS, Partition, Spool};

/// In the place of an ordinal: the URL is of an earlier round.
pub(super) const KNOWN: u64 = u64::MAX;

/// Lines that are compared at once have no more bytes than this, unless there are very many.
const LARGEST: u64 = 256 << 20;

/// So much of a partition, from all of it, tells which URL most of its lines have.
const SAMPLE_BYTES: u64 = 1 << 20;

/// Gathers lines, however many they are.
pub(super) struct Lines {
    seed: u64,
    folder: Option<PathBuf>,
    spool: Spool,
}

/// What decides where a line comes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct LineKey {
    digest: [u8; 16],
    /// Among the lines; or [`KNOWN`].
    ordinal: u64,
}

impl LineKey {
    /// By what stands for the URL when URLs are compared. The seed makes the order of these a shuffle: the first of them
    /// are a sample.
    pub(super) fn new(seed: u64, url: &str, ordinal: u64) -> Self {
        let hash = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(url).finalize();
        Self { digest: std::array::from_fn(|i| hash[i]), ordinal }
    }
}

/// What stands before a synset and a tail in the spool; the tails of earlier rounds are left out, and have no length.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct LineHead {
    key: LineKey,
    /// In bytes.
    synset: u32,
    tail: u32,
}

/// So many bytes more than its text has a line in the spool.
pub(super) const HEAD_BYTES: usize = size_of::<LineHead>();

impl Lines {
    /// None. The seed decides in which order they come; `folder` is where many are spooled.
    pub(super) fn new(seed: u64, folder: Option<PathBuf>) -> Self {
        Self { seed, spool: Spool::new(folder.clone()), folder }
    }

    /// All of them, and none are left.
    pub(super) fn take(&mut self) -> Self {
        let empty = Self::new(self.seed, self.folder.clone());
        std::mem::replace(self, empty)
    }

    /// Takes in lines of the list.
    pub(super) fn push(&mut self, batch: &Batch<LineKey>) -> io::Result<()> {
        batch.lines().try_for_each(|(key, synset, tail)| {
            let head = LineHead { key, synset: synset.len() as u32, tail: tail.len() as u32 };
            self.spool.push(key.digest[0], &[head.as_bytes(), synset.as_bytes(), tail.as_bytes()])
        })
    }

    /// Takes in a URL of an earlier round.
    pub(super) fn push_known(&mut self, synset: &str, url: &str) -> io::Result<()> {
        let key = LineKey::new(self.seed, url, KNOWN);
        let head = LineHead { key, synset: synset.len() as u32, tail: 0 };
        self.spool.push(key.digest[0], &[head.as_bytes(), synset.as_bytes()])
    }

    /// All of them in the order of their URLs' digests, a part at a time.
    ///
    /// # Errors
    /// If what was spooled cannot be read, or if one URL stands in so many lines that they cannot be compared.
    pub(super) fn into_sorted(self) -> Result<impl Iterator<Item = Result<SortedLines, Error>>, Error> {
        self.sorted_within(LARGEST)
    }

    fn sorted_within(self, largest: u64) -> Result<impl Iterator<Item = Result<SortedLines, Error>>, Error> {
        let partitions: Vec<Partition> = self.spool.into_streams().collect();
        let all = partitions.iter().map(Partition::len).sum::<io::Result<u64>>()?;
        // The digests of many URLs spread evenly.
        let most = largest.max(8 * all / PARTITIONS as u64);
        Ok(partitions.into_iter().map(move |mut partition| match partition.len()? > most {
            true => Err(one_url(&mut partition)?),
            false => Ok(SortedLines::new(partition.into_bytes()?)),
        }))
    }
}

/// That most lines of a partition have the same URL.
fn one_url(partition: &mut Partition) -> io::Result<Error> {
    let (all, mut sample) = (partition.len()?, Vec::new());
    let every = all.div_ceil(SAMPLE_BYTES).max(1);
    let mut lines = BufReader::with_capacity(1 << 16, partition.stream()?);
    let (mut head, mut texts) = ([0; size_of::<LineHead>()], Vec::new());
    for n in 0u64.. {
        if lines.fill_buf()?.is_empty() {
            break;
        }
        lines.read_exact(&mut head)?;
        let LineHead { synset, tail, .. } = zerocopy::transmute!(head);
        texts.resize(synset as usize + tail as usize, 0);
        lines.read_exact(&mut texts)?;
        if n % every == 0 {
            sample.extend([&head[..], &texts].concat());
        }
    }
    let sample = SortedLines::new(sample);
    let length = |line: &SortedLine| {
        let (synset, tail) = sample.text(line);
        HEAD_BYTES + synset.len() + tail.len()
    };
    let of_urls = sample.urls().map(|same| (same.iter().map(length).sum::<usize>(), same));
    let (bytes, url) = match of_urls.max_by_key(|(bytes, _)| *bytes) {
        Some((bytes, same)) => (bytes as u64, split_tail(sample.text(&same[0]).1).0),
        None => (0, ""),
    };
    let megabytes = (all as f64 * bytes as f64 / sample.bytes.len().max(1) as f64) as u64 >> 20;
    Ok(Error::Invalid(format!(
        "about {megabytes} MB of the lines have one URL, {url:?}: is that the column of the URLs? If it stands for \
         pictures that are not there, leave its lines out"
    )))
}

/// Lines in the order of their URLs' digests, and those of one URL in the order of the list.
pub(super) struct SortedLines {
    bytes: Vec<u8>,
    lines: Vec<SortedLine>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SortedLine {
    digest: u128,
    pub(super) ordinal: u64,
    /// Where its head begins.
    at: usize,
}

impl SortedLines {
    /// `bytes` are heads, each with its synset and tail.
    fn new(bytes: Vec<u8>) -> Self {
        let mut lines = Vec::new();
        let mut rest = &bytes[..];
        while let Ok((head, texts)) = LineHead::read_from_prefix(rest) {
            let (digest, at) = (u128::from_be_bytes(head.key.digest), bytes.len() - rest.len());
            lines.push(SortedLine { digest, ordinal: head.key.ordinal, at });
            rest = texts.get(head.synset as usize + head.tail as usize..).unwrap_or_default();
        }
        lines.sort_unstable();
        Self { bytes, lines }
    }

    /// The lines of each URL.
    pub(super) fn urls(&self) -> impl Iterator<Item = &[SortedLine]> {
        self.lines.chunk_by(|a, b| a.digest == b.digest)
    }

    /// The synset and the tail of a line.
    pub(super) fn text(&self, line: &SortedLine) -> (&str, &str) {
        let (head, texts) = LineHead::read_from_prefix(&self.bytes[line.at..]).expect("written whole");
        let texts = &texts[..head.synset as usize + head.tail as usize];
        std::str::from_utf8(texts).expect("written as text").split_at(head.synset as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::super::batches::{Batches, spooled};
    use super::*;

    #[test]
    fn a_url_in_most_lines_of_a_long_list_is_named_instead_of_compared() {
        let fill = |same: u64| {
            // They come last, and are more than the sample.
            let (first, long) = (20_000 - same, format!("http://a/missing.png?{}", "x".repeat(400)));
            let url = |n| if n >= first { long.clone() } else { format!("http://a/{n}") };
            let fill = |batches: &mut Batches<LineKey>| {
                (0..20_000).try_for_each(|n| batches.push(LineKey::new(1, &url(n), n), "n1", &[&url(n)]))
            };
            let (lines, ()) = spooled(Lines::new(1, None), Lines::push, fill).expect("in memory");
            let sorted: Result<Vec<_>, _> = lines.sorted_within(10_000).expect("in memory").collect();
            sorted.map(|sorted| sorted.iter().map(|lines| lines.urls().count()).sum::<usize>())
        };
        assert_eq!(fill(1).expect("each has its own"), 20_000);
        assert_eq!(fill(50).expect("few lines"), 19_951);
        let error = fill(4_000).expect_err("most of a partition").to_string();
        assert!(
            error.contains("about 1 MB") && error.contains("http://a/missing.png") && error.contains("column"),
            "{error}"
        );
    }
}
