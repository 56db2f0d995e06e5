//! The coordinator: it decides. It turns URL lists into slices, leases them to workers, seals what they committed into
//! manifests, and forms generations of ranks for runs. It touches no image, no web server and no tensor.
//!
//! All that lasts is in the object store; a coordinator that is killed is replaced by another one that lists it.
//! [`run`] checks that the store can decide races, begins a term, recovers, and serves:
//!
//! - `inbox`, `catalog`, `list`, `dealing`, `spool`: lists of URLs are received and become slices, dealt by site, in
//!   bounded memory;
//! - `ledger` (pure): who may make which shard until when;
//! - `yields` (pure): whose yield stands out, of workers and of large sites;
//! - `sites`, `shares` (pure): how much of which site each worker may use; `site_rules` (pure): what sites say may be
//!   taken from them;
//! - `datasets`, `manifest`, `history`, `damage`: the state of all datasets, their sealing, what became of each URL,
//!   and what cannot be read any more; `turns` (pure): which of what may come back is asked again;
//! - `duplicates`, `near` (pure): which samples do not count;
//! - `roster` (pure), `runs`: which rank runs where, and each run's history;
//! - `service`: the gRPC face of all that; `access` stands in front of it: who may do what; [`door`]: the connections
//!   over which it is reached, plain or over TLS;
//! - [`audit`]: what in a store does not add up, and what is garbage, for commands that look at it without a
//!   coordinator;
//! - [`metrics`], `store`, `cluster`, `clock`, `term`, `handover`, `tasks`, `error`: what they stand on.

mod access;
pub mod audit;
mod catalog;
mod clock;
mod cluster;
mod damage;
mod datasets;
mod dealing;
pub mod door;
mod duplicates;
mod error;
mod gists;
mod handover;
mod history;
mod inbox;
mod ledger;
mod list;
mod manifest;
pub mod metrics;
mod near;
mod probes;
mod puts;
mod roster;
mod runs;
mod service;
mod shares;
mod site_rules;
mod sites;
mod spool;
mod store;
mod tasks;
mod term;
mod trouble;
mod turns;
mod yields;

// What `make sim` simulates (see tests/sim) is the code of this crate, and that of the worker which decides.
#[cfg(test)]
#[path = "../../tests/sim/mod.rs"]
mod sim;
#[cfg(test)]
#[path = "../../worker/src"]
#[allow(dead_code, reason = "whether there is a way out, and sites that are busy, are not simulated")]
mod worker {
    pub(crate) mod hosts;
    pub(crate) mod pace;
}
#[cfg(test)]
use worker::pace;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use object_store::ObjectStore;
use proto::keda::external_scaler_server::ExternalScalerServer;
use proto::pb;
use proto::pb::dataset_service_server::DatasetServiceServer;
use proto::pb::fetch_service_server::FetchServiceServer;
use proto::pb::run_service_server::RunServiceServer;
use proto::pb::trainer_service_server::TrainerServiceServer;
use proto::trace;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::{InterceptedService, InterceptorLayer};
use tonic::transport::Server;
use tonic_health::server::HealthReporter;
use tower::util::MapResponseLayer;
use tracing::{info, warn};

pub use crate::access::{AUDIENCE, Account, AccountRole, ClientName, NewToken, Protection, Reviewer, Role, may_listen};
use crate::access::{Access, AccessLayer};
use crate::clock::Clock;
use crate::cluster::Guard;
use crate::datasets::Datasets;
use crate::door::Tls;
use crate::error::Error;
use crate::runs::Runs;
use crate::service::dataset::DatasetApi;
use crate::service::fetch::FetchApi;
use crate::service::run::RunApi;
use crate::service::scaler::ScalerApi;
use crate::service::trainer::TrainerApi;
pub use crate::sites::SiteBudgets;
use crate::store::Store;
use crate::tasks::Tasks;
use crate::term::Term;

