//! The simulated world: its clock, the order of events, the network, what goes wrong, and what must hold in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::Hasher;
use std::sync::Arc;

use proto::site::{Budget, Named, Sites};
use tokio::runtime::Runtime;
use tokio::time::Instant;
use twox_hash::XxHash64;

use super::cluster::Coordinator;
use super::large::Counts;
use super::origin::{Origin, Terms};
use super::store::Disk;
use super::worker::Worker;
use super::{Bug, MILLI, Micros, SECOND};

/// For how long things go wrong.
const TROUBLE: Micros = 600 * SECOND;
/// After that nothing may go on for so long without a shard that is committed.
const PATIENCE: Micros = 2 * 3600 * SECOND;

pub(super) type Event = Box<dyn FnOnce(&mut Sim)>;

/// How large it is.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) lease: Micros,
    pub(super) connections: usize,
    pub(super) slice_urls: u32,
    /// Each dataset's list.
    pub(super) lists: Vec<Vec<String>>,
}

pub(super) struct Sim {
    pub(super) seed: u64,
    pub(super) bug: Bug,
    pub(super) plan: Plan,
    pub(super) now: Micros,
    queue: BTreeMap<(Micros, u64), Event>,
    events: u64,
    pub(super) random: fastrand::Rng,
    trace: XxHash64,
    prints: bool,
    pub(super) runtime: Runtime,
    /// What workers' clocks count from.
    pub(super) base: Instant,
    pub(super) disk: Arc<Disk>,
    pub(super) origin: Origin,
    pub(super) sites: Sites,
    pub(super) coordinators: BTreeMap<u64, Coordinator>,
    pub(super) workers: Vec<Worker>,
    /// Of each site, each worker's slots and until when it may use them.
    pub(super) parts: BTreeMap<String, BTreeMap<usize, (u32, Micros)>>,
    /// When a shard was committed last.
    pub(super) committed: Micros,
    /// Datasets that are there.
    pub(super) created: BTreeSet<usize>,
    /// It is a large one.
    pub(super) counts: Option<Counts>,
    /// Nothing goes wrong any more.
    pub(super) calm: bool,
    /// How often what went wrong.
    pub(super) done: BTreeMap<&'static str, u64>,
    /// The longest recovery, in milliseconds.
    pub(super) recovery_ms: u64,
    /// What must not be.
    pub(super) wrong: Vec<String>,
}

