//! Kubernetes' API server: of it the coordinator asks whose a service account's token is, and to it a trainer says what
//! its pod is worth.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coordinator::{AUDIENCE, Account, Reviewer};
use futures::future::BoxFuture;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{Certificate, Client, Method};
use serde::Deserialize;
use serde_json::json;

/// Where the API server reviews tokens.
const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
/// Where a pod finds its own account's token, and whose certificate the API server shows.
const OWN_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// For a connection to the API server.
const CONNECT: Duration = Duration::from_secs(2);
/// What the name of a service account's user begins with.
const USER: &str = "system:serviceaccount:";
/// Where the API server names the pod that a token was made for.
const POD: &str = "authentication.kubernetes.io/pod-name";
/// Of two pods a ReplicaSet takes that away first of which this is less.
#[cfg(feature = "trainer")]
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// What has changed is looked for this often, and told no more often ...
#[cfg(feature = "trainer")]
const LOOK: Duration = Duration::from_secs(2);
/// ... or this, after it could not be told.
#[cfg(feature = "trainer")]
const AGAIN: Duration = Duration::from_secs(60);
/// More of an answer is not read.
const LARGEST_ANSWER: usize = 1 << 20;

/// Where the API server is, and as whom it is asked.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct KubernetesArgs {
    /// Kubernetes' API server [default: that of the cluster that this pod is in]
    #[arg(long, env = "GLEANER_KUBERNETES_API", value_name = "URL", requires = "service_accounts")]
    kubernetes_api: Option<String>,
    /// Folder of the files `token`, shown to the API server, and `ca.crt`, its authority's certificate; both are read
    /// again for each question
    #[arg(long, env = "GLEANER_KUBERNETES_ACCOUNT", value_name = "FOLDER", default_value = OWN_ACCOUNT)]
    kubernetes_account: PathBuf,
}

impl KubernetesArgs {
    /// Asks about service accounts.
    ///
    /// # Errors
    /// If there is nothing to show to the API server.
    pub(crate) fn reviewer(self) -> Result<Arc<dyn Reviewer>> {
        let api = self.kubernetes_api.unwrap_or_else(own_api);
        let server = ApiServer::new(api, self.kubernetes_account);
        let server = server
            .context("--service-accounts: the API server cannot be asked; does the pod mount its account's token?")?;
        Ok(Arc::new(server))
    }
}

/// Which pod a trainer is in, and where it says what that is worth.
#[cfg(feature = "trainer")]
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PodArgs {
    /// The pod that this agent is in: Kubernetes is told how many ranks it has, so that of too many pods it takes idle
    /// ones away first
    #[arg(long, env = "GLEANER_POD", value_name = "NAME")]
    pod: Option<String>,
    /// Kubernetes' API server [default: that of the cluster that this pod is in]
    #[arg(long, env = "GLEANER_KUBERNETES_API", value_name = "URL", requires = "pod")]
    kubernetes_api: Option<String>,
    /// Folder of the files `token`, shown to the API server, `ca.crt`, its authority's certificate, and `namespace`,
    /// the pod's
    #[arg(long, env = "GLEANER_KUBERNETES_ACCOUNT", value_name = "FOLDER", default_value = OWN_ACCOUNT)]
    kubernetes_account: PathBuf,
}

#[cfg(feature = "trainer")]
impl PodArgs {
    /// Keeps the pod's deletion cost at the number of ranks, for as long as it is polled; never, if this is no pod.
    ///
    /// # Errors
    /// If there is nothing to show to the API server.
    pub(crate) fn tell(self, ranks: fn() -> u64) -> Result<impl Future<Output = ()>> {
        let Some(pod) = self.pod else { return Ok(futures::future::Either::Left(std::future::pending())) };
        let namespace = String::from_utf8(read(&self.kubernetes_account.join("namespace"))?)?;
        let server = ApiServer::new(self.kubernetes_api.unwrap_or_else(own_api), self.kubernetes_account);
        let server = server.context("--pod: the API server cannot be told; does the pod mount its account's token?")?;
        let path = format!("/api/v1/namespaces/{}/pods/{pod}", namespace.trim());
        Ok(futures::future::Either::Right(async move {
            let mut told = None;
            loop {
                let now = ranks();
                let mut pause = LOOK;
                if told != Some(now) {
                    let patch = json!({"metadata": {"annotations": {DELETION_COST: now.to_string()}}});
                    match server.ask(Method::PATCH, &path, "application/merge-patch+json", patch.to_string()).await {
                        Ok(_) => told = Some(now),
                        Err(error) => {
                            tracing::warn!(
                                error = format!("{error:#}"),
                                "cannot tell Kubernetes how many ranks this pod has"
                            );
                            pause = AGAIN;
                        }
                    }
                }
                tokio::time::sleep(pause).await;
            }
        }))
    }
}

