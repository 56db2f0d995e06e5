//! `gleaner dataset create` and `refresh`: lists of URLs go up.

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use proto::DatasetSpec;
use proto::pb::create_dataset_request::{Part, Start};
use proto::pb::{CreateDatasetRequest, CreateDatasetResponse, GetDatasetRequest, ListFormat};
use tokio::sync::mpsc;
use tonic::Status;
use uuid::Uuid;

use super::form::ListForm;
use super::spec::{SpecArgs, classes};
use super::{NameArgs, preview};
use crate::client::{Cluster, ClusterArgs, TimeoutArgs, answer, insist};
use crate::exit::Ended;
use crate::imports::{self, Files, Location};
use crate::lists::{self, Source};
use crate::output::{Format, note, say, say_json};
use crate::settings;

/// Headings of flags in `--help`.
const LIST: &str = "The list";
pub(super) const PICTURES: &str = "What is stored";

/// For the coordinator to shuffle and cut a list of any length, once it has it.
const CUTTING: Duration = Duration::from_secs(3600);

/// Arguments of `gleaner dataset create`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("lists").required(true).multiple(true).args(["urls", "url_template", "store_key"]))]
pub(crate) struct CreateArgs {
    /// Its name: a-z, 0-9, - and .
    name: String,
    #[command(flatten, next_help_heading = LIST)]
    lists: ListArgs,
    /// Read everything and say what the dataset would be, but create nothing
    #[arg(long)]
    dry_run: bool,
    /// The list has no classes: gather, store and export its pictures, and train on none
    #[arg(long, help_heading = LIST, conflicts_with_all = ["synsets", "synset_column", "class_names", "url_template", "multi_label"])]
    unlabelled: bool,
    /// Pictures under several classes: the first of these, all (stored, but not trained on), or drop such pictures
    #[arg(long, help_heading = LIST, value_name = "first|all|drop")]
    multi_label: Option<String>,
    /// Columns that travel with the pictures, such as caption,license; all: every one
    #[arg(long, help_heading = LIST, value_name = "NAMES", value_delimiter = ',')]
    keep_columns: Vec<String>,
    /// Take only pictures whose bytes have the digest in this column: sha256:COLUMN (hex) or md5-base64:COLUMN
    #[arg(long, help_heading = LIST, value_name = "DIGEST:COLUMN")]
    verify: Option<String>,
    /// What owners may say against the use of their pictures, and is heeded: robots, x-robots-tag, tdm, content-usage,
    /// content-signal; all of them, or none [default: all]
    #[arg(long, value_name = "SIGNALS", value_delimiter = ',')]
    respect: Vec<String>,
    /// Which synsets to keep, and their names: lines of SYNSET and a name; all of the list if left out
    #[arg(long, help_heading = LIST, value_name = "FILE")]
    synsets: Option<PathBuf>,
    /// An address that answers the URLs of one synset, one a line: http://host/api?wnid={synset}; needs --synsets
    #[arg(long, help_heading = LIST, value_name = "URL", requires = "synsets", conflicts_with_all = ["format", "synset_column", "url_column", "url_format"])]
    url_template: Option<String>,
    /// Names of classes: a file like that of --synsets, or Open Images' class descriptions; chooses nothing
    #[arg(long, help_heading = LIST, value_name = "FILE")]
    class_names: Option<PathBuf>,
    #[command(flatten, next_help_heading = PICTURES)]
    spec: SpecArgs,
    /// Wait until the dataset is ready
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Arguments of `gleaner dataset refresh`.
#[derive(Debug, clap::Args)]
pub(crate) struct RefreshArgs {
    /// The dataset's name
    name: String,
    #[command(flatten)]
    lists: ListArgs,
    /// Also take what is new in these folders, tars and Parquet files; for datasets that were imported
    #[arg(long, value_name = "PATH|URL", num_args = 1..)]
    import: Vec<String>,
    #[command(flatten)]
    columns: FileColumns,
    /// Also ask for what has failed in several refreshes in a row, which is otherwise asked less and less often
    #[arg(long)]
    all: bool,
    /// Go on although so many shards are damaged that the store itself may be wrong: leave them out, and fetch their
    /// URLs again
    #[arg(long)]
    accept_damage: bool,
    /// Wait until the dataset is ready
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Where the URLs are, and how they are written.
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// Lists of URLs: files, - for standard input, or http(s) addresses; plain, gzip or zstd, or in a tar
    #[arg(long, num_args = 1.., value_name = "FILE|-|URL")]
    urls: Vec<String>,
    /// A list in the cluster's own store: a key, a folder (ending in /), or a pattern with * and ?
    #[arg(long, value_name = "KEY")]
    store_key: Vec<String>,
    /// How the lists are written
    #[arg(long, value_enum, default_value_t = ListForm::Auto)]
    format: ListForm,
    /// The column of the synset, if it has another name than usual (synset, wnid, class, label, LabelName ...)
    #[arg(long, value_name = "NAME")]
    synset_column: Option<String>,
    /// The column of the URL, if it has another name than usual (url, image_url, OriginalURL, link ...)
    #[arg(long, value_name = "NAME")]
    url_column: Option<String>,
    /// An address with names of columns in braces, for lists whose URLs are made of several:
    /// https://host/photos/{photo_id}/medium.{extension}
    #[arg(long, value_name = "URL", conflicts_with = "url_column")]
    url_format: Option<String>,
    /// The names of all columns, for a list without a header: url,caption
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    columns: Vec<String>,
    /// Take a sample of so many URLs, which the seed chooses
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
}

/// Makes a dataset.
pub(super) async fn create(args: CreateArgs) -> Result<()> {
    args.timeout.only_if(args.wait)?;
    let (start, sources) = prepare(&args)?;
    let of = NameArgs { name: args.name, cluster: args.cluster };
    let round = open_round(&of, Call::Create, &start, &sources).await?;
    if args.lists.format == ListForm::Auto {
        preview::show(&round);
    }
    if args.dry_run {
        return preview::report(&of, &start, &round, &summary(&of.name, "would be created", &round));
    }
    report(&of, &round, "created", args.wait, &args.timeout).await
}

/// Opens another round of a dataset.
pub(super) async fn refresh(args: RefreshArgs) -> Result<()> {
    args.timeout.only_if(args.wait)?;
    let mut sources = args.lists.urls.iter().map(|text| Source::parse(text)).collect::<Result<Vec<_>>>()?;
    let mut start = Start { accept_damage: args.accept_damage, all: args.all, ..args.lists.start(&args.name) };
    let of = NameArgs { name: args.name, cluster: args.cluster };
    if !args.import.is_empty() {
        let mut client = Cluster::new(&of.cluster)?.datasets;
        let dataset = answer(client.get_dataset(GetDatasetRequest { name: of.name.clone() })).await?;
        let spec = DatasetSpec::from_json(&dataset.spec_json)?;
        if !spec.files || !sources.is_empty() || !start.store_keys.is_empty() {
            return Err(Ended::usage(format!(
                "--import is for datasets that were imported ({}), and for no lists beside",
                of.name
            )));
        }
        sources.push(Source::Files(Box::new(args.columns.files(&args.import, &spec)?)));
        start = of_files(start);
    }
    let round = open_round(&of, Call::Refresh, &start, &sources).await?;
    report(&of, &round, "refreshed", args.wait, &args.timeout).await
}

/// The request for a list that is made of files.
pub(super) fn of_files(start: Start) -> Start {
    let (format, url_column, synset_column) = (ListFormat::Jsonl.into(), imports::URL.into(), imports::CLASS.into());
    Start { format, url_column, synset_column, ..start }
}

/// Where tars and Parquet files say what.
#[derive(Debug, clap::Args)]
pub(super) struct FileColumns {
    /// The column of the class in Parquet files, or the member of KEY.json in tars, if it is not the usual one
    #[arg(long, value_name = "NAME")]
    class_column: Option<String>,
    /// The column of the picture in Parquet files, if it has another name than usual (image, img, jpg ...)
    #[arg(long, value_name = "NAME")]
    image_column: Option<String>,
    /// The cluster's store, for what is imported from it: a folder, s3://, gs:// or az://, as the coordinator's --store
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
}

impl FileColumns {
    /// What is to be read for a dataset.
    pub(super) fn files(&self, from: &[String], spec: &DatasetSpec) -> Result<Files> {
        let from = from.iter().map(|text| Location::parse(text, self.store.as_deref()));
        Ok(Files {
            from: from.collect::<Result<_>>()?,
            unlabelled: spec.unlabelled,
            class_column: self.class_column.clone(),
            image_column: self.image_column.clone(),
            keep: spec.keep_columns.clone(),
        })
    }
}

/// Says what the round is, and waits for it.
pub(super) async fn report(
    of: &NameArgs,
    round: &CreateDatasetResponse,
    verb: &str,
    wait: bool,
    timeout: &TimeoutArgs,
) -> Result<()> {
    for example in &round.bad_line_examples {
        note(format!("bad line: {example}"));
    }
    if wait {
        note(summary(&of.name, verb, round));
        return super::wait(of, timeout.timeout, false).await;
    }
    match of.cluster.output {
        Format::Json => say_json(round)?,
        Format::Table => {
            say(summary(&of.name, verb, round));
            if round.shards > 0 {
                note(format!("see how it goes: gleaner dataset watch {}", of.name));
            }
        }
    }
    Ok(())
}

/// Which of the calls that stream lists up.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    Create,
    Refresh,
}

