//! Simulated coordinators: the real code, called as its services call it, over a simulated store and clock.

use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::FutureExt;
use proto::control::Decision;
use proto::handover::Handover;
use proto::pb::{FailureKind, SiteDemand, SiteShare};
use proto::{Attempt, DatasetId, DatasetSpec, ShardId};

use super::store::View;
use super::world::Sim;
use super::{Bug, Micros, SECOND};
use crate::catalog::{Catalog, RoundStart};
use crate::clock::Clock;
use crate::datasets::control::Wanted;
use crate::datasets::rounds::put_slices;
use crate::datasets::{Datasets, Renewed, Report, Stage};
use crate::error::Error;
use crate::list::ListOptions;
use crate::service::fetch;
use crate::store::Store;
use crate::term::Term;
use crate::{cluster, handover};

/// A process.
pub(super) struct Coordinator {
    pub(super) datasets: Arc<Datasets>,
    term: Arc<Term>,
    view: View,
    clock: Arc<AtomicU64>,
    started: Micros,
    /// How fast its clock runs.
    rate: f64,
    still_until: Micros,
}

/// What a worker asks.
#[derive(Debug, Clone)]
pub(super) enum Call {
    Lease { large: bool },
    Renew { id: ShardId, attempt: Attempt, finished: u64 },
    Release { id: ShardId, attempt: Attempt, failure: Option<FailureKind> },
    Complete { id: ShardId },
    Share { sequence: u64, demands: Vec<SiteDemand> },
}

/// A call with what every call has.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) worker: String,
    pub(super) term_seen: u64,
    pub(super) call: Call,
}

#[derive(Debug, Clone)]
pub(super) enum Answer {
    Lease(Option<Leased>),
    Renewed(Option<Renewed>),
    Done,
    Shares(Duration, Vec<SiteShare>),
}

/// A lease.
#[derive(Debug, Clone)]
pub(super) struct Leased {
    pub(super) id: ShardId,
    pub(super) attempt: Attempt,
    pub(super) duration: Duration,
    pub(super) spec_json: String,
    pub(super) once: bool,
}

/// What comes back, with the term; or whether the same call would be refused again.
pub(super) type Response = Result<(u64, Answer), bool>;

impl Coordinator {
    pub(super) fn set_clock(&self, now: Micros) {
        self.clock.store(((now - self.started) as f64 * self.rate) as u64, Ordering::Relaxed);
    }

    /// As the services do.
    async fn serve(&self, Request { worker, term_seen, call }: Request) -> Result<Answer, Error> {
        let datasets = &self.datasets;
        self.term.observe(term_seen)?;
        Ok(match call {
            Call::Lease { large } => {
                let grant = datasets.grant(&worker, large);
                Answer::Lease(grant.map(|grant| Leased {
                    id: grant.id,
                    attempt: grant.attempt,
                    duration: grant.duration,
                    spec_json: grant.spec_json,
                    once: grant.once,
                }))
            }
            Call::Renew { id, attempt, finished } => {
                let outcomes = [(Ok(()), finished)].into_iter().collect();
                Answer::Renewed(datasets.renew(&worker, &id, attempt, Report { outcomes, ..Report::default() })?)
            }
            Call::Release { id, attempt, failure } => {
                let failure = failure.map(|kind| (kind, "simulated".to_owned()));
                datasets.release(&worker, &id, attempt, failure)?;
                Answer::Done
            }
            Call::Complete { id } => {
                datasets.complete(&worker, &id, Vec::new()).await?;
                Answer::Done
            }
            Call::Share { sequence, demands } => {
                let demands: Vec<_> = demands.into_iter().map(fetch::demand).collect();
                let shares = datasets.share(&worker, sequence, &demands);
                let (shares, duration) = shares.ok_or_else(|| Error::Aborted("a later request came".to_owned()))?;
                Answer::Shares(duration, shares.into_iter().map(fetch::share).collect())
            }
        })
    }
}

