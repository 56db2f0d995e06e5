//! EXIF's orientation, as whatever integer it was written: the standard wants a short one, and not all programs do.

use image::metadata::Orientation;

/// The tag of the orientation (EXIF 3.0, 4.6.5.1).
const ORIENTATION: u16 = 0x112;

/// The orientation that EXIF says of the picture itself, not of a thumbnail in it.
pub fn orientation(exif: &[u8]) -> Option<Orientation> {
    let big_endian = match exif.first_chunk()? {
        b"MM\0*" => true,
        b"II*\0" => false,
        _ => return None,
    };
    let number = |at: usize, bytes: usize| {
        let bytes = exif.get(at..at.checked_add(bytes)?)?;
        let add = |sum: u32, byte: &u8| sum << 8 | u32::from(*byte);
        Some(if big_endian { bytes.iter().fold(0, add) } else { bytes.iter().rev().fold(0, add) })
    };
    let directory = number(4, 4)? as usize;
    let entries = number(directory, 2)? as usize;
    let places = (0..entries).map(|n| directory + 2 + n * 12);
    let entry = places.into_iter().find(|at| number(*at, 2) == Some(ORIENTATION.into()))?;
    let length = match number(entry + 2, 2)? {
        // Bytes, short and long ones, with a sign or without.
        1 | 6 => 1,
        3 | 8 => 2,
        4 | 9 => 4,
        _ => return None,
    };
    let value = number(entry + 8, length).filter(|_| number(entry + 4, 4) == Some(1))?;
    Orientation::from_exif(u8::try_from(value).ok()?)
}
