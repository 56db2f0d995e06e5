//! A URL's turn at its host: it is asked for, or the file in which its site says whether it may be.

use std::sync::Arc;
use std::time::Duration;

use proto::{Limits, Rejection};
use tokio::time::Instant;

use super::batch::{ConnectionPermit, Detour, Job};
use super::{Dispatcher, THROTTLED};
use crate::fetch::{Body, FetchError, Fetched, FetchedText, Request};
use crate::hosts::{HostSignal, Hosts, Pass};
use crate::opt_out::{Errand, Judgement, SITE_FILE_BYTES, Step};

/// A site's file may be behind so many redirects (RFC 9309, 2.3.1.2).
const SITE_FILE_REDIRECTS: u32 = 5;

/// One request's place at its host, which gets it back whatever becomes of the request.
pub(super) struct HostSlot {
    pub(super) dispatcher: Arc<Dispatcher>,
    pub(super) pass: Option<Pass>,
}

/// What a URL's turn has come to.
enum Turn {
    Body(Body),
    /// It has to have another turn, at this host or another.
    Again,
    /// Its site's file is being fetched by somebody else: nothing more of the host begins for so long.
    Wait(Duration),
    /// Its owner says no, by this signal.
    Refused(&'static str),
}

impl Dispatcher {
    /// Asks for a URL, or for the file in which its site says whether it may be asked for.
    async fn take_turn(&self, job: &mut Job) -> Result<Turn, FetchError> {
        let host = job.host();
        loop {
            if job.detour.is_some() {
                return self.fetch_site_file(job, &host).await.map(|()| Turn::Again);
            }
            match self.sites.judge(Instant::now(), job.request.url(), job.request.respect()) {
                Judgement::Refused(signal) => return Ok(Turn::Refused(signal)),
                Judgement::Wait(pause) => return Ok(Turn::Wait(pause)),
                Judgement::Ask(errand) => match self.sites.ask(errand).await {
                    Step::Known => {}
                    Step::Wait(pause) => return Ok(Turn::Wait(pause)),
                    Step::Fetch(errand) => {
                        let request = Request::new(errand.url()).map_err(FetchError::from)?;
                        job.detour = Some(Detour { errand, request });
                    }
                },
                Judgement::Allowed => {
                    let fetched = self.fetcher.fetch(&mut job.request, &job.batch.limits).await;
                    job.is_open = job.request.is_open;
                    match fetched? {
                        Fetched::Body(body) => return Ok(Turn::Body(body)),
                        Fetched::Redirect if job.request.host() == host && !job.is_open => {}
                        Fetched::Redirect => return Ok(Turn::Again),
                    }
                }
            }
        }
    }

