//! Spans, as a collector gets them from real processes: a command's trace goes on in all that is done for it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use demo_origin::list::{self, Entry};
use demo_origin::origin::{Options, Origin};
use demo_origin::rot::Rot;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::{Span, status::StatusCode};
use support::{Cluster, FreeAddress};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

/// A collector that keeps what it gets, with the service that each span is from.
#[derive(Debug, Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().expect("no test panics under it");
        for of in request.into_inner().resource_spans {
            let service = of.resource.map(|resource| text(&resource.attributes, "service.name")).unwrap_or_default();
            let spans = of.scope_spans.into_iter().flat_map(|scope| scope.spans);
            kept.extend(spans.map(|span| (service.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Its address, for as long as the runtime is there.
    fn start(&self, runtime: &tokio::runtime::Runtime) -> String {
        format!("http://{}", self.serve(runtime, Server::builder()))
    }

    fn serve(&self, runtime: &tokio::runtime::Runtime, mut server: Server) -> SocketAddr {
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("loopback");
        let address = listener.local_addr().expect("bound");
        let server = server.add_service(TraceServiceServer::new(self.clone()));
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    fn spans(&self, service: &str, name: &str) -> Vec<Span> {
        let kept = self.0.lock().expect("no test panics under it");
        let found = kept.iter().filter(|(of, span)| of == service && span.name == name);
        found.map(|(_, span)| span.clone()).collect()
    }

    fn only(&self, service: &str, name: &str) -> Span {
        let mut found = self.spans(service, name);
        assert_eq!(found.len(), 1, "{service} {name}: {found:?}");
        found.remove(0)
    }
}

fn value<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Value> {
    attributes.iter().find(|attribute| attribute.key == key)?.value.as_ref()?.value.as_ref()
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    match value(attributes, key) {
        Some(Value::StringValue(text)) => text.clone(),
        other => panic!("{key} is {other:?}"),
    }
}

fn number(span: &Span, key: &str) -> i64 {
    match value(&span.attributes, key) {
        Some(Value::IntValue(number)) => *number,
        other => panic!("{key} of {} is {other:?}", span.name),
    }
}

fn assert_within(span: &Span, parent: &Span) {
    assert_eq!(span.trace_id, parent.trace_id, "{} and {} are of one trace", span.name, parent.name);
    assert_eq!(span.parent_span_id, parent.span_id, "{} is within {}", span.name, parent.name);
}

fn failed(span: &Span) -> bool {
    span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error)
}

/// `count` URLs of which every second shows a picture, as a list that the cluster can read.
fn list(cluster: &Cluster, count: u64, origin: &Origin) -> String {
    let entry = |n: u64| {
        let rot = if n.is_multiple_of(2) { Rot::Good } else { Rot::Gone };
        let url = list::url(rot, (0, n), n, origin);
        Entry { synset: "n02084071", url, rot, picture: (0, n), counts: rot == Rot::Good }
    };
    cluster.write("urls.txt", &list::to_text(&(0..count).map(entry).collect::<Vec<_>>()))
}

fn exporting_to(address: &str) -> Vec<(String, String)> {
    vec![("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), address.to_owned())]
}

#[test]
fn a_commands_trace_goes_on_in_the_coordinator_in_workers_and_in_ranks() {
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let origin = Origin::serve(Options { seed: 5, ..Options::default() }).expect("loopback");
    let collector = Collector::default();
    let mut cluster = Cluster::new(None, exporting_to(&collector.start(&runtime)));
    cluster.start_coordinator_with(&["--log-format", "json"]);
    cluster.start_worker("worker");
    let urls = list(&cluster, 80, &origin);
    let wait = ["--wait", "--timeout", "120s"];
    let create = ["dataset", "create", "some", "--urls", &urls, "--size", "64", "--slice-urls", "40"];
    cluster.gleaner(&[&create[..], &wait].concat());
    assert_ne!(cluster.try_gleaner(&["dataset", "describe", "other"]).status.code(), Some(0));

    cluster.start_trainer("trainer", 1);
    let sets = ["train.epochs=1", "train.batch=16", "input.crop=64", "model.arch=alexnet-slim", "model.width=0.1"];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    cluster.gleaner(&[&["run", "submit", "--dataset", "some", "--name", "short"], &sets[..], &wait].concat());
    // The roles export the rest when they end.
    for role in ["trainer", "worker", "coordinator"] {
        cluster.terminate(role);
    }

    let command = collector.only("gleaner", "dataset create");
    assert!(command.parent_span_id.is_empty() && !failed(&command), "{command:?}");
    let request = collector.only("gleaner-coordinator", "gleaner.v1.DatasetService/CreateDataset");
    assert_within(&request, &command);
    let trace = command.trace_id;
    let shards = collector.spans("gleaner-worker", "shard");
    assert_eq!(shards.len(), 2, "one for each slice");
    for shard in &shards {
        assert_within(shard, &request);
        assert_eq!(text(&shard.attributes, "end"), "won");
    }
    let sum = |key| shards.iter().map(|shard| number(shard, key)).sum::<i64>();
    assert_eq!((sum("urls"), sum("kept")), (80, 40));
    let told = collector.spans("gleaner-coordinator", "gleaner.v1.FetchService/CompleteShard");
    assert_eq!(told.len(), 2);
    for told in &told {
        let shard = shards.iter().find(|shard| shard.span_id == told.parent_span_id);
        assert_within(told, shard.expect("a worker's call is within its work"));
    }

    let command = collector.only("gleaner", "dataset describe");
    let request = collector.only("gleaner-coordinator", "gleaner.v1.DatasetService/GetDataset");
    assert!(failed(&command) && !failed(&request), "the caller's fault: {command:?} {request:?}");
    assert_within(&request, &command);
    assert_eq!(number(&request, "rpc.grpc.status_code"), tonic::Code::NotFound as i64);

    let command = collector.only("gleaner", "run submit");
    let request = collector.only("gleaner-coordinator", "gleaner.v1.RunService/SubmitRun");
    assert_within(&request, &command);
    let agent = collector.only("gleaner-trainer", "agent generation");
    assert_within(&agent, &request);
    let rank = collector.only("gleaner-rank", "rank generation");
    assert_within(&rank, &agent);
    for span in [&agent, &rank] {
        assert_eq!(text(&span.attributes, "left"), "CAUSE_FINISHED");
        assert!(number(span, "step") > 0);
    }

    // What is logged for a request names its trace.
    let log = cluster.log("coordinator");
    let line = log.lines().find(|line| line.contains("\"dataset created\"")).expect("it was logged");
    let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
    let trace: String = trace.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(line["span"]["trace_id"], trace.as_str(), "{line}");
}

#[test]
fn a_collector_that_is_away_holds_up_nobody_and_is_complained_of_once() {
    let origin = Origin::serve(Options { seed: 6, ..Options::default() }).expect("loopback");
    // One that takes connections and says nothing, which is worse than one that refuses them.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
    let silent = (format!("http://{}", silent.local_addr().expect("bound")), silent);
    let nobody = FreeAddress::loopback();
    let refusing = format!("http://{nobody}");
    for (address, complains) in [(&silent.0, false), (&refusing, true)] {
        let mut cluster = Cluster::new(None, exporting_to(address));
        cluster.start_coordinator();
        cluster.start_worker("worker");
        let urls = list(&cluster, 40, &origin);
        let create = ["dataset", "create", "some", "--urls", &urls, "--size", "64", "--slice-urls", "10"];
        cluster.gleaner(&[&create[..], &["--wait", "--timeout", "120s"]].concat());
        let begun = Instant::now();
        cluster.gleaner(&["status"]);
        assert!(begun.elapsed() < Duration::from_secs(5), "a command took {:?}", begun.elapsed());
        let complaint = "spans cannot be exported";
        if complains {
            cluster.eventually("it is logged", |cluster| cluster.log("worker").contains(complaint));
        }
        for role in ["worker", "coordinator"] {
            let took = cluster.terminate(role);
            assert!(took < Duration::from_secs(10), "{role} took {took:?} to end");
            assert!(cluster.log(role).matches(complaint).count() <= 1, "{}", cluster.log(role));
        }
    }
}

#[test]
fn spans_go_to_a_collector_behind_tls_that_the_system_trusts() {
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let identity = Identity::from_pem(own.cert.pem(), own.signing_key.serialize_pem());
    let server = Server::builder().tls_config(ServerTlsConfig::new().identity(identity)).expect("they fit");
    let collector = Collector::default();
    let address = format!("https://localhost:{}", collector.serve(&runtime, server).port());
    // Of whoever trusts nobody it gets nothing.
    for (trusted, spans) in [(String::new(), 0), (own.cert.pem(), 1)] {
        let folder = tempfile::tempdir().expect("a folder");
        let authorities = folder.path().join("authorities.pem");
        std::fs::write(&authorities, trusted).expect("a file");
        let mut environment = exporting_to(&address);
        environment.push(("SSL_CERT_FILE".to_owned(), authorities.to_str().expect("UTF-8").to_owned()));
        let cluster = Cluster::new(None, environment);
        let output = cluster.try_gleaner(&["status"]);
        assert_eq!(output.status.code(), Some(5), "there is no coordinator");
        assert_eq!(collector.spans("gleaner", "status").len(), spans, "{output:?}");
    }
}

#[test]
fn nobody_exports_unasked_and_an_address_that_is_none_is_refused() {
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_coordinator_with(&["--log-format", "json"]);
    let urls = cluster.write("urls.txt", "n02084071\thttp://photos.invalid/1.jpg\n");
    cluster.gleaner(&["dataset", "create", "some", "--urls", &urls]);
    let log = cluster.log("coordinator");
    let lines = log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<serde_json::Value>>();
    assert!(lines.iter().any(|line| line["message"] == "dataset created"), "{log}");
    assert!(lines.iter().all(|line| line.get("span").is_none()), "spans are made for nobody: {log}");
    let refused = cluster.try_gleaner(&["status", "--otlp-endpoint", "not an address"]);
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && words.contains("--otlp-endpoint"), "{words}");
}
