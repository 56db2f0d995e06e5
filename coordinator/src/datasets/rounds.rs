//! Later rounds: URLs that are fetched again, and new ones, as slices of their own.
//!
//! The slices come first, under numbers that nobody has used; the catalog's object commits them. What a coordinator
//! that died in between has left is garbage, and the next round's numbers begin behind it.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use proto::manifest::{Manifest, ManifestClass};
use proto::outcomes::OutcomeRow;
use proto::round::Round;
use proto::{DatasetId, Rejection, Stored, keys};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::info;

use super::{Dataset, Datasets, Stage};
use crate::catalog::{Catalog, RoundStart};
use crate::error::Error;
use crate::history::History;
use crate::store::{Created, Store};

/// Slices that are uploaded at the same time.
const UPLOADS: usize = 8;

/// Which URLs a later round fetches again.
#[derive(Debug, Clone)]
pub(crate) enum Retry {
    /// Those whose failure is transient, but not of these synsets, which have enough.
    Transient { full: HashSet<String> },
    /// Those of these synsets that were left because their class seemed to have enough.
    Unfetched { short: HashSet<String> },
}

impl Retry {
    /// Everything that failed transiently, of classes that do not have enough.
    pub(crate) fn transient(dataset: &Dataset) -> Self {
        let per_class = u64::from(dataset.spec.per_class);
        let classes = dataset.manifest.iter().flat_map(|manifest| &manifest.classes);
        let full = classes.filter(|class| per_class > 0 && class.total() >= per_class);
        Self::Transient { full: full.map(|class| class.synset.clone()).collect() }
    }

    /// The latest outcome of a URL that is fetched again; None: it is not.
    fn selects(&self, row: &OutcomeRow) -> Option<Rejection> {
        let rejection = row.outcome().ok()?.err()?;
        let wanted = match self {
            Self::Transient { full } => rejection.is_transient(row.http_status) && !full.contains(&row.synset),
            Self::Unfetched { short } => rejection == Rejection::ClassFull && short.contains(&row.synset),
        };
        wanted.then_some(rejection)
    }
}

/// Synsets of which a manifest counts fewer than `per_class` samples although some of their URLs were left unfetched.
pub(crate) fn short(manifest: &Manifest, per_class: u32) -> HashSet<String> {
    let unfetched = |class: &ManifestClass| class.outcomes.of(Err(Rejection::ClassFull)) > 0;
    let classes = manifest.classes.iter();
    let short = classes.filter(|class| class.total() < u64::from(per_class) && unfetched(class));
    short.map(|class| class.synset.clone()).collect()
}

/// Takes into `catalog` what is to be fetched again, and, if new lines are to be `compared`, what is known. Blocks its
/// thread.
pub(crate) fn gather(history: &History<'_>, retry: &Retry, compared: bool, catalog: &mut Catalog) -> Result<(), Error> {
    let indexes = history.indexes()?;
    history.latest_first(&indexes, |_, rows| -> Result<(), Error> {
        for (row, _) in rows.iter().filter(|(_, latest)| *latest) {
            let Some(rejection) = retry.selects(row) else { continue };
            catalog.retry(row.key.max(0) as u64, &row.synset, &row.url, Err(rejection))?;
        }
        Ok(())
    })?;
    if compared { history.each_listed(|synset, url| catalog.push_known(synset, url)) } else { Ok(()) }
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
    pub(crate) async fn next_round(&self, dataset: &Dataset, request_id: &str) -> Result<RoundStart, Error> {
        let last = dataset.rounds.last().ok_or_else(|| Error::Local(format!("{} has no round", dataset.id)))?;
        let there = self.store.list(&keys::slices(&dataset.id)).await?;
        let highest = there.iter().filter_map(|key| keys::number(key).ok()).max().unwrap_or(0);
        let highest = u32::try_from(highest).unwrap_or(u32::MAX).max(last.first_slice + last.slices.len() as u32 - 1);
        // One that nobody asked for belongs to the request that opened the last one.
        let traceparent = Some(proto::trace::current()).filter(|current| !current.is_empty());
        Ok(RoundStart {
            traceparent: traceparent.unwrap_or_else(|| last.traceparent.clone()),
            round: last.round + 1,
            first_slice: highest.saturating_add(1),
            first_key: last.first_key + last.new_urls,
            request_id: request_id.to_owned(),
        })
    }

    /// Opens a round for URLs of `short` classes that were left unfetched. False: there are none.
    pub(super) async fn open_unfetched(
        self: &Arc<Self>,
        dataset: &Dataset,
        short: HashSet<String>,
    ) -> Result<bool, Error> {
        let _name = self.lock_name(dataset.id.name()).await;
        let start = self.next_round(dataset, &crate::store::nonce()).await?;
        let (handle, store, folder) = (Handle::current(), self.store.clone(), self.folder.clone());
        let (id, spec) = (dataset.id.clone(), Arc::clone(&dataset.spec));
        let (rounds, classes) = (Arc::clone(&dataset.rounds), short.len());
        let round = put_slices(&self.store, &dataset.id, move |slices| {
            let mut spec = (*spec).clone();
            let mut catalog = Catalog::new(&spec, start, folder);
            let history = History { handle: &handle, store: &store, dataset: &id, rounds: &rounds };
            gather(&history, &Retry::Unfetched { short }, false, &mut catalog)?;
            catalog.cut(&mut spec, slices)
        });
        let round = round.await?;
        if round.slices.is_empty() {
            return Ok(false);
        }
        info!(dataset = &*dataset.id, classes, urls = round.urls(), "classes are short; their other URLs are opened");
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
        assert!(retry.selects(&row(Rejection::Timeout, None, "n1")).is_some());
        assert!(retry.selects(&row(Rejection::HttpStatus, Some(503), "n1")).is_some());
        assert!(retry.selects(&row(Rejection::Timeout, None, "n2")).is_none());
        assert!(retry.selects(&row(Rejection::NotFound, Some(404), "n1")).is_none());
        assert!(retry.selects(&row(Rejection::ClassFull, None, "n1")).is_none());
        assert!(retry.selects(&OutcomeRow { outcome: "kept".into(), ..row(Rejection::Dns, None, "n1") }).is_none());
    }

    #[test]
    fn urls_that_were_left_are_opened_for_short_classes_alone() {
        let retry = Retry::Unfetched { short: HashSet::from(["n1".to_owned()]) };
        assert!(retry.selects(&row(Rejection::ClassFull, None, "n1")).is_some());
        assert!(retry.selects(&row(Rejection::ClassFull, None, "n2")).is_none());
        assert!(retry.selects(&row(Rejection::Timeout, None, "n1")).is_none());
    }
}
