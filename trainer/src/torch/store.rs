//! Where the ranks of a generation meet.

use std::ffi::c_void;
use std::net::TcpListener;
use std::os::fd::IntoRawFd;
use std::time::{Duration, Instant};

use super::error::{Error, Result};
use super::ffi::{self, c_string, check, milliseconds};

/// The meeting place of a generation's ranks: a small key-value server.
///
/// It is served by the agent of the lowest rank, and every rank connects to it to make its [`Group`].
#[derive(Debug)]
pub(crate) struct Store {
    pub(super) raw: *mut c_void,
    port: u16,
}

// SAFETY: c10d::TCPStore guards each operation with its own mutex, and its destructor only joins its server's thread.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Serves a new store on a free port of the address `host` alone, until it is dropped.
    pub(crate) fn serve(host: &str) -> Result<Self> {
        let other = |e: std::io::Error| Error::Other(format!("failed to listen on {host}: {e}"));
        let listener = TcpListener::bind((host, 0)).map_err(other)?;
        let port = listener.local_addr().map_err(other)?.port();
        let name = c_string(host)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `name` and `raw` outlive the call. The server owns the socket from here on, whatever comes of it.
        check(unsafe { ffi::c10d_store_serve(name.as_ptr(), port, listener.into_raw_fd(), &raw mut raw) })?;
        Ok(Self { raw, port })
    }

    /// Connects to the store that is served at `host`:`port`, trying until `timeout`, which is also that of every later
    /// answer.
    pub(crate) fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        let name = c_string(host)?;
        let began = Instant::now();
        let mut raw = std::ptr::null_mut();
        // SAFETY: `name` and `raw` outlive the call.
        check(unsafe { ffi::c10d_store_connect(name.as_ptr(), port, milliseconds(timeout), &raw mut raw) })
            .map_err(|error| error.timed(began, timeout))?;
        Ok(Self { raw, port })
    }

    /// The port it is served on.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim and is freed once; groups hold their own count of the C++ object.
        unsafe { ffi::c10d_store_free(self.raw) }
    }
}
