//! How the rows of a text are laid out: by what the caller says, or by its first lines.

use std::collections::HashSet;

use proto::pb::ListFormat;

use super::entry::{ListOptions, clean_text, is_url};
use super::places::{Places, url_column};
use crate::error::Error;

/// What may stand between the fields of a row, the most usual first.
const DELIMITERS: [u8; 5] = [b'\t', b',', b';', b'|', b' '];
/// Column names of at least so many bytes are no names.
const LONGEST_NAME: usize = 64;

/// How a text is laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Layout {
    /// A JSON object a line.
    Jsonl,
    Rows(Rows),
}

/// How rows are laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rows {
    /// None: one field a line.
    pub(super) delimiter: Option<u8>,
    /// The first line names the columns.
    pub(super) header: bool,
    /// Of each row; None: as the header says.
    pub(super) fields: Option<usize>,
    /// None: as the names in the header say.
    pub(super) places: Option<Places>,
    /// The class has an id behind it: `n01440764_10026`.
    pub(super) with_id: bool,
}

impl Rows {
    /// Whether fields may be quoted, and then have delimiters and line breaks in them.
    pub(super) fn quoted(&self) -> bool {
        self.header || matches!(self.delimiter, Some(b',' | b';' | b'|'))
    }

    /// For people.
    pub(super) fn describe(&self) -> String {
        let delimiter = match self.delimiter {
            Some(b'\t') => "separated by tabs",
            Some(b',') => "separated by commas",
            Some(b';') => "separated by semicolons",
            Some(b'|') => "separated by bars",
            Some(_) => "separated by blanks",
            None => "one field a line",
        };
        format!("{delimiter}, {} a header", if self.header { "with" } else { "without" })
    }
}

/// The layout of a text that begins with these lines.
pub(super) fn layout(name: &str, head: &[&str], options: &ListOptions) -> Result<Layout, Error> {
    let header = |delimiter| {
        let (delimiter, fields, places) = (Some(delimiter), None, None);
        Rows { delimiter, header: true, fields, places, with_id: false }
    };
    let first = head.first().copied().unwrap_or_default();
    let rows = match options.format {
        ListFormat::Jsonl => return Ok(Layout::Jsonl),
        ListFormat::Auto if first.starts_with('{') => return Ok(Layout::Jsonl),
        ListFormat::SynsetUrl | ListFormat::WnidIdUrl => {
            let rows = pairs(name, options)?;
            Rows { with_id: options.format == ListFormat::WnidIdUrl, ..rows }
        }
        ListFormat::Csv if options.columns.is_empty() => header(b','),
        ListFormat::Tsv if options.columns.is_empty() => header(b'\t'),
        ListFormat::Csv => columns(name, Some(b','), options)?,
        ListFormat::Tsv => columns(name, Some(b'\t'), options)?,
        ListFormat::Auto | ListFormat::Parquet if !options.columns.is_empty() => {
            let wanted = options.columns.len();
            let fits = |delimiter: &&u8| head.iter().filter(|line| split(line, **delimiter).len() == wanted).count();
            let best = DELIMITERS.iter().filter(|_| wanted > 1).rev().max_by_key(fits);
            columns(name, best.copied(), options)?
        }
        ListFormat::Auto | ListFormat::Parquet => {
            let named = |delimiter: &u8| {
                let fields = split(first, *delimiter);
                let fields: Vec<&str> = fields.iter().map(String::as_str).collect();
                url_column(&fields, options).is_some() && !fields.iter().any(|field| is_url(field))
            };
            let plain = name.trim_end_matches(".gz").trim_end_matches(".zst");
            match DELIMITERS.iter().find(|delimiter| **delimiter != b' ' && named(delimiter)) {
                Some(delimiter) => header(*delimiter),
                None => match by_content(name, head, options)? {
                    Some(rows) => rows,
                    None if plain.ends_with(".csv") => header(b','),
                    None => pairs(name, options)?,
                },
            }
        }
    };
    Ok(Layout::Rows(rows))
}

/// The fields of one line.
pub(super) fn split(line: &str, delimiter: u8) -> Vec<String> {
    if matches!(delimiter, b'\t' | b' ') {
        let clean = |field: &str| clean_text(field.as_bytes()).unwrap_or_default().into_owned();
        return line.split(char::from(delimiter)).map(clean).collect();
    }
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).has_headers(false).from_reader(line.as_bytes());
    let record = reader.records().next().and_then(Result::ok).unwrap_or_default();
    record.iter().map(|field| field.trim().to_owned()).collect()
}

