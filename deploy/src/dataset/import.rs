//! `gleaner dataset import`: a dataset of pictures that are there already. A list of them goes up; the workers read
//! them.

use std::path::PathBuf;

use anyhow::Result;
use proto::DatasetSpec;
use proto::pb::create_dataset_request::Start;
use uuid::Uuid;

use super::create::{Call, FileColumns, PICTURES, check_name, of_files, open_round, report, summary};
use super::spec::{SpecArgs, classes};
use super::{NameArgs, preview};
use crate::client::{ClusterArgs, TimeoutArgs};
use crate::imports;
use crate::lists::Source;
use crate::settings;

/// Arguments of `gleaner dataset import`.
#[derive(Debug, clap::Args)]
pub(crate) struct ImportArgs {
    /// Its name: a-z, 0-9, - and .
    name: String,
    /// Folders with a folder for each class, perhaps within folders train, val and test; tars in WebDataset's layout;
    /// Parquet files with pictures in them; as paths, which the workers must see as well, http(s) addresses of tars and
    /// Parquet files, or store:imports/... in the cluster's own store
    #[arg(required = true, value_name = "PATH|URL")]
    from: Vec<String>,
    #[command(flatten)]
    columns: FileColumns,
    /// keep: as folders and files are named (train, val, test); content: by the bytes, as lists are split
    #[arg(long, value_enum, default_value_t = SplitsFrom::Keep)]
    splits: SplitsFrom,
    /// Read the names of everything and say what the dataset would be, but create nothing
    #[arg(long)]
    dry_run: bool,
    /// There are no classes: store and export the pictures, and train on none
    #[arg(long, conflicts_with_all = ["synsets", "class_names", "class_column"])]
    unlabelled: bool,
    /// What travels with the pictures: columns of Parquet files, members of KEY.json, caption for KEY.txt; all:
    /// everything
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    keep_columns: Vec<String>,
    /// Pictures under several classes: the first of these, all (stored, but not trained on), or drop such pictures
    #[arg(long, value_name = "first|all|drop")]
    multi_label: Option<String>,
    /// Which classes to keep, and their names: lines of CLASS and a name; all if left out
    #[arg(long, value_name = "FILE")]
    synsets: Option<PathBuf>,
    /// Names of classes: a file like that of --synsets; chooses nothing
    #[arg(long, value_name = "FILE")]
    class_names: Option<PathBuf>,
    /// Take a sample of so many pictures, which the seed chooses
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    limit: u64,
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

/// Which pictures train, validate and test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SplitsFrom {
    /// As they were published
    Keep,
    /// By their bytes
    Content,
}

/// Makes a dataset.
pub(super) async fn import(args: ImportArgs) -> Result<()> {
    args.timeout.only_if(args.wait)?;
    check_name(&args.name)?;
    let mut table = args.spec.table()?;
    if args.unlabelled {
        settings::set(&mut table, "unlabelled=true")?;
    }
    if let Some(multi_label) = &args.multi_label {
        settings::set(&mut table, &format!("multi_label={multi_label}"))?;
    }
    let mut spec = DatasetSpec::from_json(&serde_json::to_string(&table)?)?;
    spec.files = true;
    if args.splits == SplitsFrom::Keep {
        spec.splits.column = imports::SPLIT.to_owned();
    }
    if !args.keep_columns.is_empty() {
        spec.keep_columns = args.keep_columns.clone();
    }
    let files = args.columns.files(&args.from, &spec)?;
    spec.classes = match &args.synsets {
        Some(_) => classes("--synsets", args.synsets.as_ref())?,
        None => {
            let files = files.clone();
            tokio::task::spawn_blocking(move || files.classes()).await??
        }
    };
    let names =
        classes("--class-names", args.class_names.as_ref())?.into_iter().map(|class| (class.synset, class.name));
    let start = of_files(Start {
        request_id: Uuid::new_v4().to_string(),
        name: args.name.clone(),
        // Parsed again, because the classes are checked too.
        spec_json: DatasetSpec::from_json(&spec.to_json())?.to_json(),
        class_names: names.filter(|(_, name)| !name.is_empty()).collect(),
        limit: args.limit,
        dry_run: args.dry_run,
        ..Start::default()
    });
    let of = NameArgs { name: args.name, cluster: args.cluster };
    let round = open_round(&of, Call::Create, &start, &[Source::Files(Box::new(files))]).await?;
    preview::show(&round);
    if args.dry_run {
        return preview::report(&of, &start, &round, &summary(&of.name, "would be created", &round));
    }
    report(&of, &round, "created", args.wait, &args.timeout).await
}
