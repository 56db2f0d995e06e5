use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use clap::Parser;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use proto::pb::fetch_service_server::{FetchService, FetchServiceServer};
use proto::pb::{
    CompleteShardRequest, CompleteShardResponse, KnownRules, LeaseShardRequest, LeaseShardResponse,
    ReleaseLeaseRequest, ReleaseLeaseResponse, RenewLeaseRequest, RenewLeaseResponse, ShareRulesRequest,
    ShareRulesResponse, ShareSitesRequest, ShareSitesResponse, SiteDemand, SiteShare,
};
use proto::{Rejection, Stored, keys};
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::*;
use crate::attempt::tests::{birds, origin, put_slice, spec};

/// A double of the coordinator: grants what it was given, and writes down what it hears.
#[derive(Debug, Clone, Default)]
pub(crate) struct CoordinatorDouble(Arc<Mutex<Heard>>);

#[derive(Debug, Default)]
pub(crate) struct Heard {
    leases: VecDeque<Lease>,
    /// What renewals are answered with.
    duration_millis: u64,
    /// What demands of sites are answered with, and what was last demanded; without it, they get all they want.
    share: Option<(u64, SiteShare)>,
    demands: Vec<SiteDemand>,
    renewals: Vec<RenewLeaseRequest>,
    completed: Vec<u32>,
    released: Vec<ReleaseLeaseRequest>,
}

const TERM: u64 = 9;

