//! `gleaner run resume`

use anyhow::Result;
use proto::pb::ResumeRunRequest;
use uuid::Uuid;

use super::{NameArgs, view, wait};
use crate::client::{Cluster, TimeoutArgs, answer, insist};

/// Arguments of `gleaner run resume`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    of: NameArgs,
    /// Go on from the checkpoint of this step instead, one of those that are kept; what came after it is forgotten
    #[arg(long, value_name = "STEP")]
    at: Option<u64>,
    /// Wait until the run has ended
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
}

/// Runs the command.
pub(super) async fn run(args: &Args) -> Result<()> {
    args.timeout.only_if(args.wait)?;
    let Args { of, .. } = args;
    let client = Cluster::new(&of.cluster)?.runs;
    let request =
        ResumeRunRequest { request_id: Uuid::new_v4().to_string(), run: of.run.clone(), step: args.at, epochs: None };
    let run = insist(async || answer(client.clone().resume_run(request.clone())).await).await?;
    if args.wait {
        return wait::run(of, args.timeout.timeout, false).await;
    }
    view::changed(of, &run, &view::state(&run))
}
