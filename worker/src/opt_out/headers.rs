//! What the headers of a response say against the use of its picture.

use proto::Signal;
use reqwest::header::HeaderMap;

use super::{Respect, preferences, tdm};

/// Directives of `X-Robots-Tag` that look like an agent's name with its directive.
const TAKES_A_VALUE: [&str; 4] = ["unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"];

/// By which of the signals that are respected the owner says no, to all or to an agent of this name.
pub(crate) fn said_in_headers(headers: &HeaderMap, respect: Respect, agent: &str) -> Option<&'static str> {
    let refuses = |signal| match signal {
        Signal::Robots => false,
        Signal::XRobotsTag => robots_tag(headers, agent),
        Signal::Tdm => texts(headers, "tdm-reservation").filter_map(|text| tdm::said(&text)).next_back() == Some(true),
        Signal::ContentUsage | Signal::ContentSignal => {
            // Several headers of a name are one list (RFC 9110, 5.3).
            let list = texts(headers, signal.name()).collect::<Vec<_>>().join(",");
            preferences::may_learn(signal, &list) == Some(false)
        }
    };
    let name = |signal| match signal {
        Signal::Tdm => "tdm-reservation",
        signal => signal.name(),
    };
    Signal::ALL.into_iter().find(|signal| respect.includes(*signal) && refuses(*signal)).map(name)
}

fn texts<'a>(headers: &'a HeaderMap, name: &str) -> impl DoubleEndedIterator<Item = String> + use<'a> {
    headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// `X-Robots-Tag` with `noai`, `noimageai`, `noindex` or `noimageindex`. `none` means `noindex, nofollow`.
fn robots_tag(headers: &HeaderMap, agent: &str) -> bool {
    texts(headers, "x-robots-tag").any(|text| {
        let mut meant = true;
        text.to_ascii_lowercase().split(',').any(|part| {
            let directive = match part.split_once(':') {
                Some((key, _)) if TAKES_A_VALUE.contains(&key.trim()) => return false,
                Some((name, directive)) => {
                    meant = name.trim().eq_ignore_ascii_case(agent) || name.trim() == "*";
                    directive
                }
                None => part,
            };
            meant && matches!(directive.trim(), "noai" | "noimageai" | "noindex" | "noimageindex" | "none")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(headers: &[(&str, &str)], respect: &[Signal]) -> Option<&'static str> {
        let parse = |(name, value): &(&str, &str)| {
            (name.parse::<reqwest::header::HeaderName>().expect("a name"), value.parse().expect("a value"))
        };
        said_in_headers(&headers.iter().map(parse).collect(), respect.iter().copied().collect(), "Gleaner")
    }

    #[test]
    fn robots_tags_count_if_they_are_said_to_all_or_to_us() {
        let tags = |values: &[&str]| {
            let headers: Vec<(&str, &str)> = values.iter().map(|value| ("x-robots-tag", *value)).collect();
            said(&headers, &Signal::ALL)
        };
        for yes in [
            "noai",
            "NoImageAI",
            "noarchive, noindex",
            "gleaner: noai",
            "*: noai",
            "none",
            "unavailable_after: 2099, noai",
            "noarchive, unavailable_after: 2099, noai",
            "max-image-preview:large, noai",
        ] {
            assert_eq!(tags(&[yes]), Some("x-robots-tag"), "{yes}");
        }
        for no in ["", "all", "nofollow", "otherbot: noindex, noai", "unavailable_after: noindex"] {
            assert_eq!(tags(&[no]), None, "{no}");
        }
        assert_eq!(tags(&["otherbot: noindex", "noai"]), Some("x-robots-tag"));
    }

    #[test]
    fn each_signal_counts_only_where_it_is_respected() {
        for (signal, name, value) in [
            (Signal::Tdm, "tdm-reservation", "1"),
            (Signal::ContentUsage, "content-usage", "search=y, train-ai=n"),
            (Signal::ContentSignal, "content-signal", "ai-train=no"),
            (Signal::XRobotsTag, "x-robots-tag", "noai"),
        ] {
            assert_eq!(said(&[(name, value)], &[signal]), Some(name));
            let others: Vec<Signal> = Signal::ALL.into_iter().filter(|other| *other != signal).collect();
            assert_eq!(said(&[(name, value)], &others), None, "{name}");
        }
        let yes = [("tdm-reservation", "0"), ("content-usage", "train-ai=y"), ("content-signal", "ai-train=yes")];
        assert_eq!(said(&yes, &Signal::ALL), None);
        let twice = [("content-usage", "search=y"), ("content-usage", "train-ai=n")];
        assert_eq!(said(&twice, &Signal::ALL), Some("content-usage"));
    }
}
