//! `gleaner cluster secrets`: an authority and certificates for a cluster on Kubernetes, as manifests of Secrets.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::time::ASN1Time;

use crate::output::say;

/// An authority is good for so many days.
const AUTHORITY_DAYS: u64 = 3650;
const DAY: Duration = Duration::from_secs(24 * 3600);

/// What is done to a cluster as a whole.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Print Secrets with certificates for a cluster on Kubernetes, for `kubectl apply -f -`
    Secrets(Args),
}

/// Arguments of `gleaner cluster secrets`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The authority's certificate and key (PEM): taken if the file is there, made if not. Keep it: whoever has it may
    /// call as anybody
    #[arg(long, value_name = "FILE")]
    authority: PathBuf,
    /// Also certify the coordinator under this host name or address, beside those that its Service has; may be repeated
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    dns: Vec<String>,
    /// The cluster's namespace
    #[arg(long, default_value = "gleaner", value_name = "NAME")]
    namespace: String,
    /// Days until the certificates end
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..=3650), value_name = "N")]
    days: u64,
    /// Print this Secret alone
    #[arg(long, value_enum, value_name = "WHOSE")]
    only: Option<Whose>,
}

/// Who shows a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Whose {
    /// The coordinator
    Coordinator,
    /// Fetch workers
    Worker,
    /// Trainer agents
    Trainer,
    /// People, as admins
    Client,
    /// KEDA, as a viewer
    Keda,
}

impl Whose {
    const ALL: [Self; 5] = [Self::Coordinator, Self::Worker, Self::Trainer, Self::Client, Self::Keda];

    fn secret(self) -> &'static str {
        match self {
            Self::Coordinator => "tls-coordinator",
            Self::Worker => "tls-worker",
            Self::Trainer => "tls-trainer",
            Self::Client => "tls-client",
            Self::Keda => "tls-keda",
        }
    }

    /// The names in its certificate.
    fn names(self, namespace: &str, dns: &[String]) -> Vec<String> {
        let own = ["", ".{}", ".{}.svc", ".{}.svc.cluster.local"];
        let own = own.map(|ending| format!("coordinator{}", ending.replace("{}", namespace)));
        match self {
            // Through a port-forward it is reached as this machine.
            Self::Coordinator => {
                let here = ["localhost", "127.0.0.1"].map(str::to_owned);
                [&own[..], &here, dns].concat()
            }
            Self::Worker => vec![format!("worker.{namespace}")],
            Self::Trainer => vec![format!("trainer.{namespace}")],
            Self::Client => vec![format!("admin.{namespace}")],
            Self::Keda => vec![format!("keda.{namespace}")],
        }
    }
}

/// Prints the manifests.
pub(crate) fn run(command: Command) -> Result<()> {
    let Command::Secrets(args) = command;
    let authority = authority(&args.authority)?;
    let manifests = Whose::ALL.into_iter().filter(|whose| args.only.is_none_or(|only| only == *whose)).map(|whose| {
        let names = whose.names(&args.namespace, &args.dns);
        let (cert, key) = certificate(&authority, &names, whose == Whose::Coordinator, args.days)?;
        Ok(manifest(whose.secret(), &args.namespace, &authority.pem, &cert, &key))
    });
    say(manifests.collect::<Result<Vec<_>>>()?.join("---\n").trim_end());
    Ok(())
}

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// The authority in a file, or a new one that is written there.
fn authority(path: &Path) -> Result<Authority> {
    let file = path.display();
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = new_authority()?;
            let mut made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
            let written = made.as_mut().map_err(|error| std::io::Error::from(error.kind()));
            written.and_then(|made| made.write_all(text.as_bytes())).with_context(|| format!("cannot write {file}"))?;
            text
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {file}")),
    };
    let key = PrivateKeyDer::from_pem_slice(text.as_bytes()).with_context(|| format!("{file} has no key (PEM)"))?;
    let key = KeyPair::try_from(&key).with_context(|| format!("{file} has no key that can be signed with"))?;
    let cert = CertificateDer::from_pem_slice(text.as_bytes());
    let cert = cert.with_context(|| format!("{file} has no certificate (PEM)"))?;
    let issuer = Issuer::from_ca_cert_der(&cert, key).with_context(|| format!("{file} is no authority's"))?;
    let end = "-----END CERTIFICATE-----\n";
    let begin = text.find("-----BEGIN CERTIFICATE-----").context("a certificate begins")?;
    let length = text[begin..].find(end).with_context(|| format!("{file}: the certificate has no end"))?;
    Ok(Authority { pem: text[begin..begin + length + end.len()].to_owned(), issuer })
}

