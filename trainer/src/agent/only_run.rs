//! The run that an agent was started for, if it was for one: it has ranks of no other, and ends with it.

use anyhow::{Result, bail};
use proto::pb::RunState;

/// See above.
#[derive(Debug, Default)]
pub(super) struct OnlyRun {
    /// Empty: ranks of any run.
    pub(super) name: String,
    ended: Option<RunState>,
}

impl OnlyRun {
    pub(super) fn new(name: Option<String>) -> Self {
        Self { name: name.unwrap_or_default(), ended: None }
    }

    /// The coordinator says how it ended; unspecified: it has not.
    pub(super) fn hear(&mut self, ended: RunState) {
        self.ended = Some(ended).filter(|state| *state != RunState::Unspecified).or(self.ended);
    }

    pub(super) fn is_over(&self) -> bool {
        self.ended.is_some()
    }

    /// What the agent's end is.
    ///
    /// # Errors
    /// If the run ended otherwise than done.
    pub(super) fn end(self) -> Result<()> {
        let how = match self.ended {
            None | Some(RunState::Done) => return Ok(()),
            Some(RunState::Cancelled) => "was cancelled",
            Some(_) => "has failed",
        };
        bail!("run {:?} {how}", self.name)
    }
}
