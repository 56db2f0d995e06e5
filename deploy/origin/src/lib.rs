//! The demo's web origin, which the tests use as well: pictures of 20 classes, served through a list that is rotted as
//! those of ImageNet are.

mod answer;
mod bodies;
pub mod list;
pub mod origin;
pub mod pictures;
pub mod rot;
