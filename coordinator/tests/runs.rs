//! Runs over real gRPC, with a folder as the store and an agent written by hand.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use common::{Cluster, PATIENCE, put};
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};
use proto::pb::agent_message::Message as ToCoordinator;
use proto::pb::coordinator_message::Message as ToAgent;
use proto::pb::rank_message::Message as Said;
use proto::pb::run_service_client::RunServiceClient;
use proto::pb::trainer_service_client::TrainerServiceClient;
use proto::pb::{self, RunState};
use proto::run_spec::Plan;
use proto::{RunSpec, keys};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

/// A store that does not answer puts under one folder while it is held up.
#[derive(Debug)]
struct Slow {
    inner: LocalFileSystem,
    folder: &'static str,
    held: tokio::sync::watch::Sender<bool>,
}

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Slow")
    }
}

#[tonic::async_trait]
impl ObjectStore for Slow {
    async fn put_opts(&self, at: &Path, payload: PutPayload, how: PutOptions) -> object_store::Result<PutResult> {
        if at.as_ref().starts_with(self.folder) {
            self.held.subscribe().wait_for(|held| !held).await.expect("the sender is here");
        }
        self.inner.put_opts(at, payload, how).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        how: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, how).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.inner.get_opts(at, options).await
    }

    fn delete_stream(
        &self,
        at: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(at)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

struct Agent {
    to: mpsc::Sender<pb::AgentMessage>,
    from: Streaming<pb::CoordinatorMessage>,
}

impl Agent {
    async fn connect(cluster: &Cluster, occupied: Vec<pb::Occupied>) -> Self {
        let (to, outgoing) = mpsc::channel(16);
        let hello = pb::Hello {
            agent: "agent-1".to_owned(),
            advertise_address: "127.0.0.1".to_owned(),
            devices: vec!["cpu".to_owned()],
            occupied,
            ..pb::Hello::default()
        };
        let agent = ToCoordinator::Hello(hello);
        to.send(pb::AgentMessage { message: Some(agent) }).await.expect("open");
        let mut client = TrainerServiceClient::new(cluster.channel.clone());
        let from = client.connect(ReceiverStream::new(outgoing)).await.expect("connects").into_inner();
        let beating = to.clone();
        tokio::spawn(async move {
            let beat = || pb::AgentMessage { message: Some(ToCoordinator::Heartbeat(pb::Heartbeat::default())) };
            while beating.send(beat()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        });
        let mut agent = Self { to, from };
        assert!(matches!(agent.hear().await, ToAgent::Welcome(_)));
        agent
    }

    async fn hear(&mut self) -> ToAgent {
        loop {
            let message = tokio::time::timeout(PATIENCE, self.from.message()).await.expect("in time").expect("streams");
            match message.expect("open").message.expect("one of them") {
                ToAgent::HeartbeatAck(_) => {}
                message => return message,
            }
        }
    }

    async fn say(&self, message: ToCoordinator) {
        self.to.send(pb::AgentMessage { message: Some(message) }).await.expect("open");
    }

    async fn rank(&self, said: Said) {
        let run = "birds-1".to_owned();
        let message = pb::RankMessage { run, generation: 1, message: Some(said), ..Default::default() };
        self.say(ToCoordinator::Rank(message)).await;
    }
}

fn runs(cluster: &Cluster) -> RunServiceClient<Channel> {
    RunServiceClient::new(cluster.channel.clone())
}

fn point(kind: &str, step: u64, loss: f64) -> pb::Metric {
    pb::Metric { kind: kind.to_owned(), generation: 1, step, loss, ..pb::Metric::default() }
}

/// A cluster with a dataset of about a hundred images.
async fn with_dataset(folder: &std::path::Path) -> Cluster {
    let store = LocalFileSystem::new_with_prefix(folder).expect("the folder exists");
    with_dataset_on(Arc::new(store)).await
}

async fn with_dataset_on(store: Arc<dyn ObjectStore>) -> Cluster {
    let cluster = Cluster::start_on(store, 30.0).await;
    let list: String = (0..120).map(|i| format!("n{}\thttp://h{i}/picture{i}\n", i % 3)).collect();
    cluster.create("birds", "request-1", 50, &list).await.expect("a good list");
    cluster.work().await;
    cluster.sealed("birds").await;
    cluster
}

fn submit(batch: u32) -> pb::SubmitRunRequest {
    let mut spec = RunSpec::from_toml("dataset = \"birds\"").expect("one line is enough");
    (spec.train.batch, spec.ranks.failure_detection_seconds) = (batch, 2.0);
    pb::SubmitRunRequest {
        request_id: "run-1".to_owned(),
        name: String::new(),
        spec_json: spec.to_json(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_run_goes_from_its_submission_to_its_end_over_a_restart_of_the_coordinator() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = with_dataset(folder.path()).await;
    let refused = runs(&cluster).submit_run(submit(2000)).await.expect_err("more than there are");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("train.batch"), "{}", refused.message());
    let run = runs(&cluster).submit_run(submit(32)).await.expect("a good spec").into_inner();
    assert_eq!((run.run.as_str(), run.state(), run.manifest_version), ("birds-1", RunState::Waiting, 1));
    let steps = run.steps_per_epoch;
    assert!((2..=4).contains(&steps), "{steps} steps of 32 of about a hundred images");
    let again = runs(&cluster).submit_run(submit(32)).await.expect("repeated").into_inner();
    assert_eq!(again.run, "birds-1");

    let mut agent = Agent::connect(&cluster, vec![]).await;
    assert!(matches!(agent.hear().await, ToAgent::Serve(_)), "after a moment of gathering");
    let serving = pb::Serving { run: "birds-1".to_owned(), generation: 1, port: 29500, error: String::new() };
    agent.say(ToCoordinator::Serving(serving)).await;
    let ToAgent::Join(join) = agent.hear().await else { panic!("a join") };
    assert_eq!(RunSpec::from_json(&join.spec_json).expect("the stored spec").plan, Some(Plan::NEWEST), "written down");
    assert_eq!((join.store.as_str(), join.world_size, join.checkpoints), ("127.0.0.1:29500", 1, vec![]));
    let manifest = common::get(&*cluster.store, &join.manifest_key).await;
    assert_eq!(proto::shard::sha256_hex(&manifest), join.manifest_sha256);
    agent.rank(Said::Joined(pb::Joined { step: 0, steps_per_epoch: 3, damaged: vec![] })).await;
    agent.rank(Said::Stepped(pb::Stepped { step: 1, metrics: vec![point("step", 1, 3.0)] })).await;
    let key = keys::checkpoint("birds-1", 1, 1, "x");
    put(&*cluster.store, &format!("{key}/state.json"), "{}").await;
    let digests = [("state.json".to_owned(), "0".to_owned())].into();
    agent.rank(Said::Checkpointed(pb::Checkpointed { step: 1, key, digests, top1: None })).await;
    let mut watch =
        runs(&cluster).watch_run(pb::GetRunRequest { run: "birds-1".to_owned() }).await.expect("exists").into_inner();
    let checkpointed = async {
        loop {
            let run = watch.message().await.expect("streams").expect("open");
            if run.checkpoint_step == 1 {
                return run;
            }
        }
    };
    let run = tokio::time::timeout(PATIENCE, checkpointed).await.expect("in time");
    assert_eq!((run.state(), run.step, run.last_step.map(|point| point.loss)), (RunState::Running, 1, Some(3.0)));
    // Rank 0 stores its points, and its agent what it says.
    let stored = r#"{"kind":"step","generation":1,"epoch":1,"step":1,"loss":3.0,"top1":0.1,"top5":0.5,"samples":32,"learning_rate":0.1,"images_per_second":9.0,"seconds":1.0,"data_wait":0.0,"compute":1.0,"rank_wait":0.0,"network_wait":0.0,"optimizer":0.0,"slowest_rank":0,"ranks":1,"gradient_bytes":4,"link_bytes_per_second":0.0}"#;
    put(&*cluster.store, &keys::metrics("birds-1", 1, 1), stored).await;
    put(&*cluster.store, &keys::logs("birds-1", 1, 0, 1), "one\ntwo\n").await;
    cluster.kill();

    let cluster = Cluster::start(folder.path(), 30.0).await;
    let occupied = pb::Occupied { device: 0, run: "birds-1".to_owned(), generation: 1, rank: 0, joined: true, step: 2 };
    let mut agent = Agent::connect(&cluster, vec![occupied]).await;
    agent.rank(Said::Stepped(pb::Stepped { step: 3, metrics: vec![point("test", 3, 1.0)] })).await;
    agent.rank(Said::Finished(pb::Finished { key: keys::model("birds-1", 1, "x"), digests: Default::default() })).await;
    let left = pb::Left { cause: pb::left::Cause::Finished.into(), step: 3, ..Default::default() };
    agent.rank(Said::Left(left)).await;
    assert!(matches!(agent.hear().await, ToAgent::Kill(pb::Kill { device: 0, .. })));
    let run =
        runs(&cluster).get_run(pb::GetRunRequest { run: "birds-1".to_owned() }).await.expect("exists").into_inner();
    assert_eq!((run.state(), run.step, run.generation, run.steps_per_epoch), (RunState::Done, 3, 1, steps));
    let kinds: Vec<&str> = run.events.iter().map(|event| event.split("\"kind\":\"").nth(1).expect("a kind")).collect();
    for (event, kind) in kinds.iter().zip(["submitted", "generation", "checkpoint", "done"]) {
        assert!(event.starts_with(kind), "{event}");
    }
    let request = pb::GetMetricsRequest { run: "birds-1".to_owned(), kinds: vec![] };
    let points = runs(&cluster).get_metrics(request).await.expect("exists").into_inner().metrics;
    assert_eq!(points.iter().map(|p| (p.kind.as_str(), p.step)).collect::<Vec<_>>(), [("step", 1), ("test", 3)]);
    let request = pb::GetLogsRequest { run: "birds-1".to_owned(), ..pb::GetLogsRequest::default() };
    let mut logs = runs(&cluster).get_logs(request).await.expect("exists").into_inner();
    let mut lines = Vec::new();
    while let Some(line) = logs.message().await.expect("streams") {
        lines.push(line.line);
    }
    assert_eq!(lines, ["one", "two"]);
    let done = pb::ResumeRunRequest { request_id: "x".to_owned(), run: "birds-1".to_owned(), step: None, epochs: None };
    assert_eq!(runs(&cluster).resume_run(done).await.expect_err("done").code(), Code::FailedPrecondition);
    let status = runs(&cluster).get_status(pb::GetStatusRequest {}).await.expect("answers").into_inner();
    assert_eq!((status.term, status.agents[0].devices[0].occupant.as_str()), (2, ""));
    cluster.stop().await;
}

#[tokio::test]
async fn a_cancelled_run_that_waits_ends_at_once_and_can_be_resumed() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = with_dataset(folder.path()).await;
    runs(&cluster).submit_run(submit(32)).await.expect("a good spec");
    let cancel = || pb::CancelRunRequest { run: "birds-1".to_owned() };
    for _ in 0..2 {
        let run = runs(&cluster).cancel_run(cancel()).await.expect("exists").into_inner();
        assert_eq!(run.state(), RunState::Cancelled);
    }
    let nameless =
        pb::ResumeRunRequest { request_id: String::new(), run: "birds-1".to_owned(), step: None, epochs: None };
    assert_eq!(runs(&cluster).resume_run(nameless).await.expect_err("no id").code(), Code::InvalidArgument);
    let resume =
        || pb::ResumeRunRequest { request_id: "again".to_owned(), run: "birds-1".to_owned(), step: None, epochs: None };
    for _ in 0..2 {
        let run = runs(&cluster).resume_run(resume()).await.expect("it was cancelled").into_inner();
        assert_eq!(run.state(), RunState::Waiting);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let run =
        runs(&cluster).get_run(pb::GetRunRequest { run: "birds-1".to_owned() }).await.expect("exists").into_inner();
    assert!(run.reason.contains("needs 1 ranks"), "{}", run.reason);
    let missing = runs(&cluster).cancel_run(pb::CancelRunRequest { run: "no".to_owned() }).await;
    assert_eq!(missing.expect_err("no such run").code(), Code::NotFound);
    cluster.stop().await;
}

#[tokio::test]
async fn logs_are_of_one_rank_their_end_or_new() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = with_dataset(folder.path()).await;
    runs(&cluster).submit_run(submit(32)).await.expect("a good spec");
    for (generation, rank, file, text) in [(1, 0, 1, "a\nb\n"), (1, 0, 2, "c\n"), (1, 1, 1, "d\ne\n"), (2, 1, 1, "f\n")]
    {
        put(&*cluster.store, &keys::logs("birds-1", generation, rank, file), text).await;
    }
    let lines = async |request: pb::GetLogsRequest| {
        let request = pb::GetLogsRequest { run: "birds-1".to_owned(), ..request };
        let mut stream = runs(&cluster).get_logs(request).await.expect("exists").into_inner();
        let mut lines = Vec::new();
        while let Some(line) = stream.message().await.expect("streams") {
            lines.push(format!("{}/{} {} {}", line.generation, line.rank, line.number, line.line));
        }
        lines
    };
    let all = ["1/0 1 a", "1/0 2 b", "1/0 3 c", "1/1 1 d", "1/1 2 e", "2/1 1 f"];
    assert_eq!(lines(pb::GetLogsRequest::default()).await, all);
    assert_eq!(lines(pb::GetLogsRequest { rank: Some(1), ..Default::default() }).await, all[3..]);
    let tail = pb::GetLogsRequest { tail: 2, ..Default::default() };
    assert_eq!(lines(tail.clone()).await, ["1/0 2 b", "1/0 3 c", "1/1 2 e", "2/1 1 f"]);
    assert_eq!(lines(pb::GetLogsRequest { rank: Some(0), tail: 1, ..tail }).await, ["1/0 3 c"]);
    assert_eq!(lines(pb::GetLogsRequest { since_seconds: 3600, ..Default::default() }).await, all);
    // What was stored long ago, by the folder's clock.
    let old = folder.path().join(keys::logs("birds-1", 1, 0, 1));
    let long_ago = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    std::fs::File::options().write(true).open(old).expect("a file").set_modified(long_ago).expect("it can be old");
    assert_eq!(lines(pb::GetLogsRequest { since_seconds: 3600, ..Default::default() }).await, all[2..]);
    cluster.stop().await;
}

#[tokio::test]
async fn an_event_that_cannot_be_written_shows_nothing_of_its_run_and_holds_up_nobody_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let inner = LocalFileSystem::new_with_prefix(folder.path()).expect("the folder exists");
    let slow = Arc::new(Slow { inner, folder: "runs/birds-1/events", held: tokio::sync::watch::Sender::new(false) });
    let cluster = with_dataset_on(Arc::clone(&slow) as Arc<dyn ObjectStore>).await;
    runs(&cluster).submit_run(submit(32)).await.expect("a good spec");
    let mut agent = Agent::connect(&cluster, vec![]).await;
    assert!(matches!(agent.hear().await, ToAgent::Serve(_)));
    let serving = pb::Serving { run: "birds-1".to_owned(), generation: 1, port: 29500, error: String::new() };
    agent.say(ToCoordinator::Serving(serving)).await;
    assert!(matches!(agent.hear().await, ToAgent::Join(_)));
    agent.rank(Said::Joined(pb::Joined { step: 0, steps_per_epoch: 3, damaged: vec![] })).await;

    slow.held.send_replace(true);
    let key = keys::checkpoint("birds-1", 1, 1, "x");
    agent.rank(Said::Checkpointed(pb::Checkpointed { step: 1, key, digests: Default::default(), top1: None })).await;
    agent.rank(Said::Finished(pb::Finished { key: keys::model("birds-1", 1, "x"), digests: Default::default() })).await;
    for _ in 0..8 {
        let message = tokio::time::timeout(PATIENCE, agent.from.message()).await.expect("in time").expect("streams");
        let ack = message.and_then(|message| message.message);
        assert!(matches!(ack, Some(ToAgent::HeartbeatAck(_))), "{ack:?}");
    }
    let get = || pb::GetRunRequest { run: "birds-1".to_owned() };
    let run = runs(&cluster).get_run(get()).await.expect("exists").into_inner();
    assert_eq!((run.state(), run.checkpoint_step, run.events.len()), (RunState::Running, 0, 2));
    let other = pb::SubmitRunRequest { request_id: "run-2".to_owned(), ..submit(32) };
    let other = runs(&cluster).submit_run(other).await.expect("its events can be written").into_inner();
    assert_eq!((other.run.as_str(), other.events.len()), ("birds-2", 1));

    slow.held.send_replace(false);
    let mut watch = runs(&cluster).watch_run(get()).await.expect("exists").into_inner();
    let mut last = run;
    while let Some(run) = tokio::time::timeout(PATIENCE, watch.message()).await.expect("in time").expect("streams") {
        last = run;
    }
    assert_eq!((last.state(), last.checkpoint_step, last.events.len()), (RunState::Done, 1, 4));
    cluster.stop().await;
}

fn named(name: &str, request_id: &str) -> pb::SubmitRunRequest {
    pb::SubmitRunRequest { request_id: request_id.to_owned(), name: name.to_owned(), ..submit(32) }
}

#[tokio::test]
async fn a_dataset_is_not_deleted_while_a_run_reads_it_and_a_run_does_not_outlive_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = with_dataset(folder.path()).await;
    runs(&cluster).submit_run(submit(32)).await.expect("a good spec");
    let delete = || pb::DeleteDatasetRequest { name: "birds".to_owned() };
    let refused = cluster.datasets().delete_dataset(delete()).await.expect_err("in use");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("gleaner run cancel birds-1"), "{}", refused.message());
    runs(&cluster).cancel_run(pb::CancelRunRequest { run: "birds-1".to_owned() }).await.expect("exists");
    cluster.datasets().delete_dataset(delete()).await.expect("nobody reads it");
    let resume =
        pb::ResumeRunRequest { request_id: "again".to_owned(), run: "birds-1".to_owned(), step: None, epochs: None };
    let refused = runs(&cluster).resume_run(resume).await.expect_err("nothing to read");
    assert!(refused.message().contains("was deleted"), "{}", refused.message());
    cluster.stop().await;
}

