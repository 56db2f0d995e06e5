//! Simulated workers: what decides is the real code (`hosts`, `pace`); what surrounds it does as the real one does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::{Attempt, DatasetSpec, Rejection, ShardId, keys, slice};
use tokio::time::Instant;

use super::cluster::{Answer, Call, Leased, Request, Response};
use super::fetch::{Flight, Job};
use super::large::{Load, Part};
use super::shard::{self, End, Entry};
use super::store::View;
use super::world::Sim;
use super::{Bug, MILLI, Micros, SECOND};
use crate::worker::hosts::{HostSignal, Hosts};

/// As in the worker's `lease` and `attempt`.
const CALL_TIMEOUT: Micros = 10 * SECOND;
const LAST_REQUESTS: Micros = 5 * SECOND;
const LONGEST_ATTEMPT: Micros = 900 * SECOND;
const LONGEST_WAIT: Micros = 300 * SECOND;
const LAST_PARTS: Micros = 2 * SECOND;
const LARGE_SITE_SHARDS: usize = 4;
const DRAINING_SHARDS: usize = 4;

type Then = Box<dyn FnOnce(&mut Sim, Option<Answer>, bool)>;

/// One machine, and the process that lives on it now.
pub(super) struct Worker {
    pub(super) name: String,
    /// Counts its processes: what one was to do, another does not.
    pub(super) life: u64,
    pub(super) up: bool,
    born: Micros,
    /// How fast its clock runs.
    rate: f64,
    pub(super) still_until: Micros,
    /// No coordinator can be reached until then.
    pub(super) cut_until: Micros,
    pub(super) view: Option<View>,
    pub(super) hosts: Hosts<Job>,
    pub(super) flights: BTreeMap<u64, Flight>,
    pub(super) made: BTreeMap<u64, Making>,
    pub(super) numbers: u64,
    calls: BTreeMap<u64, Then>,
    term: u64,
    pub(super) sequence: u64,
    pub(super) asking: bool,
    pub(super) ask_from: Micros,
    pub(super) wake_at: Option<Micros>,
    seeking: [bool; 2],
    pub(super) leaving: bool,
    /// In a large simulation: its attempts, and its parts of sites.
    pub(super) loads: BTreeMap<u64, Load>,
    pub(super) shares: BTreeMap<String, Part>,
}

/// An attempt.
pub(super) struct Making {
    id: ShardId,
    attempt: Attempt,
    spec: Arc<DatasetSpec>,
    large: bool,
    once: bool,
    entries: Vec<Entry>,
    pub(super) ends: BTreeMap<usize, End>,
    pub(super) unstarted: usize,
    /// Nothing else is begun until all of it is.
    starting: bool,
    pub(super) ending: bool,
    fetching: bool,
    uploaded: bool,
    /// Sites say that they are to be asked later.
    throttled: bool,
    began: Micros,
    pub(super) last: Micros,
}

impl Worker {
    pub(super) fn absent(n: usize) -> Self {
        Self {
            name: format!("w{n}"),
            life: 0,
            up: false,
            born: 0,
            rate: 1.0,
            still_until: 0,
            cut_until: 0,
            view: None,
            hosts: Hosts::new(Instant::now(), Arc::default(), 1),
            flights: BTreeMap::new(),
            made: BTreeMap::new(),
            numbers: 0,
            calls: BTreeMap::new(),
            term: 0,
            sequence: 0,
            asking: false,
            ask_from: 0,
            wake_at: None,
            seeking: [false; 2],
            leaving: false,
            loads: BTreeMap::new(),
            shares: BTreeMap::new(),
        }
    }
}

impl Making {
    pub(super) fn retries(&self) -> u32 {
        if self.once { 0 } else { self.spec.limits.retries }
    }
}

