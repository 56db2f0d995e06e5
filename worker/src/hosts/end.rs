//! How requests end: what each says of its host and site, and from when on its place is free.

use std::time::Duration;

use tokio::time::Instant;

use super::host::{GiveUp, Host};
use super::{Hosts, Pass};

/// So many times in a row a host's rate is halved before it is given up; or until it cannot be halved any more.
const HALVINGS: u32 = 6;
/// A host that wants to be left alone for longer is given up.
const LONGEST_COOLDOWN: Duration = Duration::from_secs(300);
/// For so long a host is given up that throttles, or for as long as it wants, within [`LONGEST_REST`]. The coordinator
/// lets a round wait for longer that was opened for nothing else.
const REST: Duration = Duration::from_secs(180);
const LONGEST_REST: Duration = Duration::from_secs(24 * 3600);
/// A server that a request was cut hears of that late, if at all: it still counts for so long.
const CUT_COUNTS: Duration = Duration::from_secs(1);

/// What a request says about its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HostSignal {
    /// It answers.
    Answered,
    /// It does not answer, or says that it is in trouble.
    Failed,
    /// It asks to be left alone for so long (429).
    Throttled(Duration),
    /// It has no time for this URL now (503 with `Retry-After`).
    Busy,
    /// Nothing.
    Unknown,
}

impl<T> Hosts<T> {
    /// Gives back the pass of a request that has its whole answer, or whose server has ended it.
    pub(crate) fn finish(&mut self, now: Instant, pass: Pass, signal: HostSignal) {
        self.hear(now, &pass, signal);
        self.free(now, pass);
    }

    /// The same of a request that this side has ended, as by a timeout. Its server may still be at work on it: it keeps
    /// its place until that can have heard.
    pub(crate) fn cut(&mut self, now: Instant, pass: Pass, signal: HostSignal) {
        self.hear(now, &pass, signal);
        self.settle_host(now, &pass.host);
        self.cut.push_back((now + CUT_COUNTS, pass));
    }

    pub(super) fn end_cut(&mut self, now: Instant) {
        while self.cut.front().is_some_and(|(until, _)| *until <= now) {
            let Some((_, pass)) = self.cut.pop_front() else { return };
            self.free(now, pass);
        }
    }

    fn hear(&mut self, now: Instant, Pass { host, site, begun }: &Pass, signal: HostSignal) {
        let (Some(at), Some(site)) = (self.hosts.get_mut(host), self.sites.get_mut(site)) else { return };
        let before = at.given_up;
        match signal {
            HostSignal::Answered => {
                (at.failures, at.pauses, at.halvings, at.given_up) = (0, 0, 0, None);
                site.pace.answered(now);
                if let Some((_, pace)) = &mut at.own {
                    pace.answered(now);
                }
            }
            HostSignal::Failed => at.fail(now),
            HostSignal::Throttled(cooldown) => {
                let pace = at.own.as_mut().map_or(&mut site.pace, |(_, pace)| pace);
                let was_slowest = pace.is_slowest();
                let is_news = pace.throttled(now, *begun, cooldown.min(LONGEST_COOLDOWN));
                (at.halvings, site.news) = (at.halvings + u32::from(is_news), is_news || site.news);
                if is_news && (was_slowest || at.halvings >= HALVINGS) || cooldown > LONGEST_COOLDOWN {
                    at.given_up = Some((now + cooldown.clamp(REST, LONGEST_REST), GiveUp::Throttled));
                }
            }
            HostSignal::Busy => {
                let pace = at.own.as_mut().map_or(&mut site.pace, |(_, pace)| pace);
                let is_news = pace.busy(now, *begun);
                (at.halvings, site.news) = (at.halvings + u32::from(is_news), is_news || site.news);
                if is_news && at.halvings >= HALVINGS {
                    at.given_up = Some((now + REST, GiveUp::Throttled));
                }
            }
            HostSignal::Unknown => {}
        }
        if let Some(why) = at.given_up(now).filter(|_| at.given_up != before) {
            site.queued -= at.queue.len();
            self.given_up.extend(std::mem::take(&mut at.queue).into_values().map(|item| (item, why)));
        }
    }

    fn free(&mut self, now: Instant, Pass { host, site, .. }: Pass) {
        let (Some(at), Some(site)) = (self.hosts.get_mut(&host), self.sites.get_mut(&site)) else { return };
        (at.in_flight, site.in_flight) = (at.in_flight - 1, site.in_flight - 1);
        (at.touched, site.touched) = (now, now);
        self.settle_host(now, &host);
        if self.hosts.get(&host).is_some_and(Host::is_blank) {
            self.hosts.remove(&host);
        }
    }
}
