//! `make bench-scale`: what more workers bring when the web is slow, and whether they stay within a host's budget together.
//!
//! 1, 2 and 4 workers fetch small pictures from the demo's origin, which answers late: throughput, as the origin sees it, is
//! counted in a window in which all of them are at work. Then 4 workers that want more than a host's budget share it while
//! the coordinator is killed and another begins, and while one worker is stopped (SIGSTOP) for longer than its share lasts; the
//! origin counts how many requests it answers at a time.

#![allow(missing_docs, clippy::print_stdout, reason = "a command that speaks to people")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use demo_origin::origin::{Options, Origin};

/// Before each answer.
const DELAY: Duration = Duration::from_millis(400);
const CONNECTIONS: usize = 8;
const HOSTS: usize = 8;
/// Until all workers are at work; then the time in which requests are counted.
const WARM_UP: Duration = Duration::from_secs(4);
const WINDOW: Duration = Duration::from_secs(10);
/// Of one host, in the second part.
const BUDGET: usize = 6;
const GRANT: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);
const PICTURES: usize = 2000;

#[tokio::main]
async fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let pictures = folder.path().join("pictures");
    std::fs::create_dir(&pictures)?;
    for n in 0..PICTURES {
        std::fs::write(pictures.join(format!("{n}.jpg")), picture(n as u32)?)?;
    }
    let mut rates = Vec::new();
    for workers in [1, 2, 4] {
        let rate = throughput(&folder.path().join(format!("scale-{workers}")), &pictures, workers).await?;
        println!("{workers} workers: {rate:.1} requests per second");
        rates.push(rate);
    }
    let seen = budget(&folder.path().join("budget"), &pictures).await?;
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
async fn throughput(folder: &Path, pictures: &Path, workers: usize) -> Result<f64> {
    let origin = origin(pictures, HOSTS).await?;
    let mut cluster = Cluster::new(folder, &["--host-slots", "64", "--host-rate", "0"])?;
    cluster.create(&origin, "100")?;
    for n in 0..workers {
        cluster.worker(&format!("worker-{n}"))?;
    }
    let first = wait("the first request", || arrivals(&origin).into_iter().min()).await?;
    let begin = first + WARM_UP;
    tokio::time::sleep_until((begin + WINDOW).into()).await;
    let arrivals = arrivals(&origin);
    ensure!(arrivals.len() < PICTURES, "the list has ended before the window");
    let counted = arrivals.iter().filter(|&&at| at >= begin && at < begin + WINDOW).count();
    Ok(counted as f64 / WINDOW.as_secs_f64())
}

/// The most requests at a time that a host saw.
async fn budget(folder: &Path, pictures: &Path) -> Result<usize> {
    let origin = origin(pictures, 1).await?;
    let (slots, seconds) = (BUDGET.to_string(), GRANT.as_secs().to_string());
    let mut cluster = Cluster::new(folder, &["--host-slots", &slots, "--host-rate", "0", "--grant-seconds", &seconds])?;
    cluster.create(&origin, "100")?;
    for n in 0..4 {
        cluster.worker(&format!("worker-{n}"))?;
    }
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
    cluster.kill("coordinator")?;
    tokio::time::sleep(GRANT / 4).await;
    cluster.coordinator()?;
    full("after the coordinator was killed and another began at once").await?;
    cluster.kill("coordinator")?;
    tokio::time::sleep(GRANT * 3).await;
    cluster.coordinator()?;
    full("after it was away for longer than shares last").await?;
    cluster.signal("worker-0", "STOP")?;
    tokio::time::sleep(GRANT * 3).await;
    full("while one worker is stopped").await?;
    cluster.signal("worker-0", "CONT")?;
    full("after it goes on").await?;
    cluster.kill("worker-1")?;
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

/// A JPEG of some 10 kB, different for every seed.
fn picture(seed: u32) -> Result<Vec<u8>> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let pixels: Vec<u8> = (0..160 * 120 * 3)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((i / 480) as u8).wrapping_add((state >> 27) as u8)
        })
        .collect();
    let image = turbojpeg::Image {
        pixels: pixels.as_slice(),
        width: 160,
        pitch: 480,
        height: 120,
        format: turbojpeg::PixelFormat::RGB,
    };
    Ok(turbojpeg::compress(image, 92, turbojpeg::Subsamp::Sub2x2)?.to_vec())
}

/// Processes over one store; all are killed when it is dropped.
struct Cluster {
    folder: PathBuf,
    listen: String,
    flags: Vec<String>,
    processes: Vec<(String, Child)>,
}

impl Cluster {
    /// With a coordinator, which gets these flags.
    fn new(folder: &Path, flags: &[&str]) -> Result<Self> {
        std::fs::create_dir(folder)?;
        // Free a moment ago; if somebody takes it in between, the coordinator says so.
        let listen = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        let mut cluster = Self { folder: folder.to_owned(), listen, flags, processes: Vec::new() };
        cluster.coordinator()?;
        Ok(cluster)
    }

    fn coordinator(&mut self) -> Result<()> {
        let mut arguments = vec!["coordinator".to_owned(), "--listen".to_owned(), self.listen.clone()];
        arguments.extend(self.flags.clone());
        self.spawn("coordinator", &arguments)?;
        let begun = Instant::now();
        while !self.command(&["status".to_owned()]).output()?.status.success() {
            ensure!(begun.elapsed() < PATIENCE, "the coordinator does not come up");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn worker(&mut self, name: &str) -> Result<()> {
        let connections = CONNECTIONS.to_string();
        let arguments =
            ["worker", "--allow-net", "127.0.0.0/8", "--connections", &connections, "--decode-threads", "1"];
        self.spawn(name, &arguments.map(str::to_owned))
    }

    /// A dataset of all pictures, spread over the origin's hosts.
    fn create(&self, origin: &Origin, slice: &str) -> Result<()> {
        let urls = (0..PICTURES).map(|n| {
            let host = &origin.hosts()[n % origin.hosts().len()];
            format!("n{}\thttp://{host}/files/{n}.jpg\n", n % 2)
        });
        let list = self.folder.join("urls.txt");
        std::fs::write(&list, urls.collect::<String>())?;
        let list = list.display().to_string();
        let create = ["dataset", "create", "bench", "--urls", &list, "--size", "64", "--slice-urls", slice];
        let output = self.command(&create.map(str::to_owned)).output()?;
        ensure!(output.status.success(), "dataset create: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gleaner"));
        command
            .args(arguments)
            .env("GLEANER_STORE", self.folder.join("store"))
            .env("GLEANER_COORDINATOR", format!("http://{}", self.listen))
            .stdin(Stdio::null());
        command
    }

    fn spawn(&mut self, name: &str, arguments: &[String]) -> Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(self.folder.join(format!("{name}.log")))?;
        let mut command = self.command(arguments);
        command.arg("--exit-with-stdin").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        self.processes.push((name.to_owned(), command.spawn()?));
        Ok(())
    }

    fn kill(&mut self, name: &str) -> Result<()> {
        let place = self.processes.iter().position(|(of, _)| of == name).context("it was started")?;
        let (_, mut child) = self.processes.remove(place);
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    fn signal(&self, name: &str, signal: &str) -> Result<()> {
        let (_, child) = self.processes.iter().find(|(of, _)| of == name).context("it was started")?;
        let status = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status()?;
        ensure!(status.success(), "kill -s {signal}");
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (_, child) in &mut self.processes {
            // It may have ended by itself, and then there is nothing left to do.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
