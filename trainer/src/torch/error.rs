//! Why something of libtorch failed.

use std::time::{Duration, Instant};

use tch::TchError;

/// Whose failure it is. C++ says so by the type of its exception (`shim.cc`), never by its words.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A peer did not answer in time.
    #[error("timed out: {0}")]
    Timeout(String),
    /// A peer is gone, or the group was aborted.
    #[error("collective failed: {0}")]
    Collective(String),
    /// This device failed: nothing that it holds can be trusted.
    #[error("the device failed: {0}")]
    Device(String),
    /// This device has no memory left.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// `tch` has no class for it.
    #[error(transparent)]
    Tch(#[from] TchError),
    /// Not the fault of a peer: the next generation would fail in the same way.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// gloo has no type for a peer that did not answer within the `timeout` of what `began` then.
    pub(super) fn timed(self, began: Instant, timeout: Duration) -> Self {
        match self {
            Self::Collective(message) if began.elapsed() >= timeout => Self::Timeout(message),
            other => other,
        }
    }
}

/// What a function of this room gives.
pub(crate) type Result<T> = std::result::Result<T, Error>;
