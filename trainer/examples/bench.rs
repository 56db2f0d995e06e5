//! `make bench-train`'s view of the trainer: does one piece of work and prints its figures as lines of JSON.
//!
//! ```text
//! bench data STORE IMAGES SIZE
//! bench step SPEC STEPS WORLD       as many processes of this program as WORLD says
//! bench loader SPEC STORE CACHE_BYTES
//! bench run SPEC STORE CACHE_BYTES
//! ```
#![allow(clippy::print_stdout, reason = "its figures are what it is for")]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use proto::RunSpec;
use trainer::bench;

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
        ["data", store, images, size] => bench::write_dataset(Path::new(store), images.parse()?, size.parse()?),
        ["step", spec, steps, world] => {
            let (_place, port) = bench::meeting_place()?;
            if world == "1" {
                return say(&bench::steps(&read(spec)?, steps.parse()?, 0, 1, port)?);
            }
            let rank = |rank: u32| {
                let mut command = Command::new(std::env::current_exe()?);
                let port = port.to_string();
                command.args(["rank", spec, steps, world, &rank.to_string(), &port]).stdin(Stdio::null());
                command.spawn().context("this program again")
            };
            let ranks = (0..world.parse()?).map(rank).collect::<Result<Vec<_>>>()?;
            for mut rank in ranks {
                ensure!(rank.wait()?.success(), "a rank failed");
            }
            Ok(())
        }
        ["rank", spec, steps, world, rank, port] => {
            say(&bench::steps(&read(spec)?, steps.parse()?, rank.parse()?, world.parse()?, port.parse()?)?)
        }
        ["loader", spec, store, cache] => {
            bench::loader(Path::new(store), &read(spec)?, cache.parse()?)?.iter().try_for_each(say)
        }
        ["run", spec, store, cache] => say(&bench::run(Path::new(store), &read(spec)?, cache.parse()?)?),
        _ => bail!("see the head of examples/bench.rs"),
    }
}

fn read(spec: &str) -> Result<RunSpec> {
    Ok(RunSpec::from_toml(&std::fs::read_to_string(spec).with_context(|| spec.to_owned())?)?)
}

fn say(figures: &bench::Figures) -> Result<()> {
    println!("{}", serde_json::to_string(figures)?);
    Ok(())
}
