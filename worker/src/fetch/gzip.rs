//! Bodies that came with gzip or deflate although nobody asked for it.

use std::io::Read;

use bytes::Bytes;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use proto::{Limits, Rejection};
use tokio::time::Instant;

use super::body::{Body, BodyBudget, FREE_BYTES};
use super::retry::FetchError;
use crate::format::{MAGIC_BYTES, format_of, unsupported};

/// How a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    Gzip,
    /// In zlib's format, as the standard has it, or without, as some servers have it.
    Deflate,
}

impl Coding {
    /// What a `Content-Encoding` says, if it is one of these.
    pub(super) fn of(coding: &[u8]) -> Option<Self> {
        let coding = coding.trim_ascii();
        let is = |name: &[u8]| coding.eq_ignore_ascii_case(name);
        match () {
            () if is(b"gzip") || is(b"x-gzip") => Some(Self::Gzip),
            () if is(b"deflate") => Some(Self::Deflate),
            () => None,
        }
    }

    pub(super) fn reader<'a>(self, compressed: &'a [u8]) -> Box<dyn Read + 'a> {
        match self {
            Self::Gzip => Box::new(MultiGzDecoder::new(compressed)),
            // RFC 1950, 2.2: the method, and a sum that 31 divides.
            Self::Deflate => match compressed {
                [head, more, ..] if head & 15 == 8 && u16::from_be_bytes([*head, *more]) % 31 == 0 => {
                    Box::new(ZlibDecoder::new(compressed))
                }
                _ => Box::new(DeflateDecoder::new(compressed)),
            },
        }
    }
}

/// Decompresses a body to at most `max` bytes.
pub(super) async fn decompress(
    coding: Coding,
    mut body: Body,
    budget: &BodyBudget,
    limits: &Limits,
    max: usize,
) -> Result<Body, FetchError> {
    let compressed = Bytes::from(std::mem::take(&mut body.bytes));
    let mut allowed = FREE_BYTES;
    loop {
        let (bytes, limit) = (compressed.clone(), allowed);
        let result = tokio::task::spawn_blocking(move || unpacked(coding, &bytes, limit)).await;
        match result.unwrap_or(Err(Rejection::Protocol)) {
            // Large ones one at a time, and only if they begin as a picture does.
            Err(Rejection::TooLarge) if allowed < max => {
                let start = unpacked_start(coding, &compressed).map_err(FetchError::of_url)?;
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
fn unpacked_start(coding: Coding, compressed: &[u8]) -> Result<[u8; MAGIC_BYTES], Rejection> {
    let mut start = [0; MAGIC_BYTES];
    coding.reader(compressed).read_exact(&mut start).map_err(|_| Rejection::Protocol)?;
    Ok(start)
}

fn unpacked(coding: Coding, compressed: &[u8], max: usize) -> Result<Vec<u8>, Rejection> {
    let mut bytes = Vec::new();
    let more = max as u64 + 1;
    coding.reader(compressed).take(more).read_to_end(&mut bytes).map_err(|_| Rejection::Protocol)?;
    if bytes.len() > max { Err(Rejection::TooLarge) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_asked_to_be_compressed_is_unpacked_up_to_a_limit() {
        use flate2::Compression;
        use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
        let bytes = [7; 1000];
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::best());
        let mut bare = DeflateEncoder::new(Vec::new(), Compression::best());
        for writer in [&mut gzip as &mut dyn std::io::Write, &mut zlib, &mut bare] {
            writer.write_all(&bytes).expect("memory");
        }
        for (name, compressed) in [
            ("gzip", gzip.finish().expect("memory")),
            ("Deflate", zlib.finish().expect("memory")),
            ("deflate", bare.finish().expect("memory")),
        ] {
            let coding = Coding::of(name.as_bytes()).expect("known");
            assert_eq!(unpacked(coding, &compressed, 1000), Ok(bytes.to_vec()), "{name}");
            assert_eq!(unpacked(coding, &compressed, 999), Err(Rejection::TooLarge), "{name}");
            // Only gzip says how long what is in it must be: of the others the picture's own format does.
            let cut = unpacked(coding, &compressed[..compressed.len() - 9], 1000);
            assert!(coding == Coding::Deflate || cut == Err(Rejection::Protocol), "{name}");
            assert_eq!(unpacked(coding, b"plain", 1000), Err(Rejection::Protocol), "{name}");
        }
        assert_eq!(Coding::of(b" X-Gzip"), Some(Coding::Gzip));
        assert_eq!(["br", "identity", ""].map(|name| Coding::of(name.as_bytes())), [None; 3]);
    }
}
