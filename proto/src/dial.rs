//! How any role or command reaches the coordinator: its address, the limits of the connection, and what every call over it
//! carries.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// For a connection to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection is tried, also while it is idle: one whose other end is gone would be waited for without an end.
const KEEP_ALIVE_PERIOD: Duration = Duration::from_secs(10);
/// For the other end to answer such a try.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The way to a coordinator. Clones are cheap, and each connection that is made of one is its own.
#[derive(Debug, Clone)]
pub struct Dial {
    endpoint: Endpoint,
    credentials: Credentials,
}

/// A channel that a [`Dial`] has made.
pub type Dialled = InterceptedService<Channel, Credentials>;

/// What is no address of a coordinator.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no address of a coordinator: http://HOST:PORT is wanted")]
pub struct NoAddress(String);

impl Dial {
    /// The way to `http://HOST:PORT`.
    ///
    /// # Errors
    /// If that is no such address.
    pub fn new(address: &str) -> Result<Self, NoAddress> {
        let no_address = || NoAddress(address.to_owned());
        let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|_| no_address())?;
        if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().host().is_none_or(str::is_empty) {
            return Err(no_address());
        }
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE_PERIOD)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        Ok(Self { endpoint, credentials: Credentials::default() })
    }

    /// The same, with `credentials` in every call.
    #[must_use]
    pub fn with(self, credentials: Credentials) -> Self {
        Self { credentials, ..self }
    }

    /// The coordinator's host: a name, or an address without brackets.
    pub fn host(&self) -> &str {
        self.endpoint.uri().host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
    }

    /// The coordinator's port.
    pub fn port(&self) -> u16 {
        self.endpoint.uri().port_u16().unwrap_or(80)
    }

    /// Whether it leads to this machine itself.
    pub fn is_loopback(&self) -> bool {
        let host = self.host();
        host.eq_ignore_ascii_case("localhost")
            || host.parse().is_ok_and(|host: IpAddr| host.to_canonical().is_loopback())
    }

    /// Whether nobody on the way reads what is said.
    pub fn is_private(&self) -> bool {
        self.is_loopback()
    }

    /// A channel that connects with its first call, and again whenever its connection is lost.
    pub fn channel(&self) -> Dialled {
        InterceptedService::new(self.endpoint.connect_lazy(), self.credentials.clone())
    }

    /// The same, connected.
    ///
    /// # Errors
    /// If it cannot be.
    pub async fn connect(&self) -> Result<Dialled, tonic::transport::Error> {
        Ok(InterceptedService::new(self.endpoint.connect().await?, self.credentials.clone()))
    }
}

impl fmt::Display for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.endpoint.uri().to_string().trim_end_matches('/'))
    }
}

/// What every call carries so that it is known who makes it: asked for anew with each call, and nothing unless somebody says what.
#[derive(Clone, Default)]
pub struct Credentials(Option<Arc<Write>>);

type Write = dyn Fn(&mut MetadataMap) -> Result<(), Status> + Send + Sync;

impl Credentials {
    /// What `write` writes. Its error is the call's, which is then not made.
    pub fn new(write: impl Fn(&mut MetadataMap) -> Result<(), Status> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(write)))
    }
}

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(write) = &self.0 {
            write(request.metadata_mut())?;
        }
        Ok(request)
    }
}

/// They are secret.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Credentials(..)" } else { "Credentials" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_scheme_and_a_host_and_says_where_it_leads() {
        let dial = Dial::new("http://[::1]:7070").expect("an address");
        assert_eq!((dial.host(), dial.port(), &*dial.to_string()), ("::1", 7070, "http://[::1]:7070"));
        let dial = Dial::new("http://gleaner").expect("an address");
        assert_eq!((dial.host(), dial.port(), &*dial.to_string()), ("gleaner", 80, "http://gleaner"));
        for wrong in ["", "gleaner", "gleaner:7070", "ftp://gleaner:7070", "http://", "http:// x"] {
            let refused = Dial::new(wrong).expect_err(wrong).to_string();
            assert!(refused.contains("http://HOST:PORT"), "{refused}");
        }
    }

    #[test]
    fn every_call_carries_what_was_given_and_is_not_made_where_that_fails() {
        let request = Credentials::default().call(Request::new(())).expect("a request");
        assert!(request.metadata().is_empty());
        let mut credentials = Credentials::new(|metadata| {
            metadata.insert("who", "anna".parse().map_err(|_| Status::internal("no value"))?);
            Ok(())
        });
        let request = credentials.call(Request::new(())).expect("a request");
        assert_eq!(request.metadata().get("who").expect("carried"), "anna");
        let refused = Credentials::new(|_| Err(Status::unauthenticated("no token"))).call(Request::new(()));
        assert_eq!(refused.expect_err("not made").message(), "no token");
    }
}