/// The coordinator's settings.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Seconds after which a worker that has not been heard of loses its shard
    #[arg(long, env = "GLEANER_LEASE_SECONDS", default_value_t = 30.0, value_parser = lease_seconds)]
    pub lease_seconds: f64,
    /// Folder for the temporary files of large lists and datasets [default: the system's]
    #[arg(long, env = "GLEANER_SPOOL_FOLDER")]
    pub spool_folder: Option<PathBuf>,
    /// File that says who may do what, a line each, as `gleaner token new` prints them; read again when it changes
    /// [default: whoever reaches the port may do everything]
    #[arg(long, env = "GLEANER_TOKENS", value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// Which names in a caller's certificate let it call as what: worker=worker.gleaner,trainer=*.trainer.gleaner. `*`
    /// stands for any text; roles are viewer, submitter, worker, trainer, admin
    #[arg(long, value_name = "ROLE=NAME", value_delimiter = ',', requires = "tls_client_ca")]
    pub tls_client_names: Vec<ClientName>,
    /// Which service accounts of Kubernetes may call as what: worker=gleaner/worker,trainer=gleaner/trainer. Their pods
    /// show tokens for the audience `gleaner`, of which the API server is asked whose they are
    #[arg(long, env = "GLEANER_SERVICE_ACCOUNTS", value_name = "ROLE=NAMESPACE/ACCOUNT", value_delimiter = ',')]
    pub service_accounts: Vec<AccountRole>,
    /// Listen where other machines reach it without tokens or without TLS, because the network keeps others out
    #[arg(long, env = "GLEANER_INSECURE", value_parser = clap::builder::FalseyValueParser::new())]
    pub insecure: bool,
    /// Lists may have so many bytes, as they are sent and as they are unpacked, where each line counts 32 more; each is
    /// kept in a temporary file until it is whole, and takes up to three times as many bytes while it is dealt
    #[arg(long, env = "GLEANER_LARGEST_LIST", value_name = "BYTES", default_value_t = 64 << 30)]
    pub largest_list: u64,
    /// What may be asked of one site
    #[command(flatten)]
    pub sites: SiteBudgets,
}

fn lease_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.5..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be a number of seconds, 0.5 to 3600".to_owned()),
    }
}

/// The largest message that is received. Lists come in pieces, so it is far more than is needed.
const LARGEST_MESSAGE: usize = 16 << 20;

/// Calls that one connection may have open at once; a client with more waits with the rest.
const MOST_STREAMS: u32 = 256;

/// The largest head of a call.
const LARGEST_HEAD: u32 = 16 << 10;

/// How long open calls may go on once the end was asked for.
const DRAIN: Duration = Duration::from_secs(3);

/// How often the store is asked whether a higher term has begun: so many times in a lease, and never less often than
/// the other.
const TERM_CHECKS: u32 = 4;
const TERM_CHECK_PERIOD: Duration = Duration::from_secs(30);

/// How often it is looked whether the store still answers, and for how long it may be silent at least.
const READINESS_PERIOD: Duration = Duration::from_millis(500);
const SHORTEST_SILENCE: Duration = Duration::from_secs(2);

/// How a coordinator is reached, and who is asked about those who reach it.
pub struct Doorway {
    /// Bound.
    pub listener: TcpListener,
    /// None: connections are plain.
    pub tls: Option<Tls>,
    /// Needed where there are service accounts.
    pub reviewer: Option<Arc<dyn Reviewer>>,
}

impl Doorway {
    /// Plain, for callers of tokens alone.
    pub fn plain(listener: TcpListener) -> Self {
        Self { listener, tls: None, reviewer: None }
    }
}

