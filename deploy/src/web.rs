//! `gleaner web`: pages in which a browser shows the cluster, its datasets with their pictures, and its runs with their curves.
//!
//! Whatever a page shows, it asks the coordinator for, as the command line does, so that both always say the same; nothing can be changed
//! here. A page is rendered on the server and readable without a script; the script asks for it again while it is looked at.
//! `gleaner local` serves the pages too.
//!
//! - [`home`], [`dataset`], [`run`], [`compare`]: one page each;
//! - [`page`]: the frame around each of them, and what is told when there is none;
//! - [`chart`]: lines and bars as SVG; [`progress`]: how far a dataset is; [`pictures`]: the stored pictures of a dataset; [`source`]: what is
//!   kept of the coordinator's answers.

mod chart;
mod compare;
mod dataset;
mod home;
mod page;
mod pictures;
mod progress;
mod run;
mod source;

use std::future::ready;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::source::Source;
use crate::client::Cluster;
use crate::dial::DialArgs;
use crate::output::note;
use crate::process::{self, ShutdownArgs};

/// Where the pages are served unless somebody says otherwise.
pub(crate) const DEFAULT_LISTEN: &str = "127.0.0.1:7071";

/// Nothing comes from anywhere else, and no script but our own runs.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; \
                      base-uri 'none'; frame-ancestors 'none'";

/// Arguments of `gleaner web`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address and port at which the pages are served; whoever reaches it sees all of the cluster, but can change nothing
    #[arg(long, env = "GLEANER_WEB_LISTEN", value_name = "ADDRESS:PORT", default_value = DEFAULT_LISTEN)]
    web_listen: SocketAddr,
    #[command(flatten)]
    dial: DialArgs,
    #[command(flatten)]
    end: ShutdownArgs,
}

/// Serves the pages until shutdown.
pub(crate) async fn run(args: Args) -> Result<()> {
    let shutdown = process::shutdown_signal(args.end.exit_with_stdin)?;
    let listener = process::bind(args.web_listen, "--web-listen").await?;
    let dial = args.dial.dial()?;
    note(format!("pages of {dial} at http://{}; Ctrl-C ends them", listener.local_addr()?));
    serve(listener, Cluster::over(&dial), shutdown).await
}

/// Serves the pages of a cluster at `listener` until `shutdown`.
///
/// # Errors
/// If the listener fails.
pub(crate) async fn serve(listener: TcpListener, cluster: Cluster, shutdown: CancellationToken) -> Result<()> {
    let router = router(Source::new(cluster));
    Ok(axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await?)
}

fn router(source: Source) -> Router {
    let asset = |kind: &'static str, text: &'static str| {
        let headers = [(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-cache")];
        get(move || ready((headers, text)))
    };
    Router::new()
        .route("/", get(home::page))
        .route("/datasets/{name}", get(dataset::page))
        .route("/datasets/{name}/urls", get(dataset::urls))
        .route("/datasets/{name}/pictures/{version}/{shard}/{split}/{block}/{file}", get(pictures::picture))
        .route("/runs/{name}", get(run::page))
        .route("/runs/{name}/logs", get(run::logs))
        .route("/compare", get(compare::page))
        .route("/style.css", asset("text/css; charset=utf-8", include_str!("web/style.css")))
        .route("/live.js", asset("text/javascript; charset=utf-8", include_str!("web/live.js")))
        .route("/icon.svg", asset("image/svg+xml", include_str!("web/icon.svg")))
        .fallback(|| ready(page::missing("there is no such page")))
        .with_state(source)
        .layer(from_fn(guard))
}

/// Answers only those who asked for this machine by its address, and tells the browser to trust nothing else.
async fn guard(request: Request<Body>, next: Next) -> Response {
    let mut response = match is_own(request.headers()) {
        true => next.run(request).await,
        false => {
            let text =
                "ask for these pages by address, or as localhost: another site's name might lead here to read them\n";
            (StatusCode::MISDIRECTED_REQUEST, text).into_response()
        }
    };
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value: &'static str| headers.insert(name, HeaderValue::from_static(value));
    set(CONTENT_SECURITY_POLICY, POLICY);
    set(X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(REFERRER_POLICY, "no-referrer");
    response
}

/// Whether a request names no host but this machine: by an address or as localhost. Any other name may be one that its owner has
/// pointed here, so that a page of his can read what is answered (DNS rebinding).
fn is_own(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST).and_then(|host| host.to_str().ok()) else { return false };
    let name = host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(host, |(name, _)| name);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

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
