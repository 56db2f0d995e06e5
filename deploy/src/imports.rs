//! Pictures that are there already, as lines of a list: files in folders, members of tars, rows of Parquet files; on
//! disk, in the cluster's store, on the web. What is read here is names, classes and texts; the pictures are read by
//! the workers.

mod place;
mod remote;
mod rows;
mod tars;

use std::collections::BTreeSet;
use std::fs::FileType;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use futures::TryStreamExt;
use object_store::ObjectStore;
use proto::columns::{caption_of, plain};
use proto::files::{FileUrl, Part, Place};
use proto::{Class, Split, Synset};
use serde_json::{Map, Value};

use self::place::File;
pub(crate) use self::place::Location;
use self::remote::wait;
use crate::exit::Ended;
use crate::output::note;

/// What the members of a line are called that are its address, its class and its split.
pub(crate) const URL: &str = "url";
/// See [`URL`].
pub(crate) const CLASS: &str = "synset";
/// See [`URL`].
pub(crate) const SPLIT: &str = "split";

/// Endings of what has to be unpacked first.
const PACKED: [&str; 9] = ["tgz", "gz", "zst", "bz2", "xz", "zip", "7z", "rar", "arrow"];

/// Columns that are named at the most where one is missing.
const COLUMNS: usize = 50;

/// What is to be imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files {
    /// Folders, tars and Parquet files.
    pub(crate) from: Vec<Location>,
    /// There are no classes.
    pub(crate) unlabelled: bool,
    /// Where tars and Parquet files say the class; None: where they usually do.
    pub(crate) class_column: Option<String>,
    /// Where Parquet files have the picture; likewise.
    pub(crate) image_column: Option<String>,
    /// What else travels with the pictures.
    pub(crate) keep: Vec<String>,
}

/// A picture, as it is found.
struct Picture<'a> {
    url: FileUrl<'a>,
    class: Option<Value>,
    split: Option<Split>,
    columns: Map<String, Value>,
}

/// Takes the lines, and counts what gives none.
struct Lines<'a> {
    files: &'a Files,
    take: &'a mut dyn FnMut(&Map<String, Value>) -> Result<()>,
    taken: u64,
    links: u64,
    packed: u64,
    no_class: u64,
    no_class_example: String,
    /// Of the columns that are to be kept, those that were there.
    there: BTreeSet<String>,
    /// Some of those that could be.
    others: BTreeSet<String>,
}

impl Files {
    /// The classes in the order in which the first Parquet file has them, if it says one. Blocks.
    pub(crate) fn classes(&self) -> Result<Vec<Class>> {
        if self.unlabelled {
            return Ok(Vec::new());
        }
        for from in &self.from {
            let Some(first) = from.first_parquet()? else { continue };
            let names = rows::class_names(&first, self)?;
            let distinct: BTreeSet<&String> = names.iter().collect();
            let sound = distinct.len() == names.len() && names.iter().all(|name| name.parse::<Synset>().is_ok());
            let class = |name: String| Class { name: name.clone(), synset: name };
            return Ok(if sound { names.into_iter().map(class).collect() } else { Vec::new() });
        }
        Ok(Vec::new())
    }

    /// Hands a line for each picture to `take`. Blocks.
    ///
    /// # Errors
    /// If something cannot be read, if there is no picture, or if `take` fails.
    pub(crate) fn each(&self, take: &mut dyn FnMut(&Map<String, Value>) -> Result<()>) -> Result<()> {
        let (taken, links, packed, no_class) = (0, 0, 0, 0);
        let (no_class_example, there, others) = (String::new(), BTreeSet::new(), BTreeSet::new());
        let mut lines = Lines { files: self, take, taken, links, packed, no_class, no_class_example, there, others };
        for from in &self.from {
            if let Location::Path(path) = from
                && path.is_dir()
            {
                lines.folder(path)?;
                continue;
            }
            if let Location::Store { .. } = from
                && let Some((store, folder)) = from.stored_folder()?
            {
                lines.stored_folder(&store, &folder)?;
                continue;
            }
            if matches!(kind(&from.name()), Kind::Picture | Kind::Packed) {
                let way_out = "a folder, a .tar or a .parquet is wanted: unpack it first if it is packed";
                return Err(Ended::usage(format!("{from}: {way_out}")));
            }
            lines.file(&from.file()?, &from.name(), None)?;
        }
        lines.finish()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tar,
    Parquet,
    Packed,
    /// As far as its name tells.
    Picture,
}

fn kind(path: &Path) -> Kind {
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase());
    match ending.as_deref() {
        Some("tar") => Kind::Tar,
        Some("parquet") => Kind::Parquet,
        Some(ending) if PACKED.contains(&ending) => Kind::Packed,
        _ => Kind::Picture,
    }
}

