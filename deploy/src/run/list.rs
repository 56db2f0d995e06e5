//! `gleaner run list`

use anyhow::Result;
use proto::pb::{ListRunsRequest, Metric};

use super::view;
use crate::client::{Cluster, ClusterArgs, answer};
use crate::output::{Format, Table, say_json};

/// Runs the command.
pub(super) async fn run(args: &ClusterArgs) -> Result<()> {
    let mut client = Cluster::new(args)?.runs;
    let mut runs = answer(client.list_runs(ListRunsRequest { limit: 0 })).await?.runs;
    runs.sort_by(|a, b| a.run.cmp(&b.run));
    if args.output == Format::Json {
        return say_json(&runs.iter().map(view::to_json).collect::<Result<Vec<_>>>()?);
    }
    let mut table = Table::new(&["run", "state", "dataset", "ranks", "step", "validation", "test", "reason"]);
    let top1 = |metric: &Option<Metric>| metric.as_ref().map_or("-".to_owned(), |metric| format!("{:.3}", metric.top1));
    for run in runs {
        table.row(vec![
            run.run.clone(),
            view::state(&run),
            run.dataset.clone(),
            run.world_size.to_string(),
            format!("{}/{}", run.step, run.epochs * run.steps_per_epoch),
            top1(&run.last_validation),
            top1(&run.test),
            run.reason.clone(),
        ]);
    }
    table.say();
    Ok(())
}
