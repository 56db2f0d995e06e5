//! Who may do what: every method that is served, called with every role and with none.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use common::Cluster;
use coordinator::{NewToken, Role};
use prost::Message;
use prost_types::FileDescriptorSet;
use proto::pb;
use proto::pb::dataset_service_client::DatasetServiceClient;
use proto::pb::fetch_service_client::FetchServiceClient;
use proto::pb::run_service_client::RunServiceClient;
use proto::pb::trainer_service_client::TrainerServiceClient;
use proto::session::Session;
use tokio_stream::StreamExt;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tower::ServiceExt;

/// A token for each role, and their lines.
fn tokens() -> (Vec<(Role, String)>, String) {
    let made = Role::ALL.map(|role| (role, NewToken::make(role, role.name()).expect("made")));
    let lines = made.iter().map(|(_, made)| made.line.clone() + "\n").collect();
    (made.into_iter().map(|(role, made)| (role, made.token)).collect(), lines)
}

async fn start(folder: &Path, tokens: &Path) -> Cluster {
    let store = object_store::local::LocalFileSystem::new_with_prefix(folder).expect("the folder exists");
    let config = coordinator::Config { tokens: Some(tokens.to_owned()), ..Cluster::config(30.0) };
    Cluster::start_as(config, std::sync::Arc::new(store)).await
}

/// The paths of all methods that descriptors name.
fn methods() -> BTreeSet<String> {
    let sets = [pb::DESCRIPTORS, tonic_health::pb::FILE_DESCRIPTOR_SET, tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET];
    let files = sets.into_iter().flat_map(|set| FileDescriptorSet::decode(set).expect("descriptors").file);
    let paths = files.flat_map(|file| {
        let package = file.package().to_owned();
        file.service.into_iter().flat_map(move |service| {
            let name = format!("/{package}.{}", service.name());
            service.method.into_iter().map(move |method| format!("{name}/{}", method.name()))
        })
    });
    paths.collect()
}

/// How a call without a message is answered; None: it is let through and goes on.
async fn called(channel: &Channel, path: &str, token: Option<&str>) -> Option<Code> {
    let mut request = Request::post(format!("http://coordinator{path}"));
    request = request.header("content-type", "application/grpc").header("te", "trailers");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let request = request.body(Body::empty()).expect("a request");
    let answer = tokio::time::timeout(Duration::from_millis(500), channel.clone().oneshot(request)).await;
    let answer: Response<Body> = answer.ok()?.expect("the coordinator is there");
    // What is refused has its code in the headers.
    Status::from_header_map(answer.headers()).map(|status| status.code())
}

#[tokio::test]
async fn every_method_is_open_to_its_roles_and_to_nobody_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let (tokens, lines) = tokens();
    let file = folder.path().join("tokens");
    std::fs::write(&file, lines).expect("written");
    let cluster = start(folder.path(), &file).await;
    let (all, refusals) = (methods(), [Code::Unauthenticated, Code::PermissionDenied]);
    let mut table = format!("{:62}  {:>9}", "method", "no token");
    tokens.iter().for_each(|(role, _)| table += &format!("  {:>9}", role.name()));
    let (mut open, mut cells) = (Vec::new(), 0);
    for path in &all {
        let callers = std::iter::once(None).chain(tokens.iter().map(|(role, token)| Some((*role, token))));
        table += &format!("\n{path:62}");
        for caller in callers {
            let code = called(&cluster.channel, path, caller.map(|(_, token)| token.as_str())).await;
            assert_ne!(code, Some(Code::Unimplemented), "{path} is not in the table");
            let refused = code.filter(|code| refusals.contains(code));
            match caller {
                None if refused.is_none() => open.push(path.as_str()),
                None => assert_eq!(refused, Some(Code::Unauthenticated), "{path}"),
                Some((Role::Admin, _)) => assert_eq!(refused, None, "{path} by an admin"),
                Some(_) => assert_ne!(refused, Some(Code::Unauthenticated), "{path}"),
            }
            let (service, method) = path.trim_start_matches('/').split_once('/').expect("two parts");
            if let Some((role, _)) = caller {
                let expected = expected(service, method, role);
                assert_eq!(refused.is_none(), expected, "{path} by a {role}: {code:?}");
            }
            table += &format!("  {:>9}", if refused.is_some() { "-" } else { "yes" });
            cells += 1;
        }
    }
    println!("{table}\n\n{} methods, {cells} calls", all.len());
    assert_eq!(open, ["/grpc.health.v1.Health/Check"], "open to whoever reaches the port");
    // What nobody has written down, nobody may call.
    for path in ["/gleaner.v1.RunService/New", "/gleaner.v2.RunService/GetRun", "/"] {
        let admin = &tokens.last().expect("an admin").1;
        assert_eq!(called(&cluster.channel, path, Some(admin)).await, Some(Code::Unimplemented), "{path}");
    }
    cluster.stop().await;
}

