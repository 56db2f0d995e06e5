//! What a coordinator leaves to the one that follows it (see [`crate::keys::handover`]): what it has learned of sites.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::format::stored;

/// Written again and again, by the coordinator of one term alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handover {
    /// Of this format: 1.
    pub format: u32,
    /// The term of the coordinator that wrote it.
    pub term: u64,
    /// When that was, in milliseconds since 1970, by its clock.
    pub at_millis: u64,
    /// It serves no more, and no worker had a part of any site's budget then.
    pub all_back: bool,
    /// What is known of sites, by name.
    pub sites: BTreeMap<String, LearnedSite>,
}

/// What a coordinator has learned of one site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearnedSite {
    /// Requests per second that it bears, as far as that is known; 0: no limit.
    pub requests_per_second: f64,
    /// Whether it bears no more.
    pub known: bool,
    /// It wants to be left alone until then, in milliseconds since 1970; 0: it does not.
    pub quiet_until_millis: u64,
}

stored!(Handover, "handover", format);
