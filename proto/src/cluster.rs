//! Which cluster a process belongs to: the object that names the cluster (see [`crate::keys::CLUSTER`]), and the header
//! in which calls say it.

use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Request, Status};

use crate::format::stored;

/// Of a call: the id of the caller's cluster. Of a refusal: that of the cluster that refuses a stranger.
const HEADER: &str = "gleaner-cluster";

/// The identity of a cluster, which is that of its store: put once, by the first coordinator that starts on the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterRecord {
    /// Of this format: 1.
    pub format: u32,
    /// The writer's own random word.
    pub nonce: String,
    /// The cluster's id, which no other cluster has.
    pub id: String,
    /// When it was put, in milliseconds since 1970, by the coordinator's clock; for people only.
    pub at_millis: u64,
}

stored!(ClusterRecord, "cluster", format, nonce);

/// The id of a process's own cluster, as its store tells it; empty: not known yet. Clones share it. As an interceptor
/// it lets the calls of a client carry the id.
#[derive(Debug, Clone, Default)]
pub struct OwnCluster(Arc<RwLock<String>>);

/// A channel whose calls do.
pub type OfCluster<S> = InterceptedService<S, OwnCluster>;

impl OwnCluster {
    /// The id.
    pub fn id(&self) -> String {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over what the store says. Returns whether it is another cluster than the one known before.
    pub fn set(&self, id: String) -> bool {
        let before = std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), id);
        !before.is_empty() && before != self.id()
    }
}

impl Interceptor for OwnCluster {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let id = self.id();
        if let Ok(value) = id.parse()
            && !id.is_empty()
        {
            request.metadata_mut().insert(HEADER, value);
        }
        Ok(request)
    }
}

/// Refuses the call of a process of another cluster than `own`; one that does not know its cluster yet may pass.
///
/// # Errors
/// The refusal, which [`is_stranger`] recognises.
#[allow(clippy::result_large_err, reason = "as interceptors return it")]
pub fn admit(own: &str, metadata: &MetadataMap) -> Result<(), Status> {
    let Some(theirs) = metadata.get(HEADER).filter(|theirs| theirs.as_bytes() != own.as_bytes()) else {
        return Ok(());
    };
    let message = format!(
        "this coordinator is of cluster {own}, its caller of cluster {}: their stores differ. Start both with the same \
         --store, or give the caller the --coordinator of its own cluster",
        theirs.to_str().unwrap_or("?")
    );
    let mut metadata = MetadataMap::new();
    if let Ok(value) = own.parse() {
        metadata.insert(HEADER, value);
    }
    Err(Status::with_metadata(Code::FailedPrecondition, message, metadata))
}

/// Whether a call was refused because the caller is of another cluster, by what its store said when it was read last.
pub fn is_stranger(status: &Status) -> bool {
    status.metadata().contains_key(HEADER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_are_refused_with_what_to_do_and_whoever_does_not_know_its_cluster_is_not() {
        let own = OwnCluster::default();
        let called = |own: &OwnCluster| own.clone().call(Request::new(())).expect("a request");
        assert!(admit("a", called(&own).metadata()).is_ok(), "not known yet");
        assert!(!own.set("a".to_owned()), "it was not known");
        assert!(admit("a", called(&own).metadata()).is_ok());
        let refused = admit("b", called(&own).metadata()).expect_err("of another cluster");
        assert!(is_stranger(&refused) && refused.message().contains("--store"), "{refused}");
        assert!(!is_stranger(&Status::failed_precondition("something else")));
        assert!(own.set("b".to_owned()) && !own.set("b".to_owned()));
    }
}