impl CoordinatorDouble {
    fn heard<T>(&self, look: impl FnOnce(&mut Heard) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Serves, and returns the address.
    pub(crate) async fn serve(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = format!("http://{}", listener.local_addr().expect("bound"));
        let router = Server::builder().add_service(FetchServiceServer::new(self.clone()));
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    /// As `serve`, but the first connection leads to somebody who knows no such service.
    async fn serve_after_a_stranger(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = format!("http://{}", listener.local_addr().expect("bound"));
        let refuse = |_| Err(Status::unimplemented("a stranger"));
        let stranger = Server::builder().add_service(FetchServiceServer::with_interceptor(self.clone(), refuse));
        let router = Server::builder().add_service(FetchServiceServer::new(self.clone()));
        tokio::spawn(async move {
            let first = listener.accept().await.map(|(socket, _)| socket);
            // It goes on with its connection as long as the worker does.
            tokio::spawn(stranger.serve_with_incoming(tokio_stream::once(first).chain(tokio_stream::pending())));
            router.serve_with_incoming(TcpListenerStream::new(listener)).await
        });
        address
    }

    async fn until(&self, what: impl Fn(&Heard) -> bool) {
        let heard = async {
            while !self.heard(|heard| what(heard)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(20), heard).await.is_err() {
            panic!("never heard: {:?}", self.heard(|heard| format!("{heard:?}")));
        }
    }
}

#[tonic::async_trait]
impl FetchService for CoordinatorDouble {
    async fn lease_shard(&self, request: Request<LeaseShardRequest>) -> Result<Response<LeaseShardResponse>, Status> {
        let large = request.into_inner().large;
        let lease = self.heard(|heard| if large { None } else { heard.leases.pop_front() });
        Ok(Response::new(LeaseShardResponse { term: TERM, lease }))
    }

    async fn renew_lease(&self, request: Request<RenewLeaseRequest>) -> Result<Response<RenewLeaseResponse>, Status> {
        let duration_millis = self.heard(|heard| {
            heard.renewals.push(request.into_inner());
            heard.duration_millis
        });
        Ok(Response::new(RenewLeaseResponse { term: TERM, duration_millis, ..RenewLeaseResponse::default() }))
    }

    async fn complete_shard(
        &self,
        request: Request<CompleteShardRequest>,
    ) -> Result<Response<CompleteShardResponse>, Status> {
        let CompleteShardRequest { shard, attempt, .. } = request.into_inner();
        self.heard(|heard| heard.completed.push(shard));
        Ok(Response::new(CompleteShardResponse { term: TERM, committed: attempt }))
    }

    async fn release_lease(
        &self,
        request: Request<ReleaseLeaseRequest>,
    ) -> Result<Response<ReleaseLeaseResponse>, Status> {
        self.heard(|heard| heard.released.push(request.into_inner()));
        Ok(Response::new(ReleaseLeaseResponse { term: TERM }))
    }

    async fn share_sites(&self, request: Request<ShareSitesRequest>) -> Result<Response<ShareSitesResponse>, Status> {
        let demands = request.into_inner().sites;
        let all = SiteShare { slots: 64, site_slots: 64, known: true, ..SiteShare::default() };
        let (duration_millis, share) = self.heard(|heard| {
            heard.demands.clone_from(&demands);
            heard.share.unwrap_or((60_000, all))
        });
        let none = SiteShare { slots: 0, ..share };
        let sites = demands.into_iter().map(|demand| if demand.wanted { share } else { none }).collect();
        Ok(Response::new(ShareSitesResponse { term: TERM, duration_millis, sites }))
    }

    async fn share_rules(&self, request: Request<ShareRulesRequest>) -> Result<Response<ShareRulesResponse>, Status> {
        let known = request.into_inner().wanted.iter().map(|_| KnownRules::default()).collect();
        Ok(Response::new(ShareRulesResponse { term: TERM, known }))
    }
}

fn lease(shard: u32, duration_millis: u64) -> Lease {
    Lease {
        traceparent: String::new(),
        dataset: "birds-1".into(),
        shard,
        attempt: format!("{TERM}.{shard}"),
        duration_millis,
        spec_json: spec().to_json(),
        ..Lease::default()
    }
}

#[derive(clap::Parser)]
struct Arguments {
    #[command(flatten)]
    worker: Config,
}

struct Cluster {
    coordinator: CoordinatorDouble,
    store: Arc<dyn ObjectStore>,
    shutdown: CancellationToken,
    worker: tokio::task::JoinHandle<anyhow::Result<()>>,
}

/// A worker with eight connections, and slices of 6 URLs whose last one never answers if `hanging`.
async fn start(leases: Vec<Lease>, hanging: bool, renewed_for: u64) -> Cluster {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let at = origin().await;
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    for lease in &leases {
        let mut urls: Vec<String> = (0..5).map(|i| format!("http://{at}/good/{}", lease.shard * 10 + i)).collect();
        urls.push(format!("http://{at}/{}", if hanging { "silent" } else { "gone" }));
        put_slice(&*store, lease.shard, &urls).await;
    }
    let heard = Heard { leases: leases.into(), duration_millis: renewed_for, ..Heard::default() };
    let coordinator = CoordinatorDouble(Arc::new(Mutex::new(heard)));
    let address = coordinator.serve().await;
    join(coordinator, &address, store)
}

/// The worker of such a cluster.
fn join(coordinator: CoordinatorDouble, address: &str, store: Arc<dyn ObjectStore>) -> Cluster {
    let arguments = ["worker", "--connections", "8", "--allow-net", "127.0.0.0/8"];
    let config = Arguments::try_parse_from(arguments).expect("good flags").worker;
    let dial = Dial::new(address).expect("an address");
    let shutdown = CancellationToken::new();
    let worker = tokio::spawn(run("worker-1".to_owned(), config, dial, Arc::clone(&store), shutdown.clone()));
    Cluster { coordinator, store, shutdown, worker }
}

impl Cluster {
    async fn ends(self) {
        self.shutdown.cancel();
        // Longer than what it grants its last requests and their places at sites, on crowded cores too.
        let ended = tokio::time::timeout(Duration::from_secs(20), self.worker).await;
        ended.expect("within seconds").expect("no panic").expect("no error");
    }
}

#[tokio::test]
async fn leased_shards_are_made_committed_and_told_of() {
    let cluster = start(vec![lease(1, 60_000), lease(2, 60_000)], false, 60_000).await;
    cluster.coordinator.until(|heard| heard.completed.len() == 2).await;
    for shard in [1, 2] {
        let key = keys::index(&birds(shard));
        let index = cluster.store.get(&key.into()).await.expect("committed").bytes().await.expect("memory");
        let index = proto::ShardIndex::from_json(&index).expect("own output");
        assert_eq!((index.outcomes.of(Ok(())), index.outcomes.of(Err(Rejection::NotFound))), (5, 1));
        assert_eq!(index.writer, "worker-1");
    }
    cluster.ends().await;
}

#[tokio::test]
async fn who_refuses_a_lease_is_no_coordinator_so_the_worker_connects_anew() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    put_slice(&*store, 1, &["http://127.0.0.1:1/".to_owned()]).await;
    let heard = Heard { leases: [lease(1, 60_000)].into(), duration_millis: 60_000, ..Heard::default() };
    let coordinator = CoordinatorDouble(Arc::new(Mutex::new(heard)));
    let address = coordinator.serve_after_a_stranger().await;
    let cluster = join(coordinator, &address, store);
    cluster.coordinator.until(|heard| heard.completed == [1]).await;
    cluster.ends().await;
}

#[tokio::test]
async fn a_slow_url_does_not_keep_the_next_shard_waiting() {
    let cluster = start((1..=4).map(|shard| lease(shard, 60_000)).collect(), true, 60_000).await;
    cluster.coordinator.until(|heard| heard.leases.is_empty()).await;
    assert!(cluster.coordinator.heard(|heard| heard.completed.is_empty()), "all four wait for their last URL");
    cluster.coordinator.until(|heard| heard.completed.len() == 4).await;
    cluster.ends().await;
}

#[tokio::test]
async fn no_more_is_in_flight_than_its_part_of_a_site_has_slots_and_nothing_when_the_part_has_ended() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let at = listener.local_addr().expect("bound");
    // It never answers; how many connections are open, and how many there were.
    let (open, all) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (now_open, so_far) = (Arc::clone(&open), Arc::clone(&all));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let open = Arc::clone(&now_open);
            open.fetch_add(1, Ordering::SeqCst);
            so_far.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    put_slice(&*store, 1, &(0..6).map(|n| format!("http://{at}/{n}")).collect::<Vec<_>>()).await;
    let two = SiteShare { slots: 2, site_slots: 4, known: true, ..SiteShare::default() };
    let share = Some((900, two));
    // No file comes first, for which all others would wait.
    let spec_json = DatasetSpec { respect: Vec::new(), ..spec() }.to_json();
    let leases = vec![Lease { spec_json, ..lease(1, 60_000) }].into();
    let heard = Heard { leases, duration_millis: 60_000, share, ..Heard::default() };
    let coordinator = CoordinatorDouble(Arc::new(Mutex::new(heard)));
    let address = coordinator.serve().await;
    let cluster = join(coordinator, &address, store);
    let until = async |many: u32| {
        let begun = std::time::Instant::now();
        while open.load(Ordering::SeqCst) != many {
            assert!(begun.elapsed() < Duration::from_secs(10), "never {many} open");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    until(2).await;
    // It is to make way: nothing more is begun, and what is in flight may end until its time is over.
    cluster.coordinator.heard(|heard| heard.share = Some((900, SiteShare { slots: 0, ..two })));
    cluster.coordinator.until(|heard| heard.demands.iter().any(|demand| demand.held == 2)).await;
    cluster.coordinator.heard(|heard| heard.share = Some((0, SiteShare { slots: 0, ..two })));
    until(0).await;
    cluster.coordinator.until(|heard| heard.demands.iter().any(|demand| demand.held == 0 && demand.wanted)).await;
    assert_eq!((open.load(Ordering::SeqCst), all.load(Ordering::SeqCst)), (0, 2));
    cluster.coordinator.heard(|heard| heard.share = Some((900, SiteShare { slots: 1, ..two })));
    until(1).await;
    cluster.ends().await;
}

#[tokio::test]
async fn renewals_carry_progress_and_a_lease_that_is_over_is_dropped() {
    let cluster = start(vec![lease(1, 90)], true, 90).await;
    let progressed = |heard: &Heard| heard.renewals.iter().any(|renewal| renewal.outcomes.get("kept") == Some(&5));
    cluster.coordinator.until(progressed).await;
    cluster.coordinator.heard(|heard| heard.duration_millis = 0);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let before = cluster.coordinator.heard(|heard| heard.renewals.len());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(cluster.coordinator.heard(|heard| (heard.renewals.len(), heard.completed.len())), (before, 0));
    assert!(cluster.store.head(&keys::index(&birds(1)).into()).await.is_err());
    cluster.ends().await;
}

#[tokio::test]
async fn at_shutdown_a_lease_is_given_back_or_committed_within_seconds() {
    let granted: fn(&Heard) -> bool = |heard| heard.leases.is_empty();
    let renewed: fn(&Heard) -> bool = |heard| !heard.renewals.is_empty();
    for when in [granted, renewed] {
        let cluster = start(vec![lease(1, 300)], true, 60_000).await;
        cluster.coordinator.until(when).await;
        let coordinator = cluster.coordinator.clone();
        cluster.ends().await;
        // With nothing finished it gives the lease back; else it commits what it has.
        let (released, completed) = coordinator.heard(|heard| (heard.released.clone(), heard.completed.clone()));
        assert_eq!(released.len() + completed.len(), 1, "{released:?} {completed:?}");
        assert!(released.iter().all(|lease| (lease.shard, &lease.failure, lease.term_seen) == (1, &None, TERM)));
    }
}

#[tokio::test]
async fn an_attempt_that_fails_says_why() {
    let bad = Lease { spec_json: "{}".into(), ..lease(1, 60_000) };
    let cluster = start(vec![bad], false, 60_000).await;
    cluster.coordinator.until(|heard| heard.released.len() == 1).await;
    let failure = cluster.coordinator.heard(|heard| heard.released[0].failure.clone()).expect("a reason");
    assert_eq!(failure.kind(), FailureKind::Slice);
    assert!(failure.text.contains("no class of the dataset"), "{failure:?}");
    cluster.ends().await;
}

#[tokio::test]
async fn a_background_task_that_panics_ends_the_worker_with_an_error() {
    let mut background = JoinSet::new();
    background.spawn(async { panic!("a bug") });
    let error = supervise(background, std::future::pending()).await.expect_err("the task has ended");
    assert!(format!("{error:#}").contains("panic"), "{error:#}");
}
