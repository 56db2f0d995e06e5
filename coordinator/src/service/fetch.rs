//! `FetchService`: for workers.

use std::sync::Arc;
use std::time::Duration;

use proto::Attempt;
use proto::pb::fetch_service_server::FetchService;
use proto::pb::{self};
use tonic::{Request, Response, Status};

use crate::datasets::Datasets;
use crate::error::Error;

/// The longest poll.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// See `fetch.proto`.
pub(crate) struct FetchApi(pub(crate) Arc<Datasets>);

impl FetchApi {
    fn term(&self) -> u64 {
        self.0.term.number
    }
}

fn attempt(text: &str) -> Result<Attempt, Error> {
    text.parse().map_err(|error: proto::keys::KeyError| Error::Invalid(format!("attempt: {error}")))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[tonic::async_trait]
impl FetchService for FetchApi {
    async fn lease_shard(
        &self,
        request: Request<pb::LeaseShardRequest>,
    ) -> Result<Response<pb::LeaseShardResponse>, Status> {
        let pb::LeaseShardRequest { term_seen, worker, wait_millis } = request.into_inner();
        self.0.term.hear(term_seen)?;
        let grant = self.0.lease(&worker, Duration::from_millis(wait_millis).min(LONGEST_WAIT)).await;
        let lease = grant.map(|grant| pb::Lease {
            dataset: grant.id.dataset.to_string(),
            shard: grant.id.shard,
            attempt: grant.attempt.to_string(),
            duration_millis: millis(grant.duration),
            spec_json: grant.spec_json,
            wanted: grant.wanted,
        });
        Ok(Response::new(pb::LeaseShardResponse { term: self.term(), lease }))
    }

    async fn renew_lease(
        &self,
        request: Request<pb::RenewLeaseRequest>,
    ) -> Result<Response<pb::RenewLeaseResponse>, Status> {
        let pb::RenewLeaseRequest { term_seen, worker, dataset, shard, attempt: text, outcomes, kept } =
            request.into_inner();
        self.0.term.hear(term_seen)?;
        let outcomes = outcomes.into_iter().collect();
        let renewed = self.0.renew(&worker, (&dataset, shard), attempt(&text)?, outcomes, &kept);
        let (duration_millis, wanted) =
            renewed.map_or_else(Default::default, |renewed| (millis(renewed.duration), renewed.wanted));
        Ok(Response::new(pb::RenewLeaseResponse { term: self.term(), duration_millis, wanted }))
    }

    async fn complete_shard(
        &self,
        request: Request<pb::CompleteShardRequest>,
    ) -> Result<Response<pb::CompleteShardResponse>, Status> {
        let pb::CompleteShardRequest { term_seen, worker, dataset, shard, attempt: _ } = request.into_inner();
        self.0.term.hear(term_seen)?;
        let committed = self.0.complete(&worker, (&dataset, shard)).await?;
        Ok(Response::new(pb::CompleteShardResponse { term: self.term(), committed }))
    }

    async fn release_lease(
        &self,
        request: Request<pb::ReleaseLeaseRequest>,
    ) -> Result<Response<pb::ReleaseLeaseResponse>, Status> {
        let pb::ReleaseLeaseRequest { term_seen, worker, dataset, shard, attempt: text, failure } =
            request.into_inner();
        self.0.term.hear(term_seen)?;
        self.0.release(&worker, (&dataset, shard), attempt(&text)?, &failure);
        Ok(Response::new(pb::ReleaseLeaseResponse { term: self.term() }))
    }
}
