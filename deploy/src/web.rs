//! `gleaner web`: pages in which a browser shows the cluster, its datasets with their pictures, and its runs with their
//! curves.
//!
//! Whatever a page shows, it asks the coordinator for, as the command line does, so that both always say the same;
//! nothing can be changed here. A page is rendered on the server and readable without a script; the script asks for it
//! again while it is looked at. `gleaner local` serves the pages too. Once a cluster is gone, `gleaner web --store`
//! shows what it has left: a coordinator in this process answers then, whose store is [`crate::overlay`]'s, so that
//! nothing of the store changes.
//!
//! - [`home`], [`dataset`], [`urls`], [`changes`], [`run`], [`mistakes`], [`compare`], [`try_it`]: one page each;
//! - [`entry`]: who is shown them, where other machines reach them;
//! - [`page`]: the frame around each of them, and what is told when there is none;
//! - [`chart`]: lines and bars as SVG; [`progress`]: how far a dataset is; [`pictures`]: the stored pictures of a
//!   dataset; [`source`]: what is kept of the coordinator's answers.

mod changes;
mod chart;
mod compare;
mod dataset;
mod entry;
mod home;
mod mistakes;
mod page;
mod pictures;
mod progress;
mod run;
mod source;
mod try_it;
mod urls;

use std::future::ready;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
    LOCATION, ORIGIN, REFERRER_POLICY, SET_COOKIE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use coordinator::SiteBudgets;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use proto::dial::Dial;
use proto::keys;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::entry::{Admission, Entry};
use self::source::Source;
use crate::client::Cluster;
use crate::credentials::{self, LocalToken};
use crate::dial::DialArgs;
use crate::exit::{Ended, Exit};
use crate::output::{complain, note};
use crate::overlay::Overlay;
use crate::process::{self, ShutdownArgs};
use crate::store;
use crate::try_it::STYLE;

/// Where the pages are served unless somebody says otherwise.
pub(crate) const DEFAULT_LISTEN: &str = "127.0.0.1:7071";

/// No worker asks a coordinator for a lease that serves the pages alone.
const LEASE_SECONDS: f64 = 30.0;

/// Nothing comes from anywhere else, and no script but our own runs.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; img-src 'self'; \
                      connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// Arguments of `gleaner web`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address and port at which the pages are served; where other machines reach it, a browser needs a code that is
    /// told here. Whoever is let in sees all of the cluster, but can change nothing
    #[arg(long, env = "GLEANER_WEB_LISTEN", value_name = "ADDRESS:PORT", default_value = DEFAULT_LISTEN)]
    web_listen: SocketAddr,
    /// Show what lies in this store (a folder, s3://, gs:// or az://), as it is now, and ask no coordinator: nothing in
    /// it is changed
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
    /// Show them in this machine's browser, too: the one that BROWSER names, or else the desktop's
    #[arg(long)]
    open: bool,
    #[command(flatten)]
    dial: DialArgs,
    #[command(flatten)]
    end: ShutdownArgs,
}

/// Serves the pages until shutdown.
pub(crate) async fn run(args: Args) -> Result<()> {
    let shutdown = process::shutdown_signal(args.end.exit_with_stdin)?;
    let listener = process::bind(args.web_listen, "--web-listen").await?;
    let at = listener.local_addr()?;
    let Some(location) = args.store else {
        let dial = args.dial.dial()?;
        note(format!("pages of {dial} at http://{at}; Ctrl-C ends them"));
        return serve(listener, Cluster::over(&dial), args.open, shutdown).await;
    };
    let (dial, _token, coordinator) = coordinator_of(&location, &shutdown).await?;
    note(format!("pages of {location}, as it is now, at http://{at}; Ctrl-C ends them"));
    tokio::select! {
        served = serve(listener, Cluster::over(&dial), args.open, shutdown.clone()) => served,
        ended = coordinator => match ended? {
            Err(error) => Err(error.context(format!("--store {location}"))),
            Ok(()) => Ok(()),
        },
    }
}

