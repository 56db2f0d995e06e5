//! The object that commits a round, a part of the catalog (see [`crate::keys::round`]).

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::OutcomeCounts;
use crate::format::stored;

/// One round. Slices that no round names are no part of the dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Round {
    /// Of this format: 1.
    pub format: u32,
    /// The writer's own random word.
    pub nonce: String,
    /// The caller's: a repeated request finds it here.
    pub request_id: String,
    /// The span of the request that opened it, if that was exported; see [`crate::trace`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub traceparent: String,
    /// Why it was opened.
    #[serde(default)]
    pub cause: Cause,
    /// Whoever asked for it agreed to leave out however much is damaged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accepts_damage: bool,
    /// Counts the dataset's rounds from 1.
    pub round: u32,
    /// Number of the first slice.
    pub first_slice: u32,
    /// In the order of their numbers.
    pub slices: Vec<Slice>,
    /// Sites whose URLs have slices of their own; every other site is in one slice alone. None: the URLs were not dealt
    /// by site, so that every site may be in each slice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub large_sites: Option<Vec<LargeSite>>,
    /// The first key that this round gave; its other new URLs have the keys that follow.
    pub first_key: u64,
    /// URLs that came into the catalog with it.
    pub new_urls: u64,
    /// Keys that it used up, from `first_key` on: a new URL's key is its place among the lines, some of which gave
    /// none. 0, in older rounds: as many as there were new URLs.
    #[serde(default)]
    pub keys: u64,
    /// New URLs by synset.
    pub urls_per_class: BTreeMap<String, u64>,
    /// URLs of earlier rounds that it fetches again, by the outcome that they had.
    pub retried: OutcomeCounts,
    /// Lines of synsets that were not chosen.
    pub not_chosen: u64,
    /// Lines whose URL was in the catalog already.
    pub known: u64,
    /// Lines that said again what another one had said.
    #[serde(default)]
    pub repeated: u64,
    /// New URLs that stood under several classes.
    #[serde(default)]
    pub several: u64,
    /// Lines without a synset or without a URL.
    pub bad_lines: u64,
    /// The first few of them.
    pub bad_line_examples: Vec<String>,
}

stored!(Round, "round", format, nonce);

/// Why a round was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A person asked for it: the dataset was created or refreshed.
    #[default]
    Request,
    /// The coordinator, for URLs that may come back and were not tried a second time yet, and for those that nobody got
    /// to.
    MayComeBack,
    /// The coordinator, for URLs of classes that turned out to be short of samples.
    ShortClasses,
}

/// One slice of a round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    /// In it.
    pub urls: u32,
    /// Of the object's bytes, in hex.
    pub sha256: String,
    /// Whether all of its URLs have failed before: each is tried just once.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
}

/// A site with slices of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LargeSite {
    /// As [`crate::site`] names it.
    pub site: String,
    /// Number of its first slice.
    pub first_slice: u32,
    /// How many it has.
    pub slices: u32,
}

impl LargeSite {
    /// Numbers of its slices.
    pub fn shards(&self) -> Range<u32> {
        self.first_slice..self.first_slice + self.slices
    }
}

impl Round {
    /// URLs of all slices together.
    pub fn urls(&self) -> u64 {
        self.new_urls + self.retried.total()
    }

    /// The first key that a later round can give.
    pub fn end_key(&self) -> u64 {
        self.first_key + self.keys.max(self.new_urls)
    }

    /// Numbers of its slices, which are those of its shards.
    pub fn shards(&self) -> Range<u32> {
        self.first_slice..self.first_slice + self.slices.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rejection;
    use crate::format::Stored;

    #[test]
    fn a_round_is_read_back_and_knows_its_shards() {
        let slice = |urls| Slice { urls, sha256: "00ff".to_owned(), once: urls == 3 };
        let round = Round {
            format: 1,
            nonce: "n".to_owned(),
            request_id: "r".to_owned(),
            traceparent: String::new(),
            cause: Cause::MayComeBack,
            accepts_damage: true,
            round: 2,
            first_slice: 7,
            slices: vec![slice(10), slice(3)],
            large_sites: Some(vec![LargeSite { site: "flickr.com".to_owned(), first_slice: 8, slices: 1 }]),
            first_key: 70,
            new_urls: 9,
            keys: 12,
            urls_per_class: [("n1".to_owned(), 9)].into(),
            retried: [(Err(Rejection::Timeout), 4)].into_iter().collect(),
            not_chosen: 1,
            known: 2,
            repeated: 3,
            several: 0,
            bad_lines: 1,
            bad_line_examples: vec!["list:4: no tab".to_owned()],
        };
        assert_eq!((round.urls(), round.shards(), round.end_key()), (13, 7..9, 82));
        assert_eq!(Round::from_json(&round.to_json()).expect("own output"), round);
        assert!(Round::from_json(&Round { format: 2, ..round.clone() }.to_json()).is_err());
        let older = Round { large_sites: None, ..round };
        let json = String::from_utf8(older.to_json()).expect("JSON");
        assert!(!json.contains("large_sites"), "as it was before URLs were dealt by site");
        let older = json.replace(r#""cause":"may_come_back","#, "").replace(r#","once":true"#, "");
        let older = older.replace(r#""accepts_damage":true,"#, "");
        let older = older.replace(r#""keys":12,"#, "").replace(r#""repeated":3,"several":0,"#, "");
        let older = Round::from_json(older.as_bytes()).expect("as they were");
        assert_eq!((older.cause, older.accepts_damage, older.end_key()), (Cause::Request, false, 79));
    }
}
