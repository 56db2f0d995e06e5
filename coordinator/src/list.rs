//! Parses URL lists: lines of several formats, plain or compressed, as a stream in bounded memory. Parquet, which is
//! read from its end, goes through a temporary file.
//!
//! Formats with named columns need two of them. Unless they are named by the caller, the usual names are looked for
//! (`SYNSETS`, `URLS`), whatever their case and punctuation: `image_url`, `ImageURL` and `image-url` are one.

mod columns;
mod entry;

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::rc::Rc;

use proto::pb::ListFormat;

pub(crate) use self::entry::ListOptions;
use self::entry::{Each, LONGEST_LINE, entry, find_columns, no_column, unreadable};
use crate::error::Error;

/// A CSV record of more bytes than this ends the reading: a quote was never closed.
const LONGEST_RECORD: usize = 4 << 20;

/// Reads one source and hands each entry or bad line to `each`. Blank lines and lines that begin with `#` are passed
/// over.
///
/// Only a line without synset or URL is bad. One whose URL cannot be parsed is an entry like any other: its fetch has
/// an outcome of its own.
///
/// # Errors
/// If the source cannot be read or decompressed, if its header lacks a column, or if `each` fails.
pub(crate) fn read(name: &str, source: impl Read, options: &ListOptions, each: Each<'_>) -> Result<(), Error> {
    let broken = |e: io::Error| unreadable(name, &e);
    let mut source = decompress(source).map_err(broken)?;
    if source.fill_buf().map_err(broken)?.starts_with(b"\xef\xbb\xbf") {
        source.consume(3);
    }
    if options.format == ListFormat::Parquet || source.fill_buf().map_err(broken)?.starts_with(b"PAR1") {
        return columns::parquet(name, source, options, each);
    }
    // The lines up to the first that says something are read ahead, to tell the format by it.
    let (mut head, mut first) = (Vec::new(), Vec::new());
    while head.len() < 16 * LONGEST_LINE && is_blank(&first) {
        first.clear();
        if !read_line(&mut source, &mut first).map_err(broken)? {
            break;
        }
        head.extend_from_slice(&first);
        head.push(b'\n');
    }
    let format = match options.format {
        ListFormat::Auto => detect(name, &String::from_utf8_lossy(&first), options),
        given => given,
    };
    let source = BufReader::new(Cursor::new(head).chain(source));
    match format {
        ListFormat::Csv => with_header(name, source, b',', options, each),
        ListFormat::Tsv => with_header(name, source, b'\t', options, each),
        ListFormat::Jsonl => {
            let mut at = None;
            lines(name, source, each, |line| columns::json_line(line, options, &mut at))
        }
        ListFormat::WnidIdUrl => lines(name, source, each, |line| pair(line, true)),
        ListFormat::SynsetUrl | ListFormat::Auto | ListFormat::Parquet => {
            lines(name, source, each, |line| pair(line, false))
        }
    }
}

/// By the first bytes: a name's ending may be wrong, because web servers and clients compress and decompress by
/// themselves.
fn decompress<'a>(source: impl Read + 'a) -> io::Result<Box<dyn BufRead + 'a>> {
    let mut source = BufReader::with_capacity(256 << 10, source);
    let start = source.fill_buf()?;
    Ok(if start.starts_with(&[0x1f, 0x8b]) {
        Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(source)))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Box::new(BufReader::new(zstd::Decoder::with_buffer(source)?))
    } else {
        Box::new(source)
    })
}

/// Reads a line without its end into `line`, at most one byte more than [`LONGEST_LINE`] of it. False: there is none.
fn read_line(source: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    let mut any = false;
    loop {
        let buffer = source.fill_buf()?;
        if buffer.is_empty() {
            return Ok(any);
        }
        any = true;
        let end = buffer.iter().position(|&b| b == b'\n');
        let piece = &buffer[..end.unwrap_or(buffer.len())];
        let room = (LONGEST_LINE + 1).saturating_sub(line.len());
        line.extend_from_slice(&piece[..piece.len().min(room)]);
        let used = end.map_or(buffer.len(), |end| end + 1);
        source.consume(used);
        if end.is_some() {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            return Ok(true);
        }
    }
}

fn is_blank(line: &[u8]) -> bool {
    line.trim_ascii_start().first().is_none_or(|&b| b == b'#')
}

