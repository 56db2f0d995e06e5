//! From JPEG or RGB to the picture that is stored: decoding, scaling, measuring, encoding.

mod colour;
mod exif;
mod frame;
mod jpeg;
mod markers;
mod measure;
mod resize;
mod scale;

pub(crate) use colour::{Colours, Conversions, ToSrgb, png_gamma};
pub(crate) use exif::orientation;
pub(crate) use frame::Frame;
pub(crate) use jpeg::{Codec, DecodeAs};
pub(crate) use measure::{Hasher, is_flat, moments};
pub(crate) use resize::{Picture, Pixels, Shrinker};
