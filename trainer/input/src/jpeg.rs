//! JPEGs to pixels: whole, or only the part that is looked at.
#![allow(unsafe_code, reason = "the crate turbojpeg does not bind libjpeg-turbo's partial decoding")]

use std::ffi::{CStr, c_int};

use anyhow::{Result, bail, ensure};
use turbojpeg::raw;

/// A rectangle of pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Area {
    pub left: usize,
    pub top: usize,
    pub width: usize,
    pub height: usize,
}

/// Decodes JPEGs on one thread, with memory that it keeps.
#[derive(Debug)]
pub(crate) struct Decoder {
    handle: raw::tjhandle,
}

// SAFETY: a TurboJPEG instance has no thread of its own and may be used by one thread after the other.
unsafe impl Send for Decoder {}

impl Drop for Decoder {
    fn drop(&mut self) {
        // SAFETY: the handle is this one's own, and freed once.
        unsafe { raw::tj3Destroy(self.handle) }
    }
}

impl Decoder {
    /// A decoder.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: takes no pointers.
        let handle = unsafe { raw::tj3Init(raw::TJINIT_TJINIT_DECOMPRESS as c_int) };
        ensure!(!handle.is_null(), "TurboJPEG cannot be initialised");
        Ok(Self { handle })
    }

    /// Replaces `pixels` by rows of red, green, blue: at least those of the area that `wanted` chooses, given width and
    /// height of the image. Gives these two, and which part of the image the pixels are; they are exactly those that
    /// the whole image has there.
    pub(crate) fn decode(
        &mut self,
        jpeg: &[u8],
        wanted: impl FnOnce(usize, usize) -> Result<Area>,
        pixels: &mut Vec<u8>,
    ) -> Result<((usize, usize), Area)> {
        // SAFETY: the slice outlives the call.
        self.check(unsafe { raw::tj3DecompressHeader(self.handle, jpeg.as_ptr(), jpeg.len() as raw::size_t) })?;
        let (width, height) = (self.get(raw::TJPARAM_TJPARAM_JPEGWIDTH), self.get(raw::TJPARAM_TJPARAM_JPEGHEIGHT));
        let wanted = wanted(width, height)?;
        let inside = wanted.left + wanted.width <= width && wanted.top + wanted.height <= height;
        ensure!(inside && wanted.width > 0 && wanted.height > 0, "{wanted:?} is not within {width} x {height} pixels");
        let subsampling = self.get(raw::TJPARAM_TJPARAM_SUBSAMP);
        let mcu = match subsampling as i32 {
            raw::TJSAMP_TJSAMP_444 | raw::TJSAMP_TJSAMP_GRAY | raw::TJSAMP_TJSAMP_440 => 8,
            raw::TJSAMP_TJSAMP_422 | raw::TJSAMP_TJSAMP_420 => 16,
            raw::TJSAMP_TJSAMP_411 => 32,
            _ => width,
        };
        // Colours are interpolated from neighbours, which must be there for the pixels at the border to be those of the
        // whole image.
        let part = |from: usize, size: usize, end: usize, step: usize| {
            let start = from.saturating_sub(MARGIN) / step * step;
            (start, (from + size + MARGIN).next_multiple_of(step).min(end) - start)
        };
        let (left, columns) = part(wanted.left, wanted.width, width, mcu);
        let (top, rows) = part(wanted.top, wanted.height, height, 1);
        let decoded = Area { left, top, width: columns, height: rows };
        let whole = (columns, rows) == (width, height);
        let region = match whole {
            true => raw::tjregion { x: 0, y: 0, w: 0, h: 0 },
            false => raw::tjregion { x: left as c_int, y: top as c_int, w: columns as c_int, h: rows as c_int },
        };
        pixels.resize(3 * columns * rows, 0);
        // SAFETY: takes no pointers but the handle.
        self.check(unsafe { raw::tj3SetCroppingRegion(self.handle, region) })?;
        // SAFETY: both slices outlive the call, which writes `rows` rows of `columns` pixels of three bytes, as this
        // JPEG's header says.
        self.check(unsafe {
            raw::tj3Decompress8(
                self.handle,
                jpeg.as_ptr(),
                jpeg.len() as raw::size_t,
                pixels.as_mut_ptr(),
                3 * columns as c_int,
                raw::TJPF_TJPF_RGB,
            )
        })?;
        Ok(((width, height), decoded))
    }

    fn get(&self, parameter: raw::TJPARAM) -> usize {
        // SAFETY: takes no pointers but the handle.
        unsafe { raw::tj3Get(self.handle, parameter as c_int) }.max(0) as usize
    }

    fn check(&self, result: c_int) -> Result<()> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: the handle is alive, and its message ends in zero.
        bail!("{}", unsafe { CStr::from_ptr(raw::tj3GetErrorStr(self.handle)) }.to_string_lossy())
    }
}

