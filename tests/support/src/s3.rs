//! Any store behind S3's protocol, so that real processes can use one that fails on purpose: as much of the protocol as
//! the roles speak, in the path style. Signatures are not checked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{Method, Response, StatusCode, header};
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ListResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions};

use crate::faulty::Fault;

/// So many entries are in one page of a listing.
const PAGE: usize = 1000;

/// A server of S3's protocol on loopback; it ends when it is dropped.
pub struct S3 {
    address: SocketAddr,
    runtime: Option<tokio::runtime::Runtime>,
}

impl S3 {
    /// Serves `store` as any bucket that is asked for.
    ///
    /// # Panics
    /// If loopback has no free port.
    pub fn serve(store: Arc<dyn ObjectStore>) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("threads");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("bound");
        let bucket = Arc::new(Bucket { store, uploads: Mutex::default() });
        let router = Router::new().fallback(answer).with_state(bucket);
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self { address, runtime: Some(runtime) }
    }

    /// The environment in which a process opens `s3://BUCKET/PREFIX` here.
    pub fn environment(&self) -> Vec<(String, String)> {
        s3_environment(self.address.port())
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The environment in which a process opens `s3://` at a port of loopback, with the key `K` and its secret `S`.
pub fn s3_environment(port: u16) -> Vec<(String, String)> {
    let endpoint = format!("http://127.0.0.1:{port}");
    [
        ("AWS_ENDPOINT", endpoint.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_ACCESS_KEY_ID", "K"),
        ("AWS_SECRET_ACCESS_KEY", "S"),
        ("AWS_REGION", "us-east-1"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

struct Bucket {
    store: Arc<dyn ObjectStore>,
    /// The parts of uploads that are not complete, by upload and number.
    uploads: Mutex<BTreeMap<String, BTreeMap<u32, Bytes>>>,
}

type Answer = Result<Response<Body>, Error>;

async fn answer(State(bucket): State<Arc<Bucket>>, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let answer = match to_bytes(body, usize::MAX).await {
        Ok(body) => bucket.handle(&parts, body).await,
        Err(_) => return failure(StatusCode::BAD_REQUEST, "IncompleteBody"),
    };
    answer.unwrap_or_else(|error| match &error {
        Error::NotFound { .. } => failure(StatusCode::NOT_FOUND, "NoSuchKey"),
        Error::AlreadyExists { .. } | Error::Precondition { .. } => {
            failure(StatusCode::PRECONDITION_FAILED, "PreconditionFailed")
        }
        Error::Generic { source, .. } if source.downcast_ref() == Some(&Fault::Full) => {
            failure(StatusCode::INSUFFICIENT_STORAGE, "InsufficientStorage")
        }
        _ => failure(StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
    })
}

impl Bucket {
    async fn handle(&self, parts: &Parts, body: Bytes) -> Answer {
        let query = url::form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes());
        let query: BTreeMap<String, String> = query.into_owned().collect();
        let key = parts.uri.path().trim_start_matches('/').split_once('/').map_or("", |(_bucket, key)| key);
        if key.is_empty() {
            return match (&parts.method, query.contains_key("delete")) {
                (&Method::GET, _) => self.list(&query).await,
                (&Method::POST, true) => self.delete(&body).await,
                _ => Ok(failure(StatusCode::NOT_IMPLEMENTED, "NotImplemented")),
            };
        }
        let key = Path::from_url_path(key)?;
        let upload = query.get("uploadId");
        match (&parts.method, upload) {
            (&Method::GET | &Method::HEAD, None) => self.get(parts, &key).await,
            (&Method::PUT, None) => self.put(parts, &key, body).await,
            (&Method::DELETE, None) => {
                // What is not there is deleted as well.
                match self.store.delete(&key).await {
                    Ok(()) | Err(Error::NotFound { .. }) => Ok(empty(StatusCode::NO_CONTENT)),
                    Err(error) => Err(error),
                }
            }
            (&Method::POST, None) if query.contains_key("uploads") => {
                let upload = format!("upload-{:016x}", fastrand::u64(..));
                self.uploads().insert(upload.clone(), BTreeMap::new());
                let tag = "InitiateMultipartUploadResult";
                Ok(xml(format!("<{tag}><UploadId>{upload}</UploadId></{tag}>")))
            }
            (&Method::PUT, Some(upload)) => {
                let number = query.get("partNumber").and_then(|number| number.parse().ok()).unwrap_or(0);
                // Writes nothing, and fails as a write does.
                match self.store.copy(&Path::from("nothing is here"), &key).await {
                    // A status that clients do not try again.
                    Err(Error::Generic { source, .. }) if source.downcast_ref() == Some(&Fault::Full) => {
                        return Ok(failure(StatusCode::BAD_REQUEST, "QuotaExceeded"));
                    }
                    Ok(()) | Err(Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
                match self.uploads().get_mut(upload) {
                    Some(parts) => parts.insert(number, body),
                    None => return Ok(failure(StatusCode::NOT_FOUND, "NoSuchUpload")),
                };
                let mut response = empty(StatusCode::OK);
                response.headers_mut().insert(header::ETAG, format!("\"{number}\"").parse().expect("plain text"));
                Ok(response)
            }
            (&Method::POST, Some(upload)) => {
                let Some(pieces) = self.uploads().get(upload).cloned() else {
                    return Ok(failure(StatusCode::NOT_FOUND, "NoSuchUpload"));
                };
                let mut whole = BytesMut::new();
                pieces.values().for_each(|piece| whole.extend_from_slice(piece));
                self.put(parts, &key, whole.freeze()).await?;
                self.uploads().remove(upload);
                let tag = "CompleteMultipartUploadResult";
                Ok(xml(format!("<{tag}><ETag>\"{upload}\"</ETag></{tag}>")))
            }
            (&Method::DELETE, Some(upload)) => {
                self.uploads().remove(upload);
                Ok(empty(StatusCode::NO_CONTENT))
            }
            _ => Ok(failure(StatusCode::NOT_IMPLEMENTED, "NotImplemented")),
        }
    }

    fn uploads(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, BTreeMap<u32, Bytes>>> {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn put(&self, parts: &Parts, key: &Path, body: Bytes) -> Answer {
        let mode = match (parts.headers.get(header::IF_NONE_MATCH), parts.headers.get(header::IF_MATCH)) {
            (None, None) => PutMode::Overwrite,
            (Some(tag), None) if tag == "*" => PutMode::Create,
            _ => return Ok(failure(StatusCode::NOT_IMPLEMENTED, "NotImplemented")),
        };
        let put = self.store.put_opts(key, body.into(), PutOptions::from(mode)).await?;
        let mut response = empty(StatusCode::OK);
        let tag = put.e_tag.unwrap_or_default();
        response.headers_mut().insert(header::ETAG, tag.parse().expect("plain text"));
        Ok(response)
    }

    async fn get(&self, parts: &Parts, key: &Path) -> Answer {
        let head = parts.method == Method::HEAD;
        let range = parts.headers.get(header::RANGE).and_then(|range| range.to_str().ok()).and_then(parse_range);
        let status = if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
        let found = self.store.get_opts(key, GetOptions { range, head, ..GetOptions::default() }).await?;
        let (meta, range) = (found.meta.clone(), found.range.clone());
        let length = if head { meta.size } else { range.end - range.start };
        let response = Response::builder()
            .status(status)
            .header(header::CONTENT_LENGTH, length)
            .header(
                header::CONTENT_RANGE,
                format!("bytes {}-{}/{}", range.start, range.end.saturating_sub(1), meta.size),
            )
            .header(header::ETAG, meta.e_tag.unwrap_or_default())
            .header(header::LAST_MODIFIED, httpdate::fmt_http_date(SystemTime::from(meta.last_modified)));
        let body = if head { Body::empty() } else { Body::from(found.bytes().await?) };
        Ok(response.body(body).expect("the headers are plain text"))
    }

    async fn delete(&self, body: &[u8]) -> Answer {
        let text = String::from_utf8_lossy(body);
        let keys = text.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
        let mut answer = "<DeleteResult>".to_owned();
        for key in keys {
            answer += &match self.store.delete(&Path::parse(unescape(key))?).await {
                Ok(()) | Err(Error::NotFound { .. }) => format!("<Deleted><Key>{key}</Key></Deleted>"),
                Err(error) => {
                    let message = escape(&error.to_string());
                    format!("<Error><Key>{key}</Key><Code>InternalError</Code><Message>{message}</Message></Error>")
                }
            };
        }
        Ok(xml(answer + "</DeleteResult>"))
    }

    async fn list(&self, query: &BTreeMap<String, String>) -> Answer {
        let prefix = query.get("prefix").map(|prefix| Path::parse(prefix.trim_end_matches('/'))).transpose()?;
        let after = query.get("continuation-token").or_else(|| query.get("start-after"));
        let ListResult { common_prefixes, mut objects, .. } = match (query.contains_key("delimiter"), after) {
            (true, _) => self.store.list_with_delimiter(prefix.as_ref()).await?,
            (false, after) => {
                let objects = match after {
                    Some(after) => self.store.list_with_offset(prefix.as_ref(), &Path::parse(after)?),
                    None => self.store.list(prefix.as_ref()),
                };
                ListResult {
                    common_prefixes: Vec::new(),
                    objects: objects.try_collect().await?,
                    extensions: Default::default(),
                }
            }
        };
        objects.sort_by(|one, other| one.location.cmp(&other.location));
        let more = !query.contains_key("delimiter") && objects.len() > PAGE;
        objects.truncate(if more { PAGE } else { objects.len() });
        let mut answer = "<ListBucketResult>".to_owned();
        for object in &objects {
            answer += &format!(
                "<Contents><Key>{}</Key><Size>{}</Size><LastModified>{}</LastModified><ETag>{}</ETag></Contents>",
                escape(object.location.as_ref()),
                object.size,
                object.last_modified.to_rfc3339(),
                escape(object.e_tag.as_deref().unwrap_or_default()),
            );
        }
        for prefix in common_prefixes {
            answer += &format!("<CommonPrefixes><Prefix>{}/</Prefix></CommonPrefixes>", escape(prefix.as_ref()));
        }
        if let Some(last) = objects.last().filter(|_| more) {
            let token = escape(last.location.as_ref());
            answer += &format!("<NextContinuationToken>{token}</NextContinuationToken>");
        }
        Ok(xml(answer + "</ListBucketResult>"))
    }
}

/// `bytes=2-5`, `bytes=2-`, `bytes=-3`.
fn parse_range(text: &str) -> Option<GetRange> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    Some(match (first, last) {
        ("", last) => GetRange::Suffix(last.parse().ok()?),
        (first, "") => GetRange::Offset(first.parse().ok()?),
        (first, last) => GetRange::Bounded(first.parse().ok()?..last.parse::<u64>().ok()? + 1),
    })
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn unescape(text: &str) -> String {
    let plain = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&apos;", "'");
    plain.replace("&amp;", "&")
}

fn xml(text: String) -> Response<Body> {
    Response::new(Body::from(text))
}

fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

fn failure(status: StatusCode, code: &str) -> Response<Body> {
    let mut response = xml(format!("<Error><Code>{code}</Code><Message>{status}</Message></Error>"));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faulty::{Faults, FaultyStore, Rules};
    use futures::StreamExt;
    use object_store::aws::{AmazonS3, AmazonS3Builder};
    use object_store::memory::InMemory;
    use object_store::{RetryConfig, WriteMultipart};

    /// A client of S3 that tries each request so many times.
    fn client(server: &S3, tries: usize) -> AmazonS3 {
        // Others may have installed it already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let options = server
            .environment()
            .into_iter()
            .map(|(name, value)| (name.to_ascii_lowercase().parse().expect("an option of S3"), value));
        let retry = RetryConfig { max_retries: tries - 1, ..RetryConfig::default() };
        let builder = options.fold(AmazonS3Builder::new(), |builder, (key, value)| builder.with_config(key, value));
        builder.with_bucket_name("b").with_retry(retry).build().expect("all options")
    }

    fn run(test: impl AsyncFnOnce()) {
        tokio::runtime::Runtime::new().expect("threads").block_on(test());
    }

    #[test]
    fn a_client_of_s3_reads_writes_lists_and_deletes() {
        let server = S3::serve(Arc::new(InMemory::new()));
        let s3 = client(&server, 1);
        run(async || {
            let key = Path::from("a b/c&d/e=1");
            s3.put_opts(&key, "0123456789".into(), PutMode::Create.into()).await.expect("it was not there");
            let again = s3.put_opts(&key, "x".into(), PutMode::Create.into()).await;
            assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
            assert_eq!(s3.get(&key).await.expect("it is there").bytes().await.expect("bytes"), "0123456789");
            assert_eq!(s3.get_range(&key, 2..5).await.expect("a range"), "234");
            let suffix = GetOptions { range: Some(GetRange::Suffix(3)), ..GetOptions::default() };
            assert_eq!(s3.get_opts(&key, suffix).await.expect("a range").bytes().await.expect("bytes"), "789");
            assert_eq!(s3.head(&key).await.expect("it is there").size, 10);
            assert!(matches!(s3.get(&Path::from("no")).await, Err(Error::NotFound { .. })));

            let upload = s3.put_multipart(&Path::from("large")).await.expect("an upload");
            let mut upload = WriteMultipart::new_with_chunk_size(upload, 5 << 20);
            upload.write(&vec![7; 12 << 20]);
            upload.finish().await.expect("three parts");
            assert_eq!(s3.head(&Path::from("large")).await.expect("it is there").size, 12 << 20);

            for n in 0..PAGE + 10 {
                s3.put(&Path::from(format!("many/{n:06}")), "".into()).await.expect("room");
            }
            let many: Vec<_> = s3.list(Some(&Path::from("many"))).try_collect().await.expect("a listing");
            assert_eq!(many.len(), PAGE + 10, "of two pages");
            let level = s3.list_with_delimiter(None).await.expect("a listing");
            assert_eq!(level.common_prefixes, [Path::from("a b"), Path::from("many")]);
            assert_eq!(level.objects.len(), 1);
            let locations = futures::stream::iter(many).map(|meta| Ok(meta.location)).boxed();
            assert_eq!(s3.delete_stream(locations).count().await, PAGE + 10);
            s3.delete(&key).await.expect("it was there");
            assert_eq!(s3.list(None).count().await, 1, "the large one");
        });
    }

    #[test]
    fn a_put_whose_answer_was_lost_is_tried_again_and_finds_itself() {
        let (store, faults) = (Arc::new(InMemory::new()), Faults::new(1));
        let server = S3::serve(Arc::new(FaultyStore::new(Arc::clone(&store) as _, faults.clone())));
        let (s3, once) = (client(&server, 5), client(&server, 1));
        run(async || {
            let key = Path::from("a");
            faults.set(Rules { lost: 1.0, ..Rules::default() });
            let lost = once.put_opts(&key, "1".into(), PutMode::Create.into()).await;
            assert!(matches!(lost, Err(Error::Generic { .. })), "{lost:?}");
            assert!(store.head(&key).await.is_ok(), "it had its effect");
            faults.set(Rules { failed: 0.5, lost: 0.5, ..Rules::default() });
            let ends = futures::future::join_all((0..20).map(|n| {
                let s3 = &s3;
                async move { s3.put_opts(&Path::from(format!("b/{n}")), "1".into(), PutMode::Create.into()).await }
            }))
            .await;
            faults.set(Rules::default());
            let there = ends.iter().filter(|end| matches!(end, Err(Error::AlreadyExists { .. }))).count();
            assert!(there > 0, "the second try met the first one's object: {ends:?}");
        });
    }
}
