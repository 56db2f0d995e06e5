//! What this process knows of sites' files. One URL of a site goes and fetches a file; the others wait for it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use proto::pb::{KnownRules, SiteRules};
use tokio::time::Instant;
use url::Url;

use super::{Exchange, Respect, SiteFile};

/// For so long a file counts as it was (RFC 9309, 2.4).
const FRESH: Duration = Duration::from_secs(24 * 3600);
/// One that only this worker knows, as it may come from something between the worker and the site.
const FRESH_HERE: Duration = Duration::from_secs(3600);
/// After a failure the site's URLs do not wait for each other for so long: as many go and see as its budget lets.
const FAILING: Duration = Duration::from_secs(60);
/// The next look at whether another URL has fetched the file, if nobody tells earlier.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// All files together; then the oldest are forgotten.
const MOST_BYTES: usize = 48 << 20;
/// What a file takes beside its rules.
const OVERHEAD: usize = 300;

/// Whether a URL may be asked for.
#[derive(Debug)]
pub(crate) enum Judgement {
    Allowed,
    /// The signal by which its owner says no.
    Refused(&'static str),
    /// Its site's file has to be had first.
    Ask(Errand),
    /// Somebody is fetching it; look again after so long.
    Wait(Duration),
}

/// What comes of an errand's first way, to the cluster.
#[derive(Debug)]
pub(crate) enum Step {
    /// It is known now.
    Known,
    /// It is to be fetched from the site.
    Fetch(Errand),
    /// Another worker fetches it; ask again after so long.
    Wait(Duration),
}

/// One per process.
#[derive(Debug)]
pub(crate) struct KnownSites {
    /// As whom files are read.
    agent: String,
    exchange: Exchange,
    files: Mutex<Files>,
}

#[derive(Debug, Default)]
struct Files {
    by_url: HashMap<Arc<str>, State>,
    /// But those that are being fetched, in the order in which they came.
    known: VecDeque<(Arc<str>, usize)>,
    bytes: usize,
}

#[derive(Debug)]
enum State {
    Fetching,
    Failing { until: Instant },
    Known { rules: SiteRules, until: Instant },
}

impl KnownSites {
    pub(crate) fn new(agent: String) -> Self {
        Self { agent, exchange: Exchange::new(), files: Mutex::default() }
    }

    pub(crate) fn agent(&self) -> &str {
        &self.agent
    }

    pub(crate) fn exchange(&self) -> &Exchange {
        &self.exchange
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        // Nothing under the lock can leave it half changed.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a URL may be asked for, by what its site says in files.
    pub(crate) fn judge(self: &Arc<Self>, now: Instant, url: &Url, respect: Respect) -> Judgement {
        let wanted = SiteFile::ALL.into_iter().filter(|file| respect.any(file.signals()));
        for file in wanted {
            let at: Arc<str> = file.of(url).into();
            let errand = |at: &Arc<str>| Errand { of: Arc::clone(self), file, url: Arc::clone(at), is_over: false };
            let mut files = self.files();
            match files.by_url.get(&at) {
                Some(State::Known { rules, until }) if now < *until => {
                    if let Some(signal) = file.refuses(rules, respect, url) {
                        return Judgement::Refused(signal);
                    }
                }
                Some(State::Fetching) => return Judgement::Wait(LOOK_AGAIN),
                Some(State::Failing { until }) if now < *until => return Judgement::Ask(errand(&at)),
                _ => {
                    files.set(Arc::clone(&at), State::Fetching);
                    return Judgement::Ask(errand(&at));
                }
            }
        }
        Judgement::Allowed
    }

    /// Asks the cluster first.
    pub(crate) async fn ask(&self, errand: Errand) -> Step {
        match self.exchange.ask(errand.url.to_string()).await {
            KnownRules { rules: Some(rules), age_millis, .. } => {
                let age = Duration::from_millis(age_millis).min(FRESH);
                errand.end(State::Known { rules, until: Instant::now() + (FRESH - age) });
                Step::Known
            }
            KnownRules { wait_millis: 0, .. } => Step::Fetch(errand),
            KnownRules { wait_millis, .. } => Step::Wait(Duration::from_millis(wait_millis).min(FAILING)),
        }
    }

    /// Forgets all files: it was not their sites that gave them, perhaps.
    pub(crate) fn forget(&self) {
        let mut files = self.files();
        files.by_url.retain(|_, state| matches!(state, State::Fetching));
        (files.known, files.bytes) = Default::default();
    }
}

impl Files {
    fn set(&mut self, url: Arc<str>, state: State) {
        let bytes = match &state {
            State::Fetching => 0,
            State::Failing { .. } => OVERHEAD + url.len(),
            State::Known { rules, .. } => OVERHEAD + url.len() + 2 * rules.encoded_len(),
        };
        if bytes > 0 {
            self.known.push_back((Arc::clone(&url), bytes));
            self.bytes += bytes;
        }
        self.by_url.insert(url, state);
        while self.bytes > MOST_BYTES
            && let Some((oldest, bytes)) = self.known.pop_front()
        {
            self.bytes -= bytes;
            // One that came a second time is forgotten early, which costs a request.
            if !matches!(self.by_url.get(&oldest), Some(State::Fetching)) {
                self.by_url.remove(&oldest);
            }
        }
    }
}

/// The right to fetch a file, and the duty to say what came of it: one that is dropped lets another URL go.
#[derive(Debug)]
pub(crate) struct Errand {
    of: Arc<KnownSites>,
    file: SiteFile,
    url: Arc<str>,
    is_over: bool,
}

impl Errand {
    /// Where the file is.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// What the file is called.
    pub(crate) fn name(&self) -> &'static str {
        self.file.name()
    }

