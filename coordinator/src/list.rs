//! Parses URL lists: lines of several formats, plain, compressed or in a tar, as a stream in bounded memory. Parquet,
//! which is read from its end, goes through a temporary file.
//!
//! Which column is which is told by its name (`places`), whatever its case and punctuation, or by what the caller says;
//! without a header by what stands in the first lines (`layout`).

mod budget;
mod entry;
mod layout;
mod places;
mod rows;
mod typed;

use std::io::{self, BufRead, BufReader, Cursor, Read};

use memchr::memchr;
use proto::pb::ListFormat;

use self::budget::Budget;
use self::entry::{Each, unreadable};
pub(crate) use self::entry::{Entry, Line, ListOptions};
use self::layout::Layout;
use crate::error::Error;

/// A line of more bytes than this is bad.
const LONGEST_LINE: usize = 4 << 20;
/// Lines that tell the layout, and bytes that are read ahead for them.
const HEAD_LINES: usize = 100;
const HEAD_BYTES: u64 = 256 << 10;
/// The first bytes of a source, which tell what it is.
const MAGIC_BYTES: u64 = 512;
/// A list in a tar in a tar is still read.
const DEEPEST: u32 = 2;

/// What cannot be read as a list, by its first bytes, and what its owner can do.
const REFUSED: [(&[u8], &str); 9] = [
    (b"BZh", "is packed by bzip2: bunzip2 -c FILE | gleaner dataset create NAME --urls -"),
    (b"\xfd7zXZ\0", "is packed by xz: xz -dc FILE | gleaner dataset create NAME --urls -"),
    (b"PK\x03\x04", "is a zip archive or an Excel sheet: unpack it, or save it as CSV"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it"),
    (b"%PDF", "is a PDF, not a list"),
    (b"\xff\xfe", "is UTF-16: iconv -f UTF-16 -t UTF-8 FILE | gleaner dataset create NAME --urls -"),
    (b"\xfe\xff", "is UTF-16: iconv -f UTF-16 -t UTF-8 FILE | gleaner dataset create NAME --urls -"),
    (b"ARROW1", "is an Arrow file: save it as Parquet"),
    (b"[", "is a JSON array; one object a line is read: jq -c '.[]' FILE | gleaner dataset create NAME --urls -"),
];

/// Of a list that would be one long line.
const OLD_LINES: &str =
    "has lines that end as on old Macs: tr '\\r' '\\n' < FILE | gleaner dataset create NAME --urls -";

/// What stands before a file in a tar, its long name among it, has no more bytes than this.
const LONGEST_HEADERS: u64 = 1 << 20;

/// Endings of files in a tar that may be lists.
const LISTS: [&str; 12] =
    ["txt", "tsv", "tab", "csv", "json", "jsonl", "ndjson", "parquet", "lst", "list", "urls", "gz"];

/// Reads one source and hands each line to `each`. Blank lines and lines that begin with `#` are passed over. Returns
/// how it was understood, for people.
///
/// Only a line without class or URL is bad. One whose URL cannot be parsed is an entry like any other: its fetch has an
/// outcome of its own.
///
/// # Errors
/// If the source cannot be read or decompressed, if its header lacks a column, or if `each` fails.
pub(crate) fn read(name: &str, source: impl Read, options: &ListOptions, each: Each<'_>) -> Result<String, Error> {
    read_at(0, name, Box::new(source), options, each)
}

fn read_at<'a>(
    depth: u32,
    name: &str,
    source: Box<dyn Read + 'a>,
    options: &ListOptions,
    each: Each<'_>,
) -> Result<String, Error> {
    let broken = |e: io::Error| unreadable(name, &e);
    let mut source = decompress(source).map_err(broken)?;
    let mut magic = Vec::new();
    (&mut source).take(MAGIC_BYTES).read_to_end(&mut magic).map_err(broken)?;
    if magic.get(257..262) == Some(b"ustar") {
        return archive(depth, name, Cursor::new(magic).chain(source), options, each);
    }
    if options.format == ListFormat::Parquet || magic.starts_with(b"PAR1") {
        return typed::parquet(name, Cursor::new(magic).chain(source), options, each);
    }
    let text = magic.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&magic).trim_ascii_start();
    let is_page = [&b"<!doctype"[..], b"<html"]
        .iter()
        .any(|tag| text.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag)));
    if is_page {
        return Err(Error::Invalid(format!("{name}: is a web page, not a list: does its address want a login?")));
    }
    if let Some((_, what)) = REFUSED.iter().find(|(magic, _)| text.starts_with(magic)) {
        return Err(Error::Invalid(format!("{name}: {what}")));
    }
    if magic.starts_with(b"\xef\xbb\xbf") {
        magic.drain(..3);
    }
    let mut source = BufReader::with_capacity(256 << 10, Cursor::new(magic).chain(source));
    let mut head = Vec::new();
    (&mut source).take(HEAD_BYTES).read_to_end(&mut head).map_err(broken)?;
    if head.contains(&b'\r') && !head.contains(&b'\n') {
        return Err(Error::Invalid(format!("{name}: {OLD_LINES}")));
    }
    // The last line may be cut.
    let whole = head.iter().rposition(|byte| *byte == b'\n').filter(|_| head.len() as u64 == HEAD_BYTES);
    let said = String::from_utf8_lossy(&head[..whole.unwrap_or(head.len())]);
    let first: Vec<&str> = said.lines().filter(|line| !is_blank(line.as_bytes())).take(HEAD_LINES).collect();
    let layout = layout::layout(name, &first, options)?;
    let source = BufReader::with_capacity(256 << 10, Cursor::new(head).chain(source));
    match layout {
        Layout::Jsonl => typed::json_lines(name, source, options, each),
        Layout::Rows(rows) => rows::read(name, source, rows, options, each),
    }
}

