//! One URL to the bytes behind it, or the reason why not: under a total deadline, with every hop's address checked, and with
//! the bytes of all bodies together under a budget. It stops where a redirect leads to another host: that host has a budget
//! of its own (see `hosts`).

use std::collections::HashMap;
use std::error::Error;
use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use proto::outcomes::LONGEST_URL;
use proto::{Limits, Rejection};
use reqwest::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, DATE, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Certificate, Client, Response, StatusCode};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use url::{Host, Url};

use crate::dns::{Blocked, GuardedResolver, NameServer, NoSuchName};
use crate::hosts::Ending;
use crate::net::AddressRules;
use crate::validate::{TELLING_BYTES, format_of};

/// What each body may hold before it draws on the budget: most photos of the web are smaller, and wait for nothing.
const ALLOWANCE: usize = 256 << 10;
/// The budget is counted in these, because a semaphore hands out 32-bit numbers.
const UNIT: usize = 1 << 10;

/// While others wait for the budget, a body that holds a part of it must come at this pace: bytes in so long.
const PACE: (usize, Duration) = (64 << 10, Duration::from_secs(1));
/// Bodies of one HTTP/2 connection that may wait unread, each with [`ALLOWANCE`], before the others have to wait, too.
const STREAMS: u32 = 256;
/// An HTTP/2 connection on which nothing has come for so long is asked for a sign of life, and has as long to give it.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Before the second try; each pause after it is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest time for which one 429 silences its whole host.
const LONGEST_HUSH: Duration = Duration::from_secs(60);

const ACCEPT_IMAGES: &str = "image/jpeg,image/png,image/webp,image/gif,image/bmp,image/tiff,image/*;q=0.8,*/*;q=0.1";

/// How a worker's requests look and what they may reach.
#[derive(Debug, Clone)]
pub(crate) struct FetchConfig {
    pub(crate) rules: AddressRules,
    /// Instead of the system's, if there are any.
    pub(crate) name_servers: Vec<NameServer>,
    pub(crate) user_agent: String,
    pub(crate) honour_opt_outs: bool,
    /// Trusted beside the system's.
    pub(crate) authorities: Vec<Certificate>,
    /// Bytes of all bodies together, beyond [`ALLOWANCE`] each.
    pub(crate) body_budget: usize,
}

/// Fetches URLs. One per process: it holds the connections, the TLS set-up and the budget of bytes.
#[derive(Debug)]
pub(crate) struct Fetcher {
    config: FetchConfig,
    resolver: GuardedResolver,
    /// By connect timeout, which a client fixes when it is made; datasets rarely differ in it.
    clients: Mutex<HashMap<Duration, Client>>,
    budget: Arc<Semaphore>,
    budget_units: usize,
    /// Its one permit lets one body grow past a budget that is used up.
    overflow: Arc<Semaphore>,
    /// Bodies that wait for either.
    waiting: AtomicUsize,
}

/// What was learned of a URL on the way to its body.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    /// Where redirects led, if there were any.
    pub(crate) final_url: Option<String>,
    /// Of the last answer.
    pub(crate) status: Option<u16>,
}

/// A URL on its way to its body: over several hops and tries, with pauses between them.
#[derive(Debug)]
pub(crate) struct Journey {
    /// The next hop.
    url: Url,
    visited: Vec<Url>,
    pub(crate) trace: Trace,
    /// The time that its requests have taken; waiting for a host or for another try does not count.
    pub(crate) spent: Duration,
    /// Tries that have failed.
    failures: u32,
}

