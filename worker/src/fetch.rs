//! A URL to the bytes behind it, or the reason why not: under a total deadline, with the address of every request
//! checked, and with the bytes of all bodies together under a budget. Nothing here waits for a host's budget: that is
//! `hosts`' part. `files` opens those that are there already.

mod body;
mod client;
mod dns;
mod error;
mod files;
mod gzip;
mod net;
mod request;
mod retry;
mod sparse;
mod text;

pub(crate) use body::Body;
pub(crate) use client::{FetchConfig, Fetched, FetchedText, Fetcher};
pub use dns::NameServer;
pub(crate) use files::{Object, Roots, rows};
pub(crate) use net::AddressRules;
pub(crate) use request::{Request, ResponseInfo};
pub(crate) use retry::FetchError;
#[cfg(fuzzing)]
pub(crate) use sparse::fuzz_sparse;
pub(crate) use sparse::{End, LONGEST_PIECE, Sparse, groups};

#[cfg(test)]
pub(crate) mod tests;
