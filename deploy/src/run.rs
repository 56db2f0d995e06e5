//! `gleaner run ...`

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use proto::RunSpec;
use proto::pb::{
    CancelRunRequest, CompareRunsRequest, CompareRunsResponse, GetLogsRequest, GetMetricsRequest, GetRunRequest,
    LedgerLine, ListRunsRequest, LogLine, Metric, ResumeRunRequest, Run, RunState, SubmitRunRequest,
};
use proto::run_event::{EventRecord, RunEvent};
use serde_json::Value;
use tonic::Status;
use uuid::Uuid;

use crate::client::{Cluster, ClusterArgs, answer, follow, insist, wait_for};
use crate::dataset::TimeoutArgs;
use crate::exit::{Ended, Exit};
use crate::model::ModelArgs;
use crate::output::{Format, Progress, Table, note, say, say_json, state_name, unfold_spec};
use crate::settings;

/// Submits, shows and ends training runs.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Submit a training run
    Submit(SubmitArgs),
    /// List all runs
    List(ClusterArgs),
    /// Show a run: its state, its newest figures, its history, its spec
    Describe(NameArgs),
    /// Show the learning curve until the run has ended
    Watch(NameArgs),
    /// Wait until the run has ended
    Wait {
        #[command(flatten)]
        of: NameArgs,
        #[command(flatten)]
        timeout: TimeoutArgs,
    },
    /// Print what the run's ranks wrote
    Logs {
        #[command(flatten)]
        of: NameArgs,
        /// Go on until the run has ended
        #[arg(short, long)]
        follow: bool,
    },
    /// Print the learning curve
    Metrics {
        #[command(flatten)]
        of: NameArgs,
        /// Only points of these kinds: step, train, validation, test
        #[arg(long, value_name = "KIND", value_parser = ["step", "train", "validation", "test"])]
        kind: Vec<String>,
        /// As CSV with a header
        #[arg(long)]
        csv: bool,
    },
    /// Fetch a done run's model: safetensors, ONNX, TorchScript, and a description
    Model(ModelArgs),
    /// Say whether two runs were trained on the same samples in each step; ends with 1 if not
    Compare {
        /// A run's name
        a: String,
        /// The other's
        b: String,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
    /// Say what bounds the run: data, compute, network, or one of its ranks
    Explain(NameArgs),
    /// End a run after the step it is at, with a checkpoint
    Cancel(NameArgs),
    /// Queue a cancelled or failed run again, from its last checkpoint
    Resume {
        #[command(flatten)]
        of: NameArgs,
        /// Wait until the run has ended
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        timeout: TimeoutArgs,
    },
}

/// A run by name.
#[derive(Debug, clap::Args)]
pub(crate) struct NameArgs {
    /// The run's name
    pub(crate) run: String,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

/// Arguments of `gleaner run submit`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["file", "dataset"]))]
pub(crate) struct SubmitArgs {
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

/// Runs one command.
pub(crate) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Submit(args) => submit(args).await,
        Command::List(args) => list(&args).await,
        Command::Describe(of) => describe(&of).await,
        Command::Watch(of) => wait(&of, None, true).await,
        Command::Wait { of, timeout } => wait(&of, timeout.timeout, false).await,
        Command::Logs { of, follow } => logs(&of, follow).await,
        Command::Metrics { of, kind, csv } => metrics(&of, kind, csv).await,
        Command::Model(args) => crate::model::run(args).await,
        Command::Compare { a, b, cluster } => compare(&a, &b, &cluster).await,
        Command::Explain(of) => crate::explain::explain(&of).await,
        Command::Cancel(of) => cancel(&of).await,
        Command::Resume { of, wait, timeout } => resume(&of, wait, timeout.timeout).await,
    }
}

async fn submit(args: SubmitArgs) -> Result<()> {
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
        return wait(&of, args.timeout.timeout, args.follow).await;
    }
    changed(&of, &run, &submitted(&run))?;
    if of.cluster.output == Format::Table {
        note(format!("see how it goes: gleaner run watch {}", run.run));
    }
    Ok(())
}

