//! Logs on standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::SubscriberBuilder;
use tracing_subscriber::fmt::format::DefaultFields;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Installs the process's log. GLEANER_LOG or RUST_LOG chooses what is logged ("debug", "worker=debug,info");
/// without them it is `default`.
pub(crate) fn start(format: LogFormat, default: &str) {
    let chosen = std::env::var("GLEANER_LOG").or_else(|_| std::env::var("RUST_LOG"));
    let filter = chosen.ok().filter(|text| !text.is_empty()).and_then(|text| EnvFilter::try_new(text).ok());
    let filter = filter.unwrap_or_else(|| EnvFilter::new(default));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let log: SubscriberBuilder<DefaultFields, _, _, _> =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour);
    // A full disk behind standard error must not end the process: to complain about it there would panic.
    let log = log.log_internal_errors(false);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}
