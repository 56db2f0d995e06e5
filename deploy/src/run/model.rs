//! `gleaner run model`: a trained model out of the cluster's store into a folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use proto::pb::{GetModelFileRequest, GetRunRequest};
use proto::run_event::{EventRecord, RunEvent};
use proto::shard::sha256_hex;
use serde_json::json;
use tonic::Status;

use crate::client::{Cluster, ClusterArgs, answer};
use crate::exit::{Ended, Exit};
use crate::output::{Format, say, say_json};

/// The next piece of a file must come within this time.
const PIECE_DEADLINE: Duration = Duration::from_secs(30);

/// Arguments of `gleaner run model`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The run's name
    run: String,
    /// The folder to write to; it is made if it is not there
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    to: PathBuf,
    /// Only this file, such as model.onnx; may be repeated [default: all]
    #[arg(long, value_name = "NAME")]
    file: Vec<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Writes the files of a done run's model, each checked against its digest.
pub(super) async fn run(args: Args) -> Result<()> {
    let cluster = Cluster::new(&args.cluster)?;
    let mut files = files(&cluster, &args.run).await?;
    if let Some(unknown) = args.file.iter().find(|name| !files.contains_key(*name)) {
        let known = files.into_keys().collect::<Vec<_>>().join(", ");
        return Err(Ended::error(Exit::NotFound, format!("the model has no file {unknown:?}, but: {known}")));
    }
    files.retain(|name, _| args.file.is_empty() || args.file.contains(name));
    std::fs::create_dir_all(&args.to).with_context(|| format!("failed to make {}", args.to.display()))?;
    let mut written = Vec::new();
    for (file, digest) in files {
        let bytes = read(&cluster, &args.run, (&file, &digest)).await?;
        let path = args.to.join(&file);
        put(&path, &bytes).with_context(|| format!("failed to write {}", path.display()))?;
        match args.cluster.output {
            Format::Table => say(format!("{}  {} bytes", path.display(), bytes.len())),
            Format::Json => written.push(json!({"file": path, "bytes": bytes.len(), "sha256": digest})),
        }
    }
    if args.cluster.output == Format::Json {
        say_json(&written)?;
    }
    Ok(())
}

/// One file of a done run's model.
///
/// # Errors
/// If the run is not done, or its model has no such file.
pub(crate) async fn fetch(cluster: &Cluster, run: &str, file: &str) -> Result<Vec<u8>> {
    let files = files(cluster, run).await?;
    let digest = files.get(file).with_context(|| format!("the model of run {run} has no file {file}"))?;
    read(cluster, run, (file, digest)).await
}

/// The files of a done run's model with their digests.
async fn files(cluster: &Cluster, name: &str) -> Result<BTreeMap<String, String>> {
    let run = answer(cluster.runs.clone().get_run(GetRunRequest { run: name.to_owned() })).await?;
    digests(&run.events).ok_or_else(|| {
        let message =
            format!("run {name} is not done: a model is written at its end. See: gleaner run describe {name}");
        Ended::error(Exit::Conflict, message)
    })
}

/// A file of a model, checked against its digest.
async fn read(cluster: &Cluster, run: &str, (file, digest): (&str, &str)) -> Result<Vec<u8>> {
    let request = GetModelFileRequest { run: run.to_owned(), file: file.to_owned() };
    let mut pieces = answer(cluster.runs.clone().get_model_file(request)).await?;
    let mut bytes = Vec::new();
    loop {
        let next = tokio::time::timeout(PIECE_DEADLINE, pieces.message()).await;
        match next.map_err(|_| Status::deadline_exceeded(format!("{file} stopped half way")))?? {
            Some(piece) => bytes.extend_from_slice(&piece.bytes),
            None => break,
        }
    }
    anyhow::ensure!(sha256_hex(&bytes) == digest, "{file} has changed in the store: its digest is not the run's");
    Ok(bytes)
}

/// A half file never stands under its name.
fn put(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    std::fs::write(&part, bytes)?;
    std::fs::rename(&part, path)
}

/// The model's files with their digests, if the run's history has one.
fn digests(events: &[String]) -> Option<BTreeMap<String, String>> {
    let event = |json: &String| serde_json::from_str::<EventRecord>(json).ok();
    events.iter().rev().filter_map(event).find_map(|record| match record.event {
        RunEvent::Done { digests, .. } => Some(digests),
        _ => None,
    })
}
