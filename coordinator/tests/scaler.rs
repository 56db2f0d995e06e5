//! What KEDA is told, over real gRPC by a client of its contract.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::time::Duration;

use common::{Cluster, PATIENCE, put_shard};
use proto::RunSpec;
use proto::keda::external_scaler_client::ExternalScalerClient;
use proto::keda::{GetMetricsRequest, IsActiveResponse, ScaledObjectRef};
use proto::pb;
use proto::pb::run_service_client::RunServiceClient;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

fn scaler(cluster: &Cluster) -> ExternalScalerClient<Channel> {
    ExternalScalerClient::new(cluster.channel.clone())
}

fn object(role: &str, per_replica: &str) -> ScaledObjectRef {
    // As KEDA sends it: with keys that are its own, too.
    let metadata = [("scalerAddress", "coordinator.gleaner.svc:7070"), ("role", role), ("perReplica", per_replica)];
    ScaledObjectRef {
        name: role.to_owned(),
        namespace: "gleaner".to_owned(),
        scaler_metadata: metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
    }
}

async fn value(cluster: &Cluster, role: &str) -> f64 {
    let spec = scaler(cluster).get_metric_spec(object(role, "2")).await.expect("answers").into_inner();
    let [spec] = &spec.metric_specs[..] else { panic!("{spec:?}") };
    assert_eq!((spec.target_size, spec.target_size_float), (2, 2.0));
    let metric_name = spec.metric_name.clone();
    let request = GetMetricsRequest { scaled_object_ref: Some(object(role, "2")), metric_name: metric_name.clone() };
    let values = scaler(cluster).get_metrics(request).await.expect("answers").into_inner().metric_values;
    let [value] = &values[..] else { panic!("{values:?}") };
    assert_eq!((&value.metric_name, value.metric_value as f64), (&metric_name, value.metric_value_float));
    let active = scaler(cluster).is_active(object(role, "2")).await.expect("answers").into_inner().result;
    assert_eq!(active, value.metric_value > 0);
    value.metric_value_float
}

async fn pushed(stream: &mut Streaming<IsActiveResponse>) -> bool {
    let message = tokio::time::timeout(PATIENCE, stream.message()).await.expect("in time").expect("streams");
    message.expect("open").result
}

#[tokio::test]
async fn workers_are_wanted_for_slices_until_the_last_is_committed_and_trainers_for_runs_until_they_end() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    let mut workers = scaler(&cluster).stream_is_active(object("worker", "2")).await.expect("opens").into_inner();
    let mut trainers = scaler(&cluster).stream_is_active(object("trainer", "1")).await.expect("opens").into_inner();
    assert!(!pushed(&mut workers).await && !pushed(&mut trainers).await, "nothing to do is told at once");
    assert_eq!((value(&cluster, "worker").await, value(&cluster, "trainer").await), (0.0, 0.0));

    let list: String = (0..120).map(|i| format!("n{}\thttp://h{i}/picture{i}\n", i % 3)).collect();
    cluster.create("birds", "request-1", 50, &list).await.expect("a good list");
    assert!(pushed(&mut workers).await, "work is pushed");
    assert_eq!(value(&cluster, "worker").await, 3.0);
    let lease = cluster.lease(Duration::from_secs(1)).await.expect("a shard");
    assert_eq!(value(&cluster, "worker").await, 3.0, "a leased slice is not done");
    put_shard(&*cluster.store, &lease).await;
    cluster.complete(&lease).await;
    assert_eq!(value(&cluster, "worker").await, 2.0);
    cluster.work().await;
    assert!(!pushed(&mut workers).await, "the end is pushed");
    cluster.sealed("birds").await;

    let mut spec = RunSpec::from_toml("dataset = \"birds\"").expect("one line is enough");
    (spec.train.batch, spec.ranks.max) = (24, 3);
    let request = pb::SubmitRunRequest {
        request_id: "r".to_owned(),
        name: "birds-1".to_owned(),
        spec_json: spec.to_json(),
        ..Default::default()
    };
    let mut runs = RunServiceClient::new(cluster.channel.clone());
    runs.submit_run(request).await.expect("a good run");
    assert!(pushed(&mut trainers).await, "a waiting run is pushed");
    assert_eq!(value(&cluster, "trainer").await, 3.0);
    runs.cancel_run(pb::CancelRunRequest { run: "birds-1".to_owned() }).await.expect("there");
    assert!(!pushed(&mut trainers).await, "its end is pushed");
    drop((workers, trainers));
    cluster.stop().await;
}

#[tokio::test]
async fn a_scaled_object_that_names_no_role_or_nonsense_is_refused_by_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(folder.path(), 30.0).await;
    for (object, said) in [
        (object("coordinator", "1"), "metadata.role"),
        (ScaledObjectRef::default(), "metadata.role"),
        (object("worker", "0"), "metadata.perReplica"),
        (object("trainer", "many"), "metadata.perReplica"),
    ] {
        let status = scaler(&cluster).get_metric_spec(object).await.expect_err(said);
        assert_eq!((status.code(), status.message().contains(said)), (Code::InvalidArgument, true), "{status}");
    }
    cluster.stop().await;
}
