//! Fetch workers: leased slices of URLs become validated, resized, committed shards.
//!
//! A worker holds no state but its leases. The modules, in the order in which a URL meets them:
//!
//! - `lease`: calls to the coordinator, and the lease that is renewed while its shard is made; `progress` is what goes
//!   up with it and comes down.
//! - `attempt`: one attempt at a shard, from its slice in the store to the index that commits it.
//! - `dispatch`, `hosts`: which URL is fetched next; each waits until its host has room.
//! - `fetch`: a URL to its body under limits; a file each for the HTTP client, redirects, retries, the memory of
//!   bodies, compressed bodies, texts, name look-ups and permitted addresses; and for files that are there already.
//! - `opt_out`: what owners say against the use of their pictures, in files of their sites and in headers.
//! - `decode_pool`, `decode_memory`, `validate`, `format`, `placeholder`: a body to a stored picture or a rejection, on
//!   threads of their own; `thumbnail`: a few of the rejected ones, to be looked at.
//! - `pixels`: JPEG, scaling to the stored size, measuring. `prepare` does the same for pictures that a trained network
//!   is to see.
//! - `way_out`: whether the worker reaches the web at all, or takes its own trouble for the world's.
//! - `upload`, `store`: tars that are uploaded while they grow, and the index, put last and only if there is none;
//!   operations on the store are tried again, with `backoff`.
//! - `web`: how a worker appears to the web; `metrics`: what it tells of itself.
//!
//! Whatever a URL does is an outcome in the shard; only the store's failures, unreadable slices and the lack of a way
//! out fail an attempt, and `failure` says whose fault that is.

mod attempt;
mod backoff;
mod decode_memory;
mod decode_pool;
mod dispatch;
mod failure;
mod fetch;
mod format;
mod hosts;
mod lease;
mod mend;
pub mod metrics;
mod opt_out;
mod pace;
mod placeholder;
mod prepare;
mod progress;
mod store;
mod thumbnail;
mod upload;
mod validate;
mod verify;
mod way_out;
mod web;

use std::collections::HashMap;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow};
use backon::BackoffBuilder;
pub use ipnet::IpNet;
use object_store::ObjectStore;
use proto::dial::Dial;
use proto::pb::{self, FailureKind, Lease};
use proto::site::Sites;
use proto::{DatasetId, DatasetSpec, trace};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::field::Empty;
use tracing::{Instrument, Span};

use attempt::{Assignment, AttemptResult, Signals, Tools, make_shard};
use backoff::backoff;
use decode_pool::DecodePool;
use dispatch::Dispatcher;
use failure::FaultOf;
pub use fetch::NameServer;
use fetch::{AddressRules, FetchConfig, Fetcher, Roots};
use lease::{Coordinator, LeaseId};
pub use placeholder::PLACEHOLDERS_KEY;
pub use prepare::{Pixels, Preparer};
use progress::Progress;
pub use store::with_retries;
use way_out::WayOut;
pub use web::{Certificates, Proxy, WebArgs};

/// Shards that wait for their last URLs while the next shard is fetched; each holds parts of its tars in memory.
const DRAINING_SHARDS: usize = 4;
/// Shards of large sites that are made at once at the most: each waits for its site's pace.
const LARGE_SITE_SHARDS: usize = 4;
/// At the end of the process a lease may have been granted in a response that is still on its way.
const LAST_LEASE_TIMEOUT: Duration = Duration::from_millis(250);
/// For attempts to commit what they have at the end of the process.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(50);
/// After this many failed attempts in a row the pause before the next lease grows no more.
const MAX_COUNTED_FAILURES: u32 = 5;