/// Serves at `doorway` until `shutdown`; `store` is the cluster's, already prefixed. The gRPC health service answers
/// SERVING once everything is recovered, and as long as the store answers.
///
/// # Errors
/// If the store lacks put-if-absent or cannot be read, if the port cannot be served, if a later coordinator has begun
/// its term, or if a task of this one has ended that it cannot do without: it must then end.
pub async fn run(
    config: Config,
    store: Arc<dyn ObjectStore>,
    Doorway { listener, tls, reviewer }: Doorway,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let has_accounts = !config.service_accounts.is_empty();
    let protection = Protection {
        tokens: config.tokens.is_some() || !config.tls_client_names.is_empty() || has_accounts,
        tls: tls.as_ref().is_some_and(|tls| tls.required),
    };
    may_listen(listener.local_addr()?.ip(), protection, config.insecure).map_err(anyhow::Error::msg)?;
    let accounts = (config.service_accounts, reviewer);
    let access = Access::open(config.tokens.as_deref(), config.tls_client_names, accounts)?;
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_not_serving::<DatasetServiceServer<DatasetApi>>().await;
    let store = Store::new(store);
    store.check().await?;
    let cluster = cluster::identify(&store).await.context("failed to read which cluster this is")?;
    let term = Arc::new(Term::begin(&store, Clock::machine()).await.context("failed to begin a term")?);
    let lease = Duration::from_secs_f64(config.lease_seconds);
    let before = handover::read(&store, term.number()).await.context("failed to read what is known of sites")?;
    let (term_of, sites, lists) = (Arc::clone(&term), config.sites.into(), (config.spool_folder, config.largest_list));
    let datasets = Datasets::new(store.clone(), term_of, lease, lists, sites, &before);
    datasets.recover().await.context("failed to recover the datasets")?;
    let recovered = Runs::recover(store.clone(), Arc::clone(&term), Arc::clone(&datasets)).await;
    let (runs, drive) = recovered.context("failed to recover the runs")?;
    // That may have taken long: who begins to serve knows that no later one has begun, and that the store answers.
    term.check(&store).await?;
    info!(term = term.number(), cluster = &*cluster, store = store.name(), "coordinator begins its term");

    // Whatever way `run` ends, its tasks end with it.
    let mut tasks = Tasks::default();
    tasks.spawn("ends leases", Arc::clone(&datasets).watch_leases());
    tasks.spawn("drives the runs", drive);
    let known = Arc::clone(&datasets);
    tasks.spawn("keeps what is known of sites", handover::keep(store.clone(), move || known.handover(false)));
    tasks.spawn("counts for the metrics", Arc::clone(&runs).watch_figures());
    if has_accounts {
        tasks.spawn("asks about service accounts", Arc::clone(&access).follow_accounts());
    }
    if let Some(file) = config.tokens {
        tasks.spawn("reads the tokens", Arc::clone(&access).follow(file));
    }

    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let router = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .max_concurrent_streams(MOST_STREAMS)
        .http2_max_header_list_size(LARGEST_HEAD)
        .trace_fn(trace::served)
        .layer(MapResponseLayer::new(trace::answered))
        .layer(InterceptorLayer::new(door::interceptor(tls.as_ref())))
        .layer(AccessLayer(access))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(
            DatasetServiceServer::new(DatasetApi(Arc::clone(&datasets), Arc::clone(&runs)))
                .max_decoding_message_size(LARGEST_MESSAGE),
        )
        .add_service(InterceptedService::new(
            FetchServiceServer::new(FetchApi(Arc::clone(&datasets))).max_decoding_message_size(LARGEST_MESSAGE),
            Guard(Arc::clone(&cluster)),
        ))
        .add_service(RunServiceServer::new(RunApi(Arc::clone(&runs))).max_decoding_message_size(LARGEST_MESSAGE))
        .add_service(ExternalScalerServer::new(ScalerApi(Arc::clone(&runs))))
        .add_service(InterceptedService::new(
            TrainerServiceServer::new(TrainerApi::new(runs)).max_decoding_message_size(LARGEST_MESSAGE),
            Guard(Arc::clone(&cluster)),
        ));

    let stop = CancellationToken::new();
    let serve = router.serve_with_incoming_shutdown(door::open(listener, tls), stop.clone().cancelled_owned());
    tokio::pin!(serve);
    let failed = tokio::select! {
        // What ends the term may end a task: the term's reason comes first.
        biased;
        reason = until_over(&term, &cluster, &store, &datasets, lease) => Some(anyhow::Error::msg(reason)),
        ended = tasks.ended() => Some(ended),
        never = tell_readiness(&health, &term, lease) => match never {},
        served = &mut serve => {
            metrics::set_ready(false);
            served.context("failed to serve")?;
            anyhow::bail!("failed to serve: no more connections are accepted");
        }
        () = shutdown.cancelled() => None,
    };
    health.set_not_serving::<DatasetServiceServer<DatasetApi>>().await;
    metrics::set_ready(false);
    stop.cancel();
    // Watchers and long polls do not end by themselves.
    let served = tokio::time::timeout(DRAIN, serve).await.is_ok();
    if let Some(failed) = failed {
        return Err(failed);
    }
    drop(tasks);
    let _ = tokio::time::timeout(DRAIN, handover::write(&store, &datasets.handover(served))).await;
    Ok(())
}

