//! The store, with its requests counted; a trainer's with those of its ranks, which tell it of them.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use proto::pb::{StoreUse, store_use};

type Requests = Family<[(&'static str, String); 2], Counter>;
type Bytecounts = Family<[(&'static str, &'static str); 1], Counter>;
type Seconds = Family<[(&'static str, &'static str); 1], Histogram>;

static REQUESTS: LazyLock<Requests> = LazyLock::new(Family::default);
static BYTES: LazyLock<Bytecounts> = LazyLock::new(Family::default);
// 1 ms to 16 s
static SECONDS: LazyLock<Seconds> =
    LazyLock::new(|| Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 15))));

/// What was not yet reported to another process.
static UNREPORTED: Mutex<StoreUse> = Mutex::new(StoreUse { requests: Vec::new(), bytes_read: 0, bytes_written: 0 });

const READ: &str = "read";
const WRITTEN: &str = "written";

/// Adds the store's metrics to those of the process.
pub(crate) fn register(registry: &mut Registry) {
    registry.register("store_requests", "Requests to the store by operation and result", REQUESTS.clone());
    registry.register("store_bytes", "Bytes of objects that were read or written", BYTES.clone());
    registry.register("store_seconds", "From a request to the store's answer, without the body", SECONDS.clone());
}

fn count<T>(operation: &'static str, since: Instant, result: Result<T>) -> Result<T> {
    let how = match &result {
        Ok(_) => "ok",
        // Answers, by which races are decided and absence is found out.
        Err(Error::NotFound { .. }) => "not_found",
        Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => "exists",
        Err(_) => "error",
    };
    count_requests(operation, how, 1);
    SECONDS.get_or_create(&[("operation", operation)]).observe(since.elapsed().as_secs_f64());
    result
}

fn count_requests(operation: &str, result: &str, count: u64) {
    let (operation, result) = (operation.to_owned(), result.to_owned());
    REQUESTS.get_or_create(&[("operation", operation.clone()), ("result", result.clone())]).inc_by(count);
    let mut unreported = UNREPORTED.lock().unwrap_or_else(PoisonError::into_inner);
    match unreported.requests.iter_mut().find(|known| known.operation == operation && known.result == result) {
        Some(known) => known.count += count,
        None => unreported.requests.push(store_use::Requests { operation, result, count }),
    }
}

fn count_bytes(direction: &'static str, bytes: u64) {
    BYTES.get_or_create(&[("direction", direction)]).inc_by(bytes);
    let mut unreported = UNREPORTED.lock().unwrap_or_else(PoisonError::into_inner);
    match direction {
        READ => unreported.bytes_read += bytes,
        _ => unreported.bytes_written += bytes,
    }
}

/// What was asked of the store since this was last called; None if nothing was.
#[cfg(feature = "trainer")]
pub(crate) fn take() -> Option<StoreUse> {
    let unreported = std::mem::take(&mut *UNREPORTED.lock().unwrap_or_else(PoisonError::into_inner));
    (!unreported.requests.is_empty()).then_some(unreported)
}

/// Adds what another process has asked of the store to what this one has.
#[cfg(feature = "trainer")]
pub(crate) fn add(used: &StoreUse) {
    for store_use::Requests { operation, result, count } in &used.requests {
        count_requests(operation, result, *count);
    }
    count_bytes(READ, used.bytes_read);
    count_bytes(WRITTEN, used.bytes_written);
}

/// A store whose requests are counted. Listings and removals count once each, however many pages they take.
#[derive(Debug)]
pub(crate) struct Metered(pub(crate) Arc<dyn ObjectStore>);

impl fmt::Display for Metered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[tonic::async_trait]
impl ObjectStore for Metered {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let (since, bytes) = (Instant::now(), payload.content_length() as u64);
        let result = count("put", since, self.0.put_opts(location, payload, options).await);
        count_bytes(WRITTEN, if result.is_ok() { bytes } else { 0 });
        result
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let since = Instant::now();
        let upload = count("create_upload", since, self.0.put_multipart_opts(location, options).await)?;
        Ok(Box::new(MeteredUpload(upload)))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let (since, head) = (Instant::now(), options.head);
        let operation = if head { "head" } else { "get" };
        let result = count(operation, since, self.0.get_opts(location, options).await)?;
        count_bytes(READ, if head { 0 } else { result.range.end - result.range.start });
        Ok(result)
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let result = count("get", Instant::now(), self.0.get_ranges(location, ranges).await)?;
        count_bytes(READ, result.iter().map(|bytes| bytes.len() as u64).sum());
        Ok(result)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        tallied("delete", self.0.delete_stream(locations))
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        tallied("list", self.0.list(prefix))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        tallied("list", self.0.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let since = Instant::now();
        count("list", since, self.0.list_with_delimiter(prefix).await)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let since = Instant::now();
        count("copy", since, self.0.copy_opts(from, to, options).await)
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        let since = Instant::now();
        count("rename", since, self.0.rename_opts(from, to, options).await)
    }
}

/// One request, and an error for each that comes out of it.
fn tallied<T: 'static>(
    operation: &'static str,
    results: BoxStream<'static, Result<T>>,
) -> BoxStream<'static, Result<T>> {
    count_requests(operation, "ok", 1);
    results
        .inspect(move |result| {
            if result.is_err() {
                count_requests(operation, "error", 1);
            }
        })
        .boxed()
}

/// An upload in parts, each of which is a request.
#[derive(Debug)]
struct MeteredUpload(Box<dyn MultipartUpload>);

#[tonic::async_trait]
impl MultipartUpload for MeteredUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (since, bytes) = (Instant::now(), data.content_length() as u64);
        let part = self.0.put_part(data);
        Box::pin(async move {
            let result = count("put_part", since, part.await);
            count_bytes(WRITTEN, if result.is_ok() { bytes } else { 0 });
            result
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let since = Instant::now();
        count("complete_upload", since, self.0.complete().await)
    }

    async fn abort(&mut self) -> Result<()> {
        let since = Instant::now();
        count("abort_upload", since, self.0.abort().await)
    }
}
