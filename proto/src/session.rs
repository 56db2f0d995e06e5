//! The session of one process: a secret that it makes at its start and sends along with its calls. What the cluster
//! calls the process ends with a digest of the secret, so that nobody else can speak under its name, whatever token
//! they share, and every coordinator can check that without having met the process before.

use std::fmt;

use sha2::{Digest, Sha256};
use tonic::Status;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};

/// In which calls carry the secret.
const HEADER: &str = "gleaner-session";

/// Hexadecimal digits of the digest in a name.
const DIGITS: usize = 16;

/// The longest name of a process: that of a host, and a digest.
const LONGEST_NAME: usize = 255 + 1 + DIGITS;

/// The secret of one process.
#[derive(Clone, PartialEq, Eq)]
pub struct Session(String);

impl Session {
    /// One whose secret is a word that nobody can guess, of letters and digits.
    pub fn new(secret: String) -> Self {
        Self(secret)
    }

    /// What the cluster calls this process on that host.
    pub fn name(&self, host: &str) -> String {
        format!("{host}-{}", digest(&self.0))
    }

    /// Lets a call carry the secret.
    pub fn carry(&self, metadata: &mut MetadataMap) {
        if let Ok(mut value) = MetadataValue::<Ascii>::try_from(&self.0) {
            value.set_sensitive(true);
            metadata.insert(HEADER, value);
        }
    }

    /// The one that a call carries.
    pub fn of(metadata: &MetadataMap) -> Option<Self> {
        let secret = metadata.get(HEADER)?.to_str().ok()?;
        (!secret.is_empty()).then(|| Self(secret.to_owned()))
    }

    /// Whether a process of this session is called so.
    pub fn is_of(&self, name: &str) -> bool {
        name.rsplit_once('-').is_some_and(|(_, end)| end == digest(&self.0))
    }
}

fn digest(secret: &str) -> String {
    let mut digest = hex::encode(Sha256::digest(secret));
    digest.truncate(DIGITS);
    digest
}

/// Refuses a name that no process has.
///
/// # Errors
/// What a name must be.
#[allow(clippy::result_large_err, reason = "as services return it")]
pub fn check_name(what: &str, name: &str) -> Result<(), Status> {
    match (1..=LONGEST_NAME).contains(&name.len()) && !name.contains(char::is_control) {
        true => Ok(()),
        false => {
            let length = name.len();
            let rule = format!("must be 1 to {LONGEST_NAME} bytes without control characters; it has {length} bytes");
            Err(Status::invalid_argument(format!("{what}: {rule}")))
        }
    }
}

/// It is secret.
impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Session(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_of_the_session_that_made_it_and_of_no_other() {
        let (own, other) = (Session::new("a1b2".to_owned()), Session::new("a1b3".to_owned()));
        let name = own.name("pod-7");
        assert!(name.starts_with("pod-7-") && name.len() == "pod-7-".len() + DIGITS, "{name}");
        let mut metadata = MetadataMap::new();
        assert_eq!(Session::of(&metadata), None);
        own.carry(&mut metadata);
        let carried = Session::of(&metadata).expect("carried");
        assert!(carried.is_of(&name) && !other.is_of(&name));
        for wrong in ["", "pod-7", "pod-7-", &name[1 + "pod-7".len()..], &format!("{name}-1")] {
            assert!(!own.is_of(wrong), "{wrong}");
        }
        let shown = format!("{own:?} {metadata:?}");
        assert!(!shown.contains("a1b2"), "{shown}");
    }

    #[test]
    fn names_are_short_and_can_be_printed() {
        assert!(check_name("worker", "pod-7-0123456789abcdef").is_ok() && check_name("worker", "w").is_ok());
        for wrong in ["", "a\nb", &"a".repeat(1000)] {
            let refused = check_name("worker", wrong).expect_err(wrong);
            assert!(refused.message().starts_with("worker: ") && !refused.message().contains("aaa"), "{refused}");
        }
    }
}
