//! Dealing: which URL comes into which slice, so that few workers meet one site.
//!
//! A site whose URLs take more than [`SLICE_SECONDS`] at its rate, or are more than a slice holds, is *large*: it gets
//! slices of its own, each of about so many. Every other site goes whole into one mixed slice with many others. So
//! nearly every site is met by one worker alone, which keeps its budget without asking anybody; workers that fetch from
//! a large site share it.
//!
//! Entries come in the partitions of a [`Spool`] by a hash of their site. Each partition is read twice, as a stream: to
//! count its sites, then to deal its entries. Those of large sites go to a second spool, by slice; the others fit in
//! memory. So memory depends neither on the size of a site nor on the number of sites.

use std::collections::hash_map::Entry as Slot;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;
use std::path::PathBuf;

use proto::site::{Budget, Sites};
use proto::slice::split_tail;
use twox_hash::XxHash64;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::spool::{PARTITIONS, Spool};

/// How long a slice of a large site takes at the site's rate.
const SLICE_SECONDS: f64 = 600.0;

/// URLs that a slice of one site alone has at the most.
pub(crate) fn most_of_site(budget: Budget, slice_urls: u32) -> u32 {
    match budget.rate {
        0.0 => slice_urls,
        rate => ((rate * SLICE_SECONDS) as u32).clamp(1, slice_urls),
    }
}

/// One URL before it is dealt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    /// Stands for its site.
    pub(crate) site: u64,
    /// [`most_of_site`] of its site.
    pub(crate) most: u32,
    /// Decides its place in its slice.
    pub(crate) hash: u64,
    pub(crate) key: u64,
    pub(crate) synset: &'a [u8],
    /// The URL, behind which its columns may stand.
    pub(crate) tail: &'a [u8],
}

impl Entry<'_> {
    /// Puts it into the spool that [`deal`] reads.
    pub(crate) fn spool(&self, spool: &mut Spool) -> io::Result<()> {
        self.push(self.site.to_be_bytes()[0], spool)
    }

    fn push(&self, partition: u8, spool: &mut Spool) -> io::Result<()> {
        let Self { site, most, hash, key, .. } = *self;
        let (synset, tail) = (self.synset.len() as u32, self.tail.len() as u32);
        let head = EntryHead { site, hash, key, most, synset, tail, spare: 0 };
        spool.push(partition, &[head.as_bytes(), self.synset, self.tail])
    }

    /// The name of its site.
    fn name(&self, sites: &Sites) -> String {
        std::str::from_utf8(self.tail).ok().and_then(|tail| sites.of_url(split_tail(tail).0)).unwrap_or_default()
    }
}

/// What stands before a synset and a tail in a spool.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct EntryHead {
    site: u64,
    hash: u64,
    key: u64,
    most: u32,
    /// In bytes.
    synset: u32,
    /// In bytes.
    tail: u32,
    spare: u32,
}

/// What stands for a site.
pub(crate) fn site_hash(seed: u64, site: &str) -> u64 {
    XxHash64::oneshot(seed, site.as_bytes())
}

/// A large site, and which slices are its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Large {
    pub(crate) site: String,
    /// Counted from 0 among all slices.
    pub(crate) slices: Range<u32>,
}

/// The URLs of one slice.
#[derive(Debug, Default)]
pub(crate) struct Hand {
    text: Vec<u8>,
    places: Vec<Place>,
}

/// Where an entry stands in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    hash: u64,
    key: u64,
    synset: usize,
    tail: usize,
    end: usize,
}

impl Hand {
    fn push(&mut self, hash: u64, key: u64, synset: &[u8], tail: &[u8]) {
        let from = self.text.len();
        self.text.extend_from_slice(synset);
        self.text.extend_from_slice(tail);
        self.places.push(Place { hash, key, synset: from, tail: from + synset.len(), end: self.text.len() });
    }

    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// Key, synset and tail of each, in the order of their hashes.
    pub(crate) fn shuffled(&mut self) -> impl Iterator<Item = (u64, &[u8], &[u8])> {
        self.places.sort_unstable();
        self.places.iter().map(|at| (at.key, &self.text[at.synset..at.tail], &self.text[at.tail..at.end]))
    }
}

/// The site that takes the longest at the most that it may be asked for, with its URLs and that rate; None: every site
/// may be asked without end.
pub(crate) fn slowest(entries: Spool, sites: &Sites) -> io::Result<Option<(String, u64, f64)>> {
    let mut slowest: Option<(String, u64, f64)> = None;
    for mut partition in entries.into_streams() {
        let mut counted: HashMap<u64, (u64, String)> = HashMap::new();
        each(partition.stream()?, |entry: Entry<'_>| {
            counted.entry(entry.site).or_insert_with(|| (0, entry.name(sites))).0 += 1;
            Ok(())
        })?;
        for (urls, site) in counted.into_values() {
            let rate = sites.budget(&site).rate;
            // Of those that take as long it is the first one by its name.
            let longer = slowest.as_ref().is_none_or(|(than, most, of)| {
                let order = (urls as f64 / rate).total_cmp(&(*most as f64 / of));
                order.then_with(|| than.cmp(&site)).is_gt()
            });
            if rate > 0.0 && longer {
                slowest = Some((site, urls, rate));
            }
        }
    }
    Ok(slowest)
}

