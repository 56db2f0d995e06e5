//! Whose turn it is to be asked again: what has been dead in several refreshes is asked less and less often. Pure.
//!
//! What failed in `n` rounds in a row that somebody asked for is taken by every 2^(n-1)th refresh. Each key has turns of
//! its own, so that every refresh asks a part of such URLs. One that would take nothing has the turns of the next one
//! that takes something: so every refresh opens a round as long as anything may come back, and the number of such
//! rounds, by which turns are told, grows with each.
//!
//! Rounds that the coordinator opened by itself follow minutes after the one before, and say little more than it does.
//! Their failures do not count.

/// Turns become no rarer after so many failures in a row: each 64th refresh.
const MOST: u8 = 7;
/// The rounds that are still to be looked at may belong to the row.
const OPEN: u8 = 8;

/// What a round made of a URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Made {
    /// It failed, and may come back. `asked`: in a round that somebody asked for.
    Failed { asked: bool },
    /// No try was made.
    Untried,
    /// Anything else.
    Other,
}

/// In how many rounds in a row each key has failed; half a byte a key.
#[derive(Debug)]
pub(crate) struct Streaks {
    halves: Vec<u8>,
    /// There are keys that every refresh takes.
    always: bool,
}

impl Streaks {
    pub(crate) fn new(keys: u64) -> Self {
        Self { halves: vec![0; keys.div_ceil(2) as usize], always: false }
    }

    /// Takes note of the latest row of a key that may come back.
    pub(crate) fn begin(&mut self, key: i64, made: Made) {
        match made {
            Made::Failed { asked } => self.set(key, OPEN | u8::from(asked)),
            // If its turn has come, it still is.
            Made::Untried | Made::Other => self.always = true,
        }
    }

    /// Takes note of an older row, the later ones first.
    pub(crate) fn older(&mut self, key: i64, made: Made) {
        let half = self.half(key);
        let failures = half & MOST;
        match made {
            _ if half & OPEN == 0 => {}
            Made::Failed { asked } => self.set(key, OPEN | (failures + u8::from(asked)).min(MOST)),
            Made::Untried => {}
            Made::Other => {
                self.always |= failures == 0;
                self.set(key, failures);
            }
        }
    }

    /// The turns that a refresh has, when there were `refreshes` before it.
    pub(crate) fn turns(self, refreshes: u64) -> Turns {
        let keys = (0..).zip(self.halves.iter().flat_map(|both| [both & 15, both >> 4]));
        let waits = keys.filter(|(_, half)| *half != 0).map(|(key, half)| wait(refreshes, key, half & MOST));
        let ahead = if self.always { 0 } else { waits.min().unwrap_or(0) };
        Turns { at: refreshes + ahead, streaks: self }
    }

    fn half(&self, key: i64) -> u8 {
        let both = self.halves.get(key as usize / 2).copied().unwrap_or(0);
        if key % 2 == 0 { both & 15 } else { both >> 4 }
    }

    fn set(&mut self, key: i64, half: u8) {
        if let Some(both) = self.halves.get_mut(key as usize / 2) {
            *both = if key % 2 == 0 { *both & 0xf0 | half } else { *both & 15 | half << 4 };
        }
    }
}

/// Which keys one refresh takes.
#[derive(Debug)]
pub(crate) struct Turns {
    streaks: Streaks,
    at: u64,
}

impl Turns {
    /// Whether a key that may come back is taken now.
    pub(crate) fn has(&self, key: i64) -> bool {
        wait(self.at, key, self.streaks.half(key) & MOST) == 0
    }
}

/// How many refreshes later the turn of a key comes that has failed so often.
fn wait(refreshes: u64, key: i64, failures: u8) -> u64 {
    let every = 1 << failures.saturating_sub(1);
    // A multiplication mixes the bits that are shifted down (Fibonacci hashing).
    let turn = (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    turn.wrapping_sub(refreshes) % every
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILED: Made = Made::Failed { asked: true };

    fn streaks(rows: &[Made]) -> Streaks {
        let mut streaks = Streaks::new(4);
        streaks.begin(2, rows[0]);
        rows[1..].iter().for_each(|made| streaks.older(2, *made));
        streaks
    }

    #[test]
    fn only_failures_in_a_row_in_rounds_that_somebody_asked_for_count() {
        let automatic = Made::Failed { asked: false };
        for (rows, expected) in [
            (&[FAILED][..], 1),
            (&[FAILED, FAILED, FAILED], 3),
            (&[automatic, FAILED], 1),
            (&[FAILED, automatic, FAILED, Made::Other, FAILED], 2),
            (&[FAILED, Made::Untried, Made::Untried, FAILED], 2),
            (&[FAILED; 20], 7),
            (&[Made::Untried, FAILED, FAILED], 0),
            (&[automatic, Made::Untried], 0),
        ] {
            let streaks = streaks(rows);
            assert_eq!(streaks.half(2) & MOST, expected, "{rows:?}");
            assert_eq!([0, 1, 3].map(|key| streaks.half(key)), [0; 3], "its neighbours are left alone");
        }
    }

    #[test]
    fn each_key_is_taken_once_in_so_many_refreshes_and_each_refresh_takes_a_part() {
        for (failures, every) in [(0, 1), (1, 1), (2, 2), (3, 4), (5, 16), (7, 64)] {
            for key in 0..100 {
                let taken = (3..3 + every).filter(|refreshes| wait(*refreshes, key, failures) == 0).count();
                assert_eq!(taken, 1, "key {key}, {failures} failures");
            }
            let taken = (0..6400).filter(|key| wait(9, *key, failures) == 0).count() as u64;
            assert!(taken.abs_diff(6400 / every) <= 6400 / every / 4, "{taken} of 6400, {failures} failures");
        }
    }

    #[test]
    fn a_key_waits_at_least_as_long_as_the_time_before_whatever_its_turns() {
        for key in 0..100 {
            let (mut failures, mut last, mut gaps) = (1, 1u64, Vec::new());
            for refresh in 2..200 {
                if wait(refresh, key, failures) == 0 {
                    gaps.push(refresh - last);
                    (last, failures) = (refresh, (failures + 1).min(MOST));
                }
            }
            assert!(gaps.windows(2).all(|gaps| gaps[0] <= gaps[1]), "key {key}: {gaps:?}");
        }
    }

    #[test]
    fn a_refresh_that_would_take_nothing_takes_what_comes_next() {
        for refreshes in 0..20 {
            let turns = streaks(&[FAILED; 6]).turns(refreshes);
            assert!(turns.has(2) && turns.at - refreshes < 32, "{refreshes}");
        }
        // Something else is taken anyway.
        let refreshes = (0..32).find(|refreshes| wait(*refreshes, 2, 6) != 0).expect("most");
        let mut others = streaks(&[FAILED; 6]);
        others.begin(0, FAILED);
        let turns = others.turns(refreshes);
        assert!(turns.has(0) && !turns.has(2));
        let mut others = streaks(&[FAILED; 6]);
        others.begin(0, Made::Untried);
        let turns = others.turns(refreshes);
        assert!(turns.has(0) && !turns.has(2));
    }
}