/// As Kubernetes tells each container.
fn own_api() -> String {
    let told = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    match (told("KUBERNETES_SERVICE_HOST"), told("KUBERNETES_SERVICE_PORT")) {
        (Some(host), Some(port)) if host.contains(':') => format!("https://[{host}]:{port}"),
        (Some(host), Some(port)) => format!("https://{host}:{port}"),
        _ => "https://kubernetes.default.svc".to_owned(),
    }
}

struct ApiServer {
    address: String,
    account: PathBuf,
    /// With the authority that it trusts.
    client: Mutex<Option<(Vec<u8>, Client)>>,
}

impl Reviewer for ApiServer {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<Account>, String>> {
        Box::pin(async move { self.account(token).await.map_err(|error| format!("{error:#}")) })
    }
}

impl ApiServer {
    fn new(address: String, account: PathBuf) -> Result<Self> {
        let server = Self { address, account, client: Mutex::default() };
        server.client()?;
        Ok(server)
    }

    async fn account(&self, token: &str) -> Result<Option<Account>> {
        let question = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        });
        let answer = self.ask(Method::POST, REVIEWS, "application/json", question.to_string()).await?;
        let review: Review = serde_json::from_slice(&answer).context("its answer is no TokenReview")?;
        Ok(review.status.account())
    }

    /// What it answers to a request.
    async fn ask(&self, method: Method, path: &str, kind: &'static str, body: String) -> Result<Vec<u8>> {
        let (client, own) = (self.client()?, read(&self.account.join("token"))?);
        let own = String::from_utf8(own).context("the own token is no text")?;
        let asked = client
            .request(method, format!("{}{path}", self.address.trim_end_matches('/')))
            .header(AUTHORIZATION, format!("Bearer {}", own.trim()))
            .header(CONTENT_TYPE, kind)
            .body(body);
        let mut answer = asked.send().await?;
        let status = answer.status();
        let mut body = Vec::new();
        while let Some(bytes) = answer.chunk().await? {
            body.extend_from_slice(&bytes);
            if body.len() > LARGEST_ANSWER {
                bail!("its answer has more than {LARGEST_ANSWER} bytes");
            }
        }
        if !status.is_success() {
            // The API server says why in a sentence, which has nothing of the token.
            let said: Refusal = serde_json::from_slice(&body).unwrap_or_default();
            bail!("it answers {status}: {}", said.message);
        }
        Ok(body)
    }

    /// A client that trusts the authority that is in the folder now.
    fn client(&self) -> Result<Client> {
        let file = self.account.join("ca.crt");
        let pem = read(&file)?;
        // Nothing under the lock can leave it half changed.
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, client)) = client.as_ref().filter(|(authority, _)| *authority == pem) {
            return Ok(client.clone());
        }
        let authorities = Certificate::from_pem_bundle(&pem).with_context(|| file.display().to_string())?;
        let made = Client::builder().tls_certs_only(authorities).no_proxy().connect_timeout(CONNECT).build()?;
        Ok(client.insert((pem, made)).1.clone())
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// An answer of the API server that is none.
#[derive(Default, Deserialize)]
struct Refusal {
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct Review {
    status: ReviewStatus,
}

/// As in `k8s.io/api/authentication/v1`.
#[derive(Deserialize)]
struct ReviewStatus {
    #[serde(default)]
    authenticated: bool,
    #[serde(default)]
    audiences: Vec<String>,
    #[serde(default)]
    user: User,
}

#[derive(Default, Deserialize)]
struct User {
    #[serde(default)]
    username: String,
    #[serde(default)]
    extra: std::collections::BTreeMap<String, Vec<String>>,
}

impl ReviewStatus {
    /// The account whose token it is. An API server that does not know audiences names none, and its answer is not for
    /// us.
    fn account(self) -> Option<Account> {
        let is_for_us = self.authenticated && self.audiences.iter().any(|audience| audience == AUDIENCE);
        let user = self.user.username.strip_prefix(USER).filter(|_| is_for_us)?;
        let (namespace, account) = user.split_once(':')?;
        let pod = self.user.extra.get(POD).and_then(|names| names.first()).cloned();
        Some(Account { namespace: namespace.to_owned(), account: account.to_owned(), pod })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "trainer")]
    #[tokio::test]
    async fn kubernetes_is_told_how_many_ranks_a_pod_has_whenever_that_changes() {
        use std::sync::atomic::{AtomicU64, Ordering};
        static RANKS: AtomicU64 = AtomicU64::new(0);
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().expect("a folder");
        let authority = rcgen::generate_simple_self_signed(["api".to_owned()]).expect("a certificate").cert.pem();
        for (file, text) in [("token", "secret\n"), ("namespace", "gleaner"), ("ca.crt", &authority)] {
            std::fs::write(folder.path().join(file), text).expect("a folder to write to");
        }
        let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let patch = async move |headers: axum::http::HeaderMap, body: String| {
            let of = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
            let _ = told.send((of(AUTHORIZATION), of(CONTENT_TYPE), body));
            "{}"
        };
        let api = axum::Router::new().route("/api/v1/namespaces/gleaner/pods/trainer-0", axum::routing::patch(patch));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move { axum::serve(listener, api).await });
        let pod = |pod: Option<&str>| PodArgs {
            pod: pod.map(str::to_owned),
            kubernetes_api: Some(format!("http://{address}/")),
            kubernetes_account: folder.path().to_owned(),
        };
        let tell = pod(Some("trainer-0")).tell(|| RANKS.load(Ordering::Relaxed)).expect("all that it needs");
        tokio::spawn(tell);
        for ranks in [0, 3, 0] {
            RANKS.store(ranks, Ordering::Relaxed);
            let heard = tokio::time::timeout(Duration::from_secs(60), heard.recv()).await.expect("in time");
            let (token, kind, body) = heard.expect("the server lives");
            assert_eq!((&*token, &*kind), ("Bearer secret", "application/merge-patch+json"));
            assert_eq!(body, format!(r#"{{"metadata":{{"annotations":{{"{DELETION_COST}":"{ranks}"}}}}}}"#));
        }
        assert!(pod(None).tell(|| 0).is_ok(), "most agents are in no pod");
        std::fs::remove_file(folder.path().join("ca.crt")).expect("it was there");
        assert!(pod(Some("trainer-0")).tell(|| 0).is_err());
    }

    fn account(status: serde_json::Value) -> Option<Account> {
        let review: Review =
            serde_json::from_value(json!({"kind": "TokenReview", "status": status})).expect("a review");
        review.status.account()
    }

    #[test]
    fn a_token_is_an_accounts_if_it_is_good_and_for_this_audience() {
        let user = json!({"username": "system:serviceaccount:gleaner:worker", "uid": "7", "groups": ["system:serviceaccounts"],
                          "extra": {POD: ["worker-0"], "authentication.kubernetes.io/pod-uid": ["9"]}});
        let good = account(json!({"authenticated": true, "audiences": ["gleaner"], "user": user})).expect("good");
        let Account { namespace, account: name, pod } = good;
        assert_eq!((&*namespace, &*name, pod.as_deref()), ("gleaner", "worker", Some("worker-0")));
        for none in [
            json!({"authenticated": false, "error": "invalid bearer token"}),
            json!({"error": "token has expired"}),
            json!({"authenticated": true, "user": user}),
            json!({"authenticated": true, "audiences": ["https://kubernetes.default.svc"], "user": user}),
            json!({"authenticated": true, "audiences": ["gleaner"], "user": {"username": "anna"}}),
            json!({"authenticated": true, "audiences": ["gleaner"], "user": {"username": "system:serviceaccount:gleaner"}}),
        ] {
            assert_eq!(account(none.clone()), None, "{none}");
        }
    }
}
