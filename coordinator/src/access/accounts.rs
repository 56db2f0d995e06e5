//! Who is known by the token of a Kubernetes service account. Whose a token is, the API server says (TokenReview); its
//! answers are kept for a moment, so that it is asked once in a few seconds for each process, however often that calls.

use std::collections::HashMap;
use std::future::ready;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::warn;

use super::revocable::Good;
use super::rules::{self, Identity, Role};
use super::{Caller, tokens};

/// Whom tokens must be meant for: one that a pod has for another service is none for the coordinator.
pub const AUDIENCE: &str = "gleaner";
/// How long answers count.
#[derive(Debug, Clone, Copy)]
struct Counts {
    /// A good one; after that only while the API server does not answer.
    good: Duration,
    /// A bad one.
    bad: Duration,
    /// Without any answer the last one.
    silence: Duration,
    /// The tokens of open calls are looked at so often: with `good` it is how long a token that is good no more can
    /// still be used.
    period: Duration,
}

const COUNTS: Counts = Counts {
    good: Duration::from_secs(4),
    bad: Duration::from_secs(10),
    silence: Duration::from_secs(600),
    period: Duration::from_secs(1),
};
/// For one answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Tokens that are asked for at once of which nothing is known yet: whoever sends garbage keeps the API server no
/// busier.
const STRANGERS: usize = 16;
/// Tokens of which an answer is kept.
const MOST_TOKENS: usize = 16_384;
/// Open calls whose tokens are asked for again at once.
const PARALLEL: usize = 8;

/// `ROLE=NAMESPACE/ACCOUNT`: pods of that service account may call as that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountRole {
    role: Role,
    namespace: String,
    account: String,
}

impl FromStr for AccountRole {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const WANTED: &str = "ROLE=NAMESPACE/ACCOUNT is wanted, such as worker=gleaner/worker";
        let (role, account) = text.split_once('=').ok_or(WANTED)?;
        let role = Role::named(role).ok_or_else(|| {
            let roles: Vec<&str> = Role::ALL.iter().map(|role| role.name()).collect();
            format!("{role:?} is no role; there are {}", roles.join(", "))
        })?;
        let (namespace, account) = account.split_once('/').ok_or(WANTED)?;
        for name in [namespace, account] {
            let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-.".contains(c));
            if !is_name {
                return Err(format!("{name:?} is no name of a namespace or an account; {WANTED}"));
            }
        }
        Ok(Self { role, namespace: namespace.to_owned(), account: account.to_owned() })
    }
}

/// Whose a token is, as the API server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Where the account is.
    pub namespace: String,
    /// Its name.
    pub account: String,
    /// The pod that the token was made for, if it was made for one.
    pub pod: Option<String>,
}

/// Who asks the API server.
pub trait Reviewer: Send + Sync {
    /// Whose token it is, if it is one for [`AUDIENCE`] and good now.
    ///
    /// An error says why there is no answer.
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<Account>, String>>;
}

/// Service accounts that may call.
pub(super) struct Accounts {
    roles: Vec<AccountRole>,
    reviewer: Arc<dyn Reviewer>,
    counts: Counts,
    strangers: Semaphore,
    /// By the tokens' digests.
    known: Mutex<HashMap<[u8; 32], Arc<Known>>>,
}

/// What is known of one token; whoever has a call open with it holds it.
pub(super) struct Known {
    token: String,
    /// Locked while the API server is asked, so that others who call with the token wait for its answer.
    answer: tokio::sync::Mutex<Option<Answer>>,
}

#[derive(Debug, Clone)]
struct Answer {
    account: Option<Account>,
    /// When it was given.
    at: Instant,
    /// When the API server was last asked.
    asked: Instant,
    /// Cancelled when the token is good no more.
    revoked: CancellationToken,
}

impl Answer {
    fn is_fresh(&self, counts: &Counts) -> bool {
        self.asked.elapsed() < if self.account.is_some() { counts.good } else { counts.bad }
    }
}

impl Known {
    /// Whether what is known of the token, with which no call is open, spares anybody from asking.
    fn is_of_use(&self, counts: &Counts) -> bool {
        // Whoever holds the lock asks just now.
        self.answer.try_lock().map_or(true, |answer| {
            answer.as_ref().is_some_and(|answer| match answer.account {
                Some(_) => answer.at.elapsed() < counts.silence,
                None => answer.is_fresh(counts),
            })
        })
    }
}

