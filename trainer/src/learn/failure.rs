//! Why a rank cannot go on in its generation.

use crate::torch;

/// Why a rank left its generation.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Another rank is gone.
    #[error("{0}")]
    Collective(String),
    /// This one cannot go on.
    #[error("{0:#}")]
    Here(anyhow::Error),
    /// The loss or the state is not finite: it would be so again.
    #[error("{0}")]
    Diverged(String),
}

impl From<torch::Error> for Failure {
    fn from(error: torch::Error) -> Self {
        match error {
            torch::Error::Timeout(_) | torch::Error::Collective(_) => Self::Collective(error.to_string()),
            torch::Error::Other(_) => Self::Here(error.into()),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Here(error)
    }
}

impl From<tch::TchError> for Failure {
    fn from(error: tch::TchError) -> Self {
        Self::Here(error.into())
    }
}