/// A coordinator in this process that knows what is in a store and leaves it as it is, and the token for which it
/// answers, so that it does not answer to others on this machine.
async fn coordinator_of(
    location: &str,
    shutdown: &CancellationToken,
) -> Result<(Dial, Option<LocalToken>, JoinHandle<Result<()>>)> {
    let below = store::open_existing(location)?;
    match below.head(&Path::from(keys::CLUSTER)).await {
        Ok(_) => {}
        Err(object_store::Error::NotFound { .. }) => {
            let text = format!("--store {location}: no cluster has its store there: {} is missing", keys::CLUSTER);
            return Err(Ended::error(Exit::NotFound, text));
        }
        Err(error) => return Err(error).with_context(|| format!("--store {location} cannot be read")),
    }
    let listener = process::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), "--web-listen").await?;
    let at = listener.local_addr()?;
    let token = LocalToken::make(at)?;
    let dial = Dial::new(&format!("http://{at}"))?;
    let dial = credentials::add(dial, token.as_ref().map(|token| &*token.file), None)?;
    let config = coordinator::Config {
        lease_seconds: LEASE_SECONDS,
        spool_folder: None,
        tokens: token.as_ref().map(|token| token.holders.clone()),
        tls_client_names: Vec::new(),
        service_accounts: Vec::new(),
        insecure: false,
        largest_list: 0,
        sites: SiteBudgets::default(),
    };
    let store = Arc::new(Overlay::new(below));
    let doorway = coordinator::Doorway::plain(listener);
    let running = tokio::spawn(coordinator::run(config, store, doorway, shutdown.clone()));
    Ok((dial, token, running))
}

/// Serves the pages of a cluster at `listener` until `shutdown`; with `open`, this machine's browser is shown them.
///
/// # Errors
/// If the listener fails.
pub(crate) async fn serve(
    listener: TcpListener,
    cluster: Cluster,
    open: bool,
    shutdown: CancellationToken,
) -> Result<()> {
    let at = listener.local_addr()?;
    let entry = (!at.ip().to_canonical().is_loopback()).then(|| Arc::new(Entry::new()));
    if let Some(entry) = &entry {
        tell_code(at, entry);
    }
    if open {
        open_browser(at, entry.as_deref());
    }
    let router = router(Source::new(cluster), at, entry);
    Ok(axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await?)
}

/// Connections are taken from now on, so that a browser may ask at once.
fn open_browser(at: SocketAddr, entry: Option<&Entry>) {
    let host = match at.ip() {
        IpAddr::V4(all) if all.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(all) if all.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        own => own,
    };
    let code = entry.map(|entry| format!("?code={}", entry.code())).unwrap_or_default();
    let address = format!("http://{}/{code}", SocketAddr::new(host, at.port()));
    // Some browsers are a command that lasts as long as they do.
    std::thread::spawn(move || {
        if let Err(error) = opener::open_browser(&address) {
            complain(format!("--open: no browser could be started ({error}); open {address} in one"));
        }
    });
}

/// Tells whoever has started the pages how a browser on another machine gets in.
fn tell_code(at: SocketAddr, entry: &Entry) {
    let place = if at.ip().is_unspecified() { format!("THIS-MACHINE'S-ADDRESS:{}", at.port()) } else { at.to_string() };
    // Also to whoever wants to hear nothing else: there is no other way in.
    complain(format!("one browser is let in by http://{place}/?code={}", entry.code()));
}

