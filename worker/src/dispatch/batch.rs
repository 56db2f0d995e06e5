//! The URLs of one attempt, from their slice to a result for each.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::outcomes::OutcomeRow;
use proto::{Limits, Rejection};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Dispatcher;
use crate::fetch::{Body, FetchError, Request, ResponseInfo};
use crate::format::format_of;
use crate::hosts::GiveUp;
use crate::metrics::InFlight;
use crate::opt_out::{Errand, Respect};
use crate::way_out::WayOut;

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
    pub(super) _permit: OwnedSemaphorePermit,
    pub(super) _in_flight: InFlight,
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

/// A URL of a batch that has no result yet. It gets one whatever happens: one that is dropped, as by a panic, is
/// rejected.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) ticket: u64,
    pub(super) started: bool,
    pub(super) finished: bool,
    pub(super) entry: SliceEntry,
    pub(super) request: Request,
    /// Before it is asked for.
    pub(super) detour: Option<Detour>,
    /// Why it was tried again last; `unfetched`: it was told to come later.
    pub(super) retried: Option<(Rejection, ResponseInfo)>,
    pub(super) throttled: u32,
    /// A redirect has led it to where it had to wait; and it was refused there and has begun again for that.
    pub(super) waited: bool,
    pub(super) renewed: bool,
    /// The server that it asked last may still be at work on its answer.
    pub(super) is_open: bool,
    pub(super) batch: Arc<Shared>,
}

/// On its way to a file in which its site says what may be taken from it.
#[derive(Debug)]
pub(super) struct Detour {
    pub(super) errand: Errand,
    pub(super) request: Request,
}

/// What all jobs of a batch share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: usize,
    pub(super) limits: Limits,
    pub(super) respect: Respect,
    pub(super) way_out: Arc<WayOut>,
    pub(super) results: mpsc::UnboundedSender<FetchResult>,
    pub(super) unstarted: AtomicUsize,
    /// Files that nobody has begun with; those that are read together stand together.
    pub(super) files: Mutex<VecDeque<Vec<SliceEntry>>>,
    /// Cancelled when every URL has been started.
    pub(super) all_started: CancellationToken,
    /// Nothing more is started or tried again.
    pub(super) ending: AtomicBool,
    /// What is in flight is cut.
    pub(super) cut: CancellationToken,
}

impl Shared {
    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    pub(super) fn start(&self, urls: usize) {
        if urls > 0 && self.unstarted.fetch_sub(urls, Ordering::AcqRel) == urls {
            self.all_started.cancel();
        }
    }
}

impl Job {
    pub(super) fn new(ticket: u64, entry: SliceEntry, request: Request, batch: Arc<Shared>) -> Self {
        Self {
            ticket,
            started: false,
            finished: false,
            entry,
            request,
            detour: None,
            retried: None,
            throttled: 0,
            waited: false,
            renewed: false,
            is_open: false,
            batch,
        }
    }

    /// The host that is asked next, as budgets name it.
    pub(super) fn host(&self) -> String {
        self.detour.as_ref().map_or_else(|| self.request.host(), |detour| detour.request.host())
    }

    /// Whether this failure may be its own delay's: redirects lead to signed URLs, which are good for a short time.
    pub(super) fn came_late(&self, error: &FetchError) -> bool {
        let refused = matches!(self.request.info.status, Some(401 | 403)) && error.rejection == Rejection::HttpStatus;
        // What its site's file has met says nothing of it.
        refused && error.detail.is_none() && self.waited && !self.renewed && self.request.is_redirected()
    }

    pub(super) fn start(&mut self) {
        if !std::mem::replace(&mut self.started, true) {
            self.batch.start(1);
        }
    }

    pub(super) fn finish(&mut self, body: Result<(Body, ConnectionPermit), Rejection>) {
        self.start();
        self.finished = true;
        let (entry, info) = (std::mem::take(&mut self.entry), std::mem::take(&mut self.request.info));
        let (body, info) = match (body, self.retried.take()) {
            // What this URL met at its host says more than that the host was given up.
            (Err(Rejection::HostGivenUp), Some((rejection, info))) => (Err(rejection), info),
            (Err(Rejection::Unfetched), Some((Rejection::Unfetched, info))) => (Err(Rejection::Unfetched), info),
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

    /// Its host was given up.
    pub(super) fn give_up(&mut self, why: GiveUp) {
        if why == GiveUp::Throttled {
            // Its host has said so, if to another URL.
            self.request.info.status.get_or_insert(429);
        }
        self.finish(Err(why.rejection()));
    }

    /// Takes it out of its batch: it gets no result.
    pub(super) fn withdraw(mut self) -> SliceEntry {
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
    pub(super) dispatcher: Arc<Dispatcher>,
    pub(super) id: usize,
    pub(super) results: mpsc::UnboundedReceiver<FetchResult>,
    pub(super) shared: Arc<Shared>,
}

impl Batch {
    /// The next result; None after the last one.
    pub(crate) async fn next(&mut self) -> Option<FetchResult> {
        self.results.recv().await
    }

    /// Takes out the URLs that wait and match; they get no result.
    pub(crate) fn take_out(&self, matches: impl Fn(&SliceEntry) -> bool) -> Vec<SliceEntry> {
        let files = self.shared.take_out_files(&matches);
        let matches = |job: &Job| job.batch.id == self.id && matches(&job.entry);
        let jobs = self.dispatcher.hosts().take_out(Instant::now(), matches);
        jobs.into_iter().map(Job::withdraw).chain(files).collect()
    }

    /// Starts nothing more and tries nothing again; those that wait get no result, and are returned, each with the status
    /// by which it was told to come later.
    pub(crate) fn end(&self) -> Vec<(SliceEntry, Option<u16>)> {
        self.shared.ending.store(true, Ordering::Release);
        let files = self.shared.take_out_files(|_| true);
        let jobs = self.dispatcher.hosts().take_out(Instant::now(), |job| job.batch.id == self.id);
        let later = |job: Job| {
            let told = job.retried.as_ref().filter(|(why, _)| *why == Rejection::Unfetched);
            let status = told.and_then(|(_, info)| info.status);
            (job.withdraw(), status)
        };
        jobs.into_iter().map(later).chain(files.into_iter().map(|entry| (entry, None))).collect()
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
        drop(self.shared.take_out_files(|_| true));
        drop(self.dispatcher.hosts().take_out(Instant::now(), |job| job.batch.id == self.id));
    }
}
