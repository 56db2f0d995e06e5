//! `gleaner man`: a manual page for each command.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::output::say;

/// Arguments of `gleaner man`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder for the pages, made if missing: `man -M` finds them in its parent if it is called man1
    #[arg(value_name = "FOLDER")]
    to: PathBuf,
}

/// Writes the pages.
pub(crate) fn run(args: &Args, command: clap::Command) -> Result<()> {
    let folder = args.to.display();
    std::fs::create_dir_all(&args.to).with_context(|| format!("cannot make {folder}"))?;
    clap_mangen::generate_to(command, &args.to).with_context(|| format!("cannot write to {folder}"))?;
    let pages = std::fs::read_dir(&args.to).with_context(|| format!("cannot read {folder}"))?.count();
    say(format!("{pages} pages in {folder}; read one with: man {folder}/gleaner.1"));
    Ok(())
}
