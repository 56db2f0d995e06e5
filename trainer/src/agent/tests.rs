//! The agent against a coordinator that does as the test says, with shells in the place of ranks.

use std::pin::Pin;
use std::sync::Mutex;

use futures::{Stream, TryStreamExt};
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use proto::cluster::ClusterRecord;
use proto::pb::trainer_service_server::{TrainerService, TrainerServiceServer};
use proto::{Stored, keys};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

type ToAgent = mpsc::Sender<Result<pb::CoordinatorMessage, Status>>;

/// Hands each new stream to the test; callers that know their cluster must be of this one.
struct Puppet(mpsc::Sender<(Streaming<pb::AgentMessage>, ToAgent)>, Arc<Mutex<String>>);

#[tonic::async_trait]
impl TrainerService for Puppet {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<pb::CoordinatorMessage, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<pb::AgentMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let cluster = self.1.lock().expect("nobody panics").clone();
        proto::cluster::admit(&cluster, request.metadata())?;
        let (to_agent, messages) = mpsc::channel(16);
        self.0.send((request.into_inner(), to_agent)).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

struct Stage {
    streams: mpsc::Receiver<(Streaming<pb::AgentMessage>, ToAgent)>,
    store: Arc<dyn ObjectStore>,
    cluster: Arc<Mutex<String>>,
    shutdown: CancellationToken,
    agent: tokio::task::JoinHandle<Result<()>>,
}

impl Stage {
    /// An agent with two devices whose ranks run `script`.
    async fn with(script: &str) -> Self {
        Self::of_run(script, None).await
    }

    /// The same, started for a run.
    async fn of_run(script: &str, only: Option<&str>) -> Self {
        // Free again at once, for the server; the agent tries until it is there.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        drop(listener);
        let coordinator = format!("http://{address}");
        let (send, streams) = mpsc::channel(4);
        let cluster = Arc::new(Mutex::new("first".to_owned()));
        let service = TrainerServiceServer::new(Puppet(send, Arc::clone(&cluster)));
        tokio::spawn(tonic::transport::Server::builder().serve(address, service));
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let config = Config {
            advertise_address: None,
            interface: None,
            devices: Some("cpu:2".to_owned()),
            cache: Default::default(),
            run: only.map(str::to_owned),
            leave_seconds: 10,
        };
        let dial = Dial::new(&coordinator).expect("an address");
        let shutdown = CancellationToken::new();
        let command = ["sh", "-c", script].map(OsString::from).to_vec();
        let agent =
            tokio::spawn(run("agent".to_owned(), config, dial, store.clone(), command, |_| {}, shutdown.clone()));
        Self { streams, store, cluster, shutdown, agent }
    }

    /// Makes store and coordinator those of this cluster.
    async fn be(&self, id: &str) {
        let record = ClusterRecord { format: 1, nonce: String::new(), id: id.to_owned(), at_millis: 0 };
        self.store.put(&keys::CLUSTER.into(), record.to_json().into()).await.expect("memory takes it");
        id.clone_into(&mut self.cluster.lock().expect("nobody panics"));
    }