impl Sim {
    /// The time by a worker's clock.
    pub(super) fn local(&self, w: usize) -> Instant {
        let worker = &self.workers[w];
        let micros = (self.now - worker.born) as f64 * worker.rate;
        self.base + Duration::from_micros(worker.born + micros as u64)
    }

    /// When a worker's clock will say so.
    pub(super) fn when(&self, w: usize, at: Instant) -> Micros {
        let left = at.saturating_duration_since(self.local(w)).as_micros() as f64;
        self.now + (left / self.workers[w].rate).ceil() as Micros + 1
    }

    pub(super) fn start_worker(&mut self, w: usize) {
        if self.workers[w].up {
            return;
        }
        let life = self.workers[w].life + 1;
        let mut hosts = Hosts::new(self.base, Arc::default(), self.plan.connections);
        hosts.know(Arc::new(self.sites.clone()));
        self.workers[w] = Worker {
            name: format!("w{w}.{life}"),
            life,
            up: true,
            born: self.now,
            rate: 0.98 + self.random.f64() * 0.04,
            view: Some(View::new(&self.disk)),
            hosts,
            cut_until: self.workers[w].cut_until,
            ..Worker::absent(w)
        };
        match self.counts {
            Some(_) => self.keep_counting(w),
            None => self.keep_house(w),
        }
    }

    pub(super) fn kill_worker(&mut self, w: usize) {
        self.end_process(w);
        let pause = self.random.u64(SECOND / 10..8 * SECOND);
        self.at(pause, move |sim| sim.start_worker(w));
    }

    fn end_process(&mut self, w: usize) {
        let flights: Vec<u64> = self.workers[w].flights.keys().copied().collect();
        flights.into_iter().for_each(|flight| drop(self.close(w, flight)));
        // No step of this process happens any more.
        (self.workers[w].life, self.workers[w].up) = (self.workers[w].life + 1, false);
        self.workers[w].made.clear();
        self.workers[w].loads.clear();
        self.forget_speeds(w);
        for holders in self.parts.values_mut() {
            holders.remove(&w);
        }
    }

    pub(super) fn stand_still(&mut self, w: usize, long: Micros) {
        self.workers[w].still_until = self.now + long;
        self.origin.stands_still(w);
        self.still_counted(w, self.now + long);
    }

    /// It is told to end: it commits what it has, gives its parts back, and comes again as another process.
    pub(super) fn leave(&mut self, w: usize) {
        if !self.workers[w].up || std::mem::replace(&mut self.workers[w].leaving, true) {
            return;
        }
        self.later(w, 0, move |sim| {
            let made: Vec<u64> = sim.workers[w].made.keys().copied().collect();
            made.into_iter().for_each(|a| sim.end(w, a, LAST_REQUESTS));
            let loads: Vec<u64> = sim.workers[w].loads.keys().copied().collect();
            loads.into_iter().for_each(|n| sim.put_counted(w, n));
        });
    }

    /// Each second: what is idle asks for more, and what takes too long ends.
    fn keep_house(&mut self, w: usize) {
        let now = self.now;
        let idle = self.workers[w].flights.len() < self.plan.connections;
        let made = &mut self.workers[w].made;
        made.values_mut().for_each(|making| making.starting &= !idle);
        let late = |making: &Making| now > making.began + LONGEST_ATTEMPT || now > making.last + LONGEST_WAIT;
        let late: Vec<u64> = made.iter().filter(|(_, making)| late(making)).map(|(a, _)| *a).collect();
        late.into_iter().for_each(|a| self.end(w, a, 10 * SECOND));
        if self.workers[w].leaving && self.workers[w].made.is_empty() {
            // Parts that nothing uses are given back meanwhile.
            let deadline = self.now + LAST_PARTS;
            return self.depart(w, deadline);
        }
        self.seek(w, false);
        self.seek(w, true);
        self.later(w, SECOND, move |sim| sim.keep_house(w));
    }

