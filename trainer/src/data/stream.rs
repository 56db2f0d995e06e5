//! Blocks of samples from the object store: read by range, checked, without the samples that the manifest skips.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::index::StoredFile;
use proto::manifest::Skips;
use proto::shard::{read_block, sha256_hex};
use proto::{Manifest, Sample, Split};
use tokio::sync::OnceCell;
use tracing::warn;

/// A read is given up after so many attempts ...
const ATTEMPTS: u32 = 5;
/// ... each of which may take this long for a block ...
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);
/// ... and for a whole object, such as a checkpoint of a GB.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(600);

/// One split of a manifest as a flat list of blocks, which is how a plan numbers them.
#[derive(Debug)]
pub(crate) struct Blocks {
    store: Arc<dyn ObjectStore>,
    blocks: Vec<Block>,
    classes: u32,
    shards: Vec<ShardSkips>,
}

#[derive(Debug)]
struct Block {
    tar: Arc<str>,
    offset: u64,
    length: u64,
    samples: u32,
    kept: u32,
    /// Where its shard's skips stand, and the place of its first sample among them.
    shard: usize,
    first: u32,
}

/// A shard's bitmap, read when the first of its blocks is.
#[derive(Debug)]
struct ShardSkips {
    file: Option<StoredFile>,
    skips: OnceCell<Skips>,
}

impl Blocks {
    /// The blocks of `split`, in the manifest's order.
    pub(crate) fn new(store: Arc<dyn ObjectStore>, manifest: &Manifest, split: Split) -> Self {
        let (mut blocks, mut shards) = (Vec::new(), Vec::new());
        for shard in &manifest.shards {
            let Some(tar) = shard.tars.get(&split) else { continue };
            let (key, mut first) = (Arc::<str>::from(tar.key.as_str()), tar.first);
            for block in &tar.blocks {
                let &proto::manifest::ManifestBlock { offset, length, samples, kept } = block;
                blocks.push(Block { tar: key.clone(), offset, length, samples, kept, shard: shards.len(), first });
                first += samples;
            }
            shards.push(ShardSkips { file: shard.skips.clone(), skips: OnceCell::new() });
        }
        Self { store, blocks, classes: manifest.classes.len() as u32, shards }
    }

    /// How many samples of each block count.
    pub(crate) fn kept(&self) -> Vec<u32> {
        self.blocks.iter().map(|block| block.kept).collect()
    }

    /// How many samples count.
    pub(crate) fn samples(&self) -> u64 {
        self.blocks.iter().map(|block| u64::from(block.kept)).sum()
    }

    /// How many bytes a block has in the store.
    pub(crate) fn bytes(&self, block: u32) -> u64 {
        self.blocks[block as usize].length
    }

    /// The samples of a block that count, in order.
    pub(crate) async fn read(&self, block: u32) -> Result<Vec<Sample>> {
        let block = &self.blocks[block as usize];
        let Block { tar, offset, length, samples, kept, shard, first } = block;
        let place = format!("{tar}, bytes {offset} to {}", offset + length);
        let context = || place.clone();
        let shard = &self.shards[*shard];
        let skips = match &shard.file {
            None => &Skips::default(),
            Some(file) => shard.skips.get_or_try_init(|| self.skips(file.clone())).await?,
        };
        let (path, range) = (Path::from(tar.as_ref()), *offset..offset + length);
        let get = || {
            let (store, path, range) = (self.store.clone(), path.clone(), range.clone());
            async move { store.get_range(&path, range).await }
        };
        let bytes = retried(tar, ATTEMPT_TIMEOUT, get).await.with_context(context)?;
        let mut read = read_block(&bytes).with_context(context)?;
        ensure!(read.len() == *samples as usize, "{}: {} samples, the manifest says {samples}", context(), read.len());
        ensure!(read.iter().all(|sample| sample.label < self.classes), "{}: a label is none of the classes", context());
        let mut place = *first;
        read.retain(|_| {
            place += 1;
            !skips.contains(place - 1)
        });
        ensure!(read.len() == *kept as usize, "{}: {} samples count, the manifest says {kept}", context(), read.len());
        Ok(read)
    }

    async fn skips(&self, file: StoredFile) -> Result<Skips> {
        Ok(Skips::from_bytes(&get_checked(&self.store, &file.key, &file.sha256).await?))
    }
}

/// The whole object, if its bytes have this SHA-256.
pub(crate) async fn get_checked(store: &Arc<dyn ObjectStore>, key: &str, sha256: &str) -> Result<Bytes> {
    let get = || {
        let (store, path) = (store.clone(), Path::from(key));
        async move { store.get(&path).await?.bytes().await }
    };
    let bytes = retried(key, WHOLE_TIMEOUT, get).await.with_context(|| format!("failed to read {key}"))?;
    let found = sha256_hex(&bytes);
    if found != sha256 {
        return Err(Damaged { key: key.to_owned(), found, expected: sha256.to_owned() }.into());
    }
    Ok(bytes)
}

/// An object that is not what was written.
#[derive(Debug, thiserror::Error)]
#[error("{key} is damaged: its SHA-256 is {found}, it should be {expected}")]
struct Damaged {
    key: String,
    found: String,
    expected: String,
}

/// Whether an object that was once whole is damaged or gone: then it will not help to read it again.
pub(crate) fn is_damage(error: &anyhow::Error) -> bool {
    let gone = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(object_store::Error::NotFound { .. }))
    };
    error.chain().any(|cause| cause.is::<Damaged>() || gone(cause))
}

/// Puts the object, and replaces one that is there.
pub(crate) async fn put(store: &Arc<dyn ObjectStore>, key: &str, bytes: Bytes) -> Result<()> {
    let put = || {
        let (store, path, bytes) = (store.clone(), Path::from(key), bytes.clone());
        async move { store.put(&path, bytes.into()).await.map(drop) }
    };
    retried(key, WHOLE_TIMEOUT, put).await.with_context(|| format!("failed to write {key}"))
}

/// Tries again after an error, with growing pauses: also if the object is not there, since a store may be behind.
async fn retried<T, F>(key: &str, timeout: Duration, attempt: impl Fn() -> F) -> Result<T>
where
    F: Future<Output = object_store::Result<T>>,
{
    let mut tried = 1;
    loop {
        let error = match tokio::time::timeout(timeout, attempt()).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => anyhow::Error::from(error),
            Err(_) => anyhow::anyhow!("no answer within {} s", timeout.as_secs()),
        };
        if tried == ATTEMPTS {
            return Err(error.context(format!("given up after {ATTEMPTS} attempts")));
        }
        warn!(key, attempt = tried, error = format!("{error:#}"), "store failed; trying again");
        tokio::time::sleep(Duration::from_millis(100) * 4u32.pow(tried - 1)).await;
        tried += 1;
    }
}
