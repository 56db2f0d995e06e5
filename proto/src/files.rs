//! Addresses of pictures that are there already: a file, a part of a file (a tar's member), or a row of a Parquet file;
//! below a folder, in the cluster's own store, or on the web. They stand where others have URLs:
//!
//! ```text
//! file:///data/birds/wren/1.jpg
//! file:///data/birds.tar#name=wren/1.jpg&offset=512&length=20481
//! file:///data/birds.parquet#column=image.bytes&span=3&row=901
//! store:///imports/birds.tar#name=wren/1.jpg&offset=512&length=20481
//! https://birds.example/train.parquet#column=image.bytes&of=73400320&span=3&row=301
//! ```

use std::borrow::Cow;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

/// How each address of a file below a folder begins.
const FILE: &str = "file://";
/// How each address of an object begins.
const STORE: &str = "store:///";

/// So many rows of a Parquet file below a folder that follow each other are dealt, and read, together.
pub const SPAN: u32 = 256;

/// What stands in an address as it is. Everything else is encoded, so that nothing of it means anything in a list.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Where a picture is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileUrl<'a> {
    /// Where the file is.
    pub place: Place<'a>,
    /// What of the file is the picture.
    pub part: Part<'a>,
}

/// Where a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place<'a> {
    /// At this path, which is whole.
    Path(Cow<'a, Path>),
    /// In the cluster's own store, under this key.
    Stored(Cow<'a, str>),
    /// On the web: an http(s) address without a fragment.
    Web(Cow<'a, str>),
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
        /// The file's length, if it is not below a folder: its end says where everything is.
        of: Option<u64>,
        /// Those of one span are dealt, and read, together.
        span: u64,
        /// Counted from 0.
        row: u64,
    },
}

impl<'a> Part<'a> {
    /// A row of a file below a folder.
    pub fn row(column: impl Into<Cow<'a, str>>, row: u64) -> Self {
        Self::Row { column: column.into(), of: None, span: row / u64::from(SPAN), row }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{FILE}{}", percent_encode(path.as_os_str().as_bytes(), PLAIN)),
            Self::Stored(key) => write!(f, "{STORE}{}", percent_encode(key.as_bytes(), PLAIN)),
            Self::Web(url) => f.write_str(url),
        }
    }
}

impl fmt::Display for FileUrl<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.place.fmt(f)?;
        let encoded = |text| percent_encode(str::as_bytes(text), PLAIN);
        match &self.part {
            Part::Whole => Ok(()),
            Part::Bytes { name, offset, length } => {
                write!(f, "#name={}&offset={offset}&length={length}", encoded(name))
            }
            Part::Row { column, of, span, row } => {
                write!(f, "#column={}", encoded(column))?;
                if let Some(of) = of {
                    write!(f, "&of={of}")?;
                }
                write!(f, "&span={span}&row={row}")
            }
        }
    }
}

/// What the addresses of rows have in common that are dealt and read together.
pub fn span(url: &str) -> Option<&str> {
    // Most addresses have no '#', which is found sooner.
    url.split_once('#')
        .and_then(|_| url.rsplit_once("&row="))
        .map(|(span, _)| span)
        .filter(|span| span.contains("#column="))
}

/// Reads an address; None if it is none of these.
pub fn parse(url: &str) -> Option<FileUrl<'static>> {
    let (whole, part) = url.split_once('#').map_or((url, None), |(whole, part)| (whole, Some(part)));
    let place = if let Some(path) = whole.strip_prefix(FILE) {
        let path: Vec<u8> = percent_decode_str(path).collect();
        if path.first() != Some(&b'/') || path.contains(&0) {
            return None;
        }
        Place::Path(PathBuf::from(OsString::from_vec(path)).into())
    } else if let Some(key) = whole.strip_prefix(STORE) {
        Place::Stored(percent_decode_str(key).decode_utf8().ok()?.into_owned().into())
    } else if whole.starts_with("http://") || whole.starts_with("https://") {
        Place::Web(whole.to_owned().into())
    } else {
        return None;
    };
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
                (None, None, Some(row)) => {
                    let (column, span) = (text("column")?.into(), number("span")?);
                    Part::Row { column, of: number("of"), span, row }
                }
                // An address of the web may have a fragment of its own, which no server hears of.
                (None, None, None) if matches!(place, Place::Web(_)) => Part::Whole,
                _ => return None,
            }
        }
    };
    Some(FileUrl { place, part })
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
            kind in 0..4,
            place in 0..3,
        ) {
            let path = [b"/", &path[..]].concat();
            let part = match kind {
                0 => Part::Whole,
                1 => Part::Bytes { name: name.clone().into(), offset: numbers.0, length: numbers.1 },
                2 => Part::row(name.clone(), numbers.0),
                _ => Part::Row { column: name.clone().into(), of: Some(numbers.1), span: 7, row: numbers.0 },
            };
            let place = match place {
                0 => Place::Path(Path::new(OsStr::from_bytes(&path)).into()),
                1 => Place::Stored(name.into()),
                _ => Place::Web("https://a.example/b%20c.tar?d=e&f=g".into()),
            };
            let url = FileUrl { place, part };
            let text = url.to_string();
            // Lists undo entities, quotes, tabs and white space.
            prop_assert!(text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'"' | b'\'' | b';' | b'<' | b'>')));
            prop_assert_eq!(span(&text).is_some(), kind >= 2);
            prop_assert_eq!(parse(&text), Some(url));
        }
    }

    #[test]
    fn rows_that_follow_each_other_have_a_span_in_common_and_nothing_else_has_any() {
        let place = Place::Path(Path::new("/a.parquet").into());
        let url = |row| FileUrl { place: place.clone(), part: Part::row("image.bytes", row) };
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
            "file:///a%00b",
            "file:///a#offset=1",
            "file:///a#row=1",
            "file:///a#column=b&row=1",
            "store:///a#offset=1",
            "store:///%ff",
            "store:/a",
            "https://a/#row=1",
            "ftp://a/b.tar",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