/// The rules once more, in other words than the table's.
fn expected(service: &str, method: &str, role: Role) -> bool {
    let sees = matches!(role, Role::Viewer | Role::Submitter);
    let changes = ["Create", "Refresh", "Submit", "Control", "Cancel", "Resume", "Delete"];
    role == Role::Admin
        || match service {
            "gleaner.v1.FetchService" => role == Role::Worker,
            "gleaner.v1.TrainerService" => role == Role::Trainer,
            "grpc.health.v1.Health" if method == "Check" => true,
            _ if changes.iter().any(|change| method.starts_with(change)) => role == Role::Submitter,
            _ => sees,
        }
}

fn bearer(token: &str) -> MetadataValue<Ascii> {
    format!("Bearer {token}").parse().expect("a header")
}

#[tokio::test]
async fn a_revoked_token_ends_what_it_has_open_and_the_others_go_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    let [anna, bert] = ["anna", "bert"].map(|name| NewToken::make(Role::Submitter, name).expect("made"));
    std::fs::write(&file, format!("{}\n{}\n", anna.line, bert.line)).expect("written");
    let cluster = start(folder.path(), &file).await;
    let as_holder =
        |token: &str| DatasetServiceClient::with_interceptor(cluster.channel.clone(), lets_carry(token, None));
    let (mut annas, mut berts) = (as_holder(&anna.token), as_holder(&bert.token));
    let spec = proto::DatasetSpec::default().to_json();
    annas.create_dataset(common::requests("birds", "r", spec, Some("a http://x.example/1\n"))).await.expect("created");
    let request = || pb::GetDatasetRequest { name: "birds".to_owned() };
    let mut watched = annas.watch_dataset(request()).await.expect("watched").into_inner();
    let mut stays = berts.watch_dataset(request()).await.expect("watched").into_inner();
    watched.message().await.expect("sent").expect("a dataset");
    stays.message().await.expect("sent").expect("a dataset");

    // A file that is no good changes nothing.
    std::fs::write(&file, "anna boss\n").expect("written");
    tokio::time::sleep(Duration::from_secs(3)).await;
    annas.get_dataset(request()).await.expect("as before");

    std::fs::write(&file, format!("{}\n", bert.line)).expect("written");
    let begun = Instant::now();
    let ended = tokio::time::timeout(common::PATIENCE, watched.message()).await.expect("it ends");
    let ended = ended.expect_err("with the reason");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    println!("revoked: {ended}, {:.1} s after the file changed", begun.elapsed().as_secs_f64());
    assert!(ended.code() == Code::Unauthenticated && ended.message().contains("revoked"), "{ended}");
    let refused = annas.get_dataset(request()).await.expect_err("revoked");
    assert!(refused.code() == Code::Unauthenticated && !refused.message().contains(&anna.token), "{refused}");
    berts.get_dataset(request()).await.expect("good as before");
    let quiet = tokio::time::timeout(Duration::from_millis(500), stays.message()).await;
    assert!(quiet.is_err(), "the other's stream stays open: {quiet:?}");
    cluster.kill();
}

/// A caller with a token and perhaps a session.
fn lets_carry(
    token: &str,
    session: Option<&Session>,
) -> impl FnMut(tonic::Request<()>) -> Result<tonic::Request<()>, Status> + use<> {
    let (value, session) = (bearer(token), session.cloned());
    move |mut request| {
        request.metadata_mut().insert("authorization", value.clone());
        if let Some(session) = &session {
            session.carry(request.metadata_mut());
        }
        Ok(request)
    }
}

