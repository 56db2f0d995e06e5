//! Lists that callers stream up, or that lie in the own store, on their way into the catalog.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use globset::{GlobBuilder, GlobMatcher};
use proto::ids::{IdError, is_name};
use proto::pb::create_dataset_request::{Part, Start};
use proto::pb::{self, CreateDatasetRequest};
use proto::round::{Cause, Round};
use proto::{DatasetId, DatasetSpec};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};
use tonic::Streaming;
use tracing::{Instrument, warn};

use crate::catalog::{Catalog, RoundStart, Shown};
use crate::datasets::rounds::{Retry, gather, put_slices};
use crate::datasets::{Datasets, Stage};
use crate::error::Error;
use crate::history::History;
use crate::inbox::Received;
use crate::list::ListOptions;
use crate::store::Store;

/// A caller that sends nothing for so long has lost its list.
const IDLE: Duration = Duration::from_secs(600);
/// Lists that are read at once; each takes a few threads, and memory for its lines.
static READING: Semaphore = Semaphore::const_new(4);

/// See `CreateDataset` in `dataset.proto`.
pub(super) async fn create(
    datasets: &Arc<Datasets>,
    mut stream: Streaming<CreateDatasetRequest>,
) -> Result<pb::CreateDatasetResponse, Error> {
    let start = first(&mut stream).await?;
    if !is_name(&start.name) || start.name.len() > 54 {
        let rule = "1 to 54 of a-z 0-9 - . , beginning and ending with a letter or digit";
        return Err(Error::Invalid(format!("name = {:?}: must be {rule}", start.name)));
    }
    let spec = DatasetSpec::from_new_json(if start.spec_json.is_empty() { "{}" } else { &start.spec_json })?;
    // Who cannot have the name hears it before the list is sent; nobody is kept from it while it is.
    if datasets.by_request(&start.request_id).is_none() && datasets.find(&start.name).is_ok() {
        return Err(taken(&start.name));
    }
    let received = receive(datasets, &mut stream).await?;
    let name = datasets.lock_name(&start.name).await;
    if let Some((id, round)) = datasets.by_request(&start.request_id) {
        return Ok(response(&id, &round));
    }
    if datasets.find(&start.name).is_err() {
        datasets.catch_up(&start.name).await?;
        if let Some((id, round)) = datasets.by_request(&start.request_id) {
            return Ok(response(&id, &round));
        }
    }
    if datasets.find(&start.name).is_ok() {
        return Err(taken(&start.name));
    }
    let id = format!("{}-{}", start.name, &crate::store::nonce()[..8]);
    let id: DatasetId = id.parse().map_err(|error: IdError| Error::Invalid(format!("name: {error}")))?;
    let reading = READING.acquire().await;
    let (pieces, to_read) = mpsc::channel(32);
    let round = RoundStart::first(&start.request_id);
    if start.dry_run {
        let (folder, of, sites) = (datasets.folder.clone(), start.clone(), Arc::clone(&datasets.sites));
        let largest = datasets.largest_list;
        let read = tokio::task::spawn_blocking(move || {
            let _reading = reading;
            let mut catalog = Catalog::new(&spec, round, folder.clone(), sites).limited(limit(&of), largest);
            read_lists(&mut catalog, &spec, &of, Pieces::new(to_read), folder)?;
            let shown = catalog.shown();
            let (round, slowest_site) = catalog.survey(&spec)?;
            Ok(pb::CreateDatasetResponse { slowest_site, ..with_shown(response(&id, &round), shown) })
        });
        let read = async { read.await? };
        let response = with_lists(datasets, &start, received, pieces, read).await?;
        return Ok(pb::CreateDatasetResponse { dataset: String::new(), ..response });
    }
    let uncommitted = Uncommitted { datasets: Arc::clone(datasets), id: Some(id.clone()) };
    let made = put_slices(&datasets.store, &id, {
        let (folder, start, sites) = (datasets.folder.clone(), start.clone(), Arc::clone(&datasets.sites));
        let largest = datasets.largest_list;
        move |slices| {
            // Also when the caller goes away meanwhile, until this has ended.
            let _reading = reading;
            let mut spec = spec;
            let mut catalog = Catalog::new(&spec, round, folder.clone(), sites).limited(limit(&start), largest);
            read_lists(&mut catalog, &spec, &start, Pieces::new(to_read), folder)?;
            let shown = catalog.shown();
            let round = catalog.cut(&mut spec, slices)?;
            name_classes(&mut spec, &start.class_names);
            Ok((spec, round, shown))
        }
    });
    let made = with_lists(datasets, &start, received, pieces, made).await;
    let datasets = Arc::clone(datasets);
    // A caller that goes away must not cut this in the middle.
    let finish = async move {
        let _name = name;
        let (spec, round, shown) = made?;
        datasets.commit(&id, spec, round.clone()).await?;
        uncommitted.stays();
        Ok(with_shown(response(&id, &round), shown))
    };
    tokio::spawn(finish.in_current_span()).await?
}

