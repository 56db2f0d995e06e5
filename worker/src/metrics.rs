//! What a worker measures of itself. The names are stable: dashboards and alerts stand on them.

use std::sync::LazyLock;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::store;

/// One label: its name and value.
type Label = [(&'static str, &'static str); 1];

static OUTCOMES: LazyLock<Family<Label, Counter>> = LazyLock::new(Family::default);
static ATTEMPTS: LazyLock<Family<Label, Counter>> = LazyLock::new(Family::default);
static BYTES: LazyLock<Counter> = LazyLock::new(Counter::default);
static IN_FLIGHT: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static READY: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static ONLINE: LazyLock<Gauge> = LazyLock::new(Gauge::default);
// 10 ms to 41 s
static FETCH_SECONDS: LazyLock<Histogram> = LazyLock::new(|| Histogram::new(exponential_buckets(0.01, 2.0, 13)));
// 0.5 ms to 2 s
static DECODE_SECONDS: LazyLock<Histogram> = LazyLock::new(|| Histogram::new(exponential_buckets(0.0005, 2.0, 13)));

/// Adds the worker's metrics to those of the process.
pub fn register(registry: &mut Registry) {
    registry.register("worker_urls", "URLs by outcome: kept, or why not", OUTCOMES.clone());
    registry.register("worker_attempts", "Attempts at shards by how they ended", ATTEMPTS.clone());
    registry.register("worker_fetched_bytes", "Bytes of bodies that were fetched whole", BYTES.clone());
    registry.register("worker_urls_in_flight", "URLs that are being fetched or validated", IN_FLIGHT.clone());
    registry.register(
        "worker_fetch_seconds",
        "Time of a URL's requests, to its body or its rejection",
        FETCH_SECONDS.clone(),
    );
    registry.register(
        "worker_decode_seconds",
        "Time of one thread to validate, resize and encode a body",
        DECODE_SECONDS.clone(),
    );
    registry.register("worker_ready", "1: the coordinator's last response came", READY.clone());
    registry.register("worker_online", "1: it has a way out to the web", ONLINE.clone());
}

/// Whether the coordinator's last response came, there is a way out to the web, and the store has not failed for long.
pub fn ready() -> bool {
    READY.get() == 1 && ONLINE.get() == 1 && !store::fails()
}

/// There is a way out to the web, or is none.
pub(crate) fn online(yes: bool) {
    ONLINE.set(yes.into());
}

/// The coordinator has responded, or has not.
pub(crate) fn answered(yes: bool) {
    READY.set(yes.into());
}

/// A URL has its outcome.
pub(crate) fn outcome(name: &'static str) {
    OUTCOMES.get_or_create(&[("outcome", name)]).inc();
}

/// An attempt has ended: won, lost, cancelled or failed.
pub(crate) fn attempt(result: &'static str) {
    ATTEMPTS.get_or_create(&[("end", result)]).inc();
}

/// A URL was fetched: so many bytes, or none.
pub(crate) fn fetched(seconds: f64, bytes: usize) {
    FETCH_SECONDS.observe(seconds);
    BYTES.inc_by(bytes as u64);
}

/// A body was validated.
pub(crate) fn validated(seconds: f64) {
    DECODE_SECONDS.observe(seconds);
}

/// Counts a URL as in flight until it is dropped.
#[derive(Debug)]
pub(crate) struct InFlight(());

impl InFlight {
    pub(crate) fn begin() -> Self {
        IN_FLIGHT.inc();
        Self(())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        IN_FLIGHT.dec();
    }
}