#[tokio::test]
async fn a_deleted_run_is_gone_with_its_objects_and_its_name_is_free() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = with_dataset(folder.path()).await;
    for (name, request) in [("old", "1"), ("doomed", "2"), ("new", "3")] {
        runs(&cluster).submit_run(named(name, request)).await.expect("a good spec");
    }
    let delete = || pb::DeleteRunRequest { run: "doomed".to_owned() };
    let refused = runs(&cluster).delete_run(delete()).await.expect_err("it waits");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("gleaner run cancel doomed"), "{}", refused.message());
    runs(&cluster).cancel_run(pb::CancelRunRequest { run: "doomed".to_owned() }).await.expect("exists");
    put(&*cluster.store, &keys::logs("doomed", 1, 0, 1), "a line\n").await;
    // Its agents could still write for a moment, so a coordinator that dies now leaves the rest to the next one.
    let (mut first, mut second) = (runs(&cluster), runs(&cluster));
    let calls = async { tokio::join!(first.delete_run(delete()), second.delete_run(delete())) };
    assert!(tokio::time::timeout(Duration::from_secs(2), calls).await.is_err(), "it was cancelled just now");
    let taken = runs(&cluster).submit_run(named("doomed", "4")).await.expect_err("still being deleted");
    assert!(taken.code() == Code::AlreadyExists && taken.message().contains("deleted"), "{taken}");
    let list = |limit| pb::ListRunsRequest { limit };
    let names = |runs: Vec<pb::Run>| runs.into_iter().map(|run| run.run).collect::<Vec<_>>();
    let listed = runs(&cluster).list_runs(list(0)).await.expect("lists").into_inner().runs;
    assert_eq!(names(listed), ["new", "old"], "the newest first");
    assert_eq!(names(runs(&cluster).list_runs(list(1)).await.expect("lists").into_inner().runs), ["new"]);
    cluster.kill();

    let cluster = Cluster::start(folder.path(), 30.0).await;
    runs(&cluster).delete_run(delete()).await.expect("goes on");
    let left = common::keys_under(&*cluster.store, "runs/doomed").await;
    assert_eq!(left, Vec::<String>::new());
    assert_eq!(runs(&cluster).delete_run(delete()).await.expect_err("gone").code(), Code::NotFound);
    let run = runs(&cluster).submit_run(named("doomed", "5")).await.expect("the name is free").into_inner();
    assert_eq!((run.state(), run.events.len()), (RunState::Waiting, 1));
    cluster.stop().await;
}
