//! What a role's process has exactly one of: its limit of open files, the sockets that it listens at, and the signal to
//! end.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// So many files and connections a process opens at once, if it may: far more than a worker with thousands of
/// connections needs.
const OPEN_FILES: u64 = 65_536;
/// With fewer than these a role may fail in the middle of its work.
const FEW_FILES: u64 = 4_096;
/// Connections that may wait until they are accepted, if the kernel lets so many (`somaxconn`): all workers come back
/// at once to a coordinator that was away, and for each that finds no room a second goes by before it asks again.
const BACKLOG: u32 = 4_096;

/// Lets the process have as many files and connections open at once as it may: systems begin with 1024, whatever is
/// allowed.
pub(crate) fn raise_file_limit() {
    match rlimit::increase_nofile_limit(OPEN_FILES) {
        Ok(limit) if limit < FEW_FILES => warn!(
            limit,
            "few files and connections may be open at once, and requests may fail for want of them; raise the hard limit of open files \
             (ulimit -Hn, LimitNOFILE=) to {FEW_FILES} or more, or choose fewer --connections"
        ),
        Ok(_) => {}
        Err(error) => warn!(%error, "the limit of open files cannot be raised"),
    }
}

/// How a role's process ends.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ShutdownArgs {
    /// End orderly when standard input closes, so that no process outlives its supervisor
    #[arg(long)]
    pub(crate) exit_with_stdin: bool,
}

/// Binds the socket that `flag` names, or says who may be in the way.
pub(crate) async fn bind(address: SocketAddr, flag: &str) -> Result<TcpListener> {
    listen(address).with_context(|| {
        format!("cannot listen at {address}: another program has the port, or the address is not this machine's; choose another with {flag}")
    })
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A port whose last connections have just been closed is free.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Cancelled on SIGTERM, Ctrl-C and, if asked for, the end of standard input.
pub(crate) fn shutdown_signal(with_stdin: bool) -> Result<CancellationToken> {
    let shutdown = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let signalled = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => info!("told to end by SIGTERM"),
            _ = interrupt.recv() => info!("told to end by Ctrl-C; once more ends at once"),
        }
        signalled.cancel();
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

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpStream};
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn hundreds_of_callers_may_come_before_the_first_is_accepted() {
        // No kernel lets more wait than it was told.
        let somaxconn = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
        let callers = somaxconn.trim().parse().unwrap_or(128).min(500);
        for own in [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), SocketAddr::from((Ipv6Addr::LOCALHOST, 0))] {
            let Ok(listener) = bind(own, "--listen").await else {
                assert!(own.is_ipv6(), "{own} is always there");
                continue;
            };
            let address = listener.local_addr().expect("it is bound");
            let start = Instant::now();
            let waiting: Vec<_> = (0..callers).map(|_| TcpStream::connect(address).expect("it listens")).collect();
            assert!(start.elapsed().as_secs() < 5, "{} callers took {:?}", waiting.len(), start.elapsed());
            let taken = bind(address, "--listen").await.expect_err("another socket has it").to_string();
            assert!(taken.contains("--listen"), "{taken}");
        }
    }
}
