//! Small objects that are written many at a time by a thread that may block.

use bytes::Bytes;
use proto::index::StoredFile;
use proto::shard::sha256_hex;
use tokio::runtime::Handle;

use crate::store::{Store, StoreError};

/// As many objects as are written at once, or so many bytes of them.
const AT_ONCE: usize = 32;
const BYTES_AT_ONCE: usize = 32 << 20;

/// Objects that wait to be written together; for keys that nobody else writes.
pub(crate) struct Puts<'a> {
    handle: &'a Handle,
    store: &'a Store,
    waiting: Vec<(String, Bytes)>,
    bytes: usize,
}

impl<'a> Puts<'a> {
    pub(crate) fn new(handle: &'a Handle, store: &'a Store) -> Self {
        Self { handle, store, waiting: Vec::new(), bytes: 0 }
    }

    /// Takes in an object, and tells what it will be. It is there after the next [`Puts::finish`].
    pub(crate) fn put(&mut self, key: String, bytes: Bytes) -> Result<StoredFile, StoreError> {
        let file = StoredFile { key: key.clone(), bytes: bytes.len() as u64, sha256: sha256_hex(&bytes) };
        self.bytes += bytes.len();
        self.waiting.push((key, bytes));
        if self.waiting.len() >= AT_ONCE || self.bytes >= BYTES_AT_ONCE {
            self.finish()?;
        }
        Ok(file)
    }

    /// Writes all that waits.
    pub(crate) fn finish(&mut self) -> Result<(), StoreError> {
        self.bytes = 0;
        let puts = self.waiting.drain(..).map(async |(key, bytes)| self.store.put(&key, bytes).await);
        self.handle.block_on(futures::future::try_join_all(puts)).map(drop)
    }
}
