//! The names in clients' certificates.

use std::io;

use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;

/// A client's certificate that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PeerCertificate {
    /// Its subject's names: the common name, DNS names, and URIs such as `spiffe://cluster/ns/gleaner/sa/worker`.
    pub(crate) names: Vec<String>,
}

impl PeerCertificate {
    /// Reads the names of a certificate.
    ///
    /// # Errors
    /// If it is none.
    pub(super) fn read(certificate: &CertificateDer<'_>) -> io::Result<Self> {
        let unreadable = |error: x509_parser::error::X509Error| io::Error::new(io::ErrorKind::InvalidData, error);
        let (_, certificate) = x509_parser::parse_x509_certificate(certificate).map_err(|error| match error {
            x509_parser::nom::Err::Error(error) | x509_parser::nom::Err::Failure(error) => unreadable(error),
            x509_parser::nom::Err::Incomplete(_) => io::ErrorKind::UnexpectedEof.into(),
        })?;
        let common = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
        let mut names: Vec<String> = common.map(str::to_owned).collect();
        let others = certificate.subject_alternative_name().map_err(unreadable)?;
        names.extend(others.iter().flat_map(|others| &others.value.general_names).filter_map(|name| match name {
            GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
            _ => None,
        }));
        names.dedup();
        Ok(Self { names })
    }
}