fn router(source: Source, at: SocketAddr, entry: Option<Arc<Entry>>) -> Router {
    const SCRIPT: &str = "text/javascript; charset=utf-8";
    let asset = |kind: &'static str, text: &'static str| {
        let headers = [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-cache")];
        get(move || ready((headers, text)))
    };
    let wasm = [(CONTENT_TYPE, "application/wasm"), (CACHE_CONTROL, "no-cache"), (CONTENT_ENCODING, "gzip")];
    Router::new()
        .route("/", get(home::page))
        .route("/datasets/{name}", get(dataset::page))
        .route("/datasets/{name}/urls", get(urls::page))
        .route("/datasets/{name}/rejected/{version}/{shard}/{file}", get(urls::rejected))
        .route("/datasets/{name}/changes/{from}/{to}", get(changes::page))
        .route("/datasets/{name}/pictures/{version}/{shard}/{split}/{block}/{file}", get(pictures::picture))
        .route("/runs/{name}", get(run::page))
        .route("/runs/{name}/logs", get(run::logs))
        .route("/runs/{name}/mistakes", get(mistakes::page))
        .route("/runs/{name}/try", get(try_it::page))
        .route("/runs/{name}/model.onnx", get(try_it::onnx))
        .route("/compare", get(compare::page))
        .route("/style.css", asset("text/css; charset=utf-8", STYLE))
        .route("/live.js", asset(SCRIPT, include_str!("web/live.js")))
        .route("/try_it.js", asset(SCRIPT, crate::try_it::SCRIPT))
        .route("/engine.js", asset(SCRIPT, crate::try_it::ENGINE))
        .route("/engine.wasm", get(move || ready((wasm, crate::try_it::WASM))))
        .route("/icon.svg", asset("image/svg+xml", include_str!("web/icon.svg")))
        .fallback(|| ready(page::missing("there is no such page")))
        .with_state(source)
        .layer(Extension(mistakes::Looks::default()))
        .layer(from_fn(move |request: Request<Body>, next: Next| {
            let entry = entry.clone();
            async move { guard(request, next, at, entry.as_deref()).await }
        }))
}

/// Answers only those who asked for this machine by its address, with a code or cookie where that is wanted, and tells
/// the browser to trust nothing else.
async fn guard(request: Request<Body>, next: Next, at: SocketAddr, entry: Option<&Entry>) -> Response {
    let admission =
        |request: &Request<Body>| entry.map_or(Admission::Page, |entry| entry.admit(request.uri(), request.headers()));
    let mut response = if !is_own(request.headers()) {
        let text =
            "ask for these pages by address, or as localhost: another site's name might lead here to read them\n";
        (StatusCode::MISDIRECTED_REQUEST, text).into_response()
    } else if !is_same_origin(request.headers()) {
        (StatusCode::FORBIDDEN, "another site's page may not read these\n").into_response()
    } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
        (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, "GET, HEAD")], "nothing can be changed here\n").into_response()
    } else {
        match (admission(&request), entry) {
            (Admission::Page, _) => answer(request, next).await,
            (Admission::Cookie(cookie), entry) => {
                entry.into_iter().for_each(|entry| tell_code(at, entry));
                (StatusCode::SEE_OTHER, [(SET_COOKIE, cookie), (LOCATION, request.uri().path().to_owned())])
                    .into_response()
            }
            (Admission::Refused, _) => {
                let text = "these pages want a code, once: whoever serves them was told the address that has it\n";
                (StatusCode::UNAUTHORIZED, text).into_response()
            }
        }
    };
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value: &'static str| headers.insert(name, HeaderValue::from_static(value));
    set(CONTENT_SECURITY_POLICY, POLICY);
    set(X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(REFERRER_POLICY, "no-referrer");
    response
}

/// A page. The connection to the coordinator may have ended in between, because certificates were replaced or the
/// coordinator was: then another try has another one.
async fn answer(request: Request<Body>, next: Next) -> Response {
    let mut again = Request::new(Body::empty());
    request.method().clone_into(again.method_mut());
    request.uri().clone_into(again.uri_mut());
    request.headers().clone_into(again.headers_mut());
    request.extensions().clone_into(again.extensions_mut());
    match next.clone().run(request).await {
        lost if lost.status() == StatusCode::SERVICE_UNAVAILABLE => next.run(again).await,
        answer => answer,
    }
}

/// Whether a request names no host but this machine: by an address or as localhost. Any other name may be one that its
/// owner has pointed here, so that a page of his can read what is answered (DNS rebinding).
fn is_own(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST).and_then(|host| host.to_str().ok()) else { return false };
    let name = host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(host, |(name, _)| name);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
}

/// Whether no page of another site makes the request.
fn is_same_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let host = headers.get(HOST).map(HeaderValue::as_bytes);
    origin.as_bytes().strip_prefix(b"http://") == host
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_sites_page_is_refused_and_ones_own_is_not() {
        let from = |origin: &'static str| {
            let headers = [(HOST, "127.0.0.1:7071"), (ORIGIN, origin)];
            is_same_origin(&headers.map(|(name, value)| (name, HeaderValue::from_static(value))).into_iter().collect())
        };
        assert!(from("http://127.0.0.1:7071") && is_same_origin(&HeaderMap::new()));
        for other in ["null", "http://evil.example", "http://127.0.0.1:8080", "https://127.0.0.1:7071", ""] {
            assert!(!from(other), "{other}");
        }
    }

    #[test]
    fn only_addresses_and_localhost_are_answered() {
        let own = |host: &str| is_own(&HeaderMap::from_iter([(HOST, HeaderValue::from_str(host).expect("a header"))]));
        for host in ["localhost", "LOCALHOST:7071", "127.0.0.1:7071", "192.168.1.5", "[::1]:7071", "[::1]"] {
            assert!(own(host), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:7071", "127.0.0.1.nip.io", "", "[::1", "gleaner:80"] {
            assert!(!own(host), "{host}");
        }
        assert!(!is_own(&HeaderMap::new()));
    }
}
