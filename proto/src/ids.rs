//! What names things that last: datasets, shards, attempts at them, runs and classes. A value that exists is a valid
//! one.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A text that does not name what it must.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {what}: it must be {rule}")]
pub struct IdError {
    what: &'static str,
    rule: &'static str,
    text: String,
}

/// A name that is cheap to copy, and can be read as the text that it is.
macro_rules! name {
    ($(#[doc = $doc:literal])+ $type:ident, $what:literal, $valid:ident, $rule:literal) => {
        $(#[doc = $doc])+
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(Arc<str>);

        impl FromStr for $type {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                match $valid(text) {
                    true => Ok(Self(text.into())),
                    false => Err(IdError { what: $what, rule: $rule, text: text.to_owned() }),
                }
            }
        }

        impl TryFrom<String> for $type {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl Deref for $type {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name!(
    /// A dataset, for ever: `<name>-<uid>`. A name that is deleted and made again has another uid.
    DatasetId,
    "dataset's id",
    is_dataset_id,
    "<name>-<uid>: 3 to 63 of a-z 0-9 - . , beginning and ending with a letter or digit"
);

name!(
    /// A run: what stands in keys, URLs and Kubernetes labels alike.
    RunName,
    "run's name",
    is_name,
    "1 to 63 of a-z 0-9 - . , beginning and ending with a letter or digit"
);

name!(
    /// A class in a URL list: ImageNet's `n02084071`, or any other name, in any script and with blanks in it.
    Synset,
    "synset",
    is_synset,
    "1 to 128 bytes without control characters, and no white space at its ends"
);

/// Whether `name` may name a dataset or a run: 1 to 63 of `a-z 0-9 - .`, beginning and ending with a letter or digit,
/// so that it can stand in keys, URLs and Kubernetes labels alike.
pub fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() <= 63
        && name.starts_with(plain)
        && name.ends_with(plain)
        && name.chars().all(|c| plain(c) || c == '-' || c == '.')
}

fn is_dataset_id(id: &str) -> bool {
    is_name(id) && id.rsplit_once('-').is_some_and(|(name, _)| is_name(name))
}

fn is_synset(name: &str) -> bool {
    (1..=Synset::LONGEST).contains(&name.len()) && !name.contains(char::is_control) && name.trim() == name
}

impl DatasetId {
    /// The name that people gave.
    pub fn name(&self) -> &str {
        self.rsplit_once('-').map_or(&**self, |(name, _)| name)
    }

    /// One of its shards.
    pub fn shard(&self, shard: u32) -> ShardId {
        ShardId { dataset: self.clone(), shard }
    }
}

impl Synset {
    /// Bytes of the longest one: all of a dataset's are held in memory.
    pub const LONGEST: usize = 128;
}

/// One shard of one dataset, and the slice that it is made of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardId {
    /// Of which it is a part.
    pub dataset: DatasetId,
    /// Its number.
    pub shard: u32,
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.dataset, self.shard)
    }
}

/// The number of one attempt at a shard: the term of the coordinator that granted it, and a counter inside that term.
/// It is in every key that the attempt writes and is never reused, so no late writer can overwrite what somebody else
/// committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Attempt {
    /// The granting coordinator's term.
    pub term: u64,
    /// Counts the grants of that term, from 1.
    pub n: u64,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.n)
    }
}

impl FromStr for Attempt {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let parse = || {
            let (term, n) = text.split_once('.')?;
            Some(Attempt { term: term.parse().ok()?, n: n.parse().ok()? })
        };
        parse().ok_or_else(|| IdError { what: "attempt", rule: "<term>.<n>", text: text.to_owned() })
    }
}

impl TryFrom<String> for Attempt {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<Attempt> for String {
    fn from(attempt: Attempt) -> Self {
        attempt.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_slashes_dots_first_or_capitals_are_refused() {
        assert_eq!("birds-2.v1".parse::<RunName>().expect("a name").to_string(), "birds-2.v1");
        for bad in ["", "../x", "a/b", "Birds", "-a", "a-", ".a", &"a".repeat(64)] {
            assert!(bad.parse::<RunName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_dataset_has_a_name_and_a_uid() {
        let id: DatasetId = "rare-birds-1a2b3c4d".parse().expect("an id");
        assert_eq!((id.name(), id.shard(7).to_string()), ("rare-birds", "rare-birds-1a2b3c4d/7".to_owned()));
        for bad in ["birds", "-1", "../x-1", "birds-", "birds--1"] {
            assert!(bad.parse::<DatasetId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn synsets_are_names_that_stand_in_one_line() {
        for good in ["n02084071", "/m/011k07", "golden retriever", "金毛犬", "a/../b", "100 %"] {
            assert!(good.parse::<Synset>().is_ok(), "{good}");
        }
        for bad in ["", " ", "dog ", "a\tb", "a\nb", "a\u{85}b", &"x".repeat(Synset::LONGEST + 1)] {
            assert!(bad.parse::<Synset>().is_err(), "{bad}");
        }
    }

    #[test]
    fn stored_names_are_texts_and_bad_ones_are_refused_with_the_rule() {
        let attempt = Attempt { term: 9, n: 2 };
        assert_eq!(serde_json::to_string(&attempt).expect("a text"), "\"9.2\"");
        assert_eq!(serde_json::from_str::<Attempt>("\"9.2\"").expect("own output"), attempt);
        let id: DatasetId = serde_json::from_str("\"birds-1\"").expect("an id");
        assert_eq!(serde_json::to_string(&id).expect("a text"), "\"birds-1\"");
        let error = serde_json::from_str::<Attempt>("\"9\"").expect_err("no counter").to_string();
        assert!(error.starts_with("\"9\" is no attempt: it must be <term>.<n>"), "{error}");
    }
}
