//! The catalog: all URLs of a list, dealt into slices by their sites, in bounded memory.
//!
//! Lines come together by their URLs first: one that stands in the list again is fetched once, and may have several
//! classes. Entries go into the partitions of a [`Spool`](crate::spool::Spool) by a hash of their site; `dealing` makes
//! slices of them. Within a slice they are in the order of a hash of (seed, ordinal, synset, URL). Nothing else decides,
//! so the same list gives the same slices. Each of the three steps has two threads or more, one of which does what comes
//! behind.

mod batches;
mod by_url;
mod pack;
mod pools;

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;

use bytes::Bytes;
use proto::columns::LONGEST_COLUMNS;
use proto::dataset_spec::Class;
use proto::outcomes::OutcomeRow;
use proto::round::{Cause, LargeSite, Round, Slice};
use proto::site::Sites;
use proto::slice::split_tail;
use proto::{DatasetSpec, MultiLabel, OutcomeCounts, Rejection, columns, pb};
use tokio::sync::mpsc;

use self::batches::{Batch, Batches};
use self::by_url::{KNOWN, LineKey, Lines, SortedLine, SortedLines};
use self::pack::Dealt;
pub(crate) use self::pools::Dealing;
use self::pools::{Place, Pools};
use crate::dealing::{self, Large};
use crate::error::Error;
use crate::list::{self, Entry, Line, ListOptions};

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
    pools: Pools,
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
    lines: Lines,
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

