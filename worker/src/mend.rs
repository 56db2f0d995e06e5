//! Pictures that browsers show although their files are not as they should be: the same pictures without what is wrong
//! beside their pixels. What a JPEG needs is in `worker/pixels`.

use std::borrow::Cow;

const PNG_SIGNATURE: usize = 8;
const PNG_END: &[u8] = b"\0\0\0\0IEND\xae\x42\x60\x82";

/// A PNG of those chunks alone that its pixels need, as far as they are there, and with an end. None: it would be the
/// same. Whether all of the pixels are there, the decoder says.
pub(crate) fn png(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut mended = bytes.get(..PNG_SIGNATURE)?.to_vec();
    let mut rest = &bytes[PNG_SIGNATURE..];
    while let Some((head, body)) = rest.split_first_chunk::<8>() {
        let (length, kind) = (u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize, &head[4..]);
        match kind {
            b"IEND" => break,
            b"IHDR" | b"PLTE" | b"tRNS" | b"IDAT" | b"eXIf" if body.len() >= length + 4 => {
                mended.extend_from_slice(&rest[..length + 12]);
            }
            b"IDAT" => {
                let there = &body[..body.len().min(length)];
                mended.extend((there.len() as u32).to_be_bytes());
                mended.extend_from_slice(b"IDAT");
                mended.extend_from_slice(there);
                let mut crc = flate2::Crc::new();
                crc.update(b"IDAT");
                crc.update(there);
                mended.extend(crc.sum().to_be_bytes());
            }
            _ => {}
        }
        rest = rest.get(length + 12..).unwrap_or_default();
    }
    mended.extend_from_slice(PNG_END);
    (mended != bytes).then_some(mended)
}

/// A GIF whose canvas holds its first frame: some say that they have none, and others one that is too small.
pub(crate) fn gif(bytes: &[u8]) -> Cow<'_, [u8]> {
    gif_canvas(bytes).map_or(Cow::Borrowed(bytes), |[width, height]| {
        let mut mended = bytes.to_vec();
        mended[6..8].copy_from_slice(&width.to_le_bytes());
        mended[8..10].copy_from_slice(&height.to_le_bytes());
        Cow::Owned(mended)
    })
}

/// The canvas that holds the first frame, if the file says another.
fn gif_canvas(bytes: &[u8]) -> Option<[u16; 2]> {
    let word = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let table = |flags: u8| if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) };
    let mut at = 13 + table(*bytes.get(10)?);
    // Extensions before the first frame: a label, then blocks with their lengths, the last of which is empty.
    while *bytes.get(at)? == 0x21 {
        at += 2;
        while *bytes.get(at)? != 0 {
            at += 1 + usize::from(bytes[at]);
        }
        at += 1;
    }
    if bytes[at] != 0x2c {
        return None;
    }
    let said = [word(6)?, word(8)?];
    let needed = [word(at + 1)?.saturating_add(word(at + 5)?), word(at + 3)?.saturating_add(word(at + 7)?)];
    let canvas = [said[0].max(needed[0]), said[1].max(needed[1])];
    (canvas != said).then_some(canvas)
}
