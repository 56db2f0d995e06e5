//! What sites say may be taken from them (`robots.txt` and the like), as workers have read it. A pure state machine;
//! time comes in as an argument.
//!
//! **Each file is fetched once for the whole cluster in [`FRESH`].** The worker that asks for one first is to fetch it;
//! others wait until it has told, or has taken too long. All of it is in memory alone, within a bound: what is lost, by
//! a coordinator's end or for want of room, is fetched once more.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use prost::Message;
use proto::pb::{KnownRules as Answer, SiteRules};

use crate::ledger::Now;

/// For so long a file counts as it was (RFC 9309, 2.4).
const FRESH: Duration = Duration::from_secs(24 * 3600);
/// For a worker to fetch a file, its place in its site's budget included.
const FETCHING: Duration = Duration::from_secs(60);
/// After so long those that wait ask again.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// All files together. What is the longest known is forgotten first.
const MOST_BYTES: usize = 128 << 20;
/// What a file takes beside its URL and rules.
const OVERHEAD: usize = 200;

/// As whom a file was read, and its URL.
type File = (String, String);

/// All files that are known or being fetched.
#[derive(Debug, Default)]
pub(crate) struct KnownRules {
    files: HashMap<File, State>,
    /// In the order of their times.
    known: VecDeque<(Now, File)>,
    bytes: usize,
    swept: Now,
}

#[derive(Debug)]
enum State {
    Fetching { worker: String, until: Now },
    Known { rules: SiteRules, since: Now },
}

impl KnownRules {
    /// What a worker is to do for want of this file, if that is not known.
    pub(crate) fn ask(&mut self, now: Now, worker: &str, agent: &str, url: &str) -> Answer {
        self.forget(now);
        let file = (agent.to_owned(), url.to_owned());
        match self.files.get(&file) {
            Some(State::Known { rules, since }) if now < *since + FRESH => {
                let age_millis = millis(now - *since);
                return Answer { rules: Some(rules.clone()), age_millis, wait_millis: 0 };
            }
            Some(State::Fetching { worker: other, until }) if now < *until && other != worker => {
                let wait_millis = millis(ASK_AGAIN.min(*until - now)).max(1);
                return Answer { rules: None, age_millis: 0, wait_millis };
            }
            _ => {}
        }
        self.set(file, State::Fetching { worker: worker.to_owned(), until: now + FETCHING });
        Answer::default()
    }

    /// Takes up what a worker has read; None: it could not, or only for itself.
    pub(crate) fn tell(&mut self, now: Now, agent: &str, url: &str, rules: Option<SiteRules>) {
        let file = (agent.to_owned(), url.to_owned());
        match (rules, self.files.get(&file)) {
            (Some(rules), _) => {
                self.known.push_back((now, file.clone()));
                self.set(file, State::Known { rules, since: now });
            }
            (None, Some(State::Fetching { .. })) => self.remove(&file),
            (None, _) => {}
        }
        self.forget(now);
    }

    fn set(&mut self, file: File, state: State) {
        self.remove(&file);
        self.bytes += size(&file, &state);
        self.files.insert(file, state);
    }

    fn remove(&mut self, file: &File) {
        if let Some(state) = self.files.remove(file) {
            self.bytes -= size(file, &state);
        }
    }