/// What a worker is told when it starts.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// URLs in flight at once.
    #[arg(long, env = "GLEANER_CONNECTIONS", default_value = "64", value_name = "N")]
    pub connections: NonZero<u16>,

    /// Shards that are made at once; the last slow URLs of finished ones do not count.
    #[arg(long, env = "GLEANER_SHARDS", default_value = "1", value_name = "N")]
    pub shards: NonZero<u16>,

    /// Threads that decode, resize and encode [default: one per core].
    #[arg(long, env = "GLEANER_DECODE_THREADS", value_name = "N")]
    pub decode_threads: Option<NonZero<u16>>,

    /// Memory for pictures that are being decoded, on all threads together, in MiB; one that needs more than three
    /// quarters of it is rejected as too_many_pixels.
    #[arg(long, env = "GLEANER_DECODE_MEMORY", default_value = "2048", value_name = "MIB")]
    pub decode_memory: NonZero<u32>,

    /// Memory for large bodies that are being fetched, in MiB; 256 KiB of each body are free.
    #[arg(long, env = "GLEANER_BODY_MEMORY", default_value = "24", value_name = "MIB")]
    pub body_memory: NonZero<u32>,

    /// Also reach the addresses of this net (CIDR), such as 127.0.0.0/8; may be repeated. Private, loopback, link-local
    /// and other special addresses are not reached otherwise.
    #[arg(long, env = "GLEANER_ALLOW_NET", value_delimiter = ',', value_name = "CIDR")]
    pub allow_net: Vec<IpNet>,

    /// Ask this name server (IP or IP:PORT) instead of those in the system's resolv.conf; may be repeated.
    #[arg(long, env = "GLEANER_DNS", value_delimiter = ',', value_name = "ADDRESS")]
    pub dns: Vec<NameServer>,

    /// How it appears to the web.
    #[command(flatten)]
    pub web: WebArgs,

    /// Ask this URL whether there is a way out to the web when many hosts in a row seem dead: it must give a picture,
    /// or the status 204. May be repeated. Sites that lately gave pictures to other workers are asked in any case.
    #[arg(long, env = "GLEANER_PROBE", value_delimiter = ',', value_name = "URL", value_parser = parse_probe)]
    pub probe: Vec<String>,

    /// Also read datasets' files below this folder, for whoever may create datasets; may be repeated. Links are not
    /// followed.
    #[arg(long, env = "GLEANER_IMPORT_ROOT", value_delimiter = ',', value_name = "FOLDER")]
    pub import_root: Vec<PathBuf>,
}

fn parse_probe(text: &str) -> Result<String, String> {
    fetch::Request::new(text).map(|_| text.to_owned()).map_err(|_| "http://... or https://... is wanted".to_owned())
}

/// Makes shards until `shutdown`, under a `name` that no other worker has; then commits what it has, and ends within a
/// minute.
///
/// The process must have a default TLS provider (`rustls::crypto::CryptoProvider`).
///
/// # Errors
/// If the configuration cannot work, or if a task that all shards need has ended. A coordinator or store that is away
/// is waited for.
pub async fn run(
    name: String,
    config: Config,
    dial: Dial,
    store: Arc<dyn ObjectStore>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let way_out = Arc::new(WayOut::new(config.probe.clone()));
    let coordinator = Coordinator::new(dial, name.clone(), Arc::clone(&store), Arc::clone(&way_out));
    let coordinator = Arc::new(coordinator);
    let tools = Arc::new(tools(&config, store, name.clone(), way_out)?);
    let cores = decode_threads(&config);
    tracing::info!(worker = name, connections = config.connections, decode_threads = cores, "worker started");

    let mut background = JoinSet::new();
    let (dispatcher, sharing, asked) =
        (Arc::clone(&tools.dispatcher), Arc::clone(&tools.dispatcher), Arc::clone(&coordinator));
    let (telling, told) = (Arc::clone(&tools.dispatcher), Arc::clone(&coordinator));
    background.spawn(async move {
        dispatcher.dispatch().await;
        anyhow!("URLs are no longer dispatched")
    });
    background.spawn(async move {
        sharing.keep_shares(asked).await;
        anyhow!("parts of sites' budgets are no longer kept")
    });
    background.spawn(async move {
        telling.keep_rules(told).await;
        anyhow!("what sites allow is no longer told")
    });
    background.spawn(tools.pool.clone().watch());
    let watching = Arc::clone(&tools.dispatcher);
    background.spawn(async move {
        watching.watch_way_out().await;
        anyhow!("the way out is no longer watched")
    });
    let maker = ShardMaker { tools, coordinator, shutdown, failures: Arc::default(), attempts: TaskTracker::new() };
    supervise(background, maker.make_shards(config.shards.get().into())).await
}

/// Does the work, unless one of the background tasks, which have no end, ends first.
async fn supervise(mut background: JoinSet<anyhow::Error>, work: impl Future<Output = ()>) -> anyhow::Result<()> {
    tokio::select! {
        () = work => Ok(()),
        Some(ended) = background.join_next() => {
            let error = ended.unwrap_or_else(|panic| anyhow!(panic));
            Err(error.context("a task that the worker cannot do without has ended"))
        }
    }
}

/// Leases shards and makes them, until `shutdown`.
struct ShardMaker {
    tools: Arc<Tools>,
    coordinator: Arc<Coordinator>,
    shutdown: CancellationToken,
    /// Attempts in a row that have failed.
    failures: Arc<AtomicU32>,
    attempts: TaskTracker,
}

