//! `gleaner token`: makes tokens. The coordinator has but their digests, so a token is seen once.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use coordinator::{NewToken, Role};

use crate::exit::Ended;
use crate::output::{note, say};
use crate::private;

/// `gleaner token ...`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a token, and the line that the coordinator's file of tokens needs
    New(NewArgs),
}

/// Arguments of `gleaner token new`.
#[derive(Debug, clap::Args)]
pub(crate) struct NewArgs {
    /// What its holder may do
    #[arg(long, value_enum)]
    role: Role,
    /// Whom it is for: 1 to 63 of a-z A-Z 0-9 - _ .
    #[arg(long)]
    name: String,
    /// Write the token into this new file, which nobody else can read, and print the line alone
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
}

/// Does it.
pub(crate) fn run(command: Command) -> Result<()> {
    let Command::New(NewArgs { role, name, to }) = command;
    let made = NewToken::make(role, &name).map_err(Ended::usage)?;
    match to {
        Some(file) => write(&file, &made)?,
        None => {
            note("the token, which is shown this once; its holder keeps it in a file for --token-file:");
            say(&made.token);
        }
    }
    note("the line for the file that the coordinator has as --tokens:");
    say(&made.line);
    Ok(())
}

fn write(file: &Path, made: &NewToken) -> Result<()> {
    private::create(file, &format!("{}\n", made.token)).with_context(|| format!("cannot write {}", file.display()))
}
