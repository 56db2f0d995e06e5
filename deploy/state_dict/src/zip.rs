//! The zip files that `torch.save` writes: nothing in them is compressed, and the list of their entries ends the file.

use std::collections::BTreeMap;
use std::ops::Range;

use crc_fast::CrcAlgorithm::Crc32IsoHdlc;

use crate::error::{Error, Result, refuse};

/// What a zip file begins with.
pub(crate) const SIGNATURE: &[u8] = b"PK\x03\x04";

/// Bytes of the records' fixed parts: that which ends the file, that of an entry in the list, and that before its
/// bytes.
const END: usize = 22;
const LISTED: usize = 46;
const LOCAL: usize = 30;

/// A zip file's entries.
#[derive(Debug)]
pub(crate) struct Zip<'a> {
    file: &'a [u8],
    entries: BTreeMap<&'a str, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// None: they are compressed or encrypted.
    bytes: Option<Range<usize>>,
    crc: u32,
}

impl<'a> Zip<'a> {
    /// Reads the list of entries.
    pub(crate) fn read(file: &'a [u8]) -> Result<Self> {
        let start = file.len().checked_sub(END).ok_or_else(cut_short)?;
        let end = Record(&file[start..]);
        // With a comment it would not be the last thing in the file; PyTorch writes none.
        if !end.begins(b"PK\x05\x06") {
            return Err(cut_short());
        }
        let (count, list) = (end.u16(10)?, end.u32(16)?);
        if count == 0xffff || list == 0xffff_ffff {
            return refuse("is larger than 4 GiB");
        }
        let (mut entries, mut at) = (BTreeMap::new(), list as usize);
        for _ in 0..count {
            let listed = Record(file.get(at..start).ok_or_else(broken)?);
            if !listed.begins(b"PK\x01\x02") {
                return Err(broken());
            }
            let [name_length, extra, comment] =
                [listed.u16(28)?, listed.u16(30)?, listed.u16(32)?].map(|length| length as usize);
            let name = listed.0.get(LISTED..LISTED + name_length).ok_or_else(broken)?;
            let name = std::str::from_utf8(name).map_err(|_| broken())?;
            let (method, crc, size, local) = (listed.u16(10)?, listed.u32(16)?, listed.u32(24)?, listed.u32(42)?);
            // Bit 0: encrypted.
            let is_plain = method == 0 && listed.u32(20)? == size && listed.u16(8)? & 1 == 0;
            let before = Record(file.get(local as usize..start).ok_or_else(broken)?);
            if !before.begins(SIGNATURE) {
                return Err(broken());
            }
            let begin = local as usize + LOCAL + before.u16(26)? as usize + before.u16(28)? as usize;
            let bytes = begin..begin + size as usize;
            if is_plain && bytes.end > start {
                return Err(cut_short());
            }
            if entries.insert(name, Entry { bytes: is_plain.then_some(bytes), crc }).is_some() {
                return refuse(format!("has two entries of the name {name:?}"));
            }
            at += LISTED + name_length + extra + comment;
        }
        Ok(Self { file, entries })
    }

    /// The entries' names.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.entries.keys().copied()
    }

    /// An entry's bytes, if there is one of that name; refused if they are not those that were written.
    pub(crate) fn bytes(&self, name: &str) -> Result<Option<&'a [u8]>> {
        let Some(Entry { bytes, crc }) = self.entries.get(name) else { return Ok(None) };
        let Some(bytes) = bytes.clone() else {
            return refuse(format!(
                "has an entry {name:?} that is compressed or encrypted, which torch.save does not do"
            ));
        };
        let bytes = &self.file[bytes];
        if crc_fast::checksum(Crc32IsoHdlc, bytes) != u64::from(*crc) {
            return refuse(format!("is damaged: {name:?} has another checksum than was written"));
        }
        Ok(Some(bytes))
    }
}

/// The bytes from a record's first on.
struct Record<'a>(&'a [u8]);

impl Record<'_> {
    fn begins(&self, signature: &[u8]) -> bool {
        self.0.starts_with(signature)
    }

    fn u16(&self, at: usize) -> Result<u32> {
        let bytes = self.0.get(at..).and_then(<[u8]>::first_chunk).ok_or_else(broken)?;
        Ok(u16::from_le_bytes(*bytes).into())
    }

    fn u32(&self, at: usize) -> Result<u32> {
        let bytes = self.0.get(at..).and_then(<[u8]>::first_chunk).ok_or_else(broken)?;
        Ok(u32::from_le_bytes(*bytes))
    }
}

fn cut_short() -> Error {
    Error("is a zip file that does not end as one: is it all there?".to_owned())
}

fn broken() -> Error {
    Error("is a zip file whose list of entries makes no sense".to_owned())
}
