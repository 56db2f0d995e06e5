//! Formats whose values have types: JSON lines and Parquet.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, Read, Seek};
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use proto::columns::Columns;
use proto::dataset_spec::UNLABELLED;
use proto::table;
use serde_json::{Map, Value};

use super::entry::{Each, Line, ListOptions, clean_url, entry, unreadable};
use super::places::Places;
use crate::error::Error;

/// One object a line, not all of which need to have the same keys.
pub(super) fn json_lines(
    name: &str,
    source: impl BufRead,
    options: &ListOptions,
    each: Each<'_>,
) -> Result<String, Error> {
    let (mut known, mut columns): (Option<(Vec<String>, Places)>, _) = (None, Columns::default());
    let mut understood = None;
    super::lines(name, source, |number, line| {
        let object = line.and_then(|line| {
            serde_json::from_slice::<Map<String, Value>>(line).map_err(|e| format!("no JSON object: {e}"))
        });
        let object = match object {
            Ok(object) => object,
            Err(what) => return each(number, Line::Bad(what)),
        };
        // What the keys were in the last line.
        let (keys, places) = match known.take() {
            Some((keys, places)) if same_keys(&keys, &object) => (keys, places),
            _ => {
                let keys: Vec<String> = object.keys().cloned().collect();
                let there: Vec<&str> = keys.iter().map(String::as_str).collect();
                match Places::named("its object", &there, options) {
                    Ok(places) => {
                        understood.get_or_insert_with(|| format!("JSON lines: {}", places.describe(&there, true)));
                        (keys, places)
                    }
                    Err(error) => return each(number, Line::Bad(error.to_string())),
                }
            }
        };
        let values: Vec<&Value> = keys.iter().map(|key| &object[key]).collect();
        let handed = hand(number, &places, |at| Cow::Borrowed(values[at]), &mut columns, each);
        known = Some((keys, places));
        handed
    })?;
    Ok(understood.unwrap_or_else(|| "JSON lines".to_owned()))
}

fn same_keys(keys: &[String], object: &Map<String, Value>) -> bool {
    keys.len() == object.len() && keys.iter().zip(object.keys()).all(|(known, key)| known == key)
}

/// Makes entries of a row of values: one for each of its classes.
fn hand<'v>(
    number: u64,
    places: &Places,
    value: impl Fn(usize) -> Cow<'v, Value>,
    columns: &mut Columns,
    each: Each<'_>,
) -> Result<(), Error> {
    let zero = |at: usize| match &*value(at) {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    if places.confidence.and_then(zero) == Some(0.0) {
        return each(number, Line::Absent);
    }
    let url = match &places.made {
        Some(made) => made.url(|at| text(&value(at)).unwrap_or_default()),
        None => match text(&value(places.url)) {
            Some(url) => url,
            None => return each(number, Line::Bad("the URL is no text".to_owned())),
        },
    };
    let url = clean_url(url.as_bytes());
    let class = places.synset.map(&value);
    let synsets = match class.as_deref() {
        None => vec![UNLABELLED.to_owned()],
        Some(Value::Array(classes)) if classes.is_empty() => vec![String::new()],
        Some(Value::Array(classes)) => classes.iter().map(|class| text(class).unwrap_or_default()).collect(),
        Some(class) => match text(class) {
            Some(class) => vec![class],
            None => return each(number, Line::Bad("the class is neither a text nor a number nor a list".to_owned())),
        },
    };
    columns.clear();
    for (at, member) in &places.kept {
        match &*value(*at) {
            Value::Null => {}
            value => columns.value(member, value),
        }
    }
    let columns = columns.finish();
    synsets.iter().try_for_each(|synset| each(number, entry(synset, &url, columns)))
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null => Some(String::new()),
        _ => None,
    }
}

/// A Parquet file. Its rows are numbered from 1.
pub(super) fn parquet(
    name: &str,
    mut source: impl Read,
    options: &ListOptions,
    each: Each<'_>,
) -> Result<String, Error> {
    let mut file = match &options.folder {
        Some(folder) => tempfile::tempfile_in(folder)?,
        None => tempfile::tempfile()?,
    };
    let mut buffer = vec![0; 1 << 20];
    let mut left = options.largest.unwrap_or(u64::MAX);
    loop {
        let read = source.read(&mut buffer).map_err(|e| unreadable(name, &e))?;
        if read == 0 {
            break;
        }
        left = left.checked_sub(read as u64).ok_or_else(|| super::too_long(options.largest.unwrap_or_default()))?;
        std::io::Write::write_all(&mut file, &buffer[..read])?;
    }
    file.rewind()?;
    let broken = |error: ParquetError| Error::Invalid(format!("{name}: cannot be read as Parquet: {error}"));
    let reader = table::open(file).map_err(broken)?;
    let (wanted, places, understood) = projection(name, &reader, options)?;
    let mut columns = Columns::default();
    for (number, row) in (1..).zip(table::rows(&reader, Some(wanted)).map_err(broken)?) {
        let row: Row = row.map_err(broken)?;
        let values: Vec<&Field> = row.get_column_iter().map(|(_, field)| field).collect();
        let value = |at: usize| Cow::Owned(values.get(at).map_or(Value::Null, |field| json(field)));
        hand(number, &places, value, &mut columns, each)?;
    }
    Ok(understood)
}

/// The columns that are read alone, in the file's order, the places of things among them, and how it was understood.
fn projection(
    name: &str,
    reader: &SerializedFileReader<File>,
    options: &ListOptions,
) -> Result<(Type, Places, String), Error> {
    let schema = reader.metadata().file_metadata().schema();
    let fields = schema.get_fields();
    let names: Vec<&str> = fields.iter().map(|field| field.name()).collect();
    let mut places = Places::named(name, &names, options)?;
    if !fields[places.url].is_primitive() {
        return Err(Error::Invalid(format!("{name}: column {:?} is nested", names[places.url])));
    }
    let understood = format!("Parquet: {}", places.describe(&names, true));
    let mut read: Vec<usize> = places.kept.iter().map(|(at, _)| *at).collect();
    read.extend([Some(places.url), places.synset, places.confidence].into_iter().flatten());
    read.extend(places.made.iter().flat_map(|made| made.parts.iter().map(|(_, at)| *at)));
    read.sort_unstable();
    read.dedup();
    let among = |at: usize| read.binary_search(&at).unwrap_or(0);
    places.url = among(places.url);
    places.synset = places.synset.map(among);
    places.confidence = places.confidence.map(among);
    places.made.iter_mut().flat_map(|made| &mut made.parts).for_each(|(_, at)| *at = among(*at));
    places.kept.iter_mut().for_each(|(at, _)| *at = among(*at));
    let wanted = read.iter().map(|&at| Arc::clone(&fields[at])).collect();
    let wanted = Type::group_type_builder(schema.name()).with_fields(wanted).build();
    Ok((wanted.map_err(|e| Error::Invalid(format!("{name}: {e}")))?, places, understood))
}

fn json(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => clean_url(bytes.data()).into(),
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        Field::Group(row) => row.get_column_iter().map(|(name, field)| (name.clone(), json(field))).collect(),
        other => other.to_string().into(),
    }
}
