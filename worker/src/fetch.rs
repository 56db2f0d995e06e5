//! One URL to the bytes behind it, or the reason why not: under a total deadline, with every hop's address checked, and with
//! the bytes of all bodies together under a budget. It stops where a redirect leads to another host: that host has a budget
//! of its own (see `hosts`).

mod body;
mod client;
mod dns;
mod error;
mod journey;
mod net;
mod opt_out;
mod retry;
mod unpack;

pub(crate) use body::Body;
pub(crate) use client::{FetchConfig, Fetcher};
pub use dns::NameServer;
pub(crate) use journey::{Journey, Step, Trace};
pub(crate) use net::AddressRules;

#[cfg(test)]
mod tests;
