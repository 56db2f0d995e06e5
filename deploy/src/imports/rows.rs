//! Parquet files with pictures in them, as Hugging Face's `datasets` writes them: a column of `{bytes, path}`, and what
//! the features are in the file's `huggingface` metadata.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use parquet::basic::{ConvertedType, Type as Physical};
use parquet::file::metadata::FileMetaData;
use parquet::record::Field;
use parquet::schema::types::Type;
use proto::columns::plain;
use proto::files::{FileUrl, Part};
use proto::{Split, table};
use serde_json::{Map, Value};

use super::place::File;
use super::{Files, Lines, Picture};
use crate::exit::Ended;

/// The key of the file's metadata under which the features are.
const METADATA: &str = "huggingface";
/// What the column of the class is called, the most telling first, in lower case and without punctuation.
const CLASSES: [&str; 10] =
    ["label", "labels", "class", "classname", "synset", "wnid", "category", "target", "finelabel", "classes"];
/// What the column of the picture is called; likewise.
const PICTURES: [&str; 8] = ["image", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes"];

/// What stands where.
struct Layout {
    /// The path of the column of bytes.
    picture: String,
    /// The place of the class among the columns, and the names that its numbers stand for.
    class: Option<(String, Vec<String>)>,
    /// What is read here.
    projection: Option<Type>,
}

/// The names of the classes, in the order of their numbers; none: the file does not say them.
pub(super) fn class_names(file: &File, files: &Files) -> Result<Vec<String>> {
    Ok(layout(file, file.parquet()?.metadata().file_metadata(), files)?
        .class
        .map(|(_, names)| names)
        .unwrap_or_default())
}

/// Hands on a line for each row of a file.
pub(super) fn read(file: &File, split: Option<Split>, lines: &mut Lines<'_>) -> Result<()> {
    let reader = file.parquet()?;
    let Layout { picture, class, projection } = layout(file, reader.metadata().file_metadata(), lines.files)?;
    // Elsewhere what has to be read together is a row group.
    let groups = reader.metadata().row_groups().iter().map(|group| group.num_rows().max(0) as u64);
    let mut rows = 0u64;
    let ends: Vec<u64> = groups
        .map(|of_group| {
            rows = rows.saturating_add(of_group);
            rows
        })
        .collect();
    let bytes = file.bytes()?;
    // A few bytes can claim any number of rows, and each of them would be a line of the list.
    if rows > bytes {
        bail!("{file}: it claims to have {rows} rows, but has {bytes} bytes: so many pictures do not fit in there");
    }
    let of = file.length();
    let mut push = |row: u64, columns: Map<String, Value>| {
        let mut columns = columns;
        let class = class.as_ref().and_then(|(column, names)| named(columns.remove(column)?, names));
        let column = picture.as_str();
        let part = match of {
            None => Part::row(column, row),
            Some(_) => {
                Part::Row { column: column.into(), of, span: ends.partition_point(|end| *end <= row) as u64, row }
            }
        };
        lines.push(Picture { url: FileUrl { place: file.place(), part }, class, split, columns })
    };
    let Some(projection) = projection else {
        return (0..rows).try_for_each(|row| push(row, Map::new()));
    };
    let cannot = || format!("cannot read {file}");
    for (n, row) in (0..).zip(table::rows(&*reader, Some(projection)).with_context(cannot)?) {
        let row = row.with_context(cannot)?;
        push(n, row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())?;
    }
    Ok(())
}

fn layout(file: &File, about: &FileMetaData, files: &Files) -> Result<Layout> {
    let metadata = about.key_value_metadata().into_iter().flatten().find(|pair| pair.key == METADATA);
    let metadata: Value = metadata.and_then(|pair| serde_json::from_str(pair.value.as_ref()?).ok()).unwrap_or_default();
    let features = &metadata["info"]["features"];
    let columns = about.schema().get_fields();
    let there = || columns.iter().map(|column| column.name()).collect::<Vec<_>>().join(", ");
    let missing = |what: &str, flag: &str| {
        Ended::usage(format!("{file}: no column {what}; it has {}. Name it with {flag}", there()))
    };
    let pictures: Vec<(&str, String)> =
        columns.iter().filter_map(|column| Some((column.name(), leaf(column)?))).collect();
    let by_name = |wanted: &str| pictures.iter().find(|(name, _)| *name == wanted);
    let is_image = |name: &str| features[name]["_type"] == "Image";
    let picture = match &files.image_column {
        Some(wanted) => by_name(wanted),
        None => {
            let usual = || PICTURES.iter().find_map(|usual| pictures.iter().find(|(name, _)| plain(name) == *usual));
            pictures.iter().find(|(name, _)| is_image(name)).or_else(usual)
        }
    };
    let (image, picture) = picture.ok_or_else(|| missing("with the bytes of pictures", "--image-column"))?;
    let named = |name: &str| columns.iter().find(|column| column.name() == name);
    let class = match &files.class_column {
        _ if files.unlabelled => None,
        Some(wanted) => Some(named(wanted).ok_or_else(|| missing(&format!("{wanted:?}"), "--class-column"))?),
        None => {
            let is_class = |name: &str| features[name]["_type"] == "ClassLabel";
            let usual =
                || CLASSES.iter().find_map(|usual| columns.iter().find(|column| plain(column.name()) == *usual));
            let found = columns.iter().find(|column| is_class(column.name())).or_else(usual);
            let way_out = "--class-column, or take the pictures without classes by --unlabelled";
            Some(found.ok_or_else(|| missing("for the class", way_out))?)
        }
    };
    let names = |name: &str| {
        let feature = &features[name];
        // A list of classes has the feature of one of them within its own.
        let of = [feature, &feature["feature"], &feature[0]].into_iter().find(|of| of["_type"] == "ClassLabel");
        let names = of.and_then(|of| of["names"].as_array()).into_iter().flatten();
        names.filter_map(|name| name.as_str().map(str::to_owned)).collect()
    };
    let class = class.map(|column| (column.name().to_owned(), names(column.name())));
    let read = columns.iter().filter(|column| {
        let name = column.name();
        let is_class = class.as_ref().is_some_and(|(class, _)| class == name);
        is_class || !files.keep.is_empty() && name != *image && leaf(column).is_none()
    });
    let read: Vec<Arc<Type>> = read.cloned().collect();
    let projection = match read.is_empty() {
        true => None,
        false => Some(Type::group_type_builder(about.schema().name()).with_fields(read).build()?),
    };
    Ok(Layout { picture: picture.clone(), class, projection })
}

/// The path of a column's bytes, if it may be one of pictures.
fn leaf(column: &Type) -> Option<String> {
    let bytes = |of: &Type| {
        let about = of.get_basic_info();
        let plain = about.logical_type_ref().is_none() && about.converted_type() == ConvertedType::NONE;
        of.is_primitive() && of.get_physical_type() == Physical::BYTE_ARRAY && plain
    };
    if column.is_primitive() {
        return bytes(column).then(|| column.name().to_owned());
    }
    let inner = column.get_fields().iter().find(|field| field.name() == "bytes" && bytes(field))?;
    Some(format!("{}.{}", column.name(), inner.name()))
}

/// The name of a class that may be said by its number; None: it is of no class.
fn named(class: Value, names: &[String]) -> Option<Value> {
    match class {
        Value::Number(number) if !names.is_empty() => {
            let name = names.get(usize::try_from(number.as_i64()?).ok()?)?;
            Some(name.as_str().into())
        }
        Value::Array(classes) => {
            let classes: Option<Vec<Value>> = classes.into_iter().map(|class| named(class, names)).collect();
            classes.filter(|classes| !classes.is_empty()).map(Value::from)
        }
        Value::Null => None,
        Value::String(text) if text.trim().is_empty() => None,
        class => Some(class),
    }
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null | Field::Bytes(_) => Value::Null,
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
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::Group(row) => row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect(),
        other => other.to_string().into(),
    }
}
