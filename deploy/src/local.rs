//! `gleaner local`: a whole cluster as one process tree. Coordinator, workers and trainer agent are child processes of
//! the same binary, so that each can be killed, and they talk over loopback as they would between machines. A child
//! that dies is started again; a child whose supervisor is gone ends by itself, because its standard input closes.

use std::fs::{File, TryLockError};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use coordinator::{Protection, may_listen};
use proto::dial::Dial;
use proto::pb::GetStatusRequest;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use worker::IpNet;

use crate::client::{Cluster, answer};
use crate::credentials::{self, LocalToken};
use crate::dial::contexts::Contexts;
use crate::exit::{Ended, Exit};
use crate::output::note;
use crate::process::{self, ShutdownArgs};
use crate::roles::DEFAULT_LISTEN;
use crate::telemetry::{LogFormat, TelemetryArgs};
use crate::{store, web};

/// For the coordinator to answer after the start.
const START: Duration = Duration::from_secs(60);
/// For a child to end after it was told to; a trainer, after its ranks had their time.
const STOP: Duration = Duration::from_secs(60);
/// A child that ran for so long was sound: its next restart is quick again.
const STABLE: Duration = Duration::from_secs(30);
/// The longest pause before a restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// The lock on a folder in which a cluster runs.
const LOCK: &str = "local.lock";

/// Arguments of `gleaner local`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The cluster's object store: a folder, made if missing, or a bucket's URL
    #[arg(long, env = "GLEANER_STORE", default_value = "./gleaner-data")]
    store: String,
    /// Address and port of the coordinator
    #[arg(long, env = "GLEANER_LISTEN", default_value = DEFAULT_LISTEN)]
    listen: SocketAddr,
    /// Let other machines reach the coordinator: whoever does commands the cluster
    #[arg(long, env = "GLEANER_INSECURE", value_parser = clap::builder::FalseyValueParser::new())]
    insecure: bool,
    /// Address and port of the pages for a browser [default: 127.0.0.1:7071, or a free port if that is taken]
    #[arg(long, env = "GLEANER_WEB_LISTEN", value_name = "ADDRESS:PORT")]
    web_listen: Option<SocketAddr>,
    /// Show the pages in this machine's browser, too: the one that BROWSER names, or else the desktop's
    #[arg(long)]
    open: bool,
    /// Fetch workers
    #[arg(long, default_value_t = 1)]
    workers: u32,
    /// Ranks on the CPU, each with a part of the cores; 0: no trainer [default: one on each GPU, or else one on the
    /// CPU]
    #[arg(long)]
    ranks: Option<u32>,
    /// When told to end, ranks have so many seconds to finish their step and to write a checkpoint: on a CPU a step may
    /// take long
    #[arg(long, env = "GLEANER_LEAVE_SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600), value_name = "N")]
    leave_seconds: u32,
    /// Nets (CIDR) that workers may reach although they are private; loopback is always among them here
    #[arg(long, env = "GLEANER_ALLOW_NET", value_name = "CIDR", value_delimiter = ',')]
    allow_net: Vec<IpNet>,
    /// Folders below which datasets may be imported from [default: all, as long as only this user reaches the cluster]
    #[arg(long, env = "GLEANER_IMPORT_ROOT", value_name = "FOLDER", value_delimiter = ',')]
    import_root: Vec<PathBuf>,
    #[command(flatten)]
    end: ShutdownArgs,
}

