//! A picture as a trained network is to see it: stored as that of any fetched body is, and read back. So a network
//! meets in its use what it has met in its training, JPEG's own rounding and all.

use anyhow::Context;
use proto::{ImageFormat, Limits, Reencode, Rejection, Resize};

use crate::placeholder::Placeholders;
use crate::thumbnail::Thumbnails;
use crate::validate::{Rules, Validator};

/// An upright picture: three bytes a pixel (red, green, blue), row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels {
    /// 3 x width x height bytes.
    pub values: Vec<u8>,
    /// In pixels.
    pub width: usize,
    /// In pixels.
    pub height: usize,
}

/// Prepares one picture after another.
#[derive(Debug)]
pub struct Preparer {
    validator: Validator,
    decoder: turbojpeg::Decompressor,
    rules: Rules,
}

impl Preparer {
    /// One for pictures that are stored as `resize` says; small, odd and flat ones are let through.
    ///
    /// # Errors
    /// If libjpeg-turbo cannot be had.
    pub fn new(resize: Resize) -> anyhow::Result<Self> {
        let limits = Limits { min_bytes: 0, min_side: 1, max_aspect: f64::INFINITY, ..Limits::default() };
        // What is stored already is not encoded once more.
        let resize = Resize { reencode: Reencode::Needed, ..resize };
        let rules = Rules {
            resize,
            limits,
            placeholders: Placeholders::default(),
            verify: None,
            flat: true,
            thumbnails: Thumbnails::none(),
        };
        let decoder = turbojpeg::Decompressor::new().context("libjpeg-turbo")?;
        Ok(Self { validator: Validator::new()?, decoder, rules })
    }

    /// The picture in `bytes`, in any format that workers read.
    ///
    /// # Errors
    /// Why a worker would not store it.
    pub fn prepare(&mut self, bytes: &[u8]) -> Result<Pixels, Rejection> {
        let stored = self.validator.validate(bytes, &self.rules).outcome?.image;
        let undecodable = |_| Rejection::Undecodable;
        if self.rules.resize.format == ImageFormat::Png {
            let image = image::load_from_memory(&stored).map_err(|_| Rejection::Undecodable)?.into_rgb8();
            let (width, height) = (image.width() as usize, image.height() as usize);
            return Ok(Pixels { values: image.into_raw(), width, height });
        }
        let header = self.decoder.read_header(&stored).map_err(undecodable)?;
        let (width, height) = (header.width, header.height);
        let mut values = vec![0; 3 * width * height];
        let format = turbojpeg::PixelFormat::RGB;
        let image = turbojpeg::Image { pixels: &mut values[..], width, pitch: 3 * width, height, format };
        self.decoder.decompress(&stored, image).map_err(undecodable)?;
        Ok(Pixels { values, width, height })
    }
}
