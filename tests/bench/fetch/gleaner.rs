//! Gleaner's side: a coordinator and workers, as processes of their own.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use demo_origin::list;
use proto::manifest::Skips;
use proto::outcomes::OutcomeRow;
use proto::{Manifest, Stored, table};
use support::{Cluster, process};

use crate::{DEADLINE, Job, Measured, TIMEOUT_SECONDS, seconds};

/// Fetches the list.
pub(crate) fn fetch(job: &Job, folder: &Path) -> Result<Measured> {
    let mut cluster = Cluster::within(folder);
    let list = cluster.write("urls.txt", &list::to_text(&job.entries));
    let budget = job.budget.iter().flat_map(|slots| ["--site-slots", *slots, "--site-rate", "0"]);
    cluster.start_coordinator_with(&["--lease-seconds", "30"].into_iter().chain(budget).collect::<Vec<_>>());
    let (slices, timeout) = (job.shard_urls.to_string(), format!("limits.timeout_seconds={TIMEOUT_SECONDS}"));
    let create = ["dataset", "create", "bench", "--urls", &list, "--slice-urls", &slices];
    // The photos come again and again: what validates or tests would be skipped, as it looks like what trains.
    let create = [&create[..], &["--validation", "0", "--test", "0"]].concat();
    let limits = ["--set", &timeout, "--set", &timeout.replace("timeout", "connect_timeout")];
    cluster.gleaner(&[&create[..], &limits].concat());

    #[allow(clippy::disallowed_methods, reason = "compared with the clock times in the outcomes")]
    let (start, clock) = (Instant::now(), SystemTime::now());
    let connections = (job.connections / job.workers).to_string();
    let mut flags = vec!["--connections", &connections];
    let authority = job.authority.as_ref().map(|file| file.display().to_string());
    flags.extend(authority.iter().flat_map(|file| ["--ca-file", file]));
    let names: Vec<String> = (0..job.workers).map(|n| format!("worker-{n}")).collect();
    names.iter().for_each(|name| cluster.start_worker_with(name, &flags));
    cluster.gleaner(&["dataset", "wait", "bench", "--timeout", &format!("{}s", DEADLINE.as_secs())]);
    let end = Instant::now();
    let cpu_of = |role| process::cpu_seconds(cluster.pid(role)).context("it has ended");
    let (mut cpu, mut peak_mb, coordinator_cpu) = (0.0, 0.0, cpu_of("coordinator")?);
    for name in &names {
        cpu += cpu_of(name)?;
        peak_mb += process::peak_mb(cluster.pid(name)).context("it has ended")?;
    }
    let manifest = Manifest::from_json(cluster.gleaner(&["dataset", "manifest", "bench"]).as_bytes())?;
    for name in &names {
        cluster.terminate(name);
    }
    cluster.terminate("coordinator");

    let (rows, counted) = read(Path::new(cluster.store()), &manifest)?;
    // What may come back is asked for once more, and has another outcome then.
    let asked: HashSet<&str> = rows.iter().map(|row| row.url.as_str()).collect();
    let wanted: HashSet<&str> = job.entries.iter().map(|entry| entry.url.as_str()).collect();
    ensure!(asked == wanted, "{} URLs have an outcome, not {}", asked.len(), wanted.len());
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
        seconds: seconds(job.first_request(start).unwrap_or(start), Some(end)),
        ..Measured::default()
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
