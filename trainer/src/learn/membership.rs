//! A rank among the others of its generation.

use std::time::Instant;

use anyhow::{Result, anyhow};
use proto::RunSpec;
use proto::pb::{self, rank_heartbeat::Activity};
use tch::Device;

use super::context::Setup;
use super::control::ControlFlags;
use super::failure::Failure;
use super::timing;
use crate::torch::{Group, Member};

/// The timeout of collectives, in multiples of `failure_detection`. It is a last resort: a lost peer is noticed by its
/// connection or its heartbeat, and waiting for a peer that loads data or validates is no failure.
pub(super) const PATIENCE: u32 = 30;

/// A rank's place in its generation.
pub(crate) struct Membership {
    pub generation: u64,
    pub rank: usize,
    pub world: usize,
    pub group: Group,
    /// Bytes a second that the link to the other ranks carries each way; 0 for one rank.
    pub link: f64,
    /// The run's elapsed seconds when this rank joined, and the instant of that.
    pub began: (f64, Instant),
}

impl Membership {
    /// Connects to the other ranks.
    pub(super) fn join(
        setup: &Setup,
        spec: &RunSpec,
        device: Device,
        join: &pb::Join,
        flags: &ControlFlags,
    ) -> Result<Self, Failure> {
        let (rank, world) = (join.rank as usize, join.world_size as usize);
        let lanes = spec.ranks.lanes;
        if world > lanes as usize {
            return Err(
                anyhow!("{world} ranks cannot share {lanes} lanes: ranks.max must be at most ranks.lanes").into()
            );
        }
        let (host, port) = host_and_port(&join.store)?;
        let timeout = spec.failure_detection() * PATIENCE;
        let address = setup.advertise_address.clone();
        flags.set_activity(Activity::Meeting);
        let member = Member { rank, world, address, device, timeout };
        let group = Group::join(host, port, member, || flags.aborted())?;
        flags.set_aborter(group.aborter())?;
        let link = timing::measure_link(&group, world)?;
        let began = (join.elapsed_seconds, Instant::now());
        Ok(Self { generation: join.generation, rank, world, group, link, began })
    }

    /// The run's elapsed seconds.
    pub(super) fn seconds(&self) -> f64 {
        self.began.0 + self.began.1.elapsed().as_secs_f64()
    }
}

fn host_and_port(address: &str) -> Result<(&str, u16)> {
    let (host, port) =
        address.rsplit_once(':').ok_or_else(|| anyhow!("store address {address:?}: must be host:port"))?;
    Ok((host.trim_start_matches('[').trim_end_matches(']'), port.parse()?))
}
