//! `gleaner doctor`: what is installed, which devices and which store there are, and what to do about what is wrong.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use proto::pb::GetStatusRequest;
use serde::Serialize;
use uuid::Uuid;

use crate::client::{Cluster, ClusterArgs, answer};
use crate::exit::{Ended, Exit};
use crate::output::{Format, Table, say_json};
use crate::store;

/// For each check.
const DEADLINE: Duration = Duration::from_secs(30);

/// Arguments of `gleaner doctor`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Also check this store: a folder, or s3://, gs:// or az:// BUCKET/PREFIX
    #[arg(long, env = "GLEANER_STORE")]
    store: Option<String>,
    /// Also train 20 steps of the default network on each GPU, or on what --devices names: how many images a second,
    /// and for what share of the time the device works
    #[arg(long)]
    gpu: bool,
    /// What --gpu tries, as of `gleaner trainer`: cpu, cuda:N, or several with commas [default: all GPUs]
    #[arg(long, requires = "gpu", value_name = "DEVICES")]
    devices: Option<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// What one check found.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    ok: bool,
    /// What is there, or what is wrong and what to do.
    found: String,
}

/// Checks everything; fails if something is wrong.
pub(crate) async fn run(args: Args) -> Result<()> {
    let mut findings = vec![finding("version", Ok(version())), finding("training", training())];
    if args.gpu {
        let tried = tokio::task::spawn_blocking(move || trials(args.devices.as_deref())).await;
        match tried.unwrap_or_else(|panic| Err(panic.into())) {
            Ok(trials) => findings.extend(trials.into_iter().map(|found| finding("steps", Ok(found)))),
            Err(error) => findings.push(finding("steps", Err(error))),
        }
    }
    if let Some(location) = &args.store {
        let checked = tokio::time::timeout(DEADLINE, check_store(location)).await;
        let checked = checked.unwrap_or_else(|_| bail!("no answer within {} s", DEADLINE.as_secs()));
        findings.push(finding("store", checked.map_err(|e| e.context(format!("store {location}")))));
    }
    findings.push(finding("coordinator", check_coordinator(&args.cluster).await));
    let problems = findings.iter().filter(|finding| !finding.ok).count();
    match args.cluster.output {
        Format::Json => say_json(&findings)?,
        Format::Table => {
            let mut table = Table::new(&["check", "result", "found"]);
            for Finding { check, ok, found } in findings {
                table.row(vec![check.to_owned(), if ok { "ok" } else { "problem" }.to_owned(), found]);
            }
            table.say();
        }
    }
    match problems {
        0 => Ok(()),
        problems => Err(Ended::error(Exit::Failed, format!("{problems} problems"))),
    }
}

fn finding(check: &'static str, result: Result<String>) -> Finding {
    let ok = result.is_ok();
    Finding { check, ok, found: result.unwrap_or_else(|error| crate::exit::explain(&error).1) }
}

fn version() -> String {
    let features =
        [("trainer", cfg!(feature = "trainer")), ("nccl", cfg!(feature = "nccl")), ("demo", cfg!(feature = "demo"))];
    let features: Vec<&str> = features.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("gleaner {} with [{}], {} cores", env!("CARGO_PKG_VERSION"), features.join(" "), cores)
}

#[cfg(feature = "trainer")]
fn training() -> Result<String> {
    match trainer::problem() {
        Some(problem) => bail!("{}; {problem}", trainer::describe()),
        None => Ok(trainer::describe()),
    }
}

/// What each device did.
#[cfg(feature = "trainer")]
fn trials(devices: Option<&str>) -> Result<Vec<String>> {
    if devices.is_none() && trainer::devices() == ["cpu"] {
        let of_cpus = "this program has a libtorch for CPUs; one for GPUs is built with the feature `nccl` (make libtorch CUDA=1)";
        let why = trainer::problem().unwrap_or(of_cpus);
        bail!("no GPU is seen here: {why}. --devices cpu tries the CPU");
    }
    let told = |trial: trainer::Trial| {
        let trainer::Trial { device, precision, batch, steps, images_per_second, busy } = trial;
        let worked = match busy {
            Some(share) if device == "cpu" => format!("the cores worked for {:.0} % of the time", 100.0 * share),
            Some(share) => format!("it worked for {:.0} % of the time", 100.0 * share),
            None => "for what share of the time it worked nobody tells, for want of nvidia-smi".to_owned(),
        };
        format!("{device}: {images_per_second:.0} images a second in {steps} steps of {batch}, {precision}; {worked}")
    };
    Ok(trainer::trials(devices)?.into_iter().map(told).collect())
}

#[cfg(not(feature = "trainer"))]
fn trials(_: Option<&str>) -> Result<Vec<String>> {
    bail!(
        "this binary has no trainer, and so no device: the image gleaner-trainer has it, or a build with the feature `trainer`"
    )
}

#[cfg(not(feature = "trainer"))]
fn training() -> Result<String> {
    Ok("this binary has no trainer; build it with the feature `trainer` to train here".to_owned())
}

/// Writes, reads, refuses to overwrite, and deletes one small object.
async fn check_store(location: &str) -> Result<String> {
    let store: Arc<dyn ObjectStore> = store::open(location)?;
    let nonce = Uuid::new_v4().to_string();
    let key = Path::from(format!("doctor/{nonce}"));
    store.put_opts(&key, PutPayload::from(nonce.clone()), PutMode::Create.into()).await?;
    let result = async {
        ensure!(store.get(&key).await?.bytes().await? == nonce, "an object came back with other bytes than were put");
        match store.put_opts(&key, PutPayload::from("second"), PutMode::Create.into()).await {
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(_) => bail!(
                "the store ignores put-if-absent; use one that has it (S3, GCS, Azure, SeaweedFS, a local folder)"
            ),
        }
    };
    let result = result.await;
    store.delete(&key).await?;
    result.map(|()| format!("{location}: put, get, put-if-absent and delete work"))
}

async fn check_coordinator(args: &ClusterArgs) -> Result<String> {
    let dial = args.dial.dial()?;
    let status = answer(Cluster::over(&dial).runs.get_status(GetStatusRequest {})).await?;
    ensure!(
        status.version == env!("CARGO_PKG_VERSION"),
        "{dial} is version {}, this is {}: use the same on both sides",
        status.version,
        env!("CARGO_PKG_VERSION")
    );
    let (workers, agents) = (status.workers.len(), status.agents.len());
    Ok(format!("{dial} answers: term {}, {workers} workers, {agents} trainer agents", status.term))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_passes_and_nothing_is_left_in_it() {
        let folder = tempfile::tempdir().expect("temporary folder");
        check_store(&folder.path().display().to_string()).await.expect("a good store");
        let left: Vec<_> = std::fs::read_dir(folder.path().join("doctor")).map(|dir| dir.collect()).unwrap_or_default();
        assert!(left.is_empty(), "{left:?}");
        assert!(check_store("/proc/nowhere").await.is_err());
    }
}
