//! `gleaner dataset ...`

mod control;
mod create;
pub(crate) mod diff;
pub(crate) mod export;
mod form;
mod import;
mod outcomes;
mod preview;
pub(crate) mod reader;
mod sample;
mod spec;

use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::{Context, Result};
use proto::Rejection;
use proto::pb::{
    DamagedShard, Dataset, DatasetState, DeleteDatasetRequest, GetDatasetRequest, GetManifestRequest, LargeSite,
    ListDatasetsRequest,
};
use proto::rejection::KEPT;
use serde_json::Value;
use tonic::Status;

use self::create::{CreateArgs, RefreshArgs};
use crate::client::{Cluster, ClusterArgs, TimeoutArgs, answer, follow, insist, wait_for};
use crate::complete;
use crate::confirm;
use crate::exit::{Ended, Exit};
use crate::output::{Format, Progress, Table, note, percent, say, say_json, state_name};
use crate::status::troubles;

/// Makes, shows and removes datasets.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Create a dataset out of lists of URLs; the workers begin at once
    Create(Box<CreateArgs>),
    /// Create a dataset out of pictures that are there already: folders, tars, Parquet files
    Import(Box<import::ImportArgs>),
    /// Fetch again what may come back, and new URLs: a new version of the dataset, which keeps all that it has
    Refresh(Box<RefreshArgs>),
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
    /// Lease no more of its slices to workers, until it is resumed
    Pause(NameArgs),
    /// Go on with a paused dataset
    Resume(NameArgs),
    /// Make a version of what there is by now, and fetch no more: the rest is `unfetched` until a refresh
    Finish(control::FinishArgs),
    /// Set how large its share of the workers is, beside other datasets
    Priority {
        #[command(flatten)]
        of: NameArgs,
        /// How large
        #[arg(value_enum)]
        share: control::Share,
    },
    /// Print a manifest: the immutable version of a dataset that runs read
    Manifest {
        /// The dataset's name
        #[arg(add = complete::datasets())]
        name: String,
        /// Which version; the latest if left out
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        version: u32,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
    /// List the URLs with what became of each
    Outcomes(outcomes::Args),
    /// Write some of its pictures onto one sheet, a row for each class
    Sample(sample::Args),
    /// Compare two versions: samples added and removed, outcomes by class
    Diff(diff::Args),
    /// Write the dataset as a folder tree, a plain list, clean tars, or Parquet
    Export(export::Args),
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
    #[arg(add = complete::datasets())]
    name: String,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Runs one command.
pub(crate) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Create(args) => create::create(*args).await,
        Command::Import(args) => import::import(*args).await,
        Command::Refresh(args) => create::refresh(*args).await,
        Command::List(args) => list(&args).await,
        Command::Describe(of) => describe(&of).await,
        Command::Watch(of) => wait(&of, None, true).await,
        Command::Wait { of, timeout } => wait(&of, timeout.timeout, false).await,
        Command::Pause(of) => control::pause(of).await,
        Command::Resume(of) => control::resume(of).await,
        Command::Finish(args) => control::finish(args).await,
        Command::Priority { of, share } => control::priority(of, share).await,
        Command::Manifest { name, version, cluster } => manifest(name, version, &cluster).await,
        Command::Outcomes(args) => outcomes::run(args).await,
        Command::Sample(args) => sample::run(args).await,
        Command::Diff(args) => diff::run(args).await,
        Command::Export(args) => export::run(args).await,
        Command::Delete { of, yes } => delete(of, yes).await,
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
    let rounds = match (dataset.rounds, dataset.automatic_rounds) {
        (0 | 1, _) => String::new(),
        (rounds, 0) => format!(" in {rounds} rounds"),
        (rounds, automatic) => format!(" in {rounds} rounds, {automatic} of them automatic"),
    };
    lines.push(format!("{} of {} shards committed{rounds}; {version}", dataset.shards_committed, dataset.shards));
    lines.extend(control::decisions(dataset));
    lines.extend(troubles(&dataset.troubles));
    for DamagedShard { shard, key, what } in &dataset.damaged {
        lines.push(format!("shard {shard} is damaged and left out: {key}: {what}"));
    }
    if !dataset.damaged.is_empty() {
        lines.push(format!("what a later round has not fetched of them: gleaner dataset refresh {}", dataset.name));
    }
    lines.push(String::new());
    lines.extend(yield_table(dataset).lines());
    if !dataset.large_sites.is_empty() {
        lines.push(String::new());
        lines.extend(sites_table(&dataset.large_sites).lines());
    }
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
    if dataset.near_duplicates > 0 {
        let images = dataset.near_duplicates;
        lines.push(String::new());
        lines.push(format!("{images} images that count look like another one (outcomes --outcome near_duplicate)"));
    }
    if !dataset.classes.is_empty() {
        lines.push(String::new());
        // Only datasets that want so many of a class can be short of them.
        let columns = if dataset.classes.iter().any(|class| class.short > 0) { 5 } else { 4 };
        let headings = ["synset", "name", "urls", "train", "validation", "test", "short"];
        let mut table = Table::new(&headings[..2 + columns]);
        let mut totals = vec![0; columns];
        for class in &dataset.classes {
            let counts = &[class.urls, class.train, class.validation, class.test, class.short][..columns];
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

/// Sites that are asked for long: how far each is, and how fast.
fn sites_table(sites: &[LargeSite]) -> Table {
    let mut table = Table::new(&["site", "urls", "waiting", "kept", "per second", "at once", "left"]);
    for site in sites {
        let rate = site.requests_per_second;
        let seconds = if rate > 0.0 { site.left as f64 / rate } else { 0.0 };
        let left = match (site.slots_lent, rate) {
            (0, _) | (_, 0.0) => "-".to_owned(),
            _ => humantime::format_duration(Duration::from_secs(seconds.ceil() as u64)).to_string(),
        };
        let speed = match (rate, site.known, site.most_requests_per_second) {
            (0.0, ..) => "no limit".to_owned(),
            (_, true, most) if rate < most => format!("{rate:.1}, bears no more"),
            (_, true, _) => format!("{rate:.1}, its budget"),
            (_, false, 0.0) => format!("{rate:.1} so far"),
            (_, false, most) => format!("{rate:.1} so far of {most:.1} at most"),
        };
        table.row(vec![
            site.site.clone(),
            site.urls.to_string(),
            site.left.to_string(),
            site_yield(site),
            speed,
            format!("{} of {}", site.slots_lent, site.slots),
            left,
        ]);
    }
    table
}

/// What of a site was kept in this round, and what lately, if that is far less.
pub(crate) fn site_yield(site: &LargeSite) -> String {
    let LargeSite { asked, kept, asked_lately, kept_lately, .. } = *site;
    match asked_lately {
        0 => percent(kept, asked),
        _ => {
            let before = percent(kept.saturating_sub(kept_lately), asked.saturating_sub(asked_lately));
            format!("{} lately, {before} before", percent(kept_lately, asked_lately))
        }
    }
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
    let json = manifest_json(&Cluster::new(args)?, &name, version).await?;
    say(String::from_utf8(json).context("the manifest is no text")?);
    Ok(())
}

/// The bytes of a manifest as the coordinator streams them; version 0 is the latest.
pub(crate) async fn manifest_json(cluster: &Cluster, name: &str, version: u32) -> Result<Vec<u8>, Status> {
    let request = GetManifestRequest { name: name.to_owned(), version };
    let mut stream = answer(cluster.datasets.clone().get_manifest(request)).await?;
    let mut json = Vec::new();
    loop {
        let next = tokio::time::timeout(Duration::from_secs(30), stream.message()).await;
        match next.map_err(|_| Status::deadline_exceeded("the manifest stopped half way"))?? {
            Some(chunk) => json.extend_from_slice(&chunk.json),
            None => return Ok(json),
        }
    }
}

async fn delete(of: NameArgs, yes: bool) -> Result<()> {
    let NameArgs { name, cluster } = of;
    confirm::deletion(&format!("dataset {name} with all its images"), yes)?;
    let client = Cluster::new(&cluster)?.datasets;
    insist(async || answer(client.clone().delete_dataset(DeleteDatasetRequest { name: name.clone() })).await).await?;
    note(format!("{name}: deleted"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::DatasetSpec;

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
    fn large_sites_are_shown_with_their_rate_and_how_long_they_take_at_it() {
        let flickr = LargeSite {
            site: "flickr.com".into(),
            urls: 9000,
            left: 3000,
            requests_per_second: 0.5,
            known: true,
            slots_lent: 1,
            slots: 1,
            most_requests_per_second: 0.5,
            asked: 6000,
            kept: 2008,
            asked_lately: 2000,
            kept_lately: 8,
        };
        let photos = LargeSite { site: "photos.com".into(), urls: 7000, left: 20, ..flickr.clone() };
        let photos = LargeSite {
            requests_per_second: 4.0,
            known: false,
            slots_lent: 0,
            slots: 16,
            most_requests_per_second: 100.0,
            asked_lately: 0,
            ..photos
        };
        assert_eq!(
            sites_table(&[flickr, photos]).lines(),
            [
                "SITE        URLS  WAITING  KEPT                         PER SECOND                   AT ONCE  LEFT",
                "flickr.com  9000     3000  0.4 % lately, 50.0 % before  0.5, its budget              1 of 1   1h 40m",
                "photos.com  7000       20  33.5 %                       4.0 so far of 100.0 at most  0 of 16  -",
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
}
