//! What lists of every format hold: entries, each with a URL, a class and perhaps columns that travel with the picture.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use memchr::memchr2;
use percent_encoding::{CONTROLS, percent_encode};
use proto::Synset;
use proto::outcomes::LONGEST_URL;
use proto::pb::ListFormat;

use crate::error::Error;

/// How the lines of a list are to be read.
#[derive(Debug, Clone, Default)]
pub(crate) struct ListOptions {
    pub(crate) format: ListFormat,
    /// Name of the column, in formats that have any; empty: one of the usual names.
    pub(crate) synset_column: String,
    /// Likewise.
    pub(crate) url_column: String,
    /// An address with names of columns in braces, of which each URL is made; empty: a column has it.
    pub(crate) url_format: String,
    /// The names of all columns, for lists without a header.
    pub(crate) columns: Vec<String>,
    /// There are no classes.
    pub(crate) unlabelled: bool,
    /// Columns that travel with the pictures; `all`: every one.
    pub(crate) keep: Vec<String>,
    /// For temporary files; None: the system's folder.
    pub(crate) folder: Option<PathBuf>,
    /// The most bytes of one that may be unpacked into a temporary file; None: without end.
    pub(crate) largest: Option<u64>,
}

/// What a line says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// A picture, and a class of it.
    Entry(Entry<'a>),
    /// A class that is not in its picture.
    Absent,
    /// Nothing that could be used, and why.
    Bad(String),
}

/// A picture, and a class of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    pub(crate) synset: &'a str,
    pub(crate) url: &'a str,
    /// See [`proto::columns`].
    pub(crate) columns: &'a str,
}

/// Takes the lines of a source with their numbers. One with several classes comes once for each.
pub(crate) type Each<'a> = &'a mut dyn FnMut(u64, Line<'_>) -> Result<(), Error>;

/// A line's entry, or what is wrong with it.
pub(super) fn entry<'a>(synset: &'a str, url: &'a str, columns: &'a str) -> Line<'a> {
    let synset = synset.trim();
    if synset.is_empty() {
        Line::Bad("no synset".to_owned())
    } else if synset.contains(char::is_control) {
        Line::Bad(format!("synset {synset:?} has a control character in it"))
    } else if is_url(synset) {
        Line::Bad(format!("the class is a URL, {synset:?}: --columns says what stands where"))
    } else if synset.len() > Synset::LONGEST {
        let (is, most) = (synset.len(), Synset::LONGEST);
        Line::Bad(format!("a synset of {is} bytes; {most} are allowed (--unlabelled is for lists without classes)"))
    } else if url.len() > LONGEST_URL {
        Line::Bad(format!("a URL of {} bytes; {LONGEST_URL} are allowed", url.len()))
    } else if url.is_empty() {
        Line::Bad("no URL".to_owned())
    } else if memchr2(b'\n', b'\r', url.as_bytes()).is_some() {
        Line::Bad("a line break in the URL".to_owned())
    } else {
        Line::Entry(Entry { synset, url, columns })
    }
}

/// Whether a text begins as addresses do.
pub(super) fn is_url(text: &str) -> bool {
    let scheme = text.split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| (2..=8).contains(&scheme.len()) && scheme.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// A text as it is meant: without white space around it and the quotes of a field.
pub(super) fn clean_text(field: &[u8]) -> Result<Cow<'_, str>, String> {
    let text = std::str::from_utf8(field).map_err(|_| "not UTF-8".to_owned())?.trim();
    Ok(match text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
        Some(quoted) if quoted.contains("\"\"") => quoted.replace("\"\"", "\"").into(),
        Some(quoted) => quoted.trim().into(),
        None => text.into(),
    })
}

/// A URL as it is meant: without white space and quotes around it, without tabs, which browsers pass over, and with
/// `&amp;` and the like undone. What is not UTF-8 is percent-encoded.
pub(super) fn clean_url(field: &[u8]) -> Cow<'_, str> {
    let Ok(text) = std::str::from_utf8(field) else {
        return undone(bare(&percent_encode(field.trim_ascii(), CONTROLS).to_string())).into();
    };
    let text = bare(text);
    if memchr2(b'&', b'\t', text.as_bytes()).is_some() { undone(text).into() } else { text.into() }
}

fn bare(text: &str) -> &str {
    let text = text.trim();
    let quotes = [('"', '"'), ('\'', '\''), ('<', '>')].into_iter();
    let mut quoted = quotes.filter_map(|(open, close)| text.strip_prefix(open)?.strip_suffix(close));
    quoted.next().map_or(text, str::trim)
}

/// Without tabs, and with HTML's entities undone.
fn undone(text: &str) -> String {
    let mut url = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['&', '\t']) {
        url.push_str(&rest[..at]);
        rest = &rest[at..];
        let (meant, length) = match rest.as_bytes()[0] {
            b'\t' => (None, 1),
            _ => entity(rest).map_or((Some('&'), 1), |(meant, length)| (Some(meant), length)),
        };
        url.extend(meant);
        rest = &rest[length..];
    }
    url + rest
}

/// What an entity at the beginning of a text stands for, and its length.
fn entity(text: &str) -> Option<(char, usize)> {
    let end = text.bytes().take(10).position(|byte| byte == b';')?;
    let meant = match &text[1..end] {
        "amp" => '&',
        "quot" => '"',
        "apos" => '\'',
        "lt" => '<',
        "gt" => '>',
        name => {
            let number = name.strip_prefix('#')?;
            let code = match number.strip_prefix(['x', 'X']) {
                Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                None => number.parse().ok()?,
            };
            char::from_u32(code).filter(|meant| !meant.is_control())?
        }
    };
    Some((meant, end + 1))
}

/// That a source cannot be read.
pub(super) fn unreadable(name: &str, error: &io::Error) -> Error {
    match error.kind() {
        // What the channel to the caller's stream says when the caller went away.
        io::ErrorKind::ConnectionAborted => Error::Aborted(format!("{name}: {error}")),
        _ => Error::Invalid(format!("{name}: cannot be read: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_as_they_are_meant() {
        for (written, meant) in [
            (&b" http://a/x \t"[..], "http://a/x"),
            (b"\"http://a/x\"", "http://a/x"),
            (b"'http://a/x'", "http://a/x"),
            (b"<http://a/x>", "http://a/x"),
            (b"http://a/?a=1&amp;b=2&#38;c=3&#x26;d=&quot;", "http://a/?a=1&b=2&c=3&d=\""),
            (b"http://a/?a=1&b=2&copy=3&amp", "http://a/?a=1&b=2&copy=3&amp"),
            (b"http://a/&;&#;&#x;&#10;&#1114112;", "http://a/&;&#;&#x;&#10;&#1114112;"),
            ("http://a/é&amp;ü".as_bytes(), "http://a/é&ü"),
            (b"http://a/b\tc", "http://a/bc"),
            (b"http://a/\xe9t\xe9?x&amp;y", "http://a/%E9t%E9?x&y"),
            (b"", ""),
            (b"\"", "\""),
        ] {
            assert_eq!(clean_url(written), meant);
        }
    }

    #[test]
    fn texts_lose_the_quotes_of_their_field_and_nothing_else() {
        for (written, meant) in [
            (&b" golden retriever "[..], "golden retriever"),
            (b"\"say \"\"cheese\"\"\"", "say \"cheese\""),
            (b"5\" nail", "5\" nail"),
            (b"\"", "\""),
        ] {
            assert_eq!(clean_text(written).expect("UTF-8"), meant);
        }
        assert!(clean_text(b"\xe9").is_err());
    }
}
