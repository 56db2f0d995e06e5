//! A large cluster, of which URLs are only counted: a thousand workers, a hundred million URLs in ten thousand slices.
//! The coordinator's code and what it keeps in the store are real, but for rows, so nothing is sealed; the next round
//! is made of what the committed indexes say that nobody got to.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::index::StoredFile;
use proto::pb::SiteDemand;
use proto::round::{Cause, LargeSite, Round, Slice};
use proto::site::{Budget, FIRST_RATE};
use proto::{Attempt, DatasetId, DatasetSpec, Rejection, ShardId, ShardIndex, Stored, keys};

use super::cluster::{Answer, Call, Leased};
use super::shard;
use super::store::View;
use super::verdict::Verdict;
use super::world::Sim;
use super::{Bug, Micros, SECOND};
use crate::datasets::Stage;
use crate::sites::Deal;
use crate::store::Store;

const WORKERS: usize = 1_000;
pub(super) const SLICES: u32 = 10_000;
pub(super) const SLICE_URLS: u32 = 10_000;
/// Sites with slices of their own; together they have so many of them at the most.
const SITES: u32 = 300;
const LARGE_SLICES: u32 = 4_000;
/// Requests per second for each slot: how fast sites answer.
const BY_SLOT: f64 = 4.0;
const CALL_TIMEOUT: Micros = 10 * SECOND;

/// What a large simulation knows beside the small one.
#[derive(Debug, Default)]
pub(super) struct Counts {
    rounds: Vec<Round>,
    deal: Deal,
    /// It is not known yet to a coordinator.
    pending: bool,
    done: bool,
    /// URLs per second that each worker asks of each site, and until when.
    speeds: BTreeMap<String, BTreeMap<usize, (f64, Micros)>>,
}

/// An attempt of which URLs are counted.
#[derive(Debug)]
pub(super) struct Load {
    id: ShardId,
    attempt: Attempt,
    urls: u32,
    /// None: of many sites.
    site: Option<String>,
    through: f64,
    /// URLs per second, and since when.
    speed: f64,
    since: Micros,
    /// Its index is put.
    over: bool,
}

/// A worker's part of a site.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    slots: u32,
    of: u32,
    rate: f64,
    until: Micros,
}

impl Load {
    fn progress(&mut self, now: Micros) {
        let seconds = now.saturating_sub(self.since) as f64 / 1e6;
        self.through = (self.through + self.speed * seconds).min(self.urls.into());
        self.since = self.since.max(now);
    }
}

/// Simulates one, to its end.
pub(super) fn simulate(seed: u64) -> Verdict {
    let mut sim = Sim::new(seed, Bug::None);
    sim.counts = Some(Counts::default());
    sim.plan.lists = vec![Vec::new()];
    sim.plan.lease = 30 * SECOND;
    sim.sites = proto::site::Sites::new(Budget::default(), []);
    sim.workers = (0..WORKERS).map(super::worker::Worker::absent).collect();
    sim.start_coordinator();
    let id: DatasetId = "sim-0-1".parse().expect("an id");
    let round = first_round(&mut sim.random);
    sim.counts_mut().open(round.clone());
    while !sim.commit_counted(&id, &round) {}
    sim.at(SECOND, move |sim| sim.watch_rounds(id));
    sim.run_until(Sim::are_all_counted);
    sim.count()
}

fn round(number: u32, first_slice: u32, slices: Vec<u32>, large_sites: Vec<LargeSite>) -> Round {
    let urls = slices.iter().map(|urls| u64::from(*urls)).sum();
    let (new, again) = if number == 1 { (urls, 0) } else { (0, urls) };
    Round {
        format: 1,
        nonce: format!("round {number}"),
        request_id: format!("request {number}"),
        traceparent: String::new(),
        cause: if number == 1 { Cause::Request } else { Cause::MayComeBack },
        accepts_damage: false,
        round: number,
        first_slice,
        slices: slices.into_iter().map(|urls| Slice { urls, sha256: String::new(), once: false }).collect(),
        large_sites: Some(large_sites),
        first_key: 0,
        new_urls: new,
        keys: new,
        urls_per_class: BTreeMap::new(),
        retried: [(Err(Rejection::Unfetched), again)].into_iter().filter(|(_, urls)| *urls > 0).collect(),
        not_chosen: 0,
        known: 0,
        repeated: 0,
        several: 0,
        bad_lines: 0,
        bad_line_examples: Vec::new(),
    }
}

