//! Later rounds: URLs that are fetched again, and new ones, as slices of their own.
//!
//! The slices come first, under numbers that nobody has used; the catalog's object commits them. What a coordinator
//! that died in between has left is garbage, and the next round's numbers begin behind it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use proto::gist::GistRow;
use proto::manifest::{Manifest, ManifestClass};
use proto::round::{Cause, Round};
use proto::{DatasetId, DatasetSpec, OutcomeCounts, Rejection, ShardIndex, Stored, keys};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::info;

use super::{Dataset, Datasets, Stage};
use crate::catalog::{Catalog, Dealing, RoundStart};
use crate::error::Error;
use crate::gists::{Gists, INDEXES};
use crate::history::{History, HistoryError, Seen};
use crate::sites::Deal;
use crate::store::{Created, Store};
use crate::turns::{Made, Streaks, Turns};

/// Slices that are uploaded at the same time.
const UPLOADS: usize = 8;
/// Shards whose rows are read together, once their gists have shown that there is something in them.
const LATER: usize = 32;

/// How long workers wait for an automatic round after so many in a row in which nobody got to anything, because sites
/// throttle; after one more there is no other. A coordinator that begins meanwhile does not wait.
const RESTS: [Duration; 2] = [Duration::from_secs(240), Duration::from_secs(480)];

/// Which URLs are fetched retry.
#[derive(Debug, Clone)]
pub(crate) enum Retry {
    /// Those whose failure is transient, but not of these synsets, which have enough. Unless `all` are wanted, those
    /// that have failed in several rounds only if it is their [turn](Turns).
    Transient { full: HashSet<String>, all: bool },
    /// Likewise, but only what has failed in no more than one round, or was not got to: the automatic round.
    Once { full: HashSet<String> },
    /// Those of these synsets that were left because their class seemed to have enough.
    Left { short: HashSet<String> },
}

impl Retry {
    /// What failed transiently, of classes that do not have enough.
    pub(crate) fn transient(dataset: &Dataset, all: bool) -> Self {
        let per_class = u64::from(dataset.spec.per_class);
        let classes = dataset.manifest.iter().flat_map(|manifest| &manifest.classes);
        let full = classes.filter(|class| per_class > 0 && class.total() >= per_class);
        Self::Transient { full: full.map(|class| class.synset.clone()).collect(), all }
    }

    /// The same as an automatic round has it.
    fn once(dataset: &Dataset) -> Self {
        let full = match &dataset.wanted {
            Some(wanted) => {
                let wanted = wanted.by_label();
                let classes = (0u32..).zip(&dataset.spec.classes);
                let full = classes.filter(|(label, _)| wanted.get(label) == Some(&0));
                full.map(|(_, class)| class.synset.clone()).collect()
            }
            None => HashSet::new(),
        };
        Self::Once { full }
    }

    /// The latest outcome of a URL that is fetched again; None: it is not. `synset` is its class, `failed` are those
    /// that have failed in several rounds.
    fn selects(&self, row: &GistRow, synset: &str, failed: Option<&Seen>) -> Option<Rejection> {
        let rejection = row.outcome.err()?;
        let transient = || rejection.is_transient(row.http_status);
        let wanted = match self {
            Self::Transient { full, .. } => transient() && !full.contains(synset),
            Self::Once { full } => {
                let failed = || failed.is_some_and(|failed| failed.contains(row.key));
                let retry = match rejection {
                    Rejection::Unfetched => true,
                    Rejection::SliceFailed => false,
                    _ => transient() && !failed(),
                };
                retry && !full.contains(synset)
            }
            Self::Left { short } => rejection == Rejection::ClassFull && short.contains(synset),
        };
        wanted.then_some(rejection)
    }

    /// The slices for URLs of a shard that have this outcome. What nobody got to comes into slices as large as that
    /// one; a slice that was closed because it failed is dealt in slices a tenth as large.
    fn dealing(&self, slice_urls: u32, index: &ShardIndex, outcome: Rejection) -> Dealing {
        let plain = Dealing { slice_urls, once: false };
        match (self, outcome) {
            (Self::Once { .. }, Rejection::Unfetched) => {
                let urls = index.outcomes.total();
                let tenth = |urls: u32| urls.div_ceil(10);
                let mut size = slice_urls;
                while size > 1 && u64::from(tenth(size)) >= urls {
                    size = tenth(size);
                }
                let closed = index.outcomes_file.is_none();
                Dealing { slice_urls: if closed { tenth(size) } else { size }, once: false }
            }
            (Self::Once { .. }, _) => Dealing { once: true, ..plain },
            _ => plain,
        }
    }
}