impl Accounts {
    pub(super) fn new(roles: Vec<AccountRole>, reviewer: Arc<dyn Reviewer>) -> Self {
        Self { roles, reviewer, counts: COUNTS, strangers: Semaphore::new(STRANGERS), known: Mutex::default() }
    }

    /// Who calls a method with a token, if it is allowed.
    ///
    /// # Errors
    /// The refusal.
    pub(super) async fn admit(&self, method: &str, token: &str) -> Result<Caller, Status> {
        if !is_signed(token) {
            return Err(tokens::unknown());
        }
        let known = self.known(token)?;
        let answer = self.answer(&known).await?;
        let account = answer.account.as_ref().ok_or_else(|| {
            Status::unauthenticated(format!(
                "Kubernetes does not know the token, or it is not for the audience {AUDIENCE:?}, or its pod is gone"
            ))
        })?;
        let identity = self.identify(account, method)?;
        Ok(Caller {
            identity: Some(identity),
            good: Some(Good { revoked: answer.revoked.clone(), _held: Some(known) }),
        })
    }

    /// As what an account may call a method.
    fn identify(&self, account: &Account, method: &str) -> Result<Identity, Status> {
        let Account { namespace, account, pod } = account;
        let of_account = |known: &&AccountRole| known.namespace == *namespace && known.account == *account;
        let name: Arc<str> = match pod {
            Some(pod) => format!("{namespace}/{account}/{pod}").into(),
            None => format!("{namespace}/{account}").into(),
        };
        let mut refused = None;
        for AccountRole { role, .. } in self.roles.iter().filter(of_account) {
            let identity = Identity { name: Arc::clone(&name), role: *role };
            match rules::allowed(method, Some(&identity)) {
                Ok(()) => return Ok(identity),
                Err(refusal) => refused = Some(refusal),
            }
        }
        Err(refused.map_or_else(
            || {
                let message = format!(
                    "the service account {namespace}/{account} is none of the coordinator's --service-accounts"
                );
                Status::permission_denied(message)
            },
            Status::from,
        ))
    }

    /// What is known of a token now.
    async fn answer(&self, known: &Known) -> Result<Answer, Status> {
        let mut state = known.answer.lock().await;
        if let Some(answer) = state.as_ref().filter(|answer| answer.is_fresh(&self.counts)) {
            return Ok(answer.clone());
        }
        let good = state.as_ref().filter(|answer| answer.account.is_some()).cloned();
        let _stranger = match &good {
            Some(_) => None,
            None => Some(self.strangers.try_acquire().map_err(|_| {
                Status::resource_exhausted("too many unknown tokens are asked for at once; try again in a moment")
            })?),
        };
        let asked = timeout(PATIENCE, self.reviewer.review(&known.token)).await;
        let asked = asked.unwrap_or_else(|_| Err(format!("no answer within {} s", PATIENCE.as_secs())));
        let now = Instant::now();
        let next = match (asked, &good) {
            (Ok(account), Some(good)) if account == good.account => {
                Some(Answer { at: now, asked: now, ..good.clone() })
            }
            (Ok(account), _) => Some(Answer { account, at: now, asked: now, revoked: CancellationToken::new() }),
            (Err(error), Some(good)) if good.at.elapsed() < self.counts.silence => {
                warn!(error, "Kubernetes does not say whether a token is still good; it counts meanwhile");
                Some(Answer { asked: now, ..good.clone() })
            }
            (Err(error), _) => {
                warn!(error, "Kubernetes does not say whose a token is");
                None
            }
        };
        let stays = next.as_ref().is_some_and(|next| next.account.is_some());
        if let Some(good) = good.filter(|_| !stays) {
            good.revoked.cancel();
        }
        state.clone_from(&next);
        // What went wrong is for whoever runs the cluster.
        next.ok_or_else(|| Status::unavailable("Kubernetes does not say now whose the token is; try again in a moment"))
    }