/// Of large sites a few have many slices, and many have few.
fn first_round(random: &mut fastrand::Rng) -> Round {
    let mut first_slice = SLICES - LARGE_SLICES;
    let mut sites = Vec::new();
    for n in 0..SITES {
        let slices = (60 / (n + 1)).max(random.u32(2..24)).min(SLICES - first_slice);
        if slices > 0 {
            sites.push(LargeSite { site: format!("large{n}.com"), first_slice, slices });
        }
        first_slice += slices;
    }
    round(1, 0, vec![SLICE_URLS; SLICES as usize], sites)
}

impl Counts {
    fn open(&mut self, round: Round) {
        self.rounds.push(round);
        self.deal = Deal::new(&self.rounds);
    }

    fn urls(&self, shard: u32) -> u32 {
        let of = |round: &Round| round.slices.get(shard.checked_sub(round.first_slice)? as usize).map(|of| of.urls);
        self.rounds.iter().find_map(of).expect("a slice of a round")
    }
}

impl Sim {
    fn counts_mut(&mut self) -> &mut Counts {
        self.counts.as_mut().expect("a large simulation")
    }

    fn are_all_counted(&self) -> bool {
        self.counts.as_ref().is_some_and(|counts| counts.done)
    }

    fn commit_counted(&mut self, id: &DatasetId, round: &Round) -> bool {
        let Some(coordinator) = self.coordinators.values().next() else {
            self.start_coordinator();
            return false;
        };
        let spec = DatasetSpec { slice_urls: SLICE_URLS, ..DatasetSpec::default() };
        let committed = coordinator.datasets.commit(id, spec, round.clone());
        self.runtime.block_on(committed).is_ok() || coordinator.datasets.find(id).is_ok()
    }

    /// When all is committed, opens a round for what nobody got to.
    fn watch_rounds(&mut self, id: DatasetId) {
        if self.counts_mut().pending {
            self.add_pending(&id);
        } else if self.stages().iter().any(|stage| matches!(stage, Stage::Sealing)) {
            let last = self.counts_mut().rounds.last().expect("the first").clone();
            let indexes = self.indexes(&id);
            let (mut mixed, mut sites) = (0, BTreeMap::<String, u64>::new());
            for (shard, index) in indexes.range(last.shards().start..) {
                let left = index.outcomes.of(Err(Rejection::Unfetched));
                match self.counts_mut().deal.site(*shard) {
                    Some(site) => *sites.entry(site.to_string()).or_default() += left,
                    None => mixed += left,
                }
            }
            self.note(format_args!("round {}: {mixed} and {} are left", last.round, sites.values().sum::<u64>()));
            let (mut slices, mut large) = (Vec::new(), Vec::new());
            let first = last.shards().end;
            let mut pack = |mut left: u64| {
                while left > 0 {
                    let urls = left.min(SLICE_URLS.into());
                    slices.push(urls as u32);
                    left -= urls;
                }
                first + slices.len() as u32
            };
            let mut begin = pack(mixed);
            for (site, left) in sites {
                let end = pack(left);
                if end > begin {
                    large.push(LargeSite { site, first_slice: begin, slices: end - begin });
                }
                begin = end;
            }
            if slices.is_empty() {
                self.counts_mut().done = true;
                return;
            }
            let next = round(last.round + 1, first, slices, large);
            self.counts_mut().open(next);
            self.counts_mut().pending = true;
            self.add_pending(&id);
        }
        self.at(5 * SECOND, move |sim| sim.watch_rounds(id));
    }

