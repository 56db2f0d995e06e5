//! Objects into the store: tars that are uploaded while they grow, whole files, and the index that commits them.

use std::mem;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use proto::index::{ClassCounts, StoredFile, Tar};
use proto::shard::{Moments, Origin, TarWriter, sha256_hex};
use proto::{Sample, ShardId, ShardIndex, Stored, keys};
use tokio::task::JoinSet;

use crate::store::with_retries;

/// Tars go up in parts of this size, which is the least that S3 wants: all open tars of all open shards hold as much in
/// memory.
const PART_BYTES: usize = 5 << 20;
/// After so many parts they grow, since S3 takes 10,000 of one object; until then all are alike, as R2 wants it.
const ALIKE: usize = 2000;
/// After so many parts more they have grown by one such size.
const GROWTH: usize = 100;
/// Parts of one tar on their way at once; then the writer waits, and with it the fetching.
const PARTS_IN_FLIGHT: usize = 2;

/// One tar on its way into the store.
#[derive(Debug)]
pub(crate) struct TarUpload {
    store: Arc<dyn ObjectStore>,
    key: String,
    writer: TarWriter,
    /// Begun with the first full part: a small tar is one plain put.
    parts: Option<Parts>,
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
            parts: None,
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
        while self.writer.pending() >= self.next_bytes() {
            self.send_part().await.with_context(|| format!("failed to upload {}", self.key))?;
        }
        Ok(place)
    }

    /// How large the next part is.
    fn next_bytes(&self) -> usize {
        self.parts.as_ref().map_or(PART_BYTES, Parts::next_bytes)
    }

    async fn send_part(&mut self) -> anyhow::Result<()> {
        let (mut writer, bytes) = (mem::take(&mut self.writer), self.next_bytes());
        // Hashing a part takes milliseconds, which other tasks must not wait for.
        let (writer, part) = tokio::task::spawn_blocking(move || {
            let part = writer.take_up_to(bytes);
            (writer, part)
        })
        .await?;
        self.writer = writer;
        let parts = match &mut self.parts {
            Some(parts) => parts,
            begun @ None => {
                let path = Path::from(self.key.as_str());
                begun.insert(Parts::new(with_retries(&self.key, || self.store.put_multipart(&path)).await?))
            }
        };
        Ok(parts.send(part).await?)
    }

    /// Ends the tar; when this returns, it stands in the store.
    pub(crate) async fn finish(&mut self) -> anyhow::Result<Tar> {
        let writer = mem::take(&mut self.writer);
        let (rest, bytes, sha256, blocks) = tokio::task::spawn_blocking(move || writer.finish()).await?;
        let stored = match self.parts.take() {
            // A store that a role opens tries each part again in its place. Nothing else can: then the attempt fails.
            Some(parts) => parts.finish(rest).await,
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
        let result = match self.parts {
            Some(parts) => parts.abort().await,
            None => delete(&*self.store, &self.key).await,
        };
        if let Err(error) = result {
            tracing::warn!(key = self.key, %error, "failed to delete an unfinished tar");
        }
    }
}

/// An object that is uploaded in parts.
#[derive(Debug)]
struct Parts {
    upload: Box<dyn MultipartUpload>,
    begun: usize,
    on_their_way: JoinSet<object_store::Result<()>>,
}

impl Parts {
    fn new(upload: Box<dyn MultipartUpload>) -> Self {
        Self { upload, begun: 0, on_their_way: JoinSet::new() }
    }

    /// How large the next part is.
    fn next_bytes(&self) -> usize {
        part_bytes(self.begun)
    }

    async fn send(&mut self, part: Bytes) -> object_store::Result<()> {
        while self.on_their_way.len() >= PARTS_IN_FLIGHT {
            self.arrived().await?;
        }
        self.begun += 1;
        self.on_their_way.spawn(self.upload.put_part(part.into()));
        Ok(())
    }

