//! What the first bytes of a body say of its format.

use image::ImageFormat as Format;

/// So many of its first bytes tell [`format_of`] what a body is.
pub(crate) const MAGIC_BYTES: usize = 16;

/// The format of a body, if it is one that can be decoded.
pub(crate) fn format_of(bytes: &[u8]) -> Option<Format> {
    use Format::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    image::guess_format(bytes).ok().filter(|format| matches!(format, Jpeg | Png | Gif | Bmp | Tiff | WebP))
}

/// Whether a RIFF file is shorter than it says. A last byte of padding may be missing.
pub(crate) fn is_cut_riff(bytes: &[u8]) -> bool {
    let length = bytes.get(4..8).and_then(|four| <[u8; 4]>::try_from(four).ok()).map_or(0, u32::from_le_bytes);
    (bytes.len() as u64) < (u64::from(length) + 8).saturating_sub(1)
}

/// Whether no frame of a WebP is larger than the picture: the decoder finds out only when it has decoded it.
pub(crate) fn webp_fits(bytes: &[u8], (width, height): (u32, u32)) -> bool {
    let fits = |frame: (u32, u32)| frame.0 <= width && frame.1 <= height;
    let mut at = 12;
    while let Some(&[a, b, c, d, length @ ..]) = bytes.get(at..at + 8).and_then(|head| <&[u8; 8]>::try_from(head).ok())
    {
        let length = u32::from_le_bytes(length) as usize;
        let body = bytes.get(at + 8..).unwrap_or_default();
        let word = |at: usize| body.get(at..at + 2).map_or(0, |two| u32::from(u16::from_le_bytes([two[0], two[1]])));
        match &[a, b, c, d] {
            // RFC 6386, 9.1: 14 bits each behind a tag and a start code.
            b"VP8 " if !fits((word(6) & 0x3fff, word(8) & 0x3fff)) => return false,
            // The lossless format's specification: 14 bits each, less one, behind a signature of one byte.
            b"VP8L" => {
                let bits = word(1) | word(3) << 16;
                if !fits(((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1)) {
                    return false;
                }
            }
            // A frame of an animation: chunks of its own behind 16 bytes.
            b"ANMF" => {
                at += 24;
                continue;
            }
            _ => {}
        }
        at = at.saturating_add(8 + length + length % 2);
    }
    true
}