    fn add_pending(&mut self, id: &DatasetId) {
        let next = self.counts_mut().rounds.last().expect("the first").clone();
        let Some(coordinator) = self.coordinators.values().next_back() else { return };
        coordinator.set_clock(self.now);
        let added = self.runtime.block_on(coordinator.datasets.add_round(id, next, Duration::ZERO));
        self.counts_mut().pending = added.is_err();
    }

    pub(super) fn indexes(&self, id: &DatasetId) -> BTreeMap<u32, ShardIndex> {
        let view = View::new(&self.disk);
        let store = Store::new(Arc::new(view.clone()));
        let read = async {
            let mut all = BTreeMap::new();
            for key in store.list(&keys::indexes(id)).await.expect("it is tried often enough") {
                let json = shard::read(&view, &key).await.expect("it is listed");
                let index = ShardIndex::from_json(&json).expect("an index");
                all.insert(index.shard, index);
            }
            all
        };
        self.runtime.block_on(read)
    }

    /// Each few seconds of a worker.
    pub(super) fn keep_counting(&mut self, w: usize) {
        if self.workers[w].leaving && self.workers[w].loads.is_empty() {
            return self.later(w, 2 * SECOND, move |sim| sim.kill_worker(w));
        }
        self.seek(w, false);
        self.seek(w, true);
        // Whoever has nothing to do waits for long at its coordinator.
        let longest = if self.workers[w].loads.is_empty() { 30 * SECOND } else { 6 * SECOND };
        let pause = self.random.u64(longest / 2..longest);
        self.later(w, pause, move |sim| sim.keep_counting(w));
    }

    /// How many leases of a kind a worker has.
    pub(super) fn loads(&self, w: usize, large: bool) -> usize {
        self.workers[w].loads.values().filter(|load| load.site.is_some() == large && !load.over).count()
    }

    /// Begins an attempt.
    pub(super) fn carry(&mut self, w: usize, lease: Leased) {
        let Leased { id, attempt, duration, .. } = lease;
        let counts = self.counts_mut();
        let (urls, site) = (counts.urls(id.shard), counts.deal.site(id.shard).map(|site| site.to_string()));
        let speed = if site.is_some() { 0.0 } else { 20.0 + (w % 41) as f64 };
        let load = Load { id, attempt, urls, site, through: 0.0, speed, since: self.now, over: false };
        let worker = &mut self.workers[w];
        worker.numbers += 1;
        let n = worker.numbers;
        worker.loads.insert(n, load);
        let duration = duration.as_micros() as Micros;
        self.later(w, duration / 3, move |sim| sim.renew_counted(w, n, duration));
        self.look_at(w, n);
        self.ask_counted(w);
    }

    fn renew_counted(&mut self, w: usize, n: u64, duration: Micros) {
        let now = self.now;
        let Some(load) = self.workers[w].loads.get_mut(&n).filter(|load| !load.over) else { return };
        load.progress(now);
        let call = Call::Renew { id: load.id.clone(), attempt: load.attempt, finished: load.through as u64 };
        self.call(w, call, CALL_TIMEOUT.min(duration), move |sim, answer, _| match answer {
            Some(Answer::Renewed(None)) => {
                sim.workers[w].loads.retain(|of, load| *of != n || load.over);
            }
            answer => {
                let pause = if answer.is_some() { duration / 3 } else { duration / 10 };
                sim.later(w, pause, move |sim| sim.renew_counted(w, n, duration));
            }
        });
    }

    /// Looks whether all is through, now and when it will be.
    fn look_at(&mut self, w: usize, n: u64) {
        let now = self.now;
        let Some(load) = self.workers[w].loads.get_mut(&n).filter(|load| !load.over) else { return };
        load.progress(now);
        let left = f64::from(load.urls) - load.through;
        if left < 0.5 {
            return self.put_counted(w, n);
        }
        if load.speed > 0.0 {
            let at = ((left / load.speed) * 1e6) as Micros + 1;
            let speed = load.speed.to_bits();
            self.later(w, at, move |sim| {
                let there = sim.workers[w].loads.get(&n).map(|load| load.speed.to_bits());
                if there == Some(speed) {
                    sim.look_at(w, n);
                }
            });
        }
    }

