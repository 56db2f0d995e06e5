//! How a simulated worker asks sites, and for parts of their budgets: what `dispatch` does in the real one.

use std::time::Duration;

use proto::Rejection;

use super::cluster::{Answer, Call};
use super::origin;
use super::shard::End;
use super::world::Sim;
use super::{Bug, MILLI, Micros, SECOND};
use crate::worker::hosts::{GiveUp, HostSignal, Next, Pass};

/// As in `dispatch`.
const ASK_TIMEOUT: Micros = 5 * SECOND;
const ASK_PAUSE: Micros = 50 * MILLI;
const THROTTLED: u32 = 8;
/// Slow sites take longer for one request of six.
const TIMEOUT: Micros = 5 * SECOND;

/// A URL that has no end yet.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) attempt: u64,
    pub(super) entry: usize,
    pub(super) url: String,
    pub(super) host: String,
    pub(super) ticket: u64,
    pub(super) started: bool,
    pub(super) tries: u32,
    pub(super) throttled: u32,
    pub(super) retried: Option<End>,
}

/// A request under way.
pub(super) struct Flight {
    pub(super) pass: Pass,
    pub(super) job: Job,
    pub(super) request: u64,
}

impl Sim {
    /// Begins whatever may begin.
    pub(super) fn dispatch(&mut self, w: usize) {
        while self.workers[w].flights.len() < self.plan.connections {
            let now = self.local(w);
            match self.workers[w].hosts.next(now) {
                Next::Begin(pass, job) => self.fetch(w, pass, job),
                Next::GivenUp(job, why) => self.finish(w, job, why.into()),
                Next::Wait(at) => {
                    if let Some(at) = at {
                        let at = self.when(w, at);
                        self.wake(w, at);
                    }
                    break;
                }
            }
        }
        self.ask_if_due(w);
    }

    /// Looks again then.
    fn wake(&mut self, w: usize, at: Micros) {
        if self.workers[w].wake_at.is_some_and(|set| set <= at) {
            return;
        }
        self.workers[w].wake_at = Some(at);
        self.later(w, at - self.now, move |sim| {
            if sim.workers[w].wake_at == Some(at) {
                sim.workers[w].wake_at = None;
                sim.dispatch(w);
            }
        });
    }

    fn fetch(&mut self, w: usize, pass: Pass, mut job: Job) {
        self.start(w, &mut job);
        // Each worker may be in the middle of its pace.
        let margin = self.workers.len() as f64 + 1.0;
        let (site, url) = (pass.site.to_string(), job.url.clone());
        let request = self.origin.begin(self.now, &site, w, margin);
        let worker = &mut self.workers[w];
        worker.numbers += 1;
        let (flight, life) = (worker.numbers, worker.life);
        worker.flights.insert(flight, Flight { pass, job, request });
        let there = self.random.u64(MILLI..15 * MILLI);
        let slowest = self.origin.slowest(&site);
        let takes = self.random.u64(10 * MILLI..slowest);
        self.at(there, move |sim| {
            let answer = sim.origin.answer(sim.now, &site, &url);
            sim.at(takes, move |sim| {
                sim.origin.end(&site, request);
                sim.within(w, life, Box::new(move |sim| sim.answered(w, flight, answer)));
            });
        });
        self.watch_end(w, flight);
        self.later(w, TIMEOUT, move |sim| sim.time_out(w, flight));
    }

    /// Cuts a request when its worker's part of the site has ended.
    fn watch_end(&mut self, w: usize, flight: u64) {
        let now = self.local(w);
        let worker = &mut self.workers[w];
        let Some(pass) = worker.flights.get(&flight).map(|flight| &flight.pass) else { return };
        match worker.hosts.until(&pass.site) {
            Some(until) if until > now => {
                let at = self.when(w, until);
                self.later(w, at - self.now, move |sim| sim.watch_end(w, flight));
            }
            _ => {
                let Some(Flight { pass, job, .. }) = self.close(w, flight) else { return };
                self.workers[w].hosts.cut(now, pass, HostSignal::Unknown);
                self.queue(w, job, None);
                self.dispatch(w);
            }
        }
    }

