//! Hands the worker's connections to the URLs of all its attempts, as their hosts have room, and keeps the shares of hosts
//! that the coordinator grants.
//!
//! An attempt brings all its URLs at once ([`Dispatcher::batch`]) and hears of each when it is through. What has to wait,
//! for its host or before another try, holds no connection meanwhile.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::outcomes::OutcomeRow;
use proto::{Limits, Rejection};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::fetch::{Body, Fetcher, Journey, Step, Trace};
use crate::hosts::{Ending, Hosts, Next, Pass};
use crate::lease::{Backoff, Coordinator};
use crate::metrics::InFlight;

/// For one asking; answers that come much later are not taken anyway.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two askings, however many hosts become brokered meanwhile.
const ASK_PAUSE: Duration = Duration::from_millis(20);
/// Connections that had nothing to do for so long call for another shard.
const STARVED: Duration = Duration::from_secs(1);

/// One URL, as its attempt knows it.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) key: i64,
    pub(crate) synset: String,
    pub(crate) url: String,
}

impl Listed {
    /// The row of a URL of which nothing else is known.
    pub(crate) fn row(self) -> OutcomeRow {
        OutcomeRow { key: self.key, synset: self.synset, url: self.url, ..OutcomeRow::default() }
    }
}

/// The right to have one URL in flight, until its body is judged.
#[derive(Debug)]
pub(crate) struct Connection {
    _permit: OwnedSemaphorePermit,
    _in_flight: InFlight,
}

/// A URL that is through.
#[derive(Debug)]
pub(crate) struct Landed {
    pub(crate) listed: Listed,
    pub(crate) trace: Trace,
    /// How long its requests took.
    pub(crate) spent: Duration,
    pub(crate) fetched: Result<(Body, Connection), Rejection>,
}

/// One per process.
#[derive(Debug)]
pub(crate) struct Dispatcher {
    fetcher: Fetcher,
    hosts: Mutex<Hosts<Job>>,
    /// One permit per URL in flight, until its body is judged.
    connections: Arc<Semaphore>,
    /// Something may be ready to begin.
    changed: Notify,
    /// A host is brokered for which the coordinator was not asked yet.
    ask: Notify,
    /// Connections have had nothing to do for a while.
    starved: Notify,
    batches: AtomicUsize,
}

/// A URL of a batch on its way.
#[derive(Debug)]
struct Job {
    ticket: u64,
    begun: bool,
    listed: Listed,
    journey: Journey,
    /// Why its latest try failed.
    failed: Option<(Rejection, Trace)>,
    batch: Arc<Shared>,
}

/// What all jobs of a batch share.
#[derive(Debug)]
struct Shared {
    id: usize,
    limits: Limits,
    landed: mpsc::UnboundedSender<Landed>,
    unbegun: AtomicUsize,
    /// Done when every URL has been begun.
    taken_up: CancellationToken,
    dropped: CancellationToken,
}

impl Shared {
    fn begin(&self, urls: usize) {
        if self.unbegun.fetch_sub(urls, Ordering::AcqRel) == urls {
            self.taken_up.cancel();
        }
    }
}

impl Job {
    fn land(self, fetched: Result<(Body, Connection), Rejection>) {
        let Self { listed, journey, failed, batch, begun, .. } = self;
        if !begun {
            batch.begin(1);
        }
        let (fetched, trace) = match (fetched, failed) {
            // What it saw of its host says more than that others saw enough of it.
            (Err(Rejection::HostGivenUp), Some((rejection, trace))) => (Err(rejection), trace),
            (fetched, _) => (fetched, journey.trace),
        };
        // An attempt that is gone needs no answer.
        let _ = batch.landed.send(Landed { listed, trace, spent: journey.spent, fetched });
    }
}

/// The URLs of one attempt. Those that are not through when it is dropped are dropped, too.
#[derive(Debug)]
pub(crate) struct Batch {
    dispatcher: Arc<Dispatcher>,
    id: usize,
    landed: mpsc::UnboundedReceiver<Landed>,
    taken_up: CancellationToken,
    dropped: CancellationToken,
}

impl Batch {
    /// The next URL that is through; None when all were told of.
    pub(crate) async fn next(&mut self) -> Option<Landed> {
        self.landed.recv().await
    }

