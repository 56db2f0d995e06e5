//! The settings of an agent.

/// Settings of a trainer agent.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
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
