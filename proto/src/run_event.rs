//! A run's history: numbered objects, each put-if-absent by the coordinator before it acts on it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::format::{first, stored};

/// One stored event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventRecord {
    /// Of this format: 1.
    #[serde(default = "first")]
    pub format: u32,
    /// Counts the run's events from 1.
    pub n: u64,
    /// The term of the coordinator that wrote it.
    pub term: u64,
    /// The writer's own random word: tells a put that was retried from one that lost.
    pub nonce: String,
    /// When, in milliseconds since 1970, by the coordinator's clock; for people only.
    pub at_millis: u64,
    /// What happened.
    pub event: RunEvent,
}

stored!(EventRecord, "run event", format, nonce);

/// What happened to a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum RunEvent {
    /// It was queued for the first time.
    Submitted {
        /// The caller's request id: a repeated request finds it here.
        request_id: String,
        /// For people: what its weights are from, if not random.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        start: Option<String>,
    },
    /// A generation was formed.
    Generation {
        /// Counts from 1; higher than all before.
        generation: u64,
        /// In the order of the ranks.
        members: Vec<Member>,
    },
    /// A checkpoint exists from now on.
    Checkpoint {
        /// Steps applied in it.
        step: u64,
        /// Its folder in the store.
        key: String,
        /// File name -> SHA-256 in hex.
        digests: BTreeMap<String, String>,
        /// Share of right first guesses on the validation split, if it was measured in this state.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        top1: Option<f64>,
    },
    /// A checkpoint cannot be read as it was written: it no longer exists.
    Damaged {
        /// Its folder in the store.
        key: String,
        /// For people.
        reason: String,
    },
    /// A generation ended because of a failure.
    Failure {
        /// Which.
        generation: u64,
        /// Who was at fault, if known.
        culprit: Option<Culprit>,
        /// The last step that survivors hold.
        step: u64,
        /// For people.
        reason: String,
    },
    /// Somebody asked for its end.
    Cancelling,
    /// It ended because somebody asked for it.
    Cancelled,
    /// It cannot go on.
    Failed {
        /// For people.
        reason: String,
    },
    /// It was queued again, from its last checkpoint.
    Resumed {
        /// The caller's request id.
        request_id: String,
        /// From the checkpoint of this step instead; those that were made later no longer exist.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        step: Option<u64>,
        /// With so many epochs in all, and without an early end.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        epochs: Option<u32>,
    },
    /// All epochs, the test and the model are done.
    Done {
        /// The model's folder in the store.
        model: String,
        /// File name -> SHA-256 in hex.
        digests: BTreeMap<String, String>,
    },
}

/// The rank that a generation failed for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Culprit {
    /// Its number.
    pub rank: u32,
    /// Its agent process.
    pub agent: String,
    /// Where other machines reach that.
    pub address: String,
    /// What it ran on: `cpu`, `cuda:1`.
    pub device: String,
    /// What it did when it was last heard of, as in `backward`.
    #[serde(alias = "doing")]
    pub activity: String,
    /// Steps that it had applied then.
    pub step: u64,
    /// How long before this event it was last heard of.
    pub silent_millis: u64,
}

/// One rank of a generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// The agent process.
    pub agent: String,
    /// The device's place in the agent's list.
    pub device: u32,
}
