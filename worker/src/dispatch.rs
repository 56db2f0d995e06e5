//! Hands the worker's connections to the URLs of all its attempts, as their hosts have room, and keeps the shares of
//! hosts that the coordinator grants.
//!
//! An attempt hands in all its URLs at once ([`Dispatcher::batch`]) and gets a result for each. A URL that waits for
//! its host or for a backoff holds no connection meanwhile.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::BackoffBuilder;
use proto::outcomes::OutcomeRow;
use proto::{Limits, Rejection};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::backoff::backoff;
use crate::fetch::{Body, Fetched, Fetcher, Request, ResponseInfo};
use crate::format::format_of;
use crate::hosts::{HostSignal, Hosts, Next, Pass};
use crate::lease::Coordinator;
use crate::metrics::InFlight;
use crate::way_out::WayOut;

/// For one call that asks for shares; a response that comes much later is not used anyway.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two calls, however many hosts become brokered meanwhile.
const ASK_PAUSE: Duration = Duration::from_millis(20);
/// Probes are asked so many at once: one that answers is enough.
const PROBES_AT_ONCE: usize = 3;
/// Connections that had nothing to do for so long ask for another shard.
const IDLE: Duration = Duration::from_secs(1);

/// One line of a slice.
#[derive(Debug, Default)]
pub(crate) struct SliceEntry {
    pub(crate) key: i64,
    pub(crate) synset: String,
    pub(crate) url: String,
    /// What travels with its picture.
    pub(crate) columns: Option<String>,
}

impl SliceEntry {
    /// The row of a URL of which nothing else is known.
    pub(crate) fn into_row(self) -> OutcomeRow {
        let Self { key, synset, url, columns } = self;
        OutcomeRow { key, synset, url, columns, ..OutcomeRow::default() }
    }
}

/// The right to have one URL in flight, until its body is validated.
#[derive(Debug)]
pub(crate) struct ConnectionPermit {
    _permit: OwnedSemaphorePermit,
    _in_flight: InFlight,
}

/// What became of a URL's request.
#[derive(Debug)]
pub(crate) struct FetchResult {
    pub(crate) entry: SliceEntry,
    /// By which [`WayOut`] says whether it is believed; 0: there is no doubt about it.
    pub(crate) number: u64,
    pub(crate) info: ResponseInfo,
    /// How long its HTTP requests took.
    pub(crate) spent: Duration,
    pub(crate) body: Result<(Body, ConnectionPermit), Rejection>,
}

/// One per process.
#[derive(Debug)]
pub(crate) struct Dispatcher {
    fetcher: Fetcher,
    way_out: Arc<WayOut>,
    hosts: Mutex<Hosts<Job>>,
    /// One permit per URL in flight, until its body is validated.
    connections: Arc<Semaphore>,
    /// A URL may have become ready to be fetched.
    changed: Notify,
    /// A host is brokered for which the coordinator was not asked yet.
    ask: Notify,
    /// Connections have had nothing to do for a while.
    idle: Notify,
    batches: AtomicUsize,
}

/// A URL of a batch that has no result yet. It gets one whatever happens: one that is dropped, as by a panic, is
/// rejected.
#[derive(Debug)]
struct Job {
    ticket: u64,
    started: bool,
    finished: bool,
    entry: SliceEntry,
    request: Request,
    /// Why it was tried again last.
    retried: Option<(Rejection, ResponseInfo)>,
    batch: Arc<Shared>,
}

/// What all jobs of a batch share.
#[derive(Debug)]
struct Shared {
    id: usize,
    limits: Limits,
    way_out: Arc<WayOut>,
    results: mpsc::UnboundedSender<FetchResult>,
    unstarted: AtomicUsize,
    /// Cancelled when every URL has been started.
    all_started: CancellationToken,
    /// Nothing more is started or tried again.
    ending: AtomicBool,
    /// What is in flight is cut.
    cut: CancellationToken,
}

impl Shared {
    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    fn start(&self, urls: usize) {
        if self.unstarted.fetch_sub(urls, Ordering::AcqRel) == urls {
            self.all_started.cancel();
        }
    }
}

impl Job {
    fn start(&mut self) {
        if !std::mem::replace(&mut self.started, true) {
            self.batch.start(1);
        }
    }

    fn finish(&mut self, body: Result<(Body, ConnectionPermit), Rejection>) {
        self.start();
        self.finished = true;
        let (entry, info) = (std::mem::take(&mut self.entry), std::mem::take(&mut self.request.info));
        let (body, info) = match (body, self.retried.take()) {
            // What this URL met at its host says more than that the host was given up.
            (Err(Rejection::HostGivenUp), Some((rejection, info))) => (Err(rejection), info),
            (body, _) => (body, info),
        };
        let number = match &body {
            Err(Rejection::Unfetched) => 0,
            body => {
                let picture = body.as_ref().is_ok_and(|(body, _)| format_of(&body.bytes).is_some());
                self.batch.way_out.result(&self.request.host(), &entry.url, picture)
            }
        };
        // An attempt that is gone needs no result.
        let _ = self.batch.results.send(FetchResult { entry, number, info, spent: self.request.spent, body });
    }

