//! The catalog: all URLs of a list, shuffled and cut into slices, in bounded memory.
//!
//! Entries go into the partitions of a [`Spool`] by a hash of (seed, ordinal, synset, URL); the partitions, each sorted
//! by that hash, are the shuffled catalog. The order depends on nothing else, so the same list gives the same slices.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::path::PathBuf;

use bytes::Bytes;
use proto::dataset_spec::Class;
use proto::round::{Cause, Round, Slice};
use proto::slice::SliceWriter;
use proto::{DatasetSpec, Outcome, OutcomeCounts};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::error::Error;
use crate::list::{self, ListOptions};
use crate::spool::Spool;

/// A list with more classes than this is not one of classes.
const MOST_CLASSES: usize = 1_000_000;

/// Bad lines that are shown.
const EXAMPLES: usize = 10;

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

/// The URLs of one dealing.
struct Pool {
    spool: Spool,
    urls: u64,
}

/// Gathers the entries of all sources of one round.
pub(crate) struct Catalog {
    seed: u64,
    start: RoundStart,
    /// Of URLs that have no other.
    dealing: Dealing,
    pools: BTreeMap<Dealing, Pool>,
    folder: Option<PathBuf>,
    /// None: all that occur.
    chosen: Option<HashSet<String>>,
    /// In a later round: new lines and those of earlier rounds, which are compared at the end.
    compared: Option<Spool>,
    urls_per_class: BTreeMap<String, u64>,
    new_urls: u64,
    retried: OutcomeCounts,
    not_chosen: u64,
    known: u64,
    bad_lines: u64,
    bad_line_examples: Vec<String>,
}

/// In the place of a key: the entry has none yet.
const NEW: u64 = u64::MAX;

impl Catalog {
    /// An empty one. The classes of `spec` choose which synsets are taken; `folder` is where large lists are spooled.
    pub(crate) fn new(spec: &DatasetSpec, start: RoundStart, folder: Option<PathBuf>) -> Self {
        let chosen = spec.classes.iter().map(|class| class.synset.clone()).collect::<HashSet<_>>();
        Self {
            seed: spec.seed,
            compared: (start.round > 1).then(|| Spool::new(folder.clone())),
            start,
            dealing: Dealing { slice_urls: spec.slice_urls, once: false },
            pools: BTreeMap::new(),
            folder,
            chosen: (!chosen.is_empty()).then_some(chosen),
            urls_per_class: BTreeMap::new(),
            new_urls: 0,
            retried: OutcomeCounts::default(),
            not_chosen: 0,
            known: 0,
            bad_lines: 0,
            bad_line_examples: Vec::new(),
        }
    }

    /// Reads one source to its end.
    pub(crate) fn read(&mut self, name: &str, source: impl Read + Send, options: &ListOptions) -> Result<(), Error> {
        list::read(name, source, options, &mut |number, line| match line {
            Ok((synset, url)) => self.push(synset, url),
            Err(what) => {
                self.bad_lines += 1;
                if self.bad_line_examples.len() < EXAMPLES {
                    self.bad_line_examples.push(format!("{name}:{number}: {what}"));
                }
                Ok(())
            }
        })
    }

    fn push(&mut self, synset: &str, url: &str) -> Result<(), Error> {
        if self.chosen.as_ref().is_some_and(|chosen| !chosen.contains(synset)) {
            self.not_chosen += 1;
            return Ok(());
        }
        match &mut self.compared {
            None => self.push_entry(self.dealing, NEW, synset.as_bytes(), url.as_bytes()),
            Some(compared) => {
                let (digest, synset, url) = (digest(synset, url), synset.as_bytes(), url.as_bytes());
                let head = LineHead { digest, lengths: Lengths::of(synset, url) };
                Ok(compared.push(digest[0], &[head.as_bytes(), synset, url])?)
            }
        }
    }

    /// Tells of an entry of an earlier round, so that a new line like it is known.
    pub(crate) fn push_known(&mut self, synset: &str, url: &str) -> Result<(), Error> {
        if let Some(compared) = &mut self.compared {
            let digest = digest(synset, url);
            compared.push(digest[0], &[LineHead { digest, lengths: Lengths::of(&[], &[]) }.as_bytes()])?;
        }
        Ok(())
    }

    /// Takes in an entry of an earlier round, which is to be fetched again; `outcome` is what became of it last.
    pub(crate) fn retry(
        &mut self,
        dealing: Dealing,
        (key, synset, url): (u64, &str, &str),
        outcome: Outcome,
    ) -> Result<(), Error> {
        self.retried.add(outcome, 1);
        self.push_entry(dealing, key, synset.as_bytes(), url.as_bytes())
    }

