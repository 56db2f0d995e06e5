//! Reads the pictures of a batch whose addresses are files, or objects of the store: no host has to be waited for, and
//! none is to blame. Rows of Parquet files are read together, wherever these are.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use parquet::data_type::ByteArray;
use proto::caught::caught;
use proto::files::{self, FileUrl, Part, Place};
use proto::{Limits, Rejection};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Dispatcher;
use super::batch::{ConnectionPermit, FetchResult, Shared, SliceEntry};
use crate::fetch::{Body, ResponseInfo, rows};
use crate::metrics::InFlight;

/// Files that are read at once for one batch: those of another machine take their time.
const READERS: usize = 8;

impl Dispatcher {
    /// Begins with a batch's files; their results come as those of URLs.
    pub(super) fn read_files(self: &Arc<Self>, entries: Vec<SliceEntry>, batch: &Arc<Shared>) {
        let mut spans: HashMap<String, usize> = HashMap::new();
        let mut together: Vec<Vec<SliceEntry>> = Vec::new();
        for entry in entries {
            match files::span(&entry.url) {
                None => together.push(vec![entry]),
                Some(span) => match spans.get(span) {
                    Some(&at) => together[at].push(entry),
                    None => {
                        spans.insert(span.to_owned(), together.len());
                        together.push(vec![entry]);
                    }
                },
            }
        }
        let readers = together.len().min(READERS);
        *batch.files() = together.into();
        for _ in 0..readers {
            tokio::spawn(Arc::clone(self).read_some(Arc::clone(batch)));
        }
    }

    /// Reads what no other reader has begun with, until there is nothing left.
    async fn read_some(self: Arc<Self>, batch: Arc<Shared>) {
        while let Some(connection) = self.connection().await {
            let Some(mut entries) = batch.next_files() else { return };
            batch.start(entries.len());
            match entries.pop() {
                Some(entry) if entries.is_empty() && files::span(&entry.url).is_none() => {
                    self.read_one(&batch, entry, connection).await;
                }
                Some(entry) => {
                    entries.push(entry);
                    self.read_rows(&batch, entries, connection).await;
                }
                None => {}
            }
        }
    }

    async fn connection(&self) -> Option<ConnectionPermit> {
        let permit = Arc::clone(&self.connections).acquire_owned().await.ok()?;
        Some(ConnectionPermit { _permit: permit, _in_flight: InFlight::begin() })
    }

    async fn read_one(&self, batch: &Shared, entry: SliceEntry, connection: ConnectionPermit) {
        let begun = Instant::now();
        let body = match files::parse(&entry.url) {
            Some(url) => batch.cut.run_until_cancelled(self.body(url, &batch.limits)).await,
            None => Some(Err(Rejection::BadUrl)),
        };
        let body = body.unwrap_or(Err(Rejection::Unfetched));
        batch.file_result(entry, begun.elapsed(), body.map(|body| (body, connection)));
    }

    async fn body(&self, url: FileUrl<'static>, limits: &Limits) -> Result<Body, Rejection> {
        let roots = self.fetcher.roots();
        let path = match url.place {
            Place::Path(path) => path,
            Place::Stored(key) => return self.stored(roots.object(&key)?, url.part, limits).await,
            Place::Web(_) => return Err(Rejection::BadUrl),
        };
        let extent = blocking(move || roots.extent(&path, &url.part)).await?;
        let mut body = self.fetcher.room(extent.length, limits).await?;
        blocking(move || extent.read(&mut body.bytes).map(|()| body)).await
    }