/// Pixels beyond the wanted ones on each side, from which the colours of those at the border come.
const MARGIN: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use turbojpeg::Subsamp;

    #[test]
    fn a_part_has_the_pixels_of_the_whole() {
        let (width, height) = (101, 77);
        let noise = crate::random::key(&[1]);
        let values: Vec<u8> = (0..3 * width * height)
            .map(|i| (crate::random::below(noise, i as u64 / 30, 200) + i as u64 % 50) as u8)
            .collect();
        let image = turbojpeg::Image {
            pixels: &values[..],
            width,
            pitch: 3 * width,
            height,
            format: turbojpeg::PixelFormat::RGB,
        };
        for subsampling in [Subsamp::Sub2x2, Subsamp::None, Subsamp::Sub2x1, Subsamp::Sub1x2, Subsamp::Gray] {
            let jpeg = turbojpeg::compress(image, 85, subsampling).expect("an image");
            let whole = turbojpeg::decompress(&jpeg, turbojpeg::PixelFormat::RGB).expect("a JPEG").pixels;
            let mut decoder = Decoder::new().expect("memory");
            let mut pixels = Vec::new();
            for i in 0..200 {
                let draw = |n, below| crate::random::below(crate::random::key(&[2, i]), n, below as u64) as usize;
                let (left, top) = (draw(0, width), draw(1, height));
                let wanted = Area { left, top, width: 1 + draw(2, width - left), height: 1 + draw(3, height - top) };
                let (size, got) = decoder.decode(&jpeg, |_, _| Ok(wanted), &mut pixels).expect("a JPEG");
                assert_eq!(size, (width, height));
                for y in wanted.top..wanted.top + wanted.height {
                    let row = |area: Area| 3 * ((y - area.top) * area.width + wanted.left - area.left);
                    let part = &pixels[row(got)..][..3 * wanted.width];
                    let all = Area { left: 0, top: 0, width, height };
                    assert_eq!(part, &whole[row(all)..][..3 * wanted.width], "{subsampling:?} {wanted:?} row {y}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_jpeg_or_outside_of_it_is_refused() {
        let mut decoder = Decoder::new().expect("memory");
        let all = |width, height| Ok(Area { left: 0, top: 0, width, height });
        let mut pixels = Vec::new();
        assert!(decoder.decode(b"<html>", all, &mut pixels).is_err());
        let format = turbojpeg::PixelFormat::GRAY;
        let grey = turbojpeg::Image { pixels: &[9_u8; 64][..], width: 8, pitch: 8, height: 8, format };
        let jpeg = turbojpeg::compress(grey, 90, Subsamp::Gray).expect("an image");
        let outside = |_, _| Ok(Area { left: 4, top: 0, width: 5, height: 8 });
        assert!(decoder.decode(&jpeg, outside, &mut pixels).is_err());
        assert_eq!(decoder.decode(&jpeg, all, &mut pixels).expect("all of it").0, (8, 8));
        assert!(pixels.len() == 192 && pixels.iter().all(|&value| value.abs_diff(9) < 3));
    }
}
