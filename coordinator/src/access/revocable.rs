//! A body that ends when its caller's token is revoked.

use std::any::Any;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::Frame;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;
use tonic::body::Body;

/// What somebody is told whose token was good when he began.
pub(crate) fn revoked() -> Status {
    Status::unauthenticated("the token was revoked, or its role changed: ask who runs the coordinator for another one")
}

/// What a caller's calls go on by.
#[derive(Debug, Clone)]
pub(crate) struct Good {
    /// Cancelled when the caller is known no more.
    pub(super) revoked: CancellationToken,
    /// What is held while a call is open: it says that the token has to be asked for again.
    pub(super) _held: Option<Arc<dyn Any + Send + Sync>>,
}

/// Of a request or of a response.
pub(crate) struct Revocable {
    inner: Body,
    _good: Good,
    revoked: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    /// A response ends with a status, a request with an error.
    is_response: bool,
}

impl Revocable {
    /// Of a request: reading it fails from then on.
    pub(crate) fn request(inner: Body, good: &Good) -> Body {
        Self::body(inner, good, false)
    }

    /// Of a response: it ends with the reason.
    pub(crate) fn response(inner: Body, good: &Good) -> Body {
        Self::body(inner, good, true)
    }

    fn body(inner: Body, good: &Good, is_response: bool) -> Body {
        let revoked = Some(Box::pin(good.revoked.clone().cancelled_owned()));
        Body::new(Self { inner, _good: good.clone(), revoked, is_response })
    }
}

impl http_body::Body for Revocable {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(waiting) = &mut self.revoked else { return Poll::Ready(None) };
        if waiting.as_mut().poll(cx).is_ready() {
            self.revoked = None;
            self.inner = Body::empty();
            let mut trailers = http::HeaderMap::new();
            return Poll::Ready(Some(match self.is_response {
                true => revoked().add_header(&mut trailers).map(|()| Frame::trailers(trailers)),
                false => Err(revoked()),
            }));
        }
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}
