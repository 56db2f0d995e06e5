//! Entries before they are dealt: those that are dealt alike are together.

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use proto::files;
use proto::site::{self, Sites};
use proto::slice::split_tail;
use twox_hash::XxHash64;

use super::batches::Batch;
use crate::dealing::{Entry, most_of_site, site_hash};
use crate::spool::Spool;

/// Into which slices URLs go: those with the same go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Dealing {
    /// The most of one slice.
    pub(crate) slice_urls: u32,
    /// See [`Slice::once`](proto::round::Slice::once).
    pub(crate) once: bool,
}

/// The entries of a round by how they are dealt.
pub(super) struct Pools {
    seed: u64,
    sites: Arc<Sites>,
    folder: Option<PathBuf>,
    spools: BTreeMap<Dealing, Spool>,
}

impl Pools {
    /// Without entries; `folder` is where many are spooled.
    pub(super) fn new(seed: u64, sites: Arc<Sites>, folder: Option<PathBuf>) -> Self {
        Self { seed, sites, folder, spools: BTreeMap::new() }
    }

    /// All that is in it, which is empty then.
    pub(super) fn take(&mut self) -> Self {
        let empty = Self::new(self.seed, Arc::clone(&self.sites), self.folder.clone());
        std::mem::replace(self, empty)
    }

    pub(super) fn into_spools(self) -> impl Iterator<Item = (Dealing, Spool)> {
        self.spools.into_iter()
    }

    /// Takes in lines, whose numbers are their keys.
    pub(super) fn push_all(&mut self, dealing: Dealing, batch: &Batch) -> io::Result<()> {
        batch.lines().try_for_each(|(key, synset, tail)| self.push(dealing, key, synset, tail))
    }

    pub(super) fn push(&mut self, dealing: Dealing, key: u64, synset: &str, tail: &str) -> io::Result<()> {
        let mut hash = XxHash64::with_seed(self.seed);
        [&key.to_le_bytes(), synset.as_bytes(), &[0], tail.as_bytes()].iter().for_each(|part| hash.write(part));
        let hash = hash.finish();
        let (url, _) = split_tail(tail);
        let (site, most) = match (files::span(url), &site::host_of(url)) {
            // Rows of a Parquet file are read together, wherever it is.
            (Some(span), _) => (site_hash(self.seed, span), dealing.slice_urls),
            (None, Some(host)) => {
                let site = self.sites.place(host).site;
                (site_hash(self.seed, site), most_of_site(self.sites.budget(site), dealing.slice_urls))
            }
            // All else may be anywhere: files, and what will never be fetched.
            (None, None) => (hash, dealing.slice_urls),
        };
        let spool = self.spools.entry(dealing).or_insert_with(|| Spool::new(self.folder.clone()));
        Entry { site, most, hash, key, synset: synset.as_bytes(), tail: tail.as_bytes() }.spool(spool)
    }
}
