//! Files that are elsewhere, read as if they were here: piece by piece, each asked for again if it does not come, so
//! that memory depends on no file's length and a connection that breaks costs a piece.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use backon::{ExponentialBuilder, Retryable};
use bytes::{Buf, Bytes};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE};
use url::Url;

use crate::exit::Ended;

/// A server must say something at least so often.
const SILENCE: Duration = Duration::from_secs(30);
/// Times that a piece is asked for again, each after a longer pause.
const RETRIES: usize = 4;

/// Waits for what is asked for elsewhere. It must not be called where nothing may block.
pub(super) fn wait<T>(what: impl Future<Output = T>) -> T {
    tokio::runtime::Handle::current().block_on(what)
}

/// What gives pieces of a file.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Object(Arc<dyn ObjectStore>, Key),
    Web(reqwest::Client, Url),
}

impl Source {
    pub(super) fn web(url: Url) -> Result<Self> {
        // Places in a file are those of its own bytes.
        let client = reqwest::Client::builder().no_gzip().connect_timeout(SILENCE).read_timeout(SILENCE);
        Ok(Self::Web(client.build()?, url))
    }

    /// How long the file is.
    ///
    /// # Errors
    /// If it is not there, or its server gives no parts of files.
    pub(super) async fn length(&self) -> Result<u64> {
        match self {
            Self::Object(store, key) => Ok(store.head(key).await.with_context(|| format!("cannot read {key}"))?.size),
            Self::Web(client, url) => match part(client, url, 0..1).await? {
                (_, Some(length)) => Ok(length),
                (_, None) => bail!(Ended::usage(format!("{url}: its server does not say how long the file is"))),
            },
        }
    }

    async fn get(&self, range: Range<u64>) -> Result<Bytes> {
        let bytes = match self {
            Self::Object(store, key) => store.get_range(key, range.clone()).await?,
            Self::Web(client, url) => part(client, url, range.clone()).await?.0,
        };
        let length = range.end - range.start;
        ensure!(bytes.len() as u64 == length, "{} bytes came from byte {}, not {length}", bytes.len(), range.start);
        Ok(bytes)
    }
}

/// Some bytes of what is behind an address, and how many there are in all.
async fn part(client: &reqwest::Client, url: &Url, range: Range<u64>) -> Result<(Bytes, Option<u64>)> {
    let ask = async || {
        let asking = client.get(url.clone()).header(RANGE, format!("bytes={}-{}", range.start, range.end - 1));
        let answer = asking.send().await?.error_for_status()?;
        let (status, said) = (answer.status(), answer.headers().get(CONTENT_RANGE).cloned());
        // Without parts all of a file would come, whatever was asked for.
        let bytes = if status == StatusCode::PARTIAL_CONTENT { answer.bytes().await? } else { Bytes::new() };
        Ok((status, said, bytes))
    };
    let (status, said, bytes) = ask
        .retry(ExponentialBuilder::new().with_min_delay(Duration::from_millis(500)).with_max_times(RETRIES))
        .when(|error: &reqwest::Error| !error.status().is_some_and(|status| status.is_client_error()))
        .await
        .with_context(|| format!("cannot read {url}"))?;
    if status != StatusCode::PARTIAL_CONTENT {
        let way_out = "download it, and import the file";
        bail!(Ended::usage(format!("{url}: its server gives no parts of files (HTTP ranges): {way_out}")));
    }
    let length = said.and_then(|range| range.to_str().ok()?.rsplit_once('/')?.1.parse().ok());
    Ok((bytes, length))
}

/// A file elsewhere. What is asked for blocks.
#[derive(Debug, Clone)]
pub(super) struct Remote {
    source: Source,
    length: u64,
    /// So many bytes are asked for at once at the least.
    window: u64,
    at: u64,
    /// The piece that came last, and its place.
    held: Arc<Mutex<(u64, Bytes)>>,
}

impl Remote {
    pub(super) fn new(source: Source, length: u64, window: u64) -> Self {
        Self { source, length, window, at: 0, held: Arc::default() }
    }

    /// These bytes, as far as the file has them.
    fn get(&self, range: Range<u64>) -> Result<Bytes> {
        let range = range.start.min(self.length)..range.end.min(self.length);
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, bytes) = &*held;
        if range.start < *at || range.end > *at + bytes.len() as u64 {
            let end = range.end.max(range.start.saturating_add(self.window)).min(self.length);
            *held = (range.start, wait(self.source.get(range.start..end))?);
        }
        let (at, bytes) = &*held;
        Ok(bytes.slice((range.start - at) as usize..(range.end - at) as usize))
    }
}

impl Read for Remote {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.get(self.at..self.at.saturating_add(buffer.len() as u64)).map_err(io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}

impl Seek for Remote {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl Length for Remote {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Remote {
    type T = Self;

    fn get_read(&self, start: u64) -> ParquetResult<Self> {
        Ok(Self { at: start, ..self.clone() })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let bytes = self.get(start..start.saturating_add(length as u64));
        let bytes = bytes.map_err(|error| ParquetError::External(format!("{error:#}").into()))?;
        match bytes.remaining() == length {
            true => Ok(bytes),
            false => Err(ParquetError::EOF(format!("there are no {length} bytes from byte {start} on"))),
        }
    }
}
