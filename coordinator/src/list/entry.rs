//! What lists of every format hold: entries, each with a synset and a URL, perhaps in columns that have names.

use std::io;
use std::path::PathBuf;

use proto::Synset;
use proto::outcomes::LONGEST_URL;
use proto::pb::ListFormat;

use crate::error::Error;

/// Columns that hold the class, the most telling first. `LabelName` is Open Images'.
const SYNSETS: &[&str] =
    &["synset", "wnid", "synsetid", "labelname", "class", "classid", "label", "labelid", "category", "target"];

/// Columns that hold the URL. `OriginalURL` is Open Images'; `Thumbnail300KURL` beside it is not wanted.
const URLS: &[&str] = &["url", "imageurl", "imgurl", "originalurl", "photoimageurl", "imagelink", "link", "uri", "src"];

/// A line of more bytes than this is bad.
pub(super) const LONGEST_LINE: usize = 64 << 10;

/// How the lines of a list are to be read.
#[derive(Debug, Clone, Default)]
pub(crate) struct ListOptions {
    pub(crate) format: ListFormat,
    /// Name of the column, in formats that have any; empty: one of the usual names.
    pub(crate) synset_column: String,
    /// Likewise.
    pub(crate) url_column: String,
    /// For temporary files; None: the system's folder.
    pub(crate) folder: Option<PathBuf>,
}

/// One line: synset and URL, or what is wrong with it.
pub(crate) type Line<'a> = Result<(&'a str, &'a str), String>;

/// Takes the lines of a source with their numbers.
pub(crate) type Each<'a> = &'a mut dyn FnMut(u64, Line<'_>) -> Result<(), Error>;

/// A line's entry, or what is wrong with it.
pub(super) fn entry<'a>(synset: &'a str, url: &'a str) -> Line<'a> {
    let (synset, url) = (synset.trim(), url.trim());
    if synset.is_empty() {
        Err("no synset".to_owned())
    } else if synset.contains(char::is_whitespace) {
        Err(format!("synset {synset:?} has white space in it"))
    } else if synset.len() > Synset::LONGEST {
        Err(format!("a synset of {} bytes; {} are allowed", synset.len(), Synset::LONGEST))
    } else if url.len() > LONGEST_URL {
        Err(format!("a URL of {} bytes; {LONGEST_URL} are allowed", url.len()))
    } else if url.is_empty() {
        Err("no URL".to_owned())
    } else if url.contains(['\n', '\r']) {
        Err("a line break in the URL".to_owned())
    } else {
        Ok((synset, url))
    }
}

/// The places of the synset's and the URL's column among `there`; what is missing is said by the name that was wanted.
pub(super) fn find_columns<'a>(
    there: impl Iterator<Item = &'a str> + Clone,
    options: &ListOptions,
) -> Result<(usize, usize), &'static str> {
    let plain = |name: &str| -> String {
        name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
    };
    let find = |given: &str, usual: &[&str]| match given {
        "" => usual.iter().find_map(|usual| there.clone().position(|column| plain(column) == *usual)),
        given => there.clone().position(|column| column == given),
    };
    match (find(&options.synset_column, SYNSETS), find(&options.url_column, URLS)) {
        (Some(synset), Some(url)) => Ok((synset, url)),
        (None, _) => Err("class"),
        (_, None) => Err("URL"),
    }
}

/// That a column is not there, which are, and what to do.
pub(super) fn no_column<'a>(
    name: &str,
    what: &str,
    there: impl Iterator<Item = &'a str>,
    options: &ListOptions,
) -> Error {
    let (given, flag) = match what {
        "class" => (&options.synset_column, "--synset-column"),
        _ => (&options.url_column, "--url-column"),
    };
    let wanted = if given.is_empty() { format!("for the {what}") } else { format!("{given:?}") };
    let there: Vec<&str> = there.collect();
    Error::Invalid(format!("{name}: no column {wanted}; it has {}. Name the right one with {flag}", there.join(", ")))
}

/// That a source cannot be read.
pub(super) fn unreadable(name: &str, error: &io::Error) -> Error {
    match error.kind() {
        // What the channel to the caller's stream says when the caller went away.
        io::ErrorKind::ConnectionAborted => Error::Aborted(format!("{name}: {error}")),
        _ => Error::Invalid(format!("{name}: cannot be read: {error}")),
    }
}
