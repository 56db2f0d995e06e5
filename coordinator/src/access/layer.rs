//! The layer in front of all services.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::revocable::{Revocable, revoked};
use super::rules;
use super::{Access, Caller};
use crate::door::Peer;
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
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if let Some(token) = self.access.account_token(request.headers()) {
            let (access, method, token) = (Arc::clone(&self.access), request.uri().path().to_owned(), token.to_owned());
            // The one that is ready answers; its clone may not be.
            let clone = self.inner.clone();
            let mut inner = std::mem::replace(&mut self.inner, clone);
            return Box::pin(async move {
                match access.admit_account(&method, &token).await {
                    Ok(caller) => pass(&mut inner, request, caller).await,
                    Err(status) => Ok(refuse(&method, status)),
                }
            });
        }
        match self.access.admit(request.uri().path(), request.headers(), request.extensions().get()) {
            Ok(caller) => pass(&mut self.inner, request, caller),
            Err(status) => Box::pin(std::future::ready(Ok(refuse(request.uri().path(), status)))),
        }
    }
}

fn refuse(method: &str, status: Status) -> Response<Body> {
    metrics::refused(status.code());
    tracing::debug!(method, %status, "call refused");
    status.into_http()
}

/// Lets a call through, until its caller is known no more.
fn pass<S>(
    inner: &mut S,
    mut request: Request<Body>,
    caller: Caller,
) -> BoxFuture<'static, Result<Response<Body>, Infallible>>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>,
{
    let counts = caller.identity.is_some() || !rules::is_open(request.uri().path());
    if let Some(peer) = request.extensions().get::<Peer>().filter(|_| counts) {
        peer.is_named();
    }
    let good = caller.good.clone();
    request.extensions_mut().insert(caller);
    // Without tokens nobody can be revoked, and nothing is put around what goes through.
    let Some(good) = good else { return Box::pin(inner.call(request)) };
    let answer = inner.call(request.map(|body| Revocable::request(body, &good)));
    Box::pin(async move {
        match good.revoked.run_until_cancelled(answer).await {
            Some(answer) => answer.map(|answer| answer.map(|body| Revocable::response(body, &good))),
            None => Ok(revoked().into_http()),
        }
    })
}
