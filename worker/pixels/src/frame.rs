//! What of an image is stored, and at which size: pure arithmetic.

use proto::{Filter, Rejection, Resize, ResizeMode};

/// JPEG's own limit is 65,535; libjpeg keeps a margin.
const MOST_SIDE: u32 = 65_500;

/// How an image becomes its stored form. All of it is meant upright.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Frame {
    /// The share of the width and of the height that is kept, cut out around the centre.
    pub kept: (f64, f64),
    /// What is kept is scaled to so many pixels.
    pub width: u32,
    /// Likewise.
    pub height: u32,
    /// The result is centred on a white square of this side.
    pub canvas: Option<u32>,
    /// It may be decoded so many times smaller: as many whole times as the result is smaller than its source, along the
    /// side where it is the largest. 1 with filters that others have, too, since these see every pixel.
    pub reduction: u32,
    /// By which it is scaled.
    pub filter: Filter,
}

impl Frame {
    /// For an image of `width` x `height` pixels.
    ///
    /// # Errors
    /// If the result would have more than `max_pixels`, or a side that no JPEG can have.
    pub fn new(resize: &Resize, (width, height): (u32, u32), max_pixels: u64) -> Result<Self, Rejection> {
        let Resize { size, mode, upscale, filter, .. } = *resize;
        let (shorter, longer) = (width.min(height), width.max(height));
        // The side that is to have `size` pixels, and those that it gets.
        let measured = if matches!(mode, ResizeMode::Fit | ResizeMode::Pad) { longer } else { shorter };
        let target = match mode {
            ResizeMode::None => measured,
            _ if upscale => size,
            _ => size.min(measured),
        };
        let (kept_width, kept_height) = if mode == ResizeMode::Cover { (shorter, shorter) } else { (width, height) };
        let scaled = |side: u32| match side == measured {
            true => u64::from(target),
            // Rounded to the nearest.
            false => (2 * u64::from(side) * u64::from(target) + u64::from(measured)) / (2 * u64::from(measured)),
        };
        let (new_width, new_height) = (scaled(kept_width).max(1), scaled(kept_height).max(1));
        if new_width * new_height > max_pixels.max(u64::from(size) * u64::from(size))
            || new_width.max(new_height) > u64::from(MOST_SIDE)
        {
            return Err(Rejection::TooManyPixels);
        }
        Ok(Self {
            kept: (f64::from(kept_width) / f64::from(width), f64::from(kept_height) / f64::from(height)),
            width: new_width as u32,
            height: new_height as u32,
            canvas: (mode == ResizeMode::Pad).then_some(size),
            reduction: match filter {
                Filter::Lanczos3 => (kept_width / new_width as u32).min(kept_height / new_height as u32),
                Filter::Area | Filter::Bilinear => 1,
            },
            filter,
        })
    }

    /// Width and height of the stored image.
    pub fn stored(&self) -> (u32, u32) {
        self.canvas.map_or((self.width, self.height), |side| (side, side))
    }

    /// Whether an image of this size is stored pixel by pixel.
    pub fn keeps(&self, size: (u32, u32)) -> bool {
        self.kept == (1.0, 1.0) && self.stored() == size && (self.width, self.height) == size
    }

    /// The same for an image that lies on its side.
    pub fn turned(self) -> Self {
        let (across, down) = self.kept;
        Self { kept: (down, across), width: self.height, height: self.width, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(mode: ResizeMode, upscale: bool, size: (u32, u32)) -> Frame {
        let resize = Resize { size: 100, mode, upscale, ..Resize::default() };
        Frame::new(&resize, size, 1_000_000).expect("within the limits")
    }

    #[test]
    fn each_mode_gives_the_size_that_img2dataset_gives() {
        use ResizeMode::{Cover, Fit, KeepRatio, None, Pad};
        for (mode, upscale, from, scaled, stored) in [
            (Cover, true, (400, 300), (100, 100), (100, 100)),
            (Cover, true, (80, 60), (100, 100), (100, 100)),
            (Cover, false, (80, 60), (60, 60), (60, 60)),
            (Cover, false, (400, 60), (60, 60), (60, 60)),
            (Fit, true, (400, 300), (100, 75), (100, 75)),
            (Fit, true, (30, 40), (75, 100), (75, 100)),
            (Fit, false, (30, 40), (30, 40), (30, 40)),
            (Pad, true, (400, 300), (100, 75), (100, 100)),
            (Pad, false, (30, 40), (30, 40), (100, 100)),
            (KeepRatio, true, (400, 300), (133, 100), (133, 100)),
            (KeepRatio, true, (30, 40), (100, 133), (100, 133)),
            (KeepRatio, false, (30, 40), (30, 40), (30, 40)),
            (KeepRatio, false, (500, 101), (495, 100), (495, 100)),
            (None, true, (401, 299), (401, 299), (401, 299)),
        ] {
            let frame = frame(mode, upscale, from);
            assert_eq!((frame.width, frame.height), scaled, "{mode:?} {upscale} {from:?}");
            assert_eq!(frame.stored(), stored, "{mode:?} {upscale} {from:?}");
        }
        assert_eq!(frame(Cover, true, (400, 300)).kept, (0.75, 1.0));
        assert_eq!(frame(Cover, true, (400, 300)).reduction, 3);
        assert_eq!(frame(Pad, true, (400, 300)).reduction, 4);
    }

    #[test]
    fn only_what_changes_nothing_keeps_an_image_as_it_is() {
        use ResizeMode::{Cover, KeepRatio, Pad};
        assert!(frame(Cover, true, (100, 100)).keeps((100, 100)));
        assert!(frame(KeepRatio, true, (100, 150)).keeps((100, 150)));
        assert!(!frame(Cover, true, (100, 150)).keeps((100, 150)));
        assert!(!frame(Pad, true, (100, 50)).keeps((100, 50)));
        assert!(frame(Cover, false, (60, 60)).keeps((60, 60)));
    }

    #[test]
    fn a_thin_image_is_not_blown_up_beyond_the_limits() {
        let resize = Resize { size: 1000, mode: ResizeMode::KeepRatio, ..Resize::default() };
        assert_eq!(Frame::new(&resize, (40_000, 20), 1_000_000), Err(Rejection::TooManyPixels));
        assert_eq!(Frame::new(&resize, (40_000, 20), u64::MAX), Err(Rejection::TooManyPixels));
    }
}
