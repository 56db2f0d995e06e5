//! The trainer's side of `make bench-train` and `make bench-gpu`: does one piece of work and prints its figures as
//! lines of JSON.
//!
//! ```text
//! bench data STORE IMAGES SIZE
//! bench step SPEC STEPS DEVICE,...              a process of this program for each device
//! bench norm SPEC TIMES DEVICE                  a batch norm of each lane alone, in several ways
//! bench loader SPEC STORE CACHE_BYTES DEVICE_CACHE_BYTES DEVICE
//! bench run SPEC STORE CACHE_BYTES DEVICE_CACHE_BYTES DEVICE
//! ```
#![allow(clippy::print_stdout, reason = "its figures are what it is for")]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use proto::{RunSpec, Split};
use support::dataset::{self, Dataset, picture};
use trainer::bench;

/// Different pictures in a dataset; each stands in it several times, under several keys.
const PICTURES: u32 = 200;

fn main() -> Result<()> {
    let [(name, value), ..] = trainer::RANK_ENVIRONMENT;
    if std::env::var(name).as_deref() != Ok(value) {
        // As an agent starts its ranks.
        let mut again = Command::new(std::env::current_exe()?);
        return Err(again.args(std::env::args().skip(1)).envs(trainer::RANK_ENVIRONMENT).exec().into());
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["data", store, images, size] => data(Path::new(store), images.parse()?, size.parse()?),
        ["step", spec, steps, devices] => {
            let (_place, port) = bench::meeting_place()?;
            let devices: Vec<&str> = devices.split(',').collect();
            if let [device] = devices[..] {
                return say(&bench::steps(&read(spec)?, steps.parse()?, 0, 1, device, port)?);
            }
            let (world, port) = (devices.len().to_string(), port.to_string());
            let rank = |(rank, device): (usize, &&str)| {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["rank", spec, steps, &world, &rank.to_string(), device, &port]).stdin(Stdio::null());
                command.spawn().context("this program again")
            };
            let ranks = devices.iter().enumerate().map(rank).collect::<Result<Vec<_>>>()?;
            for mut rank in ranks {
                ensure!(rank.wait()?.success(), "a rank failed");
            }
            Ok(())
        }
        ["rank", spec, steps, world, rank, device, port] => {
            say(&bench::steps(&read(spec)?, steps.parse()?, rank.parse()?, world.parse()?, device, port.parse()?)?)
        }
        ["norm", spec, times, device] => {
            bench::norm::ways(&read(spec)?, times.parse()?, device)?.iter().try_for_each(say)
        }
        ["loader", spec, store, host, of_device, device] => {
            let caches = bench::Caches { host: host.parse()?, device: of_device.parse()? };
            bench::loader(Path::new(store), &read(spec)?, caches, device)?.iter().try_for_each(say)
        }
        ["run", spec, store, host, of_device, device] => {
            let caches = bench::Caches { host: host.parse()?, device: of_device.parse()? };
            bench::run(Path::new(store), &read(spec)?, caches, device)?.iter().try_for_each(say)
        }
        _ => bail!("see the head of tests/bench/train/main.rs"),
    }
}

/// Writes a dataset of `images` training samples of `size` x `size` pixels in ten classes into the folder `store`, its
/// manifest to `manifest.json` there, and the names of its tars to `tars.txt`.
fn data(store: &Path, images: u32, size: u32) -> Result<()> {
    let pictures: Vec<_> = (0..PICTURES.min(images)).map(|n| picture(n.into(), size as usize, size as usize)).collect();
    let shards: Vec<[(Split, u32); 1]> =
        (0..images).step_by(500).map(|first| [(Split::Train, (images - first).min(500))]).collect();
    let (manifest, file) = dataset::write(
        store,
        &Dataset {
            dataset: &bench::dataset(),
            classes: 10,
            size,
            shards: &shards.iter().map(<[_; 1]>::as_slice).collect::<Vec<_>>(),
            skipped: &|_, _| false,
            picture: &|key, _| pictures[key as usize % pictures.len()].clone(),
            moments: bench::MOMENTS,
        },
    );
    let tars = manifest.shards.iter().flat_map(|shard| shard.tars.values());
    let names: String = tars.map(|tar| format!("{}\n", store.join(&tar.key).display())).collect();
    std::fs::write(store.join("tars.txt"), names)?;
    std::fs::copy(store.join(file.key), store.join("manifest.json"))?;
    Ok(())
}

fn read(spec: &str) -> Result<RunSpec> {
    Ok(RunSpec::from_toml(&std::fs::read_to_string(spec).with_context(|| spec.to_owned())?)?)
}

fn say(figures: &bench::Figures) -> Result<()> {
    println!("{}", serde_json::to_string(figures)?);
    Ok(())
}
