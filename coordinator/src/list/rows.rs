//! Rows of fields: separated values with and without quotes.

use std::borrow::Cow;
use std::io::BufRead;

use memchr::memchr_iter;
use proto::columns::Columns;
use proto::dataset_spec::UNLABELLED;

use super::budget::Budget;
use super::entry::{Each, Line, ListOptions, clean_text, clean_url, entry, unreadable};
use super::layout::Rows;
use super::places::Places;
use crate::error::Error;

/// A record of more bytes than this ends the reading: a quote was never closed.
const LONGEST_RECORD: u64 = 4 << 20;

/// Reads all rows; returns how they were understood.
pub(super) fn read(
    name: &str,
    source: impl BufRead,
    rows: Rows,
    options: &ListOptions,
    each: Each<'_>,
) -> Result<String, Error> {
    if rows.quoted() {
        return quoted(name, source, rows, options, each);
    }
    let understood = rows.describe();
    let Rows { delimiter, fields, places, with_id, .. } = rows;
    let Some(places) = places else { return Err(Error::Local("rows without a header have no places".to_owned())) };
    let understood = format!("{understood}: {}", places.describe(&[], false));
    let mut row = Row { header: false, fields: fields.unwrap_or(1), with_id, places, columns: Columns::default() };
    let mut found: Vec<std::ops::Range<usize>> = Vec::new();
    super::lines(name, source, |number, line| {
        let line = match line {
            Ok(line) => line,
            Err(what) => return each(number, Line::Bad(what)),
        };
        found.clear();
        let mut start = 0;
        for end in delimiter.into_iter().flat_map(|delimiter| memchr_iter(delimiter, line)) {
            found.push(start..end);
            start = end + 1;
        }
        found.push(start..line.len());
        row.hand(number, found.len(), |at| found.get(at).map_or(&[][..], |field| &line[field.clone()]), each)
    })?;
    Ok(understood)
}

fn quoted(
    name: &str,
    source: impl BufRead,
    rows: Rows,
    options: &ListOptions,
    each: Each<'_>,
) -> Result<String, Error> {
    let budget = Budget::new(LONGEST_RECORD);
    let longer = format!("a record is longer than {LONGEST_RECORD} bytes: is a quote not closed?");
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(rows.delimiter.unwrap_or(b','))
        .has_headers(rows.header)
        .comment(Some(b'#'))
        .flexible(true)
        .from_reader(budget.of(source, longer));
    let broken = |error: csv::Error| match error.into_kind() {
        csv::ErrorKind::Io(error) => unreadable(name, &error),
        kind => Error::Invalid(format!("{name}: {kind:?}")),
    };
    let header = if rows.header { reader.byte_headers().map_err(broken)?.clone() } else { csv::ByteRecord::new() };
    let mut names: Vec<String> = header.iter().map(|field| String::from_utf8_lossy(field).trim().to_owned()).collect();
    // Sheets have empty columns at their end.
    while names.last().is_some_and(String::is_empty) {
        names.pop();
    }
    let there: Vec<&str> = names.iter().map(String::as_str).collect();
    let places = match rows.places.clone() {
        Some(places) => places,
        None => Places::named(name, &there, options)?,
    };
    let understood = format!("{}: {}", rows.describe(), places.describe(&there, rows.header));
    let fields = if rows.header { there.len() } else { rows.fields.unwrap_or(1) };
    let mut row = Row { header: rows.header, fields, with_id: rows.with_id, places, columns: Columns::default() };
    let mut record = csv::ByteRecord::new();
    loop {
        budget.set(LONGEST_RECORD);
        if !reader.read_byte_record(&mut record).map_err(broken)? {
            return Ok(understood);
        }
        let number = record.position().map_or(0, csv::Position::line);
        let mut count = record.len();
        while count > fields && record[count - 1].trim_ascii().is_empty() {
            count -= 1;
        }
        row.hand(number, count, |at| record.get(at).unwrap_or_default(), each)?;
    }
}

/// Makes entries of rows.
struct Row {
    header: bool,
    /// That each row has.
    fields: usize,
    with_id: bool,
    places: Places,
    columns: Columns,
}

impl Row {
    fn hand<'f>(
        &mut self,
        number: u64,
        count: usize,
        field: impl Fn(usize) -> &'f [u8],
        each: Each<'_>,
    ) -> Result<(), Error> {
        if count != self.fields {
            return each(number, Line::Bad(self.wrong_count(count)));
        }
        let zero = |at: usize| std::str::from_utf8(field(at)).ok().and_then(|text| text.trim().parse::<f64>().ok());
        if self.places.confidence.and_then(zero) == Some(0.0) {
            return each(number, Line::Absent);
        }
        let synset = match self.places.synset {
            None => Cow::Borrowed(UNLABELLED),
            Some(at) => match clean_text(field(at)) {
                Ok(synset) => synset,
                Err(what) => return each(number, Line::Bad(what)),
            },
        };
        let synset = match self.with_id {
            false => &*synset,
            true => match synset.rsplit_once('_') {
                Some((wnid, _)) => wnid,
                None => return each(number, Line::Bad(format!("{synset:?} is not <synset>_<id>"))),
            },
        };
        self.columns.clear();
        for (at, member) in &self.places.kept {
            let text = String::from_utf8_lossy(field(*at));
            // The quotes of a quoted field are gone already.
            let text =
                if self.header { text } else { clean_text(text.as_bytes()).unwrap_or_default().into_owned().into() };
            if !text.is_empty() {
                self.columns.text(member, &text);
            }
        }
        let url = match &self.places.made {
            None => clean_url(field(self.places.url)),
            Some(made) => made.url(|at| clean_text(field(at)).unwrap_or_default()).into(),
        };
        each(number, entry(synset, &url, self.columns.finish()))
    }

    fn wrong_count(&self, count: usize) -> String {
        match (self.header, count) {
            (true, _) => {
                format!("{count} fields, but the header has {}: is a comma or a quote not quoted?", self.fields)
            }
            (false, 1) if self.fields == 2 => "no tab between synset and URL".to_owned(),
            (false, _) => format!("{count} fields, but the first lines have {}", self.fields),
        }
    }
}