impl Journey {
    pub(crate) fn new(url: &str) -> Result<Self, Rejection> {
        if url.len() > LONGEST_URL {
            return Err(Rejection::BadUrl);
        }
        let url = Url::parse(url).map_err(|_| Rejection::BadUrl)?;
        if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
            return Err(Rejection::BadUrl);
        }
        Ok(Self { url, visited: Vec::new(), trace: Trace::default(), spent: Duration::ZERO, failures: 0 })
    }

    /// The host of the next hop, as budgets name it.
    pub(crate) fn host(&self) -> String {
        host_of(&self.url)
    }

    /// Begins anew after a failure, if that is worth while: after which pause. A pause that is longer than a URL's whole time
    /// is for another round. `random` is in 0..1.
    pub(crate) fn try_again(&mut self, failure: &Failure, limits: &Limits, random: f64) -> Option<Duration> {
        let Again::After(wish) = failure.again else { return None };
        let backoff = FIRST_PAUSE * 2u32.saturating_pow(self.failures.min(16));
        let pause = backoff.mul_f64(0.5 + random / 2.0).max(wish);
        // With less than half of its time it would hardly come further than it did.
        if self.failures >= limits.retries || self.spent > limits.timeout() / 2 || pause > limits.timeout() {
            return None;
        }
        self.failures += 1;
        if !self.visited.is_empty() {
            self.url = self.visited.swap_remove(0);
            self.visited.clear();
        }
        self.trace = Trace::default();
        Some(pause)
    }
}

fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let host = host.strip_suffix('.').unwrap_or(host);
    match url.port() {
        Some(port) if port != 80 && port != 443 => format!("{host}:{port}"),
        _ => host.to_owned(),
    }
}

/// How far a request came.
#[derive(Debug)]
pub(crate) enum Step {
    Body(Body),
    /// A redirect to another host.
    Elsewhere,
}

/// A request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) rejection: Rejection,
    pub(crate) again: Again,
    /// What it says about the host.
    pub(crate) ending: Ending,
}

/// Whether another try may come further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    Never,
    /// If the server has so much time (`Retry-After`).
    After(Duration),
}

impl From<Rejection> for Failure {
    /// One that stays, whatever the host.
    fn from(rejection: Rejection) -> Self {
        Self { rejection, again: Again::Never, ending: Ending::Unknown }
    }
}

impl Failure {
    /// Of the way to the host, or of the host itself.
    fn of_host(rejection: Rejection) -> Self {
        Self { rejection, again: Again::After(Duration::ZERO), ending: Ending::Failed }
    }

    /// Of the time that a URL has in all, which others have used up.
    fn of_haste() -> Self {
        Self { rejection: Rejection::Timeout, again: Again::Never, ending: Ending::Unknown }
    }

    /// Of the one URL: its host answers.
    fn of_url(rejection: Rejection) -> Self {
        Self { rejection, again: Again::Never, ending: Ending::Answered }
    }

    fn of_status(status: StatusCode, headers: &HeaderMap) -> Self {
        let wish = retry_after(headers).unwrap_or_default();
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => Self::of_url(Rejection::NotFound),
            StatusCode::TOO_MANY_REQUESTS => {
                let pause = wish.clamp(FIRST_PAUSE, LONGEST_HUSH);
                Self { rejection: Rejection::HttpStatus, again: Again::After(wish), ending: Ending::Limited(pause) }
            }
            _ if status.is_server_error() => Self { again: Again::After(wish), ..Self::of_host(Rejection::HttpStatus) },
            _ => Self::of_url(Rejection::HttpStatus),
        }
    }
}

/// `Retry-After`: seconds, or a date, which is compared with the server's own clock (`Date`).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).map(str::trim);
    let wish = text(RETRY_AFTER)?;
    if let Ok(seconds) = wish.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = |text| httpdate::parse_http_date(text).ok();
    date(wish)?.duration_since(date(text(DATE)?)?).ok()
}

/// A body. Its share of the budget is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) bytes: Vec<u8>,
    /// How many bytes it may hold.
    room: usize,
    /// Whether its first bytes were looked at.
    known: bool,
    share: Option<OwnedSemaphorePermit>,
    overflow: Option<OwnedSemaphorePermit>,
    /// When its pace was last looked at, and how many bytes had come by then.
    paced: (Instant, usize),
}

