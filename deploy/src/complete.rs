//! What a shell offers behind `gleaner`: commands and flags, and the names of the datasets and runs that there are.
//! `source <(COMPLETE=bash gleaner)` teaches it to a shell.

use std::ffi::OsStr;
use std::time::Duration;

use clap::{Args, Command, CommandFactory, FromArgMatches};
use clap_complete::CompleteEnv;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use proto::pb::{ListDatasetsRequest, ListRunsRequest};

use crate::client::Cluster;
use crate::dial::DialArgs;

/// Nobody who types waits longer for names.
const PATIENCE: Duration = Duration::from_millis(800);

/// Answers the shell and ends, if it is a shell that asks.
pub(crate) fn answer_shell<C: CommandFactory>() {
    CompleteEnv::with_factory(C::command).complete();
}

/// The newest runs, so many.
const MOST_RUNS: u32 = 200;

/// Offers the names of datasets.
pub(crate) fn datasets() -> ArgValueCompleter {
    names(async |cluster| {
        let answer = cluster.datasets.clone().list_datasets(ListDatasetsRequest {}).await.ok()?.into_inner();
        Some(answer.datasets.into_iter().map(|dataset| dataset.name).collect())
    })
}

/// Offers the names of runs.
pub(crate) fn runs() -> ArgValueCompleter {
    names(async |cluster| {
        let answer = cluster.runs.clone().list_runs(ListRunsRequest { limit: MOST_RUNS }).await.ok()?.into_inner();
        Some(answer.runs.into_iter().map(|run| run.run).collect())
    })
}

/// Asks the coordinator that a command without flags would ask; no answer is no reason to say anything.
fn names(ask: impl AsyncFn(Cluster) -> Option<Vec<String>> + Send + Sync + 'static) -> ArgValueCompleter {
    ArgValueCompleter::new(move |typed: &OsStr| {
        let asked = || {
            let flags = DialArgs::augment_args(Command::new("gleaner")).try_get_matches_from(["gleaner"]).ok()?;
            let dial = DialArgs::from_arg_matches(&flags).ok()?;
            // Certificates are read by it; another may have been installed, as in tests.
            let _ = rustls::crypto::ring::default_provider().install_default();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
            runtime.block_on(async {
                let cluster = Cluster::over(&dial.dial().ok()?);
                tokio::time::timeout(PATIENCE, ask(cluster)).await.ok()?
            })
        };
        let typed = typed.to_string_lossy();
        let fitting = asked().unwrap_or_default().into_iter().filter(|name| name.starts_with(&*typed));
        fitting.map(CompletionCandidate::new).collect()
    })
}
