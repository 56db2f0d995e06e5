//! From JPEG or RGB to the picture that is stored: decoding, scaling, measuring, encoding.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod frame;
mod jpeg;
mod lanczos;
mod markers;
mod measure;
mod resize;

pub(crate) use frame::Frame;
pub(crate) use jpeg::{Codec, DecodeAs};
pub(crate) use measure::{Hasher, is_flat, moments};
pub(crate) use resize::{Picture, Pixels, Shrinker};