impl Sim {
    pub(super) fn new(seed: u64, bug: Bug) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut sites, mut named) = (BTreeMap::new(), Vec::new());
        for n in 0..random.usize(3..8) {
            let (name, slots) = (format!("s{n}.test"), random.u32(1..6));
            let rate = if random.u32(..4) == 0 { 0.0 } else { f64::from(random.u32(2..40)) };
            let bears = if random.u32(..3) == 0 { f64::from(random.u32(1..8)) } else { 1e6 };
            let slowest = if random.u32(..5) == 0 { 6 * SECOND } else { 300 * MILLI };
            sites.insert(name.clone(), Terms { slots, rate, bears, slowest });
            named.push(Named { names: vec![name], budget: Budget { slots, rate, borne: random.bool() } });
        }
        let names: Vec<String> = sites.keys().cloned().collect();
        let list = |random: &mut fastrand::Rng, of: usize| {
            let url = |n: usize, random: &mut fastrand::Rng| {
                // One site has many, others few.
                let site = if random.bool() { 0 } else { random.usize(..names.len()) };
                format!("http://h{}.{}/{of}/{n}", random.u32(..2), names[site])
            };
            (0..random.usize(40..160)).map(|n| url(n, random)).collect()
        };
        let lists = (0..random.usize(1..3)).map(|of| list(&mut random, of)).collect();
        let (connections, slice_urls) = (random.usize(2..9), random.u32(8..40));
        let plan = Plan { lease: random.u64(5..31) * SECOND, connections, slice_urls, lists };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build();
        Self {
            seed,
            bug,
            plan,
            now: 0,
            queue: BTreeMap::new(),
            events: 0,
            trace: XxHash64::with_seed(0),
            prints: std::env::var_os("TRACE").is_some(),
            runtime: runtime.expect("a runtime"),
            base: Instant::now(),
            disk: Disk::new(seed, bug == Bug::Overwrites),
            origin: Origin::new(seed, sites),
            sites: Sites::new(Budget::default(), named),
            coordinators: BTreeMap::new(),
            workers: (0..random.usize(2..6)).map(Worker::absent).collect(),
            random,
            parts: BTreeMap::new(),
            committed: 0,
            created: BTreeSet::new(),
            counts: None,
            calm: false,
            done: BTreeMap::new(),
            recovery_ms: 0,
            wrong: Vec::new(),
        }
    }

    /// Lets it all happen.
    pub(super) fn run(&mut self) {
        self.start_coordinator();
        for n in 0..self.plan.lists.len() {
            self.at(n as u64 * 60 * SECOND, move |sim| sim.create(n));
        }
        self.run_until(|sim| sim.calm && sim.is_done());
    }

    pub(super) fn run_until(&mut self, is_done: impl Fn(&Self) -> bool) {
        self.supervise();
        (0..self.workers.len()).for_each(|w| self.start_worker(w));
        self.at(SECOND, Self::disturb);
        self.at(TROUBLE, Self::calm_down);
        while let Some(((at, _), event)) = self.queue.pop_first() {
            self.now = at;
            event(self);
            if is_done(self) {
                return;
            }
            if self.now > self.committed.max(TROUBLE) + PATIENCE {
                let stages = self.stages();
                return self.wrong.push(format!("it stands still: {stages:?}"));
            }
        }
    }

    /// Lets something happen after so long.
    pub(super) fn at(&mut self, delay: Micros, event: impl FnOnce(&mut Self) + 'static) {
        self.events += 1;
        self.queue.insert((self.now + delay, self.events), Box::new(event));
    }

    /// The same within a worker's process: not if that has ended by then, and later if it stands still.
    pub(super) fn later(&mut self, w: usize, delay: Micros, step: impl FnOnce(&mut Self) + 'static) {
        let life = self.workers[w].life;
        self.at(delay, move |sim| sim.within(w, life, Box::new(step)));
    }

    pub(super) fn within(&mut self, w: usize, life: u64, step: Event) {
        let worker = &self.workers[w];
        if worker.life != life {
            return;
        }
        match worker.still_until.checked_sub(self.now).filter(|left| *left > 0) {
            Some(left) => self.at(left, move |sim| sim.within(w, life, step)),
            None => step(self),
        }
    }

    /// Writes down what happens.
    pub(super) fn note(&mut self, what: fmt::Arguments<'_>) {
        let text = what.to_string();
        self.trace.write_u64(self.now);
        self.trace.write(text.as_bytes());
        if self.prints {
            println!("{:10.3} {text}", self.now as f64 / 1e6);
        }
    }

    pub(super) fn trace(&self) -> u64 {
        self.trace.finish()
    }

    /// How long a message is under way; None: it is lost.
    pub(super) fn travel(&mut self) -> Option<Micros> {
        let fast = self.random.u64(MILLI..20 * MILLI);
        match self.random.u32(..100) {
            _ if self.calm => Some(fast),
            0..3 => None,
            3..6 => Some(self.random.u64(100 * MILLI..8 * SECOND)),
            _ => Some(fast),
        }
    }

    /// One thing that goes wrong.
    fn disturb(&mut self) {
        if self.calm {
            return;
        }
        let w = self.random.usize(..self.workers.len());
        let long = self.random.u64(SECOND..2 * self.plan.lease);
        // Large clusters have more workers, and as many coordinators.
        let dice = self.random.u32(..if self.counts.is_some() { 600 } else { 100 });
        let dice = if dice < 100 { dice } else { dice % 60 };
        let what = match dice {
            0..22 => {
                self.kill_worker(w);
                "worker killed"
            }
            22..36 => {
                self.leave(w);
                "worker ended"
            }
            36..50 => {
                self.stand_still(w, long);
                "worker stopped"
            }
            50..60 => {
                self.workers[w].cut_until = self.now + long;
                "network cut"
            }
            60..70 => {
                self.kill_coordinators();
                "coordinator killed"
            }
            70..75 => {
                self.end_coordinators();
                "coordinator ended"
            }
            75..80 => {
                self.stop_coordinators(long);
                "coordinator stopped"
            }
            80..87 => {
                self.start_coordinator();
                "two coordinators"
            }
            87..91 => {
                let dies = self.random.i64(1..60);
                self.coordinators_die_after(dies);
                "coordinator dies as it writes"
            }
            91..96 => {
                let names = self.origin.names();
                let site = &names[self.random.usize(..names.len())];
                self.origin.goes_down(site, self.now + long);
                "site down"
            }
            _ => {
                let (n, pauses) = (self.random.usize(..self.plan.lists.len()), self.random.bool());
                self.control(n, pauses);
                "paused or resumed"
            }
        };
        *self.done.entry(what).or_default() += 1;
        self.note(format_args!("{what}: w{w}"));
        let pause = self.random.u64(SECOND..20 * SECOND) / if self.counts.is_some() { 10 } else { 1 };
        self.at(pause, Self::disturb);
    }

    fn calm_down(&mut self) {
        self.calm = true;
        self.disk.mend();
        (0..self.plan.lists.len()).for_each(|n| self.keep_resumed(n));
        self.note(format_args!("calm"));
    }
}