    async fn next_stream(&mut self) -> (Streaming<pb::AgentMessage>, ToAgent) {
        timeout(DEADLINE, self.streams.recv()).await.expect("in time").expect("the server lives")
    }
}

async fn tell(to: &ToAgent, message: coordinator_message::Message) {
    to.send(Ok(pb::CoordinatorMessage { message: Some(message) })).await.expect("the stream is open");
}

/// The next message that `of` knows.
async fn hear<T>(from: &mut Streaming<pb::AgentMessage>, of: impl Fn(agent_message::Message) -> Option<T>) -> T {
    let heard = async {
        loop {
            let message = from.message().await.expect("the stream is open").expect("it goes on");
            if let Some(found) = message.message.and_then(&of) {
                return found;
            }
        }
    };
    timeout(DEADLINE, heard).await.expect("in time")
}

fn join(device: u32) -> coordinator_message::Message {
    let join = pb::Join { run: "r".into(), generation: 4, device, rank: device, world_size: 2, ..Default::default() };
    coordinator_message::Message::Join(join)
}

fn hello(message: agent_message::Message) -> Option<pb::Hello> {
    if let agent_message::Message::Hello(hello) = message { Some(hello) } else { None }
}

fn left(message: agent_message::Message) -> Option<(u32, pb::Left)> {
    match message {
        agent_message::Message::Rank(pb::RankMessage {
            device,
            message: Some(rank_message::Message::Left(left)),
            ..
        }) => Some((device, left)),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_dies_is_reported_with_its_status_and_its_words_are_in_the_store() {
    let mut stage = Stage::with("seq 1000 >&2; echo out of luck >&2; exit 3").await;
    let (mut said, to) = stage.next_stream().await;
    let hello = hear(&mut said, hello).await;
    assert_eq!(
        (hello.advertise_address.as_str(), hello.devices),
        ("127.0.0.1", vec!["cpu".to_owned(), "cpu".to_owned()])
    );
    tell(&to, coordinator_message::Message::Welcome(pb::Welcome { term: 6 })).await;
    tell(&to, coordinator_message::Message::Serve(pb::Serve { run: "r".into(), generation: 4 })).await;
    let serving = |message| if let agent_message::Message::Serving(serving) = message { Some(serving) } else { None };
    let serving = hear(&mut said, serving).await;
    assert_eq!((serving.generation, serving.error.as_str()), (4, ""));
    let port = u16::try_from(serving.port).expect("a port");
    tokio::task::spawn_blocking(move || torch::Store::connect("127.0.0.1", port, DEADLINE))
        .await
        .expect("no panic")
        .expect("it serves");
    tell(&to, join(1)).await;
    let (device, left) = hear(&mut said, left).await;
    assert_eq!((device, left.cause()), (1, Cause::Exited));
    assert_eq!(left.detail, "exit status: 3; it last wrote: 998 | 999 | 1000 | out of luck");
    stage.shutdown.cancel();
    stage.agent.await.expect("no panic").expect("an orderly end");
    let files: Vec<_> = stage.store.list(None).try_collect().await.expect("memory lists");
    assert_eq!(files.len(), 1);
    let log = stage.store.get(&files[0].location).await.expect("it was listed").bytes().await.expect("it is there");
    assert_eq!(files[0].location.as_ref(), "runs/r/logs/000004-0001-000001.log");
    assert!(log.starts_with(b"1\n2\n") && log.ends_with(b"1000\nout of luck\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_outlive_the_coordinator_and_are_offered_to_the_next_one() {
    let mut stage = Stage::with("cat > /dev/null").await;
    let (mut said, to) = stage.next_stream().await;
    assert!(hear(&mut said, hello).await.occupied.is_empty());
    tell(&to, coordinator_message::Message::Welcome(pb::Welcome { term: 6 })).await;
    tell(&to, join(0)).await;
    let beat = |message| if let agent_message::Message::Heartbeat(beat) = message { Some(beat) } else { None };
    while hear(&mut said, beat).await.devices[0].silent_millis == 0 {}
    drop((said, to));

    let (mut said, to) = stage.next_stream().await;
    let hello = hear(&mut said, hello).await;
    assert_eq!(hello.term_seen, 6);
    let occupied = pb::Occupied { device: 0, run: "r".into(), generation: 4, rank: 0, joined: true, step: 0 };
    assert_eq!(hello.occupied, [occupied]);
    let kill = |generation| pb::Kill { device: 0, run: "r".into(), generation };
    let rank =
        |message| if let agent_message::Message::Heartbeat(beat) = message { Some(beat.devices[0].rank) } else { None };
    // This one was on its way for longer than the rank has been in its generation.
    tell(&to, coordinator_message::Message::Kill(kill(3))).await;
    for _ in 0..3 {
        assert!(hear(&mut said, rank).await.is_some(), "it goes on");
    }
    tell(&to, coordinator_message::Message::Kill(kill(4))).await;
    assert_eq!(hear(&mut said, left).await.0, 0);
    stage.shutdown.cancel();
    stage.agent.await.expect("no panic").expect("an orderly end");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_store_is_replaced_comes_to_the_new_cluster_without_the_old_ones_ranks_and_term() {
    let mut stage = Stage::with("cat > /dev/null").await;
    // There is no cluster before a coordinator has started.
    drop(stage.next_stream().await);
    stage.be("first").await;
    let (mut said, to) = stage.next_stream().await;
    tell(&to, coordinator_message::Message::Welcome(pb::Welcome { term: 6 })).await;
    tell(&to, join(0)).await;
    let rank =
        |message| if let agent_message::Message::Heartbeat(beat) = message { Some(beat.devices[0].rank) } else { None };
    while hear(&mut said, rank).await.is_none() {}

    stage.be("second").await;
    drop((said, to));
    let (mut said, to) = stage.next_stream().await;
    let hello = hear(&mut said, hello).await;
    assert_eq!((hello.term_seen, hello.occupied), (0, vec![]));
    tell(&to, coordinator_message::Message::Welcome(pb::Welcome { term: 1 })).await;
    tell(&to, join(0)).await;
    while hear(&mut said, rank).await.is_none() {}
    stage.shutdown.cancel();
    stage.agent.await.expect("no panic").expect("an orderly end");
}

/// All on one thread, so that whatever holds that up holds up the agent.
#[tokio::test]
async fn an_agent_that_was_held_up_takes_its_own_silence_for_no_ranks() {
    // Frames without a byte: signs of life.
    let mut stage = Stage::with("while sleep 0.05; do printf '\\0\\0\\0\\0'; done").await;
    let (mut said, to) = stage.next_stream().await;
    tell(&to, coordinator_message::Message::Welcome(pb::Welcome { term: 6 })).await;
    tell(&to, join(0)).await;
    let beat = |message| match message {
        agent_message::Message::Heartbeat(beat) if beat.devices[0].rank.is_some() => {
            Some(beat.devices[0].silent_millis)
        }
        _ => None,
    };
    hear(&mut said, beat).await;
    let held_up = 4000;
    std::thread::sleep(Duration::from_millis(held_up));
    for _ in 0..8 {
        let silent = hear(&mut said, beat).await;
        assert!(silent < held_up / 2, "the rank spoke all the time, and is said to be silent for {silent} ms");
    }
    tell(&to, coordinator_message::Message::Kill(pb::Kill { device: 0, run: "r".into(), generation: 4 })).await;
    assert_eq!(hear(&mut said, left).await.0, 0);
    stage.shutdown.cancel();
    stage.agent.await.expect("no panic").expect("an orderly end");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_started_for_a_run_says_so_and_ends_with_it() {
    for (state, how) in [(pb::RunState::Done, None), (pb::RunState::Failed, Some("run \"r\" has failed"))] {
        let mut stage = Stage::of_run("cat > /dev/null", Some("r")).await;
        let (mut said, to) = stage.next_stream().await;
        assert_eq!(hear(&mut said, hello).await.only_run, "r");
        tell(&to, coordinator_message::Message::Welcome(pb::Welcome { term: 6 })).await;
        let ack = |ended: pb::RunState| {
            coordinator_message::Message::HeartbeatAck(pb::HeartbeatAck { acknowledged: 0, ended: ended.into() })
        };
        let leaving = |message| match message {
            agent_message::Message::Heartbeat(beat) => Some(beat.leaving),
            _ => None,
        };
        for _ in 0..4 {
            tell(&to, ack(pb::RunState::Unspecified)).await;
            assert!(!hear(&mut said, leaving).await, "the run goes on");
        }
        tell(&to, ack(state)).await;
        let ended = timeout(DEADLINE, stage.agent).await.expect("in time").expect("no panic");
        assert_eq!(ended.err().map(|error| error.to_string()).as_deref(), how);
    }
}
