//! The trainer: learns from what the workers fetched, on as many devices as there are, and goes on when some of them die.
//!
//! The life of a run, file by file:
//! - `agent` offers this machine's devices to the coordinator over one stream (`link`), and runs a rank `process` on each that is
//!   assigned; it keeps their `logs`;
//! - `rank` is that process: it takes part in one generation after the other, as its agent says over `ipc`;
//! - `job` is what it holds of its run: data, network, progress; here the ranks agree on a state;
//! - `plan` says which samples come in which order, `stream` reads them from the store, `batch` cuts what is looked at out of them (`jpeg`
//!   decodes), `cache` keeps them decoded, `loader` does all this ahead of the step (`ready` says how far), `normalise` makes numbers of bytes;
//! - `train` is the loop, in the order of the mathematics: `alexnet` the network, `step` loss and optimizer, `c10d` the collectives;
//! - `timing` says where the time of a step went; `evaluate` measures a split; `checkpoint` keeps the state and the trained model; `history` the ledger and the learning curve.
//!
//! Whatever is random comes from `random`, as a function of what it is for.

mod agent;
#[cfg(feature = "bench")]
pub mod bench;
mod data;
mod learn;
mod rank;
mod torch;

#[cfg(test)]
mod tests;

pub use agent::{CacheConfig, Config, RANK_ENVIRONMENT, describe, devices, metrics, run};
pub use learn::step::reference_step;
pub use rank::run_rank;
