//! What owners say against the use of their pictures: beside each picture, in the headers of its response (`headers`),
//! and for whole sites, in files (`robots`, `tdm`) whose rules fit paths (`paths`).
//!
//! A site's files are read before anything else is asked of it. `known` says what is known of them in this process, and
//! lets one URL of the site fetch a file while the others wait; `exchange` asks the cluster, where another worker may
//! have read it already. Where a file cannot be had, its site's pictures are not asked for: that is the site's failure,
//! and no "no".

mod exchange;
mod headers;
mod known;
mod paths;
mod preferences;
mod robots;
mod tdm;

use proto::Signal;
use proto::pb::{OptOut, PathRule, SiteRules};
use url::Url;

use exchange::Exchange;
pub(crate) use headers::said_in_headers;
pub(crate) use known::{Errand, Judgement, KnownSites, Step};

/// So much is read of a site's file: one byte more than counts tells that there is more.
pub(crate) const SITE_FILE_BYTES: usize = robots::LARGEST + 1;

/// Which signals a dataset respects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Respect(u8);

impl Respect {
    pub(crate) fn includes(self, signal: Signal) -> bool {
        self.0 & 1 << signal as u8 != 0
    }

    fn any(self, signals: &[Signal]) -> bool {
        signals.iter().any(|signal| self.includes(*signal))
    }
}

impl FromIterator<Signal> for Respect {
    fn from_iter<T: IntoIterator<Item = Signal>>(signals: T) -> Self {
        Self(signals.into_iter().fold(0, |all, signal| all | 1 << signal as u8))
    }
}

/// A file in which a site says what may be taken from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SiteFile {
    Robots,
    Tdm,
}

impl SiteFile {
    const ALL: [Self; 2] = [Self::Robots, Self::Tdm];

    /// Which signals it may hold.
    fn signals(self) -> &'static [Signal] {
        match self {
            Self::Robots => &[Signal::Robots, Signal::ContentUsage, Signal::ContentSignal],
            Self::Tdm => &[Signal::Tdm],
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Robots => "/robots.txt",
            Self::Tdm => "/.well-known/tdmrep.json",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Robots => "robots.txt",
            Self::Tdm => "tdmrep.json",
        }
    }

    /// The one that says what holds for a URL.
    fn of(self, url: &Url) -> String {
        format!("{}{}", url.origin().ascii_serialization(), self.path())
    }

    /// What it says to an agent of that name.
    fn parse(self, text: &[u8], agent: &str) -> SiteRules {
        match self {
            Self::Robots => robots::parse(text, agent),
            Self::Tdm => tdm::parse(text),
        }
    }

    /// By which of the signals that are respected it says no to a URL.
    fn refuses(self, rules: &SiteRules, respect: Respect, url: &Url) -> Option<&'static str> {
        let path = paths::of_url(url);
        let said = self.signals().iter().filter(|signal| respect.includes(**signal));
        said.filter(|signal| !is_allowed(rules, **signal, &path)).map(|signal| self.detail(*signal)).next()
    }

    fn detail(self, signal: Signal) -> &'static str {
        match (self, signal) {
            (_, Signal::ContentUsage) => "content-usage in robots.txt",
            (_, Signal::ContentSignal) => "content-signal in robots.txt",
            _ => self.name(),
        }
    }
}

/// Of the rules that fit, the one with the longest pattern counts. Of two as long, what `robots.txt` allows is allowed
/// (RFC 9309, 2.2.2), and what others refuse is refused.
fn is_allowed(rules: &SiteRules, signal: Signal, path: &str) -> bool {
    let kind = OptOut::from(signal);
    let fits = |rule: &&PathRule| rule.kind() == kind && paths::fits(&rule.pattern, path);
    let strength = |rule: &PathRule| (rule.pattern.len(), rule.allowed == (signal == Signal::Robots));
    rules.rules.iter().filter(fits).max_by_key(|rule| strength(rule)).is_none_or(|rule| rule.allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_rule_of_its_kind_counts_and_each_signal_only_if_it_is_respected() {
        let text =
            b"User-agent: *\nDisallow: /a\nAllow: /a/b\nContent-Usage: train-ai=n\nContent-Usage: /a/ train-ai=y";
        let rules = SiteFile::Robots.parse(text, "gleaner");
        let refuses = |url: &str, respect: &[Signal]| {
            let url = Url::parse(url).expect("a URL");
            SiteFile::Robots.refuses(&rules, respect.iter().copied().collect(), &url)
        };
        assert_eq!(refuses("http://x/a/c.jpg", &Signal::ALL), Some("robots.txt"));
        assert_eq!(refuses("http://x/a/b.jpg", &Signal::ALL), None);
        assert_eq!(refuses("http://x/b.jpg", &Signal::ALL), Some("content-usage in robots.txt"));
        assert_eq!(refuses("http://x/b.jpg", &[Signal::Robots, Signal::Tdm]), None);
        assert_eq!(refuses("http://x/a/c.jpg", &[]), None);
    }

    #[test]
    fn a_file_is_that_of_scheme_host_and_port() {
        let of = |url: &str| SiteFile::Robots.of(&Url::parse(url).expect("a URL"));
        assert_eq!(of("https://u:p@A.example:443/x?y#z"), "https://a.example/robots.txt");
        assert_eq!(of("http://[::1]:8080/x"), "http://[::1]:8080/robots.txt");
    }
}
