//! `robots.txt` (RFC 9309), with the lines by which it says what may be learnt from.
//!
//! The crates for this know nothing of `Content-Usage` and `Content-Signal`, which belong to the same groups, so it is
//! read here.

use proto::Signal;
use proto::pb::{OptOut, PathRule, SiteRules};

use super::{paths, preferences};

/// What stands behind so many bytes does not count (RFC 9309, 2.5).
pub(super) const LARGEST: usize = 500 << 10;

/// For whom a group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    Others,
    All,
    Us,
}

/// What it says to an agent of that name: the groups that name it, else those for all.
pub(super) fn parse(text: &[u8], agent: &str) -> SiteRules {
    let text = match text.get(..LARGEST) {
        // A line that is cut would say something else.
        Some(read) if text.len() > LARGEST => &read[..read.iter().rposition(|byte| is_end(*byte)).unwrap_or(0)],
        _ => text,
    };
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let mut rules: Vec<(Group, PathRule)> = Vec::new();
    // A preference that stands before the first group is said to all.
    let (mut group, mut names_go_on, mut begun, mut named) = (Group::All, false, false, false);
    for line in text.split(|byte| is_end(*byte)) {
        let Some((key, value)) = split(line) else { continue };
        if key == "user-agent" || key == "useragent" || key == "user agent" {
            let of = whom(value, agent);
            group = if names_go_on { group.max(of) } else { of };
            (names_go_on, begun, named) = (true, true, named || of == Group::Us);
            continue;
        }
        let rule = match key.as_str() {
            "allow" | "disallow" => rule(OptOut::Robots, value, key == "allow").filter(|_| begun),
            "content-usage" => preference(Signal::ContentUsage, value),
            "content-signal" => preference(Signal::ContentSignal, value),
            // Others do not end a list of names.
            _ => continue,
        };
        names_go_on = false;
        rules.extend(rule.map(|rule| (group, rule)));
    }
    let counts = if named { Group::Us } else { Group::All };
    SiteRules { rules: rules.into_iter().filter(|(group, _)| *group == counts).map(|(_, rule)| rule).collect() }
}

fn is_end(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

/// A line's key, in small letters, and its value.
fn split(line: &[u8]) -> Option<(String, &[u8])> {
    let line = line.split(|byte| *byte == b'#').next()?.trim_ascii();
    let at = line.iter().position(|byte| *byte == b':').or_else(|| {
        // Some forget the colon: two words are taken for a key and its value.
        let words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).count();
        line.iter().position(u8::is_ascii_whitespace).filter(|_| words == 2)
    })?;
    Some((String::from_utf8_lossy(line[..at].trim_ascii()).to_ascii_lowercase(), line[at + 1..].trim_ascii()))
}

/// Whom a group with this name is for. A name ends where a product's name does: "Gleaner/1.0" names Gleaner.
fn whom(name: &[u8], agent: &str) -> Group {
    let is_named = |byte: &u8| byte.is_ascii_alphabetic() || matches!(byte, b'-' | b'_');
    let end = name.iter().position(|byte| !is_named(byte)).unwrap_or(name.len());
    match name {
        [b'*'] => Group::All,
        [b'*', next, ..] if next.is_ascii_whitespace() => Group::All,
        _ if name[..end].eq_ignore_ascii_case(agent.as_bytes()) => Group::Us,
        _ => Group::Others,
    }
}

/// An empty pattern says nothing.
fn rule(kind: OptOut, pattern: &[u8], allowed: bool) -> Option<PathRule> {
    (!pattern.is_empty()).then(|| PathRule { kind: kind.into(), pattern: paths::normal(pattern), allowed })
}

/// A preference, which may be for some paths alone.
fn preference(signal: Signal, value: &[u8]) -> Option<PathRule> {
    let end = value.iter().position(u8::is_ascii_whitespace);
    let (pattern, value) = match end {
        Some(end) if matches!(value[0], b'/' | b'*') => (&value[..end], &value[end..]),
        _ => (&b"/"[..], value),
    };
    let allowed = preferences::may_learn(signal, &String::from_utf8_lossy(value))?;
    rule(signal.into(), pattern, allowed)
}

#[cfg(test)]
mod tests {
    use super::super::is_allowed;
    use super::*;

    fn allows(text: &str, path: &str) -> bool {
        is_allowed(&parse(text.as_bytes(), "Gleaner"), Signal::Robots, path)
    }

    fn learns(text: &str, signal: Signal, path: &str) -> bool {
        is_allowed(&parse(text.as_bytes(), "gleaner"), signal, path)
    }

