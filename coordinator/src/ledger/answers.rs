//! What the ledger answers.

use std::sync::Arc;

use proto::ShardId;
use proto::pb::FailureKind;

/// What became of a lease that was to be prolonged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Renewal {
    Prolonged,
    /// The shard is committed, or another's.
    Over,
    /// No URL was finished for so long that it was taken back.
    Stalled,
}

/// A lease whose time is over, or a shard that is to be checked for another reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expired {
    pub(crate) id: ShardId,
    /// Who held it, if its time was over, and what that is counted as.
    pub(crate) lost: Option<(Arc<str>, FailureKind)>,
}

/// What was decided about a shard that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It may be leased again.
    Retry,
    /// It has failed too often: the coordinator closes it with an index of its own.
    GiveUp,
    /// Nobody is to fetch it: likewise.
    Close,
}

/// Shards of a dataset by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Neither leased nor committed.
    pub(crate) waiting: u32,
    /// Somebody makes them.
    pub(crate) leased: u32,
}
