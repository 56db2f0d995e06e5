//! What a role's process serves over HTTP: `/metrics` for Prometheus, `/healthz` while it runs, `/readyz` while it can
//! do its work.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;
use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tracing::{info, warn};

use crate::{metered, process, tls};

/// What every role takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct MetricsArgs {
    /// Address and port at which /metrics, /healthz and /readyz are served over HTTP [default: they are not]
    #[arg(long, env = "GLEANER_METRICS_LISTEN", value_name = "ADDRESS:PORT")]
    metrics_listen: Option<SocketAddr>,
}

/// A role, as its metrics and probes show it.
pub(crate) struct Role {
    /// Its name.
    pub(crate) name: &'static str,
    /// Adds its metrics.
    pub(crate) register: fn(&mut Registry),
    /// Whether it can do its work.
    pub(crate) ready: fn() -> bool,
}

/// Serves in the background until the process ends, if there is an address to serve at.
///
/// # Errors
/// If the address cannot be had.
pub(crate) async fn serve(args: &MetricsArgs, role: Role) -> Result<()> {
    let Some(address) = args.metrics_listen else { return Ok(()) };
    let listener = process::bind(address, "--metrics-listen").await?;
    info!(address = %listener.local_addr()?, "metrics are served");
    let router = router(role);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            warn!(%error, "metrics are served no more");
        }
    });
    Ok(())
}

fn router(role: Role) -> Router {
    let mut registry = Registry::with_prefix("gleaner");
    let labels = [("role", role.name), ("version", env!("CARGO_PKG_VERSION"))];
    registry.register("build", "The role and version of this process", Info::new(labels));
    metered::register(&mut registry);
    tls::register(&mut registry);
    (role.register)(&mut registry);
    let registry = Arc::new(registry);
    let metrics = move || {
        let mut text = String::new();
        let status = match encode(&mut text, &registry) {
            Ok(()) => StatusCode::OK,
            Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        std::future::ready((status, [(CONTENT_TYPE, kind)], text))
    };
    let ready = move || {
        let (status, text) = match (role.ready)() {
            true => (StatusCode::OK, "ready\n"),
            false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        };
        std::future::ready((status, text))
    };
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| std::future::ready("ok\n")))
        .route("/readyz", get(ready))
}
