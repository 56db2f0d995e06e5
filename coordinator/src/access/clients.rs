//! Who is known by the certificate of a connection. Pure.

use std::str::FromStr;

use globset::{GlobBuilder, GlobMatcher};
use tonic::Status;

use super::rules::{self, Identity, Role};
use crate::door::PeerCertificate;

/// `ROLE=NAME`: whoever has a certificate of that name may call as that. In a name `*` stands for any text.
#[derive(Debug, Clone)]
pub struct ClientName {
    role: Role,
    name: GlobMatcher,
}

impl FromStr for ClientName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (role, name) = text.split_once('=').ok_or("ROLE=NAME is wanted, such as worker=worker.gleaner")?;
        let role = Role::named(role).ok_or_else(|| {
            let roles: Vec<&str> = Role::ALL.iter().map(|role| role.name()).collect();
            format!("{role:?} is no role; there are {}", roles.join(", "))
        })?;
        if name.is_empty() {
            return Err(format!("no name may be a {role}; {role}=* lets in whatever the authority has signed"));
        }
        let name = GlobBuilder::new(name).build().map_err(|error| error.to_string())?.compile_matcher();
        Ok(Self { role, name })
    }
}

/// Who shows a certificate, if it lets him call a method.
///
/// # Errors
/// The refusal: no name of it is known here, or only under other roles.
#[allow(clippy::result_large_err, reason = "as services return it")]
pub(super) fn identify(
    clients: &[ClientName],
    certificate: &PeerCertificate,
    method: &str,
) -> Result<Identity, Status> {
    let mut refused = None;
    for ClientName { role, name: known } in clients {
        let Some(name) = certificate.names.iter().find(|name| known.is_match(name)) else { continue };
        let identity = Identity { name: name.as_str().into(), role: *role };
        match rules::allowed(method, Some(&identity)) {
            Ok(()) => return Ok(identity),
            Err(refusal) => refused = Some(refusal),
        }
    }
    Err(refused.map_or_else(
        || {
            let names = certificate.names.join(", ");
            let message = format!("the certificate's names ({names}) are none of the coordinator's --tls-client-names");
            Status::permission_denied(message)
        },
        Status::from,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_lets_its_holder_call_what_the_role_of_one_of_its_names_may() {
        let certificate = PeerCertificate {
            names: vec!["fetch-7.worker.gleaner".to_owned(), "spiffe://cluster/ns/gleaner/sa/worker".to_owned()],
        };
        let role = |clients: &[&str], method: &str| {
            let clients: Vec<ClientName> = clients.iter().map(|text| text.parse().expect("ROLE=NAME")).collect();
            let identity = identify(&clients, &certificate, method);
            identity.map(|identity| identity.role).map_err(|status| status.code())
        };
        let (lease, status) = ("/gleaner.v1.FetchService/LeaseShard", "/gleaner.v1.RunService/GetStatus");
        for known in ["fetch-7.worker.gleaner", "*.worker.gleaner", "*", "spiffe://cluster/*/worker"] {
            assert_eq!(role(&[&format!("worker={known}")], lease), Ok(Role::Worker), "{known}");
        }
        let refused = Err(tonic::Code::PermissionDenied);
        for unknown in ["fetch-7", "worker.gleaner", "*.trainer.gleaner", "spiffe://other/*"] {
            assert_eq!(role(&[&format!("worker={unknown}")], lease), refused, "{unknown}");
        }
        assert_eq!(role(&["worker=*"], status), refused);
        assert_eq!(role(&["worker=*", "viewer=spiffe://cluster/*"], status), Ok(Role::Viewer));
        assert_eq!(role(&[], status), refused);
        for text in ["", "worker", "worker=", "boss=*", "worker=[", "=*"] {
            assert!(text.parse::<ClientName>().is_err(), "{text}");
        }
    }
}
