//! The HTTP client: sends a request, follows its redirects up to another host, and reads the body.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use percent_encoding::{CONTROLS, percent_encode};
use proto::outcomes::LONGEST_URL;
use proto::{Limits, Rejection};
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_RANGE, HeaderMap, HeaderValue, LOCATION, RANGE,
};
use reqwest::{Certificate, Client, Response, StatusCode};
use tokio::time::{Instant, timeout_at};
use url::{Host, Url};

use super::body::{Body, BodyBudget, FREE_BYTES, RATE_WINDOW};
use super::dns::{GuardedResolver, NameServer};
use super::error;
use super::files::Roots;
use super::gzip::{self, Coding};
use super::net::{AddressRules, permits_port};
use super::request::Request;
use super::retry::{FetchError, Retry};
use super::text;
use crate::format::{ends, format_of};
use crate::hosts::HostSignal;
use crate::opt_out::said_in_headers;
use crate::web::Proxy;

/// Bodies of one HTTP/2 connection that may wait unread, each with [`FREE_BYTES`], before the others have to wait, too.
const STREAMS: u32 = 256;
/// An HTTP/2 connection on which nothing has come for so long is asked for a sign of life, and has as long to give it.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// So much of an answer of which nothing is wanted is read all the same, and for so long.
const DRAINED_BYTES: u64 = 64 << 10;
const DRAINED_FOR: Duration = Duration::from_secs(1);

/// Headers of a response over HTTP/1.
const MOST_HEADERS: usize = 1000;
/// Bytes of a response's head over HTTP/2.
const LONGEST_HTTP2_HEAD: u32 = 256 << 10;

/// For what sites say in files.
const ACCEPT_TEXTS: &str = "text/plain,application/json,*/*;q=0.1";
/// What can be read. Servers that choose a format by this must not choose AVIF or the like.
const ACCEPT_IMAGES: &str = "image/jpeg,image/png,image/webp,image/gif,image/bmp,image/tiff,*/*;q=0.1";

/// How a worker's requests look and what they may reach.
#[derive(Debug, Clone)]
pub(crate) struct FetchConfig {
    pub(crate) rules: AddressRules,
    /// Which files are read.
    pub(crate) roots: Roots,
    /// Instead of the system's, if there are any.
    pub(crate) name_servers: Vec<NameServer>,
    pub(crate) user_agent: String,
    /// The name by which owners may speak to this worker alone.
    pub(crate) agent: String,
    /// Which looks names up instead of this worker, and decides which addresses may be reached.
    pub(crate) proxy: Option<Proxy>,
    /// Whether servers may show any certificate.
    pub(crate) any_certificate: bool,
    /// Trusted beside the system's.
    pub(crate) authorities: Vec<Certificate>,
    /// Bytes of all bodies together, beyond [`FREE_BYTES`] each.
    pub(crate) body_budget: usize,
}

/// Fetches URLs. One per process: it holds the connections, the TLS set-up and the budget of bytes.
#[derive(Debug)]
pub(crate) struct Fetcher {
    pub(super) config: FetchConfig,
    resolver: GuardedResolver,
    /// By connect timeout, which a client fixes when it is made; datasets rarely differ in it.
    clients: Mutex<HashMap<Duration, Client>>,
    budget: BodyBudget,
}

/// What a request got.
#[derive(Debug)]
pub(crate) enum Fetched {
    Body(Body),
    /// A redirect: the request goes on there, if its host has room and its owner lets it.
    Redirect,
}

/// What a request for a text got.
#[derive(Debug)]
pub(crate) enum FetchedText {
    /// Its first bytes.
    Text(Vec<u8>),
    /// There is none, or not for everybody.
    None,
    /// As of pictures.
    Redirect,
}

impl Fetcher {
    /// # Errors
    /// If no client can be made: the machine has no TLS roots or no name servers, say.
    pub(crate) fn new(config: FetchConfig) -> anyhow::Result<Self> {
        let resolver = GuardedResolver::new(config.rules.clone(), &config.name_servers)?;
        let budget = BodyBudget::new(config.body_budget);
        let fetcher = Self { config, resolver, clients: Mutex::default(), budget };
        // What cannot work must be seen at the start, not as a rejection of every URL.
        fetcher.client(Limits::default().connect_timeout())?;
        Ok(fetcher)
    }

