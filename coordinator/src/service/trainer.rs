//! `TrainerService`: for trainer agents.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto::keys;
use proto::pb::agent_message::Message;
use proto::pb::rank_message::Message as Report;
use proto::pb::trainer_service_server::TrainerService;
use proto::pb::{self};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use crate::access::Speaker;
use crate::error::Error;
use crate::runs::Runs;

/// An agent must say hello at once, and something every second from then on.
const SILENCE: Duration = Duration::from_secs(30);

/// Messages to one agent that may be under way.
const UNDER_WAY: usize = 1024;

/// See `trainer.proto`.
pub(crate) struct TrainerApi {
    runs: Arc<Runs>,
    connections: AtomicU64,
}

impl TrainerApi {
    pub(crate) fn new(runs: Arc<Runs>) -> Self {
        Self { runs, connections: AtomicU64::new(0) }
    }
}

#[tonic::async_trait]
impl TrainerService for TrainerApi {
    type ConnectStream = ReceiverStream<Result<pb::CoordinatorMessage, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<pb::AgentMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let speaker = Speaker::of(&request);
        let mut stream = request.into_inner();
        let Some(Message::Hello(hello)) = next(&mut stream).await? else {
            return Err(Error::Invalid("the first message must be `hello`".to_owned()).into());
        };
        speaker.is("agent", &hello.agent)?;
        self.runs.term.observe(hello.term_seen)?;
        if hello.agent.is_empty() || hello.advertise_address.is_empty() {
            return Err(Error::Invalid("hello.agent and hello.advertise_address must not be empty".to_owned()).into());
        }
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let (outgoing, receiver) = mpsc::channel(UNDER_WAY);
        let welcome = pb::coordinator_message::Message::Welcome(pb::Welcome { term: self.runs.term.number() });
        let _ = outgoing.try_send(Ok(pb::CoordinatorMessage { message: Some(welcome) }));
        let runs = Arc::clone(&self.runs);
        tokio::spawn(async move {
            let agent = hello.agent.clone();
            runs.connect(hello, connection, outgoing).await;
            while let Ok(Some(message)) = next(&mut stream).await {
                if !is_of_own_run(&message) {
                    warn!(agent, "agent names objects that are not of its run: its stream ends");
                    break;
                }
                runs.message(&agent, connection, message).await;
            }
            runs.disconnect(&agent, connection).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Whether a report names no objects but those of its own run: what it names is read for others later.
fn is_of_own_run(message: &Message) -> bool {
    let Message::Rank(report) = message else { return true };
    let (key, files) = match &report.message {
        Some(Report::Checkpointed(made)) => (&made.key, &made.digests),
        Some(Report::Finished(finished)) => (&finished.key, &finished.digests),
        _ => return true,
    };
    let is_name = |part: &str| !matches!(part, "" | "." | "..");
    let rest = key.strip_prefix(&keys::run(&report.run)).and_then(|rest| rest.strip_prefix('/'));
    rest.is_some_and(|rest| rest.split('/').all(is_name))
        && files.keys().all(|file| is_name(file) && !file.contains('/'))
}

async fn next(stream: &mut Streaming<pb::AgentMessage>) -> Result<Option<Message>, Status> {
    let message = tokio::time::timeout(SILENCE, stream.message()).await;
    let message = message.map_err(|_| Status::deadline_exceeded("nothing was heard of the agent"))??;
    Ok(message.and_then(|message| message.message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_names_objects_of_its_own_run_alone() {
        let finished = |run: &str, key: &str, file: &str| {
            let digests = [(file.to_owned(), String::new())].into();
            let message = Some(Report::Finished(pb::Finished { key: key.to_owned(), digests }));
            is_of_own_run(&Message::Rank(pb::RankMessage {
                run: run.to_owned(),
                message,
                ..pb::RankMessage::default()
            }))
        };
        let own = keys::model("birds-1", 2, "n");
        assert!(finished("birds-1", &own, "model.onnx"));
        assert!(!finished("birds", &own, "model.onnx"), "another run's");
        for (key, file) in
            [("runs", "a"), ("", "a"), ("runs/birds-1", "a"), ("runs/birds-1/../x", "a"), ("datasets/a-1", "a")]
        {
            assert!(!finished("birds-1", key, file), "{key}");
        }
        for file in ["", "..", "../spec.json", "a/b"] {
            assert!(!finished("birds-1", &own, file), "{file}");
        }
        let made =
            Report::Checkpointed(pb::Checkpointed { key: keys::checkpoint("a", 1, 2, "n"), ..Default::default() });
        let report =
            |run: &str| pb::RankMessage { run: run.to_owned(), message: Some(made.clone()), ..Default::default() };
        assert!(is_of_own_run(&Message::Rank(report("a"))) && !is_of_own_run(&Message::Rank(report("b"))));
    }
}
