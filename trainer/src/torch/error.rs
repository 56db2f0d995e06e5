//! Why something of libtorch failed.

/// Why a collective, or the making of a group, failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A peer did not answer in time.
    #[error("timed out: {0}")]
    Timeout(String),
    /// A peer is gone, or the group was aborted.
    #[error("collective failed: {0}")]
    Collective(String),
    /// Not the fault of a peer: the next generation would fail in the same way.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// c10d throws many types, and autograd hides them all; only the words tell a timeout.
    pub(super) fn of_collective(message: String) -> Self {
        let timeout = ["imed out", "imeout"].iter().any(|words| message.contains(words));
        if timeout { Self::Timeout(message) } else { Self::Collective(message) }
    }
}

/// What a function of this room gives.
pub(crate) type Result<T> = std::result::Result<T, Error>;