/// A dataset that is not there yet. Its slices are removed unless it comes to be: its list may fail, or its caller go away.
struct Uncommitted {
    datasets: Arc<Datasets>,
    id: Option<DatasetId>,
}

impl Uncommitted {
    fn stays(mut self) {
        self.id = None;
    }
}

impl Drop for Uncommitted {
    fn drop(&mut self) {
        let (Some(id), Ok(runtime)) = (self.id.take(), Handle::try_current()) else { return };
        let datasets = Arc::clone(&self.datasets);
        runtime.spawn(async move {
            if let Err(error) = datasets.remove_uncommitted(&id).await {
                warn!(dataset = &*id, %error, "cannot remove slices of a list that failed");
            }
        });
    }
}

/// See `RefreshDataset` in `dataset.proto`.
pub(super) async fn refresh(
    datasets: &Arc<Datasets>,
    mut stream: Streaming<CreateDatasetRequest>,
) -> Result<pb::CreateDatasetResponse, Error> {
    let start = first(&mut stream).await?;
    if !start.spec_json.is_empty() || !start.class_names.is_empty() {
        let message =
            "start.spec_json and start.class_names must be empty: they were chosen when the dataset was created";
        return Err(Error::Invalid(message.to_owned()));
    }
    let (found, _) = datasets.find(&start.name)?;
    let received = receive(datasets, &mut stream).await?;
    let name = datasets.lock_name(found.id.name()).await;
    if let Some((id, round)) = datasets.by_request(&start.request_id) {
        return Ok(response(&id, &round));
    }
    let (dataset, _) = datasets.find(&found.id)?;
    if let (Stage::Failed(error), true) = (&dataset.stage, dataset.rounds.is_empty()) {
        return Err(Error::Precondition(error.clone()));
    }
    if !matches!(dataset.stage, Stage::Ready | Stage::Failed(_)) {
        let message = format!("dataset {:?} is still being fetched: wait until it is ready", dataset.id.name());
        return Err(Error::Precondition(message));
    }
    let round = datasets.next_round(&dataset, Cause::Request, &start.request_id).await?;
    let reading = READING.acquire().await;
    let (pieces, to_read) = mpsc::channel(32);
    let made = put_slices(&datasets.store, &dataset.id, {
        let (folder, start, sites) = (datasets.folder.clone(), start.clone(), Arc::clone(&datasets.sites));
        let largest = datasets.largest_list;
        let (handle, store) = (Handle::current(), datasets.store.clone());
        let dataset = dataset.clone();
        move |slices| {
            // Also when the caller goes away meanwhile, until this has ended.
            let _reading = reading;
            let mut spec = (*dataset.spec).clone();
            let mut catalog = Catalog::new(&spec, round, folder.clone(), sites).limited(limit(&start), largest);
            let lists = read_lists(&mut catalog, &spec, &start, Pieces::new(to_read), folder)?;
            let shown = catalog.shown();
            let mut tolerance = dataset.tolerance();
            tolerance.any |= start.accept_damage;
            let of = (&dataset.id, &*dataset.spec);
            let history = History::new(&handle, &store, of, &dataset.rounds, &tolerance);
            let (base, retry) = (dataset.manifest.as_deref(), Retry::transient(&dataset, start.all));
            let (left, _) = gather(&history, base, &dataset.spec, &retry, lists > 0, &mut catalog)?;
            let round = catalog.cut(&mut spec, slices)?;
            Ok((Round { accepts_damage: start.accept_damage, ..round }, shown, left))
        }
    });
    let (round, shown, left) = with_lists(datasets, &start, received, pieces, made).await?;
    let respond = move |id: &DatasetId, round: &Round| {
        let response = with_shown(response(id, round), shown);
        pb::CreateDatasetResponse { left_for_later: left, ..response }
    };
    if round.slices.is_empty() {
        datasets.seal_again(&dataset.id, start.accept_damage);
        return Ok(pb::CreateDatasetResponse { round: 0, ..respond(&dataset.id, &round) });
    }
    let datasets = Arc::clone(datasets);
    let finish = async move {
        let _name = name;
        let added = datasets.add_round(&dataset.id, round.clone(), Duration::ZERO).await;
        added.map(|()| respond(&dataset.id, &round))
    };
    tokio::spawn(finish.in_current_span()).await?
}