/// Synsets of which a manifest counts fewer than `per_class` samples although some of their URLs were left unfetched.
pub(crate) fn short(manifest: &Manifest, per_class: u32) -> HashSet<String> {
    let unfetched = |class: &ManifestClass| class.outcomes.of(Err(Rejection::ClassFull)) > 0;
    let classes = manifest.classes.iter();
    let short = classes.filter(|class| class.total() < u64::from(per_class) && unfetched(class));
    short.map(|class| class.synset.clone()).collect()
}

/// Whether an automatic round can have anything to fetch, by what is known without reading the outcomes.
pub(super) fn may_be_opened(dataset: &Dataset) -> bool {
    let outcomes = dataset.outcomes_so_far();
    let unfetched = |outcomes: &OutcomeCounts| outcomes.of(Err(Rejection::Unfetched)) > 0;
    // After one for what had failed once, all that is left has failed twice.
    let last = dataset.rounds.last().filter(|last| last.cause == Cause::MayComeBack && !unfetched(&last.retried));
    let failed = |outcome: proto::Outcome| outcome.err().is_some_and(|rejection| rejection.is_transient(Some(503)));
    unfetched(&outcomes) || last.is_none() && outcomes.iter().any(|(outcome, _)| failed(outcome))
}

/// How many automatic rounds there were last, at the most one more than rests, in which nobody got to anything.
fn standing(history: &History<'_>) -> Result<usize, HistoryError> {
    let automatic = history.rounds.iter().rev().take_while(|round| round.cause == Cause::MayComeBack);
    let last: Vec<&Round> = automatic.take(RESTS.len() + 1).collect();
    if last.is_empty() {
        return Ok(0);
    }
    let tars = history.tars()?;
    for (standing, round) in last.iter().enumerate() {
        let shards: Vec<u32> = round.shards().collect();
        for shards in shards.chunks(INDEXES) {
            let indexes = history.indexes_of(shards.iter().copied(), &tars)?;
            let stood_still = indexes.values().all(|index| {
                let unfetched = index.outcomes.of(Err(Rejection::Unfetched)) == index.outcomes.total();
                unfetched && index.outcomes_file.is_some()
            });
            if !stood_still {
                return Ok(standing);
            }
        }
    }
    Ok(last.len())
}

/// The keys that have failed in more rounds than one; what nobody got to has not failed. None if that cannot be. And
/// whether sites said of URLs, last, that these are to be asked for later.
fn failed_twice(history: &History<'_>, gists: &mut Gists<'_>) -> Result<(Seen, bool), Error> {
    let (mut once, mut twice) = (Seen::new(history.rounds), Seen::new(history.rounds));
    let mut throttled = false;
    if history.rounds.len() > 1 {
        gists.latest_first(None, |gist, latest, _| -> Result<(), Error> {
            for (row, latest) in gist.rows.iter().zip(latest) {
                let Err(rejection) = row.outcome else { continue };
                let later = rejection == Rejection::Unfetched && matches!(row.http_status, Some(429 | 503));
                throttled |= *latest && later;
                let failed = rejection != Rejection::Unfetched && rejection.is_transient(row.http_status);
                if failed && !once.insert(row.key) {
                    twice.insert(row.key);
                }
            }
            Ok(())
        })?;
    }
    Ok((twice, throttled))
}

/// Which of the URLs that may come back a refresh takes; None: all.
fn turns(
    history: &History<'_>,
    gists: &mut Gists<'_>,
    selects: impl Fn(&GistRow) -> Option<Rejection>,
) -> Result<Option<Turns>, Error> {
    let asked = history.rounds.iter().filter(|round| round.cause == Cause::Request).count();
    if asked < 2 {
        return Ok(None);
    }
    let mut streaks = Streaks::new(history.rounds.last().map_or(0, Round::end_key));
    gists.latest_first(None, |gist, latest, _| -> Result<(), Error> {
        let asked = history.round_of(gist.index.shard).is_some_and(|round| round.cause == Cause::Request);
        for (row, latest) in gist.rows.iter().zip(latest) {
            let made = match row.outcome {
                Err(Rejection::Unfetched) => Made::Untried,
                Err(rejection) if rejection.is_transient(row.http_status) => Made::Failed { asked },
                _ => Made::Other,
            };
            match latest {
                true if selects(row).is_some() => streaks.begin(row.key, made),
                true => {}
                false => streaks.older(row.key, made),
            }
        }
        Ok(())
    })?;
    Ok(Some(streaks.turns(asked as u64)))
}