    /// Forgets what is too old or too much, and claims that nobody has redeemed.
    fn forget(&mut self, now: Now) {
        while let Some((since, file)) = self.known.front() {
            let (since, is_full) = (*since, self.bytes > MOST_BYTES);
            if now < since + FRESH && !is_full {
                break;
            }
            // It may have been told once more since.
            let same = matches!(self.files.get(file), Some(State::Known { since: known, .. }) if *known == since);
            if let Some((_, file)) = self.known.pop_front()
                && same
            {
                self.remove(&file);
            }
        }
        if now >= self.swept + FETCHING {
            self.swept = now;
            let over = |state: &State| matches!(state, State::Fetching { until, .. } if now >= *until);
            let gone: Vec<File> =
                self.files.iter().filter(|(_, state)| over(state)).map(|(file, _)| file.clone()).collect();
            gone.iter().for_each(|file| self.remove(file));
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn size((agent, url): &File, state: &State) -> usize {
    let rules = match state {
        State::Fetching { .. } => 0,
        // In memory each rule takes more than its pattern.
        State::Known { rules, .. } => rules.encoded_len() + rules.rules.len() * size_of::<proto::pb::PathRule>(),
    };
    agent.len() + 2 * url.len() + OVERHEAD + rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::pb::PathRule;

    fn at(seconds: u64) -> Now {
        Duration::from_secs(seconds)
    }

    fn rules(pattern: &str) -> Option<SiteRules> {
        Some(SiteRules { rules: vec![PathRule { pattern: pattern.to_owned(), ..PathRule::default() }] })
    }

    #[test]
    fn the_first_one_fetches_and_the_others_wait_until_it_has_told() {
        let mut known = KnownRules::default();
        let ask = |known: &mut KnownRules, now, worker| known.ask(now, worker, "gleaner", "http://a/robots.txt");
        assert_eq!(ask(&mut known, at(1), "w1"), Answer::default());
        let waits = ask(&mut known, at(2), "w2");
        assert!(waits.rules.is_none() && waits.wait_millis > 0);
        assert_eq!(ask(&mut known, at(2), "w1"), Answer::default(), "its answer may have been lost");
        assert_eq!(known.ask(at(2), "w2", "other", "http://a/robots.txt"), Answer::default(), "as somebody else");
        known.tell(at(3), "gleaner", "http://a/robots.txt", rules("/x"));
        let answer = ask(&mut known, at(13), "w2");
        assert_eq!((answer.rules, answer.age_millis, answer.wait_millis), (rules("/x"), 10_000, 0));
        assert!(ask(&mut known, at(3) + FRESH - at(1), "w3").rules.is_some());
        assert_eq!(ask(&mut known, at(3) + FRESH, "w3"), Answer::default(), "a day is over");
        assert!(ask(&mut known, at(3) + FRESH, "w1").wait_millis > 0);
    }

    #[test]
    fn who_fails_or_takes_too_long_makes_way() {
        let mut known = KnownRules::default();
        let ask = |known: &mut KnownRules, now, worker| known.ask(now, worker, "gleaner", "u");
        ask(&mut known, at(0), "w1");
        known.tell(at(1), "gleaner", "u", None);
        assert_eq!(ask(&mut known, at(1), "w2"), Answer::default());
        assert!(ask(&mut known, at(60), "w3").wait_millis > 0);
        assert_eq!(ask(&mut known, at(1) + FETCHING, "w3"), Answer::default());
        known.tell(at(70), "gleaner", "u", rules("/x"));
        known.tell(at(71), "gleaner", "u", None);
        assert!(ask(&mut known, at(72), "w1").rules.is_some(), "another's failure takes nothing back");
        known.ask(at(72), "w1", "gleaner", "v");
        known.ask(at(72) + FETCHING * 2, "w1", "gleaner", "w");
        assert_eq!(known.files.len(), 2, "claims that nobody redeems are forgotten");
    }

    #[test]
    fn what_is_the_longest_known_is_forgotten_first_and_all_of_it_is_counted() {
        let mut known = KnownRules::default();
        let long = "x".repeat(1 << 20);
        for n in 0..200 {
            known.tell(at(n), "gleaner", &format!("http://{n}/"), rules(&long));
        }
        assert!(known.bytes <= MOST_BYTES && known.files.len() > 100, "{} bytes", known.bytes);
        assert!(known.ask(at(200), "w1", "gleaner", "http://199/").rules.is_some());
        assert!(known.ask(at(200), "w1", "gleaner", "http://0/").rules.is_none());
        known.tell(at(201) + FRESH, "gleaner", "u", None);
        known.tell(at(300) + FRESH, "gleaner", "u", None);
        assert_eq!((known.bytes, known.files.len(), known.known.len()), (0, 0, 0));
    }
}