    #[test]
    fn the_group_that_names_us_counts_else_the_one_for_all() {
        let both = "User-agent: *\nDisallow: /\n\nUser-agent: GLEANER/2.0 (x)\nDisallow: /own";
        assert!(allows(both, "/x") && !allows(both, "/own/x"));
        assert!(!allows("User-agent: Gleaner-images\nAllow: /\nUser-agent: *\nDisallow: /", "/x"), "another's name");
        assert!(allows("User-agent: otherbot\nDisallow: /", "/x"));
        assert!(allows("User-agent: gleaner\n\nUser-agent: gleaner\nUser-agent: other\nAllow: /x", "/y"));
        let merged =
            "User-agent: gleaner\nDisallow: /a\nUser-agent: *\nDisallow: /c\nUser-agent: gleaner\nDisallow: /b";
        assert!(!allows(merged, "/a") && !allows(merged, "/b") && allows(merged, "/c"));
        let shared = "User-agent: other\nUser-agent: gleaner\nSitemap: x\nUser-agent: third\nDisallow: /a";
        assert!(!allows(shared, "/a"));
        assert!(allows("Disallow: /\nUser-agent: gleaner\nAllow: /x", "/y"), "of no group");
        assert!(allows("Disallow: /\nUser-agent: other\nDisallow: /", "/y"), "of no group");
        assert!(allows("User-agent: gleaner\nDisallow:\nUser-agent: *\nDisallow: /", "/x"), "a group without rules");
    }

    #[test]
    fn the_longest_pattern_counts_and_what_is_as_long_is_allowed() {
        let page = "User-agent: *\nAllow: /p\nDisallow: /";
        assert!(allows(page, "/page") && !allows(page, "/x"));
        assert!(allows("User-agent: *\nAllow: /folder\nDisallow: /folder", "/folder/page"));
        assert!(!allows("User-agent: *\nAllow: /page\nDisallow: /*.htm", "/page.htm"));
        assert!(
            allows("User-agent: *\nAllow: /$\nDisallow: /", "/")
                && !allows("User-agent: *\nAllow: /$\nDisallow: /", "/x")
        );
        assert!(!allows("User-agent: *\nDisallow: /foo/bar/\u{30c4}", "/foo/bar/%E3%83%84"));
    }

    #[test]
    fn it_is_read_as_people_write_it() {
        for text in [
            "\u{feff}User-agent: *\r\nDisallow: /x\r\n",
            "user-AGENT:*\rDISALLOW:/x",
            "  User-agent :  * # all\n  Disallow :  /x # no\n",
            "User-agent *\nDisallow /x",
            "User-agent: * gleaner?\nDisallow: /x",
            "<html>\nUser-agent: *\nDisallow: /x",
            "\0\u{1}\nUser-agent: *\n\n\nCrawl-delay: 5\nDisallow: /x",
        ] {
            assert!(!allows(text, "/x") && allows(text, "/y"), "{text:?}");
        }
        assert!(allows("<!doctype html><title>404</title>", "/x") && allows("", "/x"));
    }

    #[test]
    fn no_more_of_it_is_read_than_has_to_be() {
        let rule = "User-agent: *\nDisallow: /x\n";
        let filler = "#".repeat(LARGEST - rule.len() - 1) + "\n";
        assert!(!allows(&format!("{filler}{rule}"), "/x"));
        assert!(allows(&format!("{filler}\n{rule}"), "/x"), "the last line is cut");
        assert!(allows(&format!("{filler}{filler}{rule}"), "/x"));
    }

    #[test]
    fn preferences_belong_to_groups_and_paths() {
        let text = "User-agent: *\nContent-Signal: search=yes,ai-train=no\nAllow: /\nContent-Usage: /ok train-ai=y\nContent-usage: train-ai=n";
        assert!(!learns(text, Signal::ContentSignal, "/x") && allows(text, "/x"));
        assert!(learns(text, Signal::ContentUsage, "/ok/x") && !learns(text, Signal::ContentUsage, "/x"));
        let ours = format!("{text}\nUser-agent: gleaner\nAllow: /");
        assert!(learns(&ours, Signal::ContentSignal, "/x"), "another group is for us");
        assert!(!learns("Content-Signal: ai-train=no\n", Signal::ContentSignal, "/x"), "said to all");
        assert!(learns("User-agent: other\nContent-Signal: ai-train=no\n", Signal::ContentSignal, "/x"));
        let twice = "User-agent: *\nContent-Signal: ai-train=yes\nContent-Signal: ai-train=no";
        assert!(!learns(twice, Signal::ContentSignal, "/x"), "of two the no counts");
    }
}
