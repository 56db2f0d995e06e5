//! What people decide about a dataset after it was created (see [`crate::keys::control`]): one object for each
//! decision, numbered from 1, of which a later one counts more.

use serde::{Deserialize, Serialize};

use crate::format::stored;

/// One decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Control {
    /// Of this format: 1.
    pub format: u32,
    /// The writer's own random word.
    pub nonce: String,
    /// When it was made, in milliseconds since 1970, by the coordinator's clock; for people only.
    pub at_millis: u64,
    /// What was decided.
    pub decision: Decision,
}

stored!(Control, "control", format, nonce);

/// What can be decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Decision {
    /// No more of its slices are leased.
    Pause,
    /// They are again.
    Resume,
    /// From then on no more of the rounds that it has is fetched: what nobody got to is `unfetched`.
    Finish {
        /// How many rounds it has: later ones are fetched.
        rounds: u32,
        /// In milliseconds since 1970, by the coordinator's clock.
        at_millis: u64,
    },
    /// How large its share of the workers is.
    Priority(Priority),
}

/// How large a dataset's share of the workers is, beside others that wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// A quarter of a normal one's.
    Low,
    /// As large as any other's.
    #[default]
    Normal,
    /// Four times a normal one's.
    High,
}

impl Priority {
    /// Relative to others.
    pub fn weight(self) -> f64 {
        match self {
            Self::Low => 0.25,
            Self::Normal => 1.0,
            Self::High => 4.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Stored;

    #[test]
    fn decisions_are_written_as_people_would_say_them() {
        for (decision, json) in [
            (Decision::Pause, r#""pause""#),
            (Decision::Finish { rounds: 2, at_millis: 5 }, r#"{"finish":{"rounds":2,"at_millis":5}}"#),
            (Decision::Priority(Priority::High), r#"{"priority":"high"}"#),
        ] {
            let control = Control { format: 1, nonce: "n".to_owned(), at_millis: 7, decision };
            let written = control.to_json();
            assert!(String::from_utf8_lossy(&written).contains(json));
            assert_eq!(Control::from_json(&written).expect("own output"), control);
        }
    }
}
