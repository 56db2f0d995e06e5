//! The catalog: all URLs of a list, shuffled and cut into slices, in bounded memory.
//!
//! Entries go into the partitions of a [`Spool`] by a hash of (seed, ordinal, synset, URL); the partitions, each sorted by
//! that hash, are the shuffled catalog. The order depends on nothing else, so the same list gives the same slices.

use std::collections::{BTreeMap, HashSet};
use std::io::{Read, Write};
use std::path::PathBuf;

use bytes::Bytes;
use proto::DatasetSpec;
use proto::dataset_spec::Class;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::error::Error;
use crate::list::{self, ListOptions};
use crate::spool::Spool;

/// A list with more classes than this is not one of classes.
const MOST_CLASSES: usize = 1_000_000;

/// Bad lines that are shown.
const EXAMPLES: usize = 10;

/// `catalog/000001.json`: the commit of a round, a committed part of the catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Round {
    /// Of this format: 1.
    pub(crate) format: u32,
    /// The writer's own random word.
    pub(crate) nonce: String,
    /// The caller's: a repeated request finds it here.
    pub(crate) request_id: String,
    /// Counts the dataset's rounds from 1.
    pub(crate) round: u32,
    /// Number of the first slice.
    pub(crate) first_slice: u32,
    /// In the order of their numbers.
    pub(crate) slices: Vec<Slice>,
    /// URLs in all slices together.
    pub(crate) urls: u64,
    /// By synset.
    pub(crate) urls_per_class: BTreeMap<String, u64>,
    /// Lines of synsets that were not chosen.
    pub(crate) not_chosen: u64,
    /// Lines without a synset or without a URL.
    pub(crate) bad_lines: u64,
    /// The first few of them.
    pub(crate) bad_line_examples: Vec<String>,
}

/// One slice of a round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Slice {
    /// In it.
    pub(crate) urls: u32,
    /// Of the object's bytes, in hex.
    pub(crate) sha256: String,
}

impl Round {
    pub(crate) fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }
}

/// Gathers the entries of all sources.
pub(crate) struct Catalog {
    seed: u64,
    spool: Spool,
    /// None: all that occur.
    chosen: Option<HashSet<String>>,
    urls_per_class: BTreeMap<String, u64>,
    urls: u64,
    not_chosen: u64,
    bad_lines: u64,
    bad_line_examples: Vec<String>,
}

impl Catalog {
    /// An empty one. The classes of `spec` choose which synsets are taken; `folder` is where large lists are spooled.
    pub(crate) fn new(spec: &DatasetSpec, folder: Option<PathBuf>) -> Self {
        let chosen = spec.classes.iter().map(|class| class.synset.clone()).collect::<HashSet<_>>();
        Self {
            seed: spec.seed,
            spool: Spool::new(folder),
            chosen: (!chosen.is_empty()).then_some(chosen),
            urls_per_class: BTreeMap::new(),
            urls: 0,
            not_chosen: 0,
            bad_lines: 0,
            bad_line_examples: Vec::new(),
        }
    }

    /// Reads one source to its end.
    pub(crate) fn read(&mut self, name: &str, source: impl Read, options: &ListOptions) -> Result<(), Error> {
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
        let classes = self.urls_per_class.len();
        match self.urls_per_class.get_mut(synset) {
            Some(urls) => *urls += 1,
            None if classes == MOST_CLASSES => {
                return Err(Error::Invalid(format!(
                    "more than {MOST_CLASSES} synsets: is the first column the class?"
                )));
            }
            None => drop(self.urls_per_class.insert(synset.to_owned(), 1)),
        }
        let ordinal = self.urls.to_le_bytes();
        let hash = Sha256::new()
            .chain_update(self.seed.to_le_bytes())
            .chain_update(ordinal)
            .chain_update(synset)
            .chain_update([0])
            .chain_update(url)
            .finalize();
        let line = [synset.len() as u32, url.len() as u32].map(u32::to_le_bytes);
        self.spool.push(hash[0], &[&hash[..8], &ordinal, &line[0], &line[1], synset.as_bytes(), url.as_bytes()])?;
        self.urls += 1;
        Ok(())
    }

    /// Cuts the shuffled catalog into slices of `spec.slice_urls` and sends each one's number and bytes to `slices`. Returns the
    /// spec with its classes complete, and the round that names the slices.
    pub(crate) fn cut(
        self,
        mut spec: DatasetSpec,
        request_id: &str,
        slices: &mpsc::Sender<(u32, Bytes)>,
    ) -> Result<(DatasetSpec, Round), Error> {
        if self.urls == 0 {
            let mut message =
                format!("no line of the list is good: {} bad, {} not chosen", self.bad_lines, self.not_chosen);
            self.bad_line_examples.iter().for_each(|line| message += &format!("; {line}"));
            return Err(Error::Invalid(message));
        }
        if self.urls.div_ceil(u64::from(spec.slice_urls)) > 999_999 {
            return Err(Error::Invalid(format!(
                "{} URLs in slices of {}: choose larger slices",
                self.urls, spec.slice_urls
            )));
        }
        if spec.classes.is_empty() {
            let class = |synset: &String| Class { synset: synset.clone(), name: synset.clone() };
            spec.classes = self.urls_per_class.keys().map(class).collect();
        }
        for class in spec.classes.iter_mut().filter(|class| class.name.is_empty()) {
            class.name.clone_from(&class.synset);
        }
        let mut cutter = Cutter { per_slice: spec.slice_urls, slices, done: Vec::new(), open: None, key: 0 };
        for partition in self.spool.into_partitions() {
            let partition = partition?;
            let mut records = records(&partition);
            records.sort_unstable_by_key(|&(hash, ordinal, ..)| (hash, ordinal));
            for (_, _, synset, url) in records {
                cutter.push(synset, url)?;
            }
        }
        cutter.close()?;
        let round = Round {
            format: 1,
            nonce: crate::store::nonce(),
            request_id: request_id.to_owned(),
            round: 1,
            first_slice: 0,
            slices: cutter.done,
            urls: self.urls,
            urls_per_class: self.urls_per_class,
            not_chosen: self.not_chosen,
            bad_lines: self.bad_lines,
            bad_line_examples: self.bad_line_examples,
        };
        Ok((spec, round))
    }
}

