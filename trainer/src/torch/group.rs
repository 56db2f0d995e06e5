//! Collectives between the ranks of a generation.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::net::ToSocketAddrs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

use super::device::{Completion, Mark};
use super::error::{Error, Result};
use super::ffi::{self, c_string, check, milliseconds, pointer, pointers};
use super::store::Store;

/// Environment of every process that makes an NCCL group; to be set when it is spawned, since libtorch reads it at
/// will. With it libtorch's watchdog neither kills the process nor aborts a collective: ranks decide that.
pub(crate) const NCCL_ENVIRONMENT: [(&str, &str); 2] =
    [("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"), ("TORCH_NCCL_ENABLE_MONITORING", "0")];

/// A rank's part in a generation.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    /// This rank's number, from 0.
    pub rank: usize,
    /// How many ranks there are. One alone goes the same way as many, but that its gradients need no averaging.
    pub world: usize,
    /// The address of this machine at which its peers reach it.
    pub address: String,
    /// With [`Device::Cuda`] tensors of that device are reduced by NCCL; all others by gloo.
    pub device: Device,
    /// How long to wait for peers: all of them to come, and each collective to end.
    pub timeout: Duration,
}

/// One fixed membership of ranks, connected to each other.
#[derive(Debug)]
pub(crate) struct Group {
    pub(super) raw: Arc<RawGroup>,
    aborted: Arc<AtomicBool>,
    pub(super) member: Member,
    one_thread: PhantomData<*const ()>,
}

#[derive(Debug)]
pub(super) struct RawGroup(pub(super) *mut c_void);

// SAFETY: it is made on a thread that then hands it over. Other threads reach it only through `Aborter`, which calls
// `abort`, and perhaps drops the last reference. Both backends' abort is made for calls from a watchdog's thread:
// gloo's takes each connection's lock, NCCL's the communicator's. The destructor joins the backend's own threads, from
// whichever thread it runs.
unsafe impl Send for RawGroup {}
// SAFETY: as above.
unsafe impl Sync for RawGroup {}

impl RawGroup {
    /// Blocks until all ranks have come, or until the timeout.
    fn connect(store: &Store, member: &Member) -> Result<Self> {
        let &Member { rank, world, ref address, device, timeout } = member;
        if rank >= world {
            return Err(Error::Other(format!("rank {rank} of {world}: ranks are numbered from 0")));
        }
        // gloo would otherwise find out by a failed assertion.
        (address.as_str(), 0).to_socket_addrs().map_err(|e| Error::Other(format!("address {address}: {e}")))?;
        let cuda = match device {
            Device::Cuda(_) if cfg!(not(feature = "nccl")) => {
                let message = "built without NCCL: run `make libtorch CUDA=1` and build with `--features nccl`";
                return Err(Error::Other(message.to_owned()));
            }
            Device::Cuda(index) => {
                for (name, value) in NCCL_ENVIRONMENT {
                    if std::env::var(name).as_deref() != Ok(value) {
                        return Err(Error::Other(format!("a process with NCCL must be started with {name}={value}")));
                    }
                }
                index as c_int
            }
            _ => -1,
        };
        let name = c_string(address)?;
        let began = Instant::now();
        let mut raw = std::ptr::null_mut();
        // SAFETY: `store`, `name` and `raw` outlive the call.
        check(unsafe {
            ffi::c10d_group_new(
                store.raw,
                rank as c_int,
                world as c_int,
                milliseconds(timeout),
                name.as_ptr(),
                cuda,
                &raw mut raw,
            )
        })
        .map_err(|error| error.timed(began, timeout))?;
        Ok(Self(raw))
    }
}

impl Drop for RawGroup {
    fn drop(&mut self) {
        // SAFETY: `self.0` came from the shim and is freed once; works and reducers hold their own count of the C++
        // object.
        unsafe { ffi::c10d_group_free(self.0) }
    }
}

/// How values of all ranks become one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    /// Their sum.
    Sum = 0,
    /// The largest one.
    Max = 1,
}

