//! Tokens. Whoever has one is who it names; the coordinator has but their SHA-256, a line each: `name role sha256`.

use std::collections::BTreeMap;
use std::fmt;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::rules::{Identity, Role};

/// What every token begins with, so that scanners for secrets recognise one that lies where it should not.
const PREFIX: &str = "gleaner_";

/// A token that was just made: the only time that it is seen.
pub struct NewToken {
    /// What its holder stores.
    pub token: String,
    /// What the coordinator stores.
    pub line: String,
}

/// The token is secret.
impl fmt::Debug for NewToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewToken").field("line", &self.line).finish_non_exhaustive()
    }
}

impl NewToken {
    /// Makes one of 256 random bits of the system.
    ///
    /// # Errors
    /// If the name cannot stand in a line, or the system gives no random bits.
    pub fn make(role: Role, name: &str) -> Result<Self, String> {
        if !is_name(name) {
            return Err(format!("{name:?} is no name of a token: 1 to 63 of a-z A-Z 0-9 - _ . are"));
        }
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(|error| format!("the system gives no random bits: {error}"))?;
        let token = format!("{PREFIX}{}", hex::encode(random));
        let line = format!("{name} {role} {}", hex::encode(hash(&token)));
        Ok(Self { token, line })
    }
}

fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// Whether a token is of the kind that [`NewToken::make`] makes.
pub(super) fn is_ours(token: &str) -> bool {
    token.starts_with(PREFIX)
}

/// What somebody is told whose token is none.
pub(super) fn unknown() -> Status {
    Status::unauthenticated(
        "the token is not known here: it was revoked, it is another cluster's, or it was not copied whole",
    )
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// One line of a file of tokens.
#[derive(Debug, Clone)]
pub(crate) struct Holder {
    pub(crate) identity: Identity,
    hash: [u8; 32],
    /// Cancelled when the line is gone: what the holder has open ends.
    pub(crate) revoked: CancellationToken,
}

impl Holder {
    fn is_same(&self, other: &Self) -> bool {
        self.identity == other.identity && self.hash == other.hash
    }
}

/// Why a file of tokens is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokensError {
    #[error("line {line} must be `NAME ROLE SHA256`, as `gleaner token new` prints it")]
    NoLine { line: usize },
    #[error("line {line}: {role:?} is no role: {} are", Role::ALL.map(Role::name).join(", "))]
    NoRole { line: usize, role: String },
    #[error(
        "line {line}: the name or the token of {name:?} stands in line {first}, too; each holder has a line of its own"
    )]
    Twice { line: usize, name: String, first: usize },
    #[error("it names nobody, so nobody could do anything; add a line that `gleaner token new` prints")]
    Empty,
}

/// All tokens that are good, by their digests.
#[derive(Debug, Default)]
pub(crate) struct Tokens(Vec<Holder>);

