//! Later rounds: URLs that are fetched again, and new ones, as slices of their own.
//!
//! The slices come first, under numbers that nobody has used; the catalog's object commits them. What a coordinator
//! that died in between has left is garbage, and the next round's numbers begin behind it.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use proto::manifest::{Manifest, ManifestClass};
use proto::outcomes::OutcomeRow;
use proto::round::{Cause, Round};
use proto::{DatasetId, OutcomeCounts, Rejection, ShardIndex, Stored, keys};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::info;

use super::{Dataset, Datasets, Stage};
use crate::catalog::{Catalog, Dealing, RoundStart};
use crate::error::Error;
use crate::history::{History, Seen};
use crate::sites::Deal;
use crate::store::{Created, Store};

/// Slices that are uploaded at the same time.
const UPLOADS: usize = 8;

/// Which URLs are fetched retry.
#[derive(Debug, Clone)]
pub(crate) enum Retry {
    /// Those whose failure is transient, but not of these synsets, which have enough.
    Transient { full: HashSet<String> },
    /// Likewise, but only what has failed in no more than one round, or was not got to: the automatic round.
    Once { full: HashSet<String> },
    /// Those of these synsets that were left because their class seemed to have enough.
    Left { short: HashSet<String> },
}

impl Retry {
    /// Everything that failed transiently, of classes that do not have enough.
    pub(crate) fn transient(dataset: &Dataset) -> Self {
        let per_class = u64::from(dataset.spec.per_class);
        let classes = dataset.manifest.iter().flat_map(|manifest| &manifest.classes);
        let full = classes.filter(|class| per_class > 0 && class.total() >= per_class);
        Self::Transient { full: full.map(|class| class.synset.clone()).collect() }
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

    /// The latest outcome of a URL that is fetched again; None: it is not. `failed` are those that have failed in
    /// several rounds.
    fn selects(&self, row: &OutcomeRow, failed: Option<&Seen>) -> Option<Rejection> {
        let rejection = row.outcome().ok()?.err()?;
        let transient = || rejection.is_transient(row.http_status);
        let wanted = match self {
            Self::Transient { full } => transient() && !full.contains(&row.synset),
            Self::Once { full } => {
                let failed = || failed.is_some_and(|failed| failed.contains(row.key));
                let retry = match rejection {
                    Rejection::Unfetched => true,
                    Rejection::SliceFailed => false,
                    _ => transient() && !failed(),
                };
                retry && !full.contains(&row.synset)
            }
            Self::Left { short } => rejection == Rejection::ClassFull && short.contains(&row.synset),
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

/// Whether the last round was an automatic one in which nobody got to anything: another one would be the same.
fn stands_still(rounds: &[Round], indexes: &BTreeMap<u32, ShardIndex>) -> bool {
    let Some(last) = rounds.last().filter(|last| last.cause == Cause::MayComeBack) else { return false };
    last.shards().filter_map(|shard| indexes.get(&shard)).all(|index| {
        let unfetched = index.outcomes.of(Err(Rejection::Unfetched)) == index.outcomes.total();
        unfetched && index.outcomes_file.is_some()
    })
}

/// Takes into `catalog` what is to be fetched again, and, if new lines are to be `compared`, what is known. Blocks its
/// thread.
pub(crate) fn gather(
    history: &History<'_>,
    retry: &Retry,
    slice_urls: u32,
    compared: bool,
    catalog: &mut Catalog,
) -> Result<(), Error> {
    let indexes = history.indexes()?;
    let failed = match retry {
        Retry::Once { .. } if stands_still(history.rounds, &indexes) => return Ok(()),
        Retry::Once { .. } => Some(history.failed_twice(&indexes)?),
        _ => None,
    };
    history.latest_first(&indexes, |index, rows| -> Result<(), Error> {
        for (row, _) in rows.iter().filter(|(_, latest)| *latest) {
            let Some(rejection) = retry.selects(row, failed.as_ref()) else { continue };
            let dealing = retry.dealing(slice_urls, index, rejection);
            catalog.retry(dealing, row, rejection)?;
        }
        Ok(())
    })?;
    if compared { history.each_listed(&indexes, |url| catalog.push_known(url)) } else { Ok(()) }
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
    cut.map_err(|error| Error::Local(error.to_string()))?
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
        let sites = Arc::clone(&self.sites);
        let round = put_slices(&self.store, &dataset.id, move |slices| {
            let mut spec = (*spec).clone();
            let mut catalog = Catalog::new(&spec, start, folder, sites);
            let of = spec.clone();
            let history = History::new(&handle, &store, (&id, &of), &rounds, &tolerance);
            gather(&history, &retry, spec.slice_urls, false, &mut catalog)?;
            catalog.cut(&mut spec, slices)
        });
        let round = round.await?;
        if round.slices.is_empty() {
            return Ok(false);
        }
        info!(dataset = &*dataset.id, ?cause, urls = round.urls(), retried = ?round.retried, "opening another round");
        self.add_round(&dataset.id, round).await?;
        Ok(true)
    }

    /// Commits a later round whose slices are in the store, and opens its shards.
    pub(crate) async fn add_round(self: &Arc<Self>, id: &DatasetId, round: Round) -> Result<(), Error> {
        self.term.check(&self.store).await?;
        let key = keys::round(id, round.round);
        if let Created::Lost(theirs) = self.store.create(&key, &round).await? {
            let theirs = Round::from_json(&theirs).map_err(|e| Error::Local(format!("{key}: {e}")))?;
            let same = theirs.request_id == round.request_id;
            self.open_round(id, theirs, false);
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
        self.open_round(id, round, true);
        Ok(())
    }

    /// Takes a committed round into the state. `fresh`: it was committed in this term.
    fn open_round(&self, id: &DatasetId, round: Round, fresh: bool) {
        {
            let now = self.now();
            let mut state = self.state();
            let state = &mut *state;
            let Some(dataset) = state.live.get_mut(id).filter(|dataset| dataset.rounds.len() < round.round as usize)
            else {
                return;
            };
            state.ledger.add(now, id, round.shards(), fresh);
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

    fn row(outcome: Rejection, http_status: Option<i32>, synset: &str) -> OutcomeRow {
        OutcomeRow {
            synset: synset.to_owned(),
            outcome: outcome.name().to_owned(),
            http_status,
            ..OutcomeRow::default()
        }
    }

    #[test]
    fn transient_failures_are_retried_unless_their_class_has_enough() {
        let retry = Retry::Transient { full: HashSet::from(["n2".to_owned()]) };
        assert!(retry.selects(&row(Rejection::Timeout, None, "n1"), None).is_some());
        assert!(retry.selects(&row(Rejection::HttpStatus, Some(503), "n1"), None).is_some());
        assert!(retry.selects(&row(Rejection::Timeout, None, "n2"), None).is_none());
        assert!(retry.selects(&row(Rejection::NotFound, Some(404), "n1"), None).is_none());
        assert!(retry.selects(&row(Rejection::ClassFull, None, "n1"), None).is_none());
        assert!(
            retry.selects(&OutcomeRow { outcome: "kept".into(), ..row(Rejection::Dns, None, "n1") }, None).is_none()
        );
    }

    #[test]
    fn urls_that_were_left_are_opened_for_short_classes_alone() {
        let retry = Retry::Left { short: HashSet::from(["n1".to_owned()]) };
        assert!(retry.selects(&row(Rejection::ClassFull, None, "n1"), None).is_some());
        assert!(retry.selects(&row(Rejection::ClassFull, None, "n2"), None).is_none());
        assert!(retry.selects(&row(Rejection::Timeout, None, "n1"), None).is_none());
    }

    #[test]
    fn the_automatic_round_asks_once_more_and_for_what_nobody_got_to_always() {
        let retry = Retry::Once { full: HashSet::new() };
        let none = Seen::default();
        assert!(retry.selects(&row(Rejection::Dns, None, "n1"), Some(&none)).is_some());
        assert!(retry.selects(&row(Rejection::NotFound, Some(404), "n1"), Some(&none)).is_none());
        assert!(retry.selects(&row(Rejection::SliceFailed, None, "n1"), Some(&none)).is_none());
        let mut failed = Seen(vec![0]);
        failed.insert(0);
        assert!(retry.selects(&row(Rejection::Dns, None, "n1"), Some(&failed)).is_none());
        assert!(retry.selects(&row(Rejection::Unfetched, None, "n1"), Some(&failed)).is_some());
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
