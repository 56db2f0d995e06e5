//! Whether this worker has a way out to the web, or takes its own trouble for the world's.
//!
//! What is no picture is not believed at once: a name server that knows nothing, or a portal that answers everything
//! with a page, makes every URL look dead. All results are believed as soon as one of them is a picture. When many
//! hosts in a row have given none, and before an attempt commits some that are in doubt, URLs that lately gave pictures
//! are asked for once more: to this worker, to others (they come with the leases), or named by `--probe`. If one of
//! them still gives one, the others are dead. If none does the worker is *offline*: it starts nothing, attempts commit
//! what was believed and give back the rest, and the probes are asked again until one answers.
//!
//! A worker that has nothing to ask, because nobody has ever seen a picture, takes itself for offline a few times for
//! longer and longer, then believes what it sees, and says that nothing has proved it.

use std::collections::{HashSet, VecDeque};
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::BackoffBuilder;
use tokio::sync::{Notify, watch};

use crate::backoff::backoff;
use crate::metrics;

/// Spells without a way out that are remembered: attempts are over long before.
const MANY_SPELLS: usize = 100;
/// So many hosts in a row without a picture are reason to doubt.
const MANY_HOSTS: usize = 12;
/// An attempt that ends with so many URLs in doubt has probes asked before it commits.
const MANY_URLS: u64 = 8;
/// URLs that are remembered as having given pictures to this worker, and as many of others.
const REMEMBERED: usize = 8;
/// Of those, told to the coordinator.
const TOLD: usize = 4;
/// In [`PAUSE`]: a dead host is often quicker than a living one, so a worker that has nothing to ask waits so long for
/// a picture among what is under way before it takes itself for offline.
const BLIND_GRACE: u32 = 3;
/// In [`PAUSE`]: for so long a worker that has nothing to ask takes itself for offline, each time that it doubts.
const BLIND_PAUSES: [u32; 5] = [2, 4, 8, 16, 30];
/// Before probes that did not answer are asked again; doubles up to [`LONGEST_PAUSE`] times itself.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: u32 = 15;

/// Which results are believed. They have numbers in the order in which they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Belief {
    pub(crate) online: bool,
    /// Up to this one.
    believed: u64,
    /// But not these: the worker was offline.
    lost: Vec<RangeInclusive<u64>>,
    /// Whether a picture or a probe has proved the latest ones.
    pub(crate) proved: bool,
}

impl Belief {
    /// Whether the result of this number is believed.
    pub(crate) fn holds(&self, number: u64) -> bool {
        number <= self.believed && !self.lost.iter().any(|lost| lost.contains(&number))
    }
}

/// What to do about a doubt.
#[derive(Debug, PartialEq, Eq)]
enum Check {
    /// Ask these.
    Ask(Vec<String>),
    /// There is nothing to ask: wait for so many pauses as if offline.
    Blind(u32),
    /// Enough was waited: all is believed.
    Believe,
}

/// What is known. Pure.
#[derive(Debug, Default)]
struct Known {
    results: u64,
    believed: u64,
    lost: Vec<RangeInclusive<u64>>,
    /// Hosts that gave no picture since then.
    hosts: HashSet<String>,
    /// Newest last.
    own: VecDeque<String>,
    others: VecDeque<String>,
    configured: Vec<String>,
    blind: usize,
    unproved: bool,
    offline: bool,
}

impl Known {
    fn belief(&self) -> Belief {
        let (online, lost) = (!self.offline, self.lost.clone());
        Belief { online, believed: self.believed, lost, proved: !self.unproved }
    }

    /// There is a way out again; what came since it was last seen is lost.
    fn come_back(&mut self) {
        self.offline = false;
        if self.believed < self.results {
            self.lost.push(self.believed + 1..=self.results);
        }
        let most = self.lost.len().saturating_sub(MANY_SPELLS);
        self.lost.drain(..most);
        self.believe(self.results);
    }

    /// A URL has a result, whose number this returns.
    fn result(&mut self, host: &str, url: &str, picture: bool) -> u64 {
        self.results += 1;
        if picture {
            self.believe(self.results);
            (self.blind, self.unproved) = (0, false);
            remember(&mut self.own, url);
        } else if self.hosts.len() < MANY_HOSTS && !self.hosts.contains(host) {
            self.hosts.insert(host.to_owned());
        }
        self.results
    }

    fn is_doubtful(&self) -> bool {
        self.hosts.len() >= MANY_HOSTS
    }

    /// Whether an attempt whose latest result is this one may commit what it has.
    fn wants_proof(&self, latest: u64) -> bool {
        let doubted = latest.saturating_sub(self.believed);
        self.is_doubtful() && doubted > 0 || doubted >= MANY_URLS && !self.probes().is_empty()
    }

    fn believe(&mut self, up_to: u64) {
        self.believed = self.believed.max(up_to);
        self.hosts.clear();
    }

    fn probes(&self) -> Vec<String> {
        let all = self.configured.iter().chain(self.others.iter().rev()).chain(self.own.iter().rev());
        let mut seen = HashSet::new();
        all.filter(|url| seen.insert(url.as_str())).cloned().collect()
    }

