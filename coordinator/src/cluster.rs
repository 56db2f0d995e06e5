//! The cluster's identity: that of its store, whatever coordinators, workers and agents come and go.

use std::sync::Arc;

use anyhow::Context;
use proto::cluster::{ClusterRecord, admit};
use proto::{Stored, keys};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::store::{Created, Store, StoreError, nonce, wall_millis};

/// Lets calls pass that come from the own cluster.
#[derive(Debug, Clone)]
pub(crate) struct Guard(pub(crate) Arc<str>);

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        admit(&self.0, request.metadata()).map(|()| request)
    }
}

/// The id of the store's cluster. A store that has none yet gets one.
pub(crate) async fn identify(store: &Store) -> anyhow::Result<Arc<str>> {
    let own = ClusterRecord { format: 1, nonce: nonce(), id: nonce(), at_millis: wall_millis() };
    match store.create(keys::CLUSTER, &own).await? {
        Created::Won => Ok(own.id.into()),
        Created::Lost(there) => {
            let advice = || format!("{}: restore it, or remove it to give the cluster another id", keys::CLUSTER);
            Ok(ClusterRecord::from_json(&there).with_context(advice)?.id.into())
        }
    }
}

/// Whether the store is still that of the cluster; one whose record is damaged is.
pub(crate) async fn is_at(store: &Store, id: &str) -> Result<bool, StoreError> {
    let there = store.get(keys::CLUSTER).await?;
    Ok(there.is_some_and(|json| ClusterRecord::from_json(&json).map_or(true, |record| record.id == id)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;

    #[tokio::test]
    async fn all_coordinators_of_a_store_name_the_same_cluster_and_another_store_is_another_one() {
        let (store, other) = (Store::new(Arc::new(InMemory::new())), Store::new(Arc::new(InMemory::new())));
        let (first, second) = tokio::join!(identify(&store), identify(&store));
        let id = first.expect("a store that works");
        assert_eq!(second.expect("a store that works"), id);
        assert_ne!(identify(&other).await.expect("a store that works"), id);
        assert!(is_at(&store, &id).await.expect("reads") && !is_at(&other, &id).await.expect("reads"));
    }
}
