//! The HTTP client: one hop after the other, up to a body or to another host.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use proto::outcomes::LONGEST_URL;
use proto::{Limits, Rejection};
use reqwest::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Certificate, Client, Response, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use url::{Host, Url};

use super::body::{ALLOWANCE, Body, PACE, UNIT};
use super::dns::{GuardedResolver, NameServer};
use super::error::failure_of;
use super::journey::{Journey, Step, host_of};
use super::net::AddressRules;
use super::opt_out::opted_out;
use super::retry::{Again, Failure};
use super::unpack::is_gzip;

/// Bodies of one HTTP/2 connection that may wait unread, each with [`ALLOWANCE`], before the others have to wait, too.
const STREAMS: u32 = 256;
/// An HTTP/2 connection on which nothing has come for so long is asked for a sign of life, and has as long to give it.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

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
    pub(super) config: FetchConfig,
    resolver: GuardedResolver,
    /// By connect timeout, which a client fixes when it is made; datasets rarely differ in it.
    clients: Mutex<HashMap<Duration, Client>>,
    pub(super) budget: Arc<Semaphore>,
    pub(super) budget_units: usize,
    /// Its one permit lets one body grow past a budget that is used up.
    pub(super) overflow: Arc<Semaphore>,
    /// Bodies that wait for either.
    pub(super) waiting: AtomicUsize,
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
