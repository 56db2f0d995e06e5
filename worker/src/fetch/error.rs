//! Why a request failed, from the causes that an error carries.

use std::error::Error;
use std::io;
use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, InvalidData, UnexpectedEof};

use proto::Rejection;

use super::dns::{Blocked, NoSuchName, NoTurn};
use super::retry::{FetchError, Retry};
use crate::hosts::HostSignal;

/// Why there was no response.
pub(super) fn of_request(error: &reqwest::Error, https: bool) -> FetchError {
    let causes = || causes(error);
    let kind = causes().filter_map(|cause| cause.downcast_ref::<io::Error>()).last().map(io::Error::kind);
    if causes().any(|cause| cause.is::<Blocked>()) {
        Rejection::BlockedAddress.into()
    } else if causes().any(|cause| cause.is::<NoSuchName>()) {
        Rejection::Dns.into()
    } else if causes().any(|cause| cause.is::<NoTurn>()) {
        // Nobody has asked anything yet.
        FetchError { retry: Retry::WithHost, ..Rejection::Dns.into() }
    } else if error.is_dns() {
        FetchError::of_host(Rejection::Dns)
    } else if causes().any(|cause| cause.is::<rustls::Error>()) {
        Rejection::Tls.into()
    } else if error.is_builder() {
        Rejection::BadUrl.into()
    } else if error.is_connect() {
        // A TCP connection that is not made is refused, unreachable or late; one that ends again at once did so in its
        // handshake.
        match kind {
            Some(UnexpectedEof | ConnectionReset | ConnectionAborted) if https => FetchError::of_host(Rejection::Tls),
            Some(InvalidData) if https => Rejection::Tls.into(),
            _ => FetchError::of_host(Rejection::Connect),
        }
    } else if error.is_timeout() {
        FetchError::of_host(Rejection::Timeout)
    } else if broke_off(error) {
        FetchError::of_host(Rejection::Protocol)
    } else {
        Rejection::Protocol.into()
    }
}

/// Why a response has no whole body. Its host answers.
pub(super) fn of_body(error: &reqwest::Error) -> FetchError {
    let retry = if broke_off(error) { Retry::After(std::time::Duration::ZERO) } else { Retry::Never };
    FetchError { retry, signal: HostSignal::Answered, ..Rejection::Protocol.into() }
}

/// Whether the server has ended what it was at work on, or has never begun.
pub(super) fn is_over(error: &reqwest::Error) -> bool {
    let never_asked = error.is_connect() || error.is_dns() || error.is_builder();
    let blocked = || causes(error).any(|cause| cause.is::<Blocked>() || cause.is::<NoSuchName>());
    never_asked || broke_off(error) || blocked()
}

/// Whether the connection or the stream ended early, which the next one need not.
pub(super) fn broke_off(error: &reqwest::Error) -> bool {
    causes(error).any(|cause| {
        let io = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        matches!(io, Some(UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe))
            || cause.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_incomplete_message)
            || cause.is::<h2::Error>()
    })
}

/// An error and all that caused it.
fn causes<'a>(error: &'a reqwest::Error) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let first: &'a (dyn Error + 'static) = error;
    std::iter::successors(Some(first), |&error| match error.downcast_ref::<io::Error>() {
        // `source` of an io::Error skips the very error that it wraps.
        Some(io) => io.get_ref().map(|inner| inner as &'a (dyn Error + 'static)),
        None => error.source(),
    })
}
