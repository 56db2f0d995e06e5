//! The `gleaner` binary: arguments, telemetry, signals, stores and sockets, of which a process has exactly one, and the
//! commands for people. The work itself is in the roles' crates.
//!
//! - [`cli`]: the command tree; [`exit`]: how a command ends; [`output`]: what it prints;
//! - [`roles`]: `coordinator`, `worker`, `trainer`, `rank`; [`local`]: all of them as one process tree; [`store`]:
//!   opens the store, [`metered`] counts its requests, [`overlay`] keeps what is written out of it, [`metrics`] serves
//!   the counts over HTTP; [`process`]: sockets and the signal to end;
//! - [`dial`], [`credentials`], [`client`]: the way to the coordinator, and what is shown to it; [`token`] makes
//!   tokens, [`secrets`] certificates; [`tls`]: certificates that are read, and [`watched`]; [`private`] files are for
//!   oneself alone;
//! - [`dataset`], [`lists`], [`run`], [`settings`], [`status`], [`doctor`]: for people; [`web`]: the same for a
//!   browser; [`classify`]: what a trained model sees in pictures; [`fsck`], [`gc`]: what in a store does not add up,
//!   and what nobody needs any more, without a coordinator; [`confirm`] asks before something is deleted, [`time`]
//!   writes moments and spans;
//! - [`man`] writes manual pages; `demo`: the whole job, shown on one machine; [`allocator`]: how a worker's process
//!   uses memory.

mod allocator;
mod classify;
mod cli;
mod client;
mod complete;
mod confirm;
mod credentials;
mod dataset;
#[cfg(feature = "demo")]
mod demo;
mod dial;
mod doctor;
mod exit;
mod fsck;
mod gc;
mod imports;
mod kubernetes;
mod lists;
mod local;
mod man;
mod metered;
mod metrics;
mod output;
mod overlay;
mod private;
mod process;
mod roles;
mod run;
mod secrets;
mod settings;
mod status;
mod store;
mod telemetry;
mod time;
mod tls;
mod token;
mod try_it;
mod watched;
mod web;

use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgMatches, FromArgMatches};
use tracing::{Instrument, Span};

fn main() -> ExitCode {
    complete::answer_shell::<cli::Cli>();
    let matches = cli::command().get_matches();
    let cli = cli::Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let name = name(&matches);
    if cli.quiet {
        output::be_quiet();
    }
    if matches.subcommand_name() == Some("worker") {
        allocator::give_buffers_back();
    }
    rustls::crypto::ring::default_provider().install_default().expect("nobody has installed one before");
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::report(&anyhow::Error::from(error).context("cannot start threads")),
    };
    let (role, default_log) = (cli.command.is_role(), cli.command.default_log());
    let service = if role { format!("gleaner-{name}") } else { "gleaner".to_owned() };
    let spans = match telemetry::start(&cli.telemetry, &service, default_log) {
        Ok(spans) => spans,
        Err(error) => return exit::report(&error),
    };
    if role {
        process::raise_file_limit();
    }
    let span = match role {
        true => Span::none(),
        false => proto::trace::command(&name, &std::env::var("TRACEPARENT").unwrap_or_default()),
    };
    let work = cli.command.run(cli.telemetry, spans.clone()).instrument(span.clone());
    let result = runtime.block_on(work);
    if let Err(error) = &result {
        proto::trace::failed(&span, &format!("{error:#}"));
    }
    drop(span);
    // A thread that still reads standard input must not hold the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    spans.end();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}

/// The command's words: `dataset create`.
fn name(matches: &ArgMatches) -> String {
    let mut words = Vec::new();
    let mut at = matches;
    while let Some((word, inner)) = at.subcommand() {
        words.push(word);
        at = inner;
    }
    words.join(" ")
}