/// Certificate and key.
fn new_authority() -> Result<String> {
    let mut params = CertificateParams::default();
    params.distinguished_name = called("Gleaner");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid_for(&mut params, AUTHORITY_DAYS);
    let key = KeyPair::generate()?;
    Ok(params.self_signed(&key)?.pem() + &key.serialize_pem())
}

/// A certificate for these names, and its key.
fn certificate(authority: &Authority, names: &[String], server: bool, days: u64) -> Result<(String, String)> {
    let mut params = CertificateParams::new(names)
        .with_context(|| format!("{} cannot all be names of a certificate", names.join(", ")))?;
    params.distinguished_name = called(&names[0]);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let usage = if server { ExtendedKeyUsagePurpose::ServerAuth } else { ExtendedKeyUsagePurpose::ClientAuth };
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    valid_for(&mut params, days);
    let key = KeyPair::generate()?;
    Ok((params.signed_by(&key, &authority.issuer)?.pem(), key.serialize_pem()))
}

fn called(name: &str) -> DistinguishedName {
    let mut called = DistinguishedName::new();
    called.push(DnType::CommonName, name);
    called
}

/// From an hour ago, since clocks differ.
fn valid_for(params: &mut CertificateParams, days: u64) {
    let now = ASN1Time::now().to_datetime();
    params.not_before = now - DAY / 24;
    params.not_after = now + DAY * days as u32;
}

fn manifest(name: &str, namespace: &str, authority: &str, cert: &str, key: &str) -> String {
    let mut text = format!(
        "apiVersion: v1\nkind: Secret\nmetadata:\n  name: {name}\n  namespace: {namespace}\ntype: kubernetes.io/tls\nstringData:\n"
    );
    for (file, pem) in [("ca.crt", authority), ("tls.crt", cert), ("tls.key", key)] {
        text += &format!("  {file}: |\n");
        pem.lines().for_each(|line| text += &format!("    {}\n", line.trim_end()));
    }
    text
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::{ServerName, UnixTime};
    use rustls::server::WebPkiClientVerifier;
    use rustls::sign::CertifiedKey;

    use super::*;

    #[test]
    fn what_an_authority_signs_is_trusted_by_whoever_trusts_it_and_the_next_time_it_is_the_same() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("ca.pem");
        let ours = authority(&path).expect("it is made");
        let mode = std::os::unix::fs::MetadataExt::mode(&path.metadata().expect("it is there"));
        assert_eq!(mode & 0o777, 0o600, "its key is in it");
        assert_eq!(authority(&path).expect("it is there").pem, ours.pem);

        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ours.pem.as_bytes()).expect("PEM")).expect("an authority");
        let roots = std::sync::Arc::new(roots);
        let read = |(cert, key): (String, String)| {
            let cert = CertificateDer::from_pem_slice(cert.as_bytes()).expect("PEM");
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
            CertifiedKey::from_der(vec![cert.clone()], key, &provider).expect("they belong together");
            cert
        };
        let names = Whose::Coordinator.names("gleaner", &["gleaner.example".to_owned()]);
        let server = read(certificate(&ours, &names, true, 30).expect("it signs"));
        let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
        let verifier = verifier.build().expect("roots");
        for name in ["coordinator", "coordinator.gleaner.svc", "localhost", "127.0.0.1", "gleaner.example"] {
            let name = ServerName::try_from(name).expect("a name");
            use rustls::client::danger::ServerCertVerifier;
            verifier.verify_server_cert(&server, &[], &name, &[], UnixTime::now()).expect("it is trusted");
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build().expect("roots");
        let worker = read(certificate(&ours, &Whose::Worker.names("gleaner", &[]), false, 30).expect("it signs"));
        verifier.verify_client_cert(&worker, &[], UnixTime::now()).expect("it is trusted");
        assert!(verifier.verify_client_cert(&server, &[], UnixTime::now()).is_err(), "it is no client's");
    }

    #[test]
    fn a_manifest_is_what_kubectl_takes() {
        let text = manifest("tls-worker", "gleaner", "A\nB\n", "C\r\n", "D");
        assert_eq!(
            text,
            "apiVersion: v1\nkind: Secret\nmetadata:\n  name: tls-worker\n  namespace: gleaner\ntype: kubernetes.io/tls\n\
             stringData:\n  ca.crt: |\n    A\n    B\n  tls.crt: |\n    C\n  tls.key: |\n    D\n"
        );
    }
}
