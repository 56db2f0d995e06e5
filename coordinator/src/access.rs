//! Who may do what. Every call passes the layer in front of all services, which finds out who calls and asks the table;
//! what is not in the table is refused.
//!
//! - `rules` (pure): roles, and the table of methods;
//! - `tokens`, `clients` (pure): how somebody is known, by a token or by a certificate;
//! - `accounts`: or by the token of a Kubernetes service account;
//! - `layer`, `revocable`: the check, and the end of what a revoked token has open;
//! - `listening` (pure): where a coordinator may listen unless somebody says that it is open on purpose.

mod accounts;
mod clients;
mod layer;
mod listening;
mod revocable;
mod rules;
mod tokens;

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use proto::session::{self, Session};
use tonic::{Request, Status};
use tracing::{info, warn};

use self::accounts::Accounts;
pub use self::accounts::{AUDIENCE, Account, AccountRole, Reviewer};
pub use self::clients::ClientName;
pub(crate) use self::layer::AccessLayer;
pub use self::listening::{Protection, may_listen};
use self::revocable::Good;
use self::rules::Identity;
pub use self::rules::Role;
pub use self::tokens::NewToken;
use self::tokens::Tokens;
use crate::door::Peer;

/// How often a file of tokens is read again.
const PERIOD: Duration = Duration::from_secs(1);

/// Who may call: the tokens that are good now, service accounts, and the names of certificates. With none of them,
/// everybody may do everything.
pub(crate) struct Access {
    tokens: Option<RwLock<Tokens>>,
    clients: Vec<ClientName>,
    accounts: Option<Accounts>,
}

/// Who makes a call.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// None: it is not asked here.
    pub(crate) identity: Option<Identity>,
    /// None: he is for as long as his connection.
    good: Option<Good>,
}

/// Under which name a caller may speak.
#[derive(Debug)]
pub(crate) struct Speaker {
    /// Without tokens nobody is asked who he is.
    is_checked: bool,
    session: Option<Session>,
}

impl Speaker {
    /// Whoever makes this call.
    pub(crate) fn of<T>(request: &Request<T>) -> Self {
        let is_checked = request.extensions().get::<Caller>().is_none_or(|caller| caller.identity.is_some());
        Self { is_checked, session: Session::of(request.metadata()) }
    }

    /// Refuses who speaks under a name that is not his.
    #[allow(clippy::result_large_err, reason = "as services return it")]
    pub(crate) fn is(&self, what: &str, name: &str) -> Result<(), Status> {
        session::check_name(what, name)?;
        match &self.session {
            _ if !self.is_checked => Ok(()),
            Some(session) if session.is_of(name) => Ok(()),
            Some(_) => Err(Status::permission_denied(format!(
                "{what} {name:?} is another process: its name is of a session that its caller has not"
            ))),
            None => Err(Status::permission_denied(format!(
                "{what} {name:?} shows no session: it is of a version that has none, or somebody else speaks under its name"
            ))),
        }
    }
}

impl Access {
    /// Everybody may do everything, or those of a file of tokens, of certificates or of service accounts, what their
    /// roles may.
    ///
    /// # Errors
    /// If the file cannot be read, or is none.
    pub(crate) fn open(
        file: Option<&Path>,
        clients: Vec<ClientName>,
        (accounts, reviewer): (Vec<AccountRole>, Option<Arc<dyn Reviewer>>),
    ) -> anyhow::Result<Arc<Self>> {
        let tokens = file.map(|file| {
            let text = std::fs::read_to_string(file)?;
            anyhow::Ok(RwLock::new(Tokens::parse(&text)?))
        });
        let tokens =
            tokens.transpose().with_context(|| format!("--tokens {}", file.unwrap_or(Path::new("")).display()))?;
        let accounts = match (accounts.is_empty(), reviewer) {
            (true, _) => None,
            (false, Some(reviewer)) => Some(Accounts::new(accounts, reviewer)),
            (false, None) => anyhow::bail!("there is nobody to ask whose a service account's token is"),
        };
        Ok(Arc::new(Self { tokens, clients, accounts }))
    }