#[tokio::test]
async fn a_worker_speaks_for_its_own_leases_whatever_token_it_shares() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    let [workers, anna] = [(Role::Worker, "workers"), (Role::Submitter, "anna")]
        .map(|(role, name)| NewToken::make(role, name).expect("made"));
    std::fs::write(&file, format!("{}\n{}\n", workers.line, anna.line)).expect("written");
    let cluster = start(folder.path(), &file).await;
    let [own, strange] = ["own", "strange"].map(|word| Session::new(word.to_owned()));
    let (own_name, strange_name) = (own.name("host"), strange.name("host"));
    let caller = |session: Option<&Session>| {
        FetchServiceClient::with_interceptor(cluster.channel.clone(), lets_carry(&workers.token, session))
    };
    let (mut owner, mut stranger, mut nobody) = (caller(Some(&own)), caller(Some(&strange)), caller(None));
    let mut submitter = DatasetServiceClient::with_interceptor(cluster.channel.clone(), lets_carry(&anna.token, None));
    let spec = proto::DatasetSpec::default().to_json();
    let list = Some("a http://x.example/1\n");
    submitter.create_dataset(common::requests("birds", "r", spec, list)).await.expect("created");

    let lease_as = |worker: &str| pb::LeaseShardRequest { worker: worker.to_owned(), ..Default::default() };
    for refused in [nobody.lease_shard(lease_as(&own_name)).await, stranger.lease_shard(lease_as(&own_name)).await] {
        let refused = refused.expect_err("not its name");
        assert!(refused.code() == Code::PermissionDenied && refused.message().contains(&own_name), "{refused}");
    }
    let lease =
        owner.lease_shard(lease_as(&own_name)).await.expect("its own name").into_inner().lease.expect("a shard");
    let renew_as = |worker: &str| pb::RenewLeaseRequest {
        worker: worker.to_owned(),
        dataset: lease.dataset.clone(),
        shard: lease.shard,
        attempt: lease.attempt.clone(),
        ..Default::default()
    };
    let release_as = |worker: &str| pb::ReleaseLeaseRequest {
        worker: worker.to_owned(),
        dataset: lease.dataset.clone(),
        shard: lease.shard,
        attempt: lease.attempt.clone(),
        ..Default::default()
    };
    for worker in [&own_name, &strange_name] {
        let refused = stranger.renew_lease(renew_as(worker)).await.expect_err("another's lease");
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        let refused = stranger.release_lease(release_as(worker)).await.expect_err("another's lease");
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    }
    let shares = pb::ShareSitesRequest { worker: own_name.clone(), sequence: u64::MAX, ..Default::default() };
    assert_eq!(stranger.share_sites(shares).await.expect_err("not its name").code(), Code::PermissionDenied);
    let renewed = owner.renew_lease(renew_as(&own_name)).await.expect("its own").into_inner();
    assert!(renewed.duration_millis > 0, "nothing was taken over");
    owner.release_lease(release_as(&own_name)).await.expect("its own");
    let lease = stranger.lease_shard(lease_as(&strange_name)).await.expect("its own name").into_inner().lease;
    assert!(lease.is_some(), "it was given back");
    cluster.stop().await;
}

#[tokio::test]
async fn an_agents_name_is_not_taken_over_by_another_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    let made = NewToken::make(Role::Trainer, "trainers").expect("made");
    std::fs::write(&file, format!("{}\n", made.line)).expect("written");
    let cluster = start(folder.path(), &file).await;
    let [own, strange] = ["own", "strange"].map(|word| Session::new(word.to_owned()));
    let hello = pb::Hello {
        agent: own.name("host"),
        advertise_address: "127.0.0.1".to_owned(),
        devices: vec!["cpu".to_owned()],
        ..Default::default()
    };
    let connect = async |session: Option<&Session>| {
        let mut client =
            TrainerServiceClient::with_interceptor(cluster.channel.clone(), lets_carry(&made.token, session));
        let message = pb::AgentMessage { message: Some(pb::agent_message::Message::Hello(hello.clone())) };
        let messages = tokio_stream::once(message).chain(tokio_stream::pending());
        let mut answers = client.connect(messages).await?.into_inner();
        answers.message().await.map(|answer| (answers, answer))
    };
    let (mut stream, welcome) = connect(Some(&own)).await.expect("its own name");
    assert!(welcome.is_some());
    for refused in [connect(Some(&strange)).await, connect(None).await] {
        let refused = refused.map(|_| ()).expect_err("not its name");
        assert!(refused.code() == Code::PermissionDenied && refused.message().contains("session"), "{refused}");
    }
    let quiet = tokio::time::timeout(Duration::from_millis(300), stream.message()).await;
    assert!(quiet.is_err(), "its stream is as it was: {quiet:?}");
    let (mut again, _) = connect(Some(&own)).await.expect("the same process again");

    // Revoked: the stream ends, and with it what the agent could still say.
    let other = NewToken::make(Role::Viewer, "vera").expect("made");
    std::fs::write(&file, format!("{}\n", other.line)).expect("written");
    let begun = Instant::now();
    let ended = async {
        loop {
            if let Err(status) = again.message().await {
                return status;
            }
        }
    };
    let ended = tokio::time::timeout(common::PATIENCE, ended).await.expect("it ends");
    assert!(ended.code() == Code::Unauthenticated && begun.elapsed() < Duration::from_secs(5), "{ended}");
    let mut viewer = RunServiceClient::with_interceptor(cluster.channel.clone(), lets_carry(&other.token, None));
    let gone = async {
        while !viewer.get_status(pb::GetStatusRequest {}).await.expect("seen").into_inner().agents.is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(common::PATIENCE, gone).await.expect("the agent is heard no more");
    cluster.kill();
}

#[tokio::test]
async fn a_token_that_is_unknown_is_refused_and_never_repeated() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    let made = NewToken::make(Role::Viewer, "anna").expect("made");
    std::fs::write(&file, format!("{}\n", made.line)).expect("written");
    let cluster = start(folder.path(), &file).await;
    for given in ["Bearer gleaner_0123", "Basic YTpi", "Bearer", ""] {
        let mut request = tonic::Request::new(pb::ListDatasetsRequest {});
        request.metadata_mut().insert("authorization", given.parse().expect("a header"));
        let refused = cluster.datasets().list_datasets(request).await.expect_err("unknown");
        assert!(refused.code() == Code::Unauthenticated && !refused.message().contains("0123"), "{refused}");
    }
    cluster.stop().await;
}
