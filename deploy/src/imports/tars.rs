//! Tars in WebDataset's layout: members whose names are the same up to their first dot are one sample.

use std::borrow::Cow;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use proto::Split;
use proto::files::{FileUrl, Part, Place};
use serde_json::{Map, Value};

use super::place::File;
use super::{Lines, Picture, folder_class};

/// Endings of pictures.
const PICTURES: [&str; 16] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif", "avif", "jxl", "jp2",
    "svg",
];
/// Texts beside a picture that are longer are none.
const LONGEST_TEXT: u64 = 4 << 20;
/// As what a sample's text travels.
const CAPTION: &str = "caption";

/// What has been read of the sample that is read now.
#[derive(Default)]
struct Sample {
    key: String,
    /// Name, offset and length.
    pictures: Vec<(String, u64, u64)>,
    class: Option<String>,
    caption: Option<String>,
    json: Map<String, Value>,
}

/// Hands on the pictures of a tar.
pub(super) fn read(file: &File, split: Option<Split>, lines: &mut Lines<'_>) -> Result<()> {
    let cannot = || format!("cannot read the tar {file}");
    let mut archive = tar::Archive::new(file.tar().with_context(cannot)?);
    let (mut sample, place) = (Sample::default(), &file.place());
    for member in archive.entries_with_seek().with_context(cannot)? {
        let mut member = member.with_context(cannot)?;
        if !member.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&member.path_bytes()).into_owned();
        let last_name = name.rsplit('/').next().unwrap_or_default();
        let Some((stem, ending)) = last_name.split_once('.').filter(|(stem, _)| !stem.is_empty()) else { continue };
        let key = &name[..name.len() - last_name.len() + stem.len()];
        if key != sample.key {
            let next = Sample { key: key.to_owned(), ..Sample::default() };
            std::mem::replace(&mut sample, next).hand(place, split, lines)?;
        }
        let ending = ending.to_ascii_lowercase();
        let last = ending.rsplit('.').next().unwrap_or_default();
        if PICTURES.contains(&last) {
            sample.pictures.push((name, member.raw_file_position(), member.size()));
            continue;
        }
        if !matches!(ending.as_str(), "cls" | "txt" | "caption" | "json") || member.size() > LONGEST_TEXT {
            continue;
        }
        let mut bytes = Vec::new();
        member.read_to_end(&mut bytes).with_context(cannot)?;
        let text = String::from_utf8_lossy(&bytes);
        match ending.as_str() {
            "cls" => sample.class = Some(text.trim().to_owned()),
            "json" => sample.json = serde_json::from_str(&text).unwrap_or_default(),
            _ => sample.caption = Some(text.trim().to_owned()),
        }
    }
    sample.hand(place, split, lines)
}

impl Sample {
    fn hand(self, place: &Place<'_>, split: Option<Split>, lines: &mut Lines<'_>) -> Result<()> {
        let Self { pictures, class, caption, json, .. } = self;
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.clone()).filter(|text| !text.is_empty()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let said = |name: &str| json.get(name).and_then(text);
        let class = match &lines.files.class_column {
            Some(column) => said(column),
            // A class's name says more than its number.
            None => said("synset").or(class.filter(|class| !class.is_empty())).or_else(|| said("label")),
        };
        let mut columns = json;
        if let Some(caption) = caption {
            columns.insert(CAPTION.to_owned(), caption.into());
        }
        for (name, offset, length) in pictures {
            let (split, below) = in_folders(split, Path::new(&name));
            let by_folder = || folder_class(below).filter(|_| lines.files.class_column.is_none());
            let class = class.clone().map(Value::from).or_else(by_folder);
            let url =
                FileUrl { place: place.clone(), part: Part::Bytes { name: Cow::Borrowed(&name), offset, length } };
            lines.push(Picture { url, class, split, columns: columns.clone() })?;
        }
        Ok(())
    }
}

/// In a tar of a tree, the topmost folder may be a split, if there are others below it.
fn in_folders(split: Option<Split>, name: &Path) -> (Option<Split>, &Path) {
    let name = name.strip_prefix(".").unwrap_or(name);
    let mut parts = name.components();
    let first = parts.next().and_then(|first| Split::published(&first.as_os_str().to_string_lossy()));
    let below = parts.as_path();
    match first {
        Some(first) if below.components().count() > 1 => (split.or(Some(first)), below),
        _ => (split, name),
    }
}
