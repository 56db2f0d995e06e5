//! Objects into the store: tars that are uploaded while they grow, whole files, and the index that commits them.

use std::mem;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload, WriteMultipart};
use proto::index::{ClassCounts, StoredFile, Tar};
use proto::shard::{Moments, Origin, TarWriter, sha256_hex};
use proto::{Sample, ShardId, ShardIndex, Stored, keys};

use crate::store::with_retries;

/// Tars go up in parts of this size, which is the least that S3 wants: all open tars of all open shards hold as much in
/// memory.
const PART_BYTES: usize = 5 << 20;
/// Parts of one tar on their way at once; then the writer waits, and with it the fetching.
const PARTS_IN_FLIGHT: usize = 2;

/// One tar on its way into the store.
#[derive(Debug)]
pub(crate) struct TarUpload {
    store: Arc<dyn ObjectStore>,
    key: String,
    writer: TarWriter,
    /// Begun with the first full part: a small tar is one plain put.
    multipart: Option<WriteMultipart>,
    samples: u32,
    per_class: ClassCounts,
    moments: Moments,
}

impl TarUpload {
    pub(crate) fn new(store: Arc<dyn ObjectStore>, key: String) -> Self {
        Self {
            store,
            key,
            writer: TarWriter::new(),
            multipart: None,
            samples: 0,
            per_class: ClassCounts::default(),
            moments: Moments::default(),
        }
    }

    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// Appends one sample; returns the offset and length of its image in the tar.
    pub(crate) async fn append(
        &mut self,
        sample: &Sample,
        origin: &Origin,
        moments: &Moments,
    ) -> anyhow::Result<(u64, u64)> {
        let place = self.writer.append(sample, origin);
        self.samples += 1;
        self.per_class.add(sample.label);
        self.moments.add(moments);
        if self.writer.pending() >= PART_BYTES {
            self.send_part().await.with_context(|| format!("failed to upload {}", self.key))?;
        }
        Ok(place)
    }

    async fn send_part(&mut self) -> anyhow::Result<()> {
        let mut writer = mem::take(&mut self.writer);
        // Hashing a part takes milliseconds, which other tasks must not wait for.
        let (writer, part) = tokio::task::spawn_blocking(move || {
            let part = writer.take();
            (writer, part)
        })
        .await?;
        self.writer = writer;
        let multipart = match &mut self.multipart {
            Some(multipart) => multipart,
            begun @ None => {
                let path = Path::from(self.key.as_str());
                let upload = with_retries(&self.key, || self.store.put_multipart(&path)).await?;
                begun.insert(WriteMultipart::new_with_chunk_size(upload, PART_BYTES))
            }
        };
        multipart.wait_for_capacity(PARTS_IN_FLIGHT).await?;
        multipart.put(part);
        Ok(())
    }

    /// Ends the tar; when this returns, it stands in the store.
    pub(crate) async fn finish(&mut self) -> anyhow::Result<Tar> {
        let writer = mem::take(&mut self.writer);
        let (rest, bytes, sha256, blocks) = tokio::task::spawn_blocking(move || writer.finish()).await?;
        let stored = match self.multipart.take() {
            Some(mut multipart) => {
                multipart.put(rest);
                // Nothing can put a part again that the store did not take: the attempt fails.
                multipart.finish().await.map(drop)
            }
            None => put(&*self.store, &self.key, rest.into()).await,
        };
        stored.with_context(|| format!("failed to upload {}", self.key))?;
        Ok(Tar {
            key: self.key.clone(),
            bytes,
            sha256,
            samples: self.samples,
            per_class: mem::take(&mut self.per_class),
            blocks,
            moments: self.moments,
        })
    }

    /// Deletes what is in the store already.
    pub(crate) async fn abort(self) {
        let result = match self.multipart {
            Some(multipart) => multipart.abort().await,
            None => delete(&*self.store, &self.key).await,
        };
        if let Err(error) = result {
            tracing::warn!(key = self.key, %error, "failed to delete an unfinished tar");
        }
    }
}

/// Puts a whole file.
pub(crate) async fn put_file(store: &dyn ObjectStore, key: String, content: Bytes) -> anyhow::Result<StoredFile> {
    let file = StoredFile { bytes: content.len() as u64, sha256: sha256_hex(&content), key };
    put(store, &file.key, content.into()).await.with_context(|| format!("failed to upload {}", file.key))?;
    Ok(file)
}

async fn put(store: &dyn ObjectStore, key: &str, payload: PutPayload) -> object_store::Result<()> {
    let path = Path::from(key);
    with_retries(key, || async { store.put(&path, payload.clone()).await.map(drop) }).await
}

/// Deletes an object; one that is not there is no error.
pub(crate) async fn delete(store: &dyn ObjectStore, key: &str) -> object_store::Result<()> {
    match store.delete(&Path::from(key)).await {
        Err(object_store::Error::NotFound { .. }) => Ok(()),
        other => other,
    }
}

/// Puts the index if there is none, and returns the one that is there: this one if its nonce is this one's.
///
/// An error means that nobody knows: the index may be there, so nothing that it names may be deleted.
pub(crate) async fn commit(store: &dyn ObjectStore, of: &ShardId, index: &ShardIndex) -> anyhow::Result<ShardIndex> {
    let key = keys::index(of);
    let path = Path::from(key.as_str());
    let payload = PutPayload::from(index.to_json());
    let put_or_read = || async {
        let Err(put) = store.put_opts(&path, payload.clone(), PutMode::Create.into()).await else { return Ok(None) };
        // Whatever the store said: what is there decides. A put that the store's client retried may have met itself.
        match store.get(&path).await {
            Ok(found) => found.bytes().await.map(Some),
            Err(object_store::Error::NotFound { .. }) => Err(put),
            Err(error) => Err(error),
        }
    };
    let found = with_retries(&key, put_or_read).await.with_context(|| format!("failed to put {key}"))?;
    found.map_or_else(
        || Ok(index.clone()),
        |bytes| ShardIndex::from_json(&bytes).with_context(|| format!("failed to parse {key}")),
    )
}
