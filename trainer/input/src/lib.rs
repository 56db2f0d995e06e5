//! From a stored picture to the numbers that a network sees: decoded, augmented, normalised; and the random numbers
//! that this and dropout draw. Knows nothing of libtorch.
//!
//! All loops over pixels, weights and units are in this crate, which is optimised even where the trainer is not.

pub mod augment;
pub mod color;
pub mod image;
mod jpeg;
pub mod normalise;
pub mod random;