    /// Fetches a site's file as far as that can be done at this host; if its way leads to another, or the host wants to
    /// be left alone, the rest of it is left.
    async fn fetch_site_file(&self, job: &mut Job, host: &str) -> Result<(), FetchError> {
        let limits = Limits { redirects: SITE_FILE_REDIRECTS, ..job.batch.limits.clone() };
        while let Some(Detour { errand, request }) = &mut job.detour {
            let fetched = self.fetcher.fetch_text(request, &limits, SITE_FILE_BYTES).await;
            job.is_open = request.is_open;
            let text = match fetched {
                Ok(FetchedText::Redirect) if request.host() == host && !job.is_open => continue,
                Ok(FetchedText::Redirect) => return Ok(()),
                Ok(FetchedText::Text(text)) => Some(text),
                Ok(FetchedText::None) => None,
                Err(error) if is_none(&error, errand, request) => None,
                Err(error) => {
                    job.request.info.status = request.info.status;
                    let name = errand.name();
                    if !error.waits_for_host() {
                        job.request.spent += request.spent;
                        job.detour.take().into_iter().for_each(|detour| detour.errand.failed());
                    }
                    return Err(error.about(name));
                }
            };
            job.detour.take().into_iter().for_each(|detour| detour.errand.found(text.as_deref()));
        }
        Ok(())
    }
}

/// Whether a failure means that a site has no such file: redirects lead nowhere (RFC 9309, 2.3.1.2), or a file that
/// most sites lack is what a site has trouble with.
fn is_none(error: &FetchError, errand: &Errand, request: &Request) -> bool {
    match error.rejection {
        Rejection::RedirectLimit => true,
        Rejection::BadUrl | Rejection::BlockedAddress => request.is_redirected(),
        Rejection::HttpStatus => !errand.must_answer() && !error.waits_for_host(),
        _ => false,
    }
}

impl HostSlot {
    pub(super) async fn fetch(mut self, mut job: Job, connection: ConnectionPermit) {
        let batch = Arc::clone(&job.batch);
        let dispatcher = Arc::clone(&self.dispatcher);
        let Some(site) = self.pass.as_ref().map(|pass| Arc::clone(&pass.site)) else { return };
        job.start();
        job.is_open = false;
        let fetch = batch.cut.run_until_cancelled(dispatcher.take_turn(&mut job));
        let fetched = tokio::select! {
            // The process may have stood still for long: then nothing is begun.
            biased;
            () = dispatcher.ended(&site) => {
                return self.cut(|hosts, now| queue(hosts, now, None, job));
            }
            fetched = fetch => fetched,
        };
        let is_open = job.is_open;
        match fetched {
            None => {
                self.cut(|_, _| {});
                job.finish(Err(Rejection::Unfetched));
            }
            Some(Ok(Turn::Body(body))) => {
                self.give_back(is_open, HostSignal::Answered, |_, _| {});
                job.finish(Ok((body, connection)));
            }
            Some(Ok(Turn::Again)) => {
                self.give_back(is_open, HostSignal::Answered, |hosts, now| {
                    hosts.hold(now, &job.request.host(), Duration::ZERO);
                    queue(hosts, now, None, job);
                });
            }
            Some(Ok(Turn::Wait(pause))) => {
                self.give_back(is_open, HostSignal::Unknown, |hosts, now| {
                    hosts.hold(now, &job.request.host(), pause);
                    queue(hosts, now, None, job);
                });
            }
            Some(Ok(Turn::Refused(signal))) => {
                self.give_back(is_open, HostSignal::Unknown, |_, _| {});
                job.request.info.detail = Some(signal);
                job.finish(Err(Rejection::OptedOut));
            }
            Some(Err(error)) if error.waits_for_host() && job.throttled < THROTTLED => {
                job.throttled += 1;
                let host = job.host();
                let info = std::mem::take(&mut job.request.info);
                job.retried = Some((Rejection::Unfetched, info));
                job.request.begin_again();
                // If the host is given up for it, it is handed back.
                self.give_back(is_open, error.signal, |hosts, now| match hosts.given_up(now, &host) {
                    Some(why) => job.give_up(why),
                    None => queue(hosts, now, None, job),
                });
            }
            Some(Err(error)) if job.came_late(&error) => {
                (job.waited, job.renewed) = (false, true);
                job.request.begin_again();
                // Its ticket puts it before those that came later, so that it hardly waits again.
                self.give_back(is_open, error.signal, |hosts, now| queue(hosts, now, None, job));
            }
            Some(Err(error)) => {
                // A URL that fails once more says nothing new of its host: retries are the few URLs that fail, after
                // all others have their results.
                let signal = match error.signal {
                    HostSignal::Failed if job.retried.is_some() => HostSignal::Unknown,
                    signal => signal,
                };
                let mut info = std::mem::take(&mut job.request.info);
                info.detail = error.detail;
                let retry = job.request.retry(&error, &batch.limits, fastrand::f64());
                match retry.filter(|_| !batch.is_ending()) {
                    Some(backoff) => {
                        let is_busy = signal == HostSignal::Busy;
                        job.retried = Some((if is_busy { Rejection::Unfetched } else { error.rejection }, info));
                        self.give_back(is_open, signal, |hosts, now| queue(hosts, now, Some(backoff), job));
                    }
                    None => {
                        job.request.info = info;
                        let host = job.host();
                        self.give_back(is_open, signal, |hosts, _| {
                            // Said to one URL after the other it is the host that has no time, and it is no try.
                            let is_later = signal == HostSignal::Busy && hosts.is_throttling(&host);
                            job.finish(Err(if is_later { Rejection::Unfetched } else { error.rejection }));
                        });
                    }
                }
            }
        }
    }

    /// Gives the pass back, late if the server may still be at work; then `then`, under the same lock.
    fn give_back(&mut self, is_open: bool, signal: HostSignal, then: impl FnOnce(&mut Hosts<Job>, Instant)) {
        self.end(|hosts, now, pass| {
            match is_open {
                true => hosts.cut(now, pass, signal),
                false => hosts.finish(now, pass, signal),
            }
            then(hosts, now);
        });
    }

    /// The same of a request that was dropped before it had an answer.
    fn cut(&mut self, then: impl FnOnce(&mut Hosts<Job>, Instant)) {
        self.end(|hosts, now, pass| {
            hosts.cut(now, pass, HostSignal::Unknown);
            then(hosts, now);
        });
    }

    fn end(&mut self, end: impl FnOnce(&mut Hosts<Job>, Instant, Pass)) {
        let Some(pass) = self.pass.take() else { return };
        let mut hosts = self.dispatcher.hosts();
        end(&mut hosts, Instant::now(), pass);
        self.dispatcher.wake(hosts);
    }
}

impl Drop for HostSlot {
    fn drop(&mut self) {
        self.cut(|_, _| {});
    }
}

/// Lets a URL wait for its host, and for a backoff before; one of a batch that is ending has waited long enough. (A
/// batch says that it is ending before it takes out what waits.)
fn queue(hosts: &mut Hosts<Job>, now: Instant, backoff: Option<Duration>, mut job: Job) {
    let (host, ticket) = (job.host(), job.ticket);
    job.waited |= job.request.is_redirected();
    match backoff {
        _ if job.batch.is_ending() => job.finish(Err(Rejection::Unfetched)),
        Some(backoff) => hosts.push_later(now, backoff, &host, ticket, job),
        None => hosts.push(now, &host, ticket, job),
    }
}