/// By the first bytes: a name's ending may be wrong, because web servers and clients compress and decompress by
/// themselves.
fn decompress<'a>(source: Box<dyn Read + 'a>) -> io::Result<Box<dyn BufRead + 'a>> {
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

/// Reads all lists of a tar.
fn archive(depth: u32, name: &str, source: impl Read, options: &ListOptions, each: Each<'_>) -> Result<String, Error> {
    let broken = |e: io::Error| unreadable(name, &e);
    if depth == DEEPEST {
        return Err(Error::Invalid(format!("{name}: is a tar in a tar in a tar")));
    }
    let budget = Budget::new(LONGEST_HEADERS);
    let longer = format!("what stands before a file in it has more than {LONGEST_HEADERS} bytes");
    let mut archive = tar::Archive::new(budget.of(source, longer));
    let (mut understood, mut others) = (Vec::new(), Vec::new());
    let mut files = archive.entries().map_err(broken)?;
    loop {
        // A file's own bytes are read as they are wanted, but what stands before it is held in memory.
        budget.set(LONGEST_HEADERS);
        let Some(file) = files.next() else { break };
        budget.set(u64::MAX);
        let mut file = file.map_err(broken)?;
        let path = file.path().map_err(broken)?.display().to_string();
        let last = path.rsplit('/').next().unwrap_or(&path);
        let ending = last.rsplit_once('.').map(|(_, ending)| ending.to_lowercase());
        if !file.header().entry_type().is_file() || last.starts_with('.') {
            // Neither a list nor what may have been meant as one.
        } else if ending.is_some_and(|ending| !LISTS.contains(&ending.as_str()) && ending != "zst") {
            others.push(path);
        } else {
            let name = format!("{name}/{path}");
            understood.push(format!("{path}: {}", read_at(depth + 1, &name, Box::new(&mut file), options, each)?));
        }
        io::copy(&mut file, &mut io::sink()).map_err(broken)?;
    }
    if understood.is_empty() {
        others.truncate(3);
        return Err(Error::Invalid(format!("{name}: is a tar without a list in it: {}", others.join(", "))));
    }
    understood.truncate(3);
    Ok(understood.join("; "))
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
        let end = memchr(b'\n', buffer);
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

/// That a list is too long, however short it was when it was packed.
pub(crate) fn too_long(largest: u64) -> Error {
    Error::Invalid(format!("the list unpacks to more than {largest} bytes: the coordinator's --largest-list"))
}

fn is_blank(line: &[u8]) -> bool {
    line.trim_ascii_start().first().is_none_or(|&b| b == b'#')
}

/// Hands each line that is not blank to `parse`, with its number.
fn lines(
    name: &str,
    mut source: impl BufRead,
    mut parse: impl FnMut(u64, Result<&[u8], String>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if !read_line(&mut source, &mut line).map_err(|e| unreadable(name, &e))? {
            break;
        }
        if line.len() > LONGEST_LINE {
            parse(number, Err(format!("longer than {LONGEST_LINE} bytes")))?;
        } else if !is_blank(&line) {
            parse(number, Ok(&line))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