/// `synset<TAB>url`, or URLs alone.
fn pairs(name: &str, options: &ListOptions) -> Result<Rows, Error> {
    let names = if options.unlabelled { &["url"][..] } else { &["synset", "url"] };
    let options = ListOptions { synset_column: String::new(), url_column: String::new(), ..options.clone() };
    let places = Places::named(name, names, &options)?;
    let delimiter = (!options.unlabelled).then_some(b'\t');
    Ok(Rows { delimiter, header: false, fields: Some(names.len()), places: Some(places), with_id: false })
}

/// Refuses names of columns where there are none.
fn unnamed(name: &str, options: &ListOptions) -> Result<(), Error> {
    let given = [("--url-column", &options.url_column), ("--synset-column", &options.synset_column)];
    match given.iter().find(|(_, column)| !column.is_empty()) {
        None => Ok(()),
        Some((flag, column)) => Err(Error::Invalid(format!(
            "{name}: has no header, so none of its columns is called {column:?} ({flag}): --columns names them all"
        ))),
    }
}

/// Of a list without a header whose columns the caller has named.
fn columns(name: &str, delimiter: Option<u8>, options: &ListOptions) -> Result<Rows, Error> {
    let names: Vec<&str> = options.columns.iter().map(String::as_str).collect();
    let places = Some(Places::named(name, &names, options)?);
    Ok(Rows { delimiter, header: false, fields: Some(names.len()), places, with_id: false })
}

