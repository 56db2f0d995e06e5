//! The catalog: all URLs of a list, dealt into slices by their sites, in bounded memory.
//!
//! Lines come together by their URLs first: one that stands in the list again is fetched once, and may have several
//! classes. Entries go into the partitions of a [`Spool`] by a hash of their site; `dealing` makes slices of them.
//! Within a slice they are in the order of a hash of (seed, ordinal, synset, URL). Nothing else decides, so the same
//! list gives the same slices.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use proto::dataset_spec::Class;
use proto::outcomes::OutcomeRow;
use proto::round::{Cause, LargeSite, Round, Slice};
use proto::site::{self, Sites};
use proto::slice::{SliceWriter, split_tail};
use proto::{DatasetSpec, MultiLabel, OutcomeCounts, Rejection, columns, files, pb};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::dealing::{self, Large, most_of_site, site_hash};
use crate::error::Error;
use crate::list::{self, Entry, Line, ListOptions};
use crate::spool::Spool;

/// A list with more classes than this is not one of classes.
const MOST_CLASSES: usize = 1_000_000;

/// So many classes, and it is time to ask whether they are any.
const EARLY_CLASSES: usize = 100_000;

/// Of fewer pictures each may have a class of its own.
const FEW_URLS: u64 = 10;

/// What can be done with a list whose classes are none.
const WAY_OUT: &str = "if the list has captions and no classes, --unlabelled takes it (--keep-columns caption keeps \
                       them); if another column is the class, --columns or --synset-column names it; --synsets FILE \
                       says that classes are meant so";

/// Lines, rows and sources that are shown.
const EXAMPLES: usize = 10;

/// Numbers of slices have six digits.
const LAST_SLICE: u32 = 999_999;

/// Where a round begins: what earlier ones have used up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RoundStart {
    pub(crate) cause: Cause,
    pub(crate) round: u32,
    pub(crate) first_slice: u32,
    pub(crate) first_key: u64,
    pub(crate) request_id: String,
    pub(crate) traceparent: String,
}

impl RoundStart {
    /// A dataset's first round.
    pub(crate) fn first(request_id: &str) -> Self {
        let traceparent = proto::trace::current();
        let (cause, request_id) = (Cause::Request, request_id.to_owned());
        Self { cause, round: 1, first_slice: 0, first_key: 0, request_id, traceparent }
    }
}

/// Into which slices URLs go: those with the same go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Dealing {
    /// The most of one slice.
    pub(crate) slice_urls: u32,
    /// See [`Slice::once`].
    pub(crate) once: bool,
}

/// How lists were understood, for people.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    /// The first sources.
    pub(crate) understood: Vec<String>,
    /// The first rows.
    pub(crate) preview: Vec<pb::ListRow>,
}

/// Gathers the entries of all sources of one round.
pub(crate) struct Catalog {
    seed: u64,
    start: RoundStart,
    sites: Arc<Sites>,
    /// Of URLs that have no other.
    dealing: Dealing,
    pools: BTreeMap<Dealing, Spool>,
    multi_label: Option<MultiLabel>,
    /// Classes that nobody chose can be no classes.
    checked: bool,
    /// The most new URLs.
    limit: u64,
    /// The most bytes of lines, as they are unpacked, and how many there have been.
    largest: u64,
    length: u64,
    folder: Option<PathBuf>,
    /// None: all that occur.
    chosen: Option<HashSet<String>>,
    /// The lines, and the URLs of earlier rounds, by URL: they are compared at the end.
    lines: Spool,
    /// Good lines of chosen classes.
    ordinals: u64,
    /// How the first sources were understood.
    understood: Vec<String>,
    /// The first rows, as they were understood.
    preview: Vec<pb::ListRow>,
    urls_per_class: BTreeMap<String, u64>,
    new_urls: u64,
    retried: OutcomeCounts,
    not_chosen: u64,
    known: u64,
    repeated: u64,
    several: u64,
    several_example: String,
    bad_lines: u64,
    bad_line_examples: Vec<String>,
}

