//! img2dataset's side, run by `runner.py` in a Python of its own.

use std::fmt::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use support::process;
use tokio::process::Command;

use crate::{DEADLINE, Job, Measured, TIMEOUT_SECONDS, seconds};

const RUNNER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/bench/fetch/runner.py");
/// How often the processes are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// What the runner prints.
#[derive(Deserialize)]
struct Ran {
    /// Of all its processes.
    cpu_seconds: f64,
    kept: Vec<String>,
}

/// Fetches the list with as many processes as there are cores.
pub(crate) async fn fetch(job: &Job, python: &Path, folder: &Path) -> Result<Measured> {
    let folder = tempfile::tempdir_in(folder)?;
    let list = folder.path().join("urls.csv");
    let mut csv = "url,caption\n".to_owned();
    for entry in &job.entries {
        writeln!(csv, "\"{}\",{}", entry.url, entry.synset)?;
    }
    std::fs::write(&list, csv)?;
    let processes = std::thread::available_parallelism()?.get();
    let log = std::fs::File::create(folder.path().join("log"))?;
    let mut command = Command::new(python);
    command.arg(RUNNER).arg(&list).arg(folder.path().join("out"));
    command.args([processes, job.connections.div_ceil(processes), job.shard_urls].map(|n| n.to_string()));
    command.arg(TIMEOUT_SECONDS.to_string());
    command.args(&job.authority);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).kill_on_drop(true);

    let start = Instant::now();
    let child = command.spawn().with_context(|| format!("{} does not start", python.display()))?;
    let root = child.id().context("it has ended")?;
    let mut ran = std::pin::pin!(child.wait_with_output());
    let (mut starting_cpu, mut peak_mb, mut begun) = (0.0, 0f64, None);
    let output = loop {
        tokio::select! {
            output = &mut ran => break output?,
            () = tokio::time::sleep(LOOK) => {}
        }
        ensure!(start.elapsed() < DEADLINE, "not done after {} s", DEADLINE.as_secs());
        let (cpu, memory) = process::tree(root);
        peak_mb = peak_mb.max(memory);
        if begun.is_none() {
            starting_cpu = cpu;
            begun = job.first_request(start);
        }
    };
    let end = Instant::now();
    let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
    ensure!(output.status.success(), "{}: {}", output.status, log());
    let last = output.stdout.split(|&byte| byte == b'\n').rfind(|line| !line.is_empty()).unwrap_or_default();
    let ran: Ran = serde_json::from_slice(last).with_context(log)?;
    let kept = ran.kept.len() as f64;
    ensure!(kept > 0.0, "nothing is kept: {}", log());
    Ok(Measured {
        kept,
        poison: job.poison(ran.kept.iter().map(String::as_str))? as f64,
        cpu: (ran.cpu_seconds - starting_cpu) * 1000.0 / kept,
        cpu_all: ran.cpu_seconds * 1000.0 / kept,
        images_per_second: kept / seconds(begun.unwrap_or(start), Some(end)),
        peak_mb,
        first_request: seconds(start, begun),
        first_image: f64::NAN,
        seconds: seconds(begun.unwrap_or(start), Some(end)),
        ..Measured::default()
    })
}