/// Takes into `catalog` what is to be fetched again, and, if new lines are to be `compared`, what is known. `base` is
/// the latest manifest: what it covers is read as far as something of it is fetched again. How many URLs may come back,
/// but are left for later, and how long workers are to wait for the round. Blocks its thread.
pub(crate) fn gather(
    history: &History<'_>,
    base: Option<&Manifest>,
    spec: &DatasetSpec,
    retry: &Retry,
    compared: bool,
    catalog: &mut Catalog,
) -> Result<(u64, Duration), Error> {
    let mut gists = Gists::find(history, 0, "", base)?;
    let (mut failed, mut rest) = (None, Duration::ZERO);
    if let Retry::Once { .. } = retry {
        let (standing, (twice, throttled)) = (standing(history)?, failed_twice(history, &mut gists)?);
        if let Some(last) = standing.checked_sub(1) {
            let Some(pause) = RESTS.get(last).filter(|_| throttled) else { return Ok((0, Duration::ZERO)) };
            rest = *pause;
        }
        failed = Some(twice);
    }
    let selects = |row: &GistRow| {
        let synset = &spec.classes.get(row.label as usize)?.synset;
        retry.selects(row, synset, failed.as_ref())
    };
    let turns = match retry {
        Retry::Transient { all: false, .. } => turns(history, &mut gists, selects)?,
        _ => None,
    };
    let (mut indexes, mut later, mut waiting) = (BTreeMap::new(), Vec::new(), 0);
    gists.latest_first(None, |gist, latest, rows| -> Result<(), Error> {
        let selected = gist.rows.iter().zip(latest).map(|(row, latest)| {
            let rejection = if *latest { selects(row)? } else { return None };
            let is_due = turns.as_ref().is_none_or(|turns| turns.has(row.key));
            waiting += u64::from(!is_due);
            is_due.then_some(rejection)
        });
        match rows {
            Some(rows) => {
                for (row, rejection) in rows.iter().zip(selected) {
                    let Some(rejection) = rejection else { continue };
                    catalog.retry(retry.dealing(spec.slice_urls, &gist.index, rejection), row, rejection)?;
                }
            }
            None => {
                let selected = gist.rows.iter().zip(selected).filter_map(|(row, of)| Some((row.key, of?)));
                let selected: HashMap<i64, Rejection> = selected.collect();
                if !selected.is_empty() {
                    later.push((gist.index.clone(), selected));
                }
            }
        }
        if later.len() >= LATER {
            retry_later(history, spec, retry, &mut later, catalog)?;
        }
        if compared {
            let mut index = gist.index;
            index.forget_classes();
            indexes.insert(index.shard, index);
        }
        Ok(())
    })?;
    retry_later(history, spec, retry, &mut later, catalog)?;
    if compared {
        history.each_listed(&indexes, |synset, url| catalog.push_known(synset, url))?;
    }
    Ok((waiting, rest))
}

/// Takes into `catalog` rows of shards of which only the gists were read.
fn retry_later(
    history: &History<'_>,
    spec: &DatasetSpec,
    retry: &Retry,
    later: &mut Vec<(ShardIndex, HashMap<i64, Rejection>)>,
    catalog: &mut Catalog,
) -> Result<(), Error> {
    let selected: HashMap<u32, &HashMap<i64, Rejection>> =
        later.iter().map(|(index, selected)| (index.shard, selected)).collect();
    history.each(later.iter().map(|(index, _)| index), |index, rows| -> Result<(), Error> {
        let Some(selected) = selected.get(&index.shard) else { return Ok(()) };
        for row in &rows {
            let Some(&rejection) = selected.get(&row.key) else { continue };
            catalog.retry(retry.dealing(spec.slice_urls, index, rejection), row, rejection)?;
        }
        Ok(())
    })?;
    later.clear();
    Ok(())
}

/// Runs `cut` on a thread and stores the slices that it sends.
pub(crate) async fn put_slices<T: Send + 'static>(
    store: &Store,
    dataset: &DatasetId,
    cut: impl FnOnce(&mpsc::Sender<(u32, Bytes)>) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (sender, slices) = mpsc::channel(UPLOADS);
    let cut = tokio::task::spawn_blocking(move || cut(&sender));
    let put = ReceiverStream::new(slices)
        .map(|(number, bytes)| async move {
            let key = keys::slice(&dataset.shard(number));
            match store.create_same(&key, bytes).await? {
                true => Ok(()),
                false => Err(Error::Aborted(format!("{key} is there already: another coordinator opens a round"))),
            }
        })
        .buffer_unordered(UPLOADS)
        .try_collect::<()>();
    let (put, cut) = tokio::join!(put, cut);
    // Of two errors the first cause: the upload's ends the cutting.
    put?;
    cut?
}

