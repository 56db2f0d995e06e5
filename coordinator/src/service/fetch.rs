//! `FetchService`: for workers.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use proto::ids::IdError;
use proto::pb::fetch_service_server::FetchService;
use proto::pb::{self, FailureKind};
use proto::{Attempt, DatasetId, OutcomeCounts, ShardId};
use tonic::{Request, Response, Status};

use crate::access::Speaker;
use crate::datasets::{Datasets, Renewed, Report};
use crate::error::Error;
use crate::shares::{Demand, Share};

/// The longest poll.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// URLs of one slice, as `slice_urls` bounds them.
const MOST_URLS: u64 = 1_000_000;
/// Sites of which one message may ask for parts, and bytes of a site's name: a host's, with its port.
const MOST_SITES: usize = 100_000;
const LONGEST_SITE: usize = 300;
/// Files of sites' rules that one message may name, bytes of such a file's URL or of the worker's name for itself, and
/// of its rules.
const MOST_FILES: usize = 10_000;
const LONGEST_FILE_URL: usize = 400;
const LARGEST_RULES: usize = 2 << 20;
/// Bytes of what a worker says of a failure; the rest is cut off.
const LONGEST_TEXT: usize = 2_000;

/// See `fetch.proto`.
pub(crate) struct FetchApi(pub(crate) Arc<Datasets>);