impl Catalog {
    /// An empty one. The classes of `spec` choose which synsets are taken; `folder` is where large lists are spooled;
    /// `sites` say which URLs are of one site, and how many of them are many.
    pub(crate) fn new(spec: &DatasetSpec, start: RoundStart, folder: Option<PathBuf>, sites: Arc<Sites>) -> Self {
        let chosen = spec.classes.iter().map(|class| class.synset.clone()).collect::<HashSet<_>>();
        Self {
            seed: spec.seed,
            lines: Lines::new(spec.seed, folder.clone()),
            ordinals: 0,
            understood: Vec::new(),
            preview: Vec::new(),
            start,
            sites,
            dealing: Dealing { slice_urls: spec.slice_urls, once: false },
            pools: Pools::new(spec.seed, folder.clone()),
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

    /// See [`Catalog::limited`].
    pub(crate) fn largest(&self) -> u64 {
        self.largest
    }

    /// How the lists were understood, for people.
    pub(crate) fn shown(&mut self) -> Shown {
        Shown { understood: std::mem::take(&mut self.understood), preview: std::mem::take(&mut self.preview) }
    }

    /// Reads one source to its end.
    pub(crate) fn read(&mut self, name: &str, source: impl Read + Send, options: &ListOptions) -> Result<(), Error> {
        let lines = self.lines.take();
        let (lines, understood) = batches::spooled(lines, Lines::push, |batches| {
            list::read(name, source, options, &mut |number, line| self.take(name, number, line, batches))
        })?;
        self.lines = lines;
        if self.understood.len() < EXAMPLES {
            self.understood.push(format!("{name}: {understood}"));
        }
        Ok(())
    }

    fn take(&mut self, name: &str, number: u64, line: Line<'_>, batches: &mut Batches<LineKey>) -> Result<(), Error> {
        match line {
            Line::Entry(entry) => {
                if self.preview.len() < EXAMPLES {
                    let Entry { synset, url, columns } = entry;
                    let [synset, url, columns] = [synset, url, columns].map(str::to_owned);
                    self.preview.push(pb::ListRow { synset, url, columns });
                }
                self.push(entry, batches)?;
            }
            Line::Absent => self.not_chosen += 1,
            Line::Bad(what) => self.bad(|| format!("{name}:{number}: {what}")),
        }
        Ok(())
    }

    fn bad(&mut self, line: impl FnOnce() -> String) {
        self.bad_lines += 1;
        if self.bad_line_examples.len() < EXAMPLES {
            self.bad_line_examples.push(line());
        }
    }

    fn push(&mut self, Entry { synset, url, columns }: Entry<'_>, batches: &mut Batches<LineKey>) -> Result<(), Error> {
        if self.chosen.as_ref().is_some_and(|chosen| !chosen.contains(synset)) {
            self.not_chosen += 1;
            return Ok(());
        }
        self.length += (by_url::HEAD_BYTES + synset.len() + url.len() + columns.len()) as u64;
        if self.length > self.largest {
            return Err(list::too_long(self.largest));
        }
        self.ordinals += 1;
        let between = if columns.is_empty() { "" } else { "\t" };
        batches.push(LineKey::new(self.seed, url, self.ordinals - 1), synset, &[url, between, columns])
    }

    /// Tells of a URL of an earlier round, so that a new line with it is known.
    pub(crate) fn push_known(&mut self, synset: &str, url: &str) -> Result<(), Error> {
        Ok(self.lines.push_known(synset, url)?)
    }

    /// Takes in a URL of an earlier round, which is to be fetched again; `why` is what became of it last.
    pub(crate) fn retry(&mut self, dealing: Dealing, row: &OutcomeRow, why: Rejection) -> Result<(), Error> {
        self.retried.add(Err(why), 1);
        let columns = row.columns.as_deref().unwrap_or_default();
        let between = if columns.is_empty() { "" } else { "\t" };
        let tail = [&row.url, between, columns].concat();
        let place = Place::new(self.seed, &self.sites, dealing, row.key.max(0) as u64, &tail);
        Ok(self.pools.push(dealing, place, &row.synset, &tail)?)
    }

    /// Enters each URL once that no earlier round has. While a partition is entered, the next one is read and sorted.
    fn enter_lines(&mut self) -> Result<(), Error> {
        let (lines, pools, dealing) = (self.lines.take(), self.pools.take(), self.dealing);
        let mut parts = lines.into_sorted()?;
        // No more than two are in memory.
        let (sender, sorted) = sync_channel(0);
        let pooled = thread::scope(|scope| {
            // Those that nobody waits for are not read.
            let sorter = scope.spawn(move || _ = parts.try_for_each(|part| sender.send(part)));
            let pool = |pools: &mut Pools, batch: &Batch<Place>| pools.push_all(dealing, batch);
            let pooled = batches::spooled(pools, pool, |entries| {
                for lines in sorted {
                    self.enter_all(&lines?, entries)?;
                    if self.new_urls == self.limit {
                        break;
                    }
                }
                Ok(())
            });
            sorter.join().unwrap_or_else(|panic| resume_unwind(panic));
            pooled
        });
        self.pools = pooled?.0;
        Ok(())
    }

    fn enter_all(&mut self, lines: &SortedLines, entries: &mut Batches<Place>) -> Result<(), Error> {
        for same in lines.urls() {
            match same.last().filter(|line| line.ordinal == KNOWN) {
                Some(known) => self.pass_over(lines, same, lines.text(known).0),
                None if self.new_urls == self.limit => return Ok(()),
                None => self.enter(lines, same, entries)?,
            }
        }
        Ok(())
    }

    /// Counts the lines of a URL that an earlier round has under this class.
    fn pass_over(&mut self, lines: &SortedLines, same: &[SortedLine], known: &str) {
        for line in same.iter().filter(|line| line.ordinal != KNOWN) {
            let (synset, tail) = lines.text(line);
            match synset == known || self.multi_label.is_some() {
                true => self.known += 1,
                false => {
                    self.bad(|| format!("{}: is of class {synset:?} here, and {known:?} before", split_tail(tail).0))
                }
            }
        }
    }

    /// Enters a URL, which has one or several lines.
    fn enter(&mut self, lines: &SortedLines, same: &[SortedLine], entries: &mut Batches<Place>) -> Result<(), Error> {
        let (first, (synset, tail)) = (same[0], lines.text(&same[0]));
        let mut synsets: Vec<&str> = Vec::new();
        if same.len() > 1 {
            let mut there = HashSet::new();
            synsets.extend(same.iter().map(|line| lines.text(line).0).filter(|synset| there.insert(*synset)));
            self.repeated += (same.len() - synsets.len()) as u64;
        }
        let mut with_classes = None;
        if synsets.len() > 1 {
            let (url, columns) = split_tail(tail);
            if self.several == 0 {
                self.several_example = format!("{url} ({})", synsets[..synsets.len().min(3)].join(", "));
            }
            self.several += 1;
            match self.multi_label {
                Some(MultiLabel::Drop) => return Ok(()),
                Some(MultiLabel::All) => {
                    let columns = columns::with_classes(columns, synsets.iter().copied());
                    if columns.len() > 2 * LONGEST_COLUMNS {
                        let what = format!("stands in {} classes, which are too many for one picture", synsets.len());
                        self.bad(|| format!("{url}: {what}"));
                        return Ok(());
                    }
                    with_classes = Some([url, "\t", &columns].concat());
                }
                Some(MultiLabel::First) | None => {}
            }
        }
        let classes = self.urls_per_class.len();
        match self.urls_per_class.get_mut(synset) {
            Some(urls) => *urls += 1,
            None => {
                if matches!(classes, EARLY_CLASSES | MOST_CLASSES) {
                    self.check_classes()?;
                }
                if classes == MOST_CLASSES {
                    return Err(Error::Invalid(format!("more than {MOST_CLASSES} synsets: {WAY_OUT}")));
                }
                self.urls_per_class.insert(synset.to_owned(), 1);
            }
        }
        self.new_urls += 1;
        let tail = with_classes.as_deref().unwrap_or(tail);
        let key = self.start.first_key + first.ordinal;
        entries.push(Place::new(self.seed, &self.sites, self.dealing, key, tail), synset, &[tail])
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
            if self.bad_lines + self.not_chosen + self.several == 0 {
                return Err(Error::Invalid("the list is empty".to_owned()));
            }
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
        for (_, pool) in self.pools.take().into_spools() {
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
        let pools = self.pools.take();
        let (done, large_sites) = pack::packed(slices, |hand_over| self.deal(pools, first_slice, entered, hand_over))?;
        Ok(self.into_round(done.into_values().collect(), Some(large_sites)))
    }

    /// Deals the entries into slices, and hands each over with its number.
    fn deal(
        &self,
        pools: Pools,
        first_slice: u32,
        entered: u64,
        hand_over: &mut dyn FnMut(Dealt) -> Result<(), Error>,
    ) -> Result<Vec<LargeSite>, Error> {
        let (mut next, mut large_sites) = (first_slice, Vec::new());
        for (Dealing { slice_urls, once }, pool) in pools.into_spools() {
            let first = next;
            let mut number_it = |n: u32, hand: dealing::Hand| {
                let number = first.saturating_add(n);
                if number > LAST_SLICE {
                    return Err(Error::Invalid(format!(
                        "{entered} URLs in slices of {slice_urls}, and of fewer for slow sites: choose larger slices or \
                         budgets"
                    )));
                }
                next = next.max(number + 1);
                hand_over(Dealt { number, once, hand })
            };
            let folder = self.folder.clone();
            let large = dealing::deal(pool, folder, self.seed, slice_urls, &self.sites, &mut number_it)?;
            large_sites.extend(large.into_iter().map(|Large { site, slices }| LargeSite {
                site,
                first_slice: first + slices.start,
                slices: slices.end - slices.start,
            }));
        }
        Ok(large_sites)
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

#[cfg(test)]
mod tests;