impl Tokens {
    /// Reads lines of `name role sha256`. Empty ones and what follows a `#` say nothing.
    pub(crate) fn parse(text: &str) -> Result<Self, TokensError> {
        let mut holders = Vec::new();
        let (mut names, mut hashes) = (BTreeMap::new(), BTreeMap::new());
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.split('#').next().unwrap_or_default();
            let words: Vec<&str> = text.split_whitespace().collect();
            let (name, role, sha256) = match words[..] {
                [] => continue,
                [name, role, sha256] if is_name(name) => (name, role, sha256),
                _ => return Err(TokensError::NoLine { line }),
            };
            let role = Role::named(role).ok_or_else(|| TokensError::NoRole { line, role: role.to_owned() })?;
            let mut hash = [0; 32];
            hex::decode_to_slice(sha256, &mut hash).map_err(|_| TokensError::NoLine { line })?;
            if let Some(first) = names.insert(name, line).or(hashes.insert(hash, line)) {
                return Err(TokensError::Twice { line, name: name.to_owned(), first });
            }
            let identity = Identity { name: name.into(), role };
            holders.push(Holder { identity, hash, revoked: CancellationToken::new() });
        }
        holders.sort_unstable_by_key(|holder: &Holder| holder.hash);
        if holders.is_empty() { Err(TokensError::Empty) } else { Ok(Self(holders)) }
    }

    /// Whose token this is. How long it takes tells of the first bytes of digests at the most, which lead back to no
    /// token; the rest is compared in constant time.
    pub(crate) fn holder(&self, token: &str) -> Option<&Holder> {
        let given = hash(token);
        let prefix = |hash: &[u8; 32]| hash.first_chunk::<8>().copied();
        let first = self.0.partition_point(|holder| prefix(&holder.hash) < prefix(&given));
        let alike = self.0[first..].iter().take_while(|holder| prefix(&holder.hash) == prefix(&given));
        alike.fold(None, |found, holder| if holder.hash.ct_eq(&given).into() { Some(holder) } else { found })
    }

    /// What stays of these in `next` goes on; what does not is revoked. Returns how many came and how many are gone.
    pub(crate) fn replace(&mut self, mut next: Self) -> (usize, usize) {
        let before = std::mem::take(&mut self.0);
        let (mut stayed, mut gone) = (0, 0);
        for old in before {
            match next.0.iter_mut().find(|new| new.is_same(&old)) {
                Some(new) => (new.revoked, stayed) = (old.revoked, stayed + 1),
                None => {
                    old.revoked.cancel();
                    gone += 1;
                }
            }
        }
        *self = next;
        (self.0.len() - stayed, gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(name: &str, role: &str, token: &str) -> String {
        format!("{name} {role} {}", hex::encode(hash(token)))
    }

    #[test]
    fn a_token_is_known_by_its_line_and_no_other_is() {
        let made = NewToken::make(Role::Submitter, "anna").expect("made");
        assert!(made.token.starts_with(PREFIX) && made.token.len() == PREFIX.len() + 64, "{}", made.token.len());
        assert!(made.line.starts_with("anna submitter ") && !format!("{made:?}").contains(&made.token));
        let text = format!("# people\n\n{}  # from the lab\n{}\n", made.line, line("ci", "viewer", "x"));
        let tokens = Tokens::parse(&text).expect("good lines");
        let found = tokens.holder(&made.token).expect("known");
        assert_eq!(found.identity, Identity { name: "anna".into(), role: Role::Submitter });
        assert!(tokens.holder("x").is_some_and(|holder| &*holder.identity.name == "ci"));
        for unknown in ["", "gleaner_", &made.token[1..], &made.token.to_uppercase(), &made.line] {
            assert!(tokens.holder(unknown).is_none(), "{unknown}");
        }
        let another = NewToken::make(Role::Submitter, "anna").expect("made");
        assert_ne!(another.token, made.token);
        assert!(NewToken::make(Role::Admin, "two words").is_err() && NewToken::make(Role::Admin, "").is_err());
    }

    #[test]
    fn a_bad_line_is_refused_with_its_number() {
        let good = line("anna", "submitter", "a");
        let hash = |token: &str| hex::encode(super::hash(token));
        let cases = [
            ("# nobody\n\n".to_owned(), TokensError::Empty),
            (format!("{good}\nbert viewer"), TokensError::NoLine { line: 2 }),
            (format!("bert viewer {} more", hash("b")), TokensError::NoLine { line: 1 }),
            (format!("bert viewer {}", &hash("b")[1..]), TokensError::NoLine { line: 1 }),
            (format!("\n{}", line("bert", "boss", "b")), TokensError::NoRole { line: 2, role: "boss".into() }),
            (
                format!("{good}\n\n{}", line("anna", "viewer", "b")),
                TokensError::Twice { line: 3, name: "anna".into(), first: 1 },
            ),
            (
                format!("{good}\n{}", line("bert", "viewer", "a")),
                TokensError::Twice { line: 2, name: "bert".into(), first: 1 },
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(Tokens::parse(&text).expect_err(&text), expected);
        }
        let said = Tokens::parse(&line("b", "boss", "b")).expect_err("no role").to_string();
        assert!(said.contains("line 1") && said.contains("viewer, submitter"), "{said}");
    }

    proptest! {
        #[test]
        fn whatever_a_file_holds_is_taken_as_it_is_written_or_refused(text in "([a-z#]{0,4}[ \t]?(viewer|admin|x)?[ ]?[0-9a-f]{0,3}\n?){0,6}|\\PC*") {
            if let Ok(tokens) = Tokens::parse(&text) {
                prop_assert!(!tokens.0.is_empty() && tokens.0.len() <= text.lines().count());
            }
        }

        #[test]
        fn every_line_that_was_made_is_known_among_others(names in prop::collection::btree_set("[A-Za-z0-9._-]{1,63}", 1..9)) {
            let made: Vec<NewToken> = names.iter().map(|name| NewToken::make(Role::Worker, name).expect("a name")).collect();
            let text: String = made.iter().map(|made| format!("\t{}\r\n", made.line)).collect();
            let tokens = Tokens::parse(&text).expect("good lines");
            for (name, made) in names.iter().zip(&made) {
                prop_assert_eq!(&*tokens.holder(&made.token).expect("known").identity.name, name.as_str());
            }
        }
    }

    #[test]
    fn who_is_gone_or_has_another_role_is_revoked_and_who_stays_is_not() {
        let read = |lines: &[String]| Tokens::parse(&lines.join("\n")).expect("good lines");
        let mut tokens =
            read(&[line("anna", "submitter", "a"), line("bert", "viewer", "b"), line("carl", "viewer", "c")]);
        let of = |tokens: &Tokens, token| tokens.holder(token).expect("known").revoked.clone();
        let (anna, bert, carl) = (of(&tokens, "a"), of(&tokens, "b"), of(&tokens, "c"));
        let next = read(&[line("carl", "admin", "c"), line("dora", "viewer", "d"), line("anna", "submitter", "a")]);
        assert_eq!(tokens.replace(next), (2, 2));
        assert!(!anna.is_cancelled() && bert.is_cancelled() && carl.is_cancelled());
        assert!(tokens.holder("b").is_none() && !of(&tokens, "c").is_cancelled());
        assert_eq!(tokens.replace(read(&[line("dora", "viewer", "d")])), (0, 2));
        assert!(anna.is_cancelled());
    }
}