    fn push_entry(&mut self, dealing: Dealing, key: u64, synset: &[u8], url: &[u8]) -> Result<(), Error> {
        let ordinal = if key == NEW { self.start.first_key + self.new_urls } else { key };
        if key == NEW {
            let synset = String::from_utf8_lossy(synset);
            let classes = self.urls_per_class.len();
            match self.urls_per_class.get_mut(&*synset) {
                Some(urls) => *urls += 1,
                None if classes == MOST_CLASSES => {
                    return Err(Error::Invalid(format!(
                        "more than {MOST_CLASSES} synsets: is the first column the class?"
                    )));
                }
                None => drop(self.urls_per_class.insert(synset.into_owned(), 1)),
            }
            self.new_urls += 1;
        }
        let hash = Sha256::new()
            .chain_update(self.seed.to_le_bytes())
            .chain_update(ordinal.to_le_bytes())
            .chain_update(synset)
            .chain_update([0])
            .chain_update(url)
            .finalize();
        let first = u64::from_be_bytes(std::array::from_fn(|i| hash[i]));
        let head = EntryHead { hash: first, ordinal, key, lengths: Lengths::of(synset, url) };
        let new = || Pool { spool: Spool::new(self.folder.clone()), urls: 0 };
        let pool = self.pools.entry(dealing).or_insert_with(new);
        pool.urls += 1;
        Ok(pool.spool.push(hash[0], &[head.as_bytes(), synset, url])?)
    }

    /// Enters the new lines that no earlier round has, each once.
    fn compare(&mut self) -> Result<(), Error> {
        let Some(compared) = self.compared.take() else { return Ok(()) };
        for partition in compared.into_partitions() {
            let partition = partition?;
            let lines = lines(&partition, |head: &LineHead| head.lengths);
            let (earlier, new): (Vec<_>, Vec<_>) = lines.into_iter().partition(|(_, synset, _)| synset.is_empty());
            let mut there: HashSet<[u8; 16]> = earlier.into_iter().map(|(head, ..)| head.digest).collect();
            for (head, synset, url) in new {
                if there.insert(head.digest) {
                    self.push_entry(self.dealing, NEW, synset, url)?;
                } else {
                    self.known += 1;
                }
            }
        }
        Ok(())
    }

    /// Cuts the shuffled entries into slices and sends each one's number and bytes to `slices`.
    /// Completes the classes of `spec`, and returns the round that names the slices: without any if a later round has
    /// nothing to fetch.
    pub(crate) fn cut(mut self, spec: &mut DatasetSpec, slices: &mpsc::Sender<(u32, Bytes)>) -> Result<Round, Error> {
        self.compare()?;
        let (entered, start) = (self.new_urls + self.retried.total(), self.start);
        let all_bad = self.bad_lines > 0 && self.new_urls + self.known + self.not_chosen == 0;
        if all_bad || start.round == 1 && entered == 0 {
            let mut message =
                format!("no line of the list is good: {} bad, {} not chosen", self.bad_lines, self.not_chosen);
            self.bad_line_examples.iter().for_each(|line| message += &format!("; {line}"));
            return Err(Error::Invalid(message));
        }
        let cut = |(dealing, pool): (&Dealing, &Pool)| pool.urls.div_ceil(dealing.slice_urls.into());
        if u64::from(start.first_slice) + self.pools.iter().map(cut).sum::<u64>() > 999_999 {
            return Err(Error::Invalid(format!(
                "{entered} URLs in slices of {}: choose larger slices",
                spec.slice_urls
            )));
        }
        if spec.classes.is_empty() {
            let class = |synset: &String| Class { synset: synset.clone(), name: String::new() };
            spec.classes = self.urls_per_class.keys().map(class).collect();
        }
        let mut cutter = Cutter {
            dealing: self.dealing,
            first_slice: start.first_slice,
            slices,
            done: Vec::new(),
            open: None,
            key: start.first_key,
        };
        for (dealing, pool) in self.pools {
            cutter.dealing = dealing;
            for partition in pool.spool.into_partitions() {
                let partition = partition?;
                let mut entries = lines(&partition, |head: &EntryHead| head.lengths);
                entries.sort_unstable();
                for (head, synset, url) in entries {
                    cutter.push(head.key, synset, url)?;
                }
            }
            cutter.close()?;
        }
        Ok(Round {
            format: 1,
            nonce: crate::store::nonce(),
            request_id: start.request_id,
            traceparent: start.traceparent,
            cause: start.cause,
            accepts_damage: false,
            round: start.round,
            first_slice: start.first_slice,
            slices: cutter.done,
            first_key: start.first_key,
            new_urls: self.new_urls,
            urls_per_class: self.urls_per_class,
            retried: self.retried,
            not_chosen: self.not_chosen,
            known: self.known,
            bad_lines: self.bad_lines,
            bad_line_examples: self.bad_line_examples,
        })
    }
}