/// Runs the cluster until shutdown.
pub(crate) async fn run(args: Args, telemetry: TelemetryArgs) -> Result<()> {
    let shutdown = process::shutdown_signal(args.end.exit_with_stdin)?;
    // A store that cannot be opened is one clear error here, and not a child that dies again and again; so is a port in
    // use.
    drop(store::open(&args.store)?);
    let nothing = Protection { tokens: false, tls: false };
    may_listen(args.listen.ip(), nothing, args.insecure).map_err(Ended::usage)?;
    let _lock = lock(&args.store)?;
    let listen = process::bind(args.listen, "--listen").await?.local_addr()?;
    let pages = pages(args.web_listen).await?;
    let pages_at = reachable(pages.local_addr()?);
    let address = format!("http://{}", reachable(listen));
    let token = LocalToken::make(listen)?;
    let token_file = token.as_ref().map(|token| token.file.display().to_string());
    let dial = Dial::new(&address)?;
    let cluster = Cluster::over(&credentials::add(dial, token.as_ref().map(|token| &*token.file), None)?);

    let stop_clients = CancellationToken::new();
    let stop_coordinator = CancellationToken::new();
    let mut coordinator = JoinSet::new();
    let mut clients = JoinSet::new();
    let listen = listen.to_string();
    let child = |name: &str, arguments: &[&str]| Supervised {
        stop: STOP,
        name: name.to_owned(),
        arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        telemetry: telemetry.clone(),
    };
    let store = ["--store", &args.store, "--exit-with-stdin"];
    let shown: Vec<&str> = token_file.iter().flat_map(|file| ["--token-file", file]).collect();
    let to = [&["--coordinator", &address], &shown[..]].concat();
    let holders = token.as_ref().map(|token| token.holders.display().to_string());
    let guard = match &holders {
        Some(holders) => vec!["--tokens", holders],
        None => vec!["--insecure"],
    };
    coordinator.spawn(
        child("coordinator", &[&["coordinator", "--listen", &listen], &store[..], &guard].concat())
            .run(stop_coordinator.clone()),
    );
    let started = tokio::select! {
        started = ready(&cluster) => started,
        () = shutdown.cancelled() => Ok(()),
    };
    if started.is_ok() && !shutdown.is_cancelled() {
        let nets: Vec<String> = args.allow_net.iter().map(IpNet::to_string).collect();
        let nets = [&["127.0.0.0/8".to_owned(), "::1/128".to_owned()], &nets[..]].concat().join(",");
        let roots = import_roots(args.import_root, token.is_some());
        let roots: Vec<&str> = roots.iter().flat_map(|root| ["--import-root", root]).collect();
        for n in 1..=args.workers {
            let arguments = [&["worker"], &store[..], &to[..], &["--allow-net", &nets], &roots].concat();
            clients.spawn(child(&format!("worker-{n}"), &arguments).run(stop_clients.clone()));
        }
        if cfg!(feature = "trainer") && args.ranks != Some(0) {
            let devices = args.ranks.map(|ranks| format!("cpu:{ranks}"));
            let devices: Vec<&str> = devices.iter().flat_map(|devices| ["--devices", devices]).collect();
            let leave = args.leave_seconds.to_string();
            let own = ["--advertise-address", "127.0.0.1", "--leave-seconds", &leave];
            let arguments = [&["trainer"], &store[..], &to[..], &own, &devices].concat();
            let stop = STOP + Duration::from_secs(args.leave_seconds.into());
            clients.spawn(Supervised { stop, ..child("trainer", &arguments) }.run(stop_clients.clone()));
        }
        let (open, until) = (args.open, stop_clients.clone());
        clients.spawn(async move {
            if let Err(error) = web::serve(pages, cluster, open, until).await {
                warn!(%error, "the pages are served no more");
            }
        });
        note(format!("cluster is up at {address}, store {}; Ctrl-C ends it", args.store));
        note(format!("look at it: http://{pages_at}"));
        note("in another terminal:");
        let is_found =
            args.listen.to_string() == DEFAULT_LISTEN && !Contexts::load().is_ok_and(|all| all.has_current());
        let flag = if is_found { String::new() } else { format!(" --coordinator {address}") };
        note(format!("  gleaner dataset create birds --urls birds.txt --wait{flag}"));
        note(format!("  gleaner status{flag}"));
        shutdown.cancelled().await;
    }
    // Workers and agents first: they return their leases and leave their runs.
    stop_clients.cancel();
    clients.join_all().await;
    stop_coordinator.cancel();
    coordinator.join_all().await;
    started
}

/// Whoever shows the token of this cluster is the user who started it, and may read every file that the workers may.
fn import_roots(chosen: Vec<PathBuf>, alone: bool) -> Vec<String> {
    let all = alone.then(|| "/".to_owned());
    let chosen: Vec<String> = chosen.iter().map(|root| root.display().to_string()).collect();
    if chosen.is_empty() { all.into_iter().collect() } else { chosen }
}

