//! Formats whose values have types: JSON lines and Parquet.

use std::fs::File;
use std::io::{BufRead, Seek};
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::entry::{Each, LONGEST_LINE, ListOptions, entry, find_columns, no_column, unreadable};
use crate::error::Error;

/// One object. `at` remembers what the columns were called in the last line.
pub(super) fn json_line(
    line: &str,
    options: &ListOptions,
    at: &mut Option<(String, String)>,
) -> Result<(String, String), String> {
    let object: Map<String, Value> = serde_json::from_str(line).map_err(|e| format!("no JSON object: {e}"))?;
    let same = at.take().filter(|(synset, url)| object.contains_key(synset) && object.contains_key(url));
    let (synset, url) = match same {
        Some(names) => names,
        None => {
            let there = object.keys().map(String::as_str);
            let (synset, url) =
                find_columns(there.clone(), options).map_err(|what| format!("no key for the {what}"))?;
            let name = |place| there.clone().nth(place).unwrap_or_default().to_owned();
            (name(synset), name(url))
        }
    };
    let value = |name: &str| match &object[name] {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Null => Ok(String::new()),
        _ => Err(format!("{name:?} is no text")),
    };
    let found = (value(&synset)?, value(&url)?);
    *at = Some((synset, url));
    Ok(found)
}

/// A Parquet file. Its rows are numbered from 1.
pub(super) fn parquet(
    name: &str,
    mut source: impl BufRead,
    options: &ListOptions,
    each: Each<'_>,
) -> Result<(), Error> {
    let mut file = match &options.folder {
        Some(folder) => tempfile::tempfile_in(folder)?,
        None => tempfile::tempfile()?,
    };
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = source.read(&mut buffer).map_err(|e| unreadable(name, &e))?;
        if read == 0 {
            break;
        }
        std::io::Write::write_all(&mut file, &buffer[..read])?;
    }
    file.rewind()?;
    let broken = |error: ParquetError| Error::Invalid(format!("{name}: cannot be read as Parquet: {error}"));
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let (wanted, synset_first) = projection(name, &reader, options)?;
    for (number, row) in (1..).zip(reader.get_row_iter(Some(wanted)).map_err(broken)?) {
        let row = row.map_err(broken)?;
        // The columns come in the file's order, whatever the projection's.
        let mut values = row.get_column_iter().map(|(_, field)| text(field));
        let (first, second) = (values.next(), values.next());
        let line = match (first, second) {
            (Some(Ok(first)), Some(Ok(second))) if first.len() + second.len() <= LONGEST_LINE => {
                Ok(if synset_first { (first, second) } else { (second, first) })
            }
            (Some(Err(what)), _) | (_, Some(Err(what))) => Err(what),
            (Some(_), Some(_)) => Err(format!("longer than {LONGEST_LINE} bytes")),
            _ => Err("a column is missing".to_owned()),
        };
        match &line {
            Ok((synset, url)) => each(number, entry(synset, url))?,
            Err(what) => each(number, Err(what.clone()))?,
        }
    }
    Ok(())
}

/// The two columns alone, in the file's order, and whether the synset's is the first of them.
fn projection(name: &str, reader: &SerializedFileReader<File>, options: &ListOptions) -> Result<(Type, bool), Error> {
    let schema = reader.metadata().file_metadata().schema();
    let fields = schema.get_fields();
    let names = fields.iter().map(|field| field.name());
    let (synset, url) = find_columns(names.clone(), options).map_err(|what| no_column(name, what, names, options))?;
    let both = [synset.min(url), synset.max(url)].map(|place| Arc::clone(&fields[place]));
    if let Some(nested) = both.iter().find(|field| !field.is_primitive()) {
        return Err(Error::Invalid(format!("{name}: column {:?} is nested", nested.name())));
    }
    let wanted = Type::group_type_builder(schema.name()).with_fields(both.to_vec()).build();
    Ok((wanted.map_err(|e| Error::Invalid(format!("{name}: {e}")))?, synset < url))
}

fn text(field: &Field) -> Result<String, String> {
    match field {
        Field::Null => Ok(String::new()),
        Field::Str(text) => Ok(text.clone()),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map(str::to_owned).map_err(|_| "not UTF-8".to_owned()),
        Field::Byte(_)
        | Field::Short(_)
        | Field::Int(_)
        | Field::Long(_)
        | Field::UByte(_)
        | Field::UShort(_)
        | Field::UInt(_)
        | Field::ULong(_) => Ok(field.to_string()),
        _ => Err("its value is no text".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn parquet_lists_are_read_whatever_the_order_of_their_columns() {
        // The outcomes of a shard are such a file, with columns in between that are not wanted.
        let row = |synset: &str, url: &str| proto::outcomes::OutcomeRow {
            synset: synset.to_owned(),
            url: url.to_owned(),
            ..proto::outcomes::OutcomeRow::default()
        };
        let file = proto::table::write(&[row("n1", "http://a"), row("", "http://b")]).expect("encodes");
        let all = |options: &ListOptions| {
            let mut found = Vec::new();
            let read = super::super::read("l", Cursor::new(file.clone()), options, &mut |number, line| {
                found.push((number, line.map(|(synset, url)| format!("{synset} {url}"))));
                Ok(())
            });
            read.map(|()| found)
        };
        let found = all(&ListOptions::default()).expect("reads");
        assert_eq!(found, [(1, Ok("n1 http://a".to_owned())), (2, Err("no synset".to_owned()))]);
        let swapped =
            ListOptions { synset_column: "url".into(), url_column: "synset".into(), ..ListOptions::default() };
        assert_eq!(all(&swapped).expect("reads")[0], (1, Ok("http://a n1".to_owned())));
        let none = ListOptions { url_column: "x".into(), ..ListOptions::default() };
        assert!(all(&none).expect_err("no such column").to_string().contains("final_url"));
    }

    #[test]
    fn a_bad_json_line_says_what_it_lacks() {
        let mut at = None;
        let mut parse = |line| json_line(line, &ListOptions::default(), &mut at);
        assert_eq!(parse(r#"{"wnid": 7, "URL": "u"}"#), Ok(("7".to_owned(), "u".to_owned())));
        assert_eq!(parse(r#"{"class": "a", "url": "u"}"#), Ok(("a".to_owned(), "u".to_owned())));
        for (line, said) in [("{", "no JSON"), (r#"{"url": "u"}"#, "class"), (r#"{"class": [], "url": ""}"#, "no text")]
        {
            let what = parse(line).expect_err(line);
            assert!(what.contains(said), "{what}");
        }
    }
}