/// In the place of an ordinal: the URL is of an earlier round.
const KNOWN: u64 = u64::MAX;

impl Catalog {
    /// An empty one. The classes of `spec` choose which synsets are taken; `folder` is where large lists are spooled;
    /// `sites` say which URLs are of one site, and how many of them are many.
    pub(crate) fn new(spec: &DatasetSpec, start: RoundStart, folder: Option<PathBuf>, sites: Arc<Sites>) -> Self {
        let chosen = spec.classes.iter().map(|class| class.synset.clone()).collect::<HashSet<_>>();
        Self {
            seed: spec.seed,
            lines: Spool::new(folder.clone()),
            ordinals: 0,
            understood: Vec::new(),
            preview: Vec::new(),
            start,
            sites,
            dealing: Dealing { slice_urls: spec.slice_urls, once: false },
            pools: BTreeMap::new(),
            multi_label: spec.multi_label,
            checked: chosen.is_empty() && !spec.unlabelled,
            limit: u64::MAX,
            largest: u64::MAX,
            length: 0,
            folder,
            chosen: (!chosen.is_empty()).then_some(chosen),
            urls_per_class: BTreeMap::new(),
            new_urls: 0,
            retried: OutcomeCounts::default(),
            not_chosen: 0,
            known: 0,
            repeated: 0,
            several: 0,
            several_example: String::new(),
            bad_lines: 0,
            bad_line_examples: Vec::new(),
        }
    }

    /// The same, of which at most so many new URLs are taken: a sample that the seed chooses. Lines of more than
    /// `largest` bytes together are too many, however few they were packed into.
    pub(crate) fn limited(self, limit: u64, largest: u64) -> Self {
        Self { limit, largest, ..self }
    }

    /// How the lists were understood, for people.
    pub(crate) fn shown(&mut self) -> Shown {
        Shown { understood: std::mem::take(&mut self.understood), preview: std::mem::take(&mut self.preview) }
    }

    /// Reads one source to its end.
    pub(crate) fn read(&mut self, name: &str, source: impl Read + Send, options: &ListOptions) -> Result<(), Error> {
        let understood = list::read(name, source, options, &mut |number, line| match line {
            Line::Entry(entry) => {
                if self.preview.len() < EXAMPLES {
                    let Entry { synset, url, columns } = entry;
                    let [synset, url, columns] = [synset, url, columns].map(str::to_owned);
                    self.preview.push(pb::ListRow { synset, url, columns });
                }
                self.push(entry)
            }
            Line::Absent => {
                self.not_chosen += 1;
                Ok(())
            }
            Line::Bad(what) => {
                self.bad_lines += 1;
                if self.bad_line_examples.len() < EXAMPLES {
                    self.bad_line_examples.push(format!("{name}:{number}: {what}"));
                }
                Ok(())
            }
        })?;
        if self.understood.len() < EXAMPLES {
            self.understood.push(format!("{name}: {understood}"));
        }
        Ok(())
    }

    fn push(&mut self, Entry { synset, url, columns }: Entry<'_>) -> Result<(), Error> {
        if self.chosen.as_ref().is_some_and(|chosen| !chosen.contains(synset)) {
            self.not_chosen += 1;
            return Ok(());
        }
        self.length += (synset.len() + url.len() + columns.len()) as u64;
        if self.length > self.largest {
            let largest = self.largest;
            return Err(Error::Invalid(format!(
                "the list unpacks to more than {largest} bytes: the coordinator's --largest-list"
            )));
        }
        let (digest, ordinal) = (self.digest(url), self.ordinals);
        self.ordinals += 1;
        let between = if columns.is_empty() { "" } else { "\t" };
        let tail = url.len() + between.len() + columns.len();
        let head = LineHead { digest, ordinal, lengths: Lengths { synset: synset.len() as u32, tail: tail as u32 } };
        let parts = [head.as_bytes(), synset.as_bytes(), url.as_bytes(), between.as_bytes(), columns.as_bytes()];
        Ok(self.lines.push(digest[0], &parts)?)
    }

