//! What tests and benches share. It knows the contracts alone, so that every crate's tests can use it.
//!
//! - [`Cluster`]: real processes over one store, and the command line; [`process`]: what the kernel knows of them, and
//!   signals; [`net`]: machines with addresses of their own; [`FreeAddress`]: one that nobody takes in between;
//!   [`Wire`]: a network that can be cut;
//! - [`FaultyStore`]: a store that fails, loses answers, delays, damages and refuses as its [`Faults`] say; [`S3`]: any
//!   store behind S3's protocol, for processes;
//! - [`Authority`]: signs certificates; [`dataset`]: a dataset with its manifest, made by hand.

mod address;
mod authority;
mod cluster;
pub mod dataset;
mod faulty;
pub mod net;
pub mod process;
mod s3;
mod wire;

use std::path::Path;
use std::process::Command;

pub use address::FreeAddress;
pub use authority::{Authority, Pair};
pub use cluster::{Cluster, PATIENCE, binary, seconds_of_day};
pub use faulty::{Faults, FaultyStore, Injected, Rules};
pub use s3::{S3, s3_environment};
pub use wire::{Flow, Wire};

/// The repository's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("tests/support/ lies in the repository")
}

/// A program of the environment that `make pytorch` makes.
///
/// # Panics
/// If it is not there.
pub fn python(program: &str) -> Command {
    let path = root().join("target/tools/pytorch/bin").join(program);
    assert!(path.exists(), "{} is missing: make pytorch", path.display());
    Command::new(path)
}
