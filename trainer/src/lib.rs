//! The trainer: learns from what the workers fetched, on as many devices as there are, and goes on when some of them die.
//!
//! The life of a run, file by file:
//! - `agent` offers this machine's devices to the coordinator over one stream (`link`), and runs a rank `process` on each that is
//!   assigned; it keeps their `logs`;
//! - `rank` is that process: it takes part in one generation after the other, as its agent says over `ipc`;
//! - `job` is what it holds of its run: data, network, progress; here the ranks agree on a state;
//! - `plan` says which samples come in which order, `stream` reads them from the store, `batch` cuts what is looked at out of them (`jpeg`
//!   decodes), `cache` keeps them decoded, `loader` does all this ahead of the step (`ready` says how far), `normalise` makes numbers of bytes;
//! - `train` is the loop, in the order of the mathematics: `alexnet` the network, `step` loss and optimizer, `c10d` the collectives;
//! - `timing` says where the time of a step went; `evaluate` measures a split; `checkpoint` keeps the state and the trained model; `history` the ledger and the learning curve.
//!
//! Whatever is random comes from `random`, as a function of what it is for.

mod agent;
#[cfg(feature = "bench")]
pub mod bench;
mod data;
mod devices;
mod learn;
mod link;
mod logs;
pub mod metrics;
mod process;
mod rank;
mod torch;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::sync::Arc;

use object_store::ObjectStore;
use tokio_util::sync::CancellationToken;

pub use devices::{describe, devices};
pub use learn::step::reference_step;
pub use rank::run_rank;

/// Environment of every rank process: glibc keeps the memory that a step gives back for the next one. By default it returns large pieces to
/// the system at once, and a batch costs more in page faults than in all that is done to its pixels.
pub const RANK_ENVIRONMENT: [(&str, &str); 2] =
    [("MALLOC_MMAP_THRESHOLD_", "1000000000"), ("MALLOC_TRIM_THRESHOLD_", "4000000000")];

/// Settings of a trainer agent.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Where the coordinator is
    #[arg(long, env = "GLEANER_COORDINATOR", value_name = "URL")]
    pub coordinator: String,
    /// Host name or address at which the ranks of other machines reach this one [default: that from which the coordinator is reached]
    #[arg(long, env = "GLEANER_ADVERTISE_ADDRESS", value_name = "HOST")]
    pub advertise_address: Option<String>,
    /// Network interface over which ranks talk to each other: its first address is advertised, and NCCL takes it
    /// [default: the one that has the advertised address]
    #[arg(long, env = "GLEANER_INTERFACE", value_name = "NAME")]
    pub interface: Option<String>,
    /// What ranks run on: cpu, cpu:N (N ranks), cuda (all GPUs), cuda:N (that GPU), or several of these with commas
    /// [default: all GPUs, or else one cpu]
    #[arg(long, env = "GLEANER_DEVICES")]
    pub devices: Option<String>,
    /// When told to end, ranks have so many seconds to finish their step, to hand over or to write a checkpoint
    #[arg(long, env = "GLEANER_LEAVE_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3600), value_name = "N")]
    pub leave_seconds: u32,
    /// Where decoded images are kept
    #[command(flatten)]
    pub cache: CacheConfig,
}

/// Settings of the cache of decoded images, for all ranks of a machine together.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct CacheConfig {
    /// Decoded images may take so many bytes of memory, all ranks of this machine together
    #[arg(long, env = "GLEANER_CACHE_BYTES", default_value_t = 1 << 30, value_name = "BYTES")]
    pub cache_bytes: u64,
    /// Folder for decoded images that have no room in memory; what is in it vanishes with the trainer, however that ends
    /// [default: none are kept]
    #[arg(long, env = "GLEANER_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<std::path::PathBuf>,
    /// Decoded images may take so many bytes of that folder, all ranks of this machine together
    #[arg(long, env = "GLEANER_CACHE_DISK_BYTES", default_value_t = 64 << 30, value_name = "BYTES")]
    pub cache_disk_bytes: u64,
}

/// Runs a trainer agent until `shutdown`, under a `name` that no other agent has. `rank_command` starts a rank process: a program that
/// calls [`run_rank`] on the same store, with stdin and stdout left to it. `used` hears what the ranks have asked of the store.
///
/// # Errors
/// If the settings cannot be meant so. Whatever fails later is tried again, or told to the coordinator.
pub async fn run(
    name: String,
    config: Config,
    store: Arc<dyn ObjectStore>,
    rank_command: Vec<OsString>,
    used: fn(&proto::pb::StoreUse),
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    agent::run(name, config, store, rank_command, used, shutdown).await
}