    /// Whether a URL gives a picture, or the 204 by which networks are told from their portals, soon and by what name
    /// servers say now.
    pub(crate) async fn probe(&self, url: &str) -> bool {
        let seconds = 8.0;
        let limits = Limits {
            timeout_seconds: seconds,
            connect_timeout_seconds: seconds,
            first_byte_timeout_seconds: seconds,
            ..Limits::default()
        };
        let Ok(mut request) = Request::new(url) else { return false };
        loop {
            match self.fetch(&mut request, &limits).await {
                Ok(Fetched::Redirect) => {}
                Ok(Fetched::Body(body)) => return format_of(&body.bytes).is_some(),
                Err(_) => return request.info.status == Some(204),
            }
        }
    }

    /// The name by which owners may speak to this worker alone.
    pub(crate) fn agent(&self) -> &str {
        &self.config.agent
    }

    /// Below which files are read.
    pub(crate) fn roots(&self) -> Roots {
        self.config.roots.clone()
    }

    /// Room for a body of known length that comes from no host.
    pub(crate) async fn room(&self, length: u64, limits: &Limits) -> Result<Body, Rejection> {
        let length = usize::try_from(length).ok().filter(|length| *length as u64 <= limits.max_bytes);
        let length = length.ok_or(Rejection::TooLarge)?;
        let (mut body, mut deadline) = (Body::new(), Instant::now() + limits.timeout());
        let room = self.budget.reserve(&mut body, length, limits, &mut deadline).await;
        room.map_err(|error| error.rejection)?;
        body.bytes.reserve_exact(length);
        Ok(body)
    }

    /// Forgets what name servers have said.
    pub(crate) fn forget_names(&self) {
        self.resolver.forget();
    }

    /// Sends a request. It notes what the response says.
    pub(crate) async fn fetch(&self, request: &mut Request, limits: &Limits) -> Result<Fetched, FetchError> {
        let start = Instant::now();
        let deadline = start + limits.timeout().saturating_sub(request.spent);
        let fetched = async {
            match self.send(request, limits, deadline, None).await? {
                Some(response) => self.read(response, request, limits, deadline).await.map(Fetched::Body),
                None => Ok(Fetched::Redirect),
            }
        };
        let fetched = fetched.await;
        request.spent += start.elapsed();
        fetched
    }

    /// Sends a request for a text, of which at most so many bytes are read. That a server has none is no failure.
    pub(crate) async fn fetch_text(
        &self,
        request: &mut Request,
        limits: &Limits,
        most: usize,
    ) -> Result<FetchedText, FetchError> {
        let start = Instant::now();
        let deadline = start + limits.timeout().saturating_sub(request.spent);
        let fetched = async {
            let Some(response) = self.send(request, limits, deadline, Some(ACCEPT_TEXTS)).await? else {
                return Ok(FetchedText::Redirect);
            };
            match FetchError::of_status(response.status(), response.headers()) {
                _ if response.status() == StatusCode::OK => {
                    text::read(response, request, deadline, most).await.map(FetchedText::Text)
                }
                error => {
                    request.is_open = !drain(response, deadline).await;
                    if error.signal == HostSignal::Answered { Ok(FetchedText::None) } else { Err(error) }
                }
            }
        };
        let fetched = fetched.await;
        request.spent += start.elapsed();
        fetched
    }

    /// The response; none: it was a redirect, which the request has followed.
    async fn send(
        &self,
        request: &mut Request,
        limits: &Limits,
        deadline: Instant,
        accept: Option<&'static str>,
    ) -> Result<Option<Response>, FetchError> {
        let client = self.client(limits.connect_timeout()).map_err(|_| FetchError::from(Rejection::Connect))?;
        let url = &request.url;
        self.check(url)?;
        request.info.status = None;
        let now = Instant::now();
        let head_deadline = deadline.min(now + limits.first_byte_timeout());
        // What earlier requests left of the URL's time says nothing about this host.
        let short_of_time = head_deadline == deadline && deadline - now < limits.timeout() / 2;
        let mut asking = client.get(url.clone());
        if let Some(accept) = accept {
            asking = asking.header(ACCEPT, accept);
        }
        if let Some(part) = &request.part {
            asking = asking.header(RANGE, format!("bytes={}-{}", part.start, part.end - 1));
        }
        request.is_open = true;
        let response = match timeout_at(head_deadline, asking.send()).await {
            Err(_) if short_of_time => return Err(FetchError::out_of_time()),
            Err(_) => return Err(FetchError::of_host(Rejection::Timeout)),
            Ok(Err(error)) => {
                request.is_open = !error::is_over(&error);
                return Err(error::of_request(&error, url.scheme() == "https"));
            }
            Ok(Ok(response)) => response,
        };
        request.info.status = Some(response.status().as_u16());
        let to = redirect_target(url, &response).transpose();
        let Some(to) = to else { return Ok(Some(response)) };
        request.is_open = !drain(response, deadline).await;
        request.redirect(to.map_err(FetchError::of_url)?, limits)?;
        // What may not be asked has no host to wait for.
        self.check(&request.url).map(|()| None).map_err(FetchError::of_url)
    }

