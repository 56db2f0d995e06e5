//! Asks the cluster for sites' files that other workers may have read, and tells it of those that this one has read;
//! many in one call.

use std::sync::Arc;
use std::time::Duration;

use proto::pb::{FetchedRules, KnownRules, SiteRules};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::{sleep, timeout};

use crate::lease::Coordinator;

/// For one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// For an answer, in all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two calls, however much there is to ask for meanwhile.
const PAUSE: Duration = Duration::from_millis(20);
/// Files that one call names, and bytes of their rules after which no more are put in.
const MOST_FILES: usize = 2_000;
const MANY_BYTES: usize = 512 << 10;

#[derive(Debug)]
enum Message {
    Tell(FetchedRules),
    Ask(String, oneshot::Sender<KnownRules>),
}

/// One per process.
#[derive(Debug)]
pub(crate) struct Exchange {
    sender: mpsc::UnboundedSender<Message>,
    mail: Mutex<mpsc::UnboundedReceiver<Message>>,
}

impl Exchange {
    pub(crate) fn new() -> Self {
        let (sender, mail) = mpsc::unbounded_channel();
        Self { sender, mail: Mutex::new(mail) }
    }

    /// Tells what a file says; none: this worker does not tell.
    pub(super) fn tell(&self, url: String, rules: Option<SiteRules>) {
        // It is a courtesy: without it, somebody else reads the file once more.
        let _ = self.sender.send(Message::Tell(FetchedRules { url, rules }));
    }

    /// What the cluster knows of a file. Without an answer this worker fetches it.
    pub(super) async fn ask(&self, url: String) -> KnownRules {
        let (sender, answer) = oneshot::channel();
        let _ = self.sender.send(Message::Ask(url, sender));
        timeout(ANSWER_TIMEOUT, answer).await.ok().and_then(Result::ok).unwrap_or_default()
    }

    /// Carries questions and answers, for ever.
    pub(crate) async fn carry(&self, agent: &str, coordinator: Arc<Coordinator>) {
        let mut mail = self.mail.lock().await;
        while let Some(first) = mail.recv().await {
            let (mut fetched, mut urls, mut askers, mut bytes) = (Vec::new(), Vec::new(), Vec::new(), 0);
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Tell(told) => {
                        bytes += told.rules.as_ref().map_or(0, prost::Message::encoded_len);
                        fetched.push(told);
                    }
                    Message::Ask(url, asker) => {
                        urls.push(url);
                        askers.push(asker);
                    }
                }
                let is_full = fetched.len() + urls.len() >= MOST_FILES || bytes >= MANY_BYTES;
                next = if is_full { None } else { mail.try_recv().ok() };
            }
            match coordinator.share_rules(agent, fetched, urls, CALL_TIMEOUT).await {
                // Who has gone needs no answer.
                Ok(known) => askers.into_iter().zip(known).for_each(|(asker, known)| drop(asker.send(known))),
                Err(status) => tracing::debug!(%status, "failed to ask for what sites allow; reading it here"),
            }
            sleep(PAUSE).await;
        }
    }
}
