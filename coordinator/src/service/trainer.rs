//! `TrainerService`: for trainer agents.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto::pb::agent_message::Message;
use proto::pb::trainer_service_server::TrainerService;
use proto::pb::{self};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

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
        let mut stream = request.into_inner();
        let Some(Message::Hello(hello)) = next(&mut stream).await? else {
            return Err(Error::Invalid("the first message must be `hello`".to_owned()).into());
        };
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
                runs.message(&agent, connection, message).await;
            }
            runs.disconnect(&agent, connection).await;
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

async fn next(stream: &mut Streaming<pb::AgentMessage>) -> Result<Option<Message>, Status> {
    let message = tokio::time::timeout(SILENCE, stream.message()).await;
    let message = message.map_err(|_| Status::deadline_exceeded("nothing was heard of the agent"))??;
    Ok(message.and_then(|message| message.message))
}