    /// Ends a request that has had no answer for too long.
    fn time_out(&mut self, w: usize, flight: u64) {
        if self.is_cut_first(w, flight) {
            return;
        }
        let Some(Flight { pass, job, .. }) = self.close(w, flight) else { return };
        self.give_back_cut(w, pass, no_answer(&job));
        self.fail(w, job);
        self.dispatch(w);
    }

    /// A process that stood still sees first that its part has ended.
    fn is_cut_first(&mut self, w: usize, flight: u64) -> bool {
        let now = self.local(w);
        let worker = &self.workers[w];
        let Some(Flight { pass, .. }) = worker.flights.get(&flight) else { return false };
        let ended = worker.hosts.until(&pass.site).is_none_or(|until| until <= now);
        if ended {
            self.watch_end(w, flight);
        }
        ended
    }

    /// Closes the connection of a request; the site hears of it after a while.
    pub(super) fn close(&mut self, w: usize, flight: u64) -> Option<Flight> {
        let flight = self.workers[w].flights.remove(&flight)?;
        let (site, request) = (flight.pass.site.to_string(), flight.request);
        let there = self.random.u64(MILLI..15 * MILLI);
        self.at(there, move |sim| sim.origin.end(&site, request));
        Some(flight)
    }

    /// Gives back the place of a request that was cut.
    pub(super) fn give_back_cut(&mut self, w: usize, pass: Pass, signal: HostSignal) {
        let now = self.local(w);
        match self.bug {
            Bug::ForgetsWhatItCuts => self.workers[w].hosts.finish(now, pass, signal),
            _ => self.workers[w].hosts.cut(now, pass, signal),
        }
    }

    fn answered(&mut self, w: usize, flight: u64, answer: origin::Answer) {
        if self.is_cut_first(w, flight) {
            return;
        }
        let now = self.local(w);
        let worker = &mut self.workers[w];
        let Some(Flight { pass, mut job, .. }) = worker.flights.remove(&flight) else { return };
        let end = |outcome, status| End { outcome, status: Some(status) };
        match answer {
            origin::Answer::Picture => {
                worker.hosts.finish(now, pass, HostSignal::Answered);
                self.finish(w, job, end(Ok(()), 200));
            }
            origin::Answer::Gone => {
                worker.hosts.finish(now, pass, HostSignal::Answered);
                self.finish(w, job, end(Err(Rejection::NotFound), 404));
            }
            origin::Answer::TooMany(rest) => {
                worker.hosts.finish(now, pass, HostSignal::Throttled(Duration::from_micros(rest)));
                let given_up = worker.hosts.given_up(now, &job.host);
                let throttled = end(Err(Rejection::HttpStatus), 429);
                match job.throttled < THROTTLED {
                    true => {
                        job.throttled += 1;
                        job.retried = Some(end(Err(Rejection::Unfetched), 429));
                        match given_up {
                            Some(why) => self.finish(w, job, why.into()),
                            None => self.queue(w, job, None),
                        }
                    }
                    false => self.finish(w, job, throttled),
                }
            }
            origin::Answer::Nothing => {
                worker.hosts.finish(now, pass, no_answer(&job));
                self.fail(w, job);
            }
        }
        self.dispatch(w);
    }

    /// There was no answer: another try, or the end.
    fn fail(&mut self, w: usize, mut job: Job) {
        let making = self.workers[w].made.get(&job.attempt);
        let again = making.is_some_and(|making| job.tries < making.retries() && !making.ending);
        let failed = End::from(Rejection::Timeout);
        match again {
            true => {
                job.tries += 1;
                job.retried = Some(failed);
                let backoff = self.random.u64(SECOND / 2..SECOND) << job.tries.min(4);
                self.queue(w, job, Some(backoff));
            }
            false => self.finish(w, job, failed),
        }
    }

