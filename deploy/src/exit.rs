//! How a command ends: the one place that turns errors into exit codes and into words for people.

use std::error::Error;
use std::process::ExitCode;

use proto::SpecError;
use tonic::{Code, Status};

/// The exit codes beside 0 (done). They are part of the command line's contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// The work failed or was cancelled, or the program could not go on.
    Failed = 1,
    /// The request cannot be meant so.
    Usage = 2,
    /// There is no such dataset or run.
    NotFound = 3,
    /// It exists already, or is not in a state that allows this.
    Conflict = 4,
    /// The cluster cannot be reached; trying again may help.
    Unavailable = 5,
    /// `--timeout` has passed; the work goes on.
    TimedOut = 124,
    /// Ctrl-C on a wait; the work goes on.
    Interrupted = 130,
}

/// An end with its code and the words for it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Ended {
    /// The process ends with it.
    pub(crate) exit: Exit,
    /// What happened, and what to do.
    pub(crate) message: String,
}

impl Ended {
    /// As an error to return.
    pub(crate) fn error(exit: Exit, message: impl Into<String>) -> anyhow::Error {
        Self { exit, message: message.into() }.into()
    }

    /// The request cannot be meant so.
    pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
        Self::error(Exit::Usage, message)
    }
}

/// Says on standard error what went wrong.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let (exit, message) = explain(error);
    crate::output::complain(format!("gleaner: {message}"));
    ExitCode::from(exit as u8)
}

/// The code and the words for an error, whatever context was put around it.
pub(crate) fn explain(error: &anyhow::Error) -> (Exit, String) {
    let mut exit = Exit::Failed;
    let mut words = Vec::new();
    for cause in error.chain() {
        if let Some(status) = cause.downcast_ref::<Status>() {
            let (code, message) = of_status(status);
            words.push(message);
            // What follows is the transport's own chain, and the message has its end.
            return (code, words.join(": "));
        }
        if let Some(ended) = cause.downcast_ref::<Ended>() {
            exit = ended.exit;
        } else if cause.is::<SpecError>() {
            exit = Exit::Usage;
        }
        let message = cause.to_string();
        // Many errors repeat their source's words in their own.
        if !words.last().is_some_and(|last: &String| last.contains(&message)) {
            words.push(message);
        }
    }
    (exit, words.join(": "))
}

fn of_status(status: &Status) -> (Exit, String) {
    if is_outage(status) {
        let why = innermost(status).unwrap_or_else(|| status.message().to_owned());
        let message = format!(
            "cannot reach the coordinator: {why}; is it running? `gleaner local` starts a cluster on this machine, \
             --coordinator or GLEANER_COORDINATOR names another"
        );
        return (Exit::Unavailable, message);
    }
    if status.message().starts_with("grpc-status header missing") {
        let message = "what listens there is no coordinator; --coordinator or GLEANER_COORDINATOR names another";
        return (Exit::Unavailable, message.to_owned());
    }
    let exit = match status.code() {
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::NotFound => Exit::NotFound,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Exit::Conflict,
        _ => Exit::Failed,
    };
    let message = match status.message() {
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    };
    (exit, message)
}

fn innermost(status: &Status) -> Option<String> {
    let mut cause = status.source()?;
    while let Some(next) = cause.source() {
        cause = next;
    }
    Some(cause.to_string())
}

/// Whether the coordinator could not be reached or the connection broke, so that asking again may help.
pub(crate) fn is_outage(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded => true,
        // A status that was made here, out of a broken connection, has a source; one that the server sent has none.
        Code::Unknown | Code::Internal | Code::Cancelled => status.source().is_some(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn each_kind_of_error_has_its_code_through_any_context() {
        let cases: [(anyhow::Error, Exit); 8] = [
            (Status::not_found("no dataset birds").into(), Exit::NotFound),
            (Status::already_exists("birds").into(), Exit::Conflict),
            (Status::failed_precondition("no manifest").into(), Exit::Conflict),
            (Status::invalid_argument("bad").into(), Exit::Usage),
            (Status::unavailable("refused").into(), Exit::Unavailable),
            (Status::internal("a bug of the server").into(), Exit::Failed),
            (proto::RunSpec::from_toml("x = 1").expect_err("unknown key").into(), Exit::Usage),
            (anyhow::anyhow!("disk full"), Exit::Failed),
        ];
        for (error, exit) in cases {
            let error = Err::<(), _>(error).context("dataset birds").expect_err("still an error");
            let (code, message) = explain(&error);
            assert_eq!(code, exit, "{message}");
            assert!(message.starts_with("dataset birds: "), "{message}");
        }
    }

    #[test]
    fn a_broken_connection_is_an_outage_and_a_server_that_failed_is_not() {
        let broken = Status::from_error(Box::new(std::io::Error::other("connection reset")));
        assert!(is_outage(&broken));
        assert!(!is_outage(&Status::internal("a bug of the server")));
    }
}
