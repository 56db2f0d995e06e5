//! A run's ledger: which samples it was really trained on, step by step.
//!
//! Rank 0 of each generation writes objects of lines ([`crate::keys::ledger`]). A step that was done again after a
//! failure has a line of each generation; that of the highest one counts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::format::stored;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// Epochs begun, from 1.
    pub epoch: u64,
    /// Steps applied with this one.
    pub step: u64,
    /// Samples of the step on all ranks.
    pub samples: u64,
    /// Sum of a hash of each sample's key: the same in whatever order they are added.
    pub digest: u64,
}

/// One object of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lines {
    /// Of this format: 1.
    pub format: u32,
    /// In the order of the steps.
    pub lines: Vec<Line>,
}

stored!(Lines, "run ledger", format);

/// What a whole ledger says: for each step its line, and the generation that it is from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger(BTreeMap<u64, (u64, Line)>);

/// A difference between two ledgers at one step; None where a ledger has no such step.
pub type Difference<'a> = [Option<&'a (u64, Line)>; 2];

impl Ledger {
    /// Adds the lines of one object.
    pub fn add(&mut self, generation: u64, lines: Lines) {
        for line in lines.lines {
            let known = self.0.entry(line.step).or_insert_with(|| (generation, line.clone()));
            if known.0 <= generation {
                *known = (generation, line);
            }
        }
    }

    /// How many steps it has.
    pub fn steps(&self) -> u64 {
        self.0.len() as u64
    }

    /// How many steps have the same samples in both, and the first that has not.
    pub fn compare<'a>(&'a self, other: &'a Self) -> (u64, Option<Difference<'a>>) {
        let same = |step: &u64| match (self.0.get(step), other.0.get(step)) {
            (Some((_, mine)), Some((_, theirs))) => mine == theirs,
            _ => false,
        };
        let equal = self.0.keys().filter(|step| same(step)).count() as u64;
        let mut steps: Vec<&u64> = self.0.keys().chain(other.0.keys()).collect();
        steps.sort_unstable();
        let first = steps.into_iter().find(|step| !same(step));
        (equal, first.map(|step| [self.0.get(step), other.0.get(step)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(steps: std::ops::RangeInclusive<u64>, digest: u64) -> Lines {
        Lines { format: 1, lines: steps.map(|step| Line { epoch: 1, step, samples: 8, digest }).collect() }
    }

    #[test]
    fn the_highest_generation_of_a_step_counts_in_whatever_order_objects_are_read() {
        let (mut a, mut b) = (Ledger::default(), Ledger::default());
        a.add(1, lines(1..=6, 5));
        a.add(2, lines(4..=9, 7));
        b.add(2, lines(4..=9, 7));
        b.add(1, lines(1..=6, 5));
        assert_eq!(a, b);
        assert_eq!((a.steps(), a.compare(&b)), (9, (9, None)));
        b.add(3, lines(8..=10, 1));
        let (equal, first) = a.compare(&b);
        let first =
            first.expect("step 8 differs").map(|line| line.map(|(generation, line)| (*generation, line.digest)));
        assert_eq!((equal, first), (7, [Some((2, 7)), Some((3, 1))]));
    }

    #[test]
    fn a_step_that_one_ledger_does_not_have_is_a_difference() {
        let (mut a, mut b) = (Ledger::default(), Ledger::default());
        a.add(1, lines(1..=3, 5));
        b.add(1, lines(1..=2, 5));
        assert!(matches!(a.compare(&b), (2, Some([Some((1, Line { step: 3, .. })), None]))));
        assert!(matches!(b.compare(&a), (2, Some([None, Some(_)]))));
    }
}
