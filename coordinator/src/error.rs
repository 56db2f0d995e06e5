//! What a request can fail of, and its one translation into a gRPC status.

use std::any::Any;

use tokio::task::JoinError;
use tonic::Status;

use crate::store::StoreError;

/// Why a request is refused or failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The request is bad, and will be each time.
    #[error("{0}")]
    Invalid(String),
    /// What it names does not exist.
    #[error("{0}")]
    NotFound(String),
    /// Another one has that name.
    #[error("{0}")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    Precondition(String),
    /// It is another's.
    #[error("{0}")]
    Denied(String),
    /// More of a dataset is damaged than anybody has agreed to.
    #[error("{0}")]
    Damaged(String),
    /// The store holds a higher term: this coordinator is over.
    #[error("this coordinator's term {own} is over: term {seen} has begun")]
    Fenced { own: u64, seen: u64 },
    /// Somebody has seen a higher term. Whether it has begun is being looked up; another try finds out.
    #[error("term {seen} was heard of: this coordinator of term {own} looks for it in its store")]
    HeardHigher { own: u64, seen: u64 },
    /// The caller went away in the middle of its request.
    #[error("the stream ended early: {0}")]
    Aborted(String),
    /// The store cannot be reached; another try may help.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// A temporary file, a thread: something of this machine.
    #[error("{0}")]
    Local(String),
    /// The same would happen again: with the panic's own words.
    #[error("the coordinator has panicked, which is a fault of its program: {0}")]
    Panicked(String),
}

impl Error {
    /// Nothing of this kind has that name; says which of the `known` ones may have been meant.
    pub(crate) fn unknown<'a>(kind: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        // A letter too many, too few, another or at the wrong place; two in long names.
        let most = 1 + usize::from(name.chars().count() > 5);
        let near = known.into_iter().map(|known| (strsim::osa_distance(known, name), known)).min();
        let meant =
            near.filter(|(distance, _)| *distance <= most).map(|(_, known)| format!("; did you mean {known:?}?"));
        Self::NotFound(format!("no {kind} is called {name:?}{}", meant.unwrap_or_default()))
    }
}

impl Error {
    /// What a panic has said.
    pub(crate) fn panicked(panic: &(dyn Any + Send)) -> Self {
        Self::Panicked(proto::caught::words(panic).to_owned())
    }
}

/// A task or a thread has not come to its end.
impl From<JoinError> for Error {
    fn from(error: JoinError) -> Self {
        match error.try_into_panic() {
            Ok(panic) => Self::panicked(&*panic),
            Err(error) => Self::Local(error.to_string()),
        }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::Local(format!("temporary file: {error}"))
    }
}

impl From<proto::SpecError> for Error {
    fn from(error: proto::SpecError) -> Self {
        Self::Invalid(error.to_string())
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Invalid(_) => Status::invalid_argument(message),
            Error::NotFound(_) => Status::not_found(message),
            Error::Exists(_) => Status::already_exists(message),
            Error::Precondition(_) | Error::Damaged(_) | Error::Fenced { .. } => Status::failed_precondition(message),
            Error::Denied(_) => Status::permission_denied(message),
            Error::Aborted(_) => Status::aborted(message),
            Error::Store(_) | Error::HeardHigher { .. } => Status::unavailable(message),
            Error::Local(_) | Error::Panicked(_) => Status::internal(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_nearly_right_is_answered_with_the_right_one() {
        let said = |name: &str| Error::unknown("dataset", name, ["demo", "birds-1", "birds-2"]).to_string();
        assert_eq!(said("dmo"), "no dataset is called \"dmo\"; did you mean \"demo\"?");
        assert_eq!(said("brids-1"), "no dataset is called \"brids-1\"; did you mean \"birds-1\"?");
        assert_eq!(said("cats"), "no dataset is called \"cats\"");
        assert_eq!(Error::unknown("run", "a", []).to_string(), "no run is called \"a\"");
    }
}
