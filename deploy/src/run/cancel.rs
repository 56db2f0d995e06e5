//! `gleaner run cancel`

use anyhow::Result;
use proto::pb::CancelRunRequest;

use super::{NameArgs, view};
use crate::client::{Cluster, answer, insist};

/// Runs the command.
pub(super) async fn run(of: &NameArgs) -> Result<()> {
    let client = Cluster::new(&of.cluster)?.runs;
    let request = CancelRunRequest { run: of.run.clone() };
    let run = insist(async || answer(client.clone().cancel_run(request.clone())).await).await?;
    view::changed(of, &run, &view::state(&run))
}
