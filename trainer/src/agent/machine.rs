//! Whether this agent has the machine for itself.

use std::fs::{File, TryLockError};

use tracing::warn;

/// What agents of a machine lock, in the folder for temporary files.
const LOCK: &str = "gleaner-trainer.lock";

/// Takes the machine for this agent while what it returns is kept, or says that another one has it: each of them counts on all cores.
pub(super) fn claim() -> Option<File> {
    claim_in(&std::env::temp_dir()).unwrap_or_else(|()| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        warn!(
            "another trainer agent runs on this machine, and each gives all {cores} cores to its ranks, so that both are slow: one agent with \
             --devices cpu:2 shares them out, or ranks.threads in the spec does"
        );
        None
    })
}

/// Nothing if nobody can tell, an error if another agent has it.
fn claim_in(folder: &std::path::Path) -> Result<Option<File>, ()> {
    let file = File::options().create(true).truncate(false).write(true).open(folder.join(LOCK));
    let Ok(file) = file else { return Ok(None) };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(()),
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_of_a_machine_is_told_of_the_first_until_that_has_ended() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = claim_in(folder.path()).expect("nobody else").expect("it can be locked");
        assert!(claim_in(folder.path()).is_err());
        drop(first);
        assert!(claim_in(folder.path()).expect("it is free again").is_some());
        assert!(claim_in(std::path::Path::new("/nowhere")).expect("nobody can tell").is_none());
    }
}