    /// Tells of a URL of an earlier round, so that a new line with it is known.
    pub(crate) fn push_known(&mut self, url: &str) -> Result<(), Error> {
        let digest = self.digest(url);
        let head = LineHead { digest, ordinal: KNOWN, lengths: Lengths { synset: 0, tail: 0 } };
        Ok(self.lines.push(digest[0], &[head.as_bytes()])?)
    }

    /// What stands for a URL when they are compared. The seed makes the order of these a shuffle: the first of them are
    /// a sample.
    fn digest(&self, url: &str) -> [u8; 16] {
        let hash = Sha256::new().chain_update(self.seed.to_le_bytes()).chain_update(url).finalize();
        std::array::from_fn(|i| hash[i])
    }

    /// Takes in a URL of an earlier round, which is to be fetched again; `why` is what became of it last.
    pub(crate) fn retry(&mut self, dealing: Dealing, row: &OutcomeRow, why: Rejection) -> Result<(), Error> {
        self.retried.add(Err(why), 1);
        let columns = row.columns.as_deref().unwrap_or_default();
        let between = if columns.is_empty() { "" } else { "\t" };
        let tail = [&row.url, between, columns].concat();
        self.push_entry(dealing, row.key.max(0) as u64, row.synset.as_bytes(), tail.as_bytes())
    }

    fn push_entry(&mut self, dealing: Dealing, key: u64, synset: &[u8], tail: &[u8]) -> Result<(), Error> {
        let hash = Sha256::new()
            .chain_update(self.seed.to_le_bytes())
            .chain_update(key.to_le_bytes())
            .chain_update(synset)
            .chain_update([0])
            .chain_update(tail)
            .finalize();
        let hash = u64::from_be_bytes(std::array::from_fn(|i| hash[i]));
        let (url, _) = split_tail(std::str::from_utf8(tail).unwrap_or_default());
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
        let pool = self.pools.entry(dealing).or_insert_with(|| Spool::new(self.folder.clone()));
        Ok(dealing::Entry { site, most, hash, key, synset, tail }.spool(pool)?)
    }

    /// Enters each URL once that no earlier round has.
    fn enter_lines(&mut self) -> Result<(), Error> {
        let spool = std::mem::replace(&mut self.lines, Spool::new(None));
        for partition in spool.into_partitions() {
            let partition = partition?;
            let mut lines = lines(&partition, |head: &LineHead| head.lengths);
            lines.sort_unstable_by_key(|(head, ..)| (head.digest, head.ordinal));
            for same in lines.chunk_by(|(a, ..), (b, ..)| a.digest == b.digest) {
                let known = same.last().is_some_and(|(head, ..)| head.ordinal == KNOWN);
                match same {
                    _ if known => self.known += same.iter().filter(|(head, ..)| head.ordinal != KNOWN).count() as u64,
                    _ if self.new_urls == self.limit => return Ok(()),
                    same => self.enter(same)?,
                }
            }
        }
        Ok(())
    }