/// By what stands in the first lines; none if no column has URLs.
fn by_content(name: &str, head: &[&str], options: &ListOptions) -> Result<Option<Rows>, Error> {
    for delimiter in DELIMITERS {
        let lines: Vec<Vec<String>> = head.iter().map(|line| split(line, delimiter)).collect();
        let Some(fields) = most_common(lines.iter().map(Vec::len)).filter(|fields| *fields > 1) else { continue };
        let lines: Vec<Vec<String>> = lines.into_iter().filter(|line| line.len() == fields).collect();
        let urls = |column: usize| lines.iter().filter(|line| is_url(&line[column])).count();
        let Some(url) = (0..fields).max_by_key(|column| urls(*column)).filter(|url| urls(*url) * 2 > lines.len())
        else {
            continue;
        };
        // Blanks are what many URLs and captions have in them, too.
        let blanks = delimiter == b' ' && (url + 1 != fields || fields != 2);
        if lines.len() * 2 < head.len() || blanks {
            continue;
        }
        let header = lines.len() > 1 && is_header(&lines[0], url);
        if header {
            let names: Vec<&str> = lines[0].iter().map(String::as_str).collect();
            let places = match options.url_column.as_str() {
                "" => Places::with_url(name, &names, url_column(&names, options).unwrap_or(url), options)?,
                _ => Places::named(name, &names, options)?,
            };
            let (fields, places) = (Some(fields), Some(places));
            return Ok(Some(Rows { delimiter: Some(delimiter), header, fields, places, with_id: false }));
        }
        unnamed(name, options)?;
        let synset = (!options.unlabelled).then(|| class_column(&lines, url));
        let with_id = synset
            .is_some_and(|synset| lines.iter().filter(|line| is_wnid_id(&line[synset])).count() * 2 > lines.len());
        let names: Vec<String> = (0..fields).map(|column| column_name(column, url, synset, fields)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let places = Some(Places::with(name, &names, url, synset, options)?);
        return Ok(Some(Rows { delimiter: Some(delimiter), header, fields: Some(fields), places, with_id }));
    }
    let bare = head.iter().filter(|line| is_url(line.trim_matches(['"', '\'', '<', ' ']))).count();
    match options.unlabelled {
        true => Ok(Some(pairs(name, options)?)),
        false if bare * 2 > head.len() => {
            let message = "it has URLs and no classes: --unlabelled gathers pictures without";
            Err(Error::Invalid(format!("{name}: {message}")))
        }
        false => Ok(None),
    }
}

fn most_common(numbers: impl Iterator<Item = usize> + Clone) -> Option<usize> {
    numbers.clone().max_by_key(|n| numbers.clone().filter(|other| other == n).count())
}

/// Whether these are names, and where the others have their URL is none.
fn is_header(fields: &[String], url: usize) -> bool {
    let plain = |c: char| c.is_alphabetic() || matches!(c, '_' | ' ' | '-');
    let name = |field: &String| !field.is_empty() && field.len() < LONGEST_NAME && field.chars().all(plain);
    name(&fields[url]) && fields.iter().all(name)
}

/// The column that is most likely the class's: one whose values come again.
fn class_column(lines: &[Vec<String>], url: usize) -> usize {
    let mut others = (0..lines[0].len()).filter(|column| *column != url);
    let distinct = |column: usize| lines.iter().map(|line| &line[column]).collect::<HashSet<_>>().len();
    let again = others.clone().find(|column| distinct(*column) * 2 <= lines.len());
    again.or_else(|| others.next()).unwrap_or(0)
}

/// What a column without a name is called where it is kept.
fn column_name(column: usize, url: usize, synset: Option<usize>, fields: usize) -> String {
    match column {
        _ if column == url => "url".to_owned(),
        _ if Some(column) == synset => "synset".to_owned(),
        _ if fields == 2 => "caption".to_owned(),
        _ => format!("column{}", column + 1),
    }
}

/// ImageNet's `n01440764_10026`.
fn is_wnid_id(field: &str) -> bool {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let parts = field.strip_prefix('n').and_then(|rest| rest.split_once('_'));
    parts.is_some_and(|(wnid, id)| digits(wnid) && digits(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first lines, the places of URL and class, the delimiter and whether there is a header.
    type Told<'a> = (&'a [&'a str], (usize, Option<usize>), u8, bool);

    #[test]
    fn the_url_is_found_by_content_where_no_header_names_it() {
        let told: &[Told<'_>] = &[
            (&["n1\thttp://a/", "n2\tftp://b"], (1, Some(0)), b'\t', false),
            (&["http://a/\tn1", "http://b/\tn1"], (0, Some(1)), b'\t', false),
            (&["\"n1\"\t\"http://a/\""], (1, Some(0)), b'\t', false),
            (&["http://a/x_1,n1", "http://b/,n1"], (0, Some(1)), b',', false),
            (&["n1;http://a/;x", "n1;http://b/;y"], (1, Some(0)), b';', false),
            (&["a;http://a/;dog", "b;http://b/;dog", "c;http://c/;cat", "d;http://d/;cat"], (1, Some(2)), b';', false),
            (&["n1 http://a/", "n2 http://b/"], (1, Some(0)), b' ', false),
            (&["photo\tclass", "http://a/\tdog", "http://b/\tcat"], (0, Some(1)), b'\t', true),
            (&["n7.jpg\tx", "http://a/\tdog", "http://b/\tcat"], (0, Some(1)), b'\t', false),
        ];
        for (head, (url, synset), delimiter, header) in told {
            let found = layout("l", head, &ListOptions::default()).expect("columns");
            let Layout::Rows(Rows { delimiter: found_delimiter, header: found_header, places: Some(places), .. }) =
                found
            else {
                panic!("{head:?}: {found:?}")
            };
            assert_eq!((places.url, places.synset), (*url, *synset), "{head:?}");
            assert_eq!((found_delimiter, found_header), (Some(*delimiter), *header), "{head:?}");
        }
    }

    #[test]
    fn lists_without_classes_are_refused_with_the_way_out_or_read_if_that_is_said() {
        let urls = ["http://a/my photo.jpg", "http://b/", "https://c/1"];
        let error = layout("l", &urls, &ListOptions::default()).expect_err("no class").to_string();
        assert!(error.contains("--unlabelled"), "{error}");
        let unlabelled = ListOptions { unlabelled: true, keep: vec!["caption".into()], ..ListOptions::default() };
        let without = ListOptions { keep: Vec::new(), ..unlabelled.clone() };
        let Ok(Layout::Rows(rows)) = layout("l", &urls, &without) else { panic!("URLs alone") };
        assert_eq!((rows.delimiter, rows.places.map(|places| places.url)), (None, Some(0)));
        // CC3M and CC12M, as they are published.
        for (head, url) in
            [(["a dog , barking\thttp://a/", "a cat\thttp://b/"], 1), (["http://a/\ta dog", "http://b/\ta"], 0)]
        {
            let Ok(Layout::Rows(rows)) = layout("l", &head, &unlabelled) else { panic!("{head:?}") };
            let places = rows.places.expect("by content");
            assert_eq!((places.url, places.synset, places.kept), (url, None, vec![(1 - url, "caption".to_owned())]));
        }
    }

    #[test]
    fn named_columns_need_no_header() {
        let options =
            ListOptions { columns: vec!["id".into(), "url".into(), "label".into()], ..ListOptions::default() };
        let Ok(Layout::Rows(rows)) = layout("l", &["1,http://a/,n1", "2,http://b/,n1"], &options) else {
            panic!("named")
        };
        assert_eq!((rows.delimiter, rows.header, rows.fields), (Some(b','), false, Some(3)));
        let wrong = ListOptions { columns: vec!["a".into(), "b".into()], ..ListOptions::default() };
        let error = layout("l", &["1,http://a/"], &wrong).expect_err("no URL").to_string();
        assert!(error.contains("for the URL; it has a, b"), "{error}");
    }
}