fn detect(name: &str, first: &str, options: &ListOptions) -> ListFormat {
    let header = |delimiter| {
        let fields = first.split(delimiter).map(|field: &str| field.trim().trim_matches('"'));
        find_columns(fields, options).is_ok()
    };
    if first.trim_start().starts_with('{') {
        return ListFormat::Jsonl;
    }
    if header('\t') {
        return ListFormat::Tsv;
    }
    let plain = name.trim_end_matches(".gz").trim_end_matches(".zst");
    if header(',') || plain.ends_with(".csv") {
        return ListFormat::Csv;
    }
    let is_wnid_id = |field: &str| {
        let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        field
            .strip_prefix('n')
            .and_then(|rest| rest.split_once('_'))
            .is_some_and(|(wnid, id)| digits(wnid) && digits(id))
    };
    match first.split_once('\t') {
        Some((field, _)) if is_wnid_id(field.trim()) => ListFormat::WnidIdUrl,
        _ => ListFormat::SynsetUrl,
    }
}

fn lines(
    name: &str,
    mut source: impl BufRead,
    each: Each<'_>,
    mut parse: impl FnMut(&str) -> Result<(String, String), String>,
) -> Result<(), Error> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if !read_line(&mut source, &mut line).map_err(|e| unreadable(name, &e))? {
            break;
        }
        if !is_blank(&line) {
            let parsed = text(&line).and_then(&mut parse);
            match &parsed {
                Ok((synset, url)) => each(number, entry(synset, url))?,
                Err(what) => each(number, Err(what.clone()))?,
            }
        }
    }
    Ok(())
}

fn text(line: &[u8]) -> Result<&str, String> {
    if line.len() > LONGEST_LINE {
        return Err(format!("longer than {LONGEST_LINE} bytes"));
    }
    std::str::from_utf8(line).map_err(|_| "not UTF-8".to_owned())
}

/// `synset<TAB>url`, or `synset_id<TAB>url`.
fn pair(line: &str, with_id: bool) -> Result<(String, String), String> {
    let (synset, url) = line.split_once('\t').ok_or("no tab between synset and URL")?;
    let synset = match with_id {
        true => synset.trim().rsplit_once('_').ok_or_else(|| format!("{synset:?} is not <synset>_<id>"))?.0,
        false => synset,
    };
    Ok((synset.to_owned(), url.to_owned()))
}

fn with_header(
    name: &str,
    source: impl BufRead,
    delimiter: u8,
    options: &ListOptions,
    each: Each<'_>,
) -> Result<(), Error> {
    let budget = Rc::new(Cell::new(LONGEST_RECORD));
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .comment(Some(b'#'))
        .flexible(true)
        .from_reader(Budgeted { source, budget: Rc::clone(&budget) });
    let broken = |error: csv::Error| match error.into_kind() {
        csv::ErrorKind::Io(error) => unreadable(name, &error),
        kind => Error::Invalid(format!("{name}: {kind:?}")),
    };
    let header = reader.byte_headers().map_err(broken)?;
    let header: Vec<String> = header.iter().map(|field| String::from_utf8_lossy(field).trim().to_owned()).collect();
    let there = header.iter().map(String::as_str);
    let (synset, url) = find_columns(there.clone(), options).map_err(|what| no_column(name, what, there, options))?;
    let mut record = csv::ByteRecord::new();
    loop {
        budget.set(LONGEST_RECORD);
        if !reader.read_byte_record(&mut record).map_err(broken)? {
            return Ok(());
        }
        let number = record.position().map_or(0, csv::Position::line);
        let field = |at: usize| {
            let bytes = record.get(at).unwrap_or_default();
            std::str::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned())
        };
        let line = match (field(synset), field(url)) {
            (Ok(synset), Ok(url)) if synset.len() + url.len() <= LONGEST_LINE => entry(synset, url),
            (Ok(_), Ok(_)) => Err(format!("longer than {LONGEST_LINE} bytes")),
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        each(number, line)?;
    }
}

/// Ends the reading when one record has used up the bytes that it may have.
struct Budgeted<R> {
    source: R,
    budget: Rc<Cell<usize>>,
}

