//! `FetchService`: for workers.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use proto::ids::IdError;
use proto::pb::fetch_service_server::FetchService;
use proto::pb::{self, FailureKind};
use proto::{Attempt, DatasetId, OutcomeCounts, ShardId};
use tonic::{Request, Response, Status};

use crate::datasets::{Datasets, Report};
use crate::error::Error;
use crate::hosts::{self, Broker, Demand, HostBudgets};

/// The longest poll.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// See `fetch.proto`.
pub(crate) struct FetchApi {
    datasets: Arc<Datasets>,
    started: Instant,
    hosts: Mutex<Broker>,
}

impl FetchApi {
    pub(crate) fn new(datasets: Arc<Datasets>, hosts: HostBudgets) -> Self {
        let first = datasets.term.number() == 1;
        Self { datasets, started: Instant::now(), hosts: Mutex::new(Broker::new(Duration::ZERO, hosts, first)) }
    }

    fn term(&self) -> u64 {
        self.datasets.term.number()
    }
}

fn attempt(text: &str) -> Result<Attempt, Error> {
    text.parse().map_err(|error: IdError| Error::Invalid(format!("attempt: {error}")))
}

fn shard_id(dataset: String, shard: u32) -> Result<ShardId, Error> {
    let dataset: DatasetId =
        dataset.try_into().map_err(|error: IdError| Error::Invalid(format!("dataset: {error}")))?;
    Ok(dataset.shard(shard))
}

/// One whose kind is not told is the slice's.
fn failure(told: pb::Failure) -> (FailureKind, String) {
    let kind = match told.kind() {
        FailureKind::Unspecified => FailureKind::Slice,
        kind => kind,
    };
    (kind, told.text)
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
        self.datasets.term.observe(term_seen)?;
        let grant = self.datasets.lease(&worker, Duration::from_millis(wait_millis).min(LONGEST_WAIT)).await;
        let lease = grant.map(|grant| pb::Lease {
            dataset: grant.id.dataset.to_string(),
            shard: grant.id.shard,
            attempt: grant.attempt.to_string(),
            duration_millis: millis(grant.duration),
            spec_json: grant.spec_json,
            traceparent: grant.traceparent,
            wanted: grant.wanted,
            once: grant.once,
            probes: grant.probes,
        });
        Ok(Response::new(pb::LeaseShardResponse { term: self.term(), lease }))
    }

    async fn renew_lease(
        &self,
        request: Request<pb::RenewLeaseRequest>,
    ) -> Result<Response<pb::RenewLeaseResponse>, Status> {
        let request = request.into_inner();
        let pb::RenewLeaseRequest { term_seen, worker, dataset, shard, attempt: text, .. } = request;
        let pb::RenewLeaseRequest { outcomes, kept, trouble, good, .. } = request;
        self.datasets.term.observe(term_seen)?;
        let outcomes =
            OutcomeCounts::from_names(outcomes).map_err(|error| Error::Invalid(format!("outcomes: {error}")))?;
        let report = Report { outcomes, kept, trouble: trouble.map(failure), good };
        let renewed = self.datasets.renew(&worker, &shard_id(dataset, shard)?, attempt(&text)?, report);
        let (duration_millis, wanted, probes) =
            renewed.map_or_else(Default::default, |renewed| (millis(renewed.duration), renewed.wanted, renewed.probes));
        Ok(Response::new(pb::RenewLeaseResponse { term: self.term(), duration_millis, wanted, probes }))
    }

    async fn complete_shard(
        &self,
        request: Request<pb::CompleteShardRequest>,
    ) -> Result<Response<pb::CompleteShardResponse>, Status> {
        let pb::CompleteShardRequest { term_seen, worker, dataset, shard, attempt: _, good } = request.into_inner();
        self.datasets.term.observe(term_seen)?;
        let committed = self.datasets.complete(&worker, &shard_id(dataset, shard)?, good).await?.to_string();
        Ok(Response::new(pb::CompleteShardResponse { term: self.term(), committed }))
    }

    async fn release_lease(
        &self,
        request: Request<pb::ReleaseLeaseRequest>,
    ) -> Result<Response<pb::ReleaseLeaseResponse>, Status> {
        let pb::ReleaseLeaseRequest { term_seen, worker, dataset, shard, attempt: text, failure: why } =
            request.into_inner();
        self.datasets.term.observe(term_seen)?;
        self.datasets.release(&worker, &shard_id(dataset, shard)?, attempt(&text)?, why.map(failure));
        Ok(Response::new(pb::ReleaseLeaseResponse { term: self.term() }))
    }

    async fn share_hosts(
        &self,
        request: Request<pb::ShareHostsRequest>,
    ) -> Result<Response<pb::ShareHostsResponse>, Status> {
        let pb::ShareHostsRequest { term_seen, worker, sequence, hosts } = request.into_inner();
        self.datasets.term.observe(term_seen)?;
        let demand = |demand: pb::HostDemand| {
            let pb::HostDemand { host, wanted, holds, in_flight } = demand;
            Demand { host, wanted, holds, in_flight }
        };
        let demands = hosts.into_iter().map(demand).collect();
        let shares = {
            let mut broker = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
            broker.ask(self.started.elapsed(), &worker, sequence, demands)
        };
        let shares = shares.ok_or_else(|| Status::aborted("a later request of this worker came before"))?;
        let share = |share: hosts::Share| pb::HostShare {
            host: share.host,
            slots: share.slots,
            requests_per_second: share.rate,
        };
        Ok(Response::new(pb::ShareHostsResponse {
            term: self.term(),
            hosts: shares.shares.into_iter().map(share).collect(),
            duration_millis: millis(shares.duration),
            ask_again_millis: millis(shares.ask_again),
        }))
    }
}
