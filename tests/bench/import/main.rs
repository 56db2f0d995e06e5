//! `make bench-import`: Gleaner, img2dataset and Hugging Face's `datasets` make the same dataset of pictures that are
//! there already, in turn: out of a folder for each class, WebDataset tars, and a Parquet file.
//!
//! All of them decode each picture, cut and scale it to 256 x 256 pixels, and store it as a JPEG of quality 95 in tars.
//! (Gleaner also counts and hashes, tells copies apart, and writes an outcome for each.) img2dataset reads the folder
//! as a list of `file://` URLs, and knows neither tars nor Parquet. Time runs from the start of the command to its end;
//! Gleaner's cluster of one worker runs already, and its CPU seconds are the worker's, the coordinator's and the
//! command's together.
//!
//! Figures are medians over the rounds.

#![allow(missing_docs, clippy::print_stdout, reason = "a command that speaks to people")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use demo_origin::pictures::{self, CLASSES};
use proto::{Manifest, Split, Stored};
use serde::Deserialize;
use support::{Cluster, process};

const RIVAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/bench/import/rival.py");
/// Folders of pictures.
const FOLDERS: usize = 10;
/// How often the command is looked at.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Debug, Parser)]
struct Args {
    /// A tar of JPEGs to import, over and over, each with a mark of its own; without it the demo's pictures are
    #[arg(long, env = "PHOTOS", default_value = "")]
    photos: String,
    /// The Python that has `datasets` and `webdataset`
    #[arg(long)]
    datasets: PathBuf,
    /// The Python that has img2dataset
    #[arg(long)]
    img2dataset: PathBuf,
    /// Pictures
    #[arg(long, default_value_t = 10_000)]
    pictures: usize,
    /// Times that everything is measured
    #[arg(long, env = "ROUNDS", default_value_t = 2)]
    rounds: usize,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one of them took.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Took {
    seconds: f64,
    cpu_seconds: f64,
    kept: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let places = ["folder", "tars", "parquet"].map(|kind| folder.path().join(kind));
    let bytes = write(&photos(&args.photos)?, args.pictures, &places[0])?;
    println!("{} pictures of {} kB on average", args.pictures, bytes / args.pictures / 1000);
    places[1..].iter().try_for_each(std::fs::create_dir)?;
    rival(&args.datasets, "make", &places.each_ref().map(PathBuf::as_path), folder.path())?;

    let rivals = [("folder", "img2dataset"), ("folder", "datasets"), ("tars", "datasets"), ("parquet", "datasets")];
    let (mut ours, mut theirs) = (vec![Vec::new(); places.len()], vec![Vec::new(); rivals.len()]);
    for round in 0..args.rounds.max(1) {
        for (place, took) in places.iter().zip(&mut ours) {
            took.push(gleaner(place, folder.path())?);
        }
        for (&(kind, name), took) in rivals.iter().zip(&mut theirs) {
            let output = folder.path().join(format!("{kind}-{name}-{round}"));
            let (python, mode) = match name {
                "img2dataset" => (&args.img2dataset, name),
                _ => (&args.datasets, kind),
            };
            let place = folder.path().join(kind);
            let processes = std::thread::available_parallelism()?.to_string();
            let line = rival(python, mode, &[&place, &output, Path::new(&processes)], folder.path())?;
            took.push(serde_json::from_str::<Took>(&line).with_context(|| line.clone())?);
            let _ = std::fs::remove_dir_all(&output);
        }
        println!("round {}: measured", round + 1);
    }

    println!(
        "\n{:10} {:12} {:>10} {:>12} {:>8} {:>12} {:>8}",
        "", "", "gleaner, s", "other, s", "ratio", "CPU s", "ratio"
    );
    let mut last = Vec::new();
    for (&(kind, name), theirs) in rivals.iter().zip(&theirs) {
        let place = places.iter().position(|place| place.ends_with(kind)).context("one of them")?;
        let (ours, theirs) = (median(&ours[place]), median(theirs));
        for (of, took) in [("gleaner", ours), (name, theirs)] {
            ensure!(took.kept as usize == args.pictures, "{of}, {kind}: {} pictures are there", took.kept);
        }
        let ratios = [theirs.seconds / ours.seconds, theirs.cpu_seconds / ours.cpu_seconds];
        let cpu = format!("{:.1} {:.1}", ours.cpu_seconds, theirs.cpu_seconds);
        println!(
            "{kind:10} {name:12} {:10.1} {:12.1} {:8.2} {cpu:>12} {:8.2}",
            ours.seconds, theirs.seconds, ratios[0], ratios[1]
        );
        last.push(format!(
            "bench-import {kind}: seconds={:.1} {name}={:.1} ratio={:.2} cpu_s={:.1} {name}_cpu_s={:.1} cpu_ratio={:.2}",
            ours.seconds, theirs.seconds, ratios[0], ours.cpu_seconds, theirs.cpu_seconds, ratios[1]
        ));
    }
    println!();
    last.iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// Imports with a new cluster of one worker.
fn gleaner(place: &Path, folder: &Path) -> Result<Took> {
    let mut cluster = Cluster::within(folder);
    cluster.start_coordinator_with(&["--lease-seconds", "30"]);
    cluster.start_worker_with("worker", &["--import-root", &place.display().to_string()]);
    let cpu = |cluster: &Cluster| {
        let of = |role| process::cpu_seconds(cluster.pid(role)).context("it has ended");
        anyhow::Ok(of("worker")? + of("coordinator")?)
    };
    let before = cpu(&cluster)?;
    let start = Instant::now();
    let mut command = Command::new(support::binary());
    command.args(["dataset", "import", "bench"]).arg(place).args(["--size", "256", "--set", "resize.quality=95"]);
    // The photos come again and again: what validates or tests would be skipped, as it looks like what trains.
    command.args(["--splits", "content", "--validation", "0", "--test", "0", "--wait", "--timeout", "900s"]);
    command.env("GLEANER_COORDINATOR", format!("http://{}", cluster.address()));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut own = 0.0;
    let status = loop {
        own = process::cpu_seconds(child.id()).unwrap_or(own);
        match child.try_wait()? {
            Some(status) => break status,
            None => std::thread::sleep(LOOK),
        }
    };
    let seconds = start.elapsed().as_secs_f64();
    let said = std::io::read_to_string(child.stderr.take().context("it is piped")?)?;
    ensure!(status.success(), "{}: {said}", place.display());
    let cpu_seconds = cpu(&cluster)? - before + own;
    let manifest = Manifest::from_json(cluster.gleaner(&["dataset", "manifest", "bench"]).as_bytes())?;
    Ok(Took { seconds, cpu_seconds, kept: manifest.samples(Split::Train) })
}

/// What the other program prints last.
fn rival(python: &Path, mode: &str, rest: &[&Path], folder: &Path) -> Result<String> {
    // What it remembers of earlier rounds would be no work of this one.
    let cache = tempfile::tempdir_in(folder)?;
    let mut command = Command::new(python);
    command.arg(RIVAL).arg(mode).args(rest).env("HF_HOME", cache.path()).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("{} does not start", python.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{mode}: {}: {said}", output.status);
    let printed = String::from_utf8_lossy(&output.stdout);
    Ok(printed.lines().last().unwrap_or_default().to_owned())
}

/// Figure by figure.
fn median(rounds: &[Took]) -> Took {
    let of = |figure: fn(&Took) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
    };
    Took { seconds: of(|took| took.seconds), cpu_seconds: of(|took| took.cpu_seconds), kept: rounds[0].kept }
}

/// The JPEGs of a tar, or drawings.
fn photos(tar: &str) -> Result<Vec<Vec<u8>>> {
    if tar.is_empty() {
        let classes = CLASSES.len() as u64;
        return Ok((0..200).map(|n| pictures::picture(1, (n % classes) as usize, n / classes)).collect());
    }
    let context = || format!("PHOTOS: {tar}");
    let mut archive = tar::Archive::new(std::fs::File::open(tar).with_context(context)?);
    let mut photos = Vec::new();
    for entry in archive.entries().with_context(context)? {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry.with_context(context)?, &mut bytes).with_context(context)?;
        if bytes.starts_with(&[0xff, 0xd8]) {
            photos.push(bytes);
        }
    }
    ensure!(!photos.is_empty(), "{}: no JPEGs in it", context());
    Ok(photos)
}

/// Writes so many pictures into folders of classes; how many bytes they have.
fn write(photos: &[Vec<u8>], pictures: usize, folder: &Path) -> Result<usize> {
    let mut total = 0;
    for n in 0..pictures {
        let class = folder.join(format!("class-{}", n % FOLDERS));
        std::fs::create_dir_all(&class)?;
        let photo = &photos[n % photos.len()];
        // A comment makes each another file: those that are the same count once.
        let bytes = [&photo[..2], &[0xff, 0xfe, 0, 10], &(n as u64).to_be_bytes()[..], &photo[2..]].concat();
        total += bytes.len();
        std::fs::write(class.join(format!("{n:06}.jpg")), bytes)?;
    }
    Ok(total)
}
