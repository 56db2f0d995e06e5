//! The `gleaner` binary: arguments, telemetry, signals, stores and sockets, of which a process has exactly one, and the
//! commands for people. The work itself is in the roles' crates.
//!
//! - [`cli`]: the command tree; [`exit`]: how a command ends; [`output`]: what it prints;
//! - [`roles`]: `coordinator`, `worker`, `trainer`, `rank`; [`local`]: all of them as one process tree; [`store`]: opens the store,
//!   [`metered`] counts its requests, [`metrics`] tells of them over HTTP;
//! - [`client`]: the way to the coordinator; [`dataset`], [`lists`], [`run`], [`model`], [`settings`], [`status`], [`doctor`]: for people;
//! - `demo`: the whole job, shown on one machine.

mod cli;
mod client;
mod dataset;
#[cfg(feature = "demo")]
mod demo;
mod doctor;
mod exit;
mod explain;
mod lists;
mod local;
mod metered;
mod metrics;
mod model;
mod output;
mod roles;
mod run;
mod settings;
mod status;
mod store;
mod telemetry;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    telemetry::start(cli.log_format, cli.command.default_log());
    rustls::crypto::ring::default_provider().install_default().expect("nobody has installed one before");
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::report(&anyhow::Error::from(error).context("cannot start threads")),
    };
    let result = runtime.block_on(cli.command.run(cli.log_format));
    // A thread that still reads standard input must not hold the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}