/// The listener of the pages: where somebody chose, or else where they usually are, or on a free port.
async fn pages(chosen: Option<SocketAddr>) -> Result<TcpListener> {
    match chosen {
        Some(chosen) => process::bind(chosen, "--web-listen").await,
        None => match TcpListener::bind(web::DEFAULT_LISTEN).await {
            Ok(listener) => Ok(listener),
            Err(_) => process::bind((Ipv4Addr::LOCALHOST, 0).into(), "--web-listen").await,
        },
    }
}

/// Locks a folder, so that no two clusters push each other's coordinator out of office again and again.
fn lock(location: &str) -> Result<Option<File>> {
    let Some(folder) = store::folder(location)? else { return Ok(None) };
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the store's folder {}", folder.display()))?;
    let path = folder.join(LOCK);
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            Err(Ended::error(Exit::Conflict, format!("another `gleaner local` runs in {}", folder.display())))
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// The address by which this machine reaches a listener; one that listens everywhere is reached by loopback.
fn reachable(mut listen: SocketAddr) -> SocketAddr {
    if listen.ip().is_unspecified() {
        let loopback: [std::net::IpAddr; 2] = [[127, 0, 0, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()];
        listen.set_ip(loopback[usize::from(listen.is_ipv6())]);
    }
    listen
}

/// Waits until the coordinator answers.
async fn ready(cluster: &Cluster) -> Result<()> {
    let begun = Instant::now();
    loop {
        match answer(cluster.runs.clone().get_status(GetStatusRequest {})).await {
            Ok(_) => return Ok(()),
            Err(status) => ensure!(
                begun.elapsed() < START,
                "the coordinator does not come up ({}); its own lines above say why",
                status.message()
            ),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A child process that is started again whenever it ends.
struct Supervised {
    name: String,
    /// It has so long to end after it was told to.
    stop: Duration,
    arguments: Vec<String>,
    telemetry: TelemetryArgs,
}

impl Supervised {
    /// Starts it, and again whenever it ends, until `stop`; then ends it.
    async fn run(self, stop: CancellationToken) {
        let mut pause = Duration::from_millis(250);
        loop {
            let begun = Instant::now();
            match self.once(&stop).await {
                Ok(None) => return,
                Ok(Some(status)) => warn!(name = self.name, %status, "child ended; it is started again"),
                Err(error) => warn!(name = self.name, %error, "child cannot be started"),
            }
            pause = if begun.elapsed() > STABLE { Duration::from_millis(250) } else { (pause * 2).min(LONGEST_PAUSE) };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Runs it once; returns how it ended, or nothing if it was told to.
    async fn once(&self, stop: &CancellationToken) -> Result<Option<ExitStatus>> {
        let mut child = self.command()?.spawn()?;
        // Kept apart from the child, because waiting for a child closes its standard input.
        let stdin = child.stdin.take();
        info!(name = self.name, pid = child.id(), "child started");
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(forward(stderr, (self.telemetry.log_format == LogFormat::Text).then(|| self.name.clone())));
        }
        tokio::select! {
            status = child.wait() => Ok(Some(status?)),
            () = stop.cancelled() => {
                drop(stdin);
                self.end(child).await.map(|()| None)
            }
        }
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(&self.arguments);
        command.args(self.telemetry.for_child());
        if self.telemetry.log_format == LogFormat::Json {
            command.args(["--log-format", "json"]);
        }
        // What a user's commands show elsewhere is nothing to this cluster.
        for name in ["GLEANER_TOKENS", "GLEANER_TOKEN_FILE", "GLEANER_CONTEXT"] {
            command.env_remove(name);
        }
        // Its own group: Ctrl-C in the terminal is for the supervisor, which ends its children in order.
        command.process_group(0).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        Ok(command)
    }

    async fn end(&self, mut child: Child) -> Result<()> {
        if tokio::time::timeout(self.stop, child.wait()).await.is_err() {
            warn!(name = self.name, "child does not end; killing it");
            child.kill().await?;
        }
        Ok(())
    }
}

/// Passes a child's lines on, under its name.
async fn forward(stderr: impl tokio::io::AsyncRead + Unpin, name: Option<String>) {
    let mut lines = BufReader::new(stderr).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = String::from_utf8_lossy(&line);
        match &name {
            Some(name) => note(format!("{name:<11} | {line}")),
            None => note(line),
        }
    }
}
