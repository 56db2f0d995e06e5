//! The coordinator, as a worker sees it: calls with deadlines, terms, and a lease that is renewed while its shard is
//! made.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::BackoffBuilder;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::cluster::{ClusterRecord, OfCluster, OwnCluster, is_stranger};
use proto::dial::{Dial, Dialled};
use proto::pb::fetch_service_client::FetchServiceClient;
use proto::pb::{
    CompleteShardRequest, Failure, FailureKind, FetchedRules, KnownRules, Lease, LeaseShardRequest,
    ReleaseLeaseRequest, RenewLeaseRequest, ShareRulesRequest, ShareSitesRequest, SiteDemand, SiteShare,
};
use proto::trace::{Carried, Carry};
use proto::{Stored, keys};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use crate::backoff::backoff;
use crate::progress::Progress;
use crate::store;
use crate::way_out::WayOut;

/// For one call, beside the time that the coordinator may let it wait.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the coordinator may keep a worker waiting for a lease before it says that there is none.
const LEASE_WAIT: Duration = Duration::from_secs(20);
/// A lease carries its dataset's spec, which names every class.
const MAX_MESSAGE: usize = 256 << 20;
/// For releasing a lease, which is a courtesy: it ends by itself.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);

type Client = FetchServiceClient<OfCluster<Carried<Dialled>>>;

/// A client of the coordinator. It may be away for minutes: whoever calls tries again.
#[derive(Debug)]
pub(crate) struct Coordinator {
    dial: Dial,
    client: Mutex<Client>,
    worker: String,
    /// What gave pictures to this worker goes up, and what gave some to others comes down.
    way_out: Arc<WayOut>,
    store: Arc<dyn ObjectStore>,
    cluster: OwnCluster,
    /// The highest term that a response named.
    highest_term: AtomicU64,
    /// Whether the last request for a lease got a response.
    reached: AtomicBool,
}

/// The shard that a lease is for, as every call names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeaseId {
    pub(crate) dataset: String,
    pub(crate) shard: u32,
    pub(crate) attempt: String,
}

impl From<&Lease> for LeaseId {
    fn from(lease: &Lease) -> Self {
        Self { dataset: lease.dataset.clone(), shard: lease.shard, attempt: lease.attempt.clone() }
    }
}

impl Coordinator {
    /// Connects with the first call, and again whenever the connection is lost.
    pub(crate) fn new(dial: Dial, worker: String, store: Arc<dyn ObjectStore>, way_out: Arc<WayOut>) -> Self {
        let cluster = OwnCluster::default();
        let client = Mutex::new(connect(&dial, &cluster));
        let (highest_term, reached) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { dial, client, worker, way_out, store, cluster, highest_term, reached }
    }

