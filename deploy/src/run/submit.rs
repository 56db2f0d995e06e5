//! `gleaner run submit`

use std::path::PathBuf;

use anyhow::Result;
use proto::RunSpec;
use proto::network::Network;
use proto::pb::{ListRunsRequest, Run, SubmitRunRequest};
use proto::run_event::EventRecord;
use uuid::Uuid;

use super::{NameArgs, view, wait, weights};
use crate::client::{Cluster, ClusterArgs, TimeoutArgs, answer, insist};
use crate::exit::is_outage;
use crate::output::{Format, note, say, say_json};
use crate::settings;
use crate::time::span;

/// So many of the newest runs are looked at for one that tells how long another will take.
const OTHERS: u32 = 50;

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
    /// Begin with the weights of this run's newest checkpoint, of that at a step (--from birds-1@1200), or of a
    /// .safetensors file or a state dict by torch.save (.pth) with tensors named as in torchvision. The networks must
    /// be the same. Of the last layer those classes that are known there keep their rows
    #[arg(long, value_name = "RUN[@STEP]|FILE", value_parser = from)]
    from: Option<Begin>,
    /// Submit nothing; print the resolved spec, how many steps it makes, what memory a rank needs, and how long it
    /// takes if a run of the same network tells
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
    args.timeout.only_if(args.wait || args.follow)?;
    let spec = spec(&args)?;
    spec.warnings().iter().for_each(|warning| note(format!("warning: {warning}")));
    if args.dry_run {
        return dry_run(&args, &spec).await;
    }
    let mut request = SubmitRunRequest {
        request_id: Uuid::new_v4().to_string(),
        name: args.name.unwrap_or_default(),
        spec_json: spec.to_json(),
        ..SubmitRunRequest::default()
    };
    let cluster = Cluster::new(&args.cluster)?;
    let run = match args.from {
        Some(Begin::File(path)) => {
            request.from_file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let weights = weights::read(&path)?;
            insist(async || weights::send(&cluster, request.clone(), weights.clone()).await).await?
        }
        from => {
            if let Some(Begin::Run(run, step)) = from {
                (request.from_run, request.from_step) = (run, step);
            }
            insist(async || answer(cluster.runs.clone().submit_run(request.clone())).await).await?
        }
    };
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

/// What would be submitted. Without a coordinator that is what the spec alone says.
async fn dry_run(args: &Args, spec: &RunSpec) -> Result<()> {
    let (from_run, from_step) = match &args.from {
        Some(Begin::Run(run, step)) => (run.clone(), *step),
        _ => Default::default(),
    };
    let request = SubmitRunRequest {
        request_id: Uuid::new_v4().to_string(),
        name: args.name.clone().unwrap_or_default(),
        spec_json: spec.to_json(),
        from_run,
        from_step,
        dry_run: true,
        ..SubmitRunRequest::default()
    };
    let mut client = Cluster::new(&args.cluster)?.runs;
    let run = match answer(client.submit_run(request)).await {
        Ok(run) => Some(run),
        Err(status) if is_outage(&status) => {
            note("no coordinator answers, so that nothing was held against the dataset");
            None
        }
        Err(status) => return Err(status.into()),
    };
    let spec = run.as_ref().map_or_else(|| Ok(spec.clone()), |run| RunSpec::from_json(&run.spec_json))?;
    let others = match &run {
        Some(_) => answer(client.list_runs(ListRunsRequest { limit: OTHERS })).await?.runs,
        None => Vec::new(),
    };
    let pace = pace(&spec, &others);
    let seconds = |run: &Run, images_per_second: f64| {
        (run.steps_per_epoch * run.epochs) as f64 * f64::from(spec.train.batch) / images_per_second
    };
    let memory = [spec.ranks.min, spec.ranks.max].map(|ranks| (ranks, memory(&spec, ranks)));
    if args.cluster.output == Format::Json {
        let memory: serde_json::Map<_, _> =
            memory.iter().map(|(ranks, bytes)| (ranks.to_string(), (*bytes).into())).collect();
        let steps = run.as_ref().map(|run| run.steps_per_epoch);
        let seconds = run.as_ref().zip(pace).map(|(run, other)| seconds(run, images_per_second(other)));
        return say_json(&serde_json::json!({
            "spec": spec,
            "steps_per_epoch": steps,
            "memory_bytes_by_ranks": memory,
            "seconds": seconds,
        }));
    }
    say(toml::to_string(&spec)?.trim_end());
    say("");
    if let Some(run) = &run {
        say(format!("# {}: {}", run.run, submitted(run)));
        say(format!("# {} steps in an epoch, {} in all", run.steps_per_epoch, run.steps_per_epoch * run.epochs));
    }
    if let Some((run, other)) = run.as_ref().zip(pace) {
        let rate = images_per_second(other);
        let took = span((1000.0 * seconds(run, rate)) as u64);
        say(format!("# about {took} at the {rate:.0} images a second of {} on {} ranks", other.run, other.world_size));
    }
    for (ranks, bytes) in memory.iter().skip(usize::from(memory[0] == memory[1])) {
        let many = if *ranks == 1 { "one rank needs".to_owned() } else { format!("of {ranks} ranks each needs") };
        say(format!("# {many} about {} beside the images that it keeps", bytesize::ByteSize(*bytes)));
    }
    Ok(())
}

