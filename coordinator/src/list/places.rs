//! Where in a row its URL, its class and the columns stand that travel with it.

use proto::columns::{caption_of, member, plain};

use super::entry::ListOptions;
use crate::error::Error;

/// Columns that hold the class, the most telling first. `LabelName` is Open Images'.
const SYNSETS: &[&str] = &[
    "synset",
    "wnid",
    "synsetid",
    "labelname",
    "class",
    "classid",
    "label",
    "labelid",
    "category",
    "target",
    "classes",
    "labels",
];

/// Columns that hold the URL. `OriginalURL` is Open Images'; `Thumbnail300KURL` beside it is not wanted.
const URLS: &[&str] = &["url", "imageurl", "imgurl", "originalurl", "photoimageurl", "imagelink", "link", "uri", "src"];

/// Where in a row things stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Places {
    /// None: there are no classes.
    pub(super) synset: Option<usize>,
    pub(super) url: usize,
    /// What the URL is made of, if it stands in no column of its own.
    pub(super) made: Option<Made>,
    /// How sure it is that the class is in the picture. Open Images says 0 of those that are not.
    pub(super) confidence: Option<usize>,
    /// What travels with the picture, and as which member of its JSON.
    pub(super) kept: Vec<(usize, String)>,
}

/// A URL that is made of columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Made {
    /// Text, and the column whose value follows it.
    pub(super) parts: Vec<(String, usize)>,
    tail: String,
}

impl Made {
    /// As an address with names in braces says.
    fn of(format: &str, there: &[&str]) -> Result<Self, String> {
        let (mut parts, mut rest) = (Vec::new(), format);
        while let Some((text, more)) = rest.split_once('{') {
            let (column, more) = more.split_once('}').ok_or("a brace is not closed")?;
            let at = there.iter().position(|name| *name == column).ok_or_else(|| format!("no column {column:?}"))?;
            parts.push((text.to_owned(), at));
            rest = more;
        }
        if parts.is_empty() { Err("no {COLUMN} in it".to_owned()) } else { Ok(Self { parts, tail: rest.to_owned() }) }
    }

    /// The URL of a row; empty, if one of its columns is.
    pub(super) fn url<T: AsRef<str>>(&self, value: impl Fn(usize) -> T) -> String {
        let mut url = String::new();
        for (text, at) in &self.parts {
            let value = value(*at);
            let value = value.as_ref().trim();
            if value.is_empty() {
                return String::new();
            }
            url += text;
            url += value;
        }
        url + &self.tail
    }
}

/// The column of the URL, by its name; of a URL that is made of several, the first of them.
pub(super) fn url_column(there: &[&str], options: &ListOptions) -> Option<usize> {
    if !options.url_format.is_empty() {
        return Some(Made::of(&options.url_format, there).ok()?.parts.first()?.1);
    }
    find(there, &options.url_column, URLS)
}

fn find(there: &[&str], given: &str, usual: &[&str]) -> Option<usize> {
    match given {
        "" => usual.iter().find_map(|usual| there.iter().position(|column| plain(column) == *usual)),
        given => there.iter().position(|column| *column == given),
    }
}

impl Places {
    /// Of columns that have names.
    pub(super) fn named(name: &str, there: &[&str], options: &ListOptions) -> Result<Self, Error> {
        let missing = |what| no_column(name, what, there, options);
        let url = url_column(there, options).ok_or_else(|| missing("URL"))?;
        Self::with_url(name, there, url, options)
    }

    /// Of columns that have names, if it is known where the URL is.
    pub(super) fn with_url(name: &str, there: &[&str], url: usize, options: &ListOptions) -> Result<Self, Error> {
        let synset = match options.unlabelled {
            true => None,
            false => {
                let found = find(there, &options.synset_column, SYNSETS).filter(|synset| *synset != url);
                Some(found.ok_or_else(|| no_column(name, "class", there, options))?)
            }
        };
        Self::with(name, there, url, synset, options)
    }

