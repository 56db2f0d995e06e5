//! Two threads at one list: while one makes out lines, the other puts those before them into a spool.

use std::io;
use std::panic::resume_unwind;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use crate::error::Error;

/// A batch of more bytes than this is handed on.
const BATCH_BYTES: usize = 256 << 10;

/// Some lines, one behind the other, and what is known of each.
#[derive(Debug)]
pub(super) struct Batch<K> {
    text: String,
    lines: Vec<Length<K>>,
}

#[derive(Debug)]
struct Length<K> {
    known: K,
    /// In bytes.
    synset: usize,
    tail: usize,
}

impl<K: Copy> Batch<K> {
    fn new() -> Self {
        Self { text: String::new(), lines: Vec::new() }
    }

    /// What is known of each, its synset and its tail (see [`proto::slice`]).
    pub(super) fn lines(&self) -> impl Iterator<Item = (K, &str, &str)> {
        self.lines.iter().scan(&self.text[..], |rest, line| {
            let (synset, others) = rest.split_at_checked(line.synset)?;
            let (tail, others) = others.split_at_checked(line.tail)?;
            *rest = others;
            Some((line.known, synset, tail))
        })
    }
}

/// Takes lines, and hands them on in batches.
pub(super) struct Batches<K> {
    batch: Batch<K>,
    sender: SyncSender<Batch<K>>,
}

impl<K: Copy> Batches<K> {
    /// Takes a line, whose tail is these parts together.
    ///
    /// # Errors
    /// If what takes the batches has ended.
    pub(super) fn push(&mut self, known: K, synset: &str, tail: &[&str]) -> Result<(), Error> {
        let Batch { text, lines } = &mut self.batch;
        text.push_str(synset);
        tail.iter().for_each(|part| text.push_str(part));
        lines.push(Length { known, synset: synset.len(), tail: tail.iter().map(|part| part.len()).sum() });
        if text.len() > BATCH_BYTES { self.hand_on() } else { Ok(()) }
    }

    fn hand_on(&mut self) -> Result<(), Error> {
        let sent = self.sender.send(std::mem::replace(&mut self.batch, Batch::new()));
        sent.map_err(|_| Error::Local("the spooling of lines has ended".to_owned()))
    }
}

/// Runs `fill`, whose lines another thread puts into `spool` meanwhile. Returns both when all are there.
pub(super) fn spooled<S: Send, K: Copy + Send, T>(
    mut spool: S,
    put: impl Fn(&mut S, &Batch<K>) -> io::Result<()> + Send,
    fill: impl FnOnce(&mut Batches<K>) -> Result<T, Error>,
) -> Result<(S, T), Error> {
    thread::scope(|scope| {
        let (sender, batches) = sync_channel::<Batch<K>>(1);
        let spooler = scope.spawn(move || batches.iter().try_for_each(|batch| put(&mut spool, &batch)).map(|()| spool));
        let mut batches = Batches { batch: Batch::new(), sender };
        let filled = fill(&mut batches).and_then(|filled| batches.hand_on().map(|()| filled));
        drop(batches);
        // What ended the spooler ended the filling, too.
        let spool = spooler.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok((spool, filled?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_comes_in_its_order_however_many_batches_they_fill() {
        let long = "x".repeat(BATCH_BYTES / 3);
        let fill =
            |batches: &mut Batches<u32>| (0..50).try_for_each(|n| batches.push(n, "é", &[&long, "\t", &n.to_string()]));
        let put = |there: &mut Vec<_>, batch: &Batch<u32>| {
            there.extend(batch.lines().map(|(n, synset, tail)| (n, synset.to_owned(), tail.to_owned())));
            Ok(())
        };
        let (there, ()) = spooled(Vec::new(), put, fill).expect("nothing fails");
        assert_eq!(there, (0..50).map(|n| (n, "é".to_owned(), format!("{long}\t{n}"))).collect::<Vec<_>>());
    }

    #[test]
    fn what_ends_the_spooling_is_told_and_not_that_it_ended() {
        let fill = |batches: &mut Batches<u32>| (0..1_000_000).try_for_each(|n| batches.push(n, "n1", &["http://a/"]));
        let full = |(): &mut (), _: &Batch<u32>| Err(io::Error::from(io::ErrorKind::StorageFull));
        let error = spooled((), full, fill).expect_err("no room").to_string();
        assert!(error.contains("no storage space"), "{error}");
        let fill = |_: &mut Batches<u32>| Err::<(), _>(Error::Invalid("a bad list".to_owned()));
        let error = spooled((), |(), _| Ok(()), fill).expect_err("a bad list").to_string();
        assert!(error.contains("a bad list"), "{error}");
    }
}