    fn depart(&mut self, w: usize, deadline: Micros) {
        if self.now >= deadline || !self.workers[w].hosts.has_parts(self.local(w)) {
            return self.kill_worker(w);
        }
        self.later(w, 50 * MILLI, move |sim| sim.depart(w, deadline));
    }

    /// Asks a coordinator; `then` hears the answer, or whether it was a final refusal.
    pub(super) fn call(
        &mut self,
        w: usize,
        call: Call,
        timeout: Micros,
        then: impl FnOnce(&mut Self, Option<Answer>, bool) + 'static,
    ) {
        let worker = &mut self.workers[w];
        worker.numbers += 1;
        let (number, life) = (worker.numbers, worker.life);
        worker.calls.insert(number, Box::new(then));
        let request = Request { worker: worker.name.clone(), term_seen: worker.term, call };
        self.later(w, timeout, move |sim| sim.respond(w, number, Err(false)));
        let cut = self.workers[w].cut_until > self.now && !self.calm;
        // A request may arrive twice, and late.
        let copies = if self.random.u32(..50) == 0 && !self.calm { 2 } else { 1 };
        for _ in 0..copies {
            let (Some(there), Some(back)) = (self.travel(), self.travel()) else { continue };
            if cut {
                continue;
            }
            let request = request.clone();
            self.at(there, move |sim| {
                sim.arrive(request, move |sim, response| {
                    sim.at(back, move |sim| {
                        sim.within(w, life, Box::new(move |sim| sim.respond(w, number, response)));
                    });
                });
            });
        }
    }

    fn respond(&mut self, w: usize, number: u64, response: Response) {
        let Some(then) = self.workers[w].calls.remove(&number) else { return };
        match response {
            // That of a coordinator which another has replaced is refused.
            Ok((term, _)) if term < self.workers[w].term => then(self, None, false),
            Ok((term, answer)) => {
                self.workers[w].term = term;
                then(self, Some(answer), false);
            }
            Err(is_final) => then(self, None, is_final),
        }
    }

    pub(super) fn seek(&mut self, w: usize, large: bool) {
        let worker = &self.workers[w];
        let open = worker.made.values().filter(|making| making.large == large);
        let (starting, open) = (open.clone().filter(|making| making.starting).count(), open.count());
        let open = open + self.loads(w, large);
        let most = if self.counts.is_some() && !large {
            1
        } else if large {
            LARGE_SITE_SHARDS
        } else {
            1 + DRAINING_SHARDS
        };
        if worker.leaving || worker.seeking[usize::from(large)] || starting > 0 || open >= most {
            return;
        }
        self.workers[w].seeking[usize::from(large)] = true;
        self.call(w, Call::Lease { large }, CALL_TIMEOUT, move |sim, answer, _| {
            sim.workers[w].seeking[usize::from(large)] = false;
            if let Some(Answer::Lease(Some(lease))) = answer {
                match sim.counts {
                    Some(_) => sim.carry(w, lease),
                    None => sim.make(w, large, lease),
                }
            }
        });
    }

