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
mod opt_out;
mod request;
mod retry;

pub(crate) use body::Body;
pub(crate) use client::{FetchConfig, Fetched, Fetcher};
pub use dns::NameServer;
pub(crate) use files::{Roots, rows};
pub(crate) use net::AddressRules;
pub(crate) use request::{Request, ResponseInfo};

#[cfg(test)]
pub(crate) mod tests;
