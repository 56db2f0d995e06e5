//! The settings of an agent.

/// Settings of a trainer agent.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Host name or address at which the ranks of other machines reach this one, and which this one has: ranks listen
    /// at it, so that one that is translated on the way (NAT, a published port of a container) is of no use [default:
    /// that from which the coordinator is reached]
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
    /// Have ranks of this run alone, wait for it if it is not there, and end with it: with exit code 1 if it failed or
    /// was cancelled [default: any run, until told to end]
    #[arg(long, env = "GLEANER_RUN", value_name = "NAME")]
    pub run: Option<String>,
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
    /// Decoded images may take so much memory (16GiB, or a number of bytes), all ranks of this machine together
    #[arg(long, env = "GLEANER_CACHE_BYTES", default_value = "1GiB", value_parser = size, value_name = "SIZE")]
    pub cache_bytes: u64,
    /// Folder for decoded images that have no room in memory; what is in it vanishes with the trainer, however that
    /// ends [default: none are kept]
    #[arg(long, env = "GLEANER_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<std::path::PathBuf>,
    /// Decoded images may take so much of that folder, all ranks of this machine together
    #[arg(long, env = "GLEANER_CACHE_DISK_BYTES", default_value = "64GiB", value_parser = size, value_name = "SIZE")]
    pub cache_disk_bytes: u64,
    /// Decoded images may take so much of each GPU's own memory, so that they are neither decoded nor sent again [default:
    /// none are kept there]
    #[arg(long, env = "GLEANER_DEVICE_CACHE_BYTES", default_value = "0", hide_default_value = true, value_parser = size, value_name = "SIZE")]
    pub device_cache_bytes: u64,
}

impl CacheConfig {
    /// How much of a device's own memory the decoded images of one of the `ranks` on it may take. A CPU's is the host's,
    /// which has a cache already.
    pub(super) fn bytes_of(&self, device: &str, ranks: usize) -> u64 {
        if device == "cpu" { 0 } else { self.device_cache_bytes / ranks.max(1) as u64 }
    }
}

/// A number of bytes as people write it: `1073741824`, `16GiB`, `500MB`.
fn size(text: &str) -> Result<u64, String> {
    let size: bytesize::ByteSize = text.parse().map_err(|_| format!("{text:?} is no size; write 16GiB or 500MB"))?;
    Ok(size.as_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_gpus_keep_images_in_their_own_memory() {
        let cache = CacheConfig { device_cache_bytes: 7, ..CacheConfig::default() };
        assert_eq!(["cpu", "cuda:0", "cuda:11"].map(|device| cache.bytes_of(device, 1)), [0, 7, 7]);
        assert_eq!(cache.bytes_of("cuda:0", 2), 3, "two ranks share it");
    }

    #[test]
    fn sizes_have_units_and_nonsense_is_refused() {
        assert_eq!(size("17179869184"), Ok(16 << 30));
        assert_eq!(size("16GiB"), Ok(16 << 30));
        assert_eq!(size("1.5 GB"), Ok(1_500_000_000));
        for wrong in ["", "GiB", "-1", "16 gallons"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
