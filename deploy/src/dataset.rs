//! `gleaner dataset ...`

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use proto::pb::create_dataset_request::{Part, Start};
use proto::pb::{
    CreateDatasetRequest, CreateDatasetResponse, Dataset, DatasetState, DeleteDatasetRequest, GetDatasetRequest,
    GetManifestRequest, ListDatasetsRequest, ListFormat,
};
use proto::rejection::KEPT;
use proto::{DatasetSpec, Rejection};
use serde_json::Value;
use tokio::sync::mpsc;
use tonic::Status;
use uuid::Uuid;

use crate::client::{Cluster, ClusterArgs, answer, duration, follow, insist, wait_for};
use crate::exit::{Ended, Exit};
use crate::lists::{self, Source};
use crate::output::{Format, Progress, Table, note, percent, say, say_json, state_name};
use crate::settings;

/// For the coordinator to shuffle and cut a list of any length, once it has it.
const CUTTING: Duration = Duration::from_secs(3600);

/// Makes, shows and removes datasets.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Create a dataset out of lists of URLs; the workers begin at once
    Create(Box<CreateArgs>),
    /// List all datasets
    List(ClusterArgs),
    /// Show a dataset: what became of its URLs, its classes, its statistics
    Describe(NameArgs),
    /// Show the progress until the dataset is ready
    Watch(NameArgs),
    /// Wait until the dataset is ready
    Wait {
        #[command(flatten)]
        of: NameArgs,
        #[command(flatten)]
        timeout: TimeoutArgs,
    },
    /// Print a manifest: the immutable version of a dataset that runs read
    Manifest {
        /// The dataset's name
        name: String,
        /// Which version; the latest if left out
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        version: u32,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
    /// Delete a dataset with all its images
    Delete {
        #[command(flatten)]
        of: NameArgs,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

/// A dataset by name.
#[derive(Debug, clap::Args)]
pub(crate) struct NameArgs {
    /// The dataset's name
    name: String,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// The end of a wait.
#[derive(Debug, clap::Args)]
pub(crate) struct TimeoutArgs {
    /// Stop waiting after so long (90s, 5m, 2h) with exit code 124; the work goes on
    #[arg(long, value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
}

/// Arguments of `gleaner dataset create`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("lists").required(true).multiple(true).args(["urls", "url_template", "store_key"]))]
pub(crate) struct CreateArgs {
    /// Its name: a-z, 0-9, - and .
    name: String,
    /// Lists of URLs: files, - for standard input, or http(s) addresses; plain, gzip or zstd
    #[arg(long, num_args = 1.., value_name = "FILE|-|URL")]
    urls: Vec<String>,
    /// Which synsets to keep, and their names: lines of SYNSET and a name; all of the list if left out
    #[arg(long, value_name = "FILE")]
    synsets: Option<PathBuf>,
    /// An address that answers the URLs of one synset, one a line: http://host/api?wnid={synset}; needs --synsets
    #[arg(long, value_name = "URL", requires = "synsets", conflicts_with_all = ["format", "synset_column", "url_column"])]
    url_template: Option<String>,
    /// A list in the cluster's own store
    #[arg(long, value_name = "KEY")]
    store_key: Vec<String>,
    /// How the lists are written
    #[arg(long, value_enum, default_value_t = ListForm::Auto)]
    format: ListForm,
    /// The column of the synset in CSV and TSV [default: synset]
    #[arg(long, value_name = "NAME")]
    synset_column: Option<String>,
    /// The column of the URL in CSV and TSV [default: url]
    #[arg(long, value_name = "NAME")]
    url_column: Option<String>,
    /// Stored images have SIZE x SIZE pixels [default: 256]
    #[arg(long)]
    size: Option<u32>,
    /// JPEG quality of stored images, 1 to 100 [default: 95]
    #[arg(long)]
    quality: Option<u8>,
    /// Share of the images that validate [default: 0.05]
    #[arg(long, value_name = "SHARE")]
    validation: Option<f64>,
    /// Share of the images that test [default: 0.05]
    #[arg(long, value_name = "SHARE")]
    test: Option<f64>,
    /// Seed of the shuffle that deals URLs to slices [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// URLs in one slice; a slice is fetched by one worker and becomes one shard [default: 10000]
    #[arg(long, value_name = "N")]
    slice_urls: Option<u32>,
    /// Smaller files are no photos [default: 5000]
    #[arg(long, value_name = "BYTES")]
    min_bytes: Option<u64>,
    /// A dataset spec in TOML; the flags here are put over it
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
    /// Any value of the spec: --set limits.timeout_seconds=10
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Wait until the dataset is ready
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// How a list is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ListForm {
    /// By the first line and the file's name
    Auto,
    /// `n01440764<TAB>http://...`
    SynsetUrl,
    /// `n01440764_10026<TAB>http://...`
    WnidIdUrl,
    /// With a header line
    Csv,
    /// With a header line
    Tsv,
}

impl From<ListForm> for ListFormat {
    fn from(form: ListForm) -> Self {
        match form {
            ListForm::Auto => Self::Auto,
            ListForm::SynsetUrl => Self::SynsetUrl,
            ListForm::WnidIdUrl => Self::WnidIdUrl,
            ListForm::Csv => Self::Csv,
            ListForm::Tsv => Self::Tsv,
        }
    }
}

/// Runs one command.
pub(crate) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create(*args).await,
        Command::List(args) => list(&args).await,
        Command::Describe(of) => describe(&of).await,
        Command::Watch(of) => wait(&of, None, true).await,
        Command::Wait { of, timeout } => wait(&of, timeout.timeout, false).await,
        Command::Manifest { name, version, cluster } => manifest(name, version, &cluster).await,
        Command::Delete { of, yes } => delete(of, yes).await,
    }
}

async fn create(args: CreateArgs) -> Result<()> {
    let (start, sources) = prepare(&args)?;
    let cluster = Cluster::new(&args.cluster)?;
    let created = if sources.iter().all(Source::repeats) {
        // The request id makes repetition safe; a list that fails is our own failure and ends it.
        let mut broken = None;
        let result = insist(async || match upload(&cluster, &start, &sources).await {
            Ok(result) => result,
            Err(error) => {
                broken = Some(error);
                Err(Status::aborted("the list broke off"))
            }
        });
        let result = result.await;
        match broken {
            Some(error) => return Err(error),
            None => result,
        }
    } else {
        upload(&cluster, &start, &sources).await?
    };
    let created = created.with_context(|| format!("dataset {}", args.name))?;
    for example in &created.bad_line_examples {
        note(format!("bad line: {example}"));
    }
    let of = NameArgs { name: args.name, cluster: args.cluster };
    if args.wait {
        note(summary(&of.name, &created));
        return wait(&of, args.timeout.timeout, false).await;
    }
    match of.cluster.output {
        Format::Json => say_json(&created)?,
        Format::Table => {
            say(summary(&of.name, &created));
            note(format!("see how it goes: gleaner dataset watch {}", of.name));
        }
    }
    Ok(())
}

fn summary(name: &str, created: &CreateDatasetResponse) -> String {
    let CreateDatasetResponse { urls, shards, not_chosen, bad_lines, .. } = created;
    let mut line = format!("{name}: created with {urls} URLs in {shards} shards");
    if *not_chosen > 0 {
        line += &format!("; {not_chosen} lines of other synsets left out");
    }
    if *bad_lines > 0 {
        line += &format!("; {bad_lines} bad lines");
    }
    line
}

/// The request and the lists, checked as far as they can be without the cluster.
fn prepare(args: &CreateArgs) -> Result<(Start, Vec<Source>)> {
    if !proto::keys::is_name(&args.name) {
        let rule = "1 to 63 of a-z 0-9 - . , beginning and ending with a letter or digit";
        return Err(Ended::usage(format!("{:?} is no name: {rule}", args.name)));
    }
    let classes = match &args.synsets {
        Some(path) => {
            let text = std::fs::read_to_string(path);
            lists::parse_synsets(&text.map_err(|e| Ended::usage(format!("--synsets {}: {e}", path.display())))?)?
        }
        None => Vec::new(),
    };
    let mut sources = args.urls.iter().map(|text| Source::parse(text)).collect::<Result<Vec<_>>>()?;
    if let Some(template) = &args.url_template {
        sources.push(Source::template(template, &classes)?);
    }
    let mut spec = spec(args)?;
    if args.synsets.is_some() {
        spec.classes = classes;
    }
    // Parsed again, because the classes are checked too.
    let spec_json = DatasetSpec::from_json(&spec.to_json())?.to_json();
    let start = Start {
        request_id: Uuid::new_v4().to_string(),
        name: args.name.clone(),
        spec_json,
        format: ListFormat::from(args.format).into(),
        synset_column: args.synset_column.clone().unwrap_or_default(),
        url_column: args.url_column.clone().unwrap_or_default(),
        store_keys: args.store_key.clone(),
    };
    Ok((start, sources))
}

/// The spec's file with `--set` and the flags over it.
fn spec(args: &CreateArgs) -> Result<DatasetSpec> {
    let mut table = match &args.spec {
        Some(path) => settings::read(path)?,
        None => toml::Table::new(),
    };
    let flags = [
        ("resize.size", args.size.map(|v| v.to_string())),
        ("resize.quality", args.quality.map(|v| v.to_string())),
        // {:?} writes whole numbers with their point, as TOML wants floats.
        ("splits.validation", args.validation.map(|v| format!("{v:?}"))),
        ("splits.test", args.test.map(|v| format!("{v:?}"))),
        ("seed", args.seed.map(|v| v.to_string())),
        ("slice_urls", args.slice_urls.map(|v| v.to_string())),
        ("limits.min_bytes", args.min_bytes.map(|v| v.to_string())),
    ];
    for assignment in &args.set {
        settings::set(&mut table, assignment)?;
    }
    for (key, value) in flags {
        if let Some(value) = value {
            settings::set(&mut table, &format!("{key}={value}"))?;
        }
    }
    Ok(DatasetSpec::from_json(&serde_json::to_string(&table)?)?)
}

/// Streams the lists up. The outer error is a list that could not be read.
async fn upload(cluster: &Cluster, start: &Start, sources: &[Source]) -> Result<Result<CreateDatasetResponse, Status>> {
    let (pieces, received) = mpsc::channel(4);
    let feed = async {
        let first = CreateDatasetRequest { part: Some(Part::Start(start.clone())) };
        pieces.send(Some(first)).await.context("the upload was refused")?;
        for source in sources {
            source.send(&pieces).await?;
        }
        pieces.send(None).await.context("the upload was refused")?;
        anyhow::Ok(())
    };
    let mut client = cluster.datasets.clone();
    let call = client.create_dataset(lists::requests(received));
    tokio::pin!(feed, call);
    tokio::select! {
        // The answer first: when it is a refusal, the feed fails as well, but knows no reason.
        biased;
        answer = &mut call => Ok(answer.map(tonic::Response::into_inner)),
        fed = &mut feed => match fed {
            Ok(()) => {
                let answer = tokio::time::timeout(CUTTING, call).await;
                let late = |_| Status::deadline_exceeded("the list is there, but the coordinator does not say that it took it");
                Ok(answer.map_err(late).flatten().map(tonic::Response::into_inner))
            }
            // A call that has ended closes the channel a moment before its answer is seen here.
            Err(error) if error.is::<mpsc::error::SendError<lists::Piece>>() => {
                let late = tokio::time::timeout(Duration::from_secs(10), call).await.map_err(|_| error)?;
                Ok(late.map(tonic::Response::into_inner))
            }
            Err(error) => Err(error),
        },
    }
}

async fn list(args: &ClusterArgs) -> Result<()> {
    let mut client = Cluster::new(args)?.datasets;
    let mut datasets = answer(client.list_datasets(ListDatasetsRequest {})).await?.datasets;
    datasets.sort_by(|a, b| a.name.cmp(&b.name));
    if args.output == Format::Json {
        return say_json(&datasets.iter().map(to_json).collect::<Result<Vec<_>>>()?);
    }
    let mut table = Table::new(&["name", "state", "urls", "kept", "shards", "manifest"]);
    for dataset in datasets {
        table.row(vec![
            dataset.name.clone(),
            state(&dataset),
            dataset.urls.to_string(),
            kept(&dataset).to_string(),
            format!("{}/{}", dataset.shards_committed, dataset.shards),
            if dataset.manifest_version == 0 { "-".into() } else { dataset.manifest_version.to_string() },
        ]);
    }
    table.say();
    Ok(())
}

async fn describe(of: &NameArgs) -> Result<()> {
    let mut client = Cluster::new(&of.cluster)?.datasets;
    let dataset = answer(client.get_dataset(GetDatasetRequest { name: of.name.clone() })).await?;
    match of.cluster.output {
        Format::Json => say_json(&to_json(&dataset)?),
        Format::Table => {
            description(&dataset).iter().for_each(say);
            Ok(())
        }
    }
}

/// `describe` for people.
fn description(dataset: &Dataset) -> Vec<String> {
    let mut lines = vec![format!("{}: {} ({})", dataset.name, state(dataset), dataset.dataset)];
    if !dataset.error.is_empty() {
        lines.push(dataset.error.clone());
    }
    let version = match dataset.manifest_version {
        0 => "no manifest yet".to_owned(),
        version => format!("manifest version {version}"),
    };
    lines.push(format!("{} of {} shards committed; {version}", dataset.shards_committed, dataset.shards));
    lines.push(String::new());
    lines.extend(yield_table(dataset).lines());
    if !dataset.skipped.is_empty() {
        lines.push(String::new());
        let mut table = Table::new(&["kept but skipped", "images"]);
        let mut skipped: Vec<_> = dataset.skipped.iter().collect();
        skipped.sort();
        for (reason, count) in skipped {
            table.row(vec![reason.clone(), count.to_string()]);
        }
        lines.extend(table.lines());
    }
    if !dataset.classes.is_empty() {
        lines.push(String::new());
        let mut table = Table::new(&["synset", "name", "urls", "train", "validation", "test"]);
        let mut totals = [0; 4];
        for class in &dataset.classes {
            let counts = [class.urls, class.train, class.validation, class.test];
            totals.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
            let counts = counts.iter().map(u64::to_string);
            table.row([class.synset.clone(), class.name.clone()].into_iter().chain(counts).collect());
        }
        table.row(["total".to_owned(), String::new()].into_iter().chain(totals.iter().map(u64::to_string)).collect());
        lines.extend(table.lines());
    }
    if !dataset.mean.is_empty() {
        let numbers = |values: &[f64]| values.iter().map(|v| format!("{v:.4}")).collect::<Vec<_>>().join(" ");
        lines.push(String::new());
        lines.push(format!(
            "mean {}   std {}   (red, green, blue of training images, 0 to 1)",
            numbers(&dataset.mean),
            numbers(&dataset.std)
        ));
    }
    lines
}

/// What became of the URLs; adds up to their number.
fn yield_table(dataset: &Dataset) -> Table {
    let mut table = Table::new(&["outcome", "urls", "share"]);
    let mut row = |name: &str, count: u64| {
        table.row(vec![name.to_owned(), count.to_string(), percent(count, dataset.urls)]);
    };
    let known = std::iter::once(KEPT).chain(Rejection::ALL.iter().map(|rejection| rejection.name()));
    let names: Vec<&str> = known.collect();
    // A newer coordinator may know more outcomes than this program.
    let others = dataset.outcomes.keys().map(String::as_str).filter(|name| !names.contains(name));
    for name in names.iter().copied().chain(others) {
        match dataset.outcomes.get(name) {
            Some(&count) if count > 0 || name == KEPT => row(name, count),
            _ => {}
        }
    }
    let done: u64 = dataset.outcomes.values().sum();
    if done < dataset.urls {
        row("(waiting)", dataset.urls - done);
    }
    row("total", dataset.urls.max(done));
    table
}

/// The message as JSON: the state by its name, the spec as an object.
fn to_json(dataset: &Dataset) -> Result<Value> {
    let mut value = serde_json::to_value(dataset)?;
    value["state"] = state(dataset).into();
    crate::output::unfold_spec(&mut value);
    Ok(value)
}

fn state(dataset: &Dataset) -> String {
    state_name(dataset.state().as_str_name(), "DATASET_STATE_")
}

fn kept(dataset: &Dataset) -> u64 {
    dataset.outcomes.get(KEPT).copied().unwrap_or(0)
}

/// Waits for the end; `watch` also prints each state as data.
async fn wait(of: &NameArgs, timeout: Option<Duration>, watch: bool) -> Result<()> {
    let NameArgs { name, cluster } = of;
    let verb = if watch { "watch" } else { "wait" };
    let mut client = Cluster::new(cluster)?.datasets;
    let mut progress = Progress::new("URLs");
    let json = cluster.output == Format::Json;
    let end = follow(
        async || client.watch_dataset(GetDatasetRequest { name: name.clone() }).await,
        async |dataset: Dataset| {
            if watch && json {
                progress.say(serde_json::to_string(&to_json(&dataset)?)?);
            }
            let done = dataset.outcomes.values().sum();
            let details = format!("{} kept, {}/{} shards", kept(&dataset), dataset.shards_committed, dataset.shards);
            progress.update(done, dataset.urls, &format!("{name} {}", state(&dataset)), &details);
            Ok(match dataset.state() {
                DatasetState::Ready | DatasetState::Failed => ControlFlow::Break(dataset),
                _ => ControlFlow::Continue(()),
            })
        },
    );
    let dataset = wait_for(end, timeout, &format!("gleaner dataset {verb} {name}")).await?;
    drop(progress);
    if json && !watch {
        say_json(&to_json(&dataset)?)?;
    }
    if dataset.state() == DatasetState::Failed {
        return Err(Ended::error(Exit::Failed, format!("dataset {name} failed: {}", dataset.error)));
    }
    if !json {
        let version = dataset.manifest_version;
        say(format!("{name}: ready, {} of {} URLs kept, manifest version {version}", kept(&dataset), dataset.urls));
    }
    Ok(())
}

async fn manifest(name: String, version: u32, args: &ClusterArgs) -> Result<()> {
    let mut client = Cluster::new(args)?.datasets;
    let mut stream = answer(client.get_manifest(GetManifestRequest { name, version })).await?;
    let mut json = Vec::new();
    loop {
        let next = tokio::time::timeout(Duration::from_secs(30), stream.message()).await;
        match next.map_err(|_| Status::deadline_exceeded("the manifest stopped half way"))?? {
            Some(chunk) => json.extend_from_slice(&chunk.json),
            None => break,
        }
    }
    say(String::from_utf8(json).context("the manifest is no text")?);
    Ok(())
}

async fn delete(of: NameArgs, yes: bool) -> Result<()> {
    let NameArgs { name, cluster } = of;
    if !yes {
        if !std::io::stdin().is_terminal() {
            return Err(Ended::usage(format!("deletes dataset {name} with all its images; say -y if that is meant")));
        }
        note(format!("delete dataset {name} with all its images? [y/N]"));
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        if !line.trim().eq_ignore_ascii_case("y") {
            return Err(Ended::error(Exit::Failed, "nothing was deleted"));
        }
    }
    let client = Cluster::new(&cluster)?.datasets;
    insist(async || answer(client.clone().delete_dataset(DeleteDatasetRequest { name: name.clone() })).await).await?;
    note(format!("{name}: deleted"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset() -> Dataset {
        Dataset {
            name: "birds".into(),
            state: DatasetState::Fetching.into(),
            spec_json: DatasetSpec::default().to_json(),
            urls: 100,
            outcomes: [("not_found", 30), (KEPT, 50), ("from_the_future", 5)].map(|(k, v)| (k.to_owned(), v)).into(),
            ..Dataset::default()
        }
    }

    #[test]
    fn the_yield_adds_up_to_the_urls_with_those_that_wait() {
        assert_eq!(
            yield_table(&dataset()).lines(),
            [
                "OUTCOME          URLS    SHARE",
                "kept               50   50.0 %",
                "not_found          30   30.0 %",
                "from_the_future     5    5.0 %",
                "(waiting)          15   15.0 %",
                "total             100  100.0 %",
            ]
        );
    }

    #[test]
    fn json_has_the_state_by_name_and_the_spec_as_an_object() {
        let value = to_json(&dataset()).expect("serializable");
        assert_eq!(value["state"], "fetching");
        assert_eq!(value["spec"]["resize"]["size"], 256);
        assert_eq!(value["outcomes"]["kept"], 50);
        assert!(value.get("spec_json").is_none());
    }

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        create: CreateArgs,
    }

    #[test]
    fn flags_are_put_over_the_spec_and_unknown_keys_are_refused() {
        let parse = |more: &[&str]| {
            let args = [&["create", "birds", "--urls", "-"], more].concat();
            let cli: Cli = clap::Parser::try_parse_from(args).expect("arguments");
            prepare(&cli.create)
        };
        let (start, sources) = parse(&["--size", "64", "--test", "0", "--set", "limits.min_side=16"]).expect("good");
        let spec = DatasetSpec::from_json(&start.spec_json).expect("own output");
        assert_eq!((spec.resize.size, spec.splits.test, spec.limits.min_side), (64, 0.0, 16));
        assert_eq!(sources, [Source::Stdin]);
        let refusal = parse(&["--set", "limits.tiemout=1"]).expect_err("unknown key").to_string();
        assert!(refusal.contains("tiemout"), "{refusal}");
        assert!(parse(&["--size", "0"]).is_err());
    }
}
