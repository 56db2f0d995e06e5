//! Addresses of pictures that are there already: a file, a part of a file (a tar's member), or a row of a Parquet file.
//! They stand where others have URLs:
//!
//! ```text
//! file:///data/birds/wren/1.jpg
//! file:///data/birds.tar#name=wren/1.jpg&offset=512&length=20481
//! file:///data/birds.parquet#column=image.bytes&span=3&row=901
//! ```

use std::borrow::Cow;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

/// How each address begins.
const SCHEME: &str = "file://";

/// So many rows of a Parquet file that follow each other are dealt, and read, together.
const SPAN: u64 = 256;

/// What stands in an address as it is. Everything else is encoded, so that nothing of it means anything in a list.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Where a picture is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileUrl<'a> {
    /// The whole path of the file.
    pub path: Cow<'a, Path>,
    /// What of the file is the picture.
    pub part: Part<'a>,
}

/// What of a file is a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part<'a> {
    /// All of it.
    Whole,
    /// Some of its bytes.
    Bytes {
        /// What they are called there, for people.
        name: Cow<'a, str>,
        /// From the file's start.
        offset: u64,
        /// How many.
        length: u64,
    },
    /// A value of a Parquet file.
    Row {
        /// The path of the column in the schema, with dots.
        column: Cow<'a, str>,
        /// Counted from 0.
        row: u64,
    },
}

impl fmt::Display for FileUrl<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", percent_encode(self.path.as_os_str().as_bytes(), PLAIN))?;
        let encoded = |text| percent_encode(str::as_bytes(text), PLAIN);
        match &self.part {
            Part::Whole => Ok(()),
            Part::Bytes { name, offset, length } => {
                write!(f, "#name={}&offset={offset}&length={length}", encoded(name))
            }
            Part::Row { column, row } => write!(f, "#column={}&span={}&row={row}", encoded(column), row / SPAN),
        }
    }
}

/// Whether a text is meant as an address of this kind.
pub fn is_file(url: &str) -> bool {
    url.starts_with(SCHEME)
}

/// What the addresses of rows have in common that are dealt and read together.
pub fn span(url: &str) -> Option<&str> {
    url.rsplit_once("&row=").map(|(span, _)| span).filter(|span| is_file(span))
}

/// Reads an address; None if it is none of these.
pub fn parse(url: &str) -> Option<FileUrl<'static>> {
    let rest = url.strip_prefix(SCHEME).filter(|rest| rest.starts_with('/'))?;
    let (path, part) = rest.split_once('#').map_or((rest, None), |(path, part)| (path, Some(part)));
    let path: Vec<u8> = percent_decode_str(path).collect();
    if path.contains(&0) {
        return None;
    }
    let part = match part {
        None => Part::Whole,
        Some(part) => {
            let field = |name: &str| {
                let mut fields = part.split('&').filter_map(|field| field.split_once('='));
                fields.find(|(is, _)| *is == name).map(|(_, value)| value)
            };
            let number = |name| field(name)?.parse::<u64>().ok();
            let text = |name| Some(percent_decode_str(field(name)?).decode_utf8().ok()?.into_owned());
            match (number("offset"), number("length"), number("row")) {
                (Some(offset), Some(length), None) => {
                    Part::Bytes { name: text("name").unwrap_or_default().into(), offset, length }
                }
                (None, None, Some(row)) => Part::Row { column: text("column")?.into(), row },
                _ => return None,
            }
        }
    };
    Some(FileUrl { path: PathBuf::from(OsString::from_vec(path)).into(), part })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::ffi::OsStr;

    proptest! {
        #[test]
        fn addresses_are_read_back_whatever_files_are_called(
            path in prop::collection::vec(1u8..=255, 0..40),
            name in "\\PC{0,20}",
            numbers in any::<(u64, u64)>(),
            kind in 0..3,
        ) {
            let path = [b"/", &path[..]].concat();
            let part = match kind {
                0 => Part::Whole,
                1 => Part::Bytes { name: name.into(), offset: numbers.0, length: numbers.1 },
                _ => Part::Row { column: name.into(), row: numbers.0 },
            };
            let url = FileUrl { path: Path::new(OsStr::from_bytes(&path)).into(), part };
            let text = url.to_string();
            // Lists undo entities, quotes, tabs and white space.
            prop_assert!(text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\'' | b';' | b'<' | b'>')));
            prop_assert_eq!(span(&text).is_some(), kind == 2);
            prop_assert_eq!(parse(&text), Some(url));
        }
    }

    #[test]
    fn rows_that_follow_each_other_have_a_span_in_common_and_nothing_else_has_any() {
        let url = |row| FileUrl {
            path: Path::new("/a.parquet").into(),
            part: Part::Row { column: "image.bytes".into(), row },
        };
        let span_of = |row| span(&url(row).to_string()).map(str::to_owned);
        assert_eq!(span_of(0).as_deref(), Some("file:///a.parquet#column=image.bytes&span=0"));
        assert!(span_of(0) == span_of(255) && span_of(255) != span_of(256));
        assert_eq!([span("http://a.example/?x&row=1"), span("file:///a.jpg")], [None, None]);
    }

    #[test]
    fn what_is_no_address_of_a_picture_is_none() {
        for text in [
            "",
            "file:/a.jpg",
            "file://host/a.jpg",
            "http://a/1.jpg",
            "file:///a%00b",
            "file:///a#offset=1",
            "file:///a#row=1",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
