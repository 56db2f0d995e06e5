//! `gleaner demo`: the whole job on one machine, over the same commands that a user types. Only the web origin is
//! special: it is our own, on loopback, and serves drawings through a list that is rotted as ImageNet's is.

mod baseline;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use demo_origin::{list, origin, pictures};
use proto::{Manifest, Stored};
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::output::say;

/// How long one command of the demo may take before it is given up.
const COMMAND_DEADLINE: Duration = Duration::from_secs(3600);
/// How long the cluster may take to answer.
const START: Duration = Duration::from_secs(60);

/// With so many URLs of each class and so many epochs a network must beat the baseline.
const ENOUGH: (usize, u32) = (500, 11);

/// Arguments of `gleaner demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder for the list, the run's spec and the cluster's store; a number is appended if it exists
    #[arg(long, default_value = "gleaner-demo")]
    dir: PathBuf,
    /// URLs of each of the 20 classes
    #[arg(long, default_value_t = ENOUGH.0)]
    urls_per_class: usize,
    /// Passes over the training pictures
    #[arg(long, default_value_t = ENOUGH.1)]
    epochs: u32,
    /// Fetch workers
    #[arg(long, default_value_t = 2)]
    workers: u32,
    /// Rank processes that train
    #[arg(long, default_value_t = 2)]
    ranks: u32,
    /// Decides every picture, every rotten link and the model's first weights
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs the demo. Prints as it goes; the last line holds the figures.
///
/// # Errors
/// If any of its commands fails, its figures do not add up, or the network has not learned.
pub(crate) async fn run(args: Args) -> Result<()> {
    let begun = Instant::now();
    let dir = fresh(&args.dir)?;
    let origin = origin::Origin::start(args.seed).await.context("the demo's web origin")?;
    let list = list::rotted(args.seed, args.urls_per_class, &origin);
    std::fs::write(dir.join("urls.txt"), list::to_text(&list))?;
    let synsets: String = pictures::CLASSES.iter().map(|class| format!("{}\t{}\n", class.synset, class.name)).collect();
    std::fs::write(dir.join("synsets.txt"), synsets)?;
    std::fs::write(dir.join("run.toml"), run_toml(&args))?;
    say(format!("{} URLs of {} classes, rotted, in {}", list.len(), pictures::CLASSES.len(), dir.display()));

    let cluster = LocalCluster::start(&dir, &args).await?;
    let file = |name: &str| dir.join(name).display().to_string();
    cluster
        .gleaner(&["dataset", "create", "demo", "--urls", &file("urls.txt"), "--synsets", &file("synsets.txt")])
        .args(["--size", "128", "--slice-urls", "500", "--wait"])
        .shown()
        .await?;
    cluster.gleaner(&["dataset", "describe", "demo"]).shown().await?;
    let dataset = cluster.gleaner(&["dataset", "describe", "demo", "-o", "json"]).json().await?;
    let outcomes = dataset["outcomes"].as_object().context("dataset describe: no outcomes")?;
    let kept = outcomes.get("kept").and_then(Value::as_u64).unwrap_or(0);
    let urls: u64 = outcomes.values().filter_map(Value::as_u64).sum();
    ensure!(urls == list.len() as u64, "the outcomes add up to {urls}, but the list has {} URLs", list.len());

    cluster.gleaner(&["run", "submit", "-f", &file("run.toml"), "--name", "demo", "--follow"]).shown().await?;
    let run = cluster.gleaner(&["run", "describe", "demo", "-o", "json"]).json().await?;
    let test = |key: &str| run["test"][key].as_f64().with_context(|| format!("run describe: no test {key}"));
    let (top1, top5) = (test("top1")?, test("top5")?);

    let manifest = cluster.gleaner(&["dataset", "manifest", "demo"]).output().await?;
    let store = crate::store::open(&cluster.store)?;
    let baseline = baseline::nearest_class_mean(&store, &Manifest::from_json(&manifest)?).await?;

    say(format!(
        "test: top-1 {top1:.3}, top-5 {top5:.3}; chance 0.050; nearest class mean of 16x16 pixels {baseline:.3}"
    ));
    say(format!("\nThe cluster's folder stays. Look around in it:\n  gleaner local --store {}", cluster_store(&dir)));
    say("  gleaner dataset describe demo; gleaner run describe demo; gleaner run logs demo");
    say(format!(
        "demo: urls={urls} kept={kept} rejected={} ranks={} epochs={} test_top1={top1:.4} test_top5={top5:.4} baseline_top1={baseline:.4} seconds={:.0}",
        urls - kept,
        args.ranks,
        args.epochs,
        begun.elapsed().as_secs_f64(),
    ));
    if std::io::stdout().is_terminal() && std::env::var_os("DEMO_EXIT").is_none() {
        let pages = &cluster.pages;
        say(format!("\nLook at what it made: http://{pages}   (Ctrl-C ends it)"));
        say(format!("Try the network on a picture of yours: http://{pages}/runs/demo/try"));
        tokio::signal::ctrl_c().await?;
    }
    cluster.stop().await?;
    verdict(&args, top1, baseline)
}

