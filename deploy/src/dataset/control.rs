//! `gleaner dataset pause`, `resume`, `finish` and `priority`.

use std::time::Duration;

use anyhow::Result;
use proto::pb::control_dataset_request::{Decision, Finish, Pause, Resume};
use proto::pb::{ControlDatasetRequest, Dataset, Priority};
use proto::rejection::KEPT;

use super::{NameArgs, to_json, wait};
use crate::client::{Cluster, TimeoutArgs, answer, duration, insist};
use crate::output::{Format, say, say_json};

/// Arguments of `gleaner dataset finish`.
#[derive(Debug, clap::Args)]
pub(crate) struct FinishArgs {
    #[command(flatten)]
    of: NameArgs,
    /// Not before so long (90s, 5m, 1d2h); a later `finish` without it takes its place [default: now]
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    after: Option<Duration>,
    /// Wait until the dataset is ready
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
}

/// How large a dataset's share of the workers is.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Share {
    /// A quarter of a normal one's
    Low,
    /// As large as any other's
    Normal,
    /// Four times a normal one's
    High,
}

impl Share {
    /// What the coordinator is asked for.
    pub(crate) fn decision(self) -> Decision {
        let priority = match self {
            Self::Low => Priority::Low,
            Self::Normal => Priority::Normal,
            Self::High => Priority::High,
        };
        Decision::Priority(priority.into())
    }
}

pub(super) async fn pause(of: NameArgs) -> Result<()> {
    let text = format!("{} is paused: what is leased is finished, and nothing more is begun", of.name);
    decide(&of, Decision::Pause(Pause {}), |_| text).await
}

pub(super) async fn resume(of: NameArgs) -> Result<()> {
    let text = |dataset: &Dataset| match dataset.finishes_after_millis {
        Some(0) => format!("{0} is finished with what it has: gleaner dataset refresh {0} fetches the rest", of.name),
        _ => format!("{} goes on", of.name),
    };
    decide(&of, Decision::Resume(Resume {}), text).await
}

pub(super) async fn priority(of: NameArgs, share: Share) -> Result<()> {
    let text = format!("{}: priority {}", of.name, format!("{share:?}").to_lowercase());
    decide(&of, share.decision(), |_| text).await
}

pub(super) async fn finish(args: FinishArgs) -> Result<()> {
    args.timeout.only_if(args.wait)?;
    let after = args.after.unwrap_or_default();
    let when = if after.is_zero() { "now".to_owned() } else { format!("in {}", humantime::format_duration(after)) };
    let name = &args.of.name;
    let text = |dataset: &Dataset| {
        let kept = dataset.outcomes.get(KEPT).copied().unwrap_or_default();
        let nothing = if after.is_zero() && kept == 0 { ", which is nothing yet, so that it fails" } else { "" };
        format!("{name} is finished with what it has {when}{nothing}; gleaner dataset refresh {name} fetches the rest")
    };
    let after_millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
    decide(&args.of, Decision::Finish(Finish { after_millis }), text).await?;
    if args.wait { wait(&args.of, args.timeout.timeout, false).await } else { Ok(()) }
}

async fn decide(of: &NameArgs, decision: Decision, text: impl FnOnce(&Dataset) -> String) -> Result<()> {
    let client = Cluster::new(&of.cluster)?.datasets;
    let request = ControlDatasetRequest { name: of.name.clone(), decision: Some(decision) };
    let dataset = insist(async || answer(client.clone().control_dataset(request.clone())).await).await?;
    match of.cluster.output {
        Format::Json => say_json(&to_json(&dataset)?),
        Format::Table => {
            say(text(&dataset));
            Ok(())
        }
    }
}

/// What was decided about a dataset, for people.
pub(super) fn decisions(dataset: &Dataset) -> Vec<String> {
    let name = &dataset.name;
    let mut lines = Vec::new();
    if dataset.paused {
        lines.push(format!("paused; to go on: gleaner dataset resume {name}"));
    }
    match dataset.finishes_after_millis {
        None => {}
        Some(0) => lines.push("being finished with what it has".to_owned()),
        Some(millis) => {
            let after = humantime::format_duration(Duration::from_secs(millis.div_ceil(1000)));
            lines.push(format!("finished with what it has in {after}"));
        }
    }
    match dataset.priority() {
        Priority::Low => lines.push("priority low".to_owned()),
        Priority::High => lines.push("priority high".to_owned()),
        Priority::Normal | Priority::Unspecified => {}
    }
    lines
}
