//! `gleaner run extend`

use anyhow::Result;
use proto::pb::ResumeRunRequest;
use uuid::Uuid;

use super::{NameArgs, view, wait};
use crate::client::{Cluster, TimeoutArgs, answer, insist};

/// Arguments of `gleaner run extend`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    of: NameArgs,
    /// So many in all, more than it has done; the learning rate goes on as in a run of that length, and nothing ends it
    /// early
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Wait until the run has ended
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
}

/// Runs the command.
pub(super) async fn run(args: &Args) -> Result<()> {
    args.timeout.only_if(args.wait)?;
    let Args { of, epochs, .. } = args;
    let client = Cluster::new(&of.cluster)?.runs;
    let request_id = Uuid::new_v4().to_string();
    let request = ResumeRunRequest { request_id, run: of.run.clone(), step: None, epochs: Some(*epochs) };
    let run = insist(async || answer(client.clone().resume_run(request.clone())).await).await?;
    if args.wait {
        return wait::run(of, args.timeout.timeout, false).await;
    }
    view::changed(of, &run, &format!("{}, for {epochs} epochs in all", view::state(&run)))
}
