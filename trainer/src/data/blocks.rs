//! Reads blocks of samples from the object store by range, checks them, and leaves out the samples that the manifest
//! skips.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::index::StoredFile;
use proto::manifest::Skips;
use proto::shard::read_block;
use proto::{Manifest, Sample, Split};
use tokio::sync::OnceCell;

use super::store::{ATTEMPT_TIMEOUT, get_checked, retried};

/// Reads the blocks of one split of a manifest, which are numbered as in a plan.
#[derive(Debug)]
pub(crate) struct BlockReader {
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
    /// The index of its shard in `shards`, and the index of its first sample in the shard's skips.
    shard: usize,
    first: u32,
}

/// A shard's bitmap of skips, read together with the first of its blocks.
#[derive(Debug)]
struct ShardSkips {
    file: Option<StoredFile>,
    skips: OnceCell<Skips>,
}

impl BlockReader {
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

    /// How many samples of each block are not skipped.
    pub(crate) fn kept(&self) -> Vec<u32> {
        self.blocks.iter().map(|block| block.kept).collect()
    }

    /// How many samples are not skipped.
    pub(crate) fn samples(&self) -> u64 {
        self.blocks.iter().map(|block| u64::from(block.kept)).sum()
    }

    /// How many bytes a block has in the store.
    pub(crate) fn bytes(&self, block: u32) -> u64 {
        self.blocks[block as usize].length
    }

    /// The samples of a block that are not skipped, in order.
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