    /// Reads rows of one column of one file, which stand near each other.
    async fn read_rows(self: &Arc<Self>, batch: &Arc<Shared>, entries: Vec<SliceEntry>, connection: ConnectionPermit) {
        let mut place = None;
        let mut by_row: HashMap<u64, SliceEntry> = HashMap::with_capacity(entries.len());
        for entry in entries {
            match files::parse(&entry.url) {
                Some(FileUrl { place: at, part: Part::Row { column, of, row, .. } }) => {
                    place.get_or_insert((at, of, column));
                    by_row.insert(row, entry);
                }
                _ => batch.file_result(entry, Duration::ZERO, Err(Rejection::BadUrl)),
            }
        }
        let Some((place, of, column)) = place else { return };
        let mut wanted: Vec<u64> = by_row.keys().copied().collect();
        wanted.sort_unstable();
        let (values, mut received) = mpsc::channel(1);
        let (roots, max) = (self.fetcher.roots(), batch.limits.max_bytes);
        let hand = move |row, value: Result<ByteArray, Rejection>| {
            let value = value.and_then(|value| match value.len() as u64 > max {
                true => Err(Rejection::TooLarge),
                false => Ok(value),
            });
            values.blocking_send((row, value)).is_ok()
        };
        // What is asked for elsewhere has connections of its own.
        let mut connection = Some(connection).filter(|_| matches!(place, Place::Path(_)));
        let reading = async {
            match place {
                Place::Path(path) => blocking(move || rows(roots.open(&path)?, &column, &wanted, hand)).await,
                place => {
                    let read = self.read_groups(batch, &place, of, column.into_owned(), &wanted, hand);
                    batch.cut.run_until_cancelled(read).await.unwrap_or(Err(Rejection::Unfetched))
                }
            }
        };
        let handing = async {
            let mut begun = Instant::now();
            while let Some((row, value)) = received.recv().await {
                let spent = begun.elapsed();
                let Some(entry) = by_row.remove(&row) else { continue };
                let body = match value {
                    Err(why) => Err(why),
                    Ok(_) if batch.is_ending() => Err(Rejection::Unfetched),
                    Ok(value) => match self.fetcher.room(value.len() as u64, &batch.limits).await {
                        Ok(mut body) => {
                            body.bytes.extend_from_slice(value.data());
                            Ok(body)
                        }
                        Err(why) => Err(why),
                    },
                };
                let permit = match connection.take() {
                    None => self.connection().await,
                    some => some,
                };
                let Some(permit) = permit else { return };
                batch.file_result(entry, spent, body.map(|body| (body, permit)));
                begun = Instant::now();
            }
        };
        let (read, ()) = tokio::join!(reading, handing);
        // A row that nobody has seen is beyond the file's end.
        let why = read.err().unwrap_or(Rejection::NotFound);
        by_row.into_values().for_each(|entry| batch.file_result(entry, Duration::ZERO, Err(why)));
    }
}

impl Shared {
    /// What becomes of a file, of which there is no doubt.
    fn file_result(&self, entry: SliceEntry, spent: Duration, body: Result<(Body, ConnectionPermit), Rejection>) {
        // An attempt that is gone needs no result.
        let _ = self.results.send(FetchResult { entry, number: 0, info: ResponseInfo::default(), spent, body });
    }

    fn files(&self) -> std::sync::MutexGuard<'_, std::collections::VecDeque<Vec<SliceEntry>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_files(&self) -> Option<Vec<SliceEntry>> {
        self.files().pop_front()
    }

    /// Takes out the files that wait and match.
    pub(super) fn take_out_files(&self, matches: impl Fn(&SliceEntry) -> bool) -> Vec<SliceEntry> {
        let mut files = self.files();
        let mut out = Vec::new();
        for together in files.iter_mut() {
            out.extend(together.extract_if(.., |entry| matches(entry)));
        }
        files.retain(|together| !together.is_empty());
        self.start(out.len());
        out
    }
}

/// Does what blocks. A Parquet file may be such that its reader panics: then it cannot be read.
pub(super) async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, Rejection> + Send + 'static,
) -> Result<T, Rejection> {
    let read = tokio::task::spawn_blocking(move || caught(read)).await;
    read.ok().and_then(Result::ok).unwrap_or(Err(Rejection::Unreadable))
}