    /// Takes out the URLs that wait and fit; nothing will be told of them.
    pub(crate) fn take_out(&self, fits: impl Fn(&Listed) -> bool) -> Vec<Listed> {
        let fits = |job: &Job| job.batch.id == self.id && fits(&job.listed);
        let jobs = self.dispatcher.hosts().take_out(Instant::now(), fits);
        let leave = |job: Job| {
            if !job.begun {
                job.batch.begin(1);
            }
            job.listed
        };
        jobs.into_iter().map(leave).collect()
    }

    /// Returns when every URL has been begun, or connections have nothing to do because all that waits has to wait.
    pub(crate) fn taken_up(&self) -> impl Future<Output = ()> + Send + use<> {
        let (dispatcher, taken_up) = (Arc::clone(&self.dispatcher), self.taken_up.clone());
        async move {
            tokio::select! {
                () = taken_up.cancelled() => {}
                () = dispatcher.starved.notified() => {}
            }
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.dropped.cancel();
        drop(self.dispatcher.hosts().take_out(Instant::now(), |job| job.batch.id == self.id));
    }
}

impl Dispatcher {
    pub(crate) fn new(fetcher: Fetcher, connections: u16) -> Self {
        Self {
            fetcher,
            hosts: Mutex::new(Hosts::new(Instant::now(), connections.into())),
            connections: Arc::new(Semaphore::new(connections.into())),
            changed: Notify::new(),
            ask: Notify::new(),
            starved: Notify::new(),
            batches: AtomicUsize::new(0),
        }
    }

    fn hosts(&self) -> MutexGuard<'_, Hosts<Job>> {
        // Nothing under the lock can leave it half changed.
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the loops of what `hosts` has become.
    fn wake(&self, mut hosts: MutexGuard<'_, Hosts<Job>>) {
        if hosts.ask_now() {
            self.ask.notify_one();
        }
        drop(hosts);
        self.changed.notify_one();
    }

    /// Takes up URLs, which are fetched in this order as far as their hosts allow.
    pub(crate) fn batch(self: &Arc<Self>, urls: Vec<Listed>, limits: &Limits) -> Batch {
        let (landed, receiver) = mpsc::unbounded_channel();
        let (taken_up, dropped) = (CancellationToken::new(), CancellationToken::new());
        let id = self.batches.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            id,
            limits: limits.clone(),
            landed,
            unbegun: AtomicUsize::new(urls.len()),
            taken_up: taken_up.clone(),
            dropped: dropped.clone(),
        });
        if urls.is_empty() {
            taken_up.cancel();
        }
        let now = Instant::now();
        let mut hosts = self.hosts();
        for listed in urls {
            match Journey::new(&listed.url) {
                Ok(journey) => {
                    let (host, ticket, batch) = (journey.host(), hosts.ticket(), Arc::clone(&shared));
                    let job = Job { ticket, begun: false, listed, journey, failed: None, batch };
                    hosts.push(now, &host, ticket, job);
                }
                Err(rejection) => {
                    shared.begin(1);
                    let (trace, spent) = (Trace::default(), Duration::ZERO);
                    let _ = shared.landed.send(Landed { listed, trace, spent, fetched: Err(rejection) });
                }
            }
        }
        self.wake(hosts);
        Batch { dispatcher: Arc::clone(self), id, landed: receiver, taken_up, dropped }
    }

    /// Begins what can be begun, for ever.
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
                    Next::GivenUp(job) => {
                        job.land(Err(Rejection::HostGivenUp));
                        continue;
                    }
                    Next::Wait(until) => until,
                };
                let idle_since = *idle_since.get_or_insert_with(Instant::now);
                let starved = idle_since + STARVED;
                if Instant::now() >= starved {
                    self.starved.notify_waiters();
                }
                let until = until.into_iter().chain(Some(starved).filter(|at| *at > Instant::now())).min();
                tokio::select! {
                    () = self.changed.notified() => {}
                    () = async { match until { Some(at) => sleep_until(at).await, None => sleep(STARVED).await } } => {}
                }
            };
            let flight = Flight { dispatcher: Arc::clone(&self), pass: Some(pass) };
            tokio::spawn(flight.fly(job, Connection { _permit: permit, _in_flight: InFlight::begin() }));
        }
    }

    /// Keeps this worker's shares of brokered hosts, for ever.
    pub(crate) async fn keep_shares(self: Arc<Self>, coordinator: Arc<Coordinator>) {
        let mut sequence = 0;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
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
                    backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
                    let ask_again = answer.ask_again;
                    let mut hosts = self.hosts();
                    let taken = hosts.shared(asked, Instant::now(), answer);
                    self.wake(hosts);
                    if taken { ask_again } else { ASK_PAUSE }
                }
                Err(status) => {
                    tracing::debug!(%status, "failed to ask for shares of hosts; trying again");
                    backoff.pause()
                }
            };
            sleep(ASK_PAUSE).await;
            let _ = timeout(pause, self.ask.notified()).await;
        }
    }
}

