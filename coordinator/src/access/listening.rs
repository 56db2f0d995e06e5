//! Where a coordinator may listen.

use std::net::IpAddr;

/// What stands between a port and who reaches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protection {
    /// Who calls must have a token.
    pub tokens: bool,
    /// Nobody on the way reads or changes what is said.
    pub tls: bool,
}

/// Whether a coordinator may listen at an address: this machine's own, one that is protected, or any if somebody says
/// that it is open on purpose (`insecure`).
///
/// # Errors
/// What is missing, for whoever starts it.
pub fn may_listen(at: IpAddr, protection: Protection, insecure: bool) -> Result<(), String> {
    let missing = match protection {
        _ if insecure || at.to_canonical().is_loopback() => return Ok(()),
        Protection { tokens: true, tls: true } => return Ok(()),
        Protection { tokens: false, tls: false } => "neither tokens (--tokens) nor TLS (--tls)",
        Protection { tokens: false, tls: true } => "no tokens (--tokens)",
        Protection { tokens: true, tls: false } => "no TLS (--tls)",
    };
    Err(format!(
        "{at} is reached from other machines, and there are {missing}: whoever reaches it could command the cluster. \
         Listen at 127.0.0.1, add what is missing, or say --insecure where the network keeps others out"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_open_to_other_machines_unless_somebody_says_so() {
        let [none, tokens, tls, both] = [(false, false), (true, false), (false, true), (true, true)]
            .map(|(tokens, tls)| Protection { tokens, tls });
        for own in ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"] {
            let own = own.parse().expect("an address");
            assert!([none, tokens, tls, both].into_iter().all(|it| may_listen(own, it, false).is_ok()), "{own}");
        }
        for other in ["0.0.0.0", "::", "10.0.0.1", "fe80::1", "::ffff:10.0.0.1"] {
            let other = other.parse().expect("an address");
            for (it, missing) in [(none, "--tokens"), (none, "--tls"), (tokens, "--tls"), (tls, "--tokens")] {
                let refused = may_listen(other, it, false).expect_err("not protected");
                assert!(refused.contains(missing) && refused.contains("--insecure"), "{refused}");
                assert!(may_listen(other, it, true).is_ok());
            }
            assert!(may_listen(other, both, false).is_ok());
        }
    }
}