/// What is in a folder, in the order of names, without what is hidden.
fn listed(folder: &Path) -> Result<Vec<(PathBuf, FileType)>> {
    let cannot = || format!("cannot read the folder {}", folder.display());
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with('.') && name != "__MACOSX" {
            all.push((entry.path(), entry.file_type().with_context(cannot)?));
        }
    }
    all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}

/// A place, for people.
fn shown(place: &Place<'_>) -> String {
    match place {
        Place::Path(path) => path.display().to_string(),
        Place::Stored(key) => format!("store:{key}"),
        Place::Web(url) => url.to_string(),
    }
}

/// The split that a name says: `train`, `train-00000-of-00002.parquet`, `imagenet1k-validation-03.tar`.
fn split_of(name: &Path) -> Option<Split> {
    let name = name.file_stem()?.to_string_lossy().into_owned();
    name.split(|c: char| !c.is_ascii_alphanumeric()).find_map(Split::published)
}

impl Lines<'_> {
    fn folder(&mut self, root: &Path) -> Result<()> {
        let top = listed(root)?;
        // A class may well be called `train`, but not all of them.
        let mut folders = top.iter().filter(|(_, of)| of.is_dir()).peekable();
        let exact = |path: &Path| path.file_name().and_then(|name| Split::published(&name.to_string_lossy()));
        let splits = folders.peek().is_some() && folders.all(|(path, _)| exact(path).is_some());
        if splits {
            note(format!("{}: its folders are splits, and what is in them classes", root.display()));
        }
        let mut open = vec![(top.into_iter(), None)];
        while let Some((entries, split)) = open.last_mut() {
            let (next, split) = (entries.next(), *split);
            let Some((path, of)) = next else {
                open.pop();
                continue;
            };
            let split = if open.len() == 1 && splits && of.is_dir() { exact(&path) } else { split };
            if of.is_dir() {
                open.push((listed(&path)?.into_iter(), split));
            } else if of.is_file() {
                let below = path.strip_prefix(root).unwrap_or(&path).to_owned();
                let below = if split.is_some() { below.components().skip(1).collect() } else { below };
                self.file(&File::Path(path), &below, split)?;
            } else {
                self.links += 1;
            }
        }
        Ok(())
    }

    /// The same of a folder of the store.
    fn stored_folder(&mut self, store: &Arc<dyn ObjectStore>, folder: &object_store::path::Path) -> Result<()> {
        let cannot = || format!("cannot list {folder} in the store");
        let top = wait(store.list_with_delimiter(Some(folder))).with_context(cannot)?;
        let exact = |name: &str| Split::published(name);
        let mut folders = top.common_prefixes.iter().peekable();
        let splits = folders.peek().is_some() && folders.all(|folder| folder.filename().and_then(exact).is_some());
        if splits {
            note(format!("{folder}: its folders are splits, and what is in them classes"));
        }
        let mut listed = store.list(Some(folder));
        while let Some(object) = wait(listed.try_next()).with_context(cannot)? {
            let names: Vec<String> = object
                .location
                .prefix_match(folder)
                .into_iter()
                .flatten()
                .map(|name| name.as_ref().to_owned())
                .collect();
            if names.iter().any(|name| name.starts_with('.') || name == "__MACOSX") {
                continue;
            }
            let split = names.first().filter(|_| splits && names.len() > 1).and_then(|name| exact(name));
            let below: PathBuf = names.iter().skip(usize::from(split.is_some())).collect();
            let file = File::object(store, object);
            self.file(&file, &below, split)?;
        }
        Ok(())
    }

    /// `below`: the file's path in its folder, behind the name of a split.
    fn file(&mut self, file: &File, below: &Path, split: Option<Split>) -> Result<()> {
        match kind(below) {
            Kind::Tar => tars::read(file, split.or_else(|| split_of(below)), self),
            Kind::Parquet => rows::read(file, split.or_else(|| split_of(below)), self),
            Kind::Packed => {
                self.packed += 1;
                Ok(())
            }
            Kind::Picture => {
                let url = FileUrl { place: file.place(), part: Part::Whole };
                self.push(Picture { url, class: folder_class(below), split, columns: Map::new() })
            }
        }
    }

    fn push(&mut self, picture: Picture<'_>) -> Result<()> {
        let Picture { url, class, split, columns } = picture;
        let unlabelled = self.files.unlabelled;
        if class.is_none() && !unlabelled {
            self.no_class += 1;
            if self.no_class == 1 {
                self.no_class_example = shown(&url.place);
                if let Part::Bytes { name, .. } = &url.part {
                    self.no_class_example += &format!(": {name}");
                }
            }
            return Ok(());
        }
        let mut line = Map::new();
        for (name, value) in columns {
            let taken = [URL, CLASS, SPLIT].contains(&name.as_str());
            line.insert(if taken { format!("list_{name}") } else { name }, value);
        }
        for wanted in self.files.keep.iter().filter(|wanted| *wanted != "all") {
            let is_there = |name: &String| plain(name) == plain(wanted);
            let caption = plain(wanted) == "caption" && caption_of(line.keys().map(String::as_str)).is_some();
            if caption || line.keys().any(is_there) {
                if !self.there.contains(wanted) {
                    self.there.insert(wanted.clone());
                }
            } else {
                if self.others.len() < COLUMNS {
                    self.others.extend(line.keys().cloned());
                }
                line.insert(wanted.clone(), Value::Null);
            }
        }
        line.insert(URL.to_owned(), url.to_string().into());
        line.insert(SPLIT.to_owned(), split.map_or(Value::Null, |split| split.name().into()));
        if let Some(class) = class.filter(|_| !unlabelled) {
            line.insert(CLASS.to_owned(), class);
        }
        self.taken += 1;
        (self.take)(&line)
    }

    fn finish(self) -> Result<()> {
        let missing = self.files.keep.iter().find(|wanted| *wanted != "all" && !self.there.contains(*wanted));
        if let (Some(missing), true) = (missing, self.taken > 0) {
            let there: Vec<&str> = self.others.iter().take(COLUMNS).map(String::as_str).collect();
            let there = if there.is_empty() { "nothing else".to_owned() } else { there.join(", ") };
            bail!(Ended::usage(format!("--keep-columns {missing}: no picture has it; there is {there}")));
        }
        if self.no_class > 0 {
            let (n, example) = (self.no_class, &self.no_class_example);
            let text = format!(
                "{n} files have no class, such as {example}: a picture's class is its folder's name, KEY.cls in a tar, a column \
                 in a Parquet file (--class-column); --unlabelled takes pictures without"
            );
            if self.taken == 0 {
                bail!(Ended::usage(text));
            }
            note(text);
        }
        if self.taken == 0 {
            bail!(Ended::usage("there is no picture: folders of pictures, .tar and .parquet are read".to_owned()));
        }
        for (count, what) in [
            (self.links, "links are passed over: nobody follows them"),
            (self.packed, "packed files are passed over: unpack them first"),
        ] {
            if count > 0 {
                note(format!("{count} {what}"));
            }
        }
        Ok(())
    }
}

/// The class of a file in a folder of classes: the topmost folder's name.
fn folder_class(below: &Path) -> Option<Value> {
    let mut names = below.components();
    let (first, more) = (names.next()?, names.next().is_some());
    more.then(|| first.as_os_str().to_string_lossy().into_owned().into())
}

#[cfg(test)]
mod tests;
