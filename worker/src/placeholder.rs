//! Known "no longer available" pictures: those in `data/placeholders.txt`, and those that a cluster lists in its store.

use std::collections::HashSet;

use anyhow::Context;
use object_store::ObjectStore;
use proto::pb::FailureKind;

use crate::failure::{Failure, FaultOf};
use crate::store;

/// Where a cluster lists its own, in the form of `data/placeholders.txt`.
pub const PLACEHOLDERS_KEY: &str = "worker/placeholders.txt";

const SHIPPED: &str = include_str!("../data/placeholders.txt");

/// SHA-256 hashes of the bytes of known placeholders.
#[derive(Debug, Default)]
pub(crate) struct Placeholders(HashSet<[u8; 32]>);

impl Placeholders {
    /// Those that are shipped, and those in the store, if it lists any.
    pub(crate) async fn load(store: &dyn ObjectStore) -> Result<Self, Failure> {
        let of_settings = FailureKind::Worker;
        let mut all = Self::parse(SHIPPED).context("the shipped list of placeholders").fault_of(of_settings)?;
        match store::read(store, PLACEHOLDERS_KEY).await {
            Ok(bytes) => {
                let text = std::str::from_utf8(&bytes).with_context(|| format!("{PLACEHOLDERS_KEY} is not UTF-8"));
                let own = text.and_then(Self::parse).with_context(|| format!("{PLACEHOLDERS_KEY} in the store"));
                all.0.extend(own.fault_of(of_settings)?.0);
            }
            Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => {
                let error = Err(error).with_context(|| format!("failed to read {PLACEHOLDERS_KEY}"));
                return error.fault_of(FailureKind::Store);
            }
        }
        Ok(all)
    }

    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let mut hashes = HashSet::new();
        for (number, line) in text.lines().enumerate() {
            let Some(word) = line.split_whitespace().next().filter(|word| !word.starts_with('#')) else { continue };
            let mut hash = [0; 32];
            hex::decode_to_slice(word, &mut hash).with_context(|| {
                format!("line {}: {word:?} is no SHA-256: 64 hex digits are, then a space and a remark", number + 1)
            })?;
            hashes.insert(hash);
        }
        Ok(Self(hashes))
    }

    pub(crate) fn contains(&self, sha256: &[u8; 32]) -> bool {
        self.0.contains(sha256)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;
    use proto::shard::sha256_hex;
    use sha2::{Digest, Sha256};

    #[tokio::test]
    async fn a_clusters_own_list_extends_the_shipped_one_and_a_bad_line_is_named() {
        let store = InMemory::new();
        let gone: [u8; 32] = Sha256::digest(b"gone").into();
        assert!(!Placeholders::load(&store).await.expect("no list of its own").contains(&gone));

        let list = format!("# ours\n\n{} a host's picture\n", sha256_hex(b"gone"));
        store.put(&PLACEHOLDERS_KEY.into(), list.into()).await.expect("memory");
        assert!(Placeholders::load(&store).await.expect("a good list").contains(&gone));

        store.put(&PLACEHOLDERS_KEY.into(), "# ours\nabc\n".into()).await.expect("memory");
        let failure = Placeholders::load(&store).await.expect_err("a bad line");
        assert_eq!(failure.kind, FailureKind::Worker);
        let error = format!("{:#}", failure.error);
        assert!(error.contains("line 2") && error.contains("abc"), "{error}");
    }
}
