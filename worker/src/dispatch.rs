//! Hands the worker's connections to the URLs of all its attempts, as their hosts have room, and keeps the shares of
//! hosts that the coordinator grants.
//!
//! An attempt hands in all its URLs at once ([`Dispatcher::batch`]) and gets a result for each. A URL that waits for
//! its host or for a backoff holds no connection meanwhile.

mod batch;
mod files;
mod pieces;
mod slot;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, ready};
use std::time::Duration;

use backon::BackoffBuilder;
use proto::site::Sites;
use proto::{DatasetSpec, Limits};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

pub(crate) use self::batch::{Batch, ConnectionPermit, FetchResult, SliceEntry};
use self::batch::{Job, Shared};
use self::slot::HostSlot;
use crate::backoff::backoff;
use crate::fetch::{Fetcher, Request, ResponseInfo};
use crate::hosts::{Hosts, Next};
use crate::lease::Coordinator;
use crate::metrics::InFlight;
use crate::opt_out::{KnownSites, Respect};
use crate::way_out::WayOut;

/// For one call that asks for parts of sites' budgets.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two calls, however many sites there are to ask for meanwhile.
const ASK_PAUSE: Duration = Duration::from_millis(50);
/// For parts of sites' budgets to be given back at the end of the process.
const LAST_PARTS: Duration = Duration::from_secs(2);
/// A URL that was throttled so often, when others of its host were not, is tried no more.
const THROTTLED: u32 = 8;
/// Probes are asked so many at once: one that answers is enough.
const PROBES_AT_ONCE: usize = 3;
/// If there were connections to spare for so long, another shard is asked for.
const IDLE: Duration = Duration::from_secs(1);

/// One per process.
#[derive(Debug)]
pub(crate) struct Dispatcher {
    fetcher: Fetcher,
    /// What sites say may be taken from them.
    sites: Arc<KnownSites>,
    way_out: Arc<WayOut>,
    hosts: Mutex<Hosts<Job>>,
    /// One permit per URL in flight, until its body is validated.
    connections: Arc<Semaphore>,
    /// A URL may have become ready to be fetched.
    changed: Notify,
    /// A host is brokered for which the coordinator was not asked yet.
    ask: Notify,
    /// There have been connections to spare for a while.
    idle: Notify,
    /// There are new URLs, of which nobody knows yet how many can be begun.
    is_fed: AtomicBool,
    batches: AtomicUsize,
    /// One permit per row group of a file that is elsewhere.
    groups: Semaphore,
}

impl Dispatcher {
    pub(crate) fn new(fetcher: Fetcher, connections: u16, way_out: Arc<WayOut>) -> Self {
        Self {
            sites: Arc::new(KnownSites::new(fetcher.agent().to_owned())),
            fetcher,
            way_out,
            hosts: Mutex::new(Hosts::new(Instant::now(), Arc::default(), connections.into())),
            connections: Arc::new(Semaphore::new(connections.into())),
            changed: Notify::new(),
            ask: Notify::new(),
            idle: Notify::new(),
            is_fed: AtomicBool::new(false),
            batches: AtomicUsize::new(0),
            groups: Semaphore::new(1),
        }
    }

    fn hosts(&self) -> MutexGuard<'_, Hosts<Job>> {
        // Nothing under the lock can leave it half changed.
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what the coordinator knows of sites.
    pub(crate) fn know(&self, sites: Sites) {
        self.hosts().know(Arc::new(sites));
    }

    /// Wakes the loops that a change of `hosts` concerns.
    fn wake(&self, hosts: MutexGuard<'_, Hosts<Job>>) {
        self.ask_if_due(&hosts);
        drop(hosts);
        self.changed.notify_one();
    }

    fn ask_if_due(&self, hosts: &Hosts<Job>) {
        let now = Instant::now();
        if hosts.ask_at(now).is_some_and(|at| at <= now) {
            self.ask.notify_one();
        }
    }