    /// Whether a site that has trouble with the file is in trouble.
    pub(crate) fn must_answer(&self) -> bool {
        self.file == SiteFile::Robots
    }

    /// This is the file; none: the site has no such file.
    pub(crate) fn found(self, text: Option<&[u8]>) {
        let text = text.unwrap_or_default();
        let rules = self.file.parse(text, &self.of.agent);
        // A page instead of a file: a portal's, perhaps, which stands before this worker alone.
        let is_page = text.trim_ascii_start().starts_with(b"<");
        self.of.exchange.tell(self.url.to_string(), (!is_page).then(|| rules.clone()));
        let until = Instant::now() + if is_page { FRESH_HERE } else { FRESH };
        self.end(State::Known { rules, until });
    }

    /// It could not be had: the site does not answer, or is in trouble.
    pub(crate) fn failed(self) {
        self.of.exchange.tell(self.url.to_string(), None);
        self.end(State::Failing { until: Instant::now() + FAILING });
    }

    fn end(mut self, state: State) {
        self.is_over = true;
        self.of.files().set(Arc::clone(&self.url), state);
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        if !self.is_over {
            let mut files = self.of.files();
            if matches!(files.by_url.get(&self.url), Some(State::Fetching)) {
                files.by_url.remove(&self.url);
                drop(files);
                self.of.exchange.tell(self.url.to_string(), None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Signal;

    const URL: &str = "http://a.example/x/1.jpg";

    fn judge(known: &Arc<KnownSites>, now: Instant, signals: &[Signal]) -> Judgement {
        known.judge(now, &Url::parse(URL).expect("a URL"), signals.iter().copied().collect())
    }

    fn asked(judgement: Judgement) -> Errand {
        match judgement {
            Judgement::Ask(errand) => errand,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn one_url_fetches_each_file_and_the_others_wait() {
        let (known, now) = (Arc::new(KnownSites::new("Gleaner".into())), Instant::now());
        assert!(matches!(judge(&known, now, &[Signal::XRobotsTag]), Judgement::Allowed), "it is in no file");
        let robots = asked(judge(&known, now, &Signal::ALL));
        assert_eq!((robots.url(), robots.name()), ("http://a.example/robots.txt", "robots.txt"));
        assert!(matches!(judge(&known, now, &Signal::ALL), Judgement::Wait(_)));
        drop(robots);
        asked(judge(&known, now, &Signal::ALL)).found(Some(b"User-agent: *\nDisallow: /y"));
        let tdm = asked(judge(&known, now, &Signal::ALL));
        assert_eq!(tdm.url(), "http://a.example/.well-known/tdmrep.json");
        assert!(matches!(judge(&known, now, &[Signal::Robots]), Judgement::Allowed));
        tdm.found(Some(br#"[{"location": "/x", "tdm-reservation": 1}]"#));
        assert!(matches!(judge(&known, now, &Signal::ALL), Judgement::Refused("tdmrep.json")));
        let later = Instant::now() + FRESH;
        asked(judge(&known, later, &Signal::ALL)).found(None);
        assert!(matches!(judge(&known, later, &[Signal::Tdm]), Judgement::Ask(_)), "a day is over");
    }

    #[tokio::test]
    async fn urls_of_a_site_that_fails_do_not_wait_for_each_other() {
        let (known, now) = (Arc::new(KnownSites::new("Gleaner".into())), Instant::now());
        let respect = [Signal::Robots];
        asked(judge(&known, now, &respect)).failed();
        let (one, two) = (asked(judge(&known, now, &respect)), asked(judge(&known, now, &respect)));
        drop(one);
        two.found(None);
        assert!(matches!(judge(&known, now, &respect), Judgement::Allowed));
        known.forget();
        assert!(matches!(judge(&known, now, &respect), Judgement::Ask(_)));
    }

    #[test]
    fn the_oldest_are_forgotten_when_there_are_too_many() {
        let known = Arc::new(KnownSites::new("Gleaner".into()));
        let text = format!("User-agent: *\nDisallow: /{}\n", "x".repeat(400 << 10));
        let url = |n: u32| Url::parse(&format!("http://{n}.example/")).expect("a URL");
        let respect: Respect = [Signal::Robots].into_iter().collect();
        for n in 0..100 {
            asked(known.judge(Instant::now(), &url(n), respect)).found(Some(text.as_bytes()));
        }
        assert!(known.files().bytes <= MOST_BYTES && known.files().by_url.len() > 40);
        assert!(matches!(known.judge(Instant::now(), &url(99), respect), Judgement::Allowed));
        assert!(matches!(known.judge(Instant::now(), &url(0), respect), Judgement::Ask(_)));
    }
}
