//! `gleaner run delete`

use anyhow::Result;
use proto::pb::DeleteRunRequest;

use super::NameArgs;
use crate::client::{Cluster, answer, insist};
use crate::confirm;
use crate::output::note;

/// Arguments of `gleaner run delete`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    of: NameArgs,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

/// Runs the command.
pub(super) async fn run(args: &Args) -> Result<()> {
    let NameArgs { run, cluster } = &args.of;
    confirm::deletion(&format!("run {run} with its checkpoints, its model and its logs"), args.yes)?;
    let client = Cluster::new(cluster)?.runs;
    insist(async || answer(client.clone().delete_run(DeleteRunRequest { run: run.clone() })).await).await?;
    note(format!("{run}: deleted"));
    Ok(())
}
