//! Lines by their URLs: those of one URL come together, those of earlier rounds among them.

use std::io;
use std::path::PathBuf;

use proto::slice::split_tail;
use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::batches::Batch;
use crate::spool::Spool;

/// In the place of an ordinal: the URL is of an earlier round.
pub(super) const KNOWN: u64 = u64::MAX;

/// Gathers lines, however many they are.
pub(super) struct Lines {
    seed: u64,
    folder: Option<PathBuf>,
    spool: Spool,
}

/// What stands before a synset and a tail in the spool; those of earlier rounds are left out, and have no length.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct LineHead {
    digest: [u8; 16],
    /// Among the lines; or [`KNOWN`].
    ordinal: u64,
    /// In bytes.
    synset: u32,
    tail: u32,
}

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

    /// Takes in lines of the list, whose numbers are their ordinals.
    pub(super) fn push(&mut self, batch: &Batch) -> io::Result<()> {
        batch.lines().try_for_each(|(ordinal, synset, tail)| {
            let digest = self.digest(split_tail(tail).0);
            let head = LineHead { digest, ordinal, synset: synset.len() as u32, tail: tail.len() as u32 };
            self.spool.push(digest[0], &[head.as_bytes(), synset.as_bytes(), tail.as_bytes()])
        })
    }

    /// Takes in a URL of an earlier round.
    pub(super) fn push_known(&mut self, url: &str) -> io::Result<()> {
        let digest = self.digest(url);
        let head = LineHead { digest, ordinal: KNOWN, synset: 0, tail: 0 };
        self.spool.push(digest[0], &[head.as_bytes()])
    }

    /// What stands for a URL when they are compared. The seed makes the order of these a shuffle: the first of them are
    /// a sample.
    fn digest(&self, url: &str) -> [u8; 16] {
        let hash = Sha256::new().chain_update(self.seed.to_le_bytes()).chain_update(url).finalize();
        std::array::from_fn(|i| hash[i])
    }

    /// All of them in the order of their URLs' digests, a part at a time.
    pub(super) fn into_sorted(self) -> impl Iterator<Item = io::Result<SortedLines>> {
        self.spool.into_partitions().map(|bytes| bytes.map(SortedLines::new))
    }
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
            let (digest, at) = (u128::from_be_bytes(head.digest), bytes.len() - rest.len());
            lines.push(SortedLine { digest, ordinal: head.ordinal, at });
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