    /// Enters a URL, which has one or several lines.
    fn enter(&mut self, same: &[(LineHead, &[u8], &[u8])]) -> Result<(), Error> {
        let (first, synset, tail) = same[0];
        let mut synsets: Vec<&[u8]> = Vec::new();
        if same.len() > 1 {
            same.iter().for_each(|(_, synset, _)| {
                if !synsets.contains(synset) {
                    synsets.push(synset)
                }
            });
            self.repeated += (same.len() - synsets.len()) as u64;
        }
        let mut with_classes = None;
        if synsets.len() > 1 {
            let synsets = synsets.iter().map(|synset| std::str::from_utf8(synset).unwrap_or_default());
            let (url, columns) = split_tail(std::str::from_utf8(tail).unwrap_or_default());
            if self.several == 0 {
                let synsets: Vec<&str> = synsets.clone().take(3).collect();
                self.several_example = format!("{url} ({})", synsets.join(", "));
            }
            self.several += 1;
            match self.multi_label {
                Some(MultiLabel::Drop) => return Ok(()),
                Some(MultiLabel::All) => {
                    with_classes = Some([url, "\t", &columns::with_classes(columns, synsets)].concat());
                }
                Some(MultiLabel::First) | None => {}
            }
        }
        let name = String::from_utf8_lossy(synset);
        let classes = self.urls_per_class.len();
        match self.urls_per_class.get_mut(&*name) {
            Some(urls) => *urls += 1,
            None => {
                if matches!(classes, EARLY_CLASSES | MOST_CLASSES) {
                    self.check_classes()?;
                }
                if classes == MOST_CLASSES {
                    return Err(Error::Invalid(format!("more than {MOST_CLASSES} synsets: {WAY_OUT}")));
                }
                self.urls_per_class.insert(name.into_owned(), 1);
            }
        }
        self.new_urls += 1;
        let tail = with_classes.as_ref().map_or(tail, |tail| tail.as_bytes());
        self.push_entry(self.dealing, self.start.first_key + first.ordinal, synset, tail)
    }

    /// Refuses classes that nobody can have meant: most pictures have one of their own, as captions are.
    fn check_classes(&self) -> Result<(), Error> {
        let own = self.urls_per_class.iter().filter(|(_, urls)| **urls == 1);
        let alone = own.clone().count() as u64;
        // Of a few pictures each may well have a class of its own, but not a sentence.
        let sentence = |synset: &str| synset.split_whitespace().count() > 3;
        let few = self.new_urls < FEW_URLS && !own.clone().any(|(synset, _)| sentence(synset));
        if !self.checked || alone * 2 <= self.new_urls || few {
            return Ok(());
        }
        let examples: Vec<String> = own.take(3).map(|(synset, _)| format!("{synset:?}")).collect();
        let (urls, examples) = (self.new_urls, examples.join(", "));
        Err(Error::Invalid(format!(
            "{alone} of {urls} pictures have a class of their own, such as {examples}: {WAY_OUT}"
        )))
    }

    /// Compares the lines, and refuses lists that cannot be meant so.
    fn gather(&mut self) -> Result<(), Error> {
        self.enter_lines()?;
        let entered = self.new_urls + self.retried.total();
        let all_bad = self.bad_lines > 0 && self.new_urls + self.known + self.not_chosen + self.several == 0;
        if all_bad || self.start.round == 1 && entered == 0 {
            let mut message =
                format!("no line of the list is good: {} bad, {} not chosen", self.bad_lines, self.not_chosen);
            if self.several > 0 {
                message += &format!(", {} of several classes", self.several);
            }
            self.bad_line_examples.iter().for_each(|line| message += &format!("; {line}"));
            return Err(Error::Invalid(message));
        }
        if self.several > 0 && self.multi_label.is_none() {
            let (several, all, example) = (self.several, self.new_urls, &self.several_example);
            return Err(Error::Invalid(format!(
                "{several} of {all} pictures have several classes, such as {example}: --multi-label first takes the \
                 class that stands first, all keeps all of them (such pictures are stored, but not trained on), drop \
                 leaves such pictures out"
            )));
        }
        self.check_classes()
    }

    /// What a first round would be, its slices aside, and which site would take the longest.
    pub(crate) fn survey(mut self, spec: &DatasetSpec) -> Result<(Round, Option<pb::SlowestSite>), Error> {
        self.gather()?;
        let mut slowest = None;
        for pool in std::mem::take(&mut self.pools).into_values() {
            slowest = dealing::slowest(pool, &self.sites)?.or(slowest);
        }
        let slowest =
            slowest.map(|(site, urls, requests_per_second)| pb::SlowestSite { site, urls, requests_per_second });
        let urls = spec.slice_urls;
        let slices = self.new_urls.div_ceil(urls.into());
        let slice = || Slice { urls, sha256: String::new(), once: false };
        Ok((self.into_round(std::iter::repeat_with(slice).take(slices as usize).collect(), None), slowest))
    }