    /// Asks again and again for the tokens of open calls, which end with them.
    pub(super) async fn follow(&self) {
        loop {
            tokio::time::sleep(self.counts.period).await;
            let open: Vec<Arc<Known>> = {
                let mut all = self.lock();
                all.retain(|_, known| Arc::strong_count(known) > 1 || known.is_of_use(&self.counts));
                all.values().filter(|known| Arc::strong_count(known) > 1).cloned().collect()
            };
            let asked = futures::stream::iter(open).map(async |known| drop(self.answer(&known).await));
            asked.buffer_unordered(PARALLEL).for_each(|()| ready(())).await;
        }
    }

    /// Where what is known of a token stands.
    #[allow(clippy::result_large_err, reason = "as services return it")]
    fn known(&self, token: &str) -> Result<Arc<Known>, Status> {
        let digest = Sha256::digest(token).into();
        let mut all = self.lock();
        if all.len() >= MOST_TOKENS && !all.contains_key(&digest) {
            return Err(Status::resource_exhausted("there are too many tokens at once; try again in a moment"));
        }
        let new = || Arc::new(Known { token: token.to_owned(), answer: tokio::sync::Mutex::default() });
        Ok(Arc::clone(all.entry(digest).or_insert_with(new)))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Arc<Known>>> {
        // Nothing under the lock can leave it half changed.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether it looks like what the API server signs: three parts of base64url. Anything else is refused without asking.
fn is_signed(token: &str) -> bool {
    // They have about 1,200 bytes.
    if token.len() > 4_096 {
        return false;
    }
    let is_part =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    token.split('.').count() == 3 && token.split('.').all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tonic::Code;

    const LEASE: &str = "/gleaner.v1.FetchService/LeaseShard";
    const STATUS: &str = "/gleaner.v1.RunService/GetStatus";

    /// A tenth, and silence for less.
    const QUICK: Counts = Counts {
        good: Duration::from_millis(400),
        bad: Duration::from_secs(1),
        silence: Duration::from_secs(4),
        period: Duration::from_millis(100),
    };

    /// Says of each token what was written down, or nothing at all.
    #[derive(Default)]
    struct Scripted {
        known: Mutex<HashMap<String, Account>>,
        silent: Mutex<bool>,
        asked: AtomicU32,
    }

    impl Scripted {
        fn tell(&self, token: &str, account: Option<(&str, &str)>) {
            let mut known = self.known.lock().expect("no panic");
            match account {
                None => drop(known.remove(token)),
                Some((namespace, account)) => {
                    let (namespace, account) = (namespace.to_owned(), account.to_owned());
                    known.insert(token.to_owned(), Account { namespace, account, pod: Some("pod-0".to_owned()) });
                }
            }
        }

        fn be_silent(&self, silent: bool) {
            *self.silent.lock().expect("no panic") = silent;
        }

        fn asked(&self) -> u32 {
            self.asked.swap(0, Ordering::Relaxed)
        }
    }

    impl Reviewer for Scripted {
        fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<Account>, String>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                match *self.silent.lock().expect("no panic") {
                    true => Err("connection refused".to_owned()),
                    false => Ok(self.known.lock().expect("no panic").get(token).cloned()),
                }
            })
        }
    }

    fn accounts() -> (Arc<Scripted>, Arc<Accounts>) {
        let script = Arc::new(Scripted::default());
        let roles = ["worker=gleaner/worker", "worker=gleaner/both", "viewer=gleaner/both"];
        let roles = roles.map(|text| text.parse().expect("ROLE=NAMESPACE/ACCOUNT")).to_vec();
        let reviewer: Arc<dyn Reviewer> = Arc::<Scripted>::clone(&script);
        (script, Arc::new(Accounts { counts: QUICK, ..Accounts::new(roles, reviewer) }))
    }

    async fn code(accounts: &Accounts, method: &str, token: &str) -> Result<String, Code> {
        let caller = accounts.admit(method, token).await.map_err(|status| status.code())?;
        Ok(caller.identity.map(|identity| format!("{} {}", identity.role, identity.name)).unwrap_or_default())
    }

