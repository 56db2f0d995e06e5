//! What a dataset is: chosen once, at its creation, and stored as `spec.json`.

mod resize;

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Synset;
use crate::opt_out::Signal;

pub use resize::{Chroma, Color, Filter, ImageFormat, Reencode, Resize, ResizeMode};

/// A spec that cannot be meant so: what is wrong, where, and what is allowed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SpecError(pub(crate) String);

/// The resolved description of a dataset. Every field but `classes` has a default; unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DatasetSpec {
    /// The classes; a class's place here is its label. When a dataset is created this is the choice of synsets out of
    /// the list (empty: all that occur, in alphabetical order); in `spec.json` it is complete.
    pub classes: Vec<Class>,
    /// Whether the list has no classes: its pictures are gathered, stored and exported, all in one class called
    /// [`UNLABELLED`], and nothing can be trained on them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unlabelled: bool,
    /// Whether the list names [files](crate::files), which workers read where their operator lets them, and no URLs.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub files: bool,
    /// What is done with pictures that the list has under several classes. Left out: such a list is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub multi_label: Option<MultiLabel>,
    /// Columns of the list that travel with the samples; `all`: every one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keep_columns: Vec<String>,
    /// What tells whether a URL still gives the picture that was listed. Left out: it may give another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<Verify>,
    /// What owners may say against the use of their pictures, and is heeded: then they are not fetched, or not kept.
    pub respect: Vec<Signal>,
    /// How fetched images become stored ones.
    pub resize: Resize,
    /// Which share of the images goes where.
    pub splits: Splits,
    /// What is refused, and how long is waited.
    pub limits: Limits,
    /// Which pictures are taken for the same one.
    pub duplicates: Duplicates,
    /// Samples of a class, all splits together, after which no more of it is fetched; the manifest keeps the first so
    /// many by key. 0: all that there are.
    pub per_class: u32,
    /// URLs in one slice; a slice becomes one shard.
    pub slice_urls: u32,
    /// Seed of the shuffle that deals URLs to slices.
    pub seed: u64,
}

/// One class of images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Its id in the URL list, ImageNet's `n02084071` or any other name in one line.
    pub synset: String,
    /// For people; the synset itself if nobody gave a name.
    #[serde(default)]
    pub name: String,
}

/// The one class of a dataset whose list has none.
pub const UNLABELLED: &str = "unlabelled";

/// What is done with pictures that a list has under several classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MultiLabel {
    /// They are of the class that stands first in the list.
    First,
    /// They are stored with all of their classes, but none of them counts as a sample of one, so that none is trained
    /// on.
    All,
    /// They are left out.
    Drop,
}

/// A column of the list that has a digest of each picture's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verify {
    /// How it is made and written.
    pub digest: ListedDigest,
    /// The column's name; it is kept.
    pub column: String,
}

/// How a digest is made and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ListedDigest {
    /// SHA-256 in hex, as DataComp has it.
    Sha256,
    /// MD5 in Base64, as Open Images has it.
    Md5Base64,
}

/// Shares of the splits; what is left over trains. An image's split is a pure function of its bytes (see
/// [`Splits::split_of`]), unless the list says it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Splits {
    /// Share of the images that validate, 0 to 0.5.
    pub validation: f64,
    /// Share of the images that test, 0 to 0.5.
    pub test: f64,
    /// Goes into the hash, so that two datasets can be split differently.
    pub salt: String,
    /// The column of the list that says the split; it is kept. Empty: there is none. Where it says nothing, the bytes
    /// do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub column: String,
}

/// What is refused, and how long is waited.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bodies under this many bytes are no photos.
    pub min_bytes: u64,
    /// Bodies over this many bytes are refused, before and after decompression.
    pub max_bytes: u64,
    /// The shorter side must have this many pixels.
    pub min_side: u32,
    /// Width x height may be at most this, read from the header before anything is decoded.
    pub max_pixels: u64,
    /// The longer side may be at most this many times the shorter one.
    pub max_aspect: f64,
    /// For one URL in all: names, connections, redirects, bodies and further tries together, without the pauses between
    /// tries.
    pub timeout_seconds: f64,
    /// For one connection.
    pub connect_timeout_seconds: f64,
    /// From the beginning of a request, its connection included, to the head of its answer.
    pub first_byte_timeout_seconds: f64,
    /// Further tries after a failure that may pass: no connection, no answer in time, 429 and 5xx.
    pub retries: u32,
    /// Redirects that are followed.
    pub redirects: u32,
}