    /// Begins an attempt.
    fn make(&mut self, w: usize, large: bool, lease: Leased) {
        let Leased { id, attempt, duration, spec_json, once } = lease;
        let Some(view) = self.workers[w].view.clone() else { return };
        let Some(bytes) = self.runtime.block_on(shard::read(&view, &keys::slice(&id))) else { return };
        let text = slice::unpack(&bytes).expect("a slice");
        let entry = |entry: slice::Entry<'_>| Entry {
            key: entry.key,
            synset: entry.synset.to_owned(),
            url: entry.url.to_owned(),
        };
        let entries: Vec<Entry> = slice::entries(&text).map(|of| entry(of.expect("an entry"))).collect();
        let name = self.workers[w].name.clone();
        self.note(format_args!("{name} makes {} of {} as {attempt}", id.shard, id.dataset.name()));
        let now = self.local(w);
        let worker = &mut self.workers[w];
        worker.numbers += 1;
        let a = worker.numbers;
        for (n, entry) in entries.iter().enumerate() {
            let host = entry.url.split('/').nth(2).expect("a host").to_owned();
            let ticket = worker.hosts.ticket(large);
            let job = Job {
                attempt: a,
                entry: n,
                url: entry.url.clone(),
                host: host.clone(),
                ticket,
                started: false,
                tries: 0,
                throttled: 0,
                retried: None,
            };
            worker.hosts.push(now, &host, ticket, job);
        }
        let spec = DatasetSpec::from_json(&spec_json).expect("the coordinator's");
        let making = Making {
            id,
            attempt,
            spec: Arc::new(spec),
            large,
            once,
            unstarted: entries.len(),
            entries,
            ends: BTreeMap::new(),
            starting: true,
            ending: false,
            fetching: true,
            uploaded: false,
            throttled: false,
            began: self.now,
            last: self.now,
        };
        worker.made.insert(a, making);
        let duration = duration.as_micros() as Micros;
        self.later(w, duration / 3, move |sim| sim.renew(w, a, duration));
        if self.workers[w].leaving {
            self.end(w, a, LAST_REQUESTS);
        }
        self.dispatch(w);
    }

    fn renew(&mut self, w: usize, a: u64, duration: Micros) {
        let Some(making) = self.workers[w].made.get(&a) else { return };
        let (id, attempt, finished) = (making.id.clone(), making.attempt, making.ends.len() as u64);
        let call = Call::Renew { id, attempt, finished };
        self.call(w, call, CALL_TIMEOUT.min(duration), move |sim, answer, _| match answer {
            Some(Answer::Renewed(None)) => sim.cancel(w, a),
            Some(Answer::Renewed(Some(renewed))) => {
                if renewed.finish {
                    sim.end(w, a, LAST_REQUESTS);
                }
                let duration = renewed.duration.as_micros() as Micros;
                sim.later(w, duration / 3, move |sim| sim.renew(w, a, duration));
            }
            _ => {
                let pause = duration / 20 + sim.random.u64(..duration / 10);
                sim.later(w, pause, move |sim| sim.renew(w, a, duration));
            }
        });
    }

    /// The lease is over: nothing of the attempt counts, unless its files are there already.
    fn cancel(&mut self, w: usize, a: u64) {
        if self.workers[w].made.get(&a).is_none_or(|making| making.uploaded) {
            return;
        }
        let name = self.workers[w].name.clone();
        self.note(format_args!("{name} drops an attempt"));
        let now = self.local(w);
        self.workers[w].hosts.take_out(now, |job| job.attempt == a);
        self.cut(w, a);
        self.workers[w].made.remove(&a);
        self.dispatch(w);
    }

    /// Begins nothing more of an attempt, and cuts what is under way after a while.
    fn end(&mut self, w: usize, a: u64, rest: Micros) {
        let now = self.local(w);
        let Some(making) = self.workers[w].made.get_mut(&a).filter(|making| !making.ending && making.fetching) else {
            return;
        };
        (making.ending, making.starting) = (true, false);
        let Worker { hosts, made, leaving, .. } = &mut self.workers[w];
        let mut left = hosts.take_out(now, |job| job.attempt == a);
        let told = |job: &Job| job.retried.is_some_and(|end| end.outcome == Err(Rejection::Unfetched));
        let throttled = !*leaving && left.iter().any(told);
        made.get_mut(&a).into_iter().for_each(|making| making.throttled |= throttled);
        left.sort_by_key(|job| job.entry);
        left.into_iter().for_each(|job| self.finish(w, job, Rejection::Unfetched.into()));
        self.later(w, rest, move |sim| {
            if sim.workers[w].made.get(&a).is_some_and(|making| making.fetching) {
                sim.cut(w, a);
            }
        });
    }

    fn cut(&mut self, w: usize, a: u64) {
        let of = |(n, flight): (&u64, &Flight)| (flight.job.attempt == a).then_some(*n);
        let flights: Vec<u64> = self.workers[w].flights.iter().filter_map(of).collect();
        for flight in flights {
            let Some(Flight { pass, job, .. }) = self.close(w, flight) else { continue };
            self.give_back_cut(w, pass, HostSignal::Unknown);
            self.finish(w, job, Rejection::Unfetched.into());
        }
    }

    /// Takes note of a URL's end.
    pub(super) fn finish(&mut self, w: usize, mut job: Job, end: End) {
        self.start(w, &mut job);
        let now = self.now;
        let Some(making) = self.workers[w].made.get_mut(&job.attempt) else { return };
        let told = |retried: &End| match end.outcome {
            Err(Rejection::HostGivenUp) => true,
            Err(Rejection::Unfetched) => retried.outcome == end.outcome,
            _ => false,
        };
        making.ends.insert(job.entry, job.retried.filter(told).unwrap_or(end));
        match end.outcome {
            Err(Rejection::Unfetched) => making.throttled |= !making.ending,
            _ => making.last = now,
        }
        if making.ends.len() == making.entries.len() && making.fetching {
            making.fetching = false;
            let (a, pause) = (job.attempt, self.random.u64(20 * MILLI..4 * SECOND));
            self.later(w, pause, move |sim| sim.upload(w, a));
        }
    }

    pub(super) fn start(&mut self, w: usize, job: &mut Job) {
        let Some(making) = self.workers[w].made.get_mut(&job.attempt) else { return };
        if !std::mem::replace(&mut job.started, true) {
            making.unstarted -= 1;
            making.starting &= making.unstarted > 0;
        }
    }

    fn upload(&mut self, w: usize, a: u64) {
        let bug = self.bug;
        let Some(making) = self.workers[w].made.get_mut(&a) else { return };
        let unfetched = |end: &End| end.outcome == Err(Rejection::Unfetched);
        if making.ending && !making.throttled && making.ends.values().all(unfetched) {
            let (id, attempt) = (making.id.clone(), making.attempt);
            self.workers[w].made.remove(&a);
            let call = Call::Release { id, attempt, failure: None };
            return self.call(w, call, 3 * SECOND, |_, _, _| {});
        }
        let lost = |end: &End| bug == Bug::LosesTheRest && unfetched(end);
        let mut ended: Vec<(Entry, End)> = making.entries.iter().cloned().zip(making.ends.values().copied()).collect();
        ended.retain(|(_, end)| !lost(end));
        ended.sort_by_key(|(entry, _)| entry.key);
        let (id, attempt, spec) = (making.id.clone(), making.attempt, Arc::clone(&making.spec));
        making.uploaded = true;
        let (Some(view), name) = (self.workers[w].view.clone(), self.workers[w].name.clone()) else { return };
        let index = self.runtime.block_on(shard::upload(&view, &spec, (&id, attempt, &name), &ended));
        let Some(index) = index else { return };
        let pause = self.random.u64(MILLI..4 * SECOND);
        self.later(w, pause, move |sim| {
            let Some(stands) = sim.runtime.block_on(shard::commit(&view, &id, &index)) else { return };
            sim.committed = sim.now;
            sim.note(format_args!("{name} commits {} as {}", id.shard, stands.attempt));
            sim.complete(w, a, id);
        });
    }

    fn complete(&mut self, w: usize, a: u64, id: ShardId) {
        self.call(w, Call::Complete { id: id.clone() }, CALL_TIMEOUT, move |sim, answer, is_final| {
            if answer.is_some() || is_final || sim.workers[w].leaving {
                sim.workers[w].made.remove(&a);
                return;
            }
            let pause = sim.random.u64(200 * MILLI..5 * SECOND);
            sim.later(w, pause, move |sim| sim.complete(w, a, id));
        });
    }
}
