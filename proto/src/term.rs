//! The object that begins a coordinator's term (see [`crate::keys::term`]).

use serde::{Deserialize, Serialize};

use crate::format::{first, stored};

/// One coordinator's time in office.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TermRecord {
    /// Of this format: 1.
    #[serde(default = "first")]
    pub format: u32,
    /// The term's number.
    pub term: u64,
    /// The writer's own random word.
    pub nonce: String,
    /// When it began, in milliseconds since 1970, by the coordinator's clock; for people only.
    pub at_millis: u64,
    /// The coordinator's program.
    pub version: String,
}

stored!(TermRecord, "term", format, nonce);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Stored;

    #[test]
    fn a_term_that_does_not_say_its_format_is_of_the_first() {
        let old = br#"{"term": 9, "nonce": "n", "at_millis": 5, "version": "0.1.0"}"#;
        let term = TermRecord::from_json(old).expect("as it was written once");
        assert_eq!((term.format, term.term), (1, 9));
        assert_eq!(TermRecord::from_json(&term.to_json()).expect("own output"), term);
        assert!(TermRecord::from_json(&TermRecord { format: 2, ..term }.to_json()).is_err());
    }
}
