//! How pictures become stored ones.

use serde::{Deserialize, Serialize};

use super::Limits;

/// How fetched images become stored ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Resize {
    /// In pixels; what has it, `mode` says.
    pub size: u32,
    /// How an image is brought to `size`.
    pub mode: ResizeMode,
    /// How pixels are weighed.
    pub filter: Filter,
    /// Whether images that are too small are enlarged; false is img2dataset's `resize_only_if_bigger`, save that
    /// `cover` cuts out the centred square and `pad` pads all the same.
    pub upscale: bool,
    /// What stored images are.
    pub format: ImageFormat,
    /// JPEG quality of stored images, 1 to 100.
    pub quality: u8,
    /// How much of the colour JPEGs keep.
    pub chroma: Chroma,
    /// Whether JPEGs get Huffman tables of their own: some bytes fewer for some more work, and the same pixels.
    pub optimize: bool,
    /// Which images are encoded again.
    pub reencode: Reencode,
    /// What becomes of colours that are not sRGB.
    pub color: Color,
}

/// What becomes of pictures with a colour profile (ICC) or a gamma of their own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Color {
    /// They are converted to sRGB, for which everybody takes the numbers of a stored picture.
    #[default]
    Srgb,
    /// Their numbers stay, whatever they mean: so do img2dataset and torchvision.
    AsIs,
}

/// How an image is brought to its stored size. The ratio of its sides is always kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResizeMode {
    /// The shorter side is scaled to `size` and the centre cut out: a square of `size`. img2dataset's `center_crop`.
    #[default]
    Cover,
    /// The longer side is scaled to `size`. img2dataset's `keep_ratio_largest`.
    Fit,
    /// As `fit`, then centred on a white square of `size`. img2dataset's `border`.
    Pad,
    /// The shorter side is scaled to `size`. img2dataset's `keep_ratio`.
    KeepRatio,
    /// The size stays. img2dataset's `no`.
    None,
}

/// How pixels are weighed when an image is scaled. An image that is made smaller is seen whole by each of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// Lanczos' filter of three lobes, the sharpest. Much smaller images are made from JPEGs that were decoded at 1/2,
    /// 1/4 or 1/8 of their size.
    #[default]
    Lanczos3,
    /// The mean of what a pixel covers, as OpenCV's `INTER_AREA` and so img2dataset; enlarged as by `lanczos3`.
    Area,
    /// A triangle, as torchvision's `Resize` and Pillow's `BILINEAR`.
    Bilinear,
}

/// How much of the colour JPEGs keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Chroma {
    /// Half of it in both directions, as nearly all photos of the web.
    #[default]
    #[serde(rename = "4:2:0")]
    Halved,
    /// All of it.
    #[serde(rename = "4:4:4")]
    Full,
}

/// How stored images are encoded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// JPEG of `quality` and `chroma`.
    #[default]
    Jpg,
    /// PNG: without loss, some five times as large.
    Png,
}

/// Which images are encoded again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reencode {
    /// All, so that all have the same quality and none carries metadata.
    #[default]
    Always,
    /// Not those that already are as they would be stored (JPEGs in colour, upright, of the right size), which are
    /// stored byte for byte, whatever their quality and metadata. They are checked like all others. img2dataset's
    /// `skip_reencode`.
    Needed,
}

impl Default for Resize {
    fn default() -> Self {
        Self {
            size: 256,
            mode: ResizeMode::Cover,
            filter: Filter::Lanczos3,
            upscale: true,
            format: ImageFormat::Jpg,
            quality: 95,
            chroma: Chroma::Halved,
            optimize: false,
            reencode: Reencode::Always,
            color: Color::Srgb,
        }
    }
}

impl Resize {
    /// Neither side of a stored image has fewer pixels than this, given what `limits` let through.
    pub fn smallest_side(&self, limits: &Limits) -> u32 {
        let Self { size, mode, upscale, .. } = *self;
        // The shorter side of an image whose longer one has `size` pixels.
        let across = ((f64::from(size) / limits.max_aspect) as u32).max(1);
        match (mode, upscale) {
            (ResizeMode::Cover | ResizeMode::KeepRatio, true) | (ResizeMode::Pad, _) => size,
            (ResizeMode::Cover | ResizeMode::KeepRatio, false) => size.min(limits.min_side.max(1)),
            (ResizeMode::Fit, true) => across,
            (ResizeMode::Fit, false) => across.min(limits.min_side.max(1)),
            (ResizeMode::None, _) => limits.min_side.max(1),
        }
    }
}

impl ImageFormat {
    /// The ending of a file's name.
    pub fn ending(self) -> &'static str {
        match self {
            ImageFormat::Jpg => "jpg",
            ImageFormat::Png => "png",
        }
    }

    /// By a file's first bytes; whatever is no PNG is taken for a JPEG.
    pub fn of(image: &[u8]) -> Self {
        if image.starts_with(b"\x89PNG\r\n\x1a\n") { ImageFormat::Png } else { ImageFormat::Jpg }
    }
}
