//! The object that ends a dataset or a run (see [`crate::keys`]): nothing beside it counts any more.

use serde::{Deserialize, Serialize};

use crate::format::{first, stored};

/// The end of a dataset or a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tombstone {
    /// Of this format: 1.
    #[serde(default = "first")]
    pub format: u32,
    /// The writer's own random word.
    pub nonce: String,
    /// When it was deleted, in milliseconds since 1970, by the coordinator's clock; for people only.
    pub at_millis: u64,
}

stored!(Tombstone, "tombstone", format, nonce);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Stored;

    #[test]
    fn a_tombstone_that_does_not_say_its_format_is_of_the_first() {
        let tombstone = Tombstone::from_json(br#"{"nonce": "n", "at_millis": 5}"#).expect("as it was written once");
        assert_eq!(tombstone, Tombstone { format: 1, nonce: "n".to_owned(), at_millis: 5 });
        assert_eq!(Tombstone::from_json(&tombstone.to_json()).expect("own output"), tombstone);
        assert!(Tombstone::from_json(&Tombstone { format: 2, ..tombstone }.to_json()).is_err());
    }
}