    #[tokio::test]
    async fn a_pod_calls_as_what_its_account_may_and_is_asked_for_once_in_a_few_seconds() {
        let (script, accounts) = accounts();
        script.tell("a.b.c", Some(("gleaner", "worker")));
        script.tell("d.e.f", Some(("gleaner", "both")));
        script.tell("g.h.i", Some(("other", "worker")));
        // Fewer than take as long as an answer counts.
        for _ in 0..10 {
            let (one, two) = tokio::join!(code(&accounts, LEASE, "a.b.c"), code(&accounts, STATUS, "a.b.c"));
            assert_eq!((one.as_deref(), two), (Ok("worker gleaner/worker/pod-0"), Err(Code::PermissionDenied)));
        }
        assert_eq!(script.asked(), 1);
        tokio::time::sleep(QUICK.good).await;
        assert!(code(&accounts, LEASE, "a.b.c").await.is_ok() && script.asked() == 1);
        assert_eq!(code(&accounts, STATUS, "d.e.f").await.as_deref(), Ok("viewer gleaner/both/pod-0"));
        assert_eq!(code(&accounts, LEASE, "d.e.f").await.as_deref(), Ok("worker gleaner/both/pod-0"));
        assert_eq!(code(&accounts, LEASE, "g.h.i").await, Err(Code::PermissionDenied));
        script.asked();
        for garbage in ["", "a", "a.b", "a..c", "a.b.c.d", "a.b.ü", &"a.b.c".repeat(1_000)] {
            assert_eq!(code(&accounts, LEASE, garbage).await, Err(Code::Unauthenticated), "{garbage}");
        }
        assert_eq!(script.asked(), 0, "nobody asks for what cannot be a token");
        for _ in 0..10 {
            assert_eq!(code(&accounts, LEASE, "x.y.z").await, Err(Code::Unauthenticated));
        }
        assert_eq!(script.asked(), 1);
        let guesses: Vec<String> = (0..100).map(|n| format!("x.y.{n}")).collect();
        let all = futures::future::join_all(guesses.iter().map(|guess| code(&accounts, LEASE, guess))).await;
        let put_off = all.iter().filter(|answer| **answer == Err(Code::ResourceExhausted)).count();
        assert_eq!((script.asked() as usize, put_off), (STRANGERS, 100 - STRANGERS));
        for text in ["worker", "worker=", "worker=gleaner", "boss=gleaner/worker", "worker=gleaner/", "worker=*/worker"]
        {
            assert!(text.parse::<AccountRole>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn what_a_pod_has_open_ends_with_it_and_silence_is_borne_for_a_while() {
        let (script, accounts) = accounts();
        script.tell("a.b.c", Some(("gleaner", "worker")));
        let open = accounts.admit(LEASE, "a.b.c").await.expect("good").good.expect("it can end");
        let following = Arc::clone(&accounts);
        tokio::spawn(async move { following.follow().await });
        script.be_silent(true);
        tokio::time::sleep(2 * QUICK.bad).await;
        assert!(!open.revoked.is_cancelled() && code(&accounts, LEASE, "a.b.c").await.is_ok());
        assert_eq!(code(&accounts, LEASE, "d.e.f").await, Err(Code::Unavailable), "of whom nothing is known");
        script.be_silent(false);
        tokio::time::sleep(2 * QUICK.good).await;
        script.tell("a.b.c", None);
        timeout(Duration::from_secs(20), open.revoked.cancelled()).await.expect("it ends");
        assert_eq!(code(&accounts, LEASE, "a.b.c").await, Err(Code::Unauthenticated));
        drop(open);
        // It comes back, and with no answer for too long it goes again.
        tokio::time::sleep(QUICK.bad).await;
        script.tell("a.b.c", Some(("gleaner", "worker")));
        let open = accounts.admit(LEASE, "a.b.c").await.expect("good").good.expect("it can end");
        script.be_silent(true);
        tokio::time::sleep(QUICK.silence / 2).await;
        assert!(!open.revoked.is_cancelled());
        tokio::time::sleep(QUICK.silence).await;
        assert!(open.revoked.is_cancelled());
        assert_eq!(code(&accounts, LEASE, "a.b.c").await, Err(Code::Unavailable));
        drop(open);
        script.be_silent(false);
        let mut forgotten = tokio::time::interval(QUICK.period);
        let all_are = async {
            while !accounts.lock().is_empty() {
                forgotten.tick().await;
            }
        };
        timeout(Duration::from_secs(20), all_are).await.expect("what is of no use is forgotten");
    }
}
