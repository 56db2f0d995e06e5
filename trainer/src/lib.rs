//! The trainer: learns from what the workers fetched, on as many devices as there are, and goes on when some of them
//! fail.
//!
//! It has five rooms, and `trial`, which takes a few steps to see how fast a device is. Each uses only those below it:
//! - `agent` offers this machine's devices to the coordinator (`link`), runs a rank `process` on each that is assigned,
//!   and stores their `logs`;
//! - `rank` is that process: it takes part in one generation after another, as its agent tells it in frames (`ipc`);
//! - `learn` is a run on one rank (`job`): the ranks connect (`membership`) and `agree` on a state; `train` is the loop
//!   in the order of the mathematics, with `alexnet`, `step` and `schedule`; `evaluate` measures a split; `records`,
//!   `history` and `checkpoint` are what is kept on the way, `export` the trained model; `control` is how other threads
//!   reach the training thread;
//! - `data` brings samples to the device: `plan` is their order, `requests` the batches of a rank, `blocks` reads the
//!   store, `jpeg` decodes, `augment` crops and jitters, `cache` keeps decoded images, as does
//!   `device_pixels` in the device's memory, from where `gather` cuts them; `loader` does all this ahead of the step
//!   into the queue of `prefetch`, `normalise` makes the network's input. Random numbers are functions of what
//!   they are for (`random`);
//! - `torch` is what libtorch has and `tch` does not bind: collectives (`group`, `reducer`), `device`, `autocast`,
//!   `optimizer`, `tensor`.

mod agent;
#[cfg(feature = "bench")]
#[path = "../../tests/bench/train/pieces.rs"]
pub mod bench;
mod data;
mod learn;
mod rank;
mod torch;
mod trial;

#[cfg(test)]
mod tests;

pub use agent::{CacheConfig, Config, RANK_ENVIRONMENT, describe, devices, metrics, problem, run};
pub use learn::step::reference_step;
pub use rank::run_rank;
pub use trial::{Trial, trials};