/// Streams the lists up; the answer.
pub(super) async fn open_round(
    of: &NameArgs,
    call: Call,
    start: &Start,
    sources: &[Source],
) -> Result<CreateDatasetResponse> {
    let cluster = Cluster::new(&of.cluster)?;
    let round = if sources.iter().all(Source::repeats) {
        // The request id makes repetition safe; a list that fails is our own failure and ends it.
        let broken = RefCell::new(None);
        let result = insist(async || match upload(&cluster, call, start, sources).await {
            Ok(result) => result,
            Err(error) => {
                broken.replace(Some(error));
                Err(Status::aborted("the list broke off"))
            }
        });
        let result = result.await;
        match broken.into_inner() {
            Some(error) => return Err(error),
            None => result,
        }
    } else {
        upload(&cluster, call, start, sources).await?
    };
    round.with_context(|| format!("dataset {}", of.name))
}

/// What the round is, in a line.
pub(super) fn summary(name: &str, verb: &str, round: &CreateDatasetResponse) -> String {
    let CreateDatasetResponse { urls, shards, not_chosen, bad_lines, retried, known, .. } = round;
    let retried: u64 = retried.values().sum();
    let mut line = match shards {
        0 => format!("{name}: nothing to fetch: no URL that may come back, and none that is new"),
        _ => format!("{name}: {verb} with {urls} URLs in {shards} shards"),
    };
    for (count, what) in [
        (retried, "of them are tried again"),
        (*known, "lines are in the catalog already"),
        (*not_chosen, "lines of other synsets left out"),
        (round.repeated, "lines say again what another one said"),
        (round.several, "pictures have several classes"),
        (*bad_lines, "bad lines"),
        (round.left_for_later, "that failed in several refreshes in a row are left for a later one (--all asks them)"),
    ] {
        if count > 0 {
            line += &format!("; {count} {what}");
        }
    }
    line
}

