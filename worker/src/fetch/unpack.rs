//! Bodies that were packed although nobody asked for it.

use std::io::Read;
use std::sync::Arc;

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use proto::{Limits, Rejection};
use tokio::time::Instant;

use super::body::{ALLOWANCE, Body};
use super::client::Fetcher;
use super::retry::Failure;
use crate::format::{TELLING_BYTES, format_of};

impl Fetcher {
    /// What a body says that was packed although nobody asked for it.
    pub(super) async fn unpack(&self, mut packed: Body, limits: &Limits, max: usize) -> Result<Body, Failure> {
        let bytes = Bytes::from(std::mem::take(&mut packed.bytes));
        let mut room = ALLOWANCE;
        let unpacked = loop {
            let (packed_bytes, limit) = (bytes.clone(), room);
            let unpacked = tokio::task::spawn_blocking(move || gunzip(&packed_bytes, limit)).await;
            match unpacked.unwrap_or(Err(Rejection::Protocol)) {
                // Larger ones one at a time.
                Err(Rejection::TooLarge) if room < max => {
                    let start = gunzip_start(&bytes).map_err(Failure::of_url)?;
                    format_of(&start).ok_or(Failure::of_url(Rejection::NotAnImage))?;
                    room = max;
                    if packed.overflow.is_none() {
                        let permit = Arc::clone(&self.overflow).acquire_owned();
                        packed.overflow = Some(self.wait_for(permit, limits, &mut Instant::now()).await?);
                    }
                }
                unpacked => break unpacked.map_err(Failure::of_url)?,
            }
        };
        Ok(Body { bytes: unpacked, ..packed })
    }
}

pub(super) fn is_gzip(coding: &[u8]) -> bool {
    let coding = coding.trim_ascii();
    coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip")
}

/// The first bytes of what is packed, by which its format is known.
fn gunzip_start(packed: &[u8]) -> Result<[u8; TELLING_BYTES], Rejection> {
    let mut start = [0; TELLING_BYTES];
    MultiGzDecoder::new(packed).read_exact(&mut start).map_err(|_| Rejection::Protocol)?;
    Ok(start)
}

/// Unpacks to at most `max` bytes.
fn gunzip(packed: &[u8], max: usize) -> Result<Vec<u8>, Rejection> {
    let mut bytes = Vec::new();
    let more = max as u64 + 1;
    MultiGzDecoder::new(packed).take(more).read_to_end(&mut bytes).map_err(|_| Rejection::Protocol)?;
    if bytes.len() > max { Err(Rejection::TooLarge) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_unasked_is_unpacked_to_its_limit() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        std::io::Write::write_all(&mut gzip, &[7; 1000]).expect("memory");
        let packed = gzip.finish().expect("memory");
        assert_eq!(gunzip(&packed, 1000), Ok(vec![7; 1000]));
        assert_eq!(gunzip(&packed, 999), Err(Rejection::TooLarge));
        assert_eq!(gunzip(&packed[..packed.len() - 9], 1000), Err(Rejection::Protocol));
        assert_eq!(gunzip(b"plain", 1000), Err(Rejection::Protocol));
    }
}