impl ShardMaker {
    /// Makes up to `shards` of many sites at once, and beside them those of large sites: what waits for one site must
    /// not hold up the others.
    async fn make_shards(&self, shards: usize) {
        tokio::join!(self.make(false, shards, shards + DRAINING_SHARDS), self.make(true, 1, LARGE_SITE_SHARDS));
        self.attempts.close();
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.attempts.wait()).await.is_err() {
            tracing::warn!("attempts did not end in time; their leases end by themselves");
        }
        // Others need not wait until this worker's parts have ended by themselves.
        self.tools.dispatcher.all_given_back().await;
    }

    /// Leases one shard after the other, each when less than `starting` have URLs left to be started, and less than
    /// `open` are not committed.
    async fn make(&self, large: bool, starting: usize, open: usize) {
        let (starting, open) = (Arc::new(Semaphore::new(starting)), Arc::new(Semaphore::new(open)));
        let permits =
            async || tokio::try_join!(Arc::clone(&starting).acquire_owned(), Arc::clone(&open).acquire_owned());
        while let Some(Ok((start_permit, open))) = self.shutdown.run_until_cancelled(permits()).await {
            let Some(lease) = self.lease(large).await else { return };
            let span = span(&lease);
            let (tools, coordinator) = (Arc::clone(&self.tools), Arc::clone(&self.coordinator));
            let (failures, shutdown) = (Arc::clone(&self.failures), self.shutdown.clone());
            let attempt = async move {
                let _open = open;
                if attempt_shard(&tools, &coordinator, &lease, large, start_permit, &shutdown).await {
                    failures.store(0, Ordering::Relaxed);
                } else {
                    failures.fetch_add(1, Ordering::Relaxed);
                }
            };
            self.attempts.spawn(attempt.instrument(span));
        }
    }

    /// The next lease; None: the worker is to end.
    async fn lease(&self, large: bool) -> Option<Lease> {
        let mut asking = std::pin::pin!(next_lease(&self.coordinator, &self.tools.way_out, &self.failures, large));
        let lease = self.shutdown.run_until_cancelled(&mut asking).await;
        if lease.is_none()
            && let Ok(lease) = tokio::time::timeout(LAST_LEASE_TIMEOUT, asking).await
        {
            self.coordinator.release(&LeaseId::from(&lease), None).await;
        }
        lease
    }
}

fn decode_threads(config: &Config) -> usize {
    config
        .decode_threads
        .map(|n| usize::from(n.get()))
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZero::get))
}

fn tools(config: &Config, store: Arc<dyn ObjectStore>, worker: String, way_out: Arc<WayOut>) -> anyhow::Result<Tools> {
    let fetcher = Fetcher::new(FetchConfig {
        rules: AddressRules { allowed: config.allow_net.clone() },
        roots: Roots::new(&config.import_root)?.and_in(Arc::clone(&store)),
        name_servers: config.dns.clone(),
        user_agent: config.web.user_agent(),
        agent: config.web.agent(),
        proxy: config.web.proxy.clone(),
        any_certificate: config.web.tls == Certificates::Any,
        authorities: config.web.authorities()?,
        body_budget: config.body_memory.get() as usize * (1 << 20),
    })
    .context("failed to set up the HTTP client")?;
    Ok(Tools {
        store,
        dispatcher: Arc::new(Dispatcher::new(fetcher, config.connections.get(), Arc::clone(&way_out))),
        way_out,
        pool: DecodePool::start(decode_threads(config), u64::from(config.decode_memory.get()) << 20)?,
        worker,
    })
}

/// Of the work on a leased shard, within the one that opened the shard's round.
fn span(lease: &Lease) -> Span {
    let span = tracing::info_span!(
        "shard",
        dataset = lease.dataset,
        shard = trace::integer(lease.shard),
        attempt = lease.attempt,
        urls = Empty,
        kept = Empty,
        end = Empty,
        otel.status_description = Empty,
        trace_id = Empty
    );
    trace::continued(span, &lease.traceparent)
}

/// Waits for the next lease, however long that takes; longer after failed attempts, and as long as there is no way out.
async fn next_lease(coordinator: &Coordinator, way_out: &WayOut, failures: &AtomicU32, large: bool) -> Lease {
    way_out.online().await;
    let failed = failures.load(Ordering::Relaxed).min(MAX_COUNTED_FAILURES);
    if failed > 0 {
        tokio::time::sleep(Duration::from_millis(500) * 2u32.pow(failed)).await;
    }
    let policy = backoff(Duration::from_millis(200), Duration::from_secs(5));
    let mut retries = policy.build();
    let mut logged = None;
    loop {
        match coordinator.lease(large).await {
            Ok(Some(lease)) => return lease,
            Ok(None) => {
                (retries, logged) = (policy.build(), None);
                // A coordinator that responds at once must not be asked in a loop.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(status) => {
                // It may be away for long, so each kind of failure is logged once.
                if logged.replace(status.code()) != Some(status.code()) {
                    tracing::warn!(%status, "no lease from the coordinator; trying again");
                }
                tokio::time::sleep(retries.next().unwrap_or_default()).await;
            }
        }
    }
}