impl ListArgs {
    /// The request, but for what a new dataset is.
    fn start(&self, name: &str) -> Start {
        Start {
            request_id: Uuid::new_v4().to_string(),
            name: name.to_owned(),
            format: ListFormat::from(self.format).into(),
            synset_column: self.synset_column.clone().unwrap_or_default(),
            url_column: self.url_column.clone().unwrap_or_default(),
            url_format: self.url_format.clone().unwrap_or_default(),
            store_keys: self.store_key.clone(),
            columns: self.columns.clone(),
            limit: self.limit.unwrap_or_default(),
            ..Start::default()
        }
    }
}

/// Refuses what can be no dataset's name.
pub(super) fn check_name(name: &str) -> Result<()> {
    let rule = "1 to 63 of a-z 0-9 - . , beginning and ending with a letter or digit";
    match proto::ids::is_name(name) {
        true => Ok(()),
        false => Err(Ended::usage(format!("{name:?} is no name: {rule}"))),
    }
}

/// The request and the lists, checked as far as they can be without the cluster.
fn prepare(args: &CreateArgs) -> Result<(Start, Vec<Source>)> {
    check_name(&args.name)?;
    let names =
        classes("--class-names", args.class_names.as_ref())?.into_iter().map(|class| (class.synset, class.name));
    let class_names = names.filter(|(_, name)| !name.is_empty()).collect();
    let classes = classes("--synsets", args.synsets.as_ref())?;
    let mut sources = args.lists.urls.iter().map(|text| Source::parse(text)).collect::<Result<Vec<_>>>()?;
    if let Some(template) = &args.url_template {
        sources.push(Source::template(template, &classes)?);
    }
    let mut spec = spec(args)?;
    if args.synsets.is_some() {
        spec.classes = classes;
    }
    // Parsed again, because the classes are checked too.
    let spec_json = DatasetSpec::from_json(&spec.to_json())?.to_json();
    let start = Start { spec_json, class_names, dry_run: args.dry_run, ..args.lists.start(&args.name) };
    Ok((start, sources))
}