impl Datasets {
    /// Where the next round of a dataset begins.
    pub(crate) async fn next_round(
        &self,
        dataset: &Dataset,
        cause: Cause,
        request_id: &str,
    ) -> Result<RoundStart, Error> {
        let last = dataset.rounds.last().ok_or_else(|| Error::Local(format!("{} has no round", dataset.id)))?;
        let there = self.store.list(&keys::slices(&dataset.id)).await?;
        let highest = there.iter().filter_map(|key| keys::number(key).ok()).max().unwrap_or(0);
        let highest = u32::try_from(highest).unwrap_or(u32::MAX).max(last.first_slice + last.slices.len() as u32 - 1);
        // One that nobody asked for belongs to the request that opened the last one.
        let traceparent = Some(proto::trace::current()).filter(|current| !current.is_empty());
        Ok(RoundStart {
            traceparent: traceparent.unwrap_or_else(|| last.traceparent.clone()),
            cause,
            round: last.round + 1,
            first_slice: highest.saturating_add(1),
            first_key: last.end_key(),
            request_id: request_id.to_owned(),
        })
    }

    /// Opens a round for URLs of `short` classes that were left. False: there are none.
    pub(super) async fn open_short(self: &Arc<Self>, dataset: &Dataset, short: HashSet<String>) -> Result<bool, Error> {
        self.open_again(dataset, Cause::ShortClasses, Retry::Left { short }).await
    }

    /// Opens an automatic round for what may come back and has had no second try yet, and for what nobody got to.
    /// False: there is nothing of that.
    pub(super) async fn open_automatic(self: &Arc<Self>, dataset: &Dataset) -> Result<bool, Error> {
        match may_be_opened(dataset) {
            true => self.open_again(dataset, Cause::MayComeBack, Retry::once(dataset)).await,
            false => Ok(false),
        }
    }

    async fn open_again(self: &Arc<Self>, dataset: &Dataset, cause: Cause, retry: Retry) -> Result<bool, Error> {
        let _name = self.lock_name(dataset.id.name()).await;
        let start = self.next_round(dataset, cause, &crate::store::nonce()).await?;
        let (handle, store, folder) = (Handle::current(), self.store.clone(), self.folder.clone());
        let (id, spec) = (dataset.id.clone(), Arc::clone(&dataset.spec));
        let (rounds, tolerance) = (Arc::clone(&dataset.rounds), dataset.tolerance());
        let (sites, base) = (Arc::clone(&self.sites), dataset.manifest.clone());
        let round = put_slices(&self.store, &dataset.id, move |slices| {
            let mut spec = (*spec).clone();
            let mut catalog = Catalog::new(&spec, start, folder, sites);
            let of = spec.clone();
            let history = History::new(&handle, &store, (&id, &of), &rounds, &tolerance);
            let (_, rest) = gather(&history, base.as_deref(), &of, &retry, false, &mut catalog)?;
            Ok((catalog.cut(&mut spec, slices)?, rest))
        });
        let (round, rest) = round.await?;
        if round.slices.is_empty() {
            return Ok(false);
        }
        let urls = round.urls();
        info!(dataset = &*dataset.id, ?cause, urls, retried = ?round.retried, ?rest, "opening another round");
        self.add_round(&dataset.id, round, rest).await?;
        Ok(true)
    }

    /// Commits a later round whose slices are in the store, and opens its shards after a while.
    pub(crate) async fn add_round(self: &Arc<Self>, id: &DatasetId, round: Round, rest: Duration) -> Result<(), Error> {
        self.term.check(&self.store).await?;
        let key = keys::round(id, round.round);
        if let Created::Lost(theirs) = self.store.create(&key, &round).await? {
            let theirs = Round::from_json(&theirs).map_err(|e| Error::Local(format!("{key}: {e}")))?;
            let same = theirs.request_id == round.request_id;
            self.open_round(id, theirs, false, Duration::ZERO);
            return match same {
                true => Ok(()),
                false => Err(Error::Aborted(format!("another coordinator has opened round {} of {id}", round.round))),
            };
        }
        // A later coordinator that began meanwhile has not seen it: the caller must ask that one, which then finds it.
        self.term.check(&self.store).await?;
        if self.store.get(&keys::tombstone(id)).await?.is_some() {
            return Err(Error::NotFound(format!("{id} has been deleted")));
        }
        info!(dataset = &**id, round = round.round, urls = round.urls(), shards = round.slices.len(), "round opened");
        self.open_round(id, round, true, rest);
        Ok(())
    }