    fn check(&mut self) -> Check {
        let probes = self.probes();
        if !probes.is_empty() {
            return Check::Ask(probes);
        }
        match BLIND_PAUSES.get(self.blind) {
            Some(&pauses) => {
                self.blind += 1;
                Check::Blind(pauses)
            }
            None => {
                self.unproved = true;
                Check::Believe
            }
        }
    }
}

fn remember(urls: &mut VecDeque<String>, url: &str) {
    let host = |url: &str| url.split('/').nth(2).map(str::to_owned);
    urls.retain(|known| host(known) != host(url));
    urls.push_back(url.to_owned());
    if urls.len() > REMEMBERED {
        urls.pop_front();
    }
}

/// One per process.
#[derive(Debug)]
pub(crate) struct WayOut {
    known: Mutex<Known>,
    check: Notify,
    belief: watch::Sender<Belief>,
    /// [`PAUSE`], but in tests.
    pause: Duration,
}

impl WayOut {
    /// `configured`: URLs to ask in any case.
    pub(crate) fn new(configured: Vec<String>) -> Self {
        let known = Known { configured, ..Known::default() };
        let (belief, _) = watch::channel(known.belief());
        metrics::online(true);
        Self { known: Mutex::new(known), check: Notify::new(), belief, pause: PAUSE }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing under the lock can leave it half changed.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A URL has a result, whose number this returns.
    pub(crate) fn result(&self, host: &str, url: &str, picture: bool) -> u64 {
        let mut known = self.known();
        let number = known.result(host, url, picture);
        if known.is_doubtful() && !known.offline {
            self.check.notify_one();
        }
        number
    }

    /// URLs that lately gave pictures to others.
    pub(crate) fn hear(&self, urls: &[String]) {
        let mut known = self.known();
        urls.iter().rev().for_each(|url| remember(&mut known.others, url));
    }

    /// Some that lately gave pictures to this worker.
    pub(crate) fn good(&self) -> Vec<String> {
        self.known().own.iter().rev().take(TOLD).cloned().collect()
    }

    /// Waits until there is a way out.
    pub(crate) async fn online(&self) {
        // The sender lives as long as this.
        let _ = self.belief.subscribe().wait_for(|belief| belief.online).await;
    }

    /// Waits until there is none.
    pub(crate) async fn offline(&self) {
        let _ = self.belief.subscribe().wait_for(|belief| !belief.online).await;
    }

    /// What is believed, once it is known whether the result of this number is; with a way out it is.
    pub(crate) async fn prove(&self, latest: u64) -> Belief {
        let mut changes = self.belief.subscribe();
        let belief = {
            let known = self.known();
            if known.offline || !known.wants_proof(latest) {
                let belief = known.belief();
                let believed = if belief.online { belief.believed.max(latest) } else { belief.believed };
                return Belief { believed, ..belief };
            }
            known.belief()
        };
        self.check.notify_one();
        let proved = changes.wait_for(|belief| !belief.online || belief.believed >= latest).await;
        proved.map_or(belief, |proved| proved.clone())
    }

    /// Asks the probes whenever there is doubt, for ever. `ask` says whether a URL gives a picture; `back` is called
    /// when the worker has a way out again.
    pub(crate) async fn watch<F: Future<Output = bool>>(&self, ask: impl Fn(Vec<String>) -> F, back: impl Fn()) {
        loop {
            self.check.notified().await;
            let (check, results) = {
                let mut known = self.known();
                let nothing_to_ask = known.probes().is_empty() && !known.is_doubtful();
                if known.believed >= known.results || nothing_to_ask {
                    self.tell(&known);
                    continue;
                }
                (known.check(), known.results)
            };
            match check {
                Check::Believe => {
                    tracing::warn!("no picture from any host, and nothing to compare with (--probe): taken for dead");
                }
                Check::Ask(probes) => {
                    if !ask(probes).await {
                        self.wait_for_probes(&ask).await;
                    }
                }
                Check::Blind(pauses) => {
                    tokio::time::sleep(self.pause * BLIND_GRACE).await;
                    if !self.known().is_doubtful() {
                        self.tell(&self.known());
                        continue;
                    }
                    self.go_offline(&format!("{MANY_HOSTS} hosts gave no picture, nor has any host yet"));
                    tokio::time::sleep(self.pause * pauses).await;
                }
            }
            let mut known = self.known();
            if known.offline {
                known.come_back();
                metrics::online(true);
                tracing::info!("online again");
                back();
            } else {
                known.believe(results);
            }
            self.tell(&known);
        }
    }

    async fn wait_for_probes<F: Future<Output = bool>>(&self, ask: &impl Fn(Vec<String>) -> F) {
        self.go_offline("no URL that lately gave a picture gives one now");
        for delay in backoff(self.pause, self.pause * LONGEST_PAUSE).build() {
            tokio::time::sleep(delay).await;
            let probes = self.known().probes();
            if ask(probes).await {
                return;
            }
        }
    }

    fn go_offline(&self, why: &str) {
        tracing::error!(why, "offline: this worker has no way out to the web; it gives back what it cannot fetch");
        metrics::online(false);
        let mut known = self.known();
        known.offline = true;
        self.tell(&known);
    }

    fn tell(&self, known: &Known) {
        self.belief.send_replace(known.belief());
    }
}

#[cfg(test)]
mod tests;