    fn client(&self) -> Client {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks for a shard once, of one `large` site or of many; none if there is nothing to do. Until there was a
    /// response it does not wait for work, so that it is soon known whether there is a coordinator.
    pub(crate) async fn lease(&self, large: bool) -> Result<Option<Lease>, Status> {
        let wait = if self.reached.load(Ordering::Relaxed) { LEASE_WAIT } else { Duration::ZERO };
        if self.cluster.id().is_empty() {
            self.read_cluster().await;
        }
        let request = LeaseShardRequest {
            term_seen: self.highest_term.load(Ordering::Relaxed),
            worker: self.worker.clone(),
            wait_millis: wait.as_millis() as u64,
            large,
        };
        let mut client = self.client();
        let response = within(wait + CALL_TIMEOUT, client.lease_shard(Request::new(request))).await;
        self.reached.store(response.is_ok(), Ordering::Relaxed);
        if let Err(status) = &response {
            crate::metrics::answered(false);
            if is_final(status) {
                // The coordinator never refuses a lease. It is one whose term is over, or another server that got the
                // connection while the coordinator was away, and a connection that works would stay for ever.
                *self.client.lock().unwrap_or_else(PoisonError::into_inner) = connect(&self.dial, &self.cluster);
            }
            self.check_stranger(status).await;
        }
        let response = response?;
        self.check_term(response.term)?;
        response.lease.iter().for_each(|lease| self.way_out.hear(&lease.probes));
        Ok(response.lease)
    }

    /// The lease's new duration, zero if it is over; and whether nothing more is to be begun. Sets how many samples
    /// classes still want.
    async fn renew(&self, id: &LeaseId, progress: &Progress, timeout: Duration) -> Result<(Duration, bool), Status> {
        let kept = progress.kept();
        let request = RenewLeaseRequest {
            term_seen: self.highest_term.load(Ordering::Relaxed),
            worker: self.worker.clone(),
            dataset: id.dataset.clone(),
            shard: id.shard,
            attempt: id.attempt.clone(),
            outcomes: (&progress.outcomes()).into(),
            kept: kept.clone(),
            trouble: store::trouble().map(|text| Failure { kind: FailureKind::Store.into(), text }),
            good: self.way_out.good(),
        };
        let mut client = self.client();
        let response = within(timeout, client.renew_lease(Request::new(request))).await?;
        self.check_term(response.term)?;
        self.way_out.hear(&response.probes);
        progress.set_wanted(response.wanted, &kept);
        Ok((Duration::from_millis(response.duration_millis), response.finish))
    }

    /// Renews a lease every third of its duration. The attempt is to `cancel` when a response says that the lease is
    /// over, and to `leave` when it is to end with what it has. A coordinator that is away changes nothing: the
    /// attempt goes on, and the first index wins.
    pub(crate) async fn renew_until_over(
        &self,
        id: &LeaseId,
        duration: Duration,
        progress: &Progress,
        cancel: &CancellationToken,
        leave: &CancellationToken,
    ) {
        let mut duration = duration.max(Duration::from_millis(30));
        let mut end = Instant::now() + duration;
        let mut expired = false;
        let mut retries = None;
        loop {
            let retry = retries.as_mut().and_then(Iterator::next);
            tokio::time::sleep(retry.unwrap_or(duration / 3)).await;
            let asked = Instant::now();
            match self.renew(id, progress, CALL_TIMEOUT.min(duration)).await {
                Ok((Duration::ZERO, _)) => {
                    tracing::info!("the lease is over; dropping the attempt");
                    cancel.cancel();
                    return;
                }
                Ok((renewed, finish)) => {
                    if finish {
                        leave.cancel();
                    }
                    (duration, end, expired, retries) = (renewed, asked + renewed, false, None);
                }
                Err(status) => {
                    // Once this worker is of another cluster, the next response is that the lease is over.
                    self.check_stranger(&status).await;
                    retries.get_or_insert_with(|| backoff(duration / 20, duration / 6).build());
                    tracing::debug!(%status, "failed to renew a lease");
                    if !expired && Instant::now() > end {
                        expired = true;
                        tracing::warn!(%status, "the lease ran out without a response; going on, the first index wins");
                    }
                }
            }
        }
    }

    /// Asks once for parts of sites' budgets: one for each demand, and for how long they are lent.
    pub(crate) async fn share_sites(
        &self,
        sequence: u64,
        sites: Vec<SiteDemand>,
        timeout: Duration,
    ) -> Result<(Duration, Vec<SiteShare>), Status> {
        let (term_seen, worker) = (self.highest_term.load(Ordering::Relaxed), self.worker.clone());
        let request = ShareSitesRequest { term_seen, worker, sequence, sites };
        let mut client = self.client();
        let response = within(timeout, client.share_sites(Request::new(request))).await?;
        self.check_term(response.term)?;
        Ok((Duration::from_millis(response.duration_millis), response.sites))
    }

    /// Tells once what sites' files say to `agent`, and asks for others: what is known of each.
    pub(crate) async fn share_rules(
        &self,
        agent: &str,
        fetched: Vec<FetchedRules>,
        wanted: Vec<String>,
        timeout: Duration,
    ) -> Result<Vec<KnownRules>, Status> {
        let (term_seen, worker) = (self.highest_term.load(Ordering::Relaxed), self.worker.clone());
        let request = ShareRulesRequest { term_seen, worker, agent: agent.to_owned(), fetched, wanted };
        let mut client = self.client();
        let response = within(timeout, client.share_rules(Request::new(request))).await?;
        self.check_term(response.term)?;
        Ok(response.known)
    }

    /// Reports a shard whose index is put, until there is a response or `shutdown`.
    pub(crate) async fn complete(&self, id: &LeaseId, shutdown: &CancellationToken) {
        for delay in backoff(Duration::from_millis(200), Duration::from_secs(10)).build() {
            let request = CompleteShardRequest {
                term_seen: self.highest_term.load(Ordering::Relaxed),
                worker: self.worker.clone(),
                dataset: id.dataset.clone(),
                shard: id.shard,
                attempt: id.attempt.clone(),
                good: self.way_out.good(),
            };
            let response = within(CALL_TIMEOUT, self.client().complete_shard(Request::new(request))).await;
            match response.and_then(|response| self.check_term(response.term)) {
                Ok(()) => return,
                Err(status) if is_final(&status) => {
                    return tracing::warn!(%status, "the coordinator refused the report of a shard");
                }
                Err(status) => tracing::debug!(%status, "failed to report a shard; trying again"),
            }
            if shutdown.run_until_cancelled(tokio::time::sleep(delay)).await.is_none() {
                return;
            }
        }
    }

    /// Releases a lease, if that can be done soon. There is no `failure` on an orderly exit.
    pub(crate) async fn release(&self, id: &LeaseId, failure: Option<Failure>) {
        let request = ReleaseLeaseRequest {
            term_seen: self.highest_term.load(Ordering::Relaxed),
            worker: self.worker.clone(),
            dataset: id.dataset.clone(),
            shard: id.shard,
            attempt: id.attempt.clone(),
            failure,
        };
        let tries = async {
            for delay in backoff(Duration::from_millis(100), Duration::from_secs(1)).build() {
                let mut client = self.client();
                let response = within(RELEASE_TIMEOUT, client.release_lease(Request::new(request.clone()))).await;
                match response.and_then(|response| self.check_term(response.term)) {
                    Ok(()) => return,
                    Err(status) if is_final(&status) => return,
                    Err(_) => tokio::time::sleep(delay).await,
                }
            }
        };
        if tokio::time::timeout(RELEASE_TIMEOUT, tries).await.is_err() {
            tracing::debug!("a lease could not be released; it ends by itself");
        }
    }

    /// Reads from the store which cluster this is. Of a new one no term is known.
    async fn read_cluster(&self) {
        let read = async {
            let json = self.store.get(&Path::from(keys::CLUSTER)).await?.bytes().await?;
            anyhow::Ok(ClusterRecord::from_json(&json)?.id)
        };
        match tokio::time::timeout(CALL_TIMEOUT, read).await {
            Ok(Ok(id)) => {
                if self.cluster.set(id.clone()) {
                    self.highest_term.store(0, Ordering::Relaxed);
                    tracing::warn!(
                        cluster = id,
                        "the store has been replaced: going on as a worker of its new cluster"
                    );
                }
            }
            // There is none until a coordinator has started; nothing can be done without the store anyway.
            Ok(Err(error)) => tracing::debug!(%error, "cannot read which cluster this is"),
            Err(_) => tracing::debug!("the store does not say which cluster this is"),
        }
    }

    /// Whoever is refused as a stranger may be the one whose store has been replaced.
    async fn check_stranger(&self, status: &Status) {
        if is_stranger(status) {
            self.read_cluster().await;
        }
    }

    /// Notes a response's term, and refuses the response of a coordinator which another has replaced.
    fn check_term(&self, term: u64) -> Result<(), Status> {
        let highest = self.highest_term.fetch_max(term, Ordering::Relaxed);
        if term < highest {
            return Err(Status::unavailable(format!("a response of term {term}, when term {highest} has begun")));
        }
        Ok(())
    }
}

/// Connects with the first call.
fn connect(dial: &Dial, cluster: &OwnCluster) -> Client {
    let channel = OfCluster::new(Carried::new(dial.channel(), Carry), cluster.clone());
    FetchServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE)
}

/// Whether the same call would be refused again.
fn is_final(status: &Status) -> bool {
    use tonic::Code::{FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unimplemented};
    matches!(status.code(), FailedPrecondition | InvalidArgument | NotFound | PermissionDenied | Unimplemented)
}

async fn within<T>(
    timeout: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    let response = tokio::time::timeout(timeout, call).await;
    // A refusal is a response, too.
    crate::metrics::answered(matches!(&response, Ok(response) if response.as_ref().err().is_none_or(is_final)));
    match response {
        Ok(response) => response.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no response in {timeout:?}"))),
    }
}