impl Body {
    fn new() -> Self {
        let paced = (Instant::now(), 0);
        Self { bytes: Vec::new(), room: ALLOWANCE, known: false, share: None, overflow: None, paced }
    }

    #[cfg(test)]
    pub(crate) fn holding(bytes: Vec<u8>) -> Self {
        Self { bytes, ..Self::new() }
    }

    /// Whether it is large and no picture: films and archives need not be read to their end.
    fn is_in_vain(&mut self) -> bool {
        let look = !self.known && self.room > ALLOWANCE && self.bytes.len() >= TELLING_BYTES;
        self.known |= look;
        look && format_of(&self.bytes).is_none()
    }

    /// Whether it came below [`PACE`] since that was last looked at, if that is long enough ago.
    fn dawdles(&mut self) -> bool {
        let (since, before) = self.paced;
        if since.elapsed() < PACE.1 {
            return false;
        }
        self.paced = (Instant::now(), self.bytes.len());
        let holds = self.share.is_some() || self.overflow.is_some();
        holds && self.bytes.len() - before < PACE.0
    }
}

/// One of those that wait.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn begin(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Fetcher {
    /// # Errors
    /// If no client can be made: the machine has no TLS roots or no name servers, say.
    pub(crate) fn new(config: FetchConfig) -> anyhow::Result<Self> {
        let resolver = GuardedResolver::new(config.rules.clone(), &config.name_servers)?;
        let budget_units = (config.body_budget / UNIT).clamp(1, Semaphore::MAX_PERMITS);
        let budget = Arc::new(Semaphore::new(budget_units));
        let overflow = Arc::new(Semaphore::new(1));
        let fetcher = Self {
            config,
            resolver,
            clients: Mutex::default(),
            budget,
            budget_units,
            overflow,
            waiting: AtomicUsize::new(0),
        };
        // What cannot work must be seen at the start, not as a rejection of every URL.
        fetcher.client(Limits::default().connect_timeout())?;
        Ok(fetcher)
    }

    /// The body at the end of the journey, as far as it goes on one host; what is learned on the way is noted in the journey.
    pub(crate) async fn fetch(&self, journey: &mut Journey, limits: &Limits) -> Result<Step, Failure> {
        let start = Instant::now();
        let step = self.hops(journey, limits, start + limits.timeout().saturating_sub(journey.spent)).await;
        journey.spent += start.elapsed();
        step
    }

    async fn hops(&self, journey: &mut Journey, limits: &Limits, deadline: Instant) -> Result<Step, Failure> {
        let client = self.client(limits.connect_timeout()).map_err(|_| Failure::from(Rejection::Connect))?;
        loop {
            let url = &journey.url;
            self.check(url)?;
            journey.trace.status = None;
            let now = Instant::now();
            let head = deadline.min(now + limits.first_byte_timeout());
            // What earlier hops left of the URL's time says nothing about this one's host.
            let remainder = head == deadline && deadline - now < limits.timeout() / 2;
            let response = match timeout_at(head, client.get(url.clone()).send()).await {
                Err(_) if remainder => return Err(Failure::of_haste()),
                Err(_) => return Err(Failure::of_host(Rejection::Timeout)),
                Ok(Err(error)) => return Err(failure_of(&error, url.scheme() == "https")),
                Ok(Ok(response)) => response,
            };
            journey.trace.status = Some(response.status().as_u16());
            let Some(next) = redirect(url, &response).map_err(Failure::of_url)? else {
                return self.read(response, limits, deadline).await.map(Step::Body);
            };
            let elsewhere = host_of(&next) != host_of(url);
            journey.visited.push(std::mem::replace(&mut journey.url, next));
            if journey.visited.len() > limits.redirects as usize || journey.visited.contains(&journey.url) {
                return Err(Failure::of_url(Rejection::RedirectLimit));
            }
            journey.trace.final_url = Some(journey.url.to_string());
            if elsewhere {
                // What cannot be asked has no host to wait for.
                return self.check(&journey.url).map(|()| Step::Elsewhere).map_err(Failure::of_url);
            }
        }
    }

    fn client(&self, connect_timeout: Duration) -> reqwest::Result<Client> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&connect_timeout) {
            return Ok(client.clone());
        }
        // An answer's head has hyper's limits: 100 headers and 417,792 bytes; 16 KiB over HTTP/2.
        let client = Client::builder()
            .user_agent(&self.config.user_agent)
            .default_headers(HeaderMap::from_iter([
                (ACCEPT, HeaderValue::from_static(ACCEPT_IMAGES)),
                // Images are compressed by themselves.
                (ACCEPT_ENCODING, HeaderValue::from_static("identity")),
            ]))
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .dns_resolver(Arc::new(self.resolver.clone()))
            .connect_timeout(connect_timeout)
            .tls_certs_merge(self.config.authorities.iter().cloned())
            // As many as a host's budget may have had open: fewer would be opened again and again. A shuffled list comes back
            // to most hosts seldom, and then idle connections are other people's memory.
            .pool_max_idle_per_host(64)
            .pool_idle_timeout(Duration::from_secs(10))
            .http2_initial_stream_window_size(ALLOWANCE as u32)
            .http2_initial_connection_window_size(STREAMS * ALLOWANCE as u32)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .http2_keep_alive_timeout(KEEP_ALIVE)
            .build()?;
        clients.insert(connect_timeout, client.clone());
        Ok(client)
    }

    /// Whether a hop may be asked at all. Names are checked by the resolver.
    fn check(&self, url: &Url) -> Result<(), Rejection> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(Rejection::BadUrl);
        }
        let permitted = match url.host() {
            None => return Err(Rejection::BadUrl),
            Some(Host::Domain(_)) => true,
            Some(Host::Ipv4(address)) => self.config.rules.permits(address.into()),
            Some(Host::Ipv6(address)) => self.config.rules.permits(address.into()),
        };
        if permitted { Ok(()) } else { Err(Rejection::BlockedAddress) }
    }

    async fn read(&self, mut response: Response, limits: &Limits, deadline: Instant) -> Result<Body, Failure> {
        if response.status() != StatusCode::OK {
            return Err(Failure::of_status(response.status(), response.headers()));
        }
        if self.config.honour_opt_outs && opted_out(response.headers()) {
            return Err(Failure::of_url(Rejection::OptedOut));
        }
        let packed = response.headers().get(CONTENT_ENCODING).is_some_and(|coding| is_gzip(coding.as_bytes()));
        let announced = response.content_length();
        if announced.is_some_and(|length| length > limits.max_bytes) {
            return Err(Failure::of_url(Rejection::TooLarge));
        }
        let max = usize::try_from(limits.max_bytes).unwrap_or(usize::MAX);
        let announced = announced.and_then(|length| usize::try_from(length).ok());
        let mut body = Body::new();
        let mut deadline = deadline;
        if let Some(length) = announced {
            self.reserve(&mut body, length, limits, &mut deadline).await?;
            body.bytes.reserve_exact(length);
        }
        loop {
            let chunk = match timeout_at(deadline.min(body.paced.0 + PACE.1), response.chunk()).await {
                Err(_) if Instant::now() < deadline => Bytes::new(),
                // A host that drips is no better than one that says nothing.
                Err(_) => return Err(Failure { again: Again::Never, ..Failure::of_host(Rejection::Timeout) }),
                Ok(Err(_)) => return Err(Failure::of_url(Rejection::Protocol)),
                Ok(Ok(None)) if packed => return self.unpack(body, limits, max).await,
                Ok(Ok(None)) => return Ok(body),
                Ok(Ok(Some(chunk))) => chunk,
            };
            let length = body.bytes.len() + chunk.len();
            if length > max {
                return Err(Failure::of_url(Rejection::TooLarge));
            }
            while length > body.room {
                self.grow(&mut body, max, limits, &mut deadline).await?;
            }
            body.bytes.extend_from_slice(&chunk);
            if !packed && body.is_in_vain() {
                return Err(Failure::of_url(Rejection::NotAnImage));
            }
            if body.dawdles() && self.waiting.load(Ordering::Relaxed) > 0 {
                return Err(Failure { again: Again::Never, ..Failure::of_host(Rejection::Timeout) });
            }
        }
    }

    /// Waits for a part of the budget. The wait is ours, so the server is given that much longer; but it ends, too.
    async fn wait_for(
        &self,
        permit: impl Future<Output = Result<OwnedSemaphorePermit, AcquireError>>,
        limits: &Limits,
        deadline: &mut Instant,
    ) -> Result<OwnedSemaphorePermit, Failure> {
        let (start, _waits) = (Instant::now(), Waits::begin(&self.waiting));
        let got = timeout(limits.timeout(), permit).await;
        *deadline += start.elapsed();
        got.ok().and_then(Result::ok).ok_or(Failure { again: Again::After(Duration::ZERO), ..Failure::of_haste() })
    }

    /// What a body says that was packed although nobody asked for it.
    async fn unpack(&self, mut packed: Body, limits: &Limits, max: usize) -> Result<Body, Failure> {
        let bytes = Bytes::from(std::mem::take(&mut packed.bytes));
        let mut room = ALLOWANCE;
        let unpacked = loop {
            let (packed_bytes, limit) = (bytes.clone(), room);
            let unpacked = tokio::task::spawn_blocking(move || gunzip(&packed_bytes, limit)).await;
            match unpacked.unwrap_or(Err(Rejection::Protocol)) {
                // Larger ones one at a time.
                Err(Rejection::TooLarge) if room < max => {
                    let start = gunzip_start(&bytes).map_err(Failure::of_url)?;
                    format_of(&start).ok_or(Failure::of_url(Rejection::NotAnImage))?;
                    room = max;
                    if packed.overflow.is_none() {
                        let permit = Arc::clone(&self.overflow).acquire_owned();
                        packed.overflow = Some(self.wait_for(permit, limits, &mut Instant::now()).await?);
                    }
                }
                unpacked => break unpacked.map_err(Failure::of_url)?,
            }
        };
        Ok(Body { bytes: unpacked, ..packed })
    }

    /// Makes room for a body of known length, which waits for its whole share before it holds any: so bodies cannot block
    /// each other for good.
    async fn reserve(
        &self,
        body: &mut Body,
        length: usize,
        limits: &Limits,
        deadline: &mut Instant,
    ) -> Result<(), Failure> {
        if length > body.room {
            let units = units(length - body.room).min(u32::try_from(self.budget_units).unwrap_or(u32::MAX));
            let permits = Arc::clone(&self.budget).acquire_many_owned(units);
            body.share = Some(self.wait_for(permits, limits, deadline).await?);
            body.room = length;
            body.paced = (Instant::now(), body.bytes.len());
        }
        Ok(())
    }

    /// Doubles the room of a body of unknown length, up to `max`. It holds a share already, so it does not wait for more of
    /// the budget: if there is no more, it waits for its turn as the one body that goes over it, and waits no more then.
    async fn grow(&self, body: &mut Body, max: usize, limits: &Limits, deadline: &mut Instant) -> Result<(), Failure> {
        let room = (body.room * 2).min(max);
        match Arc::clone(&self.budget).try_acquire_many_owned(units(room - body.room)) {
            Ok(more) => {
                match &mut body.share {
                    Some(share) => share.merge(more),
                    none => *none = Some(more),
                }
                body.room = room;
            }
            Err(_) => {
                let permit = Arc::clone(&self.overflow).acquire_owned();
                body.overflow = Some(self.wait_for(permit, limits, deadline).await?);
                body.room = max;
                body.paced = (Instant::now(), body.bytes.len());
            }
        }
        Ok(())
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

fn is_gzip(coding: &[u8]) -> bool {
    let coding = coding.trim_ascii();
    coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip")
}

/// The first bytes of what is packed, by which its format is known.
fn gunzip_start(packed: &[u8]) -> Result<[u8; TELLING_BYTES], Rejection> {
    let mut start = [0; TELLING_BYTES];
    MultiGzDecoder::new(packed).read_exact(&mut start).map_err(|_| Rejection::Protocol)?;
    Ok(start)
}

/// Unpacks to at most `max` bytes.
fn gunzip(packed: &[u8], max: usize) -> Result<Vec<u8>, Rejection> {
    let mut bytes = Vec::new();
    let more = max as u64 + 1;
    MultiGzDecoder::new(packed).take(more).read_to_end(&mut bytes).map_err(|_| Rejection::Protocol)?;
    if bytes.len() > max { Err(Rejection::TooLarge) } else { Ok(bytes) }
}

/// Where an answer points, if it is a redirect.
fn redirect(from: &Url, response: &Response) -> Result<Option<Url>, Rejection> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let Some(location) = response.headers().get(LOCATION) else { return Ok(None) };
    // Servers send raw UTF-8 here, whatever the standard says.
    let location = std::str::from_utf8(location.as_bytes()).map_err(|_| Rejection::Protocol)?;
    let mut next = from.join(location).map_err(|_| Rejection::Protocol)?;
    next.set_fragment(None);
    if next.as_str().len() > LONGEST_URL {
        return Err(Rejection::Protocol);
    }
    Ok(Some(next))
}

