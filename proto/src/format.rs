//! What all objects in the store have in common, whatever they hold.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Bytes that are not what they must be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FormatError(pub(crate) String);

/// An object that is one JSON document with the number of its format.
pub trait Stored: Serialize + DeserializeOwned {
    /// What it is, for errors.
    const NAME: &'static str;
    /// The number of the one format that this program reads and writes.
    const FORMAT: u32 = 1;

    /// The number of the format that the object says it has.
    fn format(&self) -> u32;

    /// Parses the stored form.
    ///
    /// # Errors
    /// If it is no such object, or one of a format that this program does not know.
    fn from_json(json: &[u8]) -> Result<Self, FormatError> {
        let parsed = serde_json::from_slice::<Self>(json);
        let format = match &parsed {
            Ok(object) => Some(object.format()),
            // Another format has other fields, so its number says more than the field that is in the way.
            Err(_) => serde_json::from_slice::<Numbered>(json).ok().and_then(Numbered::number),
        };
        match (parsed, format) {
            (_, Some(format)) if format != Self::FORMAT => {
                let (name, known) = (Self::NAME, Self::FORMAT);
                Err(FormatError(format!("{name} of format {format}: this program reads format {known}")))
            }
            (parsed, _) => parsed.map_err(|error| FormatError(format!("{}: {error}", Self::NAME))),
        }
    }

    /// The stored form.
    fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("structs of texts, numbers and lists are JSON")
    }
}

/// An object that is put only if there is none of its key. Its nonce is the writer's own random word, which tells a put
/// that was retried after an error, but had won, from one that lost.
pub trait StoredOnce: Stored {
    /// The writer's own random word.
    fn nonce(&self) -> &str;
}

/// The number of the format, and nothing else of an object.
#[derive(Deserialize)]
struct Numbered {
    format: Option<u32>,
    /// Where indexes have it; other objects number something else by this name.
    version: Option<serde_json::Value>,
}

impl Numbered {
    fn number(self) -> Option<u32> {
        self.format.or_else(|| u32::try_from(self.version?.as_u64()?).ok())
    }
}

/// The format of objects that were written before they said it.
pub(crate) fn first() -> u32 {
    1
}

/// Says of a type where its name, its format and its nonce are.
macro_rules! stored {
    ($type:ty, $name:literal, $format:ident) => {
        impl $crate::format::Stored for $type {
            const NAME: &'static str = $name;

            fn format(&self) -> u32 {
                self.$format
            }
        }
    };
    ($type:ty, $name:literal, $format:ident, $nonce:ident) => {
        $crate::format::stored!($type, $name, $format);

        impl $crate::format::StoredOnce for $type {
            fn nonce(&self) -> &str {
                &self.$nonce
            }
        }
    };
}
pub(crate) use stored;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Thing {
        format: u32,
        nonce: String,
    }
    stored!(Thing, "thing", format, nonce);

    #[test]
    fn an_object_is_read_back_and_one_of_another_format_is_refused_by_its_number() {
        let thing = Thing { format: 1, nonce: "n".to_owned() };
        assert_eq!(Thing::from_json(&thing.to_json()).expect("own output"), thing);
        let refused = |json: &str| Thing::from_json(json.as_bytes()).expect_err(json).to_string();
        let other = "thing of format 2: this program reads format 1";
        assert_eq!(refused(r#"{"format": 2, "nonce": "n"}"#), other);
        assert_eq!(refused(r#"{"format": 2, "pages": []}"#), other, "its fields are not looked at");
        assert_eq!(refused(r#"{"version": 2}"#), other);
        assert!(refused(r#"{"format": 1, "version": "0.1.0", "nonce": "n"}"#).contains("unknown field `version`"));
        assert!(refused("{").starts_with("thing: EOF"));
    }
}