    /// Takes it out of its batch: it gets no result.
    fn withdraw(mut self) -> SliceEntry {
        self.start();
        self.finished = true;
        std::mem::take(&mut self.entry)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.finished {
            self.finish(Err(Rejection::Protocol));
        }
    }
}

/// The URLs of one attempt. Dropping it drops those that have no result yet.
#[derive(Debug)]
pub(crate) struct Batch {
    dispatcher: Arc<Dispatcher>,
    id: usize,
    results: mpsc::UnboundedReceiver<FetchResult>,
    shared: Arc<Shared>,
}

impl Batch {
    /// The next result; None after the last one.
    pub(crate) async fn next(&mut self) -> Option<FetchResult> {
        self.results.recv().await
    }

    /// Takes out the URLs that wait and match; they get no result.
    pub(crate) fn take_out(&self, matches: impl Fn(&SliceEntry) -> bool) -> Vec<SliceEntry> {
        let matches = |job: &Job| job.batch.id == self.id && matches(&job.entry);
        let jobs = self.dispatcher.hosts().take_out(Instant::now(), matches);
        jobs.into_iter().map(Job::withdraw).collect()
    }

    /// Starts nothing more and tries nothing again; those that wait get no result, and are returned.
    pub(crate) fn end(&self) -> Vec<SliceEntry> {
        self.shared.ending.store(true, Ordering::Release);
        self.take_out(|_| true)
    }

    /// Cuts what is in flight: its result is `unfetched`.
    pub(crate) fn cut(&self) {
        self.shared.cut.cancel();
    }

    /// Returns when every URL has been started, or connections have nothing to do because all URLs that wait have to.
    pub(crate) fn all_started(&self) -> impl Future<Output = ()> + Send + use<> {
        let (dispatcher, all_started) = (Arc::clone(&self.dispatcher), self.shared.all_started.clone());
        async move {
            tokio::select! {
                () = all_started.cancelled() => {}
                () = dispatcher.idle.notified() => {}
            }
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        self.shared.cut.cancel();
        drop(self.dispatcher.hosts().take_out(Instant::now(), |job| job.batch.id == self.id));
    }
}

impl Dispatcher {
    pub(crate) fn new(fetcher: Fetcher, connections: u16, way_out: Arc<WayOut>) -> Self {
        Self {
            fetcher,
            way_out,
            hosts: Mutex::new(Hosts::new(Instant::now(), connections.into())),
            connections: Arc::new(Semaphore::new(connections.into())),
            changed: Notify::new(),
            ask: Notify::new(),
            idle: Notify::new(),
            batches: AtomicUsize::new(0),
        }
    }

    fn hosts(&self) -> MutexGuard<'_, Hosts<Job>> {
        // Nothing under the lock can leave it half changed.
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the loops that a change of `hosts` concerns.
    fn wake(&self, mut hosts: MutexGuard<'_, Hosts<Job>>) {
        if hosts.ask_now() {
            self.ask.notify_one();
        }
        drop(hosts);
        self.changed.notify_one();
    }