/// What the lists are made into, while they are pumped.
async fn with_lists<T>(
    datasets: &Datasets,
    start: &Start,
    received: Received,
    pieces: mpsc::Sender<Piece>,
    made: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let (pumped, made) = tokio::join!(pump(datasets, start, received, pieces), made);
    match made {
        // Of two errors the first cause: a bad list ends the pumping; a list that cannot be handed on ends the parsing.
        Err(Error::Aborted(what)) => Err(pumped.err().unwrap_or(Error::Aborted(what))),
        made => made,
    }
}

async fn first(stream: &mut Streaming<CreateDatasetRequest>) -> Result<Start, Error> {
    match next(stream).await? {
        Some(Part::Start(start)) if start.request_id.is_empty() => {
            Err(Error::Invalid("start.request_id is empty".to_owned()))
        }
        Some(Part::Start(start)) => Ok(start),
        _ => Err(Error::Invalid("the first message must be `start`".to_owned())),
    }
}

async fn next(stream: &mut Streaming<CreateDatasetRequest>) -> Result<Option<Part>, Error> {
    let message = tokio::time::timeout(IDLE, stream.message()).await;
    let message = message.map_err(|_| Error::Aborted("nothing was sent for ten minutes".to_owned()))?;
    let message = message.map_err(|status| Error::Aborted(status.message().to_owned()))?;
    message
        .map(|message| message.part.ok_or_else(|| Error::Invalid("a message without any part".to_owned())))
        .transpose()
}

/// Takes all of a list.
async fn receive(datasets: &Datasets, stream: &mut Streaming<CreateDatasetRequest>) -> Result<Received, Error> {
    let mut inbox = datasets.inboxes.begin(datasets.folder.clone(), datasets.largest_list);
    while let Some(part) = inbox.wait(next(stream)).await? {
        match part {
            Part::Start(_) => return Err(Error::Invalid("a second `start`".to_owned())),
            Part::Source(source) => inbox.source(source.name),
            Part::Data(data) => inbox.push(&data).await?,
        }
    }
    inbox.finish().await
}

fn taken(name: &str) -> Error {
    Error::Exists(format!("a dataset is called {name:?} already"))
}

/// What the caller has sent, on its way to the thread that parses it.
enum Piece {
    Source(String),
    Data(Bytes),
    /// Without this, the stream was cut and nothing counts.
    End,
}

/// Hands what the caller has sent, then the lists in the own store, to the parser.
async fn pump(
    datasets: &Datasets,
    start: &Start,
    mut received: Received,
    pieces: mpsc::Sender<Piece>,
) -> Result<(), Error> {
    // The parser has ended, and says why.
    let over = |_| Error::Aborted("the list was not read to its end".to_owned());
    for (name, length) in std::mem::take(&mut received.sources) {
        pieces.send(Piece::Source(name)).await.map_err(over)?;
        let mut left = length;
        while left > 0 {
            let data = received.read(left).await?;
            if data.is_empty() {
                return Err(Error::Local("a temporary file has become shorter".to_owned()));
            }
            left -= data.len() as u64;
            pieces.send(Piece::Data(data)).await.map_err(over)?;
        }
    }
    for pattern in &start.store_keys {
        for key in matching(&datasets.store, pattern).await? {
            let Some(mut bytes) = datasets.store.stream(&key, None).await? else {
                return Err(Error::Invalid(format!("store_keys: there is no object {key:?}")));
            };
            pieces.send(Piece::Source(key.clone())).await.map_err(over)?;
            while let Some(data) = bytes.next().await {
                let data = data.map_err(|error| Error::Aborted(format!("{key}: {error}")))?;
                pieces.send(Piece::Data(data)).await.map_err(over)?;
            }
        }
    }
    pieces.send(Piece::End).await.map_err(over)
}

/// The keys that a key, a folder or a pattern stands for.
async fn matching(store: &Store, pattern: &str) -> Result<Vec<String>, Error> {
    let wild = pattern.find(['*', '?', '[', '{']);
    if wild.is_none() && !pattern.ends_with('/') {
        return Ok(vec![pattern.to_owned()]);
    }
    let plain = &pattern[..wild.unwrap_or(pattern.len())];
    let folder = plain.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut keys = store.list(folder).await?;
    match wild {
        Some(_) => {
            let glob = glob(pattern)?;
            keys.retain(|key| glob.is_match(key));
        }
        None => keys.retain(|key| key.starts_with(pattern)),
    }
    match keys.is_empty() {
        true => Err(Error::Invalid(format!("store_keys: no object matches {pattern:?}"))),
        false => Ok(keys),
    }
}