/// What was submitted, with what its weights are from.
fn submitted(run: &Run) -> String {
    let first = run.events.first().and_then(|json| serde_json::from_str::<EventRecord>(json).ok());
    first.map_or_else(|| "submitted".to_owned(), |record| happened(&record.event))
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
fn spec(args: &SubmitArgs) -> Result<RunSpec> {
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

/// Says what a command has made of a run.
fn changed(of: &NameArgs, run: &Run, what: &str) -> Result<()> {
    match of.cluster.output {
        Format::Json => say_json(&to_json(run)?),
        Format::Table => {
            say(format!("{}: {what}", run.run));
            Ok(())
        }
    }
}

async fn list(args: &ClusterArgs) -> Result<()> {
    let mut client = Cluster::new(args)?.runs;
    let mut runs = answer(client.list_runs(ListRunsRequest {})).await?.runs;
    runs.sort_by(|a, b| a.run.cmp(&b.run));
    if args.output == Format::Json {
        return say_json(&runs.iter().map(to_json).collect::<Result<Vec<_>>>()?);
    }
    let mut table = Table::new(&["run", "state", "dataset", "ranks", "step", "validation", "test", "reason"]);
    let top1 = |metric: &Option<Metric>| metric.as_ref().map_or("-".to_owned(), |metric| format!("{:.3}", metric.top1));
    for run in runs {
        table.row(vec![
            run.run.clone(),
            state(&run),
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

async fn describe(of: &NameArgs) -> Result<()> {
    let mut client = Cluster::new(&of.cluster)?.runs;
    let run = answer(client.get_run(GetRunRequest { run: of.run.clone() })).await?;
    match of.cluster.output {
        Format::Json => say_json(&to_json(&run)?),
        Format::Table => {
            description(&run).iter().for_each(say);
            Ok(())
        }
    }
}

/// `describe` for people.
fn description(run: &Run) -> Vec<String> {
    let mut lines = vec![phase(run)];
    lines.push(format!("dataset {}, manifest version {}", run.dataset, run.manifest_version));
    lines.push(format!(
        "step {} of {} ({} epochs); generation {} with {} ranks; checkpoint at step {}",
        run.step,
        run.epochs * run.steps_per_epoch,
        run.epochs,
        run.generation,
        run.world_size,
        run.checkpoint_step
    ));
    if run.best_checkpoint_step > 0 {
        lines.push(format!("best validation in the checkpoint at step {}", run.best_checkpoint_step));
    }
    let newest = [&run.last_step, &run.last_validation, &run.test];
    lines.extend(newest.into_iter().flatten().map(|metric| point(metric, run.epochs)));
    lines.push(String::new());
    lines.extend(run.events.iter().map(|json| match serde_json::from_str::<EventRecord>(json) {
        Ok(record) => format!("{:>4}  {}", record.n, happened(&record.event)),
        Err(_) => json.clone(),
    }));
    if let Ok(spec) = RunSpec::from_json(&run.spec_json)
        && let Ok(toml) = toml::to_string(&spec)
    {
        lines.push(String::new());
        lines.extend(toml.lines().filter(|line| !line.is_empty()).map(str::to_owned));
    }
    lines
}

/// One event of a run's history for people.
fn happened(event: &RunEvent) -> String {
    match event {
        RunEvent::Submitted { start: None, .. } => "submitted".to_owned(),
        RunEvent::Submitted { start: Some(start), .. } => format!("submitted; begins with {start}"),
        RunEvent::Generation { generation, members } => format!("generation {generation} of {} ranks", members.len()),
        RunEvent::Checkpoint { step, top1, .. } => {
            let top1 = top1.map_or(String::new(), |top1| format!(", validation top-1 {top1:.3}"));
            format!("checkpoint at step {step}{top1}")
        }
        RunEvent::Damaged { key, reason } => format!("checkpoint {key} is lost: {reason}"),
        RunEvent::Failure { generation, step, reason, culprit } => {
            let since = culprit.as_ref().map_or(0.0, |culprit| culprit.silent_millis as f64 / 1000.0);
            let since = if since < 0.1 { String::new() } else { format!(", last heard {since:.1} s before") };
            format!("generation {generation} failed after step {step}: {reason}{since}")
        }
        RunEvent::Cancelling => "cancelling".to_owned(),
        RunEvent::Cancelled => "cancelled".to_owned(),
        RunEvent::Failed { reason } => format!("failed: {reason}"),
        RunEvent::Resumed { .. } => "resumed".to_owned(),
        RunEvent::Done { model, .. } => format!("done; the model is in {model}"),
    }
}

/// The message as JSON: the state by its name, spec and events as objects.
fn to_json(run: &Run) -> Result<Value> {
    let mut value = serde_json::to_value(run)?;
    value["state"] = state(run).into();
    value["events"] =
        run.events.iter().map(|json| serde_json::from_str(json)).collect::<Result<Vec<Value>, _>>()?.into();
    unfold_spec(&mut value);
    Ok(value)
}

fn state(run: &Run) -> String {
    state_name(run.state().as_str_name(), "RUN_STATE_")
}

/// Its state, with the reason if there is one.
fn phase(run: &Run) -> String {
    let reason = if run.reason.is_empty() { String::new() } else { format!(": {}", run.reason) };
    format!("{} {}{reason}", run.run, state(run))
}

/// One point of the learning curve for people.
fn point(metric: &Metric, epochs: u64) -> String {
    let Metric { kind, epoch, loss, top1, top5, images_per_second, seconds, .. } = metric;
    format!(
        "epoch {epoch:>3}/{epochs}  {kind:<10}  loss {loss:>7.4}  top-1 {top1:.3}  top-5 {top5:.3}  \
         {images_per_second:>6.0} images/s  {seconds:>5.0} s"
    )
}

/// Waits for the end; with `curve` the learning curve is printed as it grows, as data.
async fn wait(of: &NameArgs, timeout: Option<Duration>, curve: bool) -> Result<()> {
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
                        progress.say(if json { serde_json::to_string(&metric)? } else { point(&metric, run.epochs) });
                    }
                }
            }
            let details = run.last_step.as_ref().map_or(String::new(), |metric| {
                format!(
                    "epoch {}/{}, loss {:.3}, {:.0} images/s",
                    metric.epoch, run.epochs, metric.loss, metric.images_per_second
                )
            });
            progress.update(run.step, run.epochs * run.steps_per_epoch, &phase(&run), &details);
            Ok(if ended { ControlFlow::Break(run) } else { ControlFlow::Continue(()) })
        },
    );
    let verb = if curve { "watch" } else { "wait" };
    let run = wait_for(end, timeout, &format!("gleaner run {verb} {name}")).await?;
    drop(progress);
    if json && !curve {
        say_json(&to_json(&run)?)?;
    }
    if run.state() != RunState::Done {
        let advice = format!("see: gleaner run logs {name}; go on from its last checkpoint: gleaner run resume {name}");
        return Err(Ended::error(Exit::Failed, format!("run {}; {advice}", phase(&run))));
    }
    if !json {
        let test =
            run.test.map_or(String::new(), |test| format!(", test top-1 {:.3}, top-5 {:.3}", test.top1, test.top5));
        say(format!("{name}: done{test}"));
    }
    Ok(())
}

async fn logs(of: &NameArgs, follow_on: bool) -> Result<()> {
    let client = Cluster::new(&of.cluster)?.runs;
    let json = of.cluster.output == Format::Json;
    let request = GetLogsRequest { run: of.run.clone(), follow: follow_on };
    let show = |line: &LogLine| -> Result<()> {
        if json {
            say(serde_json::to_string(line)?);
        } else {
            say(format!("{}/{}  {}", line.generation, line.rank, line.line));
        }
        Ok(())
    };
    if !follow_on {
        let mut stream = answer(client.clone().get_logs(request)).await?;
        loop {
            let next = tokio::time::timeout(Duration::from_secs(30), stream.message()).await;
            match next.map_err(|_| Status::deadline_exceeded("the logs stopped half way"))?? {
                Some(line) => show(&line)?,
                None => return Ok(()),
            }
        }
    }
    // A stream that is opened again begins at the beginning: each rank's lines come in order, so those shown are counted off.
    let mut shown: HashMap<(u64, u32), u64> = HashMap::new();
    let work = async {
        loop {
            let mut again: HashMap<(u64, u32), u64> = HashMap::new();
            let opened =
                insist(async || client.clone().get_logs(request.clone()).await.map(tonic::Response::into_inner)).await;
            let mut stream = opened?;
            let broken = loop {
                match stream.message().await {
                    Ok(Some(line)) => {
                        let rank = (line.generation, line.rank);
                        let n = again.entry(rank).or_default();
                        *n += 1;
                        let shown = shown.entry(rank).or_default();
                        if *n > *shown {
                            *shown = *n;
                            show(&line)?;
                        }
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => break status,
                }
            };
            if !crate::exit::is_outage(&broken) {
                return Err(broken.into());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    wait_for(work, None, &format!("gleaner run logs -f {}", of.run)).await
}

async fn metrics(of: &NameArgs, kinds: Vec<String>, csv: bool) -> Result<()> {
    let mut client = Cluster::new(&of.cluster)?.runs;
    let metrics = answer(client.get_metrics(GetMetricsRequest { run: of.run.clone(), kinds })).await?.metrics;
    if of.cluster.output == Format::Json {
        return say_json(&metrics);
    }
    const HEADINGS: [&str; 16] = [
        "kind",
        "generation",
        "epoch",
        "step",
        "loss",
        "top1",
        "top5",
        "samples",
        "learning_rate",
        "images_per_second",
        "seconds",
        "data_wait",
        "compute",
        "rank_wait",
        "network_wait",
        "optimizer",
    ];
    let row = |m: &Metric| {
        let integers = [m.generation, m.epoch, m.step].map(|n| n.to_string());
        let scores = [m.loss, m.top1, m.top5].map(|x| format!("{x:.4}"));
        let [generation, epoch, step] = integers;
        let [loss, top1, top5] = scores;
        let learning_rate = format!("{:.6}", m.learning_rate);
        let [images, seconds] = [format!("{:.0}", m.images_per_second), format!("{:.1}", m.seconds)];
        let shares = [m.data_wait, m.compute, m.rank_wait, m.network_wait, m.optimizer].map(|x| format!("{x:.3}"));
        let [data_wait, compute, rank_wait, network_wait, optimizer] = shares;
        let samples = m.samples.to_string();
        let kind = m.kind.clone();
        #[rustfmt::skip]
        let row = [
            kind, generation, epoch, step, loss, top1, top5, samples, learning_rate, images, seconds, data_wait, compute, rank_wait,
            network_wait, optimizer,
        ];
        row
    };
    if csv {
        say(HEADINGS.join(","));
        metrics.iter().for_each(|metric| say(row(metric).join(",")));
    } else {
        let mut table = Table::new(&HEADINGS);
        metrics.iter().for_each(|metric| table.row(row(metric).into()));
        table.say();
    }
    Ok(())
}

async fn compare(a: &str, b: &str, args: &ClusterArgs) -> Result<()> {
    let mut client = Cluster::new(args)?.runs;
    let request = CompareRunsRequest { a: a.to_owned(), b: b.to_owned() };
    let found = answer(client.compare_runs(request)).await?;
    let CompareRunsResponse { equal, steps_a, steps_b, steps_equal, ref first_a, ref first_b } = found;
    if args.output == Format::Json {
        say_json(&found)?;
    } else if equal {
        say(format!("equal: {a} and {b} were trained on the same samples in each of {steps_a} steps"));
    } else {
        say(format!("different: {steps_equal} steps had the same samples; {a} has {steps_a}, {b} has {steps_b} steps"));
        for (run, line) in [(a, first_a), (b, first_b)] {
            match line {
                Some(LedgerLine { epoch, step, generation, samples, digest }) => say(format!(
                    "{run}: step {step} of epoch {epoch}, generation {generation}: {samples} samples, digest {digest:016x}"
                )),
                None => say(format!("{run}: has no such step")),
            }
        }
    }
    if equal { Ok(()) } else { Err(Ended::error(Exit::Failed, format!("{a} and {b} differ"))) }
}

async fn cancel(of: &NameArgs) -> Result<()> {
    let client = Cluster::new(&of.cluster)?.runs;
    let request = CancelRunRequest { run: of.run.clone() };
    let run = insist(async || answer(client.clone().cancel_run(request.clone())).await).await?;
    changed(of, &run, &state(&run))
}

async fn resume(of: &NameArgs, then_wait: bool, timeout: Option<Duration>) -> Result<()> {
    let client = Cluster::new(&of.cluster)?.runs;
    let request = ResumeRunRequest { request_id: Uuid::new_v4().to_string(), run: of.run.clone() };
    let run = insist(async || answer(client.clone().resume_run(request.clone())).await).await?;
    if then_wait {
        return wait(of, timeout, false).await;
    }
    changed(of, &run, &state(&run))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        submit: SubmitArgs,
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

    #[test]
    fn json_has_spec_and_events_as_objects() {
        let run = Run {
            run: "birds-1".into(),
            state: RunState::Done.into(),
            spec_json: parse(&["--dataset", "birds"]).expect("good").to_json(),
            events: vec![r#"{"n":1,"term":1,"nonce":"a","at_millis":0,"event":{"kind":"cancelled"}}"#.into()],
            test: Some(Metric { top1: 0.5, ..Metric::default() }),
            ..Run::default()
        };
        let value = to_json(&run).expect("serializable");
        assert_eq!(value["state"], "done");
        assert_eq!(value["spec"]["dataset"], "birds");
        assert_eq!(value["events"][0]["event"]["kind"], "cancelled");
        assert_eq!(value["test"]["top1"], 0.5);
        let text = description(&run).join("\n");
        assert!(text.starts_with("birds-1 done") && text.contains("   1  cancelled"), "{text}");
    }
}