/// Deals all `entries` into slices of about `slice_urls`. `done` gets each slice's number, counted from 0, and its
/// URLs.
pub(crate) fn deal<E: From<io::Error>>(
    entries: Spool,
    folder: Option<PathBuf>,
    seed: u64,
    slice_urls: u32,
    sites: &Sites,
    done: &mut impl FnMut(u32, Hand) -> Result<(), E>,
) -> Result<Vec<Large>, E> {
    let mut large = Vec::new();
    let mut of_large = Spool::new(folder);
    let mut mixed = Hand::default();
    let (mut mixed_slices, mut large_slices) = (0, 0);
    for mut partition in entries.into_streams() {
        let mut counted: HashMap<u64, (u64, u32)> = HashMap::new();
        each(partition.stream()?, |entry: Entry<'_>| {
            counted.entry(entry.site).or_insert((0, entry.most)).0 += 1;
            Ok(())
        })?;
        let mut cuts: HashMap<u64, Cut> = HashMap::new();
        let mut small = Hand::default();
        let mut small_sites = Vec::new();
        each(partition.stream()?, |entry: Entry<'_>| {
            let (urls, most) = counted[&entry.site];
            if urls <= u64::from(most) {
                small_sites.push((entry.site, small.len()));
                small.push(entry.hash, entry.key, entry.synset, entry.tail);
                return Ok(());
            }
            let cut = match cuts.entry(entry.site) {
                Slot::Occupied(cut) => cut.into_mut(),
                Slot::Vacant(place) => {
                    let slices = u32::try_from(urls.div_ceil(most.into())).unwrap_or(u32::MAX);
                    large.push(Large { site: entry.name(sites), slices: large_slices..large_slices + slices });
                    large_slices += slices;
                    place.insert(Cut { seed: seed ^ entry.site, first: large_slices - slices, slices, next: 0 })
                }
            };
            let slice = cut.next();
            Entry { site: slice.into(), ..entry }.push((slice as usize % PARTITIONS) as u8, &mut of_large)
        })?;
        small_sites.sort_unstable();
        for of_site in small_sites.chunk_by(|a, b| a.0 == b.0) {
            let (there, more, most) = (mixed.len(), of_site.len(), slice_urls as usize);
            // Rather somewhat too many in a slice than few.
            if there + more > most && 2 * there >= most {
                done(mixed_slices, std::mem::take(&mut mixed))?;
                mixed_slices += 1;
            }
            for at in of_site.iter().map(|&(_, n)| small.places[n]) {
                mixed.push(at.hash, at.key, &small.text[at.synset..at.tail], &small.text[at.tail..at.end]);
            }
        }
    }
    if mixed.len() > 0 {
        done(mixed_slices, mixed)?;
        mixed_slices += 1;
    }
    for mut partition in of_large.into_streams() {
        let mut slices: BTreeMap<u64, Hand> = BTreeMap::new();
        each(partition.stream()?, |entry: Entry<'_>| {
            slices.entry(entry.site).or_default().push(entry.hash, entry.key, entry.synset, entry.tail);
            Ok(())
        })?;
        for (slice, hand) in slices {
            done(mixed_slices + slice as u32, hand)?;
        }
    }
    for large in &mut large {
        large.slices = large.slices.start + mixed_slices..large.slices.end + mixed_slices;
    }
    Ok(large)
}

/// How a large site is cut into slices.
struct Cut {
    seed: u64,
    first: u32,
    slices: u32,
    /// Counts its URLs.
    next: u64,
}

impl Cut {
    /// The slice of the next URL. Each gets one of as many URLs in a row as there are slices, each time another one: a
    /// list whose classes take turns must not have one class in each slice.
    fn next(&mut self) -> u32 {
        let slices = u64::from(self.slices);
        let (row, place) = (self.next / slices, self.next % slices);
        self.next += 1;
        self.first + ((place + XxHash64::oneshot(self.seed, &row.to_le_bytes()) % slices) % slices) as u32
    }
}

/// Reads the entries that [`Entry::spool`] put there.
fn each(stream: impl Read, mut take: impl FnMut(Entry<'_>) -> io::Result<()>) -> io::Result<()> {
    let mut stream = BufReader::with_capacity(1 << 16, stream);
    let mut text = Vec::new();
    while !stream.fill_buf()?.is_empty() {
        let mut head = [0; size_of::<EntryHead>()];
        stream.read_exact(&mut head)?;
        let EntryHead { site, hash, key, most, synset, tail, .. } = zerocopy::transmute!(head);
        text.resize(synset as usize + tail as usize, 0);
        stream.read_exact(&mut text)?;
        let (synset, tail) = text.split_at(synset as usize);
        take(Entry { site, most, hash, key, synset, tail })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
