//! How many URLs had which outcome.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::rejection::{UnknownOutcome, outcome_name, parse_outcome};
use crate::{Outcome, Rejection};

/// URLs by outcome. Numbers inside; names in JSON and messages, where outcomes without URLs are left out.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct OutcomeCounts([u64; 1 + Rejection::ALL.len()]);

/// The place of an outcome: kept, then the rejections in their order.
fn place(outcome: Outcome) -> usize {
    outcome.map_or_else(|rejection| 1 + rejection as usize, |()| 0)
}

impl OutcomeCounts {
    /// Adds URLs of one outcome.
    pub fn add(&mut self, outcome: Outcome, urls: u64) {
        self.0[place(outcome)] += urls;
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, theirs)| *mine += theirs);
    }

    /// Takes away what `other` has, as far as it is there.
    pub fn subtract(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, theirs)| *mine = mine.saturating_sub(theirs));
    }

    /// URLs of one outcome.
    pub fn of(&self, outcome: Outcome) -> u64 {
        self.0[place(outcome)]
    }

    /// URLs in all.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The outcomes that have URLs.
    pub fn iter(&self) -> impl Iterator<Item = (Outcome, u64)> {
        let outcomes = std::iter::once(Ok(())).chain(Rejection::ALL.iter().copied().map(Err));
        outcomes.zip(self.0).filter(|(_, urls)| *urls > 0)
    }

    /// The names of the outcomes that have URLs, in alphabetical order.
    pub fn by_name(&self) -> BTreeMap<&'static str, u64> {
        self.iter().map(|(outcome, urls)| (outcome_name(outcome), urls)).collect()
    }

    /// From names.
    ///
    /// # Errors
    /// If one of them names no outcome that this program knows.
    pub fn from_names(named: impl IntoIterator<Item = (String, u64)>) -> Result<Self, UnknownOutcome> {
        named.into_iter().map(|(name, urls)| Ok((parse_outcome(&name)?, urls))).collect()
    }
}

impl FromIterator<(Outcome, u64)> for OutcomeCounts {
    fn from_iter<T: IntoIterator<Item = (Outcome, u64)>>(counts: T) -> Self {
        let mut all = Self::default();
        counts.into_iter().for_each(|(outcome, urls)| all.add(outcome, urls));
        all
    }
}

/// As messages have it.
impl From<&OutcomeCounts> for HashMap<String, u64> {
    fn from(counts: &OutcomeCounts) -> Self {
        counts.iter().map(|(outcome, urls)| (outcome_name(outcome).to_owned(), urls)).collect()
    }
}

impl fmt::Debug for OutcomeCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.by_name().fmt(f)
    }
}

impl Serialize for OutcomeCounts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.by_name().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for OutcomeCounts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_names(BTreeMap::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_names_in_json_in_alphabetical_order() {
        let all = [(Err(Rejection::NotFound), 3), (Ok(()), 40), (Err(Rejection::SliceFailed), 1), (Ok(()), 2)];
        let counts: OutcomeCounts = all.into_iter().collect();
        let json = r#"{"kept":42,"not_found":3,"slice_failed":1}"#;
        assert_eq!(serde_json::to_string(&counts).expect("a map"), json);
        assert_eq!(serde_json::from_str::<OutcomeCounts>(json).expect("own output"), counts);
        assert_eq!(OutcomeCounts::from_names(HashMap::from(&counts)).expect("own output"), counts);
        let error = serde_json::from_str::<OutcomeCounts>(r#"{"eaten": 1}"#).expect_err("no outcome").to_string();
        assert!(error.contains("\"eaten\""), "{error}");
    }

    #[test]
    fn what_was_added_can_be_taken_away_and_no_more() {
        let one = |outcome, urls| OutcomeCounts::from_iter([(outcome, urls)]);
        let mut counts = one(Ok(()), 5);
        counts.merge(&one(Err(Rejection::Dns), 7));
        assert_eq!((counts.total(), counts.of(Ok(())), counts.of(Err(Rejection::Tls))), (12, 5, 0));
        counts.subtract(&one(Err(Rejection::Dns), 9));
        assert_eq!(counts, one(Ok(()), 5));
    }
}
