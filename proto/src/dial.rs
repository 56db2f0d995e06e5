//! How any role or command reaches the coordinator: its address, the limits of the connection, and what every call over
//! it carries.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{CertificateError, ClientConfig, Error as TlsError};
use tonic::codegen::Service;
use tonic::codegen::http::Uri;
use tonic::codegen::http::uri::Scheme;
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// For a connection to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection is tried, also while it is idle: one whose other end is gone would be waited for without an
/// end.
const KEEP_ALIVE_PERIOD: Duration = Duration::from_secs(10);
/// For the other end to answer such a try.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The way to a coordinator. Clones are cheap, and each connection that is made of one is its own.
#[derive(Debug, Clone)]
pub struct Dial {
    endpoint: Endpoint,
    tls: Option<Tls>,
    credentials: Credentials,
}

/// How TLS is spoken.
#[derive(Debug, Clone)]
struct Tls {
    config: TlsConfig,
    /// Whose certificate the coordinator must show.
    name: ServerName<'static>,
}

/// Which authorities are trusted, and which certificate is shown; each new connection takes the newest.
pub type TlsConfig = watch::Receiver<Arc<ClientConfig>>;

/// A channel that a [`Dial`] has made.
pub type Dialled = InterceptedService<Channel, Credentials>;

/// What is no address of a coordinator.
#[derive(Debug, thiserror::Error)]
#[error("{address:?} is no address of a coordinator: {wanted}://HOST:PORT is wanted")]
pub struct NoAddress {
    address: String,
    wanted: &'static str,
}

impl Dial {
    /// The way to `http://HOST:PORT`.
    ///
    /// # Errors
    /// If that is no such address.
    pub fn new(address: &str) -> Result<Self, NoAddress> {
        Ok(Self { endpoint: endpoint(address, "http")?, tls: None, credentials: Credentials::default() })
    }

    /// The way to `https://HOST:PORT`, over TLS.
    ///
    /// # Errors
    /// If that is no such address.
    pub fn over_tls(address: &str, config: TlsConfig) -> Result<Self, NoAddress> {
        let plain = Self { endpoint: endpoint(address, "https")?, tls: None, credentials: Credentials::default() };
        let name = ServerName::try_from(plain.host().to_owned());
        let name = name.map_err(|_| NoAddress { address: address.to_owned(), wanted: "https" })?;
        Ok(Self { tls: Some(Tls { config, name }), ..plain })
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
        let usual = if self.tls.is_some() { 443 } else { 80 };
        self.endpoint.uri().port_u16().unwrap_or(usual)
    }

    /// Whether it leads to this machine itself.
    pub fn is_loopback(&self) -> bool {
        let host = self.host();
        host.eq_ignore_ascii_case("localhost")
            || host.parse().is_ok_and(|host: IpAddr| host.to_canonical().is_loopback())
    }

    /// Whether nobody on the way reads what is said.
    pub fn is_private(&self) -> bool {
        self.tls.is_some() || self.is_loopback()
    }

    /// A channel that connects with its first call, and again whenever its connection is lost.
    pub fn channel(&self) -> Dialled {
        let channel = match &self.tls {
            None => self.endpoint.connect_lazy(),
            Some(tls) => self.plain_endpoint().connect_with_connector_lazy(self.connector(tls)),
        };
        InterceptedService::new(channel, self.credentials.clone())
    }

    /// The same, connected.
    ///
    /// # Errors
    /// If it cannot be.
    pub async fn connect(&self) -> Result<Dialled, tonic::transport::Error> {
        let channel = match &self.tls {
            None => self.endpoint.connect().await?,
            Some(tls) => self.plain_endpoint().connect_with_connector(self.connector(tls)).await?,
        };
        Ok(InterceptedService::new(channel, self.credentials.clone()))
    }

    /// The way that the connector makes safe, for a client that would want its own TLS otherwise.
    fn plain_endpoint(&self) -> Endpoint {
        let mut plain = self.endpoint.uri().clone().into_parts();
        plain.scheme = Some(Scheme::HTTP);
        let plain = Uri::from_parts(plain).expect("only its scheme is another");
        limited(Endpoint::from(plain)).origin(self.endpoint.uri().clone())
    }

    /// What makes connections over TLS.
    fn connector(
        &self,
        tls: &Tls,
    ) -> impl Service<Uri, Response = TokioIo<TlsStream<TcpStream>>, Error = io::Error, Future: Send> + Send + use<>
    {
        let (host, port, tls) = (self.host().to_owned(), self.port(), tls.clone());
        tower::service_fn(move |_| {
            let (host, tls) = (host.clone(), tls.clone());
            async move {
                let socket = TcpStream::connect((&*host, port)).await?;
                socket.set_nodelay(true)?;
                let config = Arc::clone(&tls.config.borrow());
                let stream = TlsConnector::from(config).connect(tls.name, socket).await;
                stream.map(TokioIo::new).map_err(|error| explained(error, &format!("{host}:{port}")))
            }
        })
    }
}

fn endpoint(address: &str, scheme: &'static str) -> Result<Endpoint, NoAddress> {
    let endpoint = Endpoint::from_shared(address.to_owned()).ok();
    let is_one = |uri: &Uri| uri.scheme_str() == Some(scheme) && uri.host().is_some_and(|host| !host.is_empty());
    let endpoint = endpoint.filter(|endpoint| is_one(endpoint.uri()));
    endpoint.map(limited).ok_or_else(|| NoAddress { address: address.to_owned(), wanted: scheme })
}

fn limited(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_PERIOD)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
}

/// Why no TLS came about, and what to do. [`io::ErrorKind::InvalidData`]: it would not the next time either.
fn explained(error: io::Error, address: &str) -> io::Error {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>());
    let why = match tls {
        Some(TlsError::InvalidMessage(_)) => {
            format!("{address} does not speak TLS; http:// reaches a coordinator without it")
        }
        Some(TlsError::InvalidCertificate(CertificateError::UnknownIssuer)) => format!(
            "the certificate of {address} is signed by no authority that is trusted here; --tls-ca FILE names others"
        ),
        Some(other) => format!("no TLS with {address}: {other}"),
        None => return error,
    };
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl fmt::Display for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.endpoint.uri().to_string().trim_end_matches('/'))
    }
}

/// What every call carries so that it is known who makes it: asked for anew with each call, and nothing unless somebody
/// says what.
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
        let tls = Dial::over_tls("https://gleaner", nothing_trusted()).expect("an address");
        assert_eq!((tls.host(), tls.port(), &*tls.to_string()), ("gleaner", 443, "https://gleaner"));
        assert!(tls.is_private() && !tls.is_loopback() && dial.is_loopback());
        assert!(Dial::new("https://gleaner").is_err() && Dial::over_tls("http://gleaner", nothing_trusted()).is_err());
        let dial = Dial::new("http://gleaner").expect("an address");
        assert_eq!((dial.host(), dial.port(), &*dial.to_string()), ("gleaner", 80, "http://gleaner"));
        for wrong in ["", "gleaner", "gleaner:7070", "ftp://gleaner:7070", "http://", "http:// x"] {
            let refused = Dial::new(wrong).expect_err(wrong).to_string();
            assert!(refused.contains("http://HOST:PORT"), "{refused}");
        }
    }

    fn nothing_trusted() -> TlsConfig {
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let roots = tokio_rustls::rustls::RootCertStore::empty();
        watch::channel(Arc::new(config.expect("versions").with_root_certificates(roots).with_no_client_auth())).1
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
