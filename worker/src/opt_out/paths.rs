//! Paths of URLs, and the patterns that fit them (RFC 9309, 2.2.2 and 2.2.3).

use percent_encoding::{AsciiSet, CONTROLS, percent_encode};
use url::Url;

/// What is encoded in some texts and stands as it is in others.
const ENCODED: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b'<').add(b'>').add(b'\\').add(b'^').add(b'`').add(b'{').add(b'|').add(b'}');

/// What patterns are compared with: a URL's path with its query.
pub(super) fn of_url(url: &Url) -> String {
    match url.query() {
        Some(query) => normal(format!("{}?{query}", url.path()).as_bytes()),
        None => normal(url.path().as_bytes()),
    }
}

/// One form for all ways to write the same path: only what must be is percent-encoded, with large letters.
pub(super) fn normal(text: &[u8]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = |at: usize| after.get(at).and_then(|digit| char::from(*digit).to_digit(16));
        match (byte, digits(0), digits(1)) {
            (b'%', Some(high), Some(low)) => {
                let decoded = (high * 16 + low) as u8;
                match decoded {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(decoded.into()),
                    _ => out.push_str(&format!("%{decoded:02X}")),
                }
                rest = &after[2..];
            }
            _ => {
                out.extend(percent_encode(&rest[..1], ENCODED));
                rest = after;
            }
        }
    }
    out
}

/// Whether a pattern fits the beginning of a path, both in their normal form. `*` fits anything, and `$` at the end of
/// a pattern the end of the path.
pub(super) fn fits(pattern: &str, path: &str) -> bool {
    let (pattern, to_end) = match pattern.strip_suffix('$') {
        Some(pattern) => (pattern, true),
        None => (pattern, false),
    };
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| path.strip_prefix(first)) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return !to_end || rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if to_end && parts.peek().is_none() {
            return rest.ends_with(part);
        }
        // The first place leaves the most for the parts that follow.
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_beginnings_with_stars_and_ends() {
        for (pattern, path, wanted) in [
            ("/", "/", true),
            ("/fish", "/fish.html", true),
            ("/fish", "/Fish.asp", false),
            ("/fish*", "/fishheads/yummy.html", true),
            ("/fish/", "/fish", false),
            ("/*.php", "/folder/filename.php?parameters", true),
            ("/*.php$", "/filename.php", true),
            ("/*.php$", "/filename.php?parameters", false),
            ("/*.php$", "/a.php/b.php", true),
            ("/fish*.php", "/fishheads/catfish.php?p", true),
            ("/fish*.php", "/Fish.PHP", false),
            ("*/x", "/a/x", true),
            ("/a$", "/a", true),
            ("/a$", "/ab", false),
            ("/a$b", "/a$b", true),
            ("/a*$", "/abc", true),
            ("/**a", "/xa", true),
            ("/a*a$", "/a", false),
            ("fish", "/fish", false),
            ("", "/anything", true),
        ] {
            assert_eq!(fits(pattern, path), wanted, "{pattern} {path}");
        }
        let long = "*a".repeat(30_000);
        assert!(!fits(&format!("/{long}*b"), &format!("/{}", "a".repeat(20_000))), "however long, it is soon known");
    }

    #[test]
    fn a_path_may_be_written_in_many_ways() {
        assert_eq!(normal("/\u{30c4}/%e3%83%84".as_bytes()), "/%E3%83%84/%E3%83%84");
        assert_eq!(normal(b"/foo/bar/%62%61%7A"), "/foo/bar/baz");
        assert_eq!(normal(b"/a%2Fb %2"), "/a%2Fb%20%2");
        let url = Url::parse("http://a.example/x y%7Ez\"?q=1 2#f").expect("a URL");
        assert_eq!(of_url(&url), normal(b"/x y~z\"?q=1 2"));
    }
}
