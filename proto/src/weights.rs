//! The head of a file of weights in the format of safetensors: what tensors it has, of which shapes.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::network::Shapes;

/// The bytes that say how long the head is, before it.
pub const LENGTH: usize = 8;

/// The name under which a model's file has its classes, in the order of its outputs, as a JSON list of synsets.
pub const CLASSES: &str = "classes";

/// A longer head is an error.
const LONGEST: u64 = 32 << 20;

/// The head of such a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its tensors.
    pub shapes: Shapes,
    /// The synsets of its outputs, if it says so.
    pub classes: Vec<String>,
    /// Bytes of the whole file.
    pub bytes: u64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Entry {
    Tensor { dtype: String, shape: Vec<u64>, data_offsets: [u64; 2] },
    Metadata(BTreeMap<String, String>),
}

impl Head {
    /// How many bytes the head has, of which these are before it.
    ///
    /// # Errors
    /// If it is none.
    pub fn length(first: [u8; LENGTH]) -> Result<u64, String> {
        match u64::from_le_bytes(first) {
            length @ 2..=LONGEST => Ok(length),
            length => Err(format!("is no safetensors file: its head would have {length} bytes")),
        }
    }

    /// From its bytes.
    ///
    /// # Errors
    /// If it is none, or has tensors of another kind than floating-point numbers.
    pub fn parse(head: &[u8]) -> Result<Self, String> {
        let entries: BTreeMap<String, Entry> =
            serde_json::from_slice(head).map_err(|error| format!("is no safetensors file: {error}"))?;
        let (mut shapes, mut classes, mut end) = (Shapes::new(), Vec::new(), 0);
        for (name, entry) in entries {
            match entry {
                Entry::Metadata(mut more) if name == "__metadata__" => {
                    let listed = more.remove(CLASSES).map(|json| serde_json::from_str(&json));
                    classes = listed.transpose().map_err(|error| format!("its classes: {error}"))?.unwrap_or_default();
                }
                Entry::Metadata(_) => return Err(format!("is no safetensors file: {name:?} is no tensor")),
                Entry::Tensor { dtype, shape, data_offsets } => {
                    if !matches!(&*dtype, "F64" | "F32" | "F16" | "BF16") {
                        return Err(format!("tensor {name} is of kind {dtype}: must be F64, F32, F16 or BF16"));
                    }
                    end = data_offsets[1].max(end);
                    shapes.insert(name, shape);
                }
            }
        }
        Ok(Self { shapes, classes, bytes: LENGTH as u64 + head.len() as u64 + end })
    }
}

/// For each of the classes of a network the row of the last layer of another one that was trained to tell it, if there
/// is one.
pub fn rows<'a>(own: impl IntoIterator<Item = &'a str>, theirs: &[String]) -> Vec<Option<u32>> {
    let places: BTreeMap<&str, u32> = theirs.iter().map(String::as_str).zip(0..).collect();
    own.into_iter().map(|synset| places.get(synset).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_tells_tensors_classes_and_the_length_of_the_file() {
        let head = br#"{"__metadata__": {"classes": "[\"n01\", \"n02\"]"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [4, 28]}, "b": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}"#;
        let found = Head::parse(head).expect("sound");
        assert_eq!(found.shapes["a"], [2, 3]);
        assert_eq!(
            (found.classes, found.bytes),
            (vec!["n01".to_owned(), "n02".to_owned()], 8 + head.len() as u64 + 28)
        );
        let integers = br#"{"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}"#;
        assert!(Head::parse(integers).expect_err("no numbers to learn").contains("I64"));
        assert!(Head::parse(b"{\"a\": 1}").is_err() && Head::length(*b"PK\x03\x04\0\0\0\0").is_err());
    }

    #[test]
    fn classes_find_their_rows_by_name() {
        let theirs = ["cat", "dog", "owl"].map(str::to_owned);
        assert_eq!(rows(["owl", "emu", "cat"], &theirs), [Some(2), None, Some(0)]);
    }
}