impl<R: Read> Read for Budgeted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        match self.budget.get().checked_sub(read) {
            Some(left) => self.budget.set(left),
            None => {
                let message = format!("a record is longer than {LONGEST_RECORD} bytes: is a quote not closed?");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Synset;
    use proto::outcomes::LONGEST_URL;
    use std::io::Write;

    fn auto() -> ListOptions {
        ListOptions::default()
    }

    /// The entries as `synset url`, bad lines as `number: what`.
    fn all(name: &str, bytes: &[u8], options: &ListOptions) -> Result<Vec<String>, Error> {
        let mut found = Vec::new();
        read(name, Cursor::new(bytes.to_vec()), options, &mut |number, line| {
            found.push(match line {
                Ok((synset, url)) => format!("{synset} {url}"),
                Err(what) => format!("{number}: {what}"),
            });
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn every_format_is_told_by_its_first_line_and_gives_the_same_entries() {
        let expected = ["n1 http://a/x,y", "n2 ftp://b"];
        for list in [
            "# list\n\nn1\thttp://a/x,y\r\nn2\tftp://b",
            "n1_77\thttp://a/x,y\nn2_8\tftp://b\n",
            "id,url,synset\n1,\"http://a/x,y\",n1\n# no\n2,ftp://b,n2\n",
            "\u{feff}synset\turl\nn1\thttp://a/x,y\nn2\tftp://b\n",
            "ImageID,OriginalURL,LabelName,Confidence\n1,\"http://a/x,y\",n1,1\n2,ftp://b,n2,0.8\n",
            "{\"image_url\": \"http://a/x,y\", \"label\": \"n1\"}\n\n{\"label\": \"n2\", \"image_url\": \"ftp://b\"}\n",
        ] {
            assert_eq!(all("l", list.as_bytes(), &auto()).expect("reads"), expected, "{list}");
        }
    }

    #[test]
    fn lists_are_decompressed_by_their_first_bytes_whatever_their_name() {
        let plain = "n1\thttp://a/\n".repeat(1000);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(plain.as_bytes()).expect("to memory");
        let zst = zstd::encode_all(plain.as_bytes(), 1).expect("to memory");
        for bytes in [gz.finish().expect("to memory"), zst] {
            assert_eq!(all("l.txt", &bytes, &auto()).expect("reads").len(), 1000);
            assert!(matches!(all("l.txt", &bytes[..bytes.len() - 5], &auto()), Err(Error::Invalid(_))), "cut short");
        }
    }

    #[test]
    fn lines_without_synset_or_url_are_bad_and_say_why() {
        let long = "x".repeat(LONGEST_LINE * 3);
        let more = format!("\n{0}\tu\nn1\t{1}\nn2\t::\n", &long[..Synset::LONGEST + 1], &long[..LONGEST_URL + 1]);
        let some = b"n1\thttp://a\nnothing\n\tu\nn1\t \na b\tu\n\xff\tu\n".as_slice();
        let list = [some, long.as_bytes(), more.as_bytes()].concat();
        let found = all("l", &list, &auto()).expect("reads");
        let starts = [
            "n1 http://a",
            "2: no tab",
            "3: no synset",
            "4: no URL",
            "5: synset \"a b\"",
            "6: not UTF-8",
            "7: longer",
            "8: a synset of 129 bytes",
            "9: a URL of 8193 bytes",
            "n2 ::",
        ];
        assert_eq!(found.len(), starts.len(), "{found:?}");
        for (line, start) in found.iter().zip(starts) {
            assert!(line.starts_with(start), "{line}");
        }
    }

    #[test]
    fn a_missing_column_and_an_endless_quote_are_refused() {
        let csv = ListOptions {
            format: ListFormat::Csv,
            synset_column: "class".into(),
            url_column: "u".into(),
            folder: None,
        };
        let error = all("l.csv", b"url,synset\n", &csv).expect_err("no such column").to_string();
        assert!(error.contains("\"class\"") && error.contains("url, synset. Name"), "{error}");
        let error = all("l.csv", b"photo,synset\n", &auto()).expect_err("no URL's column").to_string();
        assert!(error.contains("for the URL") && error.contains("--url-column"), "{error}");
        let endless = format!("class,u\nn1,\"{}", "x".repeat(2 * LONGEST_RECORD));
        let error = all("l.csv", endless.as_bytes(), &csv).expect_err("too long").to_string();
        assert!(error.contains("quote"), "{error}");
    }
}
