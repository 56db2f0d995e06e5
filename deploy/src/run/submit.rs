//! `gleaner run submit`

use std::path::PathBuf;

use anyhow::Result;
use proto::RunSpec;
use proto::pb::{Run, SubmitRunRequest};
use proto::run_event::EventRecord;
use uuid::Uuid;

use super::{NameArgs, view, wait};
use crate::client::{Cluster, ClusterArgs, TimeoutArgs, answer, insist};
use crate::output::{Format, note, say};
use crate::settings;

/// Arguments of `gleaner run submit`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["file", "dataset"]))]
pub(crate) struct Args {
    /// The run's spec in TOML; everything but the dataset has a default
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Any value of the spec, put over the file: --set train.epochs=3
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The dataset to train on
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
    /// The run's name; DATASET-N if left out
    #[arg(long)]
    name: Option<String>,
    /// Begin with the weights of this run's newest checkpoint, or of that at a step: --from birds-1@1200. The networks must be the same; if
    /// the classes differ in number, the last layer begins anew
    #[arg(long, value_name = "RUN[@STEP]", value_parser = from)]
    from: Option<(String, Option<u64>)>,
    /// Print the resolved spec and submit nothing
    #[arg(long)]
    dry_run: bool,
    /// Wait until the run has ended
    #[arg(long, conflicts_with = "follow")]
    wait: bool,
    /// Wait, and print the learning curve as it grows
    #[arg(long)]
    follow: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Runs the command.
pub(super) async fn run(args: Args) -> Result<()> {
    let spec = spec(&args)?;
    if args.dry_run {
        match args.cluster.output {
            Format::Json => say(spec.to_json()),
            Format::Table => say(toml::to_string(&spec)?.trim_end()),
        }
        return Ok(());
    }
    let (from_run, from_step) = args.from.unwrap_or_default();
    let request = SubmitRunRequest {
        request_id: Uuid::new_v4().to_string(),
        name: args.name.unwrap_or_default(),
        spec_json: spec.to_json(),
        from_run,
        from_step,
    };
    let client = Cluster::new(&args.cluster)?.runs;
    let run = insist(async || answer(client.clone().submit_run(request.clone())).await).await?;
    let of = NameArgs { run: run.run.clone(), cluster: args.cluster };
    if args.wait || args.follow {
        note(format!("{}: {}", run.run, submitted(&run)));
        return wait::run(&of, args.timeout.timeout, args.follow).await;
    }
    view::changed(&of, &run, &submitted(&run))?;
    if of.cluster.output == Format::Table {
        note(format!("see how it goes: gleaner run watch {}", run.run));
    }
    Ok(())
}

/// What was submitted, with what its weights are from.
fn submitted(run: &Run) -> String {
    let first = run.events.first().and_then(|json| serde_json::from_str::<EventRecord>(json).ok());
    first.map_or_else(|| "submitted".to_owned(), |record| view::happened(&record.event))
}

/// `RUN` or `RUN@STEP`.
fn from(text: &str) -> Result<(String, Option<u64>), String> {
    match text.rsplit_once('@') {
        None => Ok((text.to_owned(), None)),
        Some((run, step)) => match step.parse() {
            Ok(step) if !run.is_empty() => Ok((run.to_owned(), Some(step))),
            _ => Err("must be a run's name, or RUN@STEP as in birds-1@1200".to_owned()),
        },
    }
}

/// The file with `--set` and `--dataset` over it.
fn spec(args: &Args) -> Result<RunSpec> {
    let mut table = match &args.file {
        Some(path) => settings::read(path)?,
        None => toml::Table::new(),
    };
    for assignment in &args.set {
        settings::set(&mut table, assignment)?;
    }
    if let Some(dataset) = &args.dataset {
        table.insert("dataset".to_owned(), dataset.as_str().into());
    }
    Ok(RunSpec::from_toml(&table.to_string())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        submit: Args,
    }

    fn parse(args: &[&str]) -> Result<RunSpec> {
        let cli: Cli = clap::Parser::try_parse_from([&["submit"], args].concat())?;
        spec(&cli.submit)
    }

    #[test]
    fn a_run_needs_a_file_or_a_dataset_and_takes_single_values_over_both() {
        let spec = parse(&["--dataset", "birds", "--set", "train.epochs=3", "--set", "model.arch=alexnet-slim"])
            .expect("good");
        assert_eq!((spec.dataset.as_str(), spec.train.epochs), ("birds", 3));
        assert!(parse(&["--set", "train.epochs=3"]).is_err(), "neither file nor dataset");
        let refusal = parse(&["--dataset", "birds", "--set", "train.epoch=3"]).expect_err("unknown key").to_string();
        assert!(refusal.contains("epoch"), "{refusal}");
    }
}
