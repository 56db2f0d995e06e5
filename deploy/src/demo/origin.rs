//! A web origin on loopback that serves photos, and serves them as badly as the web does: written on bare sockets, because no
//! HTTP server would send wrong lengths, resets and garbage.
//!
//! What a URL serves is a function of its path (and the origin's seed): `/KIND/CLASS/NUMBER/n.jpg` shows picture `NUMBER` of
//! `CLASS` in the manner of [`Rot`] `KIND`. `/files/...` serves a folder's files.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::bodies;
use crate::pictures::CLASSES;
use crate::rot::Rot;

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

/// How an origin differs from the usual one.
#[derive(Debug, Clone)]
pub struct Options {
    /// Decides every picture.
    pub seed: u64,
    /// Addresses that it listens at, each a host of its own to clients: 127.0.0.1 and so on.
    pub hosts: usize,
    /// Served under `/files/`.
    pub files: Option<PathBuf>,
    /// Goes by before each answer.
    pub delay: Duration,
    /// JPEGs that are shown instead of drawings, each under many numbers, made a different file by a comment that holds the
    /// number. Formats other than plain JPEG are drawn all the same.
    pub photos: Vec<Bytes>,
    /// Speaks HTTPS instead of HTTP.
    pub tls: Option<Arc<ServerConfig>>,
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
}

struct Shared {
    options: Options,
    hosts: Vec<String>,
    counts: Mutex<Counts>,
    /// Pictures are drawn by as many threads as there are cores.
    drawing: Semaphore,
}

#[derive(Default)]
struct Counts {
    paths: HashMap<String, u64>,
    hosts: HashMap<String, HostCount>,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 0, hosts: 4, files: None, delay: Duration::ZERO, photos: Vec::new(), tls: None }
    }
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
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let shared = Arc::new(Shared {
            options,
            hosts: listeners.iter().map(|(host, _)| host.clone()).collect(),
            counts: Mutex::default(),
            drawing: Semaphore::new(cores),
        });
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
        &self.shared.hosts
    }

    /// `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        self.shared.scheme()
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

    /// The bytes to which [`Rot::LargePlaceholder`] redirects, for those who want to list them.
    pub fn large_placeholder() -> Bytes {
        bodies::placeholder(true)
    }
}

impl Shared {
    /// One of the photos, if there are any and `rot` shows plain ones.
    fn shown(&self, rot: Rot, class: usize, number: u64) -> Option<Bytes> {
        let photos = self.options.photos.len() as u64;
        if photos == 0 || rot.is_converted() {
            return None;
        }
        let photo = &self.options.photos[((number * CLASSES.len() as u64 + class as u64) % photos) as usize];
        Some(bodies::with_segment(photo, 0xfe, format!("{class}/{number}").as_bytes()).into())
    }

    fn scheme(&self) -> &'static str {
        if self.options.tls.is_some() { "https" } else { "http" }
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one request from its arrival to the end of its answer.
struct Counted<'a> {
    shared: &'a Shared,
    host: &'a str,
}