    /// Commits what is through, and the rest as `unfetched`.
    pub(super) fn put_counted(&mut self, w: usize, n: u64) {
        let now = self.now;
        let name = self.workers[w].name.clone();
        let Some(load) = self.workers[w].loads.get_mut(&n).filter(|load| !load.over) else { return };
        load.progress(now);
        let through = (load.through + 0.5) as u64;
        let (left, gone) = (u64::from(load.urls) - through, through / 7);
        load.over = true;
        let counts = [(Ok(()), through - gone), (Err(Rejection::NotFound), gone), (Err(Rejection::Unfetched), left)];
        let (id, attempt) = (load.id.clone(), load.attempt);
        let file = StoredFile { key: keys::outcomes(&id, attempt), bytes: 0, sha256: String::new() };
        let index = ShardIndex {
            version: 1,
            nonce: format!("{attempt}-{name}"),
            writer: name,
            shard: id.shard,
            attempt,
            outcomes: counts.into_iter().filter(|(_, urls)| *urls > 0).collect(),
            tars: BTreeMap::new(),
            outcomes_file: Some(file),
        };
        let Some(view) = self.workers[w].view.clone() else { return };
        let pause = self.random.u64(..SECOND);
        self.later(w, pause, move |sim| {
            let Some(stands) = sim.runtime.block_on(shard::commit(&view, &id, &index)) else { return };
            sim.committed = sim.now;
            sim.note(format_args!("{} commits {} as {}", index.writer, id.shard, stands.attempt));
            sim.complete_counted(w, n, id);
        });
    }

    fn complete_counted(&mut self, w: usize, n: u64, id: ShardId) {
        self.call(w, Call::Complete { id: id.clone() }, CALL_TIMEOUT, move |sim, answer, is_final| {
            if answer.is_none() && !is_final && !sim.workers[w].leaving {
                return sim.later(w, 2 * SECOND, move |sim| sim.complete_counted(w, n, id));
            }
            sim.workers[w].loads.remove(&n);
            sim.ask_counted(w);
        });
    }

    /// Asks for parts of all sites of which it has slices, and gives the others back.
    fn ask_counted(&mut self, w: usize) {
        if std::mem::replace(&mut self.workers[w].asking, true) {
            return;
        }
        let now = self.now;
        let worker = &mut self.workers[w];
        let wanted = |site: &String| worker.loads.values().any(|load| load.site.as_ref() == Some(site) && !load.over);
        let of_loads = worker.loads.values().filter(|load| !load.over).filter_map(|load| load.site.clone());
        let mut sites: Vec<String> = of_loads.chain(worker.shares.keys().cloned()).collect();
        sites.sort();
        sites.dedup();
        let demand = |site: &String| {
            let wanted = wanted(site);
            let part = worker.shares.get(site).filter(|part| part.until > now && wanted);
            SiteDemand {
                site: site.clone(),
                held: part.map_or(0, |part| part.slots),
                wanted,
                requests_per_second: part.map_or(FIRST_RATE, |part| part.rate),
                known: false,
                quiet_millis: 0,
            }
        };
        let demands: Vec<SiteDemand> = sites.iter().map(demand).collect();
        let held: Vec<(String, u32)> = demands.iter().map(|demand| (demand.site.clone(), demand.held)).collect();
        if demands.is_empty() {
            worker.asking = false;
            return;
        }
        for (site, held) in &held {
            if *held == 0 {
                self.workers[w].shares.remove(site);
                self.speed_up(w, site);
            }
            if let Some(part) = self.parts.get_mut(site).and_then(|holders| holders.get_mut(&w)) {
                part.0 = *held;
            }
        }
        self.workers[w].sequence += 1;
        let call = Call::Share { sequence: self.workers[w].sequence, demands };
        self.call(w, call, 5 * SECOND, move |sim, answer, _| {
            sim.workers[w].asking = false;
            let mut pause = SECOND;
            if let Some(Answer::Shares(duration, shares)) = answer {
                pause = duration.as_micros() as Micros / 3;
                let until = now + duration.as_micros() as Micros;
                for ((site, held), share) in held.into_iter().zip(&shares) {
                    // The part that it named may have ended before the answer came.
                    let lent = sim.workers[w].shares.get(&site).is_some_and(|part| part.until > sim.now);
                    let slots = share.slots.max(if lent { held } else { 0 });
                    // It bears whatever its budget allows: a rate that was made use of doubles.
                    let rate = if held > 0 { share.requests_per_second * 2.0 } else { share.requests_per_second };
                    let rate = rate.min(share.site_requests_per_second);
                    if slots > 0 {
                        let part = Part { slots, of: share.site_slots, rate, until };
                        sim.workers[w].shares.insert(site.clone(), part);
                    }
                    sim.lent(w, site.clone(), slots, until);
                    sim.speed_up(w, &site);
                    if slots == 0 {
                        pause = pause.min(SECOND);
                    }
                }
                sim.later(w, until.saturating_sub(sim.now), move |sim| sim.end_parts(w));
            }
            sim.later(w, pause, move |sim| sim.ask_counted(w));
        });
    }