    /// Lets a URL wait for its host, and for a backoff before.
    fn queue(&mut self, w: usize, job: Job, backoff: Option<Micros>) {
        let now = self.local(w);
        let worker = &mut self.workers[w];
        let (host, ticket) = (job.host.clone(), job.ticket);
        match (worker.made.get(&job.attempt), backoff) {
            (None, _) => {}
            (Some(making), _) if making.ending => self.finish(w, job, Rejection::Unfetched.into()),
            (_, Some(backoff)) => worker.hosts.push_later(now, Duration::from_micros(backoff), &host, ticket, job),
            (_, None) => worker.hosts.push(now, &host, ticket, job),
        }
    }

    fn ask_if_due(&mut self, w: usize) {
        let now = self.local(w);
        if self.workers[w].asking {
            return;
        }
        let Some(at) = self.workers[w].hosts.ask_at(now) else { return };
        let at = if at <= now { self.now } else { self.when(w, at) };
        match at.max(self.workers[w].ask_from) {
            at if at > self.now => self.wake(w, at),
            _ => self.ask(w),
        }
    }

    /// Asks for parts of sites' budgets.
    fn ask(&mut self, w: usize) {
        let asked = self.local(w);
        let mut demands = self.workers[w].hosts.demands(asked);
        let held: Vec<(String, u32)> = demands.iter().map(|demand| (demand.site.clone(), demand.held)).collect();
        for (site, held) in &held {
            if let Some(part) = self.parts.get_mut(site).and_then(|holders| holders.get_mut(&w)) {
                part.0 = *held;
            }
        }
        if self.bug == Bug::ForgetsWhatItHolds {
            demands.iter_mut().for_each(|demand| demand.held = 0);
        }
        let worker = &mut self.workers[w];
        (worker.asking, worker.sequence) = (true, worker.sequence + 1);
        let call = Call::Share { sequence: worker.sequence, demands };
        self.call(w, call, ASK_TIMEOUT, move |sim, answer, _| {
            let now = sim.local(w);
            let worker = &mut sim.workers[w];
            worker.asking = false;
            let pause = match answer {
                Some(Answer::Shares(duration, shares)) => {
                    worker.hosts.lend(asked, now, duration, &shares);
                    for (site, _) in held {
                        let part = sim.workers[w].hosts.part(&site).filter(|(_, until)| *until > now);
                        let (slots, until) = part.map_or((0, sim.now), |(slots, until)| (slots, sim.when(w, until)));
                        sim.lent(w, site, slots, until);
                    }
                    ASK_PAUSE
                }
                _ => {
                    worker.hosts.unanswered(now);
                    sim.random.u64(100 * MILLI..SECOND)
                }
            };
            sim.workers[w].ask_from = sim.now + pause;
            sim.dispatch(w);
        });
    }

    /// Takes note of a part, and of parts that are too much together.
    pub(super) fn lent(&mut self, w: usize, site: String, slots: u32, until: Micros) {
        let budget = self.sites.budget(&site).slots;
        let holders = self.parts.entry(site.clone()).or_default();
        holders.insert(w, (slots, until));
        holders.retain(|_, (_, until)| *until > self.now);
        let out: u32 = holders.values().map(|(slots, _)| slots).sum();
        if self.counts.is_some() && out * self.origin.most_at_once.1 > self.origin.most_at_once.0 * budget {
            self.origin.most_at_once = (out, budget);
        }
        if out > budget {
            let at = self.now as f64 / 1e6;
            self.wrong.push(format!("{site}: {out} slots of {budget} are lent at {at:.3} s: {holders:?}"));
        }
    }
}

impl From<GiveUp> for End {
    fn from(why: GiveUp) -> Self {
        Self { outcome: Err(why.rejection()), status: (why == GiveUp::Throttled).then_some(429) }
    }
}

/// What a URL without an answer says of its host: once more it says nothing new.
fn no_answer(job: &Job) -> HostSignal {
    if job.retried.is_some() { HostSignal::Unknown } else { HostSignal::Failed }
}