    /// The token of a service account that a call shows, where some are known.
    fn account_token<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        self.accounts.as_ref()?;
        bearer(headers.get(AUTHORIZATION)?).filter(|token| !tokens::is_ours(token))
    }

    /// Who makes a call with the token of a service account, if it is allowed.
    async fn admit_account(&self, method: &str, token: &str) -> Result<Caller, Status> {
        match &self.accounts {
            Some(accounts) => accounts.admit(method, token).await,
            None => Err(tokens::unknown()),
        }
    }

    /// Who makes a call, if it is allowed.
    #[allow(clippy::result_large_err, reason = "as services return it")]
    fn admit(&self, method: &str, headers: &HeaderMap, peer: Option<&Peer>) -> Result<Caller, Status> {
        let known = |identity| Ok(Caller { identity, good: None });
        let wants_tokens = self.tokens.is_some() || self.accounts.is_some();
        let Some(given) = headers.get(AUTHORIZATION).filter(|_| wants_tokens) else {
            let certificate = peer.and_then(|peer| peer.certificate.as_deref()).filter(|_| !self.clients.is_empty());
            if let Some(certificate) = certificate {
                return clients::identify(&self.clients, certificate, method).map(Some).and_then(known);
            }
            // Plain connections come while a cluster is rolled to TLS, and nobody on them can show a certificate.
            let asked = !self.clients.is_empty() && peer.is_some_and(|peer| peer.encrypted);
            match rules::allowed(method, None) {
                Err(refusal) if wants_tokens => return Err(refusal.into()),
                Err(rules::Refusal::NoToken { method, .. }) if asked => {
                    let message = format!("{method} needs a certificate: --tls-cert and --tls-key name one");
                    return Err(Status::unauthenticated(message));
                }
                _ => return known(None),
            }
        };
        let token = bearer(given)
            .ok_or_else(|| Status::unauthenticated("the header `authorization` must be `Bearer TOKEN`"))?;
        let tokens = self.tokens.as_ref().ok_or_else(tokens::unknown)?.read().unwrap_or_else(PoisonError::into_inner);
        let holder = tokens.holder(token).ok_or_else(tokens::unknown)?;
        rules::allowed(method, Some(&holder.identity))?;
        let good = Good { revoked: holder.revoked.clone(), _held: None };
        Ok(Caller { identity: Some(holder.identity.clone()), good: Some(good) })
    }

    /// Keeps asking whether who has calls open is still known.
    pub(crate) async fn follow_accounts(self: Arc<Self>) {
        if let Some(accounts) = &self.accounts {
            accounts.follow().await;
        }
    }

    /// Reads the file of tokens again and again. One that is no good changes nothing.
    pub(crate) async fn follow(self: Arc<Self>, file: PathBuf) {
        // What is written piece by piece has another text a moment later.
        let mut last = None;
        let mut taken = None;
        loop {
            let text = tokio::fs::read_to_string(&file).await.map_err(|error| error.to_string());
            if last.as_ref() == Some(&text) && taken.as_ref() != Some(&text) {
                self.take(&file, &text);
                taken = Some(text.clone());
            }
            last = Some(text);
            tokio::time::sleep(PERIOD).await;
        }
    }

    fn take(&self, file: &Path, text: &Result<String, String>) {
        let Some(tokens) = &self.tokens else { return };
        let file = file.display();
        match text.as_deref().map_err(Clone::clone).and_then(|text| Tokens::parse(text).map_err(|e| e.to_string())) {
            Ok(next) => match tokens.write().unwrap_or_else(PoisonError::into_inner).replace(next) {
                (0, 0) => {}
                (new, revoked) => info!(%file, new, revoked, "tokens have changed"),
            },
            Err(error) => {
                warn!(%file, error, "the tokens have changed and cannot be taken: those from before stay good")
            }
        }
    }
}

/// What a header `authorization` has.
fn bearer(header: &HeaderValue) -> Option<&str> {
    let (scheme, token) = header.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// No file lets anybody in who has none of its tokens.
#[cfg(fuzzing)]
pub(crate) fn fuzz_tokens(text: &str) {
    if let Ok(tokens) = tokens::Tokens::parse(text) {
        text.split_whitespace()
            .chain(["", "gleaner_"])
            .for_each(|guess| assert!(tokens.holder(guess).is_none(), "{guess}"));
    }
}

/// Whoever says nothing of himself may ask whether the coordinator is well, and nothing else.
#[cfg(fuzzing)]
pub(crate) fn fuzz_method(method: &str) {
    assert!(rules::allowed(method, None).is_err() || method == "/grpc.health.v1.Health/Check", "{method}");
}
