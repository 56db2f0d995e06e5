//! `make bench-scale`: what more workers bring when the web is slow, and whether they stay within a site's budget
//! together.
//!
//! 1, 2 and 4 workers fetch small pictures from the demo's origin, which answers late: throughput, as the origin sees
//! it, is counted in a window in which all of them are at work. Then 4 workers that want more than a site's budget
//! share it while the coordinator is killed and another begins, and while one worker is stopped (SIGSTOP) for longer
//! than its share lasts; the origin counts how many requests it answers at a time.

#![allow(missing_docs, clippy::print_stdout, reason = "a command that speaks to people")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use demo_origin::origin::{Options, Origin};
use support::Cluster;
use support::dataset::picture;
use support::process::signal;

/// Before each answer.
const DELAY: Duration = Duration::from_millis(400);
const CONNECTIONS: usize = 8;
const HOSTS: usize = 8;
/// Until all workers are at work; then the time in which requests are counted.
const WARM_UP: Duration = Duration::from_secs(4);
const WINDOW: Duration = Duration::from_secs(10);
/// Of one host, in the second part.
const BUDGET: usize = 6;
const LEASE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);
const PICTURES: usize = 2000;

#[tokio::main]
async fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let pictures = folder.path().join("pictures");
    std::fs::create_dir(&pictures)?;
    for n in 0..PICTURES {
        std::fs::write(pictures.join(format!("{n}.jpg")), picture(n as u64, 160, 120))?;
    }
    let mut rates = Vec::new();
    for workers in [1, 2, 4] {
        let rate = throughput(&pictures, workers).await?;
        println!("{workers} workers: {rate:.1} requests per second");
        rates.push(rate);
    }
    let seen = budget(&pictures).await?;
    let [one, two, four] = rates[..] else { unreachable!("three were measured") };
    println!(
        "bench-scale: workers_1={one:.1} workers_2={two:.1} workers_4={four:.1} ratio_2={:.2} ratio_4={:.2} budget={BUDGET} most_seen={seen}",
        two / one,
        four / one,
    );
    ensure!(seen <= BUDGET, "{seen} requests at a time at a host whose budget is {BUDGET}");
    Ok(())
}

/// Requests per second with so many workers.
async fn throughput(pictures: &Path, workers: usize) -> Result<f64> {
    let origin = origin(pictures, HOSTS).await?;
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_coordinator_with(&["--lease-seconds", "30", "--site-slots", "64", "--site-rate", "0"]);
    create(&cluster, &origin);
    (0..workers).for_each(|n| start_worker(&mut cluster, n));
    let first = wait("the first request", || arrivals(&origin).into_iter().min()).await?;
    let begin = first + WARM_UP;
    tokio::time::sleep_until((begin + WINDOW).into()).await;
    let arrivals = arrivals(&origin);
    ensure!(arrivals.len() < PICTURES, "the list has ended before the window");
    let counted = arrivals.iter().filter(|&&at| at >= begin && at < begin + WINDOW).count();
    Ok(counted as f64 / WINDOW.as_secs_f64())
}

/// The most requests at a time that a host saw.
async fn budget(pictures: &Path) -> Result<usize> {
    let origin = origin(pictures, 1).await?;
    let (slots, seconds) = (BUDGET.to_string(), LEASE.as_secs().to_string());
    let flags = ["--lease-seconds", &seconds, "--site-slots", &slots, "--site-rate", "0"];
    let mut cluster = Cluster::new(None, Vec::new());
    cluster.start_coordinator_with(&flags);
    create(&cluster, &origin);
    (0..4).for_each(|n| start_worker(&mut cluster, n));
    let full = |what: &'static str| {
        let origin = &origin;
        async move {
            let from = arrivals(origin).len();
            let begun = Instant::now();
            wait(what, || (arrivals(origin).len() >= from + 5 * BUDGET).then_some(())).await?;
            let rate = (5 * BUDGET) as f64 / begun.elapsed().as_secs_f64();
            println!("budget of {BUDGET}: {what}: {rate:.1} requests per second, at most {} at a time", peak(origin));
            anyhow::Ok(())
        }
    };
    full("four workers share it").await?;
    cluster.kill("coordinator");
    tokio::time::sleep(LEASE / 4).await;
    cluster.start_coordinator_with(&flags);
    full("after the coordinator was killed and another began at once").await?;
    cluster.kill("coordinator");
    tokio::time::sleep(LEASE * 3).await;
    cluster.start_coordinator_with(&flags);
    full("after it was away for longer than shares last").await?;
    signal(cluster.pid("worker-0"), "STOP");
    tokio::time::sleep(LEASE * 3).await;
    full("while one worker is stopped").await?;
    signal(cluster.pid("worker-0"), "CONT");
    full("after it goes on").await?;
    cluster.kill("worker-1");
    full("after another was killed").await?;
    Ok(peak(&origin))
}

async fn origin(pictures: &Path, hosts: usize) -> Result<Origin> {
    let options = Options { hosts, files: Some(pictures.to_owned()), delay: DELAY, ..Options::default() };
    Ok(Origin::start_with(options).await?)
}

fn arrivals(origin: &Origin) -> Vec<Instant> {
    origin.hosts().iter().flat_map(|host| origin.host(host).arrivals).collect()
}

fn peak(origin: &Origin) -> usize {
    origin.hosts().iter().map(|host| origin.host(host).peak).max().unwrap_or(0)
}

async fn wait<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(done) = done() {
            return Ok(done);
        }
        ensure!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn start_worker(cluster: &mut Cluster, n: usize) {
    let connections = CONNECTIONS.to_string();
    cluster.start_worker_with(&format!("worker-{n}"), &["--connections", &connections, "--decode-threads", "1"]);
}

/// A dataset of all pictures, spread over the origin's hosts.
fn create(cluster: &Cluster, origin: &Origin) {
    let urls = (0..PICTURES).map(|n| {
        let host = &origin.hosts()[n % origin.hosts().len()];
        format!("n{}\thttp://{host}/files/{n}.jpg\n", n % 2)
    });
    let list = cluster.write("urls.txt", &urls.collect::<String>());
    cluster.gleaner(&["dataset", "create", "bench", "--urls", &list, "--size", "64", "--slice-urls", "100"]);
}
