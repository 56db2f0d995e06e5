//! What a trainer agent measures of itself. The names are stable: dashboards and alerts stand on them. What a run does
//! is told by the coordinator, which hears of all its ranks.

use std::sync::LazyLock;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

static READY: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static DEVICES: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static RANKS: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static STARTED: LazyLock<Counter> = LazyLock::new(Counter::default);
static LOST: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Adds the agent's metrics to those of the process.
pub fn register(registry: &mut Registry) {
    registry.register("trainer_ready", "1: the coordinator has welcomed this agent", READY.clone());
    registry.register("trainer_devices", "Devices that this agent offers", DEVICES.clone());
    registry.register("trainer_ranks", "Devices with a rank process on them", RANKS.clone());
    registry.register("trainer_ranks_started", "Rank processes that were started", STARTED.clone());
    registry.register("trainer_ranks_lost", "Rank processes that ended by themselves", LOST.clone());
}

/// Whether the coordinator has welcomed this agent.
pub fn ready() -> bool {
    READY.get() == 1
}

/// Devices with a rank on them.
pub fn ranks() -> u64 {
    RANKS.get().try_into().unwrap_or(0)
}

pub(crate) fn set_ready(yes: bool) {
    READY.set(yes.into());
}

pub(crate) fn set_devices(devices: usize, ranks: usize) {
    DEVICES.set(i64::try_from(devices).unwrap_or(i64::MAX));
    RANKS.set(i64::try_from(ranks).unwrap_or(i64::MAX));
}

pub(crate) fn rank_started() {
    STARTED.inc();
}

pub(crate) fn rank_lost() {
    LOST.inc();
}
