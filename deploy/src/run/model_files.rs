//! The files of a done run's model, out of the cluster's store.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use proto::pb::{GetModelFileRequest, GetRunRequest, Run};
use proto::run_event::{EventRecord, RunEvent};
use proto::shard::sha256_hex;
use tonic::Status;

use crate::client::{Cluster, answer};
use crate::exit::{Ended, Exit};

/// The next piece of a file must come within this time.
const PIECE_DEADLINE: Duration = Duration::from_secs(30);

/// One file of a done run's model.
///
/// # Errors
/// If the run is not done, or its model has no such file.
pub(crate) async fn fetch(cluster: &Cluster, run: &str, file: &str) -> Result<Vec<u8>> {
    let (_, digests) = done(cluster, run).await?;
    of_run(cluster, run, &digests, file).await
}

/// One of the files whose digests [`done`] has given.
pub(super) async fn of_run(
    cluster: &Cluster,
    run: &str,
    digests: &BTreeMap<String, String>,
    file: &str,
) -> Result<Vec<u8>> {
    let digest = digests.get(file).with_context(|| format!("the model of run {run} has no file {file}"))?;
    read(cluster, run, (file, digest)).await
}

/// A run that is done, and the files of its model with their digests.
pub(super) async fn done(cluster: &Cluster, name: &str) -> Result<(Run, BTreeMap<String, String>)> {
    let run = answer(cluster.runs.clone().get_run(GetRunRequest { run: name.to_owned() })).await?;
    let digests = digests(&run.events).ok_or_else(|| {
        let message =
            format!("run {name} is not done: a model is written at its end. See: gleaner run describe {name}");
        Ended::error(Exit::Conflict, message)
    })?;
    Ok((run, digests))
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

/// The model's files with their digests, if the run's history has one.
fn digests(events: &[String]) -> Option<BTreeMap<String, String>> {
    let event = |json: &String| serde_json::from_str::<EventRecord>(json).ok();
    events.iter().rev().filter_map(event).find_map(|record| match record.event {
        RunEvent::Done { digests, .. } => Some(digests),
        _ => None,
    })
}
