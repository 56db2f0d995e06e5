//! What a rank process has before it has a run.

use std::path::PathBuf;
use std::sync::Arc;

use object_store::ObjectStore;
use serde::{Deserialize, Serialize};

/// What all runs of a rank process share.
#[derive(Debug, Clone)]
pub(crate) struct RankContext {
    pub store: Arc<dyn ObjectStore>,
    pub runtime: tokio::runtime::Handle,
    pub setup: Setup,
}

/// What an agent tells a rank process at its start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setup {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// The address at which other machines reach this one.
    pub advertise_address: String,
    /// Decoded images may take this many bytes of memory.
    pub cache_bytes: u64,
    /// The folder for decoded images that have no room in memory, if there is one ...
    pub cache_dir: Option<PathBuf>,
    /// ... and how many bytes they may take there.
    pub cache_disk_bytes: u64,
    /// Decoded images may take this many bytes of the device's memory.
    pub device_cache_bytes: u64,
}
