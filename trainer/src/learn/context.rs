//! What a rank process has before it has a run.

use std::path::PathBuf;
use std::sync::Arc;

use object_store::ObjectStore;
use serde::{Deserialize, Serialize};

/// Where all of a process' work runs.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    pub store: Arc<dyn ObjectStore>,
    pub runtime: tokio::runtime::Handle,
    pub setup: Setup,
}

/// What a rank process is told about its place, once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setup {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// Where other machines reach this one.
    pub advertise_address: String,
    /// This process' part of the machine's cores.
    pub threads: u32,
    /// Decoded images may take so many bytes of memory.
    pub cache_bytes: u64,
    /// Where those that have no room there are kept, if anywhere ...
    pub cache_dir: Option<PathBuf>,
    /// ... in a file of at most so many bytes.
    pub cache_disk_bytes: u64,
}