    /// Ends parts whose time is over.
    fn end_parts(&mut self, w: usize) {
        let now = self.now;
        let over = self.workers[w].shares.iter().filter(|(_, part)| part.until <= now);
        let over: Vec<String> = over.map(|(site, _)| site.clone()).collect();
        for site in over {
            self.workers[w].shares.remove(&site);
            self.speed_up(w, &site);
        }
    }

    /// A part of a site has changed, and with it the speed of its slices.
    fn speed_up(&mut self, w: usize, site: &str) {
        let now = self.now;
        let worker = &mut self.workers[w];
        let part = worker.shares.get(site).copied();
        let of_site = |load: &&mut Load| load.site.as_deref() == Some(site) && !load.over;
        let loads = worker.loads.values_mut().filter(|load| of_site(load)).count();
        let all = part.map_or(0.0, |part| {
            let slots = f64::from(part.slots);
            (slots * BY_SLOT).min(part.rate * slots / f64::from(part.of))
        });
        let until = part.map_or(0, |part| part.until);
        self.note_speed(w, site, (all, until));
        let worker = &mut self.workers[w];
        let mut changed = Vec::new();
        for (n, load) in worker.loads.iter_mut() {
            if load.site.as_deref() == Some(site) && !load.over {
                load.progress(now);
                load.speed = all / loads as f64;
                changed.push(*n);
            }
        }
        changed.into_iter().for_each(|n| self.look_at(w, n));
    }

    /// Takes note of how fast all workers ask a site.
    fn note_speed(&mut self, w: usize, site: &str, speed: (f64, Micros)) {
        let (now, rate) = (self.now, self.sites.budget(site).rate);
        let speeds = self.counts_mut().speeds.entry(site.to_owned()).or_default();
        speeds.retain(|_, (_, until)| *until > now);
        speeds.insert(w, speed);
        let all: f64 = speeds.values().map(|(speed, _)| speed).sum();
        if all * self.origin.most_per_second.1 > self.origin.most_per_second.0 * rate {
            self.origin.most_per_second = (all, rate);
        }
        if all > rate * 1.001 {
            self.wrong.push(format!("{site}: {all:.1}/s of {rate}/s at {:.3} s", now as f64 / 1e6));
        }
    }

    /// What a process has asked for it asks for no more.
    pub(super) fn forget_speeds(&mut self, w: usize) {
        let speeds = self.counts.iter_mut().flat_map(|counts| counts.speeds.values_mut());
        speeds.for_each(|speeds| speeds.retain(|of, _| *of != w));
    }

    /// A worker stands still: nothing gets through meanwhile.
    pub(super) fn still_counted(&mut self, w: usize, until: Micros) {
        let now = self.now;
        for load in self.workers[w].loads.values_mut() {
            load.progress(now);
            load.since = until;
        }
    }
}
