//! The layer in front of all services.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service};

use super::Access;
use super::revocable::{Revocable, revoked};
use crate::metrics;

/// Lets calls pass to whose callers they are allowed.
#[derive(Clone)]
pub(crate) struct AccessLayer(pub(crate) Arc<Access>);

impl<S> Layer<S> for AccessLayer {
    type Service = Checked<S>;

    fn layer(&self, inner: S) -> Checked<S> {
        Checked { access: Arc::clone(&self.0), inner }
    }
}

/// Services behind the check.
#[derive(Clone)]
pub(crate) struct Checked<S> {
    access: Arc<Access>,
    inner: S,
}

impl<S> Service<Request<Body>> for Checked<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let caller = match self.access.admit(request.uri().path(), request.headers(), request.extensions().get()) {
            Ok(caller) => caller,
            Err(status) => {
                metrics::refused(status.code());
                tracing::debug!(method = request.uri().path(), %status, "call refused");
                return Box::pin(std::future::ready(Ok(status.into_http())));
            }
        };
        let token = caller.revoked.clone();
        request.extensions_mut().insert(caller);
        // Without tokens nobody can be revoked, and nothing is put around what goes through.
        let Some(token) = token else { return Box::pin(self.inner.call(request)) };
        let answer = self.inner.call(request.map(|body| Revocable::request(body, &token)));
        Box::pin(async move {
            match token.run_until_cancelled(answer).await {
                Some(answer) => answer.map(|answer| answer.map(|body| Revocable::response(body, &token))),
                None => Ok(revoked().into_http()),
            }
        })
    }
}