/// What stands for a synset and a URL when they are compared.
fn digest(synset: &str, url: &str) -> [u8; 16] {
    let hash = Sha256::new().chain_update(synset).chain_update([0]).chain_update(url).finalize();
    std::array::from_fn(|i| hash[i])
}

/// What stands before a synset and a URL in a spool. Sorted by it, entries are shuffled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct EntryHead {
    hash: u64,
    ordinal: u64,
    /// [`NEW`]: it has none yet.
    key: u64,
    lengths: Lengths,
}

/// What stands before a synset and a URL that are compared; those of earlier rounds are left out, and have no length.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct LineHead {
    digest: [u8; 16],
    lengths: Lengths,
}

/// Of a synset and a URL, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Lengths {
    synset: u32,
    url: u32,
}

impl Lengths {
    fn of(synset: &[u8], url: &[u8]) -> Self {
        Self { synset: synset.len() as u32, url: url.len() as u32 }
    }
}

/// What a spool's partition holds: heads, each with its synset and URL.
fn lines<H: FromBytes>(mut bytes: &[u8], lengths: impl Fn(&H) -> Lengths) -> Vec<(H, &[u8], &[u8])> {
    let next = || {
        let (head, rest) = H::read_from_prefix(bytes).ok()?;
        let Lengths { synset, url } = lengths(&head);
        let (synset, rest) = rest.split_at_checked(synset as usize)?;
        let (url, rest) = rest.split_at_checked(url as usize)?;
        bytes = rest;
        Some((head, synset, url))
    };
    std::iter::from_fn(next).collect()
}

/// Writes one slice after the other.
struct Cutter<'a> {
    dealing: Dealing,
    first_slice: u32,
    slices: &'a mpsc::Sender<(u32, Bytes)>,
    done: Vec<Slice>,
    open: Option<SliceWriter>,
    /// Of the next new URL.
    key: u64,
}

