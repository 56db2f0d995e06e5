//! Why a file is not read.

/// What is wrong with a file, as the end of a sentence that begins with its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(pub(crate) String);

/// A result of reading.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// An error of these words.
pub(crate) fn refuse<T>(what: impl Into<String>) -> Result<T> {
    Err(Error(what.into()))
}
