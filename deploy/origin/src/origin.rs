//! A web origin on loopback that serves photos, and serves them as badly as the web does: written on bare sockets,
//! because no HTTP server would send wrong lengths, resets and garbage. What a URL serves is told in [`crate::answer`].

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

pub use crate::answer::Options;
use crate::answer::{AfterBody, Response, Site};
use crate::bodies;

/// A peer that neither reads nor writes for so long is let go.
const IDLE: Duration = Duration::from_secs(30);
/// Silent and dripping answers last so long: longer than any client's patience.
const STALL: Duration = Duration::from_secs(120);
const DRIP: Duration = Duration::from_millis(500);
const ENDLESS_BYTES: usize = 300_000_000;
const MAX_HEAD: usize = 16 << 10;

/// A running origin; it ends, with all its connections, when it is dropped.
pub struct Origin {
    shared: Arc<Shared>,
    refused: SocketAddr,
    /// Bound, but never listening: the system refuses connections, and gives the port to nobody else.
    _refusing: TcpSocket,
    _listeners: JoinSet<()>,
    /// Its own threads, if it has any.
    _runtime: Option<Runtime>,
}

/// What one host of the origin, `address:port`, was asked.
#[derive(Debug, Clone, Default)]
pub struct HostCount {
    /// When each request had arrived.
    pub arrivals: Vec<Instant>,
    /// Requests being answered now.
    pub open: usize,
    /// The most that were being answered at a time.
    pub peak: usize,
    /// Requests that were answered 429.
    pub throttled: usize,
    /// Requests that it would not answer so now, by a bucket that is filled evenly.
    bucket: f64,
}

impl HostCount {
    /// Whether a request that arrives now is more than the host bears.
    fn is_one_too_many(&mut self, now: Instant, bears: f64) -> bool {
        if bears == 0.0 {
            return false;
        }
        let since = self.arrivals.last().map_or(f64::INFINITY, |last| (now - *last).as_secs_f64());
        self.bucket = (self.bucket + since * bears).min(bears.max(1.0));
        let throttled = self.bucket < 1.0;
        self.bucket -= if throttled { 0.0 } else { 1.0 };
        throttled
    }
}

struct Shared {
    site: Site,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    paths: HashMap<String, u64>,
    hosts: HashMap<String, HostCount>,
}

impl Origin {
    /// An origin with the pictures of `seed` and all else as usual.
    ///
    /// # Errors
    /// If loopback has no free port.
    pub async fn start(seed: u64) -> io::Result<Self> {
        Self::start_with(Options { seed, ..Options::default() }).await
    }

    /// An origin as `options` say, on free ports.
    ///
    /// # Errors
    /// If loopback has no free port.
    pub async fn start_with(options: Options) -> io::Result<Self> {
        let mut listeners = Vec::new();
        for n in 1..=options.hosts.clamp(1, 200) as u8 {
            // Systems other than Linux have only the first of these addresses; another port is another host as well.
            let listener = match TcpListener::bind((Ipv4Addr::new(127, 0, 0, n), 0)).await {
                Ok(listener) => listener,
                Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?,
            };
            listeners.push((listener.local_addr()?.to_string(), listener));
        }
        let refusing = TcpSocket::new_v4()?;
        refusing.bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let hosts = listeners.iter().map(|(host, _)| host.clone()).collect();
        let shared = Arc::new(Shared { site: Site::new(options, hosts), counts: Mutex::default() });
        let mut tasks = JoinSet::new();
        for (host, listener) in listeners {
            tasks.spawn(accept(Arc::clone(&shared), host, listener));
        }
        Ok(Self { shared, refused: refusing.local_addr()?, _refusing: refusing, _listeners: tasks, _runtime: None })
    }

    /// An origin as `options` say, on threads of its own, for callers that have no runtime.
    ///
    /// # Errors
    /// If loopback has no free port, or the system no thread.
    pub fn serve(options: Options) -> io::Result<Self> {
        let runtime = Runtime::new()?;
        let origin = runtime.block_on(Self::start_with(options))?;
        Ok(Self { _runtime: Some(runtime), ..origin })
    }

    /// Its hosts, each `address:port`.
    pub fn hosts(&self) -> &[String] {
        &self.shared.site.hosts
    }

    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        self.shared.site.scheme()
    }

    /// An `address:port` that refuses connections as long as the origin lives.
    pub fn refused(&self) -> SocketAddr {
        self.refused
    }

    /// How often this path, with its leading slash, was asked for.
    pub fn requests(&self, path: &str) -> u64 {
        self.shared.counts().paths.get(path).copied().unwrap_or(0)
    }

    /// What `host`, as in [`Origin::hosts`], was asked so far.
    pub fn host(&self, host: &str) -> HostCount {
        self.shared.counts().hosts.get(host).cloned().unwrap_or_default()
    }

    /// The bytes to which [`crate::rot::Rot::LargePlaceholder`] redirects, for those who want to list them.
    pub fn large_placeholder() -> Bytes {
        bodies::placeholder(true)
    }
}