    fn client(&self, connect_timeout: Duration) -> reqwest::Result<Client> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&connect_timeout) {
            return Ok(client.clone());
        }
        // A response's head has hyper's limit of 417,792 bytes, and over HTTP/2 browsers' one.
        let client = match &self.config.proxy {
            None => Client::builder().no_proxy().dns_resolver(Arc::new(self.resolver.clone())),
            // The only name that is looked up here is the proxy's own, which may be on a private address.
            Some(Proxy(url)) => Client::builder().proxy(reqwest::Proxy::all(url.clone())?),
        };
        let client = client
            .user_agent(&self.config.user_agent)
            .default_headers(HeaderMap::from_iter([
                (ACCEPT, HeaderValue::from_static(ACCEPT_IMAGES)),
                // Images are compressed by themselves.
                (ACCEPT_ENCODING, HeaderValue::from_static("identity")),
            ]))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(connect_timeout)
            .tls_certs_merge(self.config.authorities.iter().cloned())
            .tls_danger_accept_invalid_certs(self.config.any_certificate)
            // As many as a host's budget may have had open: fewer would be opened again and again. A shuffled list
            // comes back to most hosts seldom, and then idle connections are other people's memory.
            .pool_max_idle_per_host(64)
            .pool_idle_timeout(Duration::from_secs(10))
            // Heads that browsers take: thousands of sites send such.
            .http1_max_headers(MOST_HEADERS)
            .http1_allow_obsolete_multiline_headers_in_responses(true)
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http1_ignore_invalid_headers_in_responses(true)
            .http2_max_header_list_size(LONGEST_HTTP2_HEAD)
            .http2_initial_stream_window_size(FREE_BYTES as u32)
            .http2_initial_connection_window_size(STREAMS * FREE_BYTES as u32)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .http2_keep_alive_timeout(KEEP_ALIVE)
            .build()?;
        clients.insert(connect_timeout, client.clone());
        Ok(client)
    }

    /// Whether a URL may be asked for. Names are checked by the resolver.
    fn check(&self, url: &Url) -> Result<(), Rejection> {
        if !matches!(url.scheme(), "http" | "https") || !url.port().is_none_or(permits_port) {
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

    async fn read(
        &self,
        mut response: Response,
        request: &mut Request,
        limits: &Limits,
        mut deadline: Instant,
    ) -> Result<Body, FetchError> {
        let refused = match &request.part {
            Some(part) => is_range(&response, part).err(),
            None if response.status() == StatusCode::OK || is_whole_range(&response) => None,
            None => Some(FetchError::of_status(response.status(), response.headers())),
        };
        if let Some(error) = refused {
            request.is_open = !drain(response, deadline).await;
            return Err(error);
        }
        if let Some(signal) = said_in_headers(response.headers(), request.respect, &self.config.agent) {
            return Err(FetchError::of_url(Rejection::OptedOut).about(signal));
        }
        let coding = response.headers().get(CONTENT_ENCODING).and_then(|coding| Coding::of(coding.as_bytes()));
        let content_length = response.content_length();
        if content_length.is_some_and(|length| length > limits.max_bytes) {
            return Err(FetchError::of_url(Rejection::TooLarge));
        }
        let max = usize::try_from(limits.max_bytes).unwrap_or(usize::MAX);
        let mut body = Body::new();
        if let Some(length) = content_length.and_then(|length| usize::try_from(length).ok()) {
            self.budget.reserve(&mut body, length, limits, &mut deadline).await?;
            body.bytes.reserve_exact(length);
        }
        // A host that drips is no better than one that says nothing; another try would be as slow.
        let too_slow = FetchError { retry: Retry::Never, ..FetchError::of_host(Rejection::Timeout) };
        loop {
            let chunk = match timeout_at(deadline.min(body.window_start + RATE_WINDOW), response.chunk()).await {
                Err(_) if Instant::now() < deadline => Bytes::new(),
                Err(_) => return Err(too_slow),
                Ok(Err(error)) => {
                    request.is_open = !error::is_over(&error);
                    let may_be_whole = error::broke_off(&error) && coding.is_none() && request.part.is_none();
                    // What ends as its format does is whole, whatever its server said of its length.
                    return if may_be_whole && ends(&body.bytes) { Ok(body) } else { Err(error::of_body(&error)) };
                }
                Ok(Ok(None)) => {
                    request.is_open = false;
                    let wanted = request.part.as_ref().map_or(body.bytes.len() as u64, |part| part.end - part.start);
                    if body.bytes.len() as u64 != wanted {
                        return Err(FetchError::of_url(Rejection::Truncated));
                    }
                    let Some(coding) = coding else { return Ok(body) };
                    return gzip::decompress(coding, body, &self.budget, limits, max).await;
                }
                Ok(Ok(Some(chunk))) => chunk,
            };
            let length = body.bytes.len() + chunk.len();
            if length > max {
                return Err(FetchError::of_url(Rejection::TooLarge));
            }
            while length > body.capacity {
                self.budget.grow(&mut body, max, limits, &mut deadline).await?;
            }
            body.bytes.extend_from_slice(&chunk);
            // Of a part the length is known, and it need be no picture.
            if coding.is_none() && request.part.is_none() && body.is_large_non_image() {
                return Err(FetchError::of_url(Rejection::NotAnImage));
            }
            if body.is_too_slow() && self.budget.is_contended() {
                return Err(too_slow);
            }
        }
    }
}

/// Reads what is left of an answer of which nothing is wanted, if that is little and comes soon. Returns whether it has
/// come to its end: then its server is done with it, and its connection can be used again.
async fn drain(mut response: Response, deadline: Instant) -> bool {
    let deadline = deadline.min(Instant::now() + DRAINED_FOR);
    let mut left = DRAINED_BYTES;
    if response.content_length().is_some_and(|length| length > left) {
        return false;
    }
    loop {
        match timeout_at(deadline, response.chunk()).await {
            Ok(Ok(Some(chunk))) if chunk.len() as u64 <= left => left -= chunk.len() as u64,
            Ok(Ok(None)) => return true,
            Ok(Err(error)) => return error::is_over(&error),
            Ok(Ok(Some(_))) | Err(_) => return false,
        }
    }
}

/// Which bytes a response has, if it is a part, and of how many, if it says so.
fn range(response: &Response) -> Option<(Range<u64>, Option<u64>)> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, length) = range.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let end = last.parse::<u64>().ok()?.checked_add(1)?;
    (response.status() == StatusCode::PARTIAL_CONTENT).then_some((first.parse().ok()?..end, length.parse().ok()))
}