impl<'a> Counted<'a> {
    fn new(shared: &'a Shared, host: &'a str, path: &str) -> Self {
        let counts = &mut *shared.counts();
        *counts.paths.entry(path.to_owned()).or_default() += 1;
        let count = counts.hosts.entry(host.to_owned()).or_default();
        count.arrivals.push(Instant::now());
        count.open += 1;
        count.peak = count.peak.max(count.open);
        Self { shared, host }
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
    let Some(tls) = &shared.options.tls else {
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
        tokio::time::sleep(shared.options.delay).await;
        let answer = answer(shared, host, &request).await;
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

/// What is sent, in this order.
struct Response {
    head: Vec<u8>,
    body: Bytes,
    then: AfterBody,
}

enum AfterBody {
    /// The next request of the same connection.
    Next,
    Close,
    Reset,
    Drip,
    Stream,
    Silence,
}

impl Response {
    /// A whole answer with a right Content-Length; `headers` are lines that end in CRLF.
    fn whole(status: &str, headers: &str, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        Self::part(status, headers, body.len(), body, AfterBody::Next)
    }

    /// An answer that announces `length` bytes, whatever its body has.
    fn part(status: &str, headers: &str, length: usize, body: impl Into<Bytes>, then: AfterBody) -> Self {
        let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n").into_bytes();
        Self { head, body: body.into(), then }
    }

    fn raw(head: impl Into<Vec<u8>>, body: impl Into<Bytes>, then: AfterBody) -> Self {
        Self { head: head.into(), body: body.into(), then }
    }

    fn redirect(status: &str, to: &str) -> Self {
        Self::whole(status, &format!("Location: {to}\r\n"), Bytes::new())
    }

    fn not_found() -> Self {
        Self::whole("404 Not Found", "Content-Type: text/html\r\n", "<h1>Not found</h1>\n")
    }
}

const JPEG: &str = "Content-Type: image/jpeg\r\n";
const HTML: &str = "Content-Type: text/html\r\n";
const CHUNKED: &str = "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n";

async fn answer(shared: &Shared, host: &str, request: &Request) -> Response {
    let path = request.path.trim_start_matches('/');
    if let Some(name) = path.strip_prefix("files/") {
        return file(shared, name).await;
    }
    match path {
        "gone-small.jpg" => return Response::whole("200 OK", JPEG, bodies::placeholder(false)),
        "gone-large.jpg" => return Response::whole("200 OK", JPEG, bodies::placeholder(true)),
        _ if path.starts_with("login/") => return Response::whole("200 OK", HTML, bodies::html(path)),
        _ => {}
    }
    match parse(path) {
        Some((rot, class, number, n)) => rotten(shared, host, rot, (class, number), n).await,
        None => Response::not_found(),
    }
}

/// `KIND/CLASS/NUMBER/N.jpg`.
fn parse(path: &str) -> Option<(Rot, usize, u64, u64)> {
    let mut parts = path.strip_suffix(".jpg")?.split('/');
    let rot = Rot::from_name(parts.next()?)?;
    let class = parts.next()?.parse().ok().filter(|&class| class < CLASSES.len())?;
    let parsed = (rot, class, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some(parsed)
}

async fn rotten(shared: &Shared, host: &str, rot: Rot, (class, number): (usize, u64), n: u64) -> Response {
    let seed = shared.options.seed;
    let photo = async || match shared.shown(rot, class, number) {
        Some(photo) => photo,
        None => drawn(shared, move || bodies::photo(rot, seed, class, number).into()).await,
    };
    match rot {
        Rot::Good
        | Rot::Copy
        | Rot::OtherClass
        | Rot::Exif
        | Rot::Cmyk
        | Rot::Grey
        | Rot::Progressive
        | Rot::Thumbnail => Response::whole("200 OK", JPEG, photo().await),
        Rot::Png | Rot::AlphaPng => Response::whole("200 OK", "Content-Type: image/png\r\n", photo().await),
        Rot::Webp => Response::whole("200 OK", "Content-Type: image/webp\r\n", photo().await),
        Rot::Gif => Response::whole("200 OK", "Content-Type: image/gif\r\n", photo().await),
        // What many servers say of these.
        Rot::Bmp | Rot::Tiff => Response::whole("200 OK", "Content-Type: application/octet-stream\r\n", photo().await),
        Rot::OptedOut => Response::whole("200 OK", &format!("{JPEG}X-Robots-Tag: noai\r\n"), photo().await),
        Rot::Moved => {
            let next = shared.hosts.iter().position(|h| h == host).map_or(0, |at| (at + 1) % shared.hosts.len());
            let (scheme, kind) = (shared.scheme(), Rot::Good.name());
            let to = format!("{scheme}://{}/{kind}/{class}/{number}/{n}.jpg", shared.hosts[next]);
            Response::redirect("301 Moved Permanently", &to)
        }
        Rot::Placeholder => Response::redirect("302 Found", "/gone-small.jpg"),
        Rot::LargePlaceholder => Response::redirect("302 Found", "/gone-large.jpg"),
        Rot::HtmlAfterRedirect => Response::redirect("302 Found", &format!("/login/{n}")),
        Rot::Loop => Response::redirect("302 Found", &format!("/{}/{class}/{number}/{}.jpg", rot.name(), n ^ 1)),
        Rot::Private => {
            const TARGETS: [&str; 4] =
                ["10.0.0.1/photo.jpg", "169.254.169.254/latest/meta-data/", "192.168.1.1/", "[fd00::1]/photo.jpg"];
            Response::redirect("302 Found", &format!("http://{}", TARGETS[(n % 4) as usize]))
        }
        Rot::NotFound => Response::not_found(),
        Rot::Gone => Response::whole("410 Gone", HTML, "<h1>Gone</h1>\n"),
        Rot::Forbidden => Response::whole("403 Forbidden", HTML, "<h1>Forbidden</h1>\n"),
        Rot::ServerError => Response::whole("500 Internal Server Error", HTML, "<h1>Error</h1>\n"),
        Rot::Unavailable => {
            Response::whole("503 Service Unavailable", &format!("{HTML}Retry-After: 1\r\n"), "<h1>Try later</h1>\n")
        }
        Rot::HtmlAsJpeg => Response::whole("200 OK", JPEG, bodies::html(&format!("photo {n}"))),
        Rot::TinyGif => Response::whole("200 OK", "Content-Type: image/gif\r\n", bodies::TINY_GIF),
        Rot::Empty => Response::whole("200 OK", JPEG, Bytes::new()),
        Rot::RandomBytes => Response::whole("200 OK", JPEG, bodies::random_bytes(n, 20_000)),
        Rot::Truncated => {
            let photo = photo().await;
            Response::whole("200 OK", JPEG, photo.slice(..photo.len() * 3 / 5))
        }
        Rot::ShortBody | Rot::Reset => {
            let photo = photo().await;
            let then = if rot == Rot::Reset { AfterBody::Reset } else { AfterBody::Close };
            Response::part("200 OK", JPEG, photo.len(), photo.slice(..photo.len() / 2), then)
        }
        Rot::LongBody => {
            let photo = photo().await;
            Response::part("200 OK", JPEG, photo.len() / 2, photo, AfterBody::Close)
        }
        // 8,000 bytes of a chunk that announces 32,768.
        Rot::CutChunk => Response::raw(format!("{CHUNKED}8000\r\n"), photo().await.slice(..8_000), AfterBody::Close),
        Rot::Garbage => Response::raw(bodies::random_bytes(n, 2_000), Bytes::new(), AfterBody::Close),
        Rot::PngBomb => Response::whole("200 OK", "Content-Type: image/png\r\n", drawn(shared, bodies::png_bomb).await),
        Rot::GzipBomb => Response::whole(
            "200 OK",
            &format!("{JPEG}Content-Encoding: gzip\r\n"),
            drawn(shared, bodies::gzip_bomb).await,
        ),
        Rot::Endless => Response::raw(CHUNKED, Bytes::new(), AfterBody::Stream),
        Rot::Drip => Response::part("200 OK", JPEG, 60_000, Bytes::new(), AfterBody::Drip),
        // The URLs of the last four name other hosts or none; whoever asks here all the same hears nothing either.
        Rot::Silent | Rot::DeadHost | Rot::RefusedPort | Rot::Unparsable | Rot::OtherScheme => {
            Response::raw(Vec::new(), Bytes::new(), AfterBody::Silence)
        }
    }
}

/// Runs `draw` on a thread on which computing hurts nobody.
async fn drawn(shared: &Shared, draw: impl FnOnce() -> Bytes + Send + 'static) -> Bytes {
    let _permit = shared.drawing.acquire().await.expect("never closed");
    tokio::task::spawn_blocking(draw).await.expect("drawing does not panic")
}

async fn file(shared: &Shared, name: &str) -> Response {
    let Some(folder) = &shared.options.files else { return Response::not_found() };
    if name.split(['/', '\\']).any(|part| part == "..") {
        return Response::not_found();
    }
    match tokio::fs::read(folder.join(name)).await {
        Ok(bytes) => Response::whole("200 OK", "Content-Type: application/octet-stream\r\n", bytes),
        Err(_) => Response::not_found(),
    }
}

#[cfg(test)]
#[path = "origin_tests.rs"]
mod tests;