    /// Deals the entries into slices and sends each one's number and bytes to `slices`.
    /// Completes the classes of `spec`, and returns the round that names the slices: without any if a later round has
    /// nothing to fetch.
    pub(crate) fn cut(mut self, spec: &mut DatasetSpec, slices: &mpsc::Sender<(u32, Bytes)>) -> Result<Round, Error> {
        self.gather()?;
        let (entered, first_slice) = (self.new_urls + self.retried.total(), self.start.first_slice);
        if spec.classes.is_empty() {
            let class = |synset: &String| Class { synset: synset.clone(), name: String::new() };
            spec.classes = self.urls_per_class.keys().map(class).collect();
        }
        let (mut done, mut large_sites) = (BTreeMap::new(), Vec::new());
        for (Dealing { slice_urls, once }, pool) in std::mem::take(&mut self.pools) {
            let first = first_slice.saturating_add(done.len() as u32);
            let mut pack = |n: u32, mut hand: dealing::Hand| {
                let number = first.saturating_add(n);
                if number > LAST_SLICE {
                    return Err(Error::Invalid(format!(
                        "{entered} URLs in slices of {}, and of fewer for slow sites: choose larger slices or budgets",
                        spec.slice_urls
                    )));
                }
                let mut writer = SliceWriter::new()?;
                hand.shuffled().try_for_each(|(key, synset, tail)| writer.push(key, synset, tail))?;
                let (urls, bytes) = (writer.urls(), Bytes::from(writer.finish()?));
                done.insert(number, Slice { urls, sha256: proto::shard::sha256_hex(&bytes), once });
                let sent = slices.blocking_send((number, bytes));
                sent.map_err(|_| Error::Local("the upload of slices has ended".to_owned()))
            };
            let large = dealing::deal(pool, self.folder.clone(), self.seed, slice_urls, &self.sites, &mut pack)?;
            large_sites.extend(large.into_iter().map(|Large { site, slices }| LargeSite {
                site,
                first_slice: first + slices.start,
                slices: slices.end - slices.start,
            }));
        }
        Ok(self.into_round(done.into_values().collect(), Some(large_sites)))
    }

    fn into_round(self, slices: Vec<Slice>, large_sites: Option<Vec<LargeSite>>) -> Round {
        let start = self.start;
        Round {
            format: 1,
            nonce: crate::store::nonce(),
            request_id: start.request_id,
            traceparent: start.traceparent,
            cause: start.cause,
            accepts_damage: false,
            round: start.round,
            first_slice: start.first_slice,
            slices,
            large_sites,
            first_key: start.first_key,
            new_urls: self.new_urls,
            keys: self.ordinals,
            urls_per_class: self.urls_per_class,
            retried: self.retried,
            not_chosen: self.not_chosen,
            known: self.known,
            repeated: self.repeated,
            several: self.several,
            bad_lines: self.bad_lines,
            bad_line_examples: self.bad_line_examples,
        }
    }
}

/// What stands before a synset and a tail that are compared; those of earlier rounds are left out, and have no length.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct LineHead {
    digest: [u8; 16],
    /// Among the lines; or [`KNOWN`].
    ordinal: u64,
    lengths: Lengths,
}

/// Of a synset and of what stands behind it in a slice (see [`proto::slice`]), in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Lengths {
    synset: u32,
    tail: u32,
}

/// What a spool's partition holds: heads, each with its synset and tail.
fn lines<H: FromBytes>(mut bytes: &[u8], lengths: impl Fn(&H) -> Lengths) -> Vec<(H, &[u8], &[u8])> {
    let next = || {
        let (head, rest) = H::read_from_prefix(bytes).ok()?;
        let Lengths { synset, tail } = lengths(&head);
        let (synset, rest) = rest.split_at_checked(synset as usize)?;
        let (tail, rest) = rest.split_at_checked(tail as usize)?;
        bytes = rest;
        Some((head, synset, tail))
    };
    std::iter::from_fn(next).collect()
}

#[cfg(test)]
mod tests;
