//! Why an attempt failed, and whose fault that is.

use anyhow::Error;
use proto::pb::{self, FailureKind};

/// An attempt's failure.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    pub(crate) error: Error,
}

impl From<&Failure> for pb::Failure {
    fn from(failure: &Failure) -> Self {
        Self { kind: failure.kind.into(), text: format!("{:#}", failure.error) }
    }
}

/// Says of an error whose fault it is.
pub(crate) trait FaultOf<T> {
    fn fault_of(self, kind: FailureKind) -> Result<T, Failure>;
}

impl<T, E: Into<Error>> FaultOf<T> for Result<T, E> {
    fn fault_of(self, kind: FailureKind) -> Result<T, Failure> {
        self.map_err(|error| Failure { kind, error: error.into() })
    }
}
