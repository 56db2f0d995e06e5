//! Trace context between processes, as W3C's `traceparent` has it: calls carry it, the requests that are served
//! continue it, and work that is done later is told of it.
//!
//! A process that exports no spans makes none here: its log leaves out this module's ([`TARGET`]), and nothing is
//! carried.

use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use tonic::codegen::http;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Code, Request, Status};
use tracing::field::Empty;
use tracing::{Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::pb;

/// The target of all spans that are made here.
pub const TARGET: &str = module_path!();

/// The header's name.
const TRACEPARENT: &str = "traceparent";

/// Lets the calls of a client carry the span in which they are made.
#[derive(Debug, Clone, Copy)]
pub struct Carry;

/// A channel whose calls do.
pub type Carried<S> = InterceptedService<S, Carry>;

impl Interceptor for Carry {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let parent = current();
        if let Ok(value) = parent.parse()
            && !parent.is_empty()
        {
            request.metadata_mut().insert(TRACEPARENT, value);
        }
        Ok(request)
    }
}

/// The span of a request that is served, within the span that its caller carried along.
pub fn served(request: &http::Request<()>) -> Span {
    let span = info_span!(
        "request",
        otel.name = request.uri().path().trim_start_matches('/'),
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system = "grpc",
        rpc.grpc.status_code = Empty,
        trace_id = Empty
    );
    let parent = request.headers().get(TRACEPARENT).and_then(|value| value.to_str().ok());
    continued(span, parent.unwrap_or_default())
}

/// Notes in the span of a request how it was answered.
pub fn answered<B>(response: http::Response<B>) -> http::Response<B> {
    if let Some(code) = response.headers().get("grpc-status") {
        let (span, code) = (Span::current(), Code::from_bytes(code.as_bytes()));
        span.record("rpc.grpc.status_code", code as i32);
        use Code::{DataLoss, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
        // The others are the caller's fault, and its span says so.
        if matches!(code, Unknown | DeadlineExceeded | Unimplemented | Internal | Unavailable | DataLoss) {
            span.record("otel.status_code", "ERROR");
        }
    }
    response
}

/// The span of a command that somebody gave, within the span that `parent` stands for.
pub fn command(name: &str, parent: &str) -> Span {
    let span = info_span!("command", otel.name = name, otel.status_description = Empty, trace_id = Empty);
    continued(span, parent)
}

/// The span of a rank's part in a generation, as `who` sees it, within the one that the order to join names.
pub fn generation(who: &str, join: &pb::Join) -> Span {
    let name = format!("{who} generation");
    let span = info_span!(
        "generation",
        otel.name = name,
        otel.status_description = Empty,
        run = join.run,
        generation = integer(join.generation),
        rank = integer(join.rank),
        world_size = integer(join.world_size),
        step = Empty,
        left = Empty,
        trace_id = Empty
    );
    continued(span, &join.traceparent)
}

/// A number as a span's field: OpenTelemetry has signed ones alone, and others would be text there.
pub fn integer(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

/// Notes in a span with the field `otel.status_description` that what it stands for has failed.
pub fn failed(span: &Span, error: &str) {
    span.record("otel.status_description", error);
}

/// Puts a new span within the one that `parent` stands for, if any, and names its trace in the span's field `trace_id`.
pub fn continued(span: Span, parent: &str) -> Span {
    if let Some(parent) = parse(parent) {
        // An error says that spans are not exported here.
        let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(parent));
    }
    if !span.is_disabled() {
        let context = span.context().span().span_context().clone();
        if context.is_valid() {
            span.record("trace_id", tracing::field::display(context.trace_id()));
        }
    }
    span
}

/// What stands for a span elsewhere. Empty: it is not exported.
pub fn traceparent(span: &Span) -> String {
    if span.is_disabled() {
        return String::new();
    }
    let context = span.context();
    let context = context.span().span_context().clone();
    match context.is_valid() {
        true => format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags()),
        false => String::new(),
    }
}

/// [`traceparent`] of the span that this is called in.
pub fn current() -> String {
    traceparent(&Span::current())
}

fn parse(text: &str) -> Option<SpanContext> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let sizes = [version.len(), trace.len(), span.len(), flags.len()];
    // A later version may have more behind these.
    if sizes != [2, 32, 16, 2] || version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let context = SpanContext::new(trace, span, flags, true, TraceState::NONE);
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparents_are_read_as_w3c_writes_them_and_nonsense_is_none() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parsed = parse(good).expect("W3C's own example");
        assert_eq!(parsed.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(parsed.span_id().to_string(), "00f067aa0ba902b7");
        assert!(parsed.is_sampled() && parsed.is_remote());
        assert!(parse(&format!("{}-more", good.replacen("00", "01", 1))).is_some(), "a later version");
        assert!(parse(&good.replace("-01", "-00")).is_some_and(|parsed| !parsed.is_sampled()));
        let zeros = format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32));
        for wrong in ["", "00", "no-trace-at-all", &good[1..], &format!("{good}-more"), &good.replace('4', "g"), &zeros]
        {
            assert!(parse(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn without_an_exporter_nothing_is_carried() {
        assert_eq!(current(), "");
        let request = Carry.call(Request::new(())).expect("a request");
        assert!(request.metadata().is_empty());
    }
}