/// Between two questions to the store whether a higher term has begun.
fn term_check_period(lease: Duration) -> Duration {
    (lease / TERM_CHECKS).min(TERM_CHECK_PERIOD)
}

/// Says that requests are served as long as the store answers: without it nothing can be committed, and a later
/// coordinator may have begun unseen.
async fn tell_readiness(health: &HealthReporter, term: &Term, lease: Duration) -> Infallible {
    // The good answer, and two more that did not come.
    let longest = (term_check_period(lease) * 3).max(SHORTEST_SILENCE);
    let mut told = None;
    loop {
        let silent = term.unchecked();
        let ready = silent < longest;
        if told.replace(ready) != Some(ready) {
            metrics::set_ready(ready);
            match ready {
                true => health.set_serving::<DatasetServiceServer<DatasetApi>>().await,
                false => {
                    warn!(?silent, "the store does not answer: not ready until it does");
                    health.set_not_serving::<DatasetServiceServer<DatasetApi>>().await;
                }
            }
        }
        tokio::time::sleep(READINESS_PERIOD).await;
    }
}

/// Returns when the term is over, with the reason. Looks into what callers say of it.
async fn until_over(term: &Term, cluster: &str, store: &Store, datasets: &Datasets, lease: Duration) -> String {
    let period = term_check_period(lease);
    loop {
        tokio::select! {
            reason = term.ended() => return reason,
            heard = term.heard_higher() => match term.rise_above(heard, store).await {
                Ok(number) => {
                    datasets.rise(number);
                    term.rise(number);
                    warn!(heard, term = number, "the store lacks a term that has been: it was restored; going on above it");
                }
                Err(Error::Fenced { .. }) => {}
                Err(error) => {
                    warn!(%error, heard, "cannot read whether a higher term has begun");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            },
            () = tokio::time::sleep(period) => {
                match term.check(store).await {
                    // What was read ends it, and is told as its reason.
                    Ok(()) | Err(Error::Fenced { .. }) => {}
                    Err(error) => warn!(%error, "cannot read whether a higher term has begun"),
                }
                if let Ok(false) = cluster::is_at(store, cluster).await {
                    term.end(format!("the store is no longer that of cluster {cluster}: it has been replaced"));
                }
            }
        }
    }
}

/// Reads a list as an upload is read, and checks what lists promise. `format` is a number of `ListFormat`.
#[cfg(fuzzing)]
pub fn fuzz_list(format: u8, list: &[u8]) {
    let format = pb::ListFormat::try_from(i32::from(format)).unwrap_or_default();
    let options = list::ListOptions { format, ..list::ListOptions::default() };
    // A few bytes can stand for gigabytes; memory, not time, is what the reader bounds.
    let mut lines = 0;
    let _ = list::read("list", list, &options, &mut |_, line| {
        if let list::Line::Entry(list::Entry { synset, url, .. }) = line {
            assert!(!synset.contains(['\n', '\r', '\t']), "{synset:?}");
            assert!(!url.is_empty() && !url.contains(['\n', '\r']), "{url:?}");
        }
        lines += 1;
        if lines > 10_000 { Err(error::Error::Aborted("enough".to_owned())) } else { Ok(()) }
    });
}

/// Reads what decides who may come in: a file of tokens, the names of callers, a certificate, a method.
#[cfg(fuzzing)]
pub fn fuzz_door(what: u8, bytes: &[u8]) {
    let text = std::str::from_utf8(bytes);
    match (what % 4, text) {
        (0, Ok(text)) => access::fuzz_tokens(text),
        (1, Ok(text)) => drop(text.parse::<ClientName>()),
        (2, _) => door::fuzz_certificate(bytes),
        (_, Ok(method)) => access::fuzz_method(method),
        _ => {}
    }
}