/// Which pictures are taken for the same one, when a manifest is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Duplicates {
    /// The same bytes under more different URLs than this are a placeholder that nobody had listed: none of them
    /// counts.
    pub many_urls: u32,
    /// Two pictures look alike if their 64-bit perceptual hashes differ in at most so many bits, 0 to 6. One that
    /// validates or tests is skipped if it looks like one that trains; all others are reported.
    pub near_bits: u32,
}

/// A part of the dataset that is used for one purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Trained on.
    Train,
    /// Looked at after each epoch.
    Validation,
    /// Looked at once, at the end.
    Test,
}

impl Default for DatasetSpec {
    fn default() -> Self {
        Self {
            classes: Vec::new(),
            unlabelled: false,
            files: false,
            multi_label: None,
            keep_columns: Vec::new(),
            verify: None,
            respect: Signal::ALL.to_vec(),
            resize: Resize::default(),
            splits: Splits::default(),
            limits: Limits::default(),
            duplicates: Duplicates::default(),
            per_class: 0,
            slice_urls: 10_000,
            seed: 0,
        }
    }
}

impl Default for Duplicates {
    fn default() -> Self {
        Self { many_urls: 20, near_bits: 4 }
    }
}

impl Default for Splits {
    fn default() -> Self {
        Self { validation: 0.05, test: 0.05, salt: String::new(), column: String::new() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            min_bytes: 5_000,
            max_bytes: 32 << 20,
            min_side: 64,
            max_pixels: 100_000_000,
            max_aspect: 8.0,
            timeout_seconds: 30.0,
            connect_timeout_seconds: 10.0,
            first_byte_timeout_seconds: 20.0,
            retries: 2,
            redirects: 10,
        }
    }
}

impl DatasetSpec {
    /// Parses JSON and checks every value.
    pub fn from_json(json: &str) -> Result<Self, SpecError> {
        let spec: Self = serde_json::from_str(json).map_err(|e| SpecError(format!("dataset spec: {e}")))?;
        spec.check()?;
        Ok(spec)
    }

    /// The same for a dataset that is to be made: what older ones may have chosen is refused, too, where it could never
    /// work.
    pub fn from_new_json(json: &str) -> Result<Self, SpecError> {
        let spec = Self::from_json(json)?;
        check("limits.redirects", spec.limits.redirects, spec.limits.redirects <= 20, "at most 20")?;
        let why = "at most 100000: a shard is held in memory as rows, and fetched again whole when its worker is lost";
        check("slice_urls", spec.slice_urls, spec.slice_urls <= 100_000, why)?;
        Ok(spec)
    }

