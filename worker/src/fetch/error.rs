//! Why a request failed, from the causes that an error carries.

use std::error::Error;

use proto::Rejection;

use super::dns::{Blocked, NoSuchName};
use super::retry::FetchError;

/// Why there was no response.
pub(super) fn of_request(error: &reqwest::Error, https: bool) -> FetchError {
    let mut kind = None;
    let mut tls = false;
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<Blocked>() {
            return Rejection::BlockedAddress.into();
        }
        if error.is::<NoSuchName>() {
            return Rejection::Dns.into();
        }
        tls |= error.is::<rustls::Error>();
        cause = match error.downcast_ref::<std::io::Error>() {
            Some(io) => {
                kind = Some(io.kind());
                // `source` of an io::Error skips the very error that it wraps.
                io.get_ref().map(|inner| inner as &(dyn Error + 'static))
            }
            None => error.source(),
        };
    }
    if error.is_dns() {
        FetchError::of_host(Rejection::Dns)
    } else if tls {
        Rejection::Tls.into()
    } else if error.is_builder() {
        Rejection::BadUrl.into()
    } else if error.is_connect() {
        // A TCP connection that is not made is refused, unreachable or late; one that ends again at once died in its handshake.
        use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, InvalidData, UnexpectedEof};
        match kind {
            Some(UnexpectedEof | InvalidData | ConnectionReset | ConnectionAborted) if https => Rejection::Tls.into(),
            _ => FetchError::of_host(Rejection::Connect),
        }
    } else if error.is_timeout() {
        FetchError::of_host(Rejection::Timeout)
    } else {
        Rejection::Protocol.into()
    }
}