/// Fails a network that is no better than the baseline, if it had enough to learn from.
fn verdict(args: &Args, top1: f64, baseline: f64) -> Result<()> {
    let enough = args.urls_per_class >= ENOUGH.0 && args.epochs >= ENOUGH.1;
    ensure!(
        top1 > baseline || !enough,
        "the network has not learned: its test top-1 of {top1:.3} does not beat the {baseline:.3} of the nearest class mean; \
         `gleaner run explain demo` and cluster.log in the demo's folder may say why"
    );
    Ok(())
}

/// `dir`, or the first of `dir-2`, `dir-3` ... that does not exist; made.
fn fresh(dir: &Path) -> Result<PathBuf> {
    let numbered = (2..).map(|n| PathBuf::from(format!("{}-{n}", dir.display())));
    let dir = std::iter::once(dir.to_owned()).chain(numbered).find(|dir| !dir.exists()).expect("endless");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// A spec that learns 20 classes in minutes on two cores.
fn run_toml(args: &Args) -> String {
    let Args { epochs, ranks, seed, .. } = args;
    format!(
        r#"dataset = "demo"
seed = {seed}
[model]
arch = "alexnet-slim"
width = 0.5
dropout = 0.0
[input]
crop = 112
[train]
epochs = {epochs}
batch = 64
learning_rate = 0.05
label_smoothing = 0.1
[ranks]
min = 1
max = {ranks}
lanes = 4
"#
    )
}

fn cluster_store(dir: &Path) -> String {
    dir.join("store").display().to_string()
}

/// `gleaner local` as a child process, and the means to give it commands.
struct LocalCluster {
    local: Child,
    address: String,
    pages: String,
    store: String,
}

impl LocalCluster {
    async fn start(dir: &Path, args: &Args) -> Result<Self> {
        // Free a moment ago; if somebody takes it in between, `local` says so.
        let free = || anyhow::Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string());
        let (address, pages) = (free()?, free()?);
        let store = cluster_store(dir);
        let log = std::fs::File::create(dir.join("cluster.log"))?;
        let local = Command::new(std::env::current_exe()?)
            .args(["local", "--exit-with-stdin", "--store", &store, "--listen", &address, "--web-listen", &pages])
            .args(["--workers", &args.workers.to_string(), "--ranks", &args.ranks.to_string()])
            // Its origin is our own: nobody has to be spared.
            .env("GLEANER_SITE_SLOTS", "128")
            .env("GLEANER_SITE_RATE", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        say(format!("$ gleaner local --store {store} --workers {} --ranks {}", args.workers, args.ranks));
        say(format!("look at it: http://{pages}"));
        let mut cluster = Self { local, address, pages, store };
        let begun = Instant::now();
        while cluster.gleaner(&["status"]).output().await.is_err() {
            let ended = cluster.local.try_wait()?;
            ensure!(ended.is_none() && begun.elapsed() < START, "the cluster does not come up; see cluster.log");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(cluster)
    }

    fn gleaner(&self, args: &[&str]) -> Gleaner {
        let mut gleaner = Gleaner { args: Vec::new(), coordinator: format!("http://{}", self.address) };
        gleaner.args.extend(args.iter().map(|&arg| arg.to_owned()));
        gleaner
    }

    /// Ends the cluster orderly: it ends when its standard input does.
    async fn stop(mut self) -> Result<()> {
        drop(self.local.stdin.take());
        match tokio::time::timeout(Duration::from_secs(30), self.local.wait()).await {
            Ok(status) => ensure!(status?.success(), "gleaner local ended with an error; see cluster.log"),
            Err(_) => bail!("gleaner local did not end within 30 s"),
        }
        Ok(())
    }
}

/// One command of the demo.
struct Gleaner {
    args: Vec<String>,
    coordinator: String,
}

impl Gleaner {
    fn args<const N: usize>(mut self, more: [&str; N]) -> Self {
        self.args.extend(more.map(str::to_owned));
        self
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(&self.args).env("GLEANER_COORDINATOR", &self.coordinator);
        command.env_remove("GLEANER_TOKEN_FILE").env_remove("GLEANER_CONTEXT");
        command.stdin(Stdio::null()).kill_on_drop(true);
        Ok(command)
    }

    /// Runs it before the user's eyes.
    async fn shown(self) -> Result<()> {
        say(format!("\n$ gleaner {}", self.args.join(" ")));
        let status = tokio::time::timeout(COMMAND_DEADLINE, self.command()?.status()).await??;
        ensure!(status.success(), "gleaner {}: {status}", self.args.join(" "));
        Ok(())
    }

    /// What it prints.
    async fn output(self) -> Result<Vec<u8>> {
        let output = self.command()?.stdout(Stdio::piped()).stderr(Stdio::null()).output();
        let output = tokio::time::timeout(COMMAND_DEADLINE, output).await??;
        ensure!(output.status.success(), "gleaner {}: {}", self.args.join(" "), output.status);
        Ok(output.stdout)
    }

    async fn json(self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.output().await?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_had_enough_to_learn_from_must_beat_the_baseline() {
        let args =
            |urls_per_class, epochs| Args { dir: "demo".into(), urls_per_class, epochs, workers: 1, ranks: 1, seed: 1 };
        assert!(verdict(&args(500, 11), 0.7, 0.6).is_ok());
        let failed = verdict(&args(500, 11), 0.6, 0.6).expect_err("no better");
        assert!(failed.to_string().contains("has not learned"), "{failed}");
        assert!(verdict(&args(500, 1), 0.1, 0.6).is_ok() && verdict(&args(40, 11), 0.1, 0.6).is_ok());
    }
}
