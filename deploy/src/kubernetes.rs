//! Kubernetes' API server, of which the coordinator asks whose a service account's token is.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coordinator::{AUDIENCE, Account, Reviewer};
use futures::future::BoxFuture;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE};
use reqwest::{Certificate, Client};
use serde::Deserialize;
use serde_json::json;

/// Where a pod finds its own account's token, and whose certificate the API server shows.
const OWN_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// For a connection to the API server.
const CONNECT: Duration = Duration::from_secs(2);
/// What the name of a service account's user begins with.
const USER: &str = "system:serviceaccount:";
/// Where the API server names the pod that a token was made for.
const POD: &str = "authentication.kubernetes.io/pod-name";
/// More of an answer is not read.
const LARGEST_ANSWER: usize = 1 << 20;

/// Where the API server is, and as whom it is asked.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct KubernetesArgs {
    /// Kubernetes' API server [default: that of the cluster that this pod is in]
    #[arg(long, env = "GLEANER_KUBERNETES_API", value_name = "URL", requires = "service_accounts")]
    kubernetes_api: Option<String>,
    /// Folder of the files `token`, shown to the API server, and `ca.crt`, its authority's certificate; both are read again for each
    /// question
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
        let reviews = format!("{}/apis/authentication.k8s.io/v1/tokenreviews", api.trim_end_matches('/'));
        let server = ApiServer { reviews, account: self.kubernetes_account, client: Mutex::default() };
        server
            .client()
            .context("--service-accounts: the API server cannot be asked; does the pod mount its account's token?")?;
        Ok(Arc::new(server))
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
    /// The address of its token reviews.
    reviews: String,
    account: PathBuf,
    /// With the authority that it trusts.
    client: Mutex<Option<(Vec<u8>, Client)>>,
}

impl Reviewer for ApiServer {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<Account>, String>> {
        Box::pin(async move { self.ask(token).await.map_err(|error| format!("{error:#}")) })
    }
}

impl ApiServer {
    async fn ask(&self, token: &str) -> Result<Option<Account>> {
        let (client, own) = (self.client()?, read(&self.account.join("token"))?);
        let own = String::from_utf8(own).context("the own token is no text")?;
        let question = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        });
        let asked = client
            .post(&self.reviews)
            .header(AUTHORIZATION, format!("Bearer {}", own.trim()))
            .header(CONTENT_TYPE, "application/json")
            .body(question.to_string());
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
        let review: Review = serde_json::from_slice(&body).context("its answer is no TokenReview")?;
        Ok(review.status.account())
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
    /// The account whose token it is. An API server that does not know audiences names none, and its answer is not for us.
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
