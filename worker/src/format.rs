//! What the first bytes of a body say of its format.

use image::ImageFormat as Format;

/// So many of its first bytes tell [`format_of`] what a body is.
pub(crate) const MAGIC_BYTES: usize = 16;

/// The format of a body, if it is one that can be decoded.
pub(crate) fn format_of(bytes: &[u8]) -> Option<Format> {
    use Format::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    image::guess_format(bytes).ok().filter(|format| matches!(format, Jpeg | Png | Gif | Bmp | Tiff | WebP))
}

/// The name of a format that pictures of the web have and that is not decoded here, if the body is in one.
pub(crate) fn unsupported(bytes: &[u8]) -> Option<&'static str> {
    // ISO/IEC 14496-12: the file's brand, a version, and the brands that it is compatible with.
    let brands = || {
        let length = bytes.get(..4).and_then(|four| <[u8; 4]>::try_from(four).ok()).map_or(0, u32::from_be_bytes);
        let end = bytes.len().min(length as usize);
        let others = bytes.get(16..end).unwrap_or_default().chunks_exact(4);
        bytes.get(8..12).into_iter().chain(others)
    };
    match bytes {
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => {
            let has = |known: &[&[u8]]| brands().any(|brand| known.contains(&brand));
            let heic: [&[u8]; 8] = [b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"];
            match has(&[b"avif", b"avis"]) {
                true => Some("avif"),
                false => has(&heic).then_some("heic"),
            }
        }
        [0xff, 0x0a, ..] | [0, 0, 0, 12, b'J', b'X', b'L', b' ', 13, 10, 0x87, 10, ..] => Some("jpeg-xl"),
        [0xff, 0x4f, 0xff, 0x51, ..] | [0, 0, 0, 12, b'j', b'P', b' ', b' ', 13, 10, 0x87, 10, ..] => Some("jpeg-2000"),
        _ => is_svg(bytes).then_some("svg"),
    }
}

/// Whether a text is an SVG, behind whatever XML allows before its first element.
fn is_svg(bytes: &[u8]) -> bool {
    let mut text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let behind =
        |text: &[u8], end: &[u8]| text.windows(end.len()).position(|part| part == end).map(|at| at + end.len());
    // A generator's comments may be long, and there may be several.
    for _ in 0..8 {
        text = text.trim_ascii_start();
        let end: &[u8] = match text {
            [b'<', b's', b'v', b'g', next, ..] => return matches!(next, b'>' | b':') || next.is_ascii_whitespace(),
            [b'<', b'?', ..] => b"?>",
            [b'<', b'!', b'-', b'-', ..] => b"-->",
            _ => return text.get(..13).is_some_and(|start| start.eq_ignore_ascii_case(b"<!doctype svg")),
        };
        let Some(at) = behind(text.get(..4 << 10).unwrap_or(text), end) else { return false };
        text = &text[at..];
    }
    false
}

/// Whether the last bytes of a picture are those with which its format ends.
pub(crate) fn ends(bytes: &[u8]) -> bool {
    match format_of(bytes) {
        Some(Format::Jpeg) => bytes.ends_with(&[0xff, 0xd9]),
        Some(Format::Png) => bytes.ends_with(b"\0\0\0\0IEND\xae\x42\x60\x82"),
        Some(Format::Gif) => bytes.ends_with(&[0, b';']),
        Some(Format::WebP) => !is_cut_riff(bytes),
        _ => false,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_that_are_not_decoded_are_told_by_name_and_web_pages_are_none() {
        for (bytes, name) in [
            (&b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"[..], "heic"),
            (b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafavif", "avif"),
            (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "heic"),
            (b"\0\0\0\x20ftypavif\0\0\0\0", "avif"),
            (b"\xff\x0a\xfa\x1f", "jpeg-xl"),
            (b"\0\0\0\x0cJXL \r\n\x87\n", "jpeg-xl"),
            (b"\0\0\0\x0cjP  \r\n\x87\n", "jpeg-2000"),
            (b"\xff\x4f\xff\x51\0\x2f", "jpeg-2000"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg"),
            (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- Inkscape -->\n<svg\n", "svg"),
            (b"<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN'>", "svg"),
        ] {
            assert_eq!((unsupported(bytes), format_of(bytes)), (Some(name), None), "{}", bytes.escape_ascii());
        }
        for none in [
            &b""[..],
            b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
            b"\xff\xff\xff\xffftyp",
            b"<html><svg></svg></html>",
            b"<!doctype html><svg>",
            b"<!-- page --><body><svg>",
            b"<svgs>",
            b"<?xml version='1.0'",
            b"\xff\xd8\xff\xe0",
        ] {
            assert_eq!(unsupported(none), None, "{}", none.escape_ascii());
        }
    }
}