    /// Takes up URLs, which are fetched in this order as far as their hosts allow. `once`: all have failed in an
    /// earlier round, so that each is tried just once.
    pub(crate) fn batch(self: &Arc<Self>, entries: Vec<SliceEntry>, limits: &Limits, once: bool) -> Batch {
        let (results, receiver) = mpsc::unbounded_channel();
        let id = self.batches.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            id,
            limits: Limits { retries: if once { 0 } else { limits.retries }, ..limits.clone() },
            way_out: Arc::clone(&self.way_out),
            results,
            unstarted: AtomicUsize::new(entries.len()),
            all_started: CancellationToken::new(),
            ending: AtomicBool::new(false),
            cut: CancellationToken::new(),
        });
        if entries.is_empty() {
            shared.all_started.cancel();
        }
        let now = Instant::now();
        let mut hosts = self.hosts();
        for entry in entries {
            match Request::new(&entry.url) {
                Ok(request) => {
                    let (host, ticket, batch) = (request.host(), hosts.ticket(), Arc::clone(&shared));
                    let job = Job { ticket, started: false, finished: false, entry, request, retried: None, batch };
                    hosts.push(now, &host, ticket, job);
                }
                Err(rejection) => {
                    shared.start(1);
                    let (info, spent) = (ResponseInfo::default(), Duration::ZERO);
                    let _ = shared.results.send(FetchResult { entry, number: 0, info, spent, body: Err(rejection) });
                }
            }
        }
        self.wake(hosts);
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
            let mut hosts = self.hosts();
            hosts.forgive(Instant::now());
            self.wake(hosts);
        };
        self.way_out.watch(ask, back).await;
    }

    /// Starts each URL when there is a connection and its host has room, for ever.
    pub(crate) async fn dispatch(self: Arc<Self>) {
        while let Ok(permit) = Arc::clone(&self.connections).acquire_owned().await {
            let mut idle_since = None;
            let (pass, job) = loop {
                let next = {
                    let mut hosts = self.hosts();
                    let next = hosts.next(Instant::now());
                    if hosts.ask_now() {
                        self.ask.notify_one();
                    }
                    next
                };
                let until = match next {
                    Next::Begin(pass, job) => break (pass, job),
                    Next::GivenUp(mut job) => {
                        job.finish(Err(Rejection::HostGivenUp));
                        continue;
                    }
                    Next::Wait(until) => until,
                };
                let idle_since = *idle_since.get_or_insert_with(Instant::now);
                let idle = idle_since + IDLE;
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

    /// Keeps this worker's shares of brokered hosts, for ever.
    pub(crate) async fn keep_shares(self: Arc<Self>, coordinator: Arc<Coordinator>) {
        let mut sequence = 0;
        let policy = backoff(Duration::from_millis(100), Duration::from_secs(1));
        let mut retries = policy.build();
        loop {
            let asked = Instant::now();
            let demands = {
                let mut hosts = self.hosts();
                let demands = hosts.demands(asked);
                hosts.ask_now();
                demands
            };
            if demands.is_empty() {
                self.ask.notified().await;
                continue;
            }
            sequence += 1;
            let pause = match coordinator.share_hosts(sequence, demands, ASK_TIMEOUT).await {
                Ok(answer) => {
                    retries = policy.build();
                    let ask_again = answer.ask_again;
                    let mut hosts = self.hosts();
                    let taken = hosts.shared(asked, Instant::now(), answer);
                    self.wake(hosts);
                    if taken { ask_again } else { ASK_PAUSE }
                }
                Err(status) => {
                    tracing::debug!(%status, "failed to ask for shares of hosts; trying again");
                    retries.next().unwrap_or(ASK_PAUSE)
                }
            };
            sleep(ASK_PAUSE).await;
            let _ = timeout(pause, self.ask.notified()).await;
        }
    }
}

/// One request's place at its host, which gets it back whatever becomes of the request.
struct HostSlot {
    dispatcher: Arc<Dispatcher>,
    pass: Option<Pass>,
}

impl HostSlot {
    async fn fetch(mut self, mut job: Job, connection: ConnectionPermit) {
        let batch = Arc::clone(&job.batch);
        let dispatcher = Arc::clone(&self.dispatcher);
        // The process may have stood still since the pass was given out.
        if !self.pass.as_ref().is_some_and(|pass| pass.is_valid(Instant::now())) {
            return self.give_back(HostSignal::Unknown, |hosts, now| queue(hosts, now, None, job));
        }
        job.start();
        let fetch = dispatcher.fetcher.fetch(&mut job.request, &batch.limits);
        match batch.cut.run_until_cancelled(fetch).await {
            None => {
                self.give_back(HostSignal::Unknown, |_, _| {});
                job.finish(Err(Rejection::Unfetched));
            }
            Some(Ok(Fetched::Body(body))) => {
                self.give_back(HostSignal::Answered, |_, _| {});
                job.finish(Ok((body, connection)));
            }
            Some(Ok(Fetched::Redirect)) => {
                self.give_back(HostSignal::Answered, |hosts, now| queue(hosts, now, None, job));
            }
            Some(Err(error)) => {
                // A URL that fails once more says nothing new of its host: retries are the few URLs that fail, after
                // all others have their results.
                let signal = match error.signal {
                    HostSignal::Failed if job.retried.is_some() => HostSignal::Unknown,
                    signal => signal,
                };
                let info = std::mem::take(&mut job.request.info);
                let retry = job.request.retry(&error, &batch.limits, fastrand::f64());
                match retry.filter(|_| !batch.is_ending()) {
                    Some(backoff) => {
                        job.retried = Some((error.rejection, info));
                        self.give_back(signal, |hosts, now| queue(hosts, now, Some(backoff), job));
                    }
                    None => {
                        job.request.info = info;
                        self.give_back(signal, |_, _| {});
                        job.finish(Err(error.rejection));
                    }
                }
            }
        }
    }

    /// Gives the pass back; then `then`, under the same lock.
    fn give_back(&mut self, signal: HostSignal, then: impl FnOnce(&mut Hosts<Job>, Instant)) {
        let Some(pass) = self.pass.take() else { return };
        let now = Instant::now();
        let mut hosts = self.dispatcher.hosts();
        hosts.finish(now, pass, signal);
        then(&mut hosts, now);
        self.dispatcher.wake(hosts);
    }
}

impl Drop for HostSlot {
    fn drop(&mut self) {
        self.give_back(HostSignal::Unknown, |_, _| {});
    }
}

/// Lets a URL wait for its host, and for a backoff before; one of a batch that is ending has waited long enough. (A
/// batch says that it is ending before it takes out what waits.)
fn queue(hosts: &mut Hosts<Job>, now: Instant, backoff: Option<Duration>, mut job: Job) {
    let (host, ticket) = (job.request.host(), job.ticket);
    match backoff {
        _ if job.batch.is_ending() => job.finish(Err(Rejection::Unfetched)),
        Some(backoff) => hosts.push_later(now, backoff, &host, ticket, job),
        None => hosts.push(now, &host, ticket, job),
    }
}

#[cfg(test)]
mod tests;
