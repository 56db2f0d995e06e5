//! What a coordinator measures of the cluster. The names are stable: dashboards and alerts stand on them.

use std::collections::HashSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::runs::Runs;

/// How old what is told may be.
const PERIOD: Duration = Duration::from_secs(1);

type Labels = Vec<(&'static str, String)>;
type Gauges = LazyLock<Family<Labels, Gauge>>;
type Fractions = LazyLock<Family<Labels, Gauge<f64, AtomicU64>>>;

static READY: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static TERM: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static WORKERS: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static WANTED: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static SHARDS: Gauges = LazyLock::new(Family::default);
static DATASETS: Gauges = LazyLock::new(Family::default);
static DEVICES: Gauges = LazyLock::new(Family::default);
static RUNS: Gauges = LazyLock::new(Family::default);
static STEP: Gauges = LazyLock::new(Family::default);
static CHECKPOINT: Gauges = LazyLock::new(Family::default);
static GENERATION: Gauges = LazyLock::new(Family::default);
static RANKS: Gauges = LazyLock::new(Family::default);
static LOSS: Fractions = LazyLock::new(Family::default);
static TOP1: Fractions = LazyLock::new(Family::default);
static RATE: Fractions = LazyLock::new(Family::default);
static STEP_SECONDS: Fractions = LazyLock::new(Family::default);
static GRANTED: LazyLock<Counter> = LazyLock::new(Counter::default);
static OVER: LazyLock<Counter> = LazyLock::new(Counter::default);
static COMMITTED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Adds the coordinator's metrics to those of the process.
pub fn register(registry: &mut Registry) {
    registry.register("coordinator_ready", "1: the store is read and requests are served", READY.clone());
    registry.register("coordinator_term", "The term of this coordinator", TERM.clone());
    registry.register("workers", "Workers that were heard of in the last minute", WORKERS.clone());
    registry.register("shards", "Shards that are not committed: waiting, or leased", SHARDS.clone());
    registry.register("datasets", "Datasets by stage", DATASETS.clone());
    registry.register("leases_granted", "Leases that were granted in this term", GRANTED.clone());
    registry.register("leases_over", "Leases that ended without a commit: late, failed or given back", OVER.clone());
    registry.register("shards_committed", "Shards that were committed in this term", COMMITTED.clone());
    registry.register("devices", "Devices of connected agents: free, or with a rank on them", DEVICES.clone());
    registry.register("devices_wanted", "Devices that runs which have not ended would take", WANTED.clone());
    registry.register("runs", "Runs by state", RUNS.clone());
    registry.register("run_step", "Steps applied, of runs that have not ended", STEP.clone());
    registry.register("run_checkpoint_step", "Step of the newest checkpoint", CHECKPOINT.clone());
    registry.register("run_generation", "The run's generation: grows whenever ranks come or go", GENERATION.clone());
    registry.register("run_ranks", "Ranks of the run's generation", RANKS.clone());
    registry.register("run_loss", "Newest mean loss, over one step, an epoch, or the validation split", LOSS.clone());
    registry.register("run_top1", "Newest share of images whose label was the first guess", TOP1.clone());
    registry.register("run_images_per_second", "Of the newest step, over all ranks", RATE.clone());
    registry.register(
        "run_step_seconds",
        "Time of the newest step by part: waiting for data, and everything else",
        STEP_SECONDS.clone(),
    );
}

/// Whether requests are served.
pub fn ready() -> bool {
    READY.get() == 1
}

pub(crate) fn set_ready(yes: bool) {
    READY.set(yes.into());
}

pub(crate) fn lease_granted() {
    GRANTED.inc();
}

pub(crate) fn lease_over() {
    OVER.inc();
}

pub(crate) fn shard_committed() {
    COMMITTED.inc();
}

/// A run that has not ended.
#[derive(Debug)]
pub(crate) struct RunFigures {
    pub(crate) run: String,
    pub(crate) step: u64,
    pub(crate) checkpoint: u64,
    pub(crate) generation: u64,
    pub(crate) ranks: u32,
    /// The newest point of each kind.
    pub(crate) newest: Vec<proto::pb::Metric>,
}

/// Looks at the cluster, again and again.
pub(crate) async fn watch(runs: Arc<Runs>) {
    TERM.set(number(runs.term.number));
    let mut known = HashSet::new();
    let mut clock = tokio::time::interval(PERIOD);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        clock.tick().await;
        look(&runs, &mut known);
    }
}

fn look(runs: &Runs, known: &mut HashSet<String>) {
    let set = |family: &Gauges, label: &'static str, value: &str, n: u64| {
        family.get_or_create(&vec![(label, value.to_owned())]).set(number(n));
    };
    let shards = runs.datasets.totals();
    set(&SHARDS, "state", "waiting", shards.waiting.into());
    set(&SHARDS, "state", "leased", shards.leased.into());
    for (stage, n) in runs.datasets.stages() {
        set(&DATASETS, "stage", stage, n);
    }
    WORKERS.set(number(runs.datasets.workers().len() as u64));
    let (agents, ..) = runs.status();
    let devices = || agents.iter().flat_map(|agent| &agent.devices);
    let free = devices().filter(|device| device.occupant.is_empty()).count() as u64;
    set(&DEVICES, "state", "free", free);
    set(&DEVICES, "state", "taken", devices().count() as u64 - free);
    WANTED.set(number(runs.devices_wanted()));
    for (state, n) in runs.states() {
        set(&RUNS, "state", state, n);
    }
    let figures = runs.figures();
    let there: HashSet<String> = figures.iter().map(|figures| figures.run.clone()).collect();
    for figures in figures {
        let RunFigures { run, step, checkpoint, generation, ranks, newest } = figures;
        let ranks = u64::from(ranks);
        let numbers = [(&STEP, step), (&CHECKPOINT, checkpoint), (&GENERATION, generation), (&RANKS, ranks)];
        numbers.iter().for_each(|(family, n)| set(family, "run", &run, *n));
        for point in newest {
            let labels = of_run(&run, "kind", &point.kind);
            LOSS.get_or_create(&labels).set(point.loss);
            TOP1.get_or_create(&labels).set(point.top1);
            if point.kind == "step" && point.images_per_second > 0.0 {
                RATE.get_or_create(&vec![("run", run.clone())]).set(point.images_per_second);
                let seconds = point.samples as f64 / point.images_per_second;
                let data = seconds * point.data_wait;
                for (part, seconds) in [("data", data), ("compute", seconds - data)] {
                    STEP_SECONDS.get_or_create(&of_run(&run, "part", part)).set(seconds);
                }
            }
        }
    }
    for run in known.difference(&there) {
        forget(run);
    }
    *known = there;
}

/// Takes an ended run out, so that its labels do not stay for ever.
fn forget(run: &str) {
    let labels = vec![("run", run.to_owned())];
    for family in [&STEP, &CHECKPOINT, &GENERATION, &RANKS] {
        family.remove(&labels);
    }
    RATE.remove(&labels);
    for kind in ["step", "train", "validation", "test"] {
        LOSS.remove(&of_run(run, "kind", kind));
        TOP1.remove(&of_run(run, "kind", kind));
    }
    for part in ["data", "compute"] {
        STEP_SECONDS.remove(&of_run(run, "part", part));
    }
}

fn of_run(run: &str, label: &'static str, value: &str) -> Labels {
    vec![("run", run.to_owned()), (label, value.to_owned())]
}

fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
