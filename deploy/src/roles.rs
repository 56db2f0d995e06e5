//! The roles as processes: each gets its store, its socket and its shutdown, and nothing else.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use coordinator::Doorway;
use proto::session::Session;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::dial::DialArgs;
use crate::kubernetes::KubernetesArgs;
#[cfg(feature = "trainer")]
use crate::kubernetes::PodArgs;
#[cfg(feature = "trainer")]
use crate::metered;
use crate::metrics::{self, MetricsArgs, Role};
use crate::process::{self, ShutdownArgs};
use crate::store::{self, StoreArgs};
#[cfg(feature = "trainer")]
use crate::telemetry::{Spans, TelemetryArgs};
use crate::tls::ServerTlsArgs;

/// A role that does not end within this time after it was told to is left behind; a trainer, after its ranks had
/// theirs.
const GRACE: Duration = Duration::from_secs(25);
/// A worker commits what it has fetched.
const WORKER_GRACE: Duration = Duration::from_secs(55);

/// Where the coordinator listens unless told otherwise.
pub(crate) const DEFAULT_LISTEN: &str = "127.0.0.1:7070";

/// Arguments of `gleaner coordinator`.
#[derive(Debug, clap::Args)]
pub(crate) struct CoordinatorArgs {
    /// Address and port to listen at
    #[arg(long, env = "GLEANER_LISTEN", default_value = DEFAULT_LISTEN)]
    listen: SocketAddr,
    #[command(flatten)]
    tls: ServerTlsArgs,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    end: ShutdownArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    config: coordinator::Config,
    #[command(flatten)]
    kubernetes: KubernetesArgs,
}

/// Arguments of `gleaner worker`.
#[derive(Debug, clap::Args)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    dial: DialArgs,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    end: ShutdownArgs,
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
    dial: DialArgs,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    end: ShutdownArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    config: trainer::Config,
    #[command(flatten)]
    pod: PodArgs,
}

/// Arguments of `gleaner rank`.
#[cfg(feature = "trainer")]
#[derive(Debug, clap::Args)]
pub(crate) struct RankArgs {
    #[command(flatten)]
    store: StoreArgs,
}

/// Runs the coordinator until shutdown.
pub(crate) async fn coordinator(args: CoordinatorArgs) -> Result<()> {
    let tls = args.tls.open()?;
    let has_accounts = !args.config.service_accounts.is_empty();
    let reviewer = has_accounts.then(|| args.kubernetes.reviewer()).transpose()?;
    let store = store::open_metered(&args.store.store)?;
    let role =
        Role { name: "coordinator", register: coordinator::metrics::register, ready: coordinator::metrics::ready };
    metrics::serve(&args.metrics, role).await?;
    let listener = process::bind(args.listen, "--listen").await?;
    info!(address = %listener.local_addr()?, store = args.store.store, "coordinator listens");
    let doorway = Doorway { listener, tls, reviewer };
    until_shutdown(args.end, GRACE, |shutdown| coordinator::run(args.config, store, doorway, shutdown)).await
}

/// Runs a fetch worker until shutdown.
pub(crate) async fn worker(args: WorkerArgs) -> Result<()> {
    let (session, name) = own_session();
    let dial = args.dial.dial_as_told(&session)?;
    let store = store::open_metered(&args.store.store)?;
    let role = Role { name: "worker", register: worker::metrics::register, ready: worker::metrics::ready };
    metrics::serve(&args.metrics, role).await?;
    until_shutdown(args.end, WORKER_GRACE, |shutdown| worker::run(name, args.config, dial, store, shutdown)).await
}

/// Runs a trainer agent until shutdown.
#[cfg(feature = "trainer")]
pub(crate) async fn trainer(args: TrainerArgs, telemetry: &TelemetryArgs) -> Result<()> {
    let (session, name) = own_session();
    let dial = args.dial.dial_as_told(&session)?;
    let store = store::open_metered(&args.store.store)?;
    let role = Role { name: "trainer", register: trainer::metrics::register, ready: trainer::metrics::ready };
    metrics::serve(&args.metrics, role).await?;
    let mut rank_command = vec![std::env::current_exe()?.into_os_string()];
    rank_command.extend(["rank", "--store", &args.store.store].map(Into::into));
    rank_command.extend(telemetry.for_child().into_iter().map(Into::into));
    let grace = GRACE + Duration::from_secs(args.config.leave_seconds.into());
    let agent = |shutdown| trainer::run(name, args.config, dial, store, rank_command, metered::add, shutdown);
    let tell = args.pod.tell(trainer::metrics::ranks)?;
    tokio::select! {
        result = until_shutdown(args.end, grace, agent) => result,
        () = tell => bail!("nobody tells Kubernetes of this pod any more"),
    }
}

/// Runs one rank until its agent ends it.
#[cfg(feature = "trainer")]
pub(crate) async fn rank(args: RankArgs, spans: Spans) -> Result<()> {
    let store = store::open_metered(&args.store.store)?;
    trainer::run_rank(store, metered::take, move || spans.flush()).await
}

/// The session of this process, and what the cluster calls it: by its host, which is a pod's own name, and by the
/// session.
fn own_session() -> (Session, String) {
    let session = Session::new(uuid::Uuid::new_v4().simple().to_string());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = session.name(host.trim());
    (session, name)
}

/// Runs a role and tells it to end on SIGTERM, Ctrl-C, or the end of standard input.
async fn until_shutdown<F: Future<Output = Result<()>>>(
    end: ShutdownArgs,
    grace: Duration,
    role: impl FnOnce(CancellationToken) -> F,
) -> Result<()> {
    let shutdown = process::shutdown_signal(end.exit_with_stdin)?;
    let late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        result = role(shutdown.clone()) => result,
        () = late => bail!("did not end within {} s", grace.as_secs()),
    }
}
