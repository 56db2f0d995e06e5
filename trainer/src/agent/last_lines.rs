//! The last words of a rank process: a panic, or an error of a library, stands nowhere else.

use std::collections::VecDeque;

use super::process::Exit;

/// So many lines are kept, each cut off after so many characters.
const LINES: usize = 4;
const LONGEST: usize = 400;

/// The newest lines that a process wrote on stderr.
#[derive(Debug, Default)]
pub(super) struct LastLines(VecDeque<String>);

impl LastLines {
    pub(super) fn add(&mut self, line: &str) {
        if self.0.len() == LINES {
            self.0.pop_front();
        }
        self.0.push_back(line.chars().take(LONGEST).collect());
    }

    /// How the process ended, with its last words if it had any.
    pub(super) fn after(&self, exit: &Exit) -> String {
        match exit {
            Exit::Killed => format!("{exit}: if nobody killed it, this machine, or its container, may lack memory"),
            Exit::Other(_) if self.0.is_empty() => exit.to_string(),
            Exit::Other(_) => {
                format!("{exit}; it last wrote: {}", self.0.iter().map(String::as_str).collect::<Vec<_>>().join(" | "))
            }
        }
    }
}
