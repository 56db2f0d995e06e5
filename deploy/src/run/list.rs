//! `gleaner run list`

use anyhow::Result;
use proto::pb::{ListRunsRequest, Metric, Run};

use super::view;
use crate::client::{Cluster, ClusterArgs, answer};
use crate::output::{Format, Table, say_json};
use crate::time::{now_millis, span};

/// Arguments of `gleaner run list`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only the newest N runs [default: all]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Only runs in this state; may be repeated
    #[arg(long, value_name = "STATE", value_parser = ["waiting", "running", "cancelling", "done", "failed", "cancelled"])]
    state: Vec<String>,
    /// Only runs on this dataset
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

impl Args {
    fn is_meant(&self, run: &Run) -> bool {
        (self.state.is_empty() || self.state.contains(&view::state(run)))
            && self.dataset.as_ref().is_none_or(|dataset| run.dataset == *dataset)
    }
}

/// Runs the command.
pub(super) async fn run(args: &Args) -> Result<()> {
    let mut client = Cluster::new(&args.cluster)?.runs;
    let limit = args.limit.unwrap_or(0);
    let is_filtered = !args.state.is_empty() || args.dataset.is_some();
    let request = ListRunsRequest { limit: if is_filtered { 0 } else { limit } };
    let mut runs = answer(client.list_runs(request)).await?.runs;
    runs.retain(|run| args.is_meant(run));
    runs.truncate(if limit == 0 { runs.len() } else { limit as usize });
    if args.cluster.output == Format::Json {
        return say_json(&runs.iter().map(view::to_json).collect::<Result<Vec<_>>>()?);
    }
    table(&runs, now_millis()).say();
    Ok(())
}

fn table(runs: &[Run], now_millis: u64) -> Table {
    let mut table =
        Table::new(&["run", "state", "age", "duration", "dataset", "ranks", "step", "validation", "test", "reason"]);
    let top1 = |metric: &Option<Metric>| metric.as_ref().map_or("-".to_owned(), |metric| format!("{:.3}", metric.top1));
    for run in runs {
        table.row(vec![
            run.run.clone(),
            view::state(run),
            span(now_millis.saturating_sub(run.submitted_millis)),
            view::duration(run, now_millis).map_or("-".to_owned(), span),
            run.dataset.clone(),
            run.world_size.to_string(),
            format!("{}/{}", run.step, run.epochs * run.steps_per_epoch),
            top1(&run.last_validation),
            top1(&run.test),
            run.reason.clone(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::pb::RunState;

    #[test]
    fn each_run_has_its_age_and_for_how_long_it_ran_or_has_been_running() {
        let run = |name: &str, state: RunState, [submitted_millis, began_millis, ended_millis]: [u64; 3]| Run {
            run: name.into(),
            state: state.into(),
            dataset: "birds".into(),
            submitted_millis,
            began_millis,
            ended_millis,
            ..Run::default()
        };
        let runs = [
            run("c", RunState::Waiting, [90_000, 0, 0]),
            run("b", RunState::Running, [50_000, 60_000, 0]),
            run("a", RunState::Done, [0, 10_000, 95_000]),
        ];
        let lines = table(&runs, 100_000).lines();
        let cells: Vec<Vec<&str>> = lines.iter().map(|line| line.split_whitespace().take(4).collect()).collect();
        let expected = [
            ["RUN", "STATE", "AGE", "DURATION"],
            ["c", "waiting", "10s", "-"],
            ["b", "running", "50s", "40s"],
            ["a", "done", "1m40s", "1m25s"],
        ];
        assert_eq!(cells, expected);
    }
}
