//! Records in numbered partitions, to sort more of them than fit in memory: small sets stay in memory, large ones go to
//! temporary files.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;

/// Partitions of one spool.
pub(crate) const PARTITIONS: usize = 256;

/// Bytes of a partition that are held in memory; more go to its file.
const IN_MEMORY: usize = 256 << 10;

/// Appends bytes to partitions; then hands out one partition at a time.
pub(crate) struct Spool {
    folder: Option<PathBuf>,
    partitions: Vec<Partition>,
    in_memory: usize,
}

impl Spool {
    /// `folder` is where files go if there is need for them; None: the system's folder for temporary files. They have
    /// no name, so that nothing is left of them whatever happens.
    pub(crate) fn new(folder: Option<PathBuf>) -> Self {
        Self::with_limit(folder, IN_MEMORY)
    }

    fn with_limit(folder: Option<PathBuf>, in_memory: usize) -> Self {
        let partitions = std::iter::repeat_with(Partition::default).take(PARTITIONS).collect();
        Self { folder, partitions, in_memory }
    }

    /// Appends to the partition that the first byte of a hash chooses: so partitions are in the order of the hashes.
    pub(crate) fn push(&mut self, partition: u8, parts: &[&[u8]]) -> io::Result<()> {
        let Partition { buffer, file } = &mut self.partitions[usize::from(partition)];
        let more = parts.iter().map(|part| part.len()).sum::<usize>();
        if buffer.len() + more > self.in_memory && !buffer.is_empty() {
            let file = match file {
                Some(file) => file,
                None => file.insert(match &self.folder {
                    Some(folder) => tempfile::tempfile_in(folder)?,
                    None => tempfile::tempfile()?,
                }),
            };
            file.write_all(buffer)?;
            buffer.clear();
        }
        // Growing by doubling would end at nearly twice of what may be in memory.
        if buffer.capacity() - buffer.len() < more && buffer.capacity() > self.in_memory / 8 {
            buffer.reserve_exact((self.in_memory - buffer.len()).max(more));
        }
        parts.iter().for_each(|part| buffer.extend_from_slice(part));
        Ok(())
    }

    /// Each partition's bytes, in order.
    pub(crate) fn into_partitions(self) -> impl Iterator<Item = io::Result<Vec<u8>>> {
        self.into_streams().map(Partition::into_bytes)
    }

    /// The partitions, in order, however large they are.
    pub(crate) fn into_streams(self) -> impl Iterator<Item = Partition> {
        self.partitions.into_iter()
    }
}

/// One partition of a spool: what is in its file, and behind that what is in memory.
#[derive(Default)]
pub(crate) struct Partition {
    buffer: Vec<u8>,
    file: Option<File>,
}

impl Partition {
    /// How many bytes it has.
    pub(crate) fn len(&self) -> io::Result<u64> {
        let in_file = self.file.as_ref().map_or(Ok(0), |file| Ok::<_, io::Error>(file.metadata()?.len()))?;
        Ok(in_file + self.buffer.len() as u64)
    }

    /// All its bytes.
    pub(crate) fn into_bytes(mut self) -> io::Result<Vec<u8>> {
        if self.file.is_none() {
            return Ok(self.buffer);
        }
        let mut bytes = Vec::with_capacity(self.len()? as usize);
        self.stream()?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

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
