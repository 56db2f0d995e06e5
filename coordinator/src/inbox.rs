//! Lists as they are sent: a few bytes of each in memory, the rest in a temporary file, and no thread held while a
//! caller is silent. A list is read once it is whole, at the pace of the disk and not of whoever sends it.

use std::collections::BTreeMap;
use std::io::SeekFrom;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::Error;

/// Bytes of one list that are held in memory.
const IN_MEMORY: usize = 256 << 10;
/// Lists that are received at once. One more, and the one whose sender has been silent for longest is ended.
const MOST: usize = 512;

/// All lists that are being received.
#[derive(Debug, Default)]
pub(crate) struct Inboxes {
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    /// When each was heard of last, and what ends it.
    heard: BTreeMap<u64, (Instant, CancellationToken)>,
}

/// A list of which more is to come.
#[derive(Debug)]
pub(crate) struct Inbox {
    all: Arc<Inboxes>,
    number: u64,
    ended: CancellationToken,
    folder: Option<PathBuf>,
    /// The most bytes that are taken.
    most: u64,
    received: Received,
}

/// A list that has come.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// The name of each source, and how many bytes it has.
    pub(crate) sources: Vec<(String, u64)>,
    file: Option<File>,
    /// What stands behind the file's bytes.
    buffer: Vec<u8>,
    length: u64,
}

impl Inboxes {
    /// Begins to receive a list of at most so many bytes.
    pub(crate) fn begin(self: &Arc<Self>, folder: Option<PathBuf>, most: u64) -> Inbox {
        let mut open = self.open();
        if open.heard.len() >= MOST
            && let Some(silent) = open.heard.iter().min_by_key(|(_, (heard, _))| *heard).map(|(number, _)| *number)
            && let Some((_, ended)) = open.heard.remove(&silent)
        {
            ended.cancel();
        }
        let (number, ended) = (open.next, CancellationToken::new());
        open.next += 1;
        open.heard.insert(number, (Instant::now(), ended.clone()));
        drop(open);
        Inbox { all: Arc::clone(self), number, ended, folder, most, received: Received::default() }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // Nothing under the lock can leave it half changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    /// What `next` gives, unless this list is ended first to make room for another.
    pub(crate) async fn wait<T>(&self, next: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let ended = self.ended.run_until_cancelled(next).await;
        let message =
            format!("more than {MOST} lists are being sent, and this one's sender was silent for longest; try again");
        let next = ended.ok_or(Error::Aborted(message))??;
        if let Some((heard, _)) = self.all.open().heard.get_mut(&self.number) {
            *heard = Instant::now();
        }
        Ok(next)
    }

    /// Begins a source.
    pub(crate) fn source(&mut self, name: String) {
        self.received.sources.push((name, 0));
    }

    /// Takes the next bytes of the source.
    pub(crate) async fn push(&mut self, data: &[u8]) -> Result<(), Error> {
        let received = &mut self.received;
        let Some((_, length)) = received.sources.last_mut() else {
            return Err(Error::Invalid("`data` before any `source`".to_owned()));
        };
        *length += data.len() as u64;
        received.length += data.len() as u64;
        if received.length > self.most {
            let most = self.most;
            return Err(Error::Invalid(format!(
                "the list has more than {most} bytes: the coordinator's --largest-list"
            )));
        }
        received.buffer.extend_from_slice(data);
        if received.buffer.len() > IN_MEMORY {
            let file = match &mut received.file {
                Some(file) => file,
                None => {
                    let file = match &self.folder {
                        Some(folder) => tempfile::tempfile_in(folder)?,
                        None => tempfile::tempfile()?,
                    };
                    received.file.insert(File::from_std(file))
                }
            };
            file.write_all(&received.buffer).await?;
            received.buffer.clear();
        }
        Ok(())
    }

    /// All that has come.
    pub(crate) async fn finish(mut self) -> Result<Received, Error> {
        let mut received = std::mem::take(&mut self.received);
        if let Some(file) = &mut received.file {
            file.flush().await?;
            file.seek(SeekFrom::Start(0)).await?;
        }
        Ok(received)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.all.open().heard.remove(&self.number);
    }
}

impl Received {
    /// The next bytes, at most so many: those of the sources, one after the other.
    pub(crate) async fn read(&mut self, most: u64) -> Result<Bytes, Error> {
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(IN_MEMORY);
        let mut bytes = Vec::with_capacity(most);
        if let Some(file) = &mut self.file
            && file.take(most as u64).read_to_end(&mut bytes).await? > 0
        {
            return Ok(bytes.into());
        }
        let rest = self.buffer.split_off(self.buffer.len().min(most));
        Ok(std::mem::replace(&mut self.buffer, rest).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_list_comes_back_as_it_was_sent_whether_it_went_to_a_file_or_not() {
        let all = Arc::new(Inboxes::default());
        for size in [10, IN_MEMORY, 3 * IN_MEMORY + 7] {
            let mut inbox = all.begin(None, u64::MAX);
            assert!(inbox.push(b"x").await.is_err(), "of no source");
            let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            for (name, part) in ["a", "b"].iter().zip(sent.chunks(size / 2 + 1)) {
                inbox.source((*name).to_owned());
                for piece in part.chunks(1000) {
                    inbox.push(piece).await.expect("room");
                }
            }
            let mut received = inbox.finish().await.expect("it is written");
            let (mut came, sources) = (Vec::new(), received.sources.clone());
            for (_, length) in &sources {
                let mut left = *length;
                while left > 0 {
                    let bytes = received.read(left).await.expect("it is read");
                    assert!(!bytes.is_empty());
                    left -= bytes.len() as u64;
                    came.extend_from_slice(&bytes);
                }
            }
            assert!(came == sent && sources.len() == 2);
        }
        assert!(all.open().heard.is_empty());
        let mut inbox = all.begin(None, 5);
        inbox.source("a".to_owned());
        inbox.push(b"12345").await.expect("room");
        let refused = inbox.push(b"6").await.expect_err("too many").to_string();
        assert!(refused.contains("--largest-list"), "{refused}");
    }

    #[tokio::test]
    async fn whoever_has_been_silent_for_longest_makes_room() {
        let all = Arc::new(Inboxes::default());
        let mut inboxes = Vec::new();
        for _ in 0..MOST {
            inboxes.push(all.begin(None, 1));
        }
        let never = || std::future::pending::<Result<(), Error>>();
        assert!(inboxes[0].wait(async { Ok(()) }).await.is_ok(), "it is heard of");
        let next = all.begin(None, 1);
        assert!(matches!(inboxes[1].wait(never()).await, Err(Error::Aborted(_))));
        for open in [&inboxes[0], &inboxes[2], &next] {
            assert!(!open.ended.is_cancelled());
        }
        inboxes.truncate(10);
        assert!(all.open().heard.len() == 10, "those that are over hold nothing");
    }
}