/// The newest run that had the same network and the same crop, and so tells how fast this one will be on as many ranks.
fn pace<'a>(spec: &RunSpec, others: &'a [Run]) -> Option<&'a Run> {
    let is_alike = |other: &&Run| {
        let of = RunSpec::from_json(&other.spec_json);
        of.is_ok_and(|of| of.model == spec.model && of.input.crop == spec.input.crop) && images_per_second(other) > 0.0
    };
    others.iter().find(is_alike)
}

fn images_per_second(run: &Run) -> f64 {
    run.last_step.as_ref().map_or(0.0, |point| point.images_per_second)
}

/// Bytes that each of so many ranks needs, beside the program and the cache of images: a step's, and two batches ahead.
fn memory(spec: &RunSpec, ranks: u32) -> u64 {
    // The classes of an unknown dataset weigh little.
    let network = Network::new(&spec.model, 1000, spec.input.crop);
    let (batch, lanes) = (spec.train.batch, spec.ranks.lanes);
    let own = batch.div_ceil(lanes) * lanes.div_ceil(ranks);
    let most =
        if spec.train.micro_batch == 0 { own } else { own.min(spec.train.micro_batch.max(batch.div_ceil(lanes))) };
    let ahead = 2 * u64::from(own) * 3 * u64::from(spec.input.crop * spec.input.crop);
    network.memory(spec.input.crop, most.into()) + ahead
}

/// What was submitted, with what its weights are from.
fn submitted(run: &Run) -> String {
    let first = run.events.first().and_then(|json| serde_json::from_str::<EventRecord>(json).ok());
    first.map_or_else(|| "submitted".to_owned(), |record| view::happened(&record.event))
}

/// What a run begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Begin {
    Run(String, Option<u64>),
    File(PathBuf),
}

/// `RUN`, `RUN@STEP`, or a file by its ending or its folder.
fn from(text: &str) -> Result<Begin, String> {
    if weights::is_file(text) {
        return Ok(Begin::File(text.into()));
    }
    match text.rsplit_once('@') {
        None => Ok(Begin::Run(text.to_owned(), None)),
        Some((run, step)) => match step.parse() {
            Ok(step) if !run.is_empty() => Ok(Begin::Run(run.to_owned(), Some(step))),
            _ => Err("must be a run's name, RUN@STEP as in birds-1@1200, or a file".to_owned()),
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
    fn a_run_begins_with_another_one_or_with_a_file() {
        let of = |run: &str, step| Ok(Begin::Run(run.to_owned(), step));
        assert_eq!(from("birds-1"), of("birds-1", None));
        assert_eq!(from("birds-1@1200"), of("birds-1", Some(1200)));
        assert!(from("birds-1@last").is_err());
        for file in ["alexnet.pth", "./weights", "model.safetensors"] {
            assert_eq!(from(file), Ok(Begin::File(file.into())));
        }
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