    /// Takes a committed round into the state. `fresh`: it was committed in this term.
    fn open_round(&self, id: &DatasetId, round: Round, fresh: bool, rest: Duration) {
        {
            let now = self.now();
            let mut state = self.state();
            let state = &mut *state;
            let Some(dataset) = state.live.get_mut(id).filter(|dataset| dataset.rounds.len() < round.round as usize)
            else {
                return;
            };
            state.ledger.add(now + rest, id, round.shards(), fresh);
            Arc::make_mut(&mut dataset.rounds).push(round);
            dataset.deal = Deal::new(&dataset.rounds).into();
            dataset.stage = Stage::Fetching;
            dataset.revision += 1;
        }
        self.free.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(rejection: Rejection, http_status: Option<i32>) -> GistRow {
        GistRow { key: 0, label: 0, outcome: Err(rejection), http_status }
    }

    #[test]
    fn transient_failures_are_retried_unless_their_class_has_enough() {
        let retry = Retry::Transient { full: HashSet::from(["n2".to_owned()]), all: false };
        assert!(retry.selects(&row(Rejection::Timeout, None), "n1", None).is_some());
        assert!(retry.selects(&row(Rejection::HttpStatus, Some(503)), "n1", None).is_some());
        assert!(retry.selects(&row(Rejection::Timeout, None), "n2", None).is_none());
        assert!(retry.selects(&row(Rejection::NotFound, Some(404)), "n1", None).is_none());
        assert!(retry.selects(&row(Rejection::ClassFull, None), "n1", None).is_none());
        assert!(retry.selects(&GistRow { outcome: Ok(()), ..row(Rejection::Dns, None) }, "n1", None).is_none());
    }

    #[test]
    fn urls_that_were_left_are_opened_for_short_classes_alone() {
        let retry = Retry::Left { short: HashSet::from(["n1".to_owned()]) };
        assert!(retry.selects(&row(Rejection::ClassFull, None), "n1", None).is_some());
        assert!(retry.selects(&row(Rejection::ClassFull, None), "n2", None).is_none());
        assert!(retry.selects(&row(Rejection::Timeout, None), "n1", None).is_none());
    }

    #[test]
    fn the_automatic_round_asks_once_more_and_for_what_nobody_got_to_always() {
        let retry = Retry::Once { full: HashSet::new() };
        let none = Seen::default();
        assert!(retry.selects(&row(Rejection::Dns, None), "n1", Some(&none)).is_some());
        assert!(retry.selects(&row(Rejection::NotFound, Some(404)), "n1", Some(&none)).is_none());
        assert!(retry.selects(&row(Rejection::SliceFailed, None), "n1", Some(&none)).is_none());
        let mut failed = Seen(vec![0]);
        failed.insert(0);
        assert!(retry.selects(&row(Rejection::Dns, None), "n1", Some(&failed)).is_none());
        assert!(retry.selects(&row(Rejection::Unfetched, None), "n1", Some(&failed)).is_some());
    }

    #[test]
    fn a_slice_that_was_closed_is_dealt_in_tenths_and_one_that_was_left_in_its_own_size() {
        let retry = Retry::Once { full: HashSet::new() };
        let index = |urls, closed: bool| ShardIndex {
            version: 1,
            nonce: String::new(),
            writer: String::new(),
            shard: 0,
            attempt: proto::Attempt { term: 1, n: 0 },
            outcomes: [(Err(Rejection::Unfetched), urls)].into_iter().collect(),
            tars: BTreeMap::new(),
            outcomes_file: (!closed).then(|| proto::index::StoredFile {
                key: String::new(),
                bytes: 0,
                sha256: String::new(),
            }),
        };
        let size = |urls, closed| retry.dealing(10_000, &index(urls, closed), Rejection::Unfetched).slice_urls;
        assert_eq!([10_000, 1_001, 1_000, 7, 2].map(|urls| size(urls, true)), [1_000, 1_000, 100, 1, 1]);
        assert_eq!([10_000, 1_001, 1_000, 7, 1].map(|urls| size(urls, false)), [10_000, 10_000, 1_000, 10, 1]);
        let failed = retry.dealing(10_000, &index(1, false), Rejection::Dns);
        assert_eq!(failed, Dealing { slice_urls: 10_000, once: true });
    }
}