/// What `*` (any text without a slash), `?` (any character but a slash), `[..]` and `{..,..}` in a pattern stand for.
fn glob(pattern: &str) -> Result<GlobMatcher, Error> {
    let glob = GlobBuilder::new(pattern).literal_separator(true).build();
    Ok(glob.map_err(|error| Error::Invalid(format!("store_keys: {error}")))?.compile_matcher())
}

/// Reads all sources into the catalog; how many there were.
fn read_lists(
    catalog: &mut Catalog,
    spec: &DatasetSpec,
    start: &Start,
    mut pieces: Pieces,
    folder: Option<PathBuf>,
) -> Result<u64, Error> {
    let options = ListOptions {
        format: start.format(),
        synset_column: start.synset_column.clone(),
        url_column: start.url_column.clone(),
        url_format: start.url_format.clone(),
        columns: start.columns.clone(),
        unlabelled: spec.unlabelled,
        keep: spec.kept_columns().map(str::to_owned).collect(),
        folder,
        largest: Some(catalog.largest()),
    };
    let mut lists = 0;
    while let Some(name) = pieces.next_source()? {
        catalog.read(&name, &mut pieces, &options)?;
        lists += 1;
    }
    Ok(lists)
}

/// Gives each class without a name the one that the caller knows, or that of its synset.
fn name_classes(spec: &mut DatasetSpec, names: &HashMap<String, String>) {
    for class in spec.classes.iter_mut().filter(|class| class.name.is_empty()) {
        class.name.clone_from(names.get(&class.synset).unwrap_or(&class.synset));
    }
}

/// The pieces as one reader per source.
struct Pieces {
    received: mpsc::Receiver<Piece>,
    data: Bytes,
    /// What stands behind the current source.
    ahead: Option<Piece>,
}

impl Pieces {
    fn new(received: mpsc::Receiver<Piece>) -> Self {
        Self { received, data: Bytes::new(), ahead: None }
    }

    fn receive(&mut self) -> io::Result<Piece> {
        let gone = || io::Error::new(io::ErrorKind::ConnectionAborted, "the caller has gone away");
        self.received.blocking_recv().ok_or_else(gone)
    }

    /// Passes over what is left of the current source, to the next; None at the end of the last.
    fn next_source(&mut self) -> Result<Option<String>, Error> {
        io::copy(self, &mut io::sink()).map_err(|error| Error::Aborted(error.to_string()))?;
        Ok(match self.ahead.take() {
            Some(Piece::Source(name)) => Some(name),
            _ => None,
        })
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.data.is_empty() {
            if self.ahead.is_some() {
                return Ok(0);
            }
            match self.receive()? {
                Piece::Data(data) => self.data = data,
                end => self.ahead = Some(end),
            }
        }
        let n = buffer.len().min(self.data.len());
        self.data.copy_to_slice(&mut buffer[..n]);
        Ok(n)
    }
}

fn response(id: &DatasetId, round: &Round) -> pb::CreateDatasetResponse {
    pb::CreateDatasetResponse {
        dataset: id.to_string(),
        urls: round.urls(),
        not_chosen: round.not_chosen,
        bad_lines: round.bad_lines,
        bad_line_examples: round.bad_line_examples.clone(),
        shards: round.slices.len() as u32,
        round: round.round,
        retried: (&round.retried).into(),
        known: round.known,
        repeated: round.repeated,
        several: round.several,
        urls_per_class: round.urls_per_class.clone().into_iter().collect(),
        ..Default::default()
    }
}

fn with_shown(response: pb::CreateDatasetResponse, shown: Shown) -> pb::CreateDatasetResponse {
    pb::CreateDatasetResponse { understood: shown.understood, preview: shown.preview, ..response }
}

/// The most new URLs that are taken.
fn limit(start: &Start) -> u64 {
    if start.limit == 0 { u64::MAX } else { start.limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_stand_for_keys_and_never_cross_a_slash() {
        for (pattern, key, expected) in [
            ("lists/*.tsv", "lists/birds.tsv", true),
            ("lists/*.tsv", "lists/a/birds.tsv", false),
            ("lists/*/*", "lists/a/birds.tsv", true),
            ("l?sts/b*r*.tsv", "lists/birds-birds.tsv", true),
            ("lists/b?", "lists/b/", false),
            ("*", "", true),
            ("a*b", "aab", true),
            ("a*b", "aabc", false),
            ("lists/{birds,fish}.tsv", "lists/fish.tsv", true),
        ] {
            assert_eq!(glob(pattern).expect("a pattern").is_match(key), expected, "{pattern} {key}");
        }
    }
}
