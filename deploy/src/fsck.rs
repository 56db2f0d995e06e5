//! `gleaner fsck`: what in a store does not add up.

use anyhow::{Result, anyhow};
use bytesize::ByteSize;
use coordinator::audit::{self, AuditError, Report};

use crate::exit::{Ended, Exit};
use crate::output::{Format, say, say_json};
use crate::store::{self, StoreArgs};

/// Arguments of `gleaner fsck`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Read every tar, too, with all its images
    #[arg(long)]
    deep: bool,
    /// How to answer
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// Checks the store; fails if something does not add up.
pub(crate) async fn run(args: Args) -> Result<()> {
    let store = store::open_existing(&args.store.store)?;
    let report = audit::check(store, args.deep).await.map_err(unreadable)?;
    match args.output {
        Format::Json => say_json(&report)?,
        Format::Table => description(&report, args.deep).iter().for_each(say),
    }
    match report.findings.len() {
        0 => Ok(()),
        _ => Err(Ended::error(Exit::Failed, format!("{}: not all adds up", args.store.store))),
    }
}

/// Why a store cannot be looked at, as commands say it.
pub(crate) fn unreadable(error: AuditError) -> anyhow::Error {
    match error {
        AuditError::NoCluster(_) => Ended::error(Exit::NotFound, error.to_string()),
        AuditError::Store(_) => anyhow!(error),
    }
}

fn description(report: &Report, deep: bool) -> Vec<String> {
    let Report { cluster, terms, datasets, shards, runs, objects, bytes, findings, left_out } = report;
    let mut lines: Vec<String> = findings.iter().map(|finding| format!("{}: {}", finding.key, finding.what)).collect();
    let known = left_out.iter().map(|finding| format!("{}: {} (its shard is left out)", finding.key, finding.what));
    lines.extend(known);
    let tars = if deep { "" } else { " (tars by their length alone; --deep reads them)" };
    let bytes = ByteSize(*bytes);
    lines.push(format!(
        "cluster {}: {terms} terms, {datasets} datasets with {shards} shards{tars}, {runs} runs, {objects} objects of {bytes}",
        if cluster.is_empty() { "without an id yet" } else { cluster }
    ));
    lines.push(match findings.len() {
        0 => "all adds up".to_owned(),
        1 => "1 finding".to_owned(),
        n => format!("{n} findings"),
    });
    lines
}