impl Shared {
    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one request from its arrival until its answer is sent, or to its end if that is long in coming.
struct Counted<'a> {
    shared: &'a Shared,
    host: &'a str,
    /// It is one too many.
    throttled: bool,
}

impl<'a> Counted<'a> {
    fn new(shared: &'a Shared, host: &'a str, path: &str) -> Self {
        let counts = &mut *shared.counts();
        *counts.paths.entry(path.to_owned()).or_default() += 1;
        let count = counts.hosts.entry(host.to_owned()).or_default();
        let now = Instant::now();
        let throttled = count.is_one_too_many(now, shared.site.options.bears);
        count.throttled += usize::from(throttled);
        count.arrivals.push(now);
        count.open += 1;
        count.peak = count.peak.max(count.open);
        Self { shared, host, throttled }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.shared.counts().hosts.get_mut(self.host) {
            count.open -= 1;
        }
    }
}

async fn accept(shared: Arc<Shared>, host: String, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    let (shared, host) = (Arc::clone(&shared), host.clone());
                    // A peer that goes away is no matter of the origin.
                    connections.spawn(async move { serve(&shared, &host, socket).await.ok() });
                }
                // Out of descriptors, most likely: connections that end give some back.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(shared: &Shared, host: &str, mut socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let Some(tls) = &shared.site.options.tls else {
        if connection(shared, host, &mut socket).await? == Close::Reset {
            socket.set_zero_linger()?;
        }
        return Ok(());
    };
    let mut session = timeout(IDLE, TlsAcceptor::from(Arc::clone(tls)).accept(socket)).await??;
    if connection(shared, host, &mut session).await? == Close::Reset {
        session.get_ref().0.set_zero_linger()?;
    }
    Ok(())
}

/// How a connection is left.
#[derive(PartialEq, Eq)]
enum Close {
    Orderly,
    Reset,
}

/// Answers requests until one asks for, or is given, an end.
async fn connection<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared,
    host: &str,
    socket: &mut S,
) -> io::Result<Close> {
    let mut unread = Vec::new();
    while let Some(request) = request(socket, &mut unread).await? {
        let counted = Counted::new(shared, host, &request.path);
        tokio::time::sleep(shared.site.options.delay).await;
        let answer = match counted.throttled {
            true => Response::too_many_requests(),
            false => shared.site.answer(host, &request.path).await,
        };
        // Whoever has the whole of it may ask again before this goes on.
        let is_whole = matches!(answer.then, AfterBody::Next | AfterBody::Close | AfterBody::Reset);
        let counted = (!is_whole).then_some(counted);
        send(socket, &answer.head).await?;
        if !request.head_only {
            send(socket, &answer.body).await?;
        }
        match answer.then {
            AfterBody::Next => {}
            AfterBody::Close => break,
            // Unread data is discarded on both sides, as when a server's process dies.
            AfterBody::Reset => return Ok(Close::Reset),
            AfterBody::Drip => {
                let end = Instant::now() + STALL;
                while Instant::now() < end {
                    send(socket, &[0xff]).await?;
                    tokio::time::sleep(DRIP).await;
                }
                break;
            }
            AfterBody::Stream => {
                let chunk = [b"10000\r\n", &[0x55; 0x10000][..], b"\r\n"].concat();
                for _ in 0..ENDLESS_BYTES / 0x10000 {
                    send(socket, &chunk).await?;
                }
                send(socket, b"0\r\n\r\n").await?;
            }
            AfterBody::Silence => {
                // Until the peer goes away or says more.
                timeout(STALL, socket.read(&mut [0; 1])).await.ok();
                break;
            }
        }
        drop(counted);
        if request.close {
            break;
        }
    }
    timeout(IDLE, socket.shutdown()).await??;
    Ok(Close::Orderly)
}

async fn send<S: AsyncWrite + Unpin>(socket: &mut S, bytes: &[u8]) -> io::Result<()> {
    timeout(IDLE, async {
        socket.write_all(bytes).await?;
        socket.flush().await
    })
    .await?
}

struct Request {
    path: String,
    /// HEAD instead of GET.
    head_only: bool,
    close: bool,
}

/// The next request, or `None` when the peer has no more, says nothing for long, or does not speak HTTP.
async fn request<S: AsyncRead + Unpin>(socket: &mut S, unread: &mut Vec<u8>) -> io::Result<Option<Request>> {
    let end = loop {
        if let Some(at) = unread.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if unread.len() > MAX_HEAD || timeout(IDLE, socket.read_buf(unread)).await?? == 0 {
            return Ok(None);
        }
    };
    let head: Vec<u8> = unread.drain(..end).collect();
    let head = String::from_utf8_lossy(&head);
    let mut words = head.split_whitespace();
    let head_only = match words.next() {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Ok(None),
    };
    let path = words.next().unwrap_or("/").to_owned();
    let close = head.to_ascii_lowercase().contains("\r\nconnection: close");
    Ok(Some(Request { path, head_only, close }))
}

#[cfg(test)]
#[path = "origin_tests.rs"]
mod tests;
