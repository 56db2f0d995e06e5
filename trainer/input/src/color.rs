//! What becomes of a sample's colors.

/// The weights of red, green and blue in the grey of a pixel (ITU-R BT.601, as in Pillow and torchvision).
pub const GREY: [f32; 3] = [0.299, 0.587, 0.114];

/// The color jitter of a sample, whose channels are 0 to 1: each channel x becomes `gain` x + `grey` g + `offset`,
/// clamped to 0 to 1, where g is the pixel's grey. Brightness, contrast and saturation one after the other are one such
/// map.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ColorJitter {
    /// Of the channel itself.
    pub gain: f32,
    /// Of the pixel's grey.
    pub grey: f32,
    /// The same for all pixels.
    pub offset: f32,
}

impl Default for ColorJitter {
    /// No change.
    fn default() -> Self {
        Self { gain: 1.0, grey: 0.0, offset: 0.0 }
    }
}
