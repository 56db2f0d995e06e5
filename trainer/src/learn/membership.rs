//! A rank among the others of its generation.

use std::time::Instant;

use anyhow::{Result, anyhow};
use proto::RunSpec;
use proto::pb::{self, rank_heartbeat::Activity};
use tch::Device;

use super::context::Setup;
use super::control::Wishes;
use super::failure::Failure;
use super::timing;
use crate::torch::{Group, Member};

/// So many times `failure_detection` a collective may last. This is the last resort only: that a peer is lost is found out by its connection
/// or its heartbeat, and waiting for one that reads or validates is no failure.
const PATIENCE: u32 = 30;
/// A rank's place in its generation.
pub(crate) struct Seat {
    pub generation: u64,
    pub rank: usize,
    pub world: usize,
    pub group: Group,
    /// Bytes a second that the link to the other ranks carries each way; 0 for one rank.
    pub link: f64,
    /// The run's time when the generation was joined, in seconds, and that moment.
    pub began: (f64, Instant),
}

impl Seat {
    /// Meets the other ranks.
    pub(super) fn take(
        setup: &Setup,
        spec: &RunSpec,
        device: Device,
        join: &pb::Join,
        wishes: &Wishes,
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
        wishes.at(Activity::Meeting);
        let member = Member { rank, world, address, device, timeout };
        let group = Group::meet(host, port, member, || wishes.aborted())?;
        wishes.watch(group.aborter())?;
        let link = timing::link(&group, world)?;
        let began = (join.elapsed_seconds, Instant::now());
        Ok(Self { generation: join.generation, rank, world, group, link, began })
    }

    /// The run's time, in seconds.
    pub(super) fn seconds(&self) -> f64 {
        self.began.0 + self.began.1.elapsed().as_secs_f64()
    }
}

fn host_and_port(address: &str) -> Result<(&str, u16)> {
    let (host, port) =
        address.rsplit_once(':').ok_or_else(|| anyhow!("store address {address:?}: must be host:port"))?;
    Ok((host.trim_start_matches('[').trim_end_matches(']'), port.parse()?))
}
