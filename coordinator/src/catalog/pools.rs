//! Entries before they are dealt: those that are dealt alike are together.

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::io;
use std::path::PathBuf;

use proto::files::{self, SPAN};
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

/// What of an entry is found out before it comes into its pool.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    key: u64,
    /// What stands for its site, and [`most_of_site`]; None: it may be anywhere.
    site: Option<(u64, u32)>,
}

impl Place {
    pub(super) fn new(seed: u64, sites: &Sites, dealing: Dealing, key: u64, tail: &str) -> Self {
        let (url, _) = split_tail(tail);
        let site = match (files::span(url), &site::host_of(url)) {
            // Rows of a Parquet file are read together, wherever it is; unless a slice does not hold as many.
            (Some(span), _) if dealing.slice_urls >= SPAN => Some((site_hash(seed, span), dealing.slice_urls)),
            (_, Some(host)) => {
                let site = sites.place(host).site;
                Some((site_hash(seed, site), most_of_site(sites.budget(site), dealing.slice_urls)))
            }
            // Files, and what will never be fetched.
            (_, None) => None,
        };
        Self { key, site }
    }
}

/// The entries of a round by how they are dealt.
pub(super) struct Pools {
    seed: u64,
    folder: Option<PathBuf>,
    spools: BTreeMap<Dealing, Spool>,
}

impl Pools {
    /// Without entries; `folder` is where many are spooled.
    pub(super) fn new(seed: u64, folder: Option<PathBuf>) -> Self {
        Self { seed, folder, spools: BTreeMap::new() }
    }

    /// All that is in it, which is empty then.
    pub(super) fn take(&mut self) -> Self {
        let empty = Self::new(self.seed, self.folder.clone());
        std::mem::replace(self, empty)
    }

    pub(super) fn into_spools(self) -> impl Iterator<Item = (Dealing, Spool)> {
        self.spools.into_iter()
    }

    pub(super) fn push_all(&mut self, dealing: Dealing, batch: &Batch<Place>) -> io::Result<()> {
        batch.lines().try_for_each(|(place, synset, tail)| self.push(dealing, place, synset, tail))
    }

    pub(super) fn push(&mut self, dealing: Dealing, place: Place, synset: &str, tail: &str) -> io::Result<()> {
        let Place { key, site } = place;
        let mut hash = XxHash64::with_seed(self.seed);
        [&key.to_le_bytes(), synset.as_bytes(), &[0], tail.as_bytes()].iter().for_each(|part| hash.write(part));
        let hash = hash.finish();
        let (site, most) = site.unwrap_or((hash, dealing.slice_urls));
        let spool = self.spools.entry(dealing).or_insert_with(|| Spool::new(self.folder.clone()));
        Entry { site, most, hash, key, synset: synset.as_bytes(), tail: tail.as_bytes() }.spool(spool)
    }
}
