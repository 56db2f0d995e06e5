//! How the agents of a machine share its cores: each locks a file of its own that says how many devices it has, and
//! whoever starts a rank counts the devices of all.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use tracing::info;

/// So many agents of a machine are counted.
const MOST: usize = 64;

/// This agent among those of its machine.
#[derive(Debug)]
pub(super) struct Machine {
    cores: usize,
    devices: usize,
    folder: PathBuf,
    /// Is locked while it is open. None: nobody else can count this agent.
    place: Option<File>,
}

impl Machine {
    /// Takes a place for an agent with so many devices.
    pub(super) fn join(devices: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let machine = Self::join_in(std::env::temp_dir(), cores, devices);
        if machine.devices() > devices {
            info!(
                cores,
                own = machine.devices,
                of = machine.devices(),
                "shares its cores with other trainer agents, by devices"
            );
        }
        machine
    }

    fn join_in(folder: PathBuf, cores: usize, devices: usize) -> Self {
        let place = (0..MOST).find_map(|place| {
            // One of another user cannot be opened so.
            let file = File::options().create(true).truncate(false).write(true).open(path(&folder, place)).ok()?;
            file.try_lock().ok()?;
            file.set_len(0).and_then(|()| write!(&file, "{devices}")).ok()?;
            Some(file)
        });
        Self { cores, devices, folder, place }
    }

    /// The cores of each device here.
    pub(super) fn share(&self) -> usize {
        (self.cores / self.devices()).max(1)
    }

    /// The devices of all agents of this machine.
    fn devices(&self) -> usize {
        let own = if self.place.is_some() { 0 } else { self.devices };
        let all = (0..MOST).map(|place| devices_of(&path(&self.folder, place)));
        (own + all.sum::<usize>()).max(self.devices)
    }
}

fn path(folder: &Path, place: usize) -> PathBuf {
    folder.join(format!("gleaner-trainer-{place}.lock"))
}

/// The devices of the agent that has this place, 0 if there is none.
fn devices_of(place: &Path) -> usize {
    match File::open(place).map(|file| file.try_lock_shared()) {
        Ok(Err(TryLockError::WouldBlock)) => {
            std::fs::read_to_string(place).ok().and_then(|devices| devices.parse().ok()).unwrap_or(1)
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_of_a_machine_share_its_cores_by_devices_until_they_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let join = |devices| Machine::join_in(folder.path().to_owned(), 12, devices);
        let first = join(1);
        assert_eq!(first.share(), 12);
        let second = join(2);
        assert_eq!((first.share(), second.share()), (4, 4));
        let third = join(30);
        assert_eq!(third.share(), 1, "each has one at least");
        drop(second);
        assert_eq!(join(3).devices(), 34, "it has the place that is free again");
        drop(third);
        assert_eq!(first.share(), 12);
        let alone = Machine::join_in("/nowhere".into(), 12, 2);
        assert_eq!(alone.share(), 6, "nobody can tell of others");
    }
}
