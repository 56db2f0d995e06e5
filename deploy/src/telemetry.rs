//! Logs on standard error, and spans to an OpenTelemetry collector if somebody asks for them.
//!
//! Spans are exported in batches by a thread of their own: whatever becomes of the collector, nobody waits for it but
//! the end of the process, and a rank that leaves its generation in order, neither for long.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
#[cfg(feature = "trainer")]
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{RetryPolicy, SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::resource::{EnvResourceDetector, Resource};
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter as Export};
use tokio::runtime::Runtime;
use tonic::transport::ClientTlsConfig;
use tracing::{Level, Metadata, info, warn};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::exit::Ended;

/// At the end of a process its last spans may take so long.
const LAST_EXPORT: Duration = Duration::from_secs(2);
/// A rank that may be killed soon waits so long for its spans.
#[cfg(feature = "trainer")]
const FLUSH: Duration = Duration::from_secs(1);

/// What every command takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct TelemetryArgs {
    /// How log lines on standard error look; GLEANER_LOG or RUST_LOG chooses which there are
    #[arg(long, global = true, env = "GLEANER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// Export spans to the OpenTelemetry collector at this address, over OTLP's gRPC: http://HOST:4317, or https
    /// [default: there are none]
    #[arg(long, global = true, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    otlp_endpoint: Option<String>,
}

impl TelemetryArgs {
    fn endpoint(&self) -> Option<&str> {
        // By OpenTelemetry's rule a variable that is empty is not set.
        self.otlp_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty())
    }

    /// The arguments by which a child process exports its spans as this one does.
    pub(crate) fn for_child(&self) -> Vec<String> {
        self.endpoint().map(|endpoint| format!("--otlp-endpoint={endpoint}")).into_iter().collect()
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// The process's exporter of spans, if it has one.
#[derive(Debug, Clone)]
pub(crate) struct Spans(Option<Exporting>);

#[derive(Debug, Clone)]
struct Exporting {
    provider: SdkTracerProvider,
    /// Its own: the last spans close when the tasks that hold them are dropped with the runtime of the work.
    runtime: Arc<Runtime>,
}

/// Installs the process's log, and the export of spans if `args` have an address for them; `service` is the process's
/// name there unless OTEL_SERVICE_NAME says another. GLEANER_LOG or RUST_LOG chooses what is logged ("debug",
/// "worker=debug,info"); without them it is `default_log`.
///
/// # Errors
/// If the address is none, or no thread can be started.
pub(crate) fn start(args: &TelemetryArgs, service: &str, default_log: &str) -> anyhow::Result<Spans> {
    let chosen = std::env::var("GLEANER_LOG").or_else(|_| std::env::var("RUST_LOG"));
    let filter = chosen.ok().filter(|text| !text.is_empty()).and_then(|text| EnvFilter::try_new(text).ok());
    let mut filter = filter.unwrap_or_else(|| EnvFilter::new(default_log));
    let exporting = args.endpoint().map(|endpoint| exporting(endpoint, service)).transpose();
    if !matches!(exporting, Ok(Some(_))) {
        // Nobody sees them: none are made.
        filter = filter.add_directive(format!("{}=off", proto::trace::TARGET).parse()?);
    }
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colour);
    // A full disk behind standard error must not end the process: to complain about it there would panic.
    let log = log.log_internal_errors(false);
    let log = match args.log_format {
        LogFormat::Text => log.boxed(),
        LogFormat::Json => log.json().flatten_event(true).boxed(),
    };
    let subscriber = tracing_subscriber::registry().with(log.with_filter(filter));
    match &exporting {
        Ok(Some(exporting)) => {
            let spans = tracing_opentelemetry::layer().with_tracer(exporting.provider.tracer("gleaner"));
            // Where in the source a span stands and on which thread it ran is of no use to whoever runs a cluster.
            let spans = spans.with_location(false).with_threads(false).with_tracked_inactivity(false);
            let exported = filter_fn(is_exported).with_max_level_hint(Level::INFO);
            subscriber.with(spans.with_filter(exported)).init();
        }
        _ => subscriber.init(),
    }
    exporting.map(Spans)
}

/// The spans of this workspace, without those of libraries, and without what is logged in them.
fn is_exported(metadata: &Metadata<'_>) -> bool {
    let own = [proto::trace::TARGET, "coordinator", "worker", "trainer"];
    metadata.is_span() && own.iter().any(|own| metadata.target().starts_with(own))
}

fn exporting(endpoint: &str, service: &str) -> anyhow::Result<Exporting> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = Arc::new(runtime.context("cannot start a thread")?);
    let within = runtime.enter();
    // A command that ends must not wait for a collector that is away.
    let exporter =
        SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_retry_policy(RetryPolicy::disabled());
    let exporter = match endpoint.starts_with("https:") {
        // By itself it trusts nobody.
        true => exporter.with_tls_config(ClientTlsConfig::new().with_native_roots()),
        false => exporter,
    };
    let exporter = exporter.build().map_err(|error| Ended::usage(format!("--otlp-endpoint: {error}")))?;
    let mut resource = Resource::builder_empty()
        .with_service_name(service.to_owned())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_detector(Box::new(EnvResourceDetector::new()));
    if let Some(name) = std::env::var("OTEL_SERVICE_NAME").ok().filter(|name| !name.is_empty()) {
        resource = resource.with_service_name(name);
    }
    let exporter = OutageLog { exporter, away: AtomicBool::new(false) };
    let provider = SdkTracerProvider::builder().with_resource(resource.build()).with_batch_exporter(exporter).build();
    drop(within);
    Ok(Exporting { provider, runtime })
}

impl Spans {
    /// Exports what there is, for a moment.
    #[cfg(feature = "trainer")]
    pub(crate) fn flush(&self) {
        let Some(Exporting { provider, .. }) = self.0.clone() else { return };
        let (done, flushed) = mpsc::channel();
        // It would wait longer by itself.
        std::thread::spawn(move || done.send(provider.force_flush()));
        let _ = flushed.recv_timeout(FLUSH);
    }

    /// Exports the last spans of the process, unless that takes too long. To be called when nothing runs any more that
    /// could hold one.
    pub(crate) fn end(self) {
        if let Some(Exporting { provider, runtime }) = self.0 {
            // What failed has been logged.
            let _ = provider.shutdown_with_timeout(LAST_EXPORT);
            if let Some(runtime) = Arc::into_inner(runtime) {
                runtime.shutdown_background();
            }
        }
    }
}

/// An exporter that logs when its collector goes away, and when it is back.
#[derive(Debug)]
struct OutageLog<E> {
    exporter: E,
    away: AtomicBool,
}

impl<E: Export> Export for OutageLog<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        let was_away = self.away.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(error) if !was_away => warn!(%error, "spans cannot be exported and are lost; the work goes on"),
            Ok(()) if was_away => info!("spans are exported again"),
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