/// Makes the leased shard and reports the result to the coordinator. Returns false if the attempt failed.
async fn attempt_shard(
    tools: &Arc<Tools>,
    coordinator: &Coordinator,
    lease: &Lease,
    large: bool,
    start_permit: OwnedSemaphorePermit,
    shutdown: &CancellationToken,
) -> bool {
    let id = LeaseId::from(lease);
    if let Some(budgets) = &lease.budgets {
        tools.dispatcher.know(Sites::from(budgets.clone()));
    }
    let progress = Progress::default();
    progress.set_wanted(lease.wanted.clone(), &HashMap::new());
    let signals = Signals { cancel: CancellationToken::new(), leave: shutdown.child_token() };
    let made = async {
        let assignment = assignment(lease, large).fault_of(FailureKind::Worker)?;
        make_shard(tools, &assignment, &progress, start_permit, &signals).await
    };
    let duration = Duration::from_millis(lease.duration_millis);
    let renewals = coordinator.renew_until_over(&id, duration, &progress, &signals.cancel, &signals.leave);
    let made = tokio::select! {
        made = made => made,
        // When the lease is over the attempt still has its files to delete.
        made = async { renewals.await; std::future::pending().await } => made,
    };
    let span = Span::current();
    let ended = |how| {
        metrics::attempt(how);
        span.record("end", how);
    };
    match made {
        Ok(AttemptResult::Committed) => {
            ended("won");
            coordinator.complete(&id, shutdown).await;
        }
        Ok(AttemptResult::LostTo(attempt)) => {
            ended("lost");
            tracing::info!(committed = %attempt, "another attempt committed first");
            coordinator.complete(&id, shutdown).await;
        }
        Ok(AttemptResult::Cancelled) => ended("cancelled"),
        Ok(AttemptResult::Left) => {
            ended("left");
            coordinator.release(&id, None).await;
        }
        Err(failure) => {
            let failure = pb::Failure::from(&failure);
            let (kind, error) = (failure.kind().as_str_name(), &failure.text);
            tracing::error!(kind, error, "the attempt failed");
            ended("failed");
            trace::failed(&span, error);
            coordinator.release(&id, Some(failure)).await;
            return false;
        }
    }
    true
}

fn assignment(lease: &Lease, large: bool) -> anyhow::Result<Assignment> {
    Ok(Assignment {
        shard: lease.dataset.parse::<DatasetId>().context("the lease's dataset")?.shard(lease.shard),
        attempt: lease.attempt.parse().context("the lease's attempt")?,
        spec: DatasetSpec::from_json(&lease.spec_json).context("the lease's dataset spec")?,
        once: lease.once,
        large,
    })
}

/// Reads the columns of a Parquet file as an import from the web does: its end, and what a row group has of the column.
#[cfg(fuzzing)]
pub fn fuzz_parquet(bytes: &[u8]) {
    fetch::fuzz_sparse(bytes);
}

/// Validates a body as any other, under limits that let small ones through; `choice` chooses how it is stored.
#[cfg(fuzzing)]
pub fn fuzz_image(choice: u8, bytes: &[u8]) {
    thread_local! {
        static VALIDATOR: std::cell::RefCell<Option<validate::Validator>> = const { std::cell::RefCell::new(None) };
    }
    use proto::{ImageFormat, Limits, Resize, ResizeMode};
    let limits = Limits { min_bytes: 0, min_side: 1, max_pixels: 1 << 20, ..Limits::default() };
    let mode = [ResizeMode::Cover, ResizeMode::Fit, ResizeMode::Pad, ResizeMode::KeepRatio, ResizeMode::None];
    let format = [ImageFormat::Jpg, ImageFormat::Png];
    let resize = Resize {
        size: 64,
        mode: mode[usize::from(choice) % mode.len()],
        format: format[usize::from(choice) / mode.len() % format.len()],
        ..Resize::default()
    };
    let rules = validate::Rules {
        resize,
        limits,
        placeholders: placeholder::Placeholders::default(),
        verify: None,
        flat: false,
        thumbnails: thumbnail::Thumbnails::none(),
    };
    VALIDATOR.with_borrow_mut(|validator| {
        if validator.is_none() {
            *validator = validate::Validator::new().ok();
        }
        if let Some(validator) = validator {
            let validation = validator.validate(bytes, &rules);
            if let Ok(stored) = validation.outcome {
                assert!(!stored.image.is_empty() && validation.size.is_some());
            }
        }
    });
}

#[cfg(test)]
mod tests;
