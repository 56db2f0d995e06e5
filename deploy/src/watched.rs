//! What files say, built anew whenever they say something else.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

/// How often files are read. What counts is what is in them: a date can stay the same, or change for nothing.
const PERIOD: Duration = Duration::from_secs(2);

/// Files whose contents, in their order, make up one value.
pub(crate) struct Files {
    /// What they are, for the log.
    pub(crate) what: &'static str,
    /// Where they are.
    pub(crate) paths: Vec<PathBuf>,
    /// Is told whether what was read anew could be used.
    pub(crate) reread: fn(bool),
}

impl Files {
    /// Builds the value, and again whenever the files have changed, or this process was sent SIGHUP if that is to be
    /// heeded. What cannot be built is refused with a warning, and the value before stays: files are replaced one after
    /// the other.
    ///
    /// # Errors
    /// If it cannot be built the first time.
    pub(crate) fn watch<T: Send + Sync + 'static>(
        self,
        hangup: bool,
        build: impl Fn(&[Vec<u8>]) -> Result<T> + Send + 'static,
    ) -> Result<watch::Receiver<Arc<T>>> {
        let mut known = read(&self.paths)?;
        let (sender, receiver) = watch::channel(Arc::new(build(&known)?));
        if self.paths.is_empty() {
            return Ok(receiver);
        }
        let mut hangups = if hangup { Some(signal(SignalKind::hangup())?) } else { None };
        tokio::spawn(async move {
            // The last complaint, which is not repeated.
            let mut said = String::new();
            loop {
                let told = tokio::select! {
                    () = sender.closed() => return,
                    () = tokio::time::sleep(PERIOD) => false,
                    Some(()) = async { hangups.as_mut()?.recv().await } => true,
                };
                let paths = self.paths.clone();
                let read = tokio::task::spawn_blocking(move || read(&paths)).await;
                let read = match read.map_err(anyhow::Error::from).flatten() {
                    Ok(read) if read == known && !told => continue,
                    read => read,
                };
                match read.and_then(|read| build(&read).map(|value| (read, value))) {
                    Ok((read, value)) => {
                        (known, said) = (read, String::new());
                        sender.send_replace(Arc::new(value));
                        (self.reread)(true);
                        info!(what = self.what, "files were read again");
                    }
                    Err(error) => {
                        let error = format!("{error:#}");
                        if said != error || told {
                            (self.reread)(false);
                            warn!(
                                what = self.what,
                                error, "files cannot be used as they are now; going on with what they said before"
                            );
                            said = error;
                        }
                    }
                }
            }
        });
        Ok(receiver)
    }
}

fn read(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>> {
    let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    paths.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_change_is_seen_and_what_cannot_be_used_leaves_the_value_as_it_was() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let paths = ["a", "b"].map(|name| folder.path().join(name)).to_vec();
        let write = |at: usize, text: &str| std::fs::write(&paths[at], text).expect("writable");
        let build = |read: &[Vec<u8>]| -> Result<usize> {
            let number = |at: usize| -> Result<usize> { Ok(std::str::from_utf8(&read[at])?.parse()?) };
            Ok(number(0)? + number(1)?)
        };
        let files = || Files { what: "numbers", paths: paths.clone(), reread: |_| {} };
        assert!(files().watch(false, build).is_err(), "there are none yet");
        write(0, "1");
        write(1, "2");
        let mut sum = files().watch(false, build).expect("numbers");
        assert_eq!(**sum.borrow_and_update(), 3);
        write(0, "ten");
        tokio::time::sleep(PERIOD + PERIOD / 4).await;
        assert!(!sum.has_changed().expect("it is watched") && **sum.borrow() == 3);
        write(0, "10");
        sum.changed().await.expect("it is watched");
        assert_eq!(**sum.borrow_and_update(), 12);
    }
}