    pub(super) fn with(
        name: &str,
        there: &[&str],
        url: usize,
        synset: Option<usize>,
        options: &ListOptions,
    ) -> Result<Self, Error> {
        let made = match options.url_format.as_str() {
            "" => None,
            format => Some(Made::of(format, there).map_err(|why| not_made(name, format, &why, there))?),
        };
        let of_open_images = synset.is_some_and(|synset| plain(there[synset]) == "labelname");
        let confidence = there.iter().position(|column| of_open_images && plain(column) == "confidence");
        let mut kept: Vec<(usize, String)> = Vec::new();
        let mut keep = |at: usize, called: &str| {
            let member = member(called);
            if !called.is_empty() && !kept.iter().any(|(_, there)| *there == member) {
                kept.push((at, member));
            }
        };
        for wanted in &options.keep {
            if wanted == "all" {
                let others = (0..there.len()).filter(|at| (made.is_some() || *at != url) && Some(*at) != synset);
                others.for_each(|at| keep(at, there[at]));
                continue;
            }
            let exact = there.iter().position(|column| column == wanted);
            let similar = || there.iter().position(|column| plain(column) == plain(wanted));
            let caption = || caption_of(there.iter().copied()).filter(|_| plain(wanted) == "caption");
            let at = exact.or_else(similar).or_else(caption).ok_or_else(|| {
                let there = there.join(", ");
                Error::Invalid(format!("{name}: no column {wanted:?} that could be kept; it has {there}"))
            })?;
            keep(at, wanted);
        }
        Ok(Self { synset, url, made, confidence, kept })
    }

    /// For people: what stands where.
    pub(super) fn describe(&self, there: &[&str], header: bool) -> String {
        let column = |at: usize| match header {
            true => format!("{:?}", there[at]),
            false => format!("column {}", at + 1),
        };
        let mut text = match &self.made {
            None => format!("{} is the URL", column(self.url)),
            Some(made) => {
                let columns: Vec<String> = made.parts.iter().map(|(_, at)| column(*at)).collect();
                format!("the URL is made of {}", columns.join(", "))
            }
        };
        match self.synset {
            Some(synset) => text += &format!(", {} the class", column(synset)),
            None => text += ", no class",
        }
        if !self.kept.is_empty() {
            let kept: Vec<&str> = self.kept.iter().map(|(_, member)| member.as_str()).collect();
            text += &format!("; kept: {}", kept.join(", "));
        }
        text
    }
}

/// That no URL can be made as it is wanted, and of what it could be.
fn not_made(name: &str, format: &str, why: &str, there: &[&str]) -> Error {
    Error::Invalid(format!("{name}: --url-format {format}: {why}; the list has {}", there.join(", ")))
}

/// That a column is not there, which are, and what to do.
fn no_column(name: &str, what: &str, there: &[&str], options: &ListOptions) -> Error {
    if what == "URL"
        && let Err(why) = Made::of(&options.url_format, there)
        && !options.url_format.is_empty()
    {
        return not_made(name, &options.url_format, &why, there);
    }
    let (given, way_out) = match what {
        "class" => (&options.synset_column, "--synset-column, or take the list without classes by --unlabelled"),
        _ => (&options.url_column, "--url-column"),
    };
    let wanted = if given.is_empty() { format!("for the {what}") } else { format!("{given:?}") };
    let there = there.join(", ");
    Error::Invalid(format!("{name}: no column {wanted}; it has {there}. Name the right one with {way_out}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN_IMAGES: [&str; 6] = ["ImageID", "OriginalURL", "License", "Title", "LabelName", "Confidence"];

    fn keeping(keep: &[&str]) -> ListOptions {
        ListOptions { keep: keep.iter().map(|name| (*name).to_owned()).collect(), ..ListOptions::default() }
    }

    #[test]
    fn columns_are_found_by_their_usual_names_and_kept_by_any() {
        let places = Places::named("l", &OPEN_IMAGES, &keeping(&["license", "caption"])).expect("all are there");
        assert_eq!((places.url, places.synset, places.confidence), (1, Some(4), Some(5)));
        assert_eq!(places.kept, [(2, "license".to_owned()), (3, "caption".to_owned())]);
        let all = Places::named("l", &OPEN_IMAGES, &keeping(&["all"])).expect("all are there");
        assert_eq!(all.kept.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 2, 3, 5]);
        assert!(all.describe(&OPEN_IMAGES, true).contains("\"OriginalURL\" is the URL, \"LabelName\" the class"));

        let unlabelled = ListOptions { unlabelled: true, ..keeping(&["all"]) };
        let laion = ["URL", "TEXT", "WIDTH", "sha256", ""];
        let places = Places::named("l", &laion, &unlabelled).expect("a class is not wanted");
        assert_eq!((places.url, places.synset), (0, None));
        let members: Vec<&str> = places.kept.iter().map(|(_, member)| member.as_str()).collect();
        assert_eq!(members, ["TEXT", "WIDTH", "list_sha256"]);
        for (there, options, said) in [
            (&laion[..], keeping(&[]), "for the class; it has URL, TEXT, WIDTH"),
            (&laion, keeping(&[]), "--unlabelled"),
            (&OPEN_IMAGES, keeping(&["author"]), "no column \"author\" that could be kept; it has ImageID"),
            (&["photo", "label"], keeping(&[]), "for the URL"),
        ] {
            let error = Places::named("l", there, &options).expect_err("a column is missing").to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
