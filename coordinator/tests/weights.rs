//! Runs that begin with weights which a submitter sends, over real gRPC.

#[allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
mod common;

use std::path::Path;

use common::{Cluster, get, keys_under};
use proto::network::{Network, Shapes};
use proto::pb::run_service_client::RunServiceClient;
use proto::pb::submit_run_with_weights_request::Part;
use proto::pb::{self, Run, SubmitRunWithWeightsRequest};
use proto::run_spec::{Arch, Model};
use proto::stored_run::StoredRun;
use proto::{RunSpec, Stored, keys};
use tonic::transport::Channel;
use tonic::{Code, Status};

async fn with_dataset(folder: &Path) -> Cluster {
    let cluster = Cluster::start(folder, 30.0).await;
    let list: String = (0..120).map(|i| format!("n{}\thttp://h{i}/picture{i}\n", i % 3)).collect();
    cluster.create("birds", "request-1", 50, &list).await.expect("a good list");
    cluster.work().await;
    cluster.sealed("birds").await;
    cluster
}

fn runs(cluster: &Cluster) -> RunServiceClient<Channel> {
    RunServiceClient::new(cluster.channel.clone())
}

/// A network of less than a megabyte.
fn model() -> Model {
    Model { arch: Arch::AlexnetSlim, width: 0.1, ..Model::default() }
}

fn request(id: &str, crop: u32) -> pb::SubmitRunRequest {
    let mut spec = RunSpec::from_toml("dataset = \"birds\"\ntrain = { batch = 32 }").expect("sound");
    (spec.model, spec.input.crop) = (model(), crop);
    pb::SubmitRunRequest {
        request_id: id.to_owned(),
        spec_json: spec.to_json(),
        from_file: "a.safetensors".to_owned(),
        ..Default::default()
    }
}

/// A file of zeros with these tensors, and the classes of its outputs.
fn file(shapes: &Shapes, classes: &str) -> Vec<u8> {
    let mut end = 0;
    let mut head: serde_json::Map<String, serde_json::Value> = shapes
        .iter()
        .map(|(name, shape)| {
            let begin = end;
            end += 4 * shape.iter().product::<u64>();
            (name.clone(), serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}))
        })
        .collect();
    head.insert("__metadata__".to_owned(), serde_json::json!({"classes": classes}));
    let head = serde_json::to_vec(&head).expect("numbers and names");
    [&(head.len() as u64).to_le_bytes()[..], &head, &vec![0; end as usize]].concat()
}

async fn send(cluster: &Cluster, request: pb::SubmitRunRequest, file: &[u8]) -> Result<Run, Status> {
    let part = |part| SubmitRunWithWeightsRequest { part: Some(part) };
    let pieces = file.chunks(100_000).map(|piece| part(Part::Weights(piece.to_vec().into()))).collect::<Vec<_>>();
    let parts: Vec<_> = std::iter::once(part(Part::Start(request))).chain(pieces).collect();
    runs(cluster).submit_run_with_weights(futures::stream::iter(parts)).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn a_file_is_kept_with_the_run_and_its_rows_are_found_by_class() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = with_dataset(folder.path()).await;
    let network = Network::new(&model(), 5, 224);
    let bytes = file(&network.tensors(), r#"["n2", "other", "n0", "more", "least"]"#);
    let run = send(&cluster, request("r", 224), &bytes).await.expect("it fits");
    assert!(run.events[0].contains("the file a.safetensors; of the last layer those of 2 classes"), "{:?}", run.events);
    let stored = StoredRun::from_json(&get(&*cluster.store, &keys::run_spec(&run.run)).await).expect("a run");
    let start = stored.start.expect("it begins with something");
    assert_eq!(start.rows, Some(vec![Some(2), None, Some(0)]));
    let kept = get(&*cluster.store, &format!("{}/state.safetensors", start.key)).await;
    assert_eq!(kept, bytes);
    assert_eq!(start.digests["state.safetensors"], proto::shard::sha256_hex(&bytes));
    // A request that is repeated finds its run, and keeps no second file.
    let again = send(&cluster, request("r", 224), &bytes).await.expect("it is there");
    assert_eq!(again.run, run.run);
    assert_eq!(keys_under(&*cluster.store, &format!("{}/start", keys::run(&run.run))).await.len(), 1);
    cluster.stop().await;
}

#[tokio::test]
async fn a_file_that_does_not_fit_or_is_not_whole_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = with_dataset(folder.path()).await;
    let tensors = Network::new(&model(), 3, 224).tensors();
    let whole = file(&tensors, "[]");
    let wider = Network::new(&Model { width: 0.2, ..model() }, 3, 224).tensors();
    let mut longer = whole.clone();
    longer.push(0);
    let mut vast = whole.clone();
    vast[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for (bytes, said) in [
        (&file(&wider, "[]")[..], "tensor features.0.norm.bias is of shape [16] where [8] belongs"),
        (&whole[..whole.len() - 1], "ends 1 bytes too early"),
        (&longer, "is longer than its head says"),
        (&whole[..40], "has no whole head"),
        (&whole[..5], "is empty"),
        (&vast, "is no safetensors file"),
    ] {
        let refused = send(&cluster, request("r", 224), bytes).await.expect_err(said);
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        assert!(refused.message().contains(said) && refused.message().contains("a.safetensors"), "{refused:?}");
    }
    let unknown = pb::SubmitRunRequest { spec_json: r#"{"dataset": "none"}"#.to_owned(), ..request("r", 224) };
    assert_eq!(send(&cluster, unknown, &whole).await.expect_err("there is none").code(), Code::NotFound);
    assert!(keys_under(&*cluster.store, keys::RUNS).await.is_empty());
    cluster.stop().await;
}

#[tokio::test]
async fn a_run_of_another_crop_is_no_start_and_a_preview_stores_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let cluster = with_dataset(folder.path()).await;
    let preview = pb::SubmitRunRequest { dry_run: true, ..request("p", 224) };
    let shown = runs(&cluster).submit_run(preview).await.expect("it could be").into_inner();
    assert!(shown.run == "birds-1" && shown.steps_per_epoch >= 2 && shown.manifest_version == 1, "{shown:?}");
    assert!(keys_under(&*cluster.store, keys::RUNS).await.is_empty());
    runs(&cluster).submit_run(request("r", 224)).await.expect("it can be");
    let from = |crop| pb::SubmitRunRequest { from_run: "birds-1".to_owned(), ..request("s", crop) };
    let refused = runs(&cluster).submit_run(from(64)).await.expect_err("the first convolution has another stride");
    assert!(
        refused.code() == Code::InvalidArgument && refused.message().contains("set input.crop = 224"),
        "{refused:?}"
    );
    // With a crop that makes the same network it is the checkpoint that is missing.
    assert_eq!(runs(&cluster).submit_run(from(112)).await.expect_err("it has none").code(), Code::NotFound);
    cluster.stop().await;
}
