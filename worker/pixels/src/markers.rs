//! The segments of a JPEG, read without decoding, and rid of what they say wrong beside the pixels.

use std::collections::BTreeMap;

use image::metadata::Orientation;

use super::colour::Colours;
use super::exif;

const APP0: u8 = 0xe0;
const APP1: u8 = 0xe1;
const APP2: u8 = 0xe2;
const APP14: u8 = 0xee;
const APP15: u8 = 0xef;
const COMMENT: u8 = 0xfe;
const START_OF_SCAN: u8 = 0xda;
const END_OF_IMAGE: u8 = 0xd9;

/// What the segments before the first scan say.
#[derive(Debug)]
pub(super) struct Markers {
    /// EXIF's.
    pub(super) orientation: Orientation,
    pub(super) several_scans: bool,
    pub(super) colours: Option<Colours>,
}

impl Markers {
    pub(super) fn read(bytes: &[u8]) -> Self {
        let mut orientation = Orientation::NoTransforms;
        // A profile may be larger than a segment: then it comes in numbered pieces.
        let (mut profile, mut pieces) = (BTreeMap::new(), 0);
        let (mut progressive, mut components, mut in_first_scan) = (false, None, None);
        for Segment { marker, body, .. } in Segments::of(bytes) {
            match marker {
                APP1 => {
                    let exif = body.strip_prefix(b"Exif\0\0").and_then(exif::orientation);
                    orientation = exif.unwrap_or(orientation);
                }
                APP2 => {
                    if let Some([number, of, piece @ ..]) = body.strip_prefix(b"ICC_PROFILE\0") {
                        profile.insert(*number, piece);
                        pieces = usize::from(*of);
                    }
                }
                START_OF_SCAN => in_first_scan = body.first(),
                _ if is_frame(marker) => {
                    progressive = matches!(marker & 3, 2);
                    components = body.get(5);
                }
                _ => {}
            }
        }
        let colours = !profile.is_empty() && profile.len() == pieces;
        let colours = colours.then(|| Colours::Profile(profile.into_values().flatten().copied().collect()));
        Self { orientation, several_scans: progressive || in_first_scan != components, colours }
    }
}

/// The same pictures without what has no bearing on pixels or contradicts itself: metadata, bytes between segments, and
/// numbers that do not exist, for which libjpeg takes the usual ones.
pub(super) fn repair(bytes: &[u8]) -> Vec<u8> {
    let frame = Segments::of(bytes).find(|segment| is_frame(segment.marker));
    let components = frame.and_then(|frame| frame.body.get(5)).copied().unwrap_or(0);
    let sequential = frame.is_some_and(|frame| matches!(frame.marker, 0xc0 | 0xc1));
    let mut repaired = bytes[..2].to_vec();
    let mut scans = bytes.len();
    for Segment { marker, start, body } in Segments::of(bytes) {
        let mut body = body.to_vec();
        match marker {
            START_OF_SCAN => scans = start,
            APP0 if body.starts_with(b"JFIF\0") && body.len() > 5 => body[5] = 1,
            APP14 if body.starts_with(b"Adobe") && body.len() > 11 => {
                let usual = if components == 4 { 2 } else { 1 };
                if body[11] != 0 {
                    body[11] = usual;
                }
            }
            APP0..=APP15 | COMMENT => continue,
            _ => {}
        }
        if marker != START_OF_SCAN {
            repaired.extend([0xff, marker]);
            repaired.extend((body.len() as u16 + 2).to_be_bytes());
            repaired.extend(body);
        }
    }
    let first_scan = repaired.len();
    repaired.extend(&bytes[scans..]);
    if sequential {
        let mut at = first_scan;
        while let Some(scan) = find(&repaired, at, START_OF_SCAN) {
            at = scan + 2;
            // Its length, the number of components, two bytes for each; then the first and last coefficient and their
            // bits.
            let coefficients = repaired.get(at + 2).map_or(0, |&components| at + 3 + 2 * usize::from(components));
            if let Some(values) = repaired.get_mut(coefficients..coefficients + 3) {
                values.copy_from_slice(&[0, 63, 0]);
            }
        }
    }
    repaired
}

/// Whether there is an end of the image, after the first scan if there is one; a thumbnail before that has its own.
pub(super) fn has_end(bytes: &[u8]) -> bool {
    let scan = Segments::of(bytes).find(|segment| segment.marker == START_OF_SCAN);
    find(bytes, scan.map_or(2, |scan| scan.start), END_OF_IMAGE).is_some()
}

/// Where this marker stands, from `start` on.
fn find(bytes: &[u8], start: usize, marker: u8) -> Option<usize> {
    let at = bytes.get(start..)?.windows(2).position(|two| two == [0xff, marker])?;
    Some(start + at)
}

/// Whether a marker begins a frame (T.81, table B.1): all from 0xc0 to 0xcf but the tables that stand among them.
fn is_frame(marker: u8) -> bool {
    matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc)
}

#[derive(Debug, Clone, Copy)]
struct Segment<'a> {
    marker: u8,
    /// Where the marker stands.
    start: usize,
    body: &'a [u8],
}

/// The segments of a file up to the header of its first scan. As libjpeg does, it passes over bytes between them.
struct Segments<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Segments<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 2 }
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    fn next(&mut self) -> Option<Segment<'a>> {
        loop {
            let start = self.at;
            let &[first, marker] = self.bytes.get(start..)?.first_chunk()?;
            if first != 0xff || matches!(marker, 0 | 0xff) {
                self.at += 1;
                continue;
            }
            // These have no body.
            if matches!(marker, 0x01 | 0xd0..=0xd8) {
                self.at += 2;
                continue;
            }
            if marker == END_OF_IMAGE {
                return None;
            }
            let length = usize::from(u16::from_be_bytes(*self.bytes.get(start + 2..)?.first_chunk()?));
            let body = self.bytes.get(start + 4..start + 2 + length)?;
            self.at = if marker == START_OF_SCAN { self.bytes.len() } else { start + 2 + length };
            return Some(Segment { marker, start, body });
        }
    }
}
