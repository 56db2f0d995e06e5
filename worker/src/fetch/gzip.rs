//! Bodies that came with gzip although nobody asked for it.

use std::io::Read;

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use proto::{Limits, Rejection};
use tokio::time::Instant;

use super::body::{Body, BodyBudget, FREE_BYTES};
use super::retry::FetchError;
use crate::format::{MAGIC_BYTES, format_of, unsupported};

/// Whether a `Content-Encoding` is gzip.
pub(super) fn is_gzip(coding: &[u8]) -> bool {
    let coding = coding.trim_ascii();
    coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip")
}

/// Decompresses a body to at most `max` bytes.
pub(super) async fn decompress(
    mut body: Body,
    budget: &BodyBudget,
    limits: &Limits,
    max: usize,
) -> Result<Body, FetchError> {
    let compressed = Bytes::from(std::mem::take(&mut body.bytes));
    let mut allowed = FREE_BYTES;
    loop {
        let (bytes, limit) = (compressed.clone(), allowed);
        let result = tokio::task::spawn_blocking(move || gunzip(&bytes, limit)).await;
        match result.unwrap_or(Err(Rejection::Protocol)) {
            // Large ones one at a time, and only if they begin as a picture does.
            Err(Rejection::TooLarge) if allowed < max => {
                let start = gunzip_start(&compressed).map_err(FetchError::of_url)?;
                if format_of(&start).is_none() && unsupported(&start).is_none() {
                    return Err(FetchError::of_url(Rejection::NotAnImage));
                }
                budget.go_beyond(&mut body, limits, &mut Instant::now()).await?;
                allowed = max;
            }
            result => {
                body.bytes = result.map_err(FetchError::of_url)?;
                return Ok(body);
            }
        }
    }
}

/// The first bytes, decompressed, which tell the format.
fn gunzip_start(compressed: &[u8]) -> Result<[u8; MAGIC_BYTES], Rejection> {
    let mut start = [0; MAGIC_BYTES];
    MultiGzDecoder::new(compressed).read_exact(&mut start).map_err(|_| Rejection::Protocol)?;
    Ok(start)
}

fn gunzip(compressed: &[u8], max: usize) -> Result<Vec<u8>, Rejection> {
    let mut bytes = Vec::new();
    let more = max as u64 + 1;
    MultiGzDecoder::new(compressed).take(more).read_to_end(&mut bytes).map_err(|_| Rejection::Protocol)?;
    if bytes.len() > max { Err(Rejection::TooLarge) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_that_nobody_asked_for_is_decompressed_up_to_a_limit() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        std::io::Write::write_all(&mut gzip, &[7; 1000]).expect("memory");
        let compressed = gzip.finish().expect("memory");
        assert_eq!(gunzip(&compressed, 1000), Ok(vec![7; 1000]));
        assert_eq!(gunzip(&compressed, 999), Err(Rejection::TooLarge));
        assert_eq!(gunzip(&compressed[..compressed.len() - 9], 1000), Err(Rejection::Protocol));
        assert_eq!(gunzip(b"plain", 1000), Err(Rejection::Protocol));
    }
}