/// Whether a response is a part that nobody asked for and that is the whole.
fn is_whole_range(response: &Response) -> bool {
    range(response).is_some_and(|(range, length)| range.start == 0 && length == Some(range.end))
}

/// That a response is the part that was asked for.
fn is_range(response: &Response, part: &Range<u64>) -> Result<(), FetchError> {
    match (response.status(), range(response)) {
        (_, Some((range, _))) if range == *part => Ok(()),
        // What is there now is shorter than what the list was made of.
        (_, Some((range, _))) if range.start == part.start => Err(FetchError::of_url(Rejection::Truncated)),
        (StatusCode::RANGE_NOT_SATISFIABLE, _) => Err(FetchError::of_url(Rejection::Truncated)),
        (StatusCode::OK | StatusCode::PARTIAL_CONTENT, _) => {
            Err(FetchError::of_url(Rejection::Protocol).about("range"))
        }
        (status, _) => Err(FetchError::of_status(status, response.headers())),
    }
}

/// Where a response points, if it is a redirect.
fn redirect_target(from: &Url, response: &Response) -> Result<Option<Url>, Rejection> {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let Some(location) = response.headers().get(LOCATION) else { return Ok(None) };
    // Servers send raw bytes here, whatever the standard says. UTF-8 is encoded where it is joined.
    let location = match std::str::from_utf8(location.as_bytes()) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => percent_encode(location.as_bytes(), CONTROLS).into(),
    };
    let mut next = from.join(&location).map_err(|_| Rejection::Protocol)?;
    next.set_fragment(None);
    if next.as_str().len() > LONGEST_URL {
        return Err(Rejection::Protocol);
    }
    Ok(Some(next))
}
