//! TLS by rustls: which certificates are shown, and whose are trusted. Both are read again when their files change, so
//! that certificates and authorities are rotated while everything runs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result, ensure};
use coordinator::door::{Tls, Trust};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use proto::dial::TlsConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tracing::{info, warn};
use x509_parser::time::ASN1Time;

use crate::exit::Ended;
use crate::watched::Files;

/// The protocol that gRPC is spoken over.
const ALPN: &[u8] = b"h2";
/// A certificate that ends so soon is warned of.
const SOON_DAYS: i64 = 7;

static REREAD: LazyLock<Family<[(&'static str, &'static str); 1], Counter>> = LazyLock::new(Family::default);
static EXPIRES: LazyLock<Gauge> = LazyLock::new(Gauge::default);

/// Adds what is measured of certificates to the metrics of the process.
pub(crate) fn register(registry: &mut Registry) {
    registry.register("tls_reloads", "Times that certificate files changed, by what came of it", REREAD.clone());
    registry.register("tls_certificate_expires_seconds", "When the own certificate ends, since 1970", EXPIRES.clone());
}

fn reread(good: bool) {
    REREAD.get_or_create(&[("result", if good { "ok" } else { "refused" })]).inc();
}

/// Over what the coordinator takes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// Plain connections alone
    Off,
    /// Both, while a cluster is rolled from one to the other
    Allow,
    /// TLS alone
    Require,
}

/// The coordinator's side.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ServerTlsArgs {
    /// Whether callers come over TLS
    #[arg(long, value_enum, default_value_t = Mode::Off)]
    tls: Mode,
    /// The coordinator's certificate with those between it and its authority (PEM); read again when it changes, or on
    /// SIGHUP, as are the next two
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Callers are known by certificates that one of these authorities (PEM) has signed, under the names of
    /// --tls-client-names
    #[arg(long, value_name = "FILE", requires = "tls_client_names")]
    tls_client_ca: Option<PathBuf>,
}

impl ServerTlsArgs {
    /// Reads the files, and goes on reading them.
    ///
    /// # Errors
    /// If they cannot be used, or the flags do not belong together.
    pub(crate) fn open(self) -> Result<Option<Tls>> {
        let any = self.tls_cert.is_some() || self.tls_key.is_some() || self.tls_client_ca.is_some();
        let (cert, key) = match (self.tls, self.tls_cert, self.tls_key) {
            (Mode::Off, ..) if any => {
                return Err(Ended::usage("certificates are named, but TLS is off: say --tls require, or --tls allow"));
            }
            (Mode::Off, ..) => return Ok(None),
            (_, Some(cert), Some(key)) => (cert, key),
            _ => return Err(Ended::usage("TLS needs a certificate and its key: --tls-cert FILE --tls-key FILE")),
        };
        let paths: Vec<PathBuf> = [cert, key].into_iter().chain(self.tls_client_ca).collect();
        let of = paths.clone();
        let build = move |read: &[Vec<u8>]| server(&of, read);
        let config = Files { what: "certificates", paths, reread }.watch(true, build)?;
        Ok(Some(Tls { required: self.tls == Mode::Require, config }))
    }
}

/// The side of whoever calls the coordinator.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub(crate) struct ClientTlsArgs {
    /// Trust these authorities (PEM) at https:// addresses of the coordinator [default: those that the system trusts]
    #[arg(long, env = "GLEANER_TLS_CA", value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// The certificate to show to the coordinator (PEM)
    #[arg(long, env = "GLEANER_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, env = "GLEANER_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
}

impl ClientTlsArgs {
    /// What is told here, and otherwise there; a certificate and its key are one thing.
    pub(crate) fn or(self, other: Self) -> Self {
        let tls_ca = self.tls_ca.or(other.tls_ca);
        match self.tls_cert.is_some() || self.tls_key.is_some() {
            true => Self { tls_ca, ..self },
            false => Self { tls_ca, ..other },
        }
    }

    /// Reads the files, and goes on reading them.
    ///
    /// # Errors
    /// If they cannot be used.
    pub(crate) fn open(&self) -> Result<TlsConfig> {
        let (has_ca, pair) = (self.tls_ca.is_some(), self.tls_cert.iter().chain(&self.tls_key));
        let paths: Vec<PathBuf> = self.tls_ca.iter().chain(pair).cloned().collect();
        let of = paths.clone();
        let build = move |read: &[Vec<u8>]| client(&of, read, has_ca);
        Files { what: "certificates", paths, reread }.watch(false, build)
    }
}

/// `read` is of a certificate, its key and, if clients must show theirs, their authorities.
fn server(paths: &[PathBuf], read: &[Vec<u8>]) -> Result<Trust> {
    let clients = match read.get(2) {
        None => None,
        Some(authorities) => {
            // Who shows none hears what is wanted of him from the service; a handshake that fails would not say it.
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots(&paths[2], authorities)?));
            Some(verifier.allow_unauthenticated().build()?)
        }
    };
    let builder = ServerConfig::builder();
    let builder = match clients.clone() {
        None => builder.with_no_client_auth(),
        Some(clients) => builder.with_client_cert_verifier(clients),
    };
    let (chain, key) = pair(paths, read)?;
    let mut config = builder.with_single_cert(chain, key).with_context(|| unfit(paths))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Trust { server: Arc::new(config), clients })
}

/// `read` is of authorities, if `has_ca`, and of a certificate and its key, if there is one.
fn client(paths: &[PathBuf], read: &[Vec<u8>], has_ca: bool) -> Result<ClientConfig> {
    let own = usize::from(has_ca);
    let roots = if has_ca { roots(&paths[0], &read[0])? } else { system_roots()? };
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let mut config = if read.len() > own {
        let (chain, key) = pair(&paths[own..], &read[own..])?;
        builder.with_client_auth_cert(chain, key).with_context(|| unfit(&paths[own..]))?
    } else {
        builder.with_no_client_auth()
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

fn unfit(paths: &[PathBuf]) -> String {
    format!("{} and the key {} do not belong together", paths[0].display(), paths[1].display())
}

/// A certificate with those between it and its authority, and its key.
fn pair(paths: &[PathBuf], read: &[Vec<u8>]) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = certificates(&paths[0], &read[0])?;
    let key = PrivateKeyDer::from_pem_slice(&read[1]).with_context(|| format!("no key in {}", paths[1].display()))?;
    let (_, own) = x509_parser::parse_x509_certificate(&chain[0])
        .with_context(|| format!("{} cannot be read as a certificate", paths[0].display()))?;
    let (end, subject, file) = (own.validity().not_after, own.subject(), paths[0].display());
    EXPIRES.set(end.timestamp());
    match (end.timestamp() - ASN1Time::now().timestamp()).div_euclid(24 * 3600) {
        days if days < 0 => warn!(%file, %subject, %end, "the certificate has expired"),
        days if days < SOON_DAYS => warn!(%file, %subject, %end, days, "the certificate ends soon"),
        days => info!(%file, %subject, %end, days, "the certificate is good"),
    }
    Ok((chain, key))
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.with_context(|| format!("{} is no PEM file", path.display()))?;
    ensure!(!found.is_empty(), "there is no certificate (PEM) in {}", path.display());
    Ok(found)
}

fn roots(path: &Path, pem: &[u8]) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(path, pem)? {
        roots.add(authority).with_context(|| format!("a certificate in {} is no authority's", path.display()))?;
    }
    Ok(roots)
}

/// The authorities that this system trusts.
fn system_roots() -> Result<RootCertStore> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    ensure!(added > 0, "this system trusts no authority; --tls-ca FILE names those of the coordinator");
    Ok(roots)
}