impl Sim {
    /// Another process begins a term, as `run` does; it may die on the way.
    pub(super) fn start_coordinator(&mut self) {
        let view = View::new(&self.disk);
        let (store, clock) = (Store::new(Arc::new(view.clone())), Arc::new(AtomicU64::new(0)));
        let (lease, sites, bug) = (Duration::from_micros(self.plan.lease), self.sites.clone(), self.bug);
        let counts = self.counts.is_some();
        let began = std::time::Instant::now();
        let begin = async {
            cluster::identify(&store).await?;
            let term = Arc::new(Term::begin(&store, Clock::Simulated(Arc::clone(&clock))).await?);
            let before = handover::read(&store, term.number()).await?;
            let all_back = before.all_back || bug == Bug::LendsAtOnce;
            let before = Handover { all_back, ..before };
            let lists = (None, 1 << 20);
            let datasets = Datasets::new(store.clone(), Arc::clone(&term), lease, lists, sites, &before);
            if counts {
                datasets.seal_nothing();
            }
            datasets.recover().await?;
            anyhow::Ok((datasets, term))
        };
        let Ok((datasets, term)) = self.runtime.block_on(begin) else { return };
        self.recovery_ms = self.recovery_ms.max(began.elapsed().as_millis() as u64);
        let number = term.number();
        let rate = 0.98 + self.random.f64() * 0.04;
        let coordinator = Coordinator { datasets, term, view, clock, started: self.now, rate, still_until: 0 };
        self.coordinators.insert(number, coordinator);
        self.note(format_args!("term {number} begins"));
        self.settle(number);
        let period = (self.plan.lease / 10).clamp(SECOND / 20, SECOND);
        self.tick(number, period);
        self.check_term(number, self.plan.lease / 4);
    }

    /// Starts one if there is none.
    pub(super) fn supervise(&mut self) {
        if self.coordinators.is_empty() {
            self.start_coordinator();
        }
        self.at(SECOND, Self::supervise);
    }

    /// Ends leases, again and again.
    fn tick(&mut self, number: u64, period: Micros) {
        self.during(number, move |sim, coordinator| {
            sim.runtime.block_on(coordinator.datasets.end_leases_now());
            sim.at(period, move |sim| sim.tick(number, period));
        });
    }

    fn check_term(&mut self, number: u64, period: Micros) {
        self.during(number, move |sim, coordinator| {
            let _ = sim.runtime.block_on(coordinator.term.check(&coordinator.datasets.store));
            sim.at(period, move |sim| sim.check_term(number, period));
        });
    }

    /// Does something in a coordinator's process, if it is alive, once it does not stand still.
    fn during(&mut self, number: u64, step: impl FnOnce(&mut Self, &Coordinator) + 'static) {
        let Some(coordinator) = self.coordinators.remove(&number) else { return };
        match coordinator.still_until.checked_sub(self.now).filter(|left| *left > 0) {
            Some(left) => {
                self.coordinators.insert(number, coordinator);
                self.at(left, move |sim| sim.during(number, step));
            }
            None => {
                coordinator.set_clock(self.now);
                step(self, &coordinator);
                self.coordinators.insert(number, coordinator);
                self.settle(number);
            }
        }
    }