/// Directives of `X-Robots-Tag` that look like an agent's name with its directive.
const TAKES_A_VALUE: [&str; 4] = ["unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"];

/// Whether the owner asks that the picture be not used: `X-Robots-Tag` with `noai`, `noimageai`, `noindex` or
/// `noimageindex`, said to all or to Gleaner by name. `none` means `noindex, nofollow`.
fn opted_out(headers: &HeaderMap) -> bool {
    headers.get_all("x-robots-tag").iter().any(|value| {
        let text = String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase();
        let mut meant = true;
        text.split(',').any(|part| {
            let directive = match part.split_once(':') {
                Some((key, _)) if TAKES_A_VALUE.contains(&key.trim()) => return false,
                Some((agent, directive)) => {
                    meant = agent.trim() == "gleaner" || agent.trim() == "*";
                    directive
                }
                None => part,
            };
            meant && matches!(directive.trim(), "noai" | "noimageai" | "noindex" | "noimageindex" | "none")
        })
    })
}

/// Why a request failed, from the causes that reqwest's error carries.
fn failure_of(error: &reqwest::Error, https: bool) -> Failure {
    let mut kind = None;
    let mut tls = false;
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<Blocked>() {
            return Rejection::BlockedAddress.into();
        }
        if error.is::<NoSuchName>() {
            return Rejection::Dns.into();
        }
        tls |= error.is::<rustls::Error>();
        cause = match error.downcast_ref::<std::io::Error>() {
            Some(io) => {
                kind = Some(io.kind());
                // `source` of an io::Error skips the very error that it wraps.
                io.get_ref().map(|inner| inner as &(dyn Error + 'static))
            }
            None => error.source(),
        };
    }
    if error.is_dns() {
        Failure::of_host(Rejection::Dns)
    } else if tls {
        Rejection::Tls.into()
    } else if error.is_builder() {
        Rejection::BadUrl.into()
    } else if error.is_connect() {
        // A TCP connection that is not made is refused, unreachable or late; one that ends again at once died in its handshake.
        use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, InvalidData, UnexpectedEof};
        match kind {
            Some(UnexpectedEof | InvalidData | ConnectionReset | ConnectionAborted) if https => Rejection::Tls.into(),
            _ => Failure::of_host(Rejection::Connect),
        }
    } else if error.is_timeout() {
        Failure::of_host(Rejection::Timeout)
    } else {
        Rejection::Protocol.into()
    }
}

#[cfg(test)]
mod tests;
