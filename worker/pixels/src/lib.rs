//! From JPEG or RGB to the picture that is stored: decoding, scaling, measuring, encoding.
//!
//! All loops over pixels of a worker are in this crate, which is optimised even where the worker is not.

mod colour;
mod exif;
mod frame;
mod jpeg;
mod markers;
mod measure;
mod resize;
mod scale;

pub use colour::{Colours, Conversions, ToSrgb, png_gamma};
pub use exif::orientation;
pub use frame::Frame;
pub use jpeg::{Codec, DecodeAs};
pub use measure::{Hasher, is_flat, moments};
pub use resize::{Picture, Pixels, Shrinker};