    /// Waits until what goes on by itself, sealing, has come to rest. Ends the process if its term is over or it has
    /// died.
    fn settle(&mut self, number: u64) {
        let Some(coordinator) = self.coordinators.get(&number) else { return };
        let began = std::time::Instant::now();
        let is_over = || coordinator.term.ended().now_or_never().is_some();
        let seals = || self.counts.is_none() && coordinator.datasets.stages()["sealing"] > 0;
        // One whose term is over, or who has died, tries in vain until its process ends.
        while seals() && !is_over() && !coordinator.view.is_dead() {
            assert!(began.elapsed() < Duration::from_secs(60), "seed {}: sealing never ends", self.seed);
            self.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(1)).await });
        }
        let over = is_over();
        if over || coordinator.view.is_dead() {
            self.kill_coordinator(number);
            self.note(format_args!("term {number} is over: fenced {over}"));
        }
    }

    fn kill_coordinator(&mut self, number: u64) {
        if let Some(coordinator) = self.coordinators.remove(&number) {
            // What still runs on threads has no store any more.
            coordinator.view.dies_after(0);
        }
    }

    pub(super) fn kill_coordinators(&mut self) {
        while let Some((&number, _)) = self.coordinators.first_key_value() {
            self.kill_coordinator(number);
        }
    }

    /// Ends them orderly: they leave word of what they have lent.
    pub(super) fn end_coordinators(&mut self) {
        for (_, coordinator) in std::mem::take(&mut self.coordinators) {
            coordinator.set_clock(self.now);
            let mut left = coordinator.datasets.handover(true);
            // It counts by the clock on the wall, which is not simulated.
            left.sites.values_mut().for_each(|site| site.quiet_until_millis = 0);
            if coordinator.still_until <= self.now {
                self.runtime.block_on(handover::write(&coordinator.datasets.store, &left));
            }
            coordinator.view.dies_after(0);
        }
    }

    pub(super) fn stop_coordinators(&mut self, long: Micros) {
        let until = self.now + long;
        self.coordinators.values_mut().for_each(|coordinator| coordinator.still_until = until);
    }

    pub(super) fn coordinators_die_after(&mut self, writes: i64) {
        self.coordinators.values().for_each(|coordinator| coordinator.view.dies_after(writes));
    }

    /// A request arrives at one of them, which answers to `then`.
    pub(super) fn arrive(&mut self, request: Request, then: impl FnOnce(&mut Self, Response) + 'static) {
        let there: Vec<u64> = self.coordinators.keys().copied().collect();
        if there.is_empty() {
            return then(self, Err(false));
        }
        let number = there[self.random.usize(..there.len())];
        self.during(number, move |sim, coordinator| {
            let answer = sim.runtime.block_on(coordinator.serve(request));
            let term = coordinator.term.number();
            let response = match answer {
                Ok(answer) => Ok((term, answer)),
                Err(Error::HeardHigher { seen, .. }) => {
                    sim.runtime.block_on(rise(coordinator, seen));
                    Err(false)
                }
                Err(error) => Err(matches!(
                    error,
                    Error::NotFound(_) | Error::Precondition(_) | Error::Denied(_) | Error::Invalid(_)
                )),
            };
            then(sim, response);
        });
    }

    /// Creates a dataset, tried until it is there.
    pub(super) fn create(&mut self, n: usize) {
        if self.created.contains(&n) {
            return;
        }
        self.at(10 * SECOND, move |sim| sim.create(n));
        let Some((&number, _)) = self.coordinators.first_key_value() else { return };
        let (name, request) = (format!("sim-{n}"), format!("request-{n}"));
        let id: DatasetId = format!("{name}-{:08x}", self.random.u32(..)).parse().expect("an id");
        let list: String = self.plan.lists[n].iter().map(|url| format!("n0200000{}\t{url}\n", url.len() % 3)).collect();
        let mut spec = DatasetSpec { slice_urls: self.plan.slice_urls, seed: self.seed, ..DatasetSpec::default() };
        self.during(number, move |sim, coordinator| {
            let datasets = &coordinator.datasets;
            let made = async {
                if datasets.by_request(&request).is_some() {
                    return Ok(());
                }
                datasets.catch_up(&name).await?;
                if datasets.by_request(&request).is_some() {
                    return Ok(());
                }
                let sites = Arc::clone(&datasets.sites);
                let made = put_slices(&datasets.store, &id, move |slices| {
                    let mut catalog = Catalog::new(&spec, RoundStart::first(&request), None, sites);
                    catalog.read("list", Cursor::new(list), &ListOptions::default())?;
                    let round = catalog.cut(&mut spec, slices)?;
                    Ok((spec, round))
                });
                let (spec, round) = made.await?;
                datasets.commit(&id, spec, round).await
            };
            if sim.runtime.block_on(made).is_ok() {
                sim.created.insert(n);
                sim.note(format_args!("dataset {n} is there"));
            }
        });
    }

    pub(super) fn control(&mut self, n: usize, pauses: bool) {
        let Some((&number, _)) = self.coordinators.first_key_value() else { return };
        let decision = Wanted::Decision(if pauses { Decision::Pause } else { Decision::Resume });
        self.during(number, move |sim, coordinator| {
            // It may be refused, as that of a dataset that is not there yet is.
            let _ = sim.runtime.block_on(coordinator.datasets.control(&format!("sim-{n}"), decision));
        });
    }

    /// Resumes a dataset, tried until that is decided.
    pub(super) fn keep_resumed(&mut self, n: usize) {
        self.control(n, false);
        self.at(60 * SECOND, move |sim| sim.keep_resumed(n));
    }

    /// The stages of the datasets that a coordinator knows.
    pub(super) fn stages(&self) -> Vec<Stage> {
        let last = self.coordinators.values().next_back();
        last.iter().flat_map(|last| last.datasets.all()).map(|(dataset, _)| dataset.stage).collect()
    }

    pub(super) fn is_done(&self) -> bool {
        let stages = self.stages();
        stages.len() == self.plan.lists.len()
            && stages.iter().all(|stage| matches!(stage, Stage::Ready | Stage::Failed(_)))
    }
}

/// Looks for a term of which it has heard, as `run` does.
async fn rise(coordinator: &Coordinator, heard: u64) {
    if let Ok(number) = coordinator.term.rise_above(heard, &coordinator.datasets.store).await {
        coordinator.datasets.rise(number);
        coordinator.term.rise(number);
    }
}
