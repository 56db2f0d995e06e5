//! The roles as processes: each gets its store, its socket and its shutdown, and nothing else.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::client;
use crate::exit::Ended;
#[cfg(feature = "trainer")]
use crate::metered;
use crate::metrics::{self, MetricsArgs, Told};
use crate::store::{self, StoreArgs};
#[cfg(feature = "trainer")]
use crate::telemetry::{Spans, TelemetryArgs};

/// A role that does not end within this time after it was told to is left behind; a trainer, after its ranks had theirs.
const GRACE: Duration = Duration::from_secs(25);

/// Where the coordinator listens unless told otherwise.
pub(crate) const DEFAULT_LISTEN: &str = "127.0.0.1:7070";

/// How a role's process ends.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct EndArgs {
    /// End orderly when standard input closes, so that no process outlives its supervisor
    #[arg(long)]
    pub(crate) exit_with_stdin: bool,
}

/// Arguments of `gleaner coordinator`.
#[derive(Debug, clap::Args)]
pub(crate) struct CoordinatorArgs {
    /// Address and port to listen at
    #[arg(long, env = "GLEANER_LISTEN", default_value = DEFAULT_LISTEN)]
    listen: SocketAddr,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    end: EndArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    config: coordinator::Config,
}

/// Arguments of `gleaner worker`.
#[derive(Debug, clap::Args)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    end: EndArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    config: worker::Config,
}

/// Arguments of `gleaner trainer`.
#[cfg(feature = "trainer")]
#[derive(Debug, clap::Args)]
pub(crate) struct TrainerArgs {
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    end: EndArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    config: trainer::Config,
}

/// Arguments of `gleaner rank`.
#[cfg(feature = "trainer")]
#[derive(Debug, clap::Args)]
pub(crate) struct RankArgs {
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs the coordinator until it is told to end.
pub(crate) async fn coordinator(args: CoordinatorArgs) -> Result<()> {
    let store = store::open_metered(&args.store.store)?;
    let told =
        Told { role: "coordinator", register: coordinator::metrics::register, ready: coordinator::metrics::ready };
    metrics::serve(&args.metrics, told).await?;
    let listener = bind(args.listen, "--listen").await?;
    info!(address = %listener.local_addr()?, store = args.store.store, "coordinator listens");
    until_told(args.end, GRACE, |shutdown| coordinator::run(args.config, store, listener, shutdown)).await
}

/// Runs a fetch worker until it is told to end.
pub(crate) async fn worker(mut args: WorkerArgs) -> Result<()> {
    args.config.coordinator = client::address(&args.config.coordinator).map_err(Ended::usage)?;
    let store = store::open_metered(&args.store.store)?;
    let told = Told { role: "worker", register: worker::metrics::register, ready: worker::metrics::ready };
    metrics::serve(&args.metrics, told).await?;
    until_told(args.end, GRACE, |shutdown| worker::run(own_name(), args.config, store, shutdown)).await
}

/// Runs a trainer agent until it is told to end.
#[cfg(feature = "trainer")]
pub(crate) async fn trainer(mut args: TrainerArgs, telemetry: &TelemetryArgs) -> Result<()> {
    args.config.coordinator = client::address(&args.config.coordinator).map_err(Ended::usage)?;
    let store = store::open_metered(&args.store.store)?;
    let told = Told { role: "trainer", register: trainer::metrics::register, ready: trainer::metrics::ready };
    metrics::serve(&args.metrics, told).await?;
    let mut rank_command = vec![std::env::current_exe()?.into_os_string()];
    rank_command.extend(["rank", "--store", &args.store.store].map(Into::into));
    rank_command.extend(telemetry.for_child().into_iter().map(Into::into));
    let grace = GRACE + Duration::from_secs(args.config.leave_seconds.into());
    let agent = |shutdown| trainer::run(own_name(), args.config, store, rank_command, metered::add, shutdown);
    until_told(args.end, grace, agent).await
}

/// Runs one rank until its agent ends it.
#[cfg(feature = "trainer")]
pub(crate) async fn rank(args: RankArgs, spans: Spans) -> Result<()> {
    let store = store::open_metered(&args.store.store)?;
    trainer::run_rank(store, metered::take, move || spans.flush()).await
}

/// What the cluster calls this process: by its host, which is a pod's own name, and a word that no other process has.
fn own_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let word = uuid::Uuid::new_v4().simple().to_string();
    format!("{}-{}", host.trim(), &word[..8])
}

/// Binds the socket that `flag` names, or says who may be in the way.
pub(crate) async fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen at {address}: another program has the port, or the address is not this machine's; choose another with {flag}")
    })
}

/// Runs a role and tells it to end on SIGTERM, Ctrl-C, or the end of standard input.
async fn until_told<F: Future<Output = Result<()>>>(
    end: EndArgs,
    grace: Duration,
    role: impl FnOnce(CancellationToken) -> F,
) -> Result<()> {
    let shutdown = told_to_end(end.exit_with_stdin)?;
    let late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        result = role(shutdown.clone()) => result,
        () = late => bail!("did not end within {} s", grace.as_secs()),
    }
}

/// Cancelled on SIGTERM, Ctrl-C and, if asked for, the end of standard input.
pub(crate) fn told_to_end(with_stdin: bool) -> Result<CancellationToken> {
    let shutdown = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let told = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => info!("told to end by SIGTERM"),
            _ = interrupt.recv() => info!("told to end by Ctrl-C; once more ends at once"),
        }
        told.cancel();
        interrupt.recv().await;
        std::process::exit(130);
    });
    if with_stdin {
        let closed = shutdown.clone();
        // A thread of its own: reading standard input cannot be cancelled, and must not hold the runtime.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            closed.cancel();
        });
    }
    Ok(shutdown)
}
