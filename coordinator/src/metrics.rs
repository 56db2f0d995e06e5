//! What a coordinator measures of the cluster. The names are stable: dashboards and alerts stand on them.

use std::collections::{BTreeMap, HashSet};
use std::sync::LazyLock;
use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type Labels = Vec<(&'static str, String)>;
type Gauges = LazyLock<Family<Labels, Gauge>>;
type Fractions = LazyLock<Family<Labels, Gauge<f64, AtomicU64>>>;

static READY: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static TERM: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static WORKERS: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static WANTED: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static SHARDS: Gauges = LazyLock::new(Family::default);
static TROUBLES: Gauges = LazyLock::new(Family::default);
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
static CONNECTIONS: LazyLock<Gauge> = LazyLock::new(Gauge::default);
static TURNED_AWAY: LazyLock<Family<Labels, Counter>> = LazyLock::new(Family::default);
static GRANTED: LazyLock<Counter> = LazyLock::new(Counter::default);
static OVER: LazyLock<Counter> = LazyLock::new(Counter::default);
static COMMITTED: LazyLock<Counter> = LazyLock::new(Counter::default);
static REFUSED: LazyLock<Family<Labels, Counter>> = LazyLock::new(Family::default);

/// Adds the coordinator's metrics to those of the process.
pub fn register(registry: &mut Registry) {
    registry.register("coordinator_ready", "1: the store is read, it answers, and requests are served", READY.clone());
    registry.register("coordinator_term", "The term of this coordinator", TERM.clone());
    registry.register("connections", "Connections that are open", CONNECTIONS.clone());
    registry.register("connections_refused", "Connections that were not let in, by reason", TURNED_AWAY.clone());
    registry.register("workers", "Workers that were heard of in the last minute", WORKERS.clone());
    registry.register("shards", "Shards that are not committed: waiting, or leased", SHARDS.clone());
    registry.register(
        "troubles",
        "Failures of workers and of the store that have not ended, by kind",
        TROUBLES.clone(),
    );
    registry.register("datasets", "Datasets by stage", DATASETS.clone());
    registry.register("leases_granted", "Leases that were granted in this term", GRANTED.clone());
    registry.register("leases_over", "Leases that ended without a commit: late, failed or given back", OVER.clone());
    registry.register("shards_committed", "Shards that were committed in this term", COMMITTED.clone());
    registry.register("calls_refused", "Calls that were not allowed, by their gRPC code", REFUSED.clone());
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

/// Whether requests are served, and the store answers.
pub fn ready() -> bool {
    READY.get() == 1
}

pub(crate) fn set_ready(yes: bool) {
    READY.set(yes.into());
}

/// A connection was let in (1), or is over (-1).
pub(crate) fn connections(change: i64) {
    CONNECTIONS.inc_by(change);
}

/// A connection was not let in, or not kept.
pub(crate) fn connection_refused(why: &str) {
    TURNED_AWAY.get_or_create(&vec![("reason", why.to_owned())]).inc();
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

pub(crate) fn refused(code: tonic::Code) {
    REFUSED.get_or_create(&vec![("code", format!("{code:?}"))]).inc();
}

/// What the cluster is like now.
#[derive(Debug)]
pub(crate) struct ClusterFigures {
    pub(crate) term: u64,
    pub(crate) shards_waiting: u64,
    pub(crate) shards_leased: u64,
    /// By stage.
    pub(crate) datasets: BTreeMap<&'static str, u64>,
    /// By kind.
    pub(crate) troubles: [(&'static str, u64); 4],
    pub(crate) workers: u64,
    pub(crate) devices_free: u64,
    pub(crate) devices_taken: u64,
    pub(crate) devices_wanted: u64,
    pub(crate) runs_by_state: Vec<(&'static str, u64)>,
    pub(crate) runs: Vec<RunFigures>,
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

/// Runs that have labels in the metrics.
#[derive(Debug, Default)]
pub(crate) struct Shown(HashSet<String>);

impl Shown {
    /// Sets the metrics, and takes out runs that are not among the figures any more.
    pub(crate) fn show(&mut self, figures: ClusterFigures) {
        TERM.set(number(figures.term));
        set(&SHARDS, "state", "waiting", figures.shards_waiting);
        set(&SHARDS, "state", "leased", figures.shards_leased);
        figures.datasets.into_iter().for_each(|(stage, n)| set(&DATASETS, "stage", stage, n));
        figures.troubles.into_iter().for_each(|(kind, n)| set(&TROUBLES, "kind", kind, n));
        WORKERS.set(number(figures.workers));
        set(&DEVICES, "state", "free", figures.devices_free);
        set(&DEVICES, "state", "taken", figures.devices_taken);
        WANTED.set(number(figures.devices_wanted));
        figures.runs_by_state.into_iter().for_each(|(state, n)| set(&RUNS, "state", state, n));
        let there: HashSet<String> = figures.runs.iter().map(|figures| figures.run.clone()).collect();
        figures.runs.into_iter().for_each(show_run);
        self.0.difference(&there).for_each(|run| forget(run));
        self.0 = there;
    }
}

fn show_run(figures: RunFigures) {
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

fn set(family: &Gauges, label: &'static str, value: &str, n: u64) {
    family.get_or_create(&vec![(label, value.to_owned())]).set(number(n));
}

fn of_run(run: &str, label: &'static str, value: &str) -> Labels {
    vec![("run", run.to_owned()), (label, value.to_owned())]
}

fn number(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
