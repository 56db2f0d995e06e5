//! What a Secret of Kubernetes holds for a caller, as files and as a context: `gleaner config import-kubernetes`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::dial;
use crate::exit::Ended;
use crate::private;

/// Arguments of `gleaner config import-kubernetes`.
#[derive(Debug, clap::Args)]
pub(crate) struct ImportArgs {
    /// The context's name
    pub(super) name: String,
    /// Where its coordinator listens, as seen from here
    #[arg(long, value_name = "URL", value_parser = dial::address, default_value = "https://localhost:7070")]
    pub(super) coordinator: String,
    /// The Secret: it has `token`, or `tls.crt` with `tls.key`; and `ca.crt`, if the coordinator speaks TLS
    #[arg(long, value_name = "NAME", default_value = "tls-client")]
    secret: String,
    /// The Secret's namespace
    #[arg(long, value_name = "NAME", default_value = "gleaner")]
    namespace: String,
    /// The context of kubectl, if it is not its current one
    #[arg(long, value_name = "NAME")]
    kube_context: Option<String>,
}

/// The files that a Secret became.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) token: Option<PathBuf>,
    pub(super) ca: Option<PathBuf>,
    pub(super) cert: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
}

/// As kubectl prints it.
#[derive(Deserialize)]
struct Secret {
    #[serde(default)]
    data: BTreeMap<String, String>,
}

/// Reads the Secret by kubectl, and leaves what it holds in files of the user's own below `folder`.
///
/// # Errors
/// If kubectl does not give it, or it holds nothing to show to a coordinator.
pub(super) fn import(args: &ImportArgs, folder: &Path) -> Result<Files> {
    let ImportArgs { name, secret, namespace, kube_context, .. } = args;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(is_plain) {
        return Err(Ended::usage(format!("{name:?} is no name of a context that has files: a-z A-Z 0-9 - _ . are")));
    }
    let mut kubectl = Command::new("kubectl");
    kubectl.args(["get", "secret", secret, "--namespace", namespace, "--output", "json", "--request-timeout", "15s"]);
    if let Some(context) = kube_context {
        kubectl.args(["--context", context]);
    }
    let answer = kubectl.output().context("kubectl cannot be run; it is what reads the Secret")?;
    if !answer.status.success() {
        bail!(
            "kubectl does not give the Secret {namespace}/{secret}: {}",
            String::from_utf8_lossy(&answer.stderr).trim()
        );
    }
    let data = read(&answer.stdout).with_context(|| format!("the Secret {namespace}/{secret}"))?;
    let folder = folder.join(name);
    private::make_folder(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let leave = |key: &str| -> Result<Option<PathBuf>> {
        let Some(text) = data.get(key) else { return Ok(None) };
        let file = folder.join(key);
        private::replace(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(Some(file))
    };
    Ok(Files { token: leave("token")?, ca: leave("ca.crt")?, cert: leave("tls.crt")?, key: leave("tls.key")? })
}

/// What the Secret holds by key.
fn read(json: &[u8]) -> Result<BTreeMap<String, String>> {
    let secret: Secret = serde_json::from_slice(json).context("kubectl's answer is no Secret")?;
    let text = |(key, value): (String, String)| {
        let bytes = STANDARD.decode(value.trim()).with_context(|| format!("{key} is not in base64"))?;
        Ok((key.clone(), String::from_utf8(bytes).with_context(|| format!("{key} is no text"))?))
    };
    // Whatever else is in it is not for us.
    let ours = |(key, _): &(String, String)| ["token", "ca.crt", "tls.crt", "tls.key"].contains(&key.as_str());
    let data: BTreeMap<String, String> = secret.data.into_iter().filter(ours).map(text).collect::<Result<_>>()?;
    let has = |key: &str| data.contains_key(key);
    if has("tls.crt") != has("tls.key") || !(has("token") || has("tls.crt")) {
        let keys: Vec<&str> = data.keys().map(String::as_str).collect();
        bail!(
            "has neither `token` nor `tls.crt` with `tls.key`, so there is nothing to show to a coordinator (of ours: {})",
            keys.join(", ")
        );
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_secret_holds_a_token_or_a_certificate_with_its_key() {
        let secret = |data: serde_json::Value| read(json!({"kind": "Secret", "data": data}).to_string().as_bytes());
        let token = secret(json!({"token": STANDARD.encode("gleaner_1"), "other": "!"})).expect("good");
        assert_eq!(token, BTreeMap::from([("token".to_owned(), "gleaner_1".to_owned())]));
        let pair = secret(json!({"tls.crt": "YQ==", "tls.key": "Yg==", "ca.crt": "Yw=="})).expect("good");
        assert_eq!(pair.values().collect::<Vec<_>>(), ["c", "a", "b"]);
        for (bad, said) in [
            (json!({}), "neither"),
            (json!({"ca.crt": "Yw=="}), "neither"),
            (json!({"tls.crt": "YQ==", "token": "Yg=="}), "neither"),
            (json!({"token": "?"}), "token is not in base64"),
            (json!({"token": "/w=="}), "token is no text"),
        ] {
            let error = format!("{:#}", secret(bad.clone()).expect_err("bad"));
            assert!(error.contains(said), "{bad}: {error}");
        }
        assert!(read(b"error").is_err());
    }
}