impl Cutter<'_> {
    fn push(&mut self, key: u64, synset: &[u8], url: &[u8]) -> Result<(), Error> {
        let key = match key {
            NEW => {
                self.key += 1;
                self.key - 1
            }
            given => given,
        };
        let open = match &mut self.open {
            Some(open) => open,
            None => self.open.insert(SliceWriter::new()?),
        };
        open.push(key, synset, url)?;
        if open.urls() == self.dealing.slice_urls { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), Error> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let urls = open.urls();
        let bytes = Bytes::from(open.finish()?);
        let number = self.first_slice + self.done.len() as u32;
        self.done.push(Slice { urls, sha256: proto::shard::sha256_hex(&bytes), once: self.dealing.once });
        self.slices
            .blocking_send((number, bytes))
            .map_err(|_| Error::Local("the upload of slices has ended".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Rejection;
    use std::io::Cursor;

    fn options() -> ListOptions {
        ListOptions::default()
    }

    /// The lines of all slices in order.
    fn lines(catalog: Catalog, spec: &mut DatasetSpec) -> Result<(Round, Vec<String>), Error> {
        let (sender, mut receiver) = mpsc::channel(1000);
        let round = catalog.cut(spec, &sender)?;
        drop(sender);
        let mut lines = Vec::new();
        while let Some((number, bytes)) = receiver.blocking_recv() {
            let text = proto::slice::unpack(&bytes).expect("own output");
            assert_eq!(text.lines().count(), round.slices[(number - round.first_slice) as usize].urls as usize);
            lines.extend(text.lines().map(str::to_owned));
        }
        Ok((round, lines))
    }

    fn cut(list: &str, mut spec: DatasetSpec) -> Result<(DatasetSpec, Round, Vec<String>), Error> {
        let mut catalog = Catalog::new(&spec, RoundStart::first("r"), None);
        catalog.read("list", Cursor::new(list.to_owned()), &options())?;
        let (round, lines) = lines(catalog, &mut spec)?;
        Ok((spec, round, lines))
    }

    #[test]
    fn a_later_round_holds_what_is_tried_again_under_its_key_and_new_lines_under_the_next_ones() {
        let classes = vec![Class { synset: "n1".into(), name: "dog".into() }];
        let mut spec = DatasetSpec { classes, ..DatasetSpec::default() };
        let start = RoundStart { round: 2, first_slice: 7, first_key: 100, ..RoundStart::first("r2") };
        let mut catalog = Catalog::new(&spec, start.clone(), None);
        for url in ["http://a", "http://b"] {
            catalog.push_known("n1", url).expect("in memory");
        }
        let dealing = catalog.dealing;
        catalog.retry(dealing, (41, "n1", "http://b"), Err(Rejection::Timeout)).expect("in memory");
        let list = "n1\thttp://c\nn1\thttp://a\nn2\thttp://a\nn1\thttp://c\nn1\thttp://d\nbad\n";
        catalog.read("list", Cursor::new(list), &options()).expect("reads");
        let (round, mut slices) = lines(catalog, &mut spec).expect("cuts");
        slices.sort();
        let keys: Vec<&str> = slices.iter().filter_map(|line| line.split('\t').next()).collect();
        assert_eq!(keys, ["100", "101", "41"]);
        assert_eq!(slices[2], "41\tn1\thttp://b");
        assert_eq!(
            (round.first_slice, round.new_urls, round.known, round.not_chosen, round.bad_lines),
            (7, 2, 2, 1, 1)
        );
        assert_eq!((round.urls(), round.retried), (3, OutcomeCounts::from_iter([(Err(Rejection::Timeout), 1)])));

        let nothing = lines(Catalog::new(&spec, start, None), &mut spec).expect("no error");
        assert_eq!((nothing.0.urls(), nothing.1.len()), (0, 0));
    }

    #[test]
    fn each_dealing_has_slices_of_its_own() {
        let mut spec = DatasetSpec { slice_urls: 100, ..DatasetSpec::default() };
        let start = RoundStart { round: 2, cause: Cause::MayComeBack, ..RoundStart::first("r2") };
        let mut catalog = Catalog::new(&spec, start, None);
        let dealings = [(100, true), (100, false), (10, false), (1, false)];
        for (key, (slice_urls, once)) in (0..).zip(dealings.iter().cycle().take(48)) {
            let dealing = Dealing { slice_urls: *slice_urls, once: *once };
            catalog.retry(dealing, (key, "n1", "http://a"), Err(Rejection::Unfetched)).expect("in memory");
        }
        let (round, lines) = lines(catalog, &mut spec).expect("cuts");
        assert_eq!((round.cause, lines.len()), (Cause::MayComeBack, 48));
        let slices: Vec<_> = round.slices.iter().map(|slice| (slice.urls, slice.once)).collect();
        assert_eq!(slices, [vec![(1, false); 12], vec![(10, false), (2, false), (12, false), (12, true)]].concat());
    }

    #[test]
    fn slices_hold_every_url_once_shuffled_by_seed_and_keyed_by_place() {
        let list: String = (0..2500).map(|i| format!("n{}\thttp://h/{i}\n", i % 3)).collect();
        let spec = DatasetSpec { slice_urls: 1000, seed: 7, ..DatasetSpec::default() };
        let (resolved, round, lines) = cut(&list, spec.clone()).expect("a good list");
        assert_eq!(round.slices.iter().map(|s| s.urls).collect::<Vec<_>>(), [1000, 1000, 500]);
        assert_eq!((round.urls(), round.urls_per_class["n1"]), (2500, 833));
        assert_eq!(resolved.classes.iter().map(|c| c.synset.as_str()).collect::<Vec<_>>(), ["n0", "n1", "n2"]);
        let mut urls: Vec<&str> = Vec::new();
        for (key, line) in lines.iter().enumerate() {
            let (found, rest) = line.split_once('\t').expect("three columns");
            assert_eq!(found, key.to_string());
            urls.push(rest);
        }
        assert!(!urls.is_sorted());
        urls.sort_unstable();
        let mut listed: Vec<&str> = list.lines().collect();
        listed.sort_unstable();
        assert_eq!(urls, listed);
        assert_eq!(cut(&list, spec.clone()).expect("again").2, lines);
        assert_ne!(cut(&list, DatasetSpec { seed: 8, ..spec }).expect("again").2, lines);
    }

    #[test]
    fn chosen_classes_keep_their_order_and_names_and_the_rest_is_counted() {
        let classes =
            vec![Class { synset: "n2".into(), name: "dog".into() }, Class { synset: "n1".into(), name: String::new() }];
        let spec = DatasetSpec { classes, ..DatasetSpec::default() };
        let (spec, round, lines) = cut("n1\thttp://a\nn2\thttp://b\nn3\thttp://c\nbad\n", spec).expect("a good list");
        assert_eq!((round.urls(), round.not_chosen, round.bad_lines, lines.len()), (2, 1, 1, 2));
        assert_eq!(round.bad_line_examples, ["list:4: no tab between synset and URL"]);
        assert_eq!(spec.classes.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["dog", ""]);
        let none = DatasetSpec { classes: vec![Class { synset: "x".into(), name: "x".into() }], ..spec };
        assert!(matches!(cut("n1\thttp://a\n", none), Err(Error::Invalid(_))));
    }
}
