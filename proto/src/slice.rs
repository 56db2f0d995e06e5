//! A slice: the URLs of one shard (see [`crate::keys::slice`]). One line each, `KEY<TAB>synset<TAB>url`, packed by
//! zstd. Behind the URL may stand a tab and the [columns](crate::columns) that travel with it: a URL in front of such
//! has no tabs in it. URL and columns together are the line's tail.

use std::io::{self, BufWriter, IntoInnerError, Write};

use crate::format::FormatError;

/// One URL of the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Its ordinal in the catalog.
    pub key: u64,
    /// Its class.
    pub synset: &'a str,
    /// As in the list, which may hold what is no URL at all.
    pub url: &'a str,
    /// A JSON object; empty: there are none.
    pub columns: &'a str,
}

/// The URL of a tail and its columns.
pub fn split_tail(tail: &str) -> (&str, &str) {
    let columns = tail.strip_suffix('}').and_then(|_| tail.rsplit_once("\t{"));
    columns.map_or((tail, ""), |(url, _)| (url, &tail[url.len() + 1..]))
}

/// Packs the entries of one slice.
pub struct SliceWriter {
    /// zstd is asked once for many lines.
    encoder: BufWriter<zstd::Encoder<'static, Vec<u8>>>,
    urls: u32,
}

impl SliceWriter {
    /// Without entries.
    ///
    /// # Errors
    /// If zstd has no memory.
    pub fn new() -> io::Result<Self> {
        let encoder = zstd::Encoder::new(Vec::new(), 3)?;
        Ok(Self { encoder: BufWriter::with_capacity(64 << 10, encoder), urls: 0 })
    }

    /// Appends an entry, whose synset has no tab and which has no line breaks: UTF-8 both. `tail` is its URL, behind
    /// which its columns may stand.
    ///
    /// # Errors
    /// If zstd has no memory.
    pub fn push(&mut self, key: u64, synset: &[u8], tail: &[u8]) -> io::Result<()> {
        self.urls += 1;
        write!(self.encoder, "{key}\t")?;
        [synset, b"\t", tail, b"\n"].into_iter().try_for_each(|part| self.encoder.write_all(part))
    }

    /// Entries so far.
    pub fn urls(&self) -> u32 {
        self.urls
    }

    /// The stored form.
    ///
    /// # Errors
    /// If zstd has no memory.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        self.encoder.into_inner().map_err(IntoInnerError::into_error)?.finish()
    }
}

/// The text of a slice, unpacked; see [`entries`].
///
/// # Errors
/// If the bytes are not packed by zstd, or not UTF-8.
pub fn unpack(stored: &[u8]) -> Result<String, FormatError> {
    let text = zstd::decode_all(stored).map_err(|error| FormatError(format!("slice: {error}")))?;
    String::from_utf8(text).map_err(|error| FormatError(format!("slice: {error}")))
}

/// The entries of an unpacked slice in order; an error in the place of a line that is none.
pub fn entries(text: &str) -> impl Iterator<Item = Result<Entry<'_>, FormatError>> {
    (1..).zip(text.lines()).map(|(number, line)| {
        let bad = || FormatError(format!("slice: line {number} is not KEY<TAB>synset<TAB>url: {line:?}"));
        entry(line).ok_or_else(bad)
    })
}

fn entry(line: &str) -> Option<Entry<'_>> {
    let mut fields = line.splitn(3, '\t');
    let (key, synset) = (fields.next()?.parse().ok()?, fields.next()?);
    let (url, columns) = split_tail(fields.next()?);
    Some(Entry { key, synset, url, columns })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_back_whatever_their_urls_hold() {
        let written = [
            Entry { key: 7, synset: "n1", url: "http://a/\tb", columns: "" },
            Entry { key: 1 << 60, synset: "golden retriever", url: "no URL at all", columns: "" },
            Entry { key: 8, synset: "n1", url: "http://a/{}", columns: r#"{"caption":"a {b}","n":[{}]}"# },
        ];
        let mut writer = SliceWriter::new().expect("memory");
        for entry in written {
            let tail = if entry.columns.is_empty() { "" } else { "\t" };
            let tail = [entry.url, tail, entry.columns].concat();
            writer.push(entry.key, entry.synset.as_bytes(), tail.as_bytes()).expect("memory");
        }
        assert_eq!(writer.urls(), 3);
        let stored = writer.finish().expect("memory");
        let text = unpack(&stored).expect("own output");
        assert_eq!(entries(&text).collect::<Result<Vec<_>, _>>().expect("own output"), written);
        assert!(unpack(&stored[..stored.len() - 3]).is_err(), "cut short");
    }

    #[test]
    fn a_line_that_is_no_entry_is_named() {
        let found: Vec<_> = entries("1\tn1\tu\nx\tn1\tu\n2\tn1\n").map(|found| found.map(|entry| entry.key)).collect();
        assert!(matches!(found[..], [Ok(1), Err(_), Err(_)]), "{found:?}");
        assert!(found[2].as_ref().expect_err("no URL").to_string().contains("line 3"));
    }
}