/// The spec's file with `--set` and the flags over it.
fn spec(args: &CreateArgs) -> Result<DatasetSpec> {
    let mut table = args.spec.table()?;
    if args.unlabelled {
        settings::set(&mut table, "unlabelled=true")?;
    }
    if let Some(multi_label) = &args.multi_label {
        settings::set(&mut table, &format!("multi_label={multi_label}"))?;
    }
    if let Some(verify) = &args.verify {
        let wrong = || Ended::usage(format!("--verify {verify}: sha256:COLUMN or md5-base64:COLUMN is wanted"));
        let (digest, column) = verify.split_once(':').filter(|(_, column)| !column.is_empty()).ok_or_else(wrong)?;
        let table = table.entry("verify").or_insert_with(|| toml::Table::new().into());
        let table = table.as_table_mut().ok_or_else(wrong)?;
        table.insert("digest".to_owned(), digest.into());
        table.insert("column".to_owned(), column.into());
    }
    match args.respect.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {}
        ["all"] => drop(table.remove("respect")),
        ["none"] => drop(table.insert("respect".to_owned(), toml::Value::Array(Vec::new()))),
        ref signals => drop(table.insert("respect".to_owned(), signals.to_vec().into())),
    }
    let mut spec = DatasetSpec::from_json(&serde_json::to_string(&table)?)?;
    if !args.keep_columns.is_empty() {
        spec.keep_columns = args.keep_columns.clone();
    }
    Ok(spec)
}

/// Streams the lists up. The outer error is a list that could not be read.
async fn upload(
    cluster: &Cluster,
    call: Call,
    start: &Start,
    sources: &[Source],
) -> Result<Result<CreateDatasetResponse, Status>> {
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
    let call = async move {
        match call {
            Call::Create => client.create_dataset(lists::requests(received)).await,
            Call::Refresh => client.refresh_dataset(lists::requests(received)).await,
        }
    };
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

#[cfg(test)]
mod tests {
    use proto::{ImageFormat, Reencode, Resize, ResizeMode, Signal};

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        create: CreateArgs,
    }

    #[test]
    fn what_is_left_for_later_is_said() {
        let round = CreateDatasetResponse { left_for_later: 3, ..CreateDatasetResponse::default() };
        let line = summary("birds", "refreshed", &round);
        assert!(line.contains("; 3 that failed in several refreshes in a row are left"), "{line}");
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
        let respect = |flags: &[&str]| {
            let (start, _) = parse(flags)?;
            anyhow::Ok(DatasetSpec::from_json(&start.spec_json).expect("own output").respect)
        };
        assert_eq!(respect(&["--respect", "robots,tdm"]).expect("good"), [Signal::Robots, Signal::Tdm]);
        assert_eq!(respect(&["--set", "respect=[]", "--respect", "all"]).expect("good"), Signal::ALL);
        assert_eq!(respect(&["--respect", "none"]).expect("good"), []);
        let refusal = respect(&["--respect", "robots.txt"]).expect_err("an unknown signal").to_string();
        assert!(refusal.contains("`x-robots-tag`"), "{refusal}");
        let flags = ["--resize", "keep-ratio", "--no-upscale", "--encode-format", "png", "--reencode", "needed"];
        let (start, _) = parse(&flags).expect("good");
        let spec = DatasetSpec::from_json(&start.spec_json).expect("own output");
        let (mode, format, reencode) = (ResizeMode::KeepRatio, ImageFormat::Png, Reencode::Needed);
        assert_eq!(spec.resize, Resize { mode, upscale: false, format, reencode, ..Resize::default() });
        let refusal = parse(&["--encode-format", "webp"]).expect_err("an unknown format").to_string();
        assert!(refusal.contains("`jpg` or `png`"), "{refusal}");
    }
}
