//! Records in numbered partitions, to sort more of them than fit in memory: small sets stay in memory, large ones go to
//! temporary files.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;

/// Partitions of one spool.
pub(crate) const PARTITIONS: usize = 256;

/// Bytes that are held in memory before the partitions go to files.
const IN_MEMORY: usize = 64 << 20;

/// Appends bytes to partitions; then hands out one partition at a time.
pub(crate) struct Spool {
    folder: Option<PathBuf>,
    partitions: Vec<(Vec<u8>, Option<File>)>,
    buffered: usize,
    limit: usize,
}

impl Spool {
    /// `folder` is where files go if there is need for them; None: the system's folder for temporary files. They have
    /// no name, so that nothing is left of them whatever happens.
    pub(crate) fn new(folder: Option<PathBuf>) -> Self {
        Self::with_limit(folder, IN_MEMORY)
    }

    fn with_limit(folder: Option<PathBuf>, limit: usize) -> Self {
        let partitions = (0..PARTITIONS).map(|_| (Vec::new(), None)).collect();
        Self { folder, partitions, buffered: 0, limit }
    }

    /// Appends to the partition that the first byte of a hash chooses: so partitions are in the order of the hashes.
    pub(crate) fn push(&mut self, partition: u8, parts: &[&[u8]]) -> io::Result<()> {
        let (buffer, _) = &mut self.partitions[usize::from(partition)];
        for part in parts {
            buffer.extend_from_slice(part);
            self.buffered += part.len();
        }
        if self.buffered > self.limit { self.spill() } else { Ok(()) }
    }

    fn spill(&mut self) -> io::Result<()> {
        for (buffer, file) in &mut self.partitions {
            let file = match file {
                Some(file) => file,
                None => file.insert(match &self.folder {
                    Some(folder) => tempfile::tempfile_in(folder)?,
                    None => tempfile::tempfile()?,
                }),
            };
            file.write_all(buffer)?;
            *buffer = Vec::new();
        }
        self.buffered = 0;
        Ok(())
    }

    /// Each partition's bytes, in order.
    pub(crate) fn into_partitions(self) -> impl Iterator<Item = io::Result<Vec<u8>>> {
        self.into_streams().map(|mut partition| {
            if partition.file.is_none() {
                return Ok(partition.buffer);
            }
            let mut bytes = Vec::new();
            partition.stream()?.read_to_end(&mut bytes)?;
            Ok(bytes)
        })
    }

    /// The partitions, in order, however large they are.
    pub(crate) fn into_streams(self) -> impl Iterator<Item = Partition> {
        self.partitions.into_iter().map(|(buffer, file)| Partition { buffer, file })
    }
}

/// One partition of a spool.
pub(crate) struct Partition {
    buffer: Vec<u8>,
    file: Option<File>,
}

impl Partition {
    /// Its bytes from the first one on.
    pub(crate) fn stream(&mut self) -> io::Result<Box<dyn Read + '_>> {
        Ok(match &mut self.file {
            None => Box::new(&self.buffer[..]),
            Some(file) => {
                file.rewind()?;
                Box::new(file.chain(&self.buffer[..]))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_the_same_whether_they_went_to_files_or_not() {
        let fill = |limit| {
            let mut spool = Spool::with_limit(None, limit);
            for i in 0..5000u32 {
                spool.push((i % 256) as u8, &[&i.to_le_bytes(), b"x"]).expect("writes");
            }
            spool.into_partitions().map(|p| p.expect("reads")).collect::<Vec<_>>()
        };
        assert_eq!(fill(usize::MAX), fill(700));
    }
}
