//! Gleaner's side: a coordinator and one worker, as processes of their own.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use demo_origin::list;
use proto::manifest::Skips;
use proto::outcomes::OutcomeRow;
use proto::{Manifest, Stored, table};
use tokio::process::{Child, Command};

use crate::{DEADLINE, Job, Measured, TIMEOUT_SECONDS, process, seconds};

const START: Duration = Duration::from_secs(30);

/// Fetches the list with one worker.
pub(crate) async fn fetch(job: &Job, folder: &Path) -> Result<Measured> {
    let folder = tempfile::tempdir_in(folder)?;
    let store = folder.path().join("store").display().to_string();
    let list = folder.path().join("urls.txt");
    std::fs::write(&list, list::to_text(&job.entries))?;
    // Free a moment ago; if somebody takes it in between, the coordinator says so.
    let listen = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let cluster = Cluster { address: format!("http://{listen}"), log: folder.path().join("log") };

    let coordinator = cluster.role(&[
        "coordinator",
        "--store",
        &store,
        "--listen",
        &listen,
        "--host-slots",
        "256",
        "--host-rate",
        "0",
    ])?;
    let begun = Instant::now();
    while cluster.command(&["status"]).await.is_err() {
        ensure!(begun.elapsed() < START, "the coordinator does not come up; see {}", cluster.log.display());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (slices, timeout) = (job.shard_urls.to_string(), format!("limits.timeout_seconds={TIMEOUT_SECONDS}"));
    let create = ["dataset", "create", "bench", "--urls", &list.display().to_string(), "--slice-urls", &slices];
    // The photos come again and again: what validates or tests would be skipped, as it looks like what trains.
    let create = [&create[..], &["--validation", "0", "--test", "0"]].concat();
    let limits = ["--set", &timeout, "--set", &timeout.replace("timeout", "connect_timeout")];
    cluster.command(&[&create[..], &limits].concat()).await?;

    #[allow(clippy::disallowed_methods, reason = "compared with the clock times in the outcomes")]
    let (start, clock) = (Instant::now(), SystemTime::now());
    let connections = job.connections.to_string();
    let mut arguments = vec!["worker", "--store", &store, "--connections", &connections, "--allow-net", "127.0.0.0/8"];
    let authority = job.authority.as_ref().map(|file| file.display().to_string());
    arguments.extend(authority.iter().flat_map(|file| ["--ca-file", file]));
    let worker = cluster.role(&arguments)?;
    cluster.command(&["dataset", "wait", "bench"]).await?;
    let end = Instant::now();
    let id = |child: &Child| child.id().context("it has ended");
    let cpu = process::cpu_seconds(id(&worker)?)?;
    let peak_mb = process::peak_mb(id(&worker)?)?;
    let coordinator_cpu = process::cpu_seconds(id(&coordinator)?)?;
    let manifest = Manifest::from_json(&cluster.command(&["dataset", "manifest", "bench"]).await?)?;
    stop(worker).await?;
    stop(coordinator).await?;

    let (rows, counted) = read(Path::new(&store), &manifest)?;
    ensure!(rows.len() == job.entries.len(), "{} outcomes for {} URLs", rows.len(), job.entries.len());
    let kept = counted.len() as f64;
    ensure!(kept > 0.0, "nothing is kept: {:?}", manifest.outcomes);
    let first = rows.iter().filter(|row| row.split.is_some()).map(|row| row.fetched_at).min().unwrap_or_default();
    let clock = clock.duration_since(UNIX_EPOCH)?.as_millis() as i64;
    Ok(Measured {
        kept,
        poison: job.poison(counted.iter().map(String::as_str))? as f64,
        cpu: cpu * 1000.0 / kept,
        cpu_all: (cpu + coordinator_cpu) * 1000.0 / kept,
        images_per_second: kept / seconds(start, Some(end)),
        peak_mb,
        first_request: seconds(start, job.first_request(start)),
        first_image: (first - clock) as f64 / 1000.0,
    })
}

/// All outcomes, and the URLs of the samples that count.
fn read(store: &Path, manifest: &Manifest) -> Result<(Vec<OutcomeRow>, Vec<String>)> {
    let (mut all, mut counted) = (Vec::new(), Vec::new());
    let folder = store.join(format!("datasets/{}/outcomes", manifest.dataset));
    for file in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let rows: Vec<OutcomeRow> = table::read(std::fs::read(file?.path())?.into())?;
        all.extend(rows);
    }
    for shard in &manifest.shards {
        let skips = match &shard.skips {
            Some(file) => Skips::from_bytes(&std::fs::read(store.join(&file.key))?),
            None => Skips::default(),
        };
        for tar in shard.tars.values() {
            let mut samples: Vec<&OutcomeRow> =
                all.iter().filter(|row| row.tar.as_deref() == Some(tar.key.as_str())).collect();
            samples.sort_by_key(|row| row.offset);
            let places = samples.iter().zip(tar.first..);
            counted.extend(places.filter(|&(_, place)| !skips.contains(place)).map(|(row, _)| row.url.clone()));
        }
    }
    Ok((all, counted))
}

struct Cluster {
    address: String,
    log: std::path::PathBuf,
}

impl Cluster {
    /// Starts a role, which ends when its standard input does.
    fn role(&self, arguments: &[&str]) -> Result<Child> {
        let log = std::fs::File::options().append(true).create(true).open(&self.log)?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_gleaner"));
        command.args(arguments).arg("--exit-with-stdin").env("GLEANER_COORDINATOR", &self.address);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).kill_on_drop(true);
        Ok(command.spawn()?)
    }

    /// Runs a command to its end; returns what it prints.
    async fn command(&self, arguments: &[&str]) -> Result<Vec<u8>> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gleaner"));
        command.args(arguments).env("GLEANER_COORDINATOR", &self.address).stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(DEADLINE, command.output()).await??;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "gleaner {}: {}: {said}", arguments.join(" "), output.status);
        Ok(output.stdout)
    }
}

async fn stop(mut role: Child) -> Result<()> {
    drop(role.stdin.take());
    let status = tokio::time::timeout(START, role.wait()).await??;
    ensure!(status.success(), "a role ended with {status}");
    Ok(())
}