/// A request under way. Whatever becomes of it, its host gets the slot back.
struct Flight {
    dispatcher: Arc<Dispatcher>,
    pass: Option<Pass>,
}

impl Flight {
    async fn fly(mut self, mut job: Job, connection: Connection) {
        let batch = Arc::clone(&job.batch);
        let dispatcher = Arc::clone(&self.dispatcher);
        // The process may have stood still since the pass was given out.
        if !self.pass.as_ref().is_some_and(|pass| pass.is_valid(Instant::now())) {
            let (host, ticket) = (job.journey.host(), job.ticket);
            self.end(Ending::Unknown, |hosts, now| hosts.push(now, &host, ticket, job));
            return;
        }
        if !std::mem::replace(&mut job.begun, true) {
            batch.begin(1);
        }
        let step = batch.dropped.run_until_cancelled(dispatcher.fetcher.fetch(&mut job.journey, &batch.limits)).await;
        match step {
            None => {}
            Some(Ok(Step::Body(body))) => {
                self.end(Ending::Answered, |_, _| {});
                job.land(Ok((body, connection)));
            }
            Some(Ok(Step::Elsewhere)) => {
                let (host, ticket) = (job.journey.host(), job.ticket);
                self.end(Ending::Answered, |hosts, now| hosts.push(now, &host, ticket, job));
            }
            Some(Err(failure)) => {
                // A URL that fails once more says nothing new of its host: what is tried again are the few that fail, when all others
                // are through.
                let ending = match failure.ending {
                    Ending::Failed if job.failed.is_some() => Ending::Unknown,
                    ending => ending,
                };
                let trace = std::mem::take(&mut job.journey.trace);
                match job.journey.try_again(&failure, &batch.limits, random()) {
                    Some(pause) => {
                        job.failed = Some((failure.rejection, trace));
                        let (host, ticket) = (job.journey.host(), job.ticket);
                        self.end(ending, |hosts, now| hosts.push_later(now, pause, &host, ticket, job));
                    }
                    None => {
                        job.journey.trace = trace;
                        self.end(ending, |_, _| {});
                        job.land(Err(failure.rejection));
                    }
                }
            }
        }
    }

    /// Gives the pass back; then `then`, under the same lock.
    fn end(&mut self, ending: Ending, then: impl FnOnce(&mut Hosts<Job>, Instant)) {
        let Some(pass) = self.pass.take() else { return };
        let now = Instant::now();
        let mut hosts = self.dispatcher.hosts();
        hosts.finish(now, pass, ending);
        then(&mut hosts, now);
        self.dispatcher.wake(hosts);
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.end(Ending::Unknown, |_, _| {});
    }
}

/// In 0..1.
fn random() -> f64 {
    (uuid::Uuid::new_v4().as_u128() % 1_000_000) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;
    use crate::attempt::tests::{origin, tools};

    #[tokio::test]
    async fn urls_that_fail_again_and_again_do_not_make_their_host_look_dead() {
        let dispatcher = Arc::clone(&tools(Arc::new(InMemory::new())).await.dispatcher);
        let (at, limits) = (origin().await, Limits::default());
        let fetch = async |paths: &[&str]| {
            let listed = |path: &&str| Listed { key: 0, synset: String::new(), url: format!("http://{at}/{path}") };
            let mut batch = dispatcher.batch(paths.iter().map(listed).collect(), &limits);
            let mut outcomes = Vec::new();
            for _ in paths {
                outcomes.push(batch.next().await.expect("one for each").fetched.map(drop));
            }
            outcomes
        };
        // Nine failures in a row, of three URLs.
        assert_eq!(fetch(&["sick"; 3]).await, [Err(Rejection::HttpStatus); 3]);
        let start = Instant::now();
        assert_eq!(fetch(&["good/1"]).await, [Ok(())]);
        assert!(start.elapsed() < Duration::from_secs(1), "it was paused: {:?}", start.elapsed());
    }
}
