//! `gleaner run wait` and `gleaner run watch`

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::Result;
use proto::pb::{GetMetricsRequest, GetRunRequest, Metric, Run, RunState};

use super::{NameArgs, view};
use crate::client::{Cluster, answer, follow, wait_for};
use crate::exit::{Ended, Exit};
use crate::output::{Format, Progress, say, say_json};
use crate::time::span;

/// Waits for the end; with `curve` the learning curve is printed as it grows, as data.
pub(super) async fn run(of: &NameArgs, timeout: Option<Duration>, curve: bool) -> Result<()> {
    let NameArgs { run: name, cluster } = of;
    let client = Cluster::new(cluster)?.runs;
    let json = cluster.output == Format::Json;
    let mut progress = Progress::new("steps");
    let mut printed = HashSet::new();
    let mut seen = (0, 0);
    let end = follow(
        async || client.clone().watch_run(GetRunRequest { run: name.clone() }).await,
        async |run: Run| {
            let epoch = |metric: &Option<Metric>| metric.as_ref().map_or(0, |metric| metric.epoch);
            let now = (epoch(&run.last_step), epoch(&run.last_validation));
            let ended = matches!(run.state(), RunState::Done | RunState::Failed | RunState::Cancelled);
            if curve && (now != seen || ended) {
                seen = now;
                let kinds = ["train", "validation", "test"].map(str::to_owned).into();
                let request = GetMetricsRequest { run: name.clone(), kinds };
                // The next change, or the reconnected stream, brings what is missing now.
                let metrics = match answer(client.clone().get_metrics(request)).await {
                    Ok(answer) => answer.metrics,
                    Err(status) if ended => return Err(status.into()),
                    Err(_) => Vec::new(),
                };
                for metric in metrics {
                    if printed.insert((metric.kind.clone(), metric.epoch)) {
                        progress.say(if json {
                            serde_json::to_string(&metric)?
                        } else {
                            view::point(&metric, run.epochs)
                        });
                    }
                }
            }
            let details = run.last_step.as_ref().map_or(String::new(), |metric| {
                let to_go = view::remaining(&run).map_or(String::new(), |millis| format!(", {} to go", span(millis)));
                format!(
                    "epoch {}/{}, loss {:.3}, {:.0} images/s{to_go}",
                    metric.epoch, run.epochs, metric.loss, metric.images_per_second
                )
            });
            progress.update(run.step, run.epochs * run.steps_per_epoch, &view::phase(&run), &details);
            Ok(if ended { ControlFlow::Break(run) } else { ControlFlow::Continue(()) })
        },
    );
    let verb = if curve { "watch" } else { "wait" };
    let run = wait_for(end, timeout, &format!("gleaner run {verb} {name}")).await?;
    drop(progress);
    if json && !curve {
        say_json(&view::to_json(&run)?)?;
    }
    if run.state() != RunState::Done {
        let advice = format!("see: gleaner run logs {name}; go on from its last checkpoint: gleaner run resume {name}");
        return Err(Ended::error(Exit::Failed, format!("run {}; {advice}", view::phase(&run))));
    }
    if !json {
        let test =
            run.test.map_or(String::new(), |test| format!(", test top-1 {:.3}, top-5 {:.3}", test.top1, test.top5));
        say(format!("{name}: done{test}"));
    }
    Ok(())
}