    /// The stored form.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and numbers only")
    }

    /// Columns of the list that travel with the samples, those among them that the spec needs.
    pub fn kept_columns(&self) -> impl Iterator<Item = &str> {
        let needed = self.verify.iter().map(|verify| &verify.column).chain([&self.splits.column]);
        self.keep_columns.iter().chain(needed).filter(|name| !name.is_empty()).map(String::as_str)
    }

    fn check(&self) -> Result<(), SpecError> {
        let Self { classes, resize, splits, limits, duplicates, slice_urls, .. } = self;
        check("resize.size", resize.size, (8..=4096).contains(&resize.size), "8 to 4096")?;
        check("resize.quality", resize.quality, (1..=100).contains(&resize.quality), "1 to 100")?;
        for (key, share) in [("splits.validation", splits.validation), ("splits.test", splits.test)] {
            check(key, share, (0.0..=0.5).contains(&share), "0 to 0.5")?;
        }
        check(
            "splits.validation + splits.test",
            splits.validation + splits.test,
            splits.validation + splits.test < 1.0,
            "less than 1",
        )?;
        check("duplicates.many_urls", duplicates.many_urls, duplicates.many_urls >= 1, "at least 1")?;
        check("duplicates.near_bits", duplicates.near_bits, duplicates.near_bits <= 6, "0 to 6")?;
        check("slice_urls", slice_urls, (1..=1_000_000).contains(slice_urls), "1 to 1000000")?;
        check("limits.max_bytes", limits.max_bytes, limits.max_bytes >= limits.min_bytes, "at least limits.min_bytes")?;
        check("limits.max_bytes", limits.max_bytes, limits.max_bytes <= 1 << 30, "at most 1 GiB (1073741824)")?;
        check("limits.max_pixels", limits.max_pixels, limits.max_pixels <= 1_000_000_000, "at most 1000000000")?;
        check("limits.max_aspect", limits.max_aspect, limits.max_aspect >= 1.0, "at least 1")?;
        for (key, seconds) in [
            ("limits.timeout_seconds", limits.timeout_seconds),
            ("limits.connect_timeout_seconds", limits.connect_timeout_seconds),
            ("limits.first_byte_timeout_seconds", limits.first_byte_timeout_seconds),
        ] {
            check(key, seconds, seconds > 0.0 && seconds <= 3600.0, "more than 0, at most 3600")?;
        }
        check("limits.retries", limits.retries, limits.retries <= 10, "at most 10")?;
        let other = classes.iter().find(|class| class.synset != UNLABELLED).filter(|_| self.unlabelled);
        if let Some(Class { synset, .. }) = other {
            return Err(SpecError(format!("unlabelled = true: must be false, since a class is chosen: {synset:?}")));
        }
        let mut seen = HashSet::new();
        for class in classes {
            let ok = class.synset.parse::<Synset>().is_ok();
            let rule = "1 to 128 bytes without control characters, and no white space at its ends";
            check("classes.synset", format!("{:?}", class.synset), ok, rule)?;
            check("classes.synset", format!("{:?}", class.synset), seen.insert(&class.synset), "named once only")?;
        }
        Ok(())
    }
}

/// Fails with the key, the value and what is allowed, unless `ok`.
pub(crate) fn check(key: &str, value: impl fmt::Display, ok: bool, allowed: &str) -> Result<(), SpecError> {
    if ok { Ok(()) } else { Err(SpecError(format!("{key} = {value}: must be {allowed}"))) }
}

impl Limits {
    /// For one URL in all.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout_seconds)
    }

    /// For one connection.
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.connect_timeout_seconds)
    }

    /// For one connection and the head of an answer.
    pub fn first_byte_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.first_byte_timeout_seconds)
    }
}

impl Splits {
    /// The split of an image whose bytes, as fetched, have this SHA-256. A pure function of the content, so that one
    /// picture under two URLs can never stand in both train and test.
    pub fn split_of(&self, sha256: &[u8; 32]) -> Split {
        use sha2::{Digest, Sha256};
        let hash = Sha256::new().chain_update(self.salt.as_bytes()).chain_update(sha256).finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&hash[..8]);
        // 53 bits fill an f64's mantissa: uniform in [0, 1).
        let share = (u64::from_be_bytes(first) >> 11) as f64 / (1u64 << 53) as f64;
        if share < self.test {
            Split::Test
        } else if share < self.test + self.validation {
            Split::Validation
        } else {
            Split::Train
        }
    }
}

impl Splits {
    /// The split that the list says, by the columns that travel with an image.
    pub fn published(&self, columns: Option<&str>) -> Option<Split> {
        if self.column.is_empty() {
            return None;
        }
        let columns: serde_json::Map<String, serde_json::Value> = serde_json::from_str(columns?).ok()?;
        Split::published(columns.get(&crate::columns::member(&self.column))?.as_str()?)
    }
}

impl Split {
    /// What a split of a published dataset is called there.
    pub fn published(name: &str) -> Option<Self> {
        match name.trim().to_ascii_lowercase().as_str() {
            "train" | "training" => Some(Split::Train),
            "val" | "valid" | "validation" | "dev" => Some(Split::Validation),
            "test" | "testing" => Some(Split::Test),
            _ => None,
        }
    }

    /// All three, in the order in which a shard's samples are counted.
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

    /// `train`, `validation` or `test`.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
            Split::Test => "test",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Split {
    type Err = SpecError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Split::ALL
            .into_iter()
            .find(|split| split.name() == name)
            .ok_or_else(|| SpecError(format!("split = {name:?}: must be train, validation or test")))
    }
}

#[cfg(test)]
mod tests;