    /// Takes up URLs of a dataset, which are fetched in this order as far as their hosts and sites allow, and before
    /// others if they are of one `large` site. `once`: all have failed in an earlier round, so that each is tried just
    /// once.
    pub(crate) fn batch(
        self: &Arc<Self>,
        entries: Vec<SliceEntry>,
        spec: &DatasetSpec,
        once: bool,
        large: bool,
    ) -> Batch {
        let retries = if once { 0 } else { spec.limits.retries };
        let limits = Limits { retries, ..spec.limits.clone() };
        self.begin(entries, spec.files, limits, spec.respect.iter().copied().collect(), large)
    }

    /// Takes up URLs; those of `files` may be addresses of files and of parts of them.
    fn begin(
        self: &Arc<Self>,
        entries: Vec<SliceEntry>,
        files: bool,
        limits: Limits,
        respect: Respect,
        large: bool,
    ) -> Batch {
        let (results, receiver) = mpsc::unbounded_channel();
        let id = self.batches.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            id,
            limits,
            respect,
            way_out: Arc::clone(&self.way_out),
            results,
            unstarted: AtomicUsize::new(entries.len()),
            files: Mutex::new(VecDeque::new()),
            all_started: CancellationToken::new(),
            ending: AtomicBool::new(false),
            cut: CancellationToken::new(),
        });
        if entries.is_empty() {
            shared.all_started.cancel();
        }
        self.is_fed.store(true, Ordering::Release);
        let now = Instant::now();
        let (mut elsewhere, mut hosts) = (Vec::new(), self.hosts());
        for entry in entries {
            let request = match files {
                false => Request::new(&entry.url),
                true => match pieces::request(&entry.url) {
                    Some(request) => request,
                    None => {
                        elsewhere.push(entry);
                        continue;
                    }
                },
            };
            match request {
                Ok(request) => {
                    let (host, ticket, request) = (request.host(), hosts.ticket(large), request.respecting(respect));
                    let job = Job::new(ticket, entry, request, Arc::clone(&shared));
                    hosts.push(now, &host, ticket, job);
                }
                Err(rejection) => {
                    shared.start(1);
                    let (info, spent) = (ResponseInfo::default(), Duration::ZERO);
                    let body = Err(rejection);
                    let _ = shared.results.send(FetchResult { entry, number: 0, info, spent, body });
                }
            }
        }
        self.wake(hosts);
        if files {
            self.read_files(elsewhere, &shared);
        }
        Batch { dispatcher: Arc::clone(self), id, results: receiver, shared }
    }

    /// Watches the way out, for ever.
    pub(crate) async fn watch_way_out(self: Arc<Self>) {
        let this = Arc::clone(&self);
        let ask = move |urls: Vec<String>| {
            let this = Arc::clone(&this);
            async move {
                this.fetcher.forget_names();
                let mut urls = urls.into_iter().peekable();
                while urls.peek().is_some() {
                    let mut probes = JoinSet::new();
                    for url in urls.by_ref().take(PROBES_AT_ONCE) {
                        let this = Arc::clone(&this);
                        probes.spawn(async move { this.fetcher.probe(&url).await });
                    }
                    while let Some(answered) = probes.join_next().await {
                        if matches!(answered, Ok(true)) {
                            return true;
                        }
                    }
                }
                false
            }
        };
        let back = || {
            self.fetcher.forget_names();
            self.sites.forget();
            let mut hosts = self.hosts();
            hosts.forgive(Instant::now());
            self.wake(hosts);
        };
        self.way_out.watch(ask, back).await;
    }

    /// Starts each URL when there is a connection and its host has room, for ever.
    pub(crate) async fn dispatch(self: Arc<Self>) {
        // Since when no URL has had to wait for a connection, and none has come.
        let mut room_since = Instant::now();
        loop {
            let permit = match Arc::clone(&self.connections).try_acquire_owned() {
                Ok(permit) => permit,
                Err(_) => {
                    let Ok(permit) = Arc::clone(&self.connections).acquire_owned().await else { return };
                    room_since = Instant::now();
                    permit
                }
            };
            let (pass, job) = loop {
                let next = {
                    let mut hosts = self.hosts();
                    let next = hosts.next(Instant::now());
                    self.ask_if_due(&hosts);
                    next
                };
                let until = match next {
                    Next::Begin(pass, job) => break (pass, job),
                    Next::GivenUp(mut job, why) => {
                        job.give_up(why);
                        continue;
                    }
                    Next::Wait(until) => until,
                };
                if self.is_fed.swap(false, Ordering::AcqRel) {
                    room_since = Instant::now();
                }
                let idle = room_since + IDLE;
                if Instant::now() >= idle {
                    self.idle.notify_waiters();
                }
                let until = until.into_iter().chain(Some(idle).filter(|at| *at > Instant::now())).min();
                tokio::select! {
                    () = self.changed.notified() => {}
                    () = async { match until { Some(at) => sleep_until(at).await, None => sleep(IDLE).await } } => {}
                }
            };
            let slot = HostSlot { dispatcher: Arc::clone(&self), pass: Some(pass) };
            tokio::spawn(slot.fetch(job, ConnectionPermit { _permit: permit, _in_flight: InFlight::begin() }));
        }
    }

    /// Keeps this worker's parts of sites' budgets, for ever.
    pub(crate) async fn keep_shares(self: Arc<Self>, coordinator: Arc<Coordinator>) {
        let mut sequence = 0;
        let policy = backoff(Duration::from_millis(100), Duration::from_secs(1));
        let mut retries = policy.build();
        loop {
            let now = Instant::now();
            let at = self.hosts().ask_at(now).map_or(now + IDLE, |at| at.min(now + IDLE));
            if at > now {
                let _ = timeout_at(at, self.ask.notified()).await;
                continue;
            }
            let asked = Instant::now();
            let demands = self.hosts().demands(asked);
            sequence += 1;
            let pause = match coordinator.share_sites(sequence, demands, ASK_TIMEOUT).await {
                Ok((duration, shares)) => {
                    retries = policy.build();
                    let mut hosts = self.hosts();
                    hosts.lend(asked, Instant::now(), duration, &shares);
                    self.wake(hosts);
                    ASK_PAUSE
                }
                Err(status) => {
                    tracing::debug!(%status, "failed to ask for parts of sites; trying again");
                    self.hosts().unanswered(Instant::now());
                    retries.next().unwrap_or(ASK_PAUSE)
                }
            };
            sleep(pause).await;
        }
    }

    /// Asks the cluster what sites say may be taken from them, and tells it, for ever.
    pub(crate) async fn keep_rules(&self, coordinator: Arc<Coordinator>) {
        self.sites.exchange().carry(self.sites.agent(), coordinator).await;
    }

    /// Waits until no part of any site's budget is this worker's, because nothing uses it any more; or for a while.
    pub(crate) async fn all_given_back(&self) {
        let deadline = Instant::now() + LAST_PARTS;
        while Instant::now() < deadline && self.hosts().has_parts(Instant::now()) {
            sleep(ASK_PAUSE).await;
        }
    }

    /// Returns when nothing of a site may be in flight any more.
    async fn ended(&self, site: &str) {
        let mut until = Instant::now();
        let mut timer = pin!(sleep_until(until));
        // By the clock at each look: a process that stood still hears of other events before its timers.
        poll_fn(|cx| {
            loop {
                if Instant::now() >= until {
                    match self.hosts().until(site) {
                        Some(prolonged) if prolonged > Instant::now() => until = prolonged,
                        _ => return Poll::Ready(()),
                    }
                    timer.as_mut().reset(until);
                }
                ready!(timer.as_mut().poll(cx));
            }
        })
        .await;
    }
}

#[cfg(test)]
mod tests;