/// The records of a partition, as [`Catalog::push`] made them: hash, ordinal, synset, URL.
fn records(mut bytes: &[u8]) -> Vec<(u64, u64, &[u8], &[u8])> {
    fn number<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
        let (head, rest) = bytes.split_first_chunk::<N>()?;
        *bytes = rest;
        Some(*head)
    }
    let mut next = || {
        let hash = u64::from_be_bytes(number(&mut bytes)?);
        let ordinal = u64::from_le_bytes(number(&mut bytes)?);
        let synset = u32::from_le_bytes(number(&mut bytes)?) as usize;
        let url = u32::from_le_bytes(number(&mut bytes)?) as usize;
        let (text, rest) = bytes.split_at_checked(synset + url)?;
        bytes = rest;
        let (synset, url) = text.split_at(synset);
        Some((hash, ordinal, synset, url))
    };
    std::iter::from_fn(&mut next).collect()
}

/// Writes `KEY<TAB>synset<TAB>url` lines into one slice after the other.
struct Cutter<'a> {
    per_slice: u32,
    slices: &'a mpsc::Sender<(u32, Bytes)>,
    done: Vec<Slice>,
    open: Option<(zstd::Encoder<'static, Vec<u8>>, u32)>,
    key: u64,
}

impl Cutter<'_> {
    fn push(&mut self, synset: &[u8], url: &[u8]) -> Result<(), Error> {
        let (encoder, urls) = match &mut self.open {
            Some(open) => open,
            None => self.open.insert((zstd::Encoder::new(Vec::new(), 3)?, 0)),
        };
        write!(encoder, "{}\t", self.key)?;
        encoder.write_all(synset)?;
        encoder.write_all(b"\t")?;
        encoder.write_all(url)?;
        encoder.write_all(b"\n")?;
        self.key += 1;
        *urls += 1;
        if *urls == self.per_slice { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<(), Error> {
        let Some((encoder, urls)) = self.open.take() else { return Ok(()) };
        let bytes = Bytes::from(encoder.finish()?);
        let number = self.done.len() as u32;
        self.done.push(Slice { urls, sha256: proto::shard::sha256_hex(&bytes) });
        self.slices
            .blocking_send((number, bytes))
            .map_err(|_| Error::Local("the upload of slices has ended".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::pb::ListFormat;
    use std::io::Cursor;

    fn cut(list: &str, spec: DatasetSpec) -> Result<(DatasetSpec, Round, Vec<String>), Error> {
        let options = ListOptions { format: ListFormat::Auto, synset_column: String::new(), url_column: String::new() };
        let mut catalog = Catalog::new(&spec, None);
        catalog.read("list", Cursor::new(list.to_owned()), &options)?;
        let (sender, mut receiver) = mpsc::channel(1000);
        let (spec, round) = catalog.cut(spec, "r", &sender)?;
        drop(sender);
        let mut lines = Vec::new();
        while let Some((number, bytes)) = receiver.blocking_recv() {
            let text = zstd::decode_all(&bytes[..]).expect("own output");
            let text = String::from_utf8(text).expect("own output");
            assert_eq!(text.lines().count(), round.slices[number as usize].urls as usize);
            lines.extend(text.lines().map(str::to_owned));
        }
        Ok((spec, round, lines))
    }

    #[test]
    fn slices_hold_every_url_once_shuffled_by_seed_and_keyed_by_place() {
        let list: String = (0..2500).map(|i| format!("n{}\thttp://h/{i}\n", i % 3)).collect();
        let spec = DatasetSpec { slice_urls: 1000, seed: 7, ..DatasetSpec::default() };
        let (resolved, round, lines) = cut(&list, spec.clone()).expect("a good list");
        assert_eq!(round.slices.iter().map(|s| s.urls).collect::<Vec<_>>(), [1000, 1000, 500]);
        assert_eq!((round.urls, round.urls_per_class["n1"]), (2500, 833));
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
        assert_eq!((round.urls, round.not_chosen, round.bad_lines, lines.len()), (2, 1, 1, 2));
        assert_eq!(round.bad_line_examples, ["list:4: no tab between synset and URL"]);
        assert_eq!(spec.classes.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["dog", "n1"]);
        let none = DatasetSpec { classes: vec![Class { synset: "x".into(), name: "x".into() }], ..spec };
        assert!(matches!(cut("n1\thttp://a\n", none), Err(Error::Invalid(_))));
    }
}
