//! The question before something is deleted.

use std::io::IsTerminal;

use anyhow::Result;

use crate::exit::{Ended, Exit};
use crate::output::note;

/// Asks whether `what` is to be deleted, unless `yes` says so. Without a terminal nobody can be asked.
pub(crate) fn deletion(what: &str, yes: bool) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Ended::usage(format!("deletes {what}; say -y if that is meant")));
    }
    note(format!("delete {what}? [y/N]"));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    if line.trim().eq_ignore_ascii_case("y") {
        return Ok(());
    }
    Err(Ended::error(Exit::Failed, "nothing was deleted"))
}