impl Group {
    /// Joins the generation whose store is served at `host`:`port`. Returns when all ranks have come, at the timeout,
    /// or soon after `cancelled` returns true: if the store's machine or a rank hangs, nothing else would end it before
    /// the timeout.
    pub(crate) fn join(host: &str, port: u16, member: Member, cancelled: impl Fn() -> bool) -> Result<Self> {
        let (done, joined) = std::sync::mpsc::channel();
        let (host, with) = (host.to_owned(), member.clone());
        // After a cancellation this thread goes on alone: it ends with its connections, or at its timeout, and drops
        // what it made.
        let join = move || {
            let _ =
                done.send(Store::connect(&host, port, with.timeout).and_then(|store| RawGroup::connect(&store, &with)));
        };
        std::thread::Builder::new().name("join".to_owned()).spawn(join).map_err(|e| Error::Other(e.to_string()))?;
        loop {
            match joined.recv_timeout(Duration::from_millis(20)) {
                Ok(raw) => return Ok(Self::of(raw?, member)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Other("the joining thread panicked".to_owned()));
                }
                Err(RecvTimeoutError::Timeout) if cancelled() => {
                    return Err(Error::Collective("cancelled while the ranks joined".to_owned()));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn of(raw: RawGroup, member: Member) -> Self {
        let aborted = Arc::new(AtomicBool::new(false));
        Self { raw: Arc::new(raw), aborted, member, one_thread: PhantomData }
    }

    /// Starts to replace `tensor` by the sum or maximum over all ranks, in place.
    pub(crate) fn all_reduce(&self, tensor: &Tensor, op: Op) -> Result<Work> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: group and tensor are alive, and the work keeps the tensor's memory until it is done.
        check(unsafe { ffi::c10d_all_reduce(self.raw.0, pointer(tensor), op as c_int, &raw mut raw) })?;
        Ok(Work { raw, one_thread: PhantomData })
    }

    /// Replaces all these tensors, in place, by those of rank `root`. Returns when they are here.
    pub(crate) fn broadcast(&self, tensors: &[Tensor], root: usize) -> Result<()> {
        let pointers = pointers(tensors);
        let began = Instant::now();
        // SAFETY: group, tensors and the list outlive the call, which waits for the collective.
        check(unsafe { ffi::c10d_broadcast(self.raw.0, pointers.as_ptr(), pointers.len(), root as c_int) })
            .map_err(|error| error.timed(began, self.member.timeout))?;
        self.completion().wait()
    }

    /// Waits until the device has done all that it was given.
    pub(crate) fn settle(&self) -> Result<()> {
        self.completion().wait()
    }

    /// Marks what the device was given up to now.
    pub(crate) fn mark(&self) -> Result<Mark> {
        self.completion().mark()
    }

    /// Waits until the device has come so far.
    pub(crate) fn until(&self, mark: &Mark) -> Result<()> {
        self.completion().until(mark)
    }

    /// How many ranks there are.
    pub(crate) fn world(&self) -> usize {
        self.member.world
    }

    /// What the ranks compute on.
    pub(crate) fn device(&self) -> Device {
        self.member.device
    }

    /// How long to wait for a collective.
    pub(crate) fn timeout(&self) -> Duration {
        self.member.timeout
    }

    /// A handle by which any thread can end this group.
    pub(crate) fn aborter(&self) -> Aborter {
        Aborter { group: Arc::downgrade(&self.raw), aborted: self.aborted.clone() }
    }

    pub(super) fn completion(&self) -> Completion {
        let &Member { device, timeout, world, .. } = &self.member;
        Completion { device, timeout, alone: world == 1, aborted: self.aborted.clone() }
    }
}

/// Ends a [`Group`] from any thread.
#[derive(Debug, Clone)]
pub(crate) struct Aborter {
    group: Weak<RawGroup>,
    aborted: Arc<AtomicBool>,
}

impl Aborter {
    /// Fails every collective in flight, here and at the peers, and every later one. With NCCL it may not return: call
    /// it on a thread of its own, and kill the process if that takes too long.
    pub(crate) fn abort(&self) -> Result<()> {
        self.aborted.store(true, Ordering::Relaxed);
        match self.group.upgrade() {
            // SAFETY: `group` keeps the object alive during the call; abort may run beside a collective (see
            // `RawGroup`).
            Some(group) => check(unsafe { ffi::c10d_group_abort(group.0) }),
            None => Ok(()),
        }
    }
}

/// A collective under way.
#[derive(Debug)]
#[must_use = "a collective counts only once it has been waited for"]
pub(crate) struct Work {
    raw: *mut c_void,
    one_thread: PhantomData<*const ()>,
}

impl Work {
    /// Waits until the result is in the tensor, at most `timeout`. For one on a GPU it only sees to it that what the
    /// device is given from now on comes after it.
    pub(crate) fn wait(self, timeout: Duration) -> Result<()> {
        let began = Instant::now();
        // SAFETY: `self` keeps the work alive.
        check(unsafe { ffi::c10d_work_wait(self.raw, milliseconds(timeout)) })
            .map_err(|error| error.timed(began, timeout))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim and is freed once; a backend that is still at it holds its own count.
        unsafe { ffi::c10d_work_free(self.raw) }
    }
}