    async fn arrived(&mut self) -> object_store::Result<()> {
        self.on_their_way.join_next().await.map_or(Ok(()), |part| part?)
    }

    async fn finish(mut self, mut rest: Bytes) -> object_store::Result<()> {
        // What ends a tar may be more than its last part has room for.
        while rest.len() > self.next_bytes() {
            let part = rest.split_to(self.next_bytes());
            self.send(part).await?;
        }
        self.send(rest).await?;
        while !self.on_their_way.is_empty() {
            self.arrived().await?;
        }
        self.upload.complete().await.map(drop)
    }

    async fn abort(mut self) -> object_store::Result<()> {
        self.on_their_way.shutdown().await;
        self.upload.abort().await
    }
}

/// How large the next part is, after so many.
fn part_bytes(before: usize) -> usize {
    PART_BYTES * (1 + before.saturating_sub(ALIKE) / GROWTH)
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use object_store::memory::InMemory;
    use object_store::{PutResult, UploadPart};

    use super::*;

    /// Takes note of how large each part is.
    #[derive(Debug)]
    struct Measuring {
        upload: Box<dyn MultipartUpload>,
        sizes: Arc<Mutex<Vec<usize>>>,
    }

    #[tonic::async_trait]
    impl MultipartUpload for Measuring {
        fn put_part(&mut self, part: PutPayload) -> UploadPart {
            self.sizes.lock().expect("no panic").push(part.content_length());
            self.upload.put_part(part)
        }

        async fn complete(&mut self) -> object_store::Result<PutResult> {
            self.upload.complete().await
        }

        async fn abort(&mut self) -> object_store::Result<()> {
            self.upload.abort().await
        }
    }

    #[tokio::test]
    async fn all_parts_of_a_tar_but_the_last_are_alike_and_together_they_are_the_tar() {
        // The last one is such that the end of the tar has no room in the part that it belongs to.
        for last in [100, PART_BYTES - 4000, 2 * PART_BYTES + 100] {
            let store = Arc::new(InMemory::new());
            let mut upload = TarUpload::new(store.clone(), "a.tar".to_owned());
            let origin = Origin {
                synset: "n1".into(),
                url: "http://x/".into(),
                sha256: "00".into(),
                width: 5,
                height: 7,
                columns: String::new(),
            };
            let sizes = Arc::default();
            let begun = store.put_multipart(&Path::from("a.tar")).await.expect("memory");
            upload.parts = Some(Parts::new(Box::new(Measuring { upload: begun, sizes: Arc::clone(&sizes) })));
            for (key, bytes) in (0..).zip([3 << 20, 3 << 20, 17 << 20, 9 << 20, last]) {
                let sample = Sample { key, label: 0, image: vec![key as u8; bytes].into() };
                upload.append(&sample, &origin, &Moments::default()).await.expect("memory");
                assert!(upload.writer.pending() < PART_BYTES);
            }
            let tar = upload.finish().await.expect("memory");
            let stored = store.get(&Path::from("a.tar")).await.expect("it is there").bytes().await.expect("memory");
            assert_eq!((stored.len() as u64, sha256_hex(&stored)), (tar.bytes, tar.sha256));
            let sizes = sizes.lock().expect("no panic").clone();
            let (end, alike) = sizes.split_last().expect("parts");
            assert!(alike.len() >= 6 && alike.iter().all(|size| *size == PART_BYTES), "{sizes:?}");
            assert!((1..=PART_BYTES).contains(end), "{sizes:?}");
        }
    }

    #[test]
    fn ten_thousand_parts_hold_a_terabyte_and_none_is_larger_than_s3_takes() {
        assert!((0..ALIKE).all(|before| part_bytes(before) == PART_BYTES));
        let sizes = (0..10_000).map(part_bytes);
        assert!(sizes.clone().sum::<usize>() > 1 << 40);
        assert!(sizes.max().is_some_and(|largest| largest < 5 << 30));
    }
}