impl FetchApi {
    fn term(&self) -> u64 {
        self.0.term.number()
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
    let mut text = told.text;
    let cut = (0..=LONGEST_TEXT.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
    text.truncate(cut.unwrap_or_default());
    (kind, text)
}

/// Refuses counts that no slice can have: they are added up.
fn check_counts<'a>(what: &str, mut counts: impl ExactSizeIterator<Item = &'a u64>) -> Result<(), Error> {
    match counts.len() as u64 <= MOST_URLS && counts.all(|count| *count <= MOST_URLS) {
        true => Ok(()),
        false => Err(Error::Invalid(format!("{what}: no slice has more than {MOST_URLS} URLs"))),
    }
}

/// Refuses more sites than a worker can have, and names that are none.
fn check_sites(sites: &[pb::SiteDemand]) -> Result<(), Error> {
    if sites.len() > MOST_SITES {
        return Err(Error::Invalid(format!("sites: {} in one message; at most {MOST_SITES} may be", sites.len())));
    }
    match sites.iter().find(|demand| !(1..=LONGEST_SITE).contains(&demand.site.len())) {
        Some(demand) => {
            let length = demand.site.len();
            Err(Error::Invalid(format!("sites: a name of {length} bytes; 1 to {LONGEST_SITE} may be")))
        }
        None => Ok(()),
    }
}

/// A worker's demand as it was sent.
pub(crate) fn demand(demand: pb::SiteDemand) -> Demand {
    Demand {
        site: demand.site,
        held: demand.held,
        wanted: demand.wanted,
        rate: (demand.requests_per_second, demand.known),
        quiet: Duration::from_millis(demand.quiet_millis),
    }
}

/// The answer to it as it is sent.
pub(crate) fn share(Share { slots, budget, rate: (requests_per_second, known), delay }: Share) -> pb::SiteShare {
    pb::SiteShare {
        slots,
        site_slots: budget.slots,
        site_requests_per_second: budget.rate,
        requests_per_second,
        known,
        // Not earlier by parts of a millisecond.
        delay_millis: millis(delay.saturating_add(Duration::from_micros(999))),
    }
}

/// Refuses more files of sites' rules than a worker can ask for at once, and larger ones than it reads.
fn check_rules(request: &pb::ShareRulesRequest) -> Result<(), Error> {
    let pb::ShareRulesRequest { agent, fetched, wanted, .. } = request;
    let urls = || fetched.iter().map(|fetched| &fetched.url).chain(wanted);
    let (files, longest) = (urls().count(), urls().chain([agent]).map(String::len).max().unwrap_or(0));
    let largest = fetched.iter().filter_map(|fetched| fetched.rules.as_ref()).map(Message::encoded_len).max();
    match (files, longest, largest.unwrap_or(0)) {
        (..=MOST_FILES, ..=LONGEST_FILE_URL, ..=LARGEST_RULES) => Ok(()),
        found => Err(Error::Invalid(format!(
            "rules of sites: files, bytes of the longest name, bytes of the largest rules: {found:?}; at most {:?} may be",
            (MOST_FILES, LONGEST_FILE_URL, LARGEST_RULES)
        ))),
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[tonic::async_trait]
impl FetchService for FetchApi {
    async fn lease_shard(
        &self,
        request: Request<pb::LeaseShardRequest>,
    ) -> Result<Response<pb::LeaseShardResponse>, Status> {
        Speaker::of(&request).is("worker", &request.get_ref().worker)?;
        let pb::LeaseShardRequest { term_seen, worker, wait_millis, large } = request.into_inner();
        self.0.term.observe(term_seen)?;
        let grant = self.0.lease(&worker, large, Duration::from_millis(wait_millis).min(LONGEST_WAIT)).await;
        let lease = grant.map(|grant| pb::Lease {
            dataset: grant.id.dataset.to_string(),
            shard: grant.id.shard,
            attempt: grant.attempt.to_string(),
            duration_millis: millis(grant.duration),
            spec_json: grant.spec_json,
            traceparent: grant.traceparent,
            budgets: Some(pb::SiteBudgets::from(&*self.0.sites)),
            wanted: Arc::unwrap_or_clone(grant.wanted),
            once: grant.once,
            probes: grant.probes,
        });
        Ok(Response::new(pb::LeaseShardResponse { term: self.term(), lease }))
    }

    async fn renew_lease(
        &self,
        request: Request<pb::RenewLeaseRequest>,
    ) -> Result<Response<pb::RenewLeaseResponse>, Status> {
        Speaker::of(&request).is("worker", &request.get_ref().worker)?;
        let request = request.into_inner();
        let pb::RenewLeaseRequest { term_seen, worker, dataset, shard, attempt: text, .. } = request;
        let pb::RenewLeaseRequest { outcomes, kept, trouble, good, .. } = request;
        self.0.term.observe(term_seen)?;
        check_counts("outcomes", outcomes.values())?;
        check_counts("kept", kept.values())?;
        let outcomes =
            OutcomeCounts::from_names(outcomes).map_err(|error| Error::Invalid(format!("outcomes: {error}")))?;
        let report = Report { outcomes, kept, trouble: trouble.map(failure), good };
        let renewed = self.0.renew(&worker, &shard_id(dataset, shard)?, attempt(&text)?, report)?;
        let response = pb::RenewLeaseResponse { term: self.term(), ..pb::RenewLeaseResponse::default() };
        Ok(Response::new(match renewed {
            None => response,
            Some(Renewed { duration, wanted, probes, finish }) => {
                let (duration_millis, wanted) = (millis(duration), Arc::unwrap_or_clone(wanted));
                pb::RenewLeaseResponse { duration_millis, wanted, probes, finish, ..response }
            }
        }))
    }

    async fn complete_shard(
        &self,
        request: Request<pb::CompleteShardRequest>,
    ) -> Result<Response<pb::CompleteShardResponse>, Status> {
        Speaker::of(&request).is("worker", &request.get_ref().worker)?;
        let pb::CompleteShardRequest { term_seen, worker, dataset, shard, attempt: _, good } = request.into_inner();
        self.0.term.observe(term_seen)?;
        let committed = self.0.complete(&worker, &shard_id(dataset, shard)?, good).await?.to_string();
        Ok(Response::new(pb::CompleteShardResponse { term: self.term(), committed }))
    }

    async fn release_lease(
        &self,
        request: Request<pb::ReleaseLeaseRequest>,
    ) -> Result<Response<pb::ReleaseLeaseResponse>, Status> {
        Speaker::of(&request).is("worker", &request.get_ref().worker)?;
        let pb::ReleaseLeaseRequest { term_seen, worker, dataset, shard, attempt: text, failure: why } =
            request.into_inner();
        self.0.term.observe(term_seen)?;
        self.0.release(&worker, &shard_id(dataset, shard)?, attempt(&text)?, why.map(failure))?;
        Ok(Response::new(pb::ReleaseLeaseResponse { term: self.term() }))
    }

    async fn share_sites(
        &self,
        request: Request<pb::ShareSitesRequest>,
    ) -> Result<Response<pb::ShareSitesResponse>, Status> {
        Speaker::of(&request).is("worker", &request.get_ref().worker)?;
        let pb::ShareSitesRequest { term_seen, worker, sequence, sites } = request.into_inner();
        self.0.term.observe(term_seen)?;
        check_sites(&sites)?;
        let demands: Vec<Demand> = sites.into_iter().map(demand).collect();
        let shares = self.0.share(&worker, sequence, &demands);
        let (shares, duration) = shares.ok_or_else(|| Status::aborted("a later request of this worker came before"))?;
        Ok(Response::new(pb::ShareSitesResponse {
            term: self.term(),
            duration_millis: millis(duration),
            sites: shares.into_iter().map(share).collect(),
        }))
    }

    async fn share_rules(
        &self,
        request: Request<pb::ShareRulesRequest>,
    ) -> Result<Response<pb::ShareRulesResponse>, Status> {
        Speaker::of(&request).is("worker", &request.get_ref().worker)?;
        check_rules(request.get_ref())?;
        let pb::ShareRulesRequest { term_seen, worker, agent, fetched, wanted } = request.into_inner();
        self.0.term.observe(term_seen)?;
        let known = self.0.share_rules(&worker, &agent, fetched, &wanted);
        Ok(Response::new(pb::ShareRulesResponse { term: self.term(), known }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_worker_can_mean_is_refused() {
        assert!(check_counts("kept", [].iter()).is_ok() && check_counts("kept", [0, MOST_URLS].iter()).is_ok());
        assert!(check_counts("kept", [1, u64::MAX].iter()).is_err());
        assert!(check_counts("kept", vec![0; MOST_URLS as usize + 1].iter()).is_err());
        let site = |name: &str| pb::SiteDemand { site: name.to_owned(), ..Default::default() };
        assert!(check_sites(&[site("a.example"), site("b.example:8080")]).is_ok());
        for wrong in [vec![site("")], vec![site(&"a".repeat(1000))], vec![site("a"); MOST_SITES + 1]] {
            assert!(check_sites(&wrong).is_err());
        }
        let url = |length| "a".repeat(length);
        let asks = |wanted| check_rules(&pb::ShareRulesRequest { wanted, ..Default::default() });
        assert!(asks(vec![url(LONGEST_FILE_URL); MOST_FILES]).is_ok());
        assert!(asks(vec![url(1); MOST_FILES + 1]).is_err() && asks(vec![url(LONGEST_FILE_URL + 1)]).is_err());
        let rules = |bytes| pb::PathRule { pattern: url(bytes), ..Default::default() };
        let fetched = |bytes| {
            let rules = Some(pb::SiteRules { rules: vec![rules(bytes)] });
            let fetched = vec![pb::FetchedRules { url: url(1), rules }];
            check_rules(&pb::ShareRulesRequest { fetched, ..Default::default() })
        };
        assert!(fetched(1 << 20).is_ok() && fetched(LARGEST_RULES).is_err());
        let long = pb::Failure { kind: 0, text: "ä".repeat(LONGEST_TEXT) };
        let (kind, text) = failure(long);
        assert!(kind == FailureKind::Slice && text.len() == LONGEST_TEXT);
    }
}
