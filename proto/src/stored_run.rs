//! What a run is and stands on: `runs/<run>/spec.json` (see [`crate::keys::run_spec`]).

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::format::{first, stored};
use crate::{DatasetId, RunSpec, pb};

/// A run as it was submitted, with all that its spec left open.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredRun {
    /// Of this format: 1.
    #[serde(default = "first")]
    pub format: u32,
    /// The writer's own random word.
    pub nonce: String,
    /// The caller's: a repeated request finds it here.
    pub request_id: String,
    /// That it is trained on.
    pub dataset: DatasetId,
    /// Object key of the manifest.
    pub manifest_key: String,
    /// SHA-256 of its bytes, in hex.
    pub manifest_sha256: String,
    /// As the manifest's training images and the spec's batch make it.
    pub steps_per_epoch: u64,
    /// Whose weights it begins with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartWeights>,
    /// The span of the request that submitted it, if that was exported; see [`crate::trace`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub traceparent: String,
    /// Resolved: it names the manifest's version.
    pub spec: RunSpec,
}

stored!(StoredRun, "run", format, nonce);

/// The weights that a run begins with: of another run's checkpoint, or of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartWeights {
    /// That run; empty if they are of a file.
    pub run: String,
    /// Steps applied in the checkpoint.
    pub step: u64,
    /// The file's name, if they are of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Classes that they tell.
    pub from_classes: u64,
    /// Classes of this run.
    pub classes: u64,
    /// For each class of this run its row of their last layer; a class without one begins anew. Runs that were
    /// submitted before this was stored take all rows if there are as many, or else none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<Vec<Option<u32>>>,
    /// The copy's folder.
    pub key: String,
    /// File name -> SHA-256 in hex.
    pub digests: BTreeMap<String, String>,
}

impl StartWeights {
    /// As ranks are told of it.
    pub fn told(&self) -> pb::StartWeights {
        let row = |row: &Option<u32>| row.map_or(-1, i64::from);
        pb::StartWeights {
            key: self.key.clone(),
            digests: self.digests.clone().into_iter().collect(),
            by_class: self.rows.is_some(),
            rows: self.rows.iter().flatten().map(row).collect(),
        }
    }
}

impl fmt::Display for StartWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { run, step, file, from_classes, classes, .. } = self;
        match file {
            Some(file) => write!(f, "the weights of the file {file}")?,
            None => write!(f, "the weights of {run} at step {step}")?,
        }
        let known = self.rows.as_ref().map(|rows| rows.iter().flatten().count() as u64);
        match known {
            None if from_classes == classes => Ok(()),
            None => write!(f, "; the last layer is new, because that has {from_classes} classes and this {classes}"),
            Some(0) if file.is_some() => {
                write!(f, "; the last layer is new, because the file names none of the classes")
            }
            Some(0) => write!(f, "; the last layer is new, because that run has none of the classes"),
            Some(known) if known == *classes => Ok(()),
            Some(known) => write!(
                f,
                "; of the last layer those of {known} classes, while {} classes that are not known there are new",
                classes - known
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Stored;

    #[test]
    fn a_run_that_does_not_say_its_format_is_of_the_first() {
        let old =
            br#"{"nonce": "n", "request_id": "r", "dataset": "birds-1", "manifest_key": "k", "manifest_sha256": "00",
            "steps_per_epoch": 3, "spec": {"dataset": "birds"},
            "start": {"run": "a", "step": 7, "from_classes": 2, "classes": 3, "key": "k", "digests": {"f": "00"}}}"#;
        let run = StoredRun::from_json(old).expect("as it was written once");
        assert_eq!((run.format, run.steps_per_epoch), (1, 3));
        let start = run.start.as_ref().expect("it is there").to_string();
        assert_eq!(start, "the weights of a at step 7; the last layer is new, because that has 2 classes and this 3");
        let known =
            |rows: [Option<u32>; 3]| StartWeights { rows: Some(rows.into()), ..run.start.clone().expect("some") };
        assert_eq!(known([Some(0), Some(2), Some(1)]).to_string(), "the weights of a at step 7");
        assert!(known([None, Some(1), None]).to_string().contains("of 1 classes, while 2 classes"));
        assert_eq!(known([None, Some(1), None]).told().rows, [-1, 1, -1]);
        assert_eq!(StoredRun::from_json(&run.to_json()).expect("own output"), run);
        assert!(StoredRun::from_json(&StoredRun { format: 2, ..run }.to_json()).is_err());
    }
}
