//! Collectives between ranks: libtorch's own c10d, the engine inside PyTorch's DistributedDataParallel, on `tch` tensors.
//!
//! A generation is one [`Group`], made over one [`Store`]. Its [`Reducer`] averages gradients while backward still runs; its small
//! all-reduces carry everything else. After any error a group is of no more use: [`Aborter::abort`] it, drop reducer and group, and make
//! the next generation's.
//!
//! NCCL or gloo is one branch in the making of a group (`shim.cc`); all code on this side is the same in both builds.
//!
//! **A group and what is made from it stay on one thread**: the order in which a rank starts its collectives must be that of all others.
//! Only its [`Aborter`] crosses threads.
#![allow(unsafe_code, reason = "tensors and c10d's objects cross into C++ here, and nowhere else")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

/// Environment of every process that makes an NCCL group; to be set when it is spawned, since libtorch reads it at will. With it
/// libtorch's watchdog neither kills the process nor aborts a collective: ranks decide that.
pub(crate) const NCCL_ENVIRONMENT: [(&str, &str); 2] =
    [("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"), ("TORCH_NCCL_ENABLE_MONITORING", "0")];

/// The first bucket is small, so that the first all-reduce starts early (PyTorch's default).
const FIRST_BUCKET_BYTES: i64 = 1 << 20;

/// Why a collective, or the making of a group, failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A peer did not answer in time.
    #[error("timed out: {0}")]
    Timeout(String),
    /// A peer is gone, or the group was aborted.
    #[error("collective failed: {0}")]
    Collective(String),
    /// Not the fault of a peer: the next generation would fail in the same way.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// c10d throws many types, and autograd hides them all; only the words tell a timeout.
    fn of_collective(message: String) -> Self {
        let timeout = ["imed out", "imeout"].iter().any(|words| message.contains(words));
        if timeout { Self::Timeout(message) } else { Self::Collective(message) }
    }
}

/// What a function of this module gives.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// The meeting place of a generation's ranks: a small key-value server.
///
/// It is served by the agent of the lowest rank, and every rank connects to it to make its [`Group`].
#[derive(Debug)]
pub(crate) struct Store {
    raw: *mut c_void,
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
        check(unsafe { c10d_store_serve(name.as_ptr(), port, listener.into_raw_fd(), &raw mut raw) })
            .map_err(Error::Other)?;
        Ok(Self { raw, port })
    }

    /// Connects to the store that is served at `host`:`port`, trying until `timeout`, which is also that of every later answer.
    pub(crate) fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        let name = c_string(host)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `name` and `raw` outlive the call.
        check(unsafe { c10d_store_connect(name.as_ptr(), port, milliseconds(timeout), &raw mut raw) })
            .map_err(Error::of_collective)?;
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
        unsafe { c10d_store_free(self.raw) }
    }
}

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
    raw: Arc<RawGroup>,
    aborted: Arc<AtomicBool>,
    member: Member,
    one_thread: PhantomData<*const ()>,
}

#[derive(Debug)]
struct RawGroup(*mut c_void);

// SAFETY: it is made on a thread that then hands it over. Other threads reach it only through `Aborter`, which calls `abort`, and perhaps
// drops the last reference. Both backends' abort is made for calls from a watchdog's thread: gloo's takes each connection's lock, NCCL's
// the communicator's. The destructor joins the backend's own threads, from whichever thread it runs.
unsafe impl Send for RawGroup {}
// SAFETY: as above.
unsafe impl Sync for RawGroup {}

impl RawGroup {
    /// Blocks until all ranks have come, or until the timeout.
    fn join(store: &Store, member: &Member) -> Result<Self> {
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
        let mut raw = std::ptr::null_mut();
        // SAFETY: `store`, `name` and `raw` outlive the call.
        check(unsafe {
            c10d_group_new(
                store.raw,
                rank as c_int,
                world as c_int,
                milliseconds(timeout),
                name.as_ptr(),
                cuda,
                &raw mut raw,
            )
        })
        .map_err(|message| {
            // What NCCL says of this machine, not of a peer.
            if message.contains("no GPUs found") { Error::Other(message) } else { Error::of_collective(message) }
        })?;
        Ok(Self(raw))
    }
}

impl Drop for RawGroup {
    fn drop(&mut self) {
        // SAFETY: `self.0` came from the shim and is freed once; works and reducers hold their own count of the C++ object.
        unsafe { c10d_group_free(self.0) }
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
    /// Joins the generation whose store is served at `host`:`port`. Returns when all ranks have come, at the timeout, or soon after
    /// `given_up` says so: whatever hangs there, be it the store's machine or a rank's, nothing but time would end it.
    pub(crate) fn meet(host: &str, port: u16, member: Member, given_up: impl Fn() -> bool) -> Result<Self> {
        let (done, met) = std::sync::mpsc::channel();
        let (host, with) = (host.to_owned(), member.clone());
        // If it is given up, this thread is left to itself: it ends when its connections do, or at its timeout, and drops what it made.
        let meet = move || {
            let _ =
                done.send(Store::connect(&host, port, with.timeout).and_then(|store| RawGroup::join(&store, &with)));
        };
        std::thread::Builder::new().name("meet".to_owned()).spawn(meet).map_err(|e| Error::Other(e.to_string()))?;
        loop {
            match met.recv_timeout(Duration::from_millis(20)) {
                Ok(raw) => return Ok(Self::of(raw?, member)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Other("the meeting thread panicked".to_owned()));
                }
                Err(RecvTimeoutError::Timeout) if given_up() => {
                    return Err(Error::Collective("given up while the ranks met".to_owned()));
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
        check(unsafe { c10d_all_reduce(self.raw.0, pointer(tensor), op as c_int, &raw mut raw) })
            .map_err(Error::of_collective)?;
        Ok(Work { raw, one_thread: PhantomData })
    }

    /// Replaces all these tensors, in place, by those of rank `root`. Returns when they are here.
    pub(crate) fn broadcast(&self, tensors: &[Tensor], root: usize) -> Result<()> {
        let pointers = pointers(tensors);
        // SAFETY: group, tensors and the list outlive the call, which waits for the collective.
        check(unsafe { c10d_broadcast(self.raw.0, pointers.as_ptr(), pointers.len(), root as c_int) })
            .map_err(Error::of_collective)?;
        self.completion().wait()
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

    fn completion(&self) -> Completion {
        Completion { device: self.member.device, timeout: self.member.timeout, aborted: self.aborted.clone() }
    }
}

/// Ends a [`Group`] from any thread.
#[derive(Debug, Clone)]
pub(crate) struct Aborter {
    group: Weak<RawGroup>,
    aborted: Arc<AtomicBool>,
}

impl Aborter {
    /// Fails every collective in flight, here and at the peers, and every later one. With NCCL it may not return: call it on a thread of
    /// its own, and kill the process if that takes too long.
    pub(crate) fn abort(&self) -> Result<()> {
        self.aborted.store(true, Ordering::Relaxed);
        match self.group.upgrade() {
            // SAFETY: `group` keeps the object alive during the call; abort may run beside a collective (see `RawGroup`).
            Some(group) => check(unsafe { c10d_group_abort(group.0) }).map_err(Error::Other),
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
    /// Waits until the result is in the tensor, at most `timeout`.
    pub(crate) fn wait(self, timeout: Duration) -> Result<()> {
        // SAFETY: `self` keeps the work alive.
        check(unsafe { c10d_work_wait(self.raw, milliseconds(timeout)) }).map_err(Error::of_collective)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim and is freed once; a backend that is still at it holds its own count.
        unsafe { c10d_work_free(self.raw) }
    }
}

/// Averages the gradients of all ranks, bucket by bucket, while backward still computes the next ones
/// (Li et al., "PyTorch Distributed", VLDB 2020).
#[derive(Debug)]
pub(crate) struct Reducer {
    raw: *mut c_void,
    completion: Completion,
    one_thread: PhantomData<*const ()>,
}

impl Reducer {
    /// For these parameters, which must be the same ones in the same order on all ranks; `bucket_bytes` of gradients travel together
    /// (PyTorch: 25 MiB), as smaller numbers if `compress` says so.
    ///
    /// The buckets take their final form, in the order in which gradients become ready, before the second backward. A rank alone has none.
    pub(crate) fn new(
        group: &Group,
        parameters: &[Tensor],
        bucket_bytes: usize,
        compress: Option<Half>,
    ) -> Result<Self> {
        let pointers = pointers(parameters);
        let mut raw = std::ptr::null_mut();
        // SAFETY: group, parameters and the list outlive the call; the reducer keeps its own counts of group and parameters.
        check(unsafe {
            c10d_reducer_new(
                group.raw.0,
                pointers.as_ptr(),
                pointers.len(),
                FIRST_BUCKET_BYTES,
                bucket_bytes as i64,
                code(compress),
                &raw mut raw,
            )
        })
        .map_err(Error::of_collective)?;
        Ok(Self { raw, completion: group.completion(), one_thread: PhantomData })
    }

    /// Begins a step: its gradients are added up from nothing.
    pub(crate) fn begin(&self) -> Result<()> {
        // SAFETY: `self` keeps the reducer alive.
        check(unsafe { c10d_reducer_begin(self.raw) }).map_err(Error::Other)
    }

    /// Adds the gradients of a part of the step's loss to those of this rank, without communication.
    pub(crate) fn accumulate(&self, loss: &Tensor) -> Result<()> {
        loss.f_backward().map_err(|e| Error::Other(e.to_string()))
    }

    /// Adds the gradients of `loss`, the last of a step, and replaces those of the parameters by their average over all ranks. Gives the
    /// time that passed after this rank's last gradient was computed: communication that nothing hid.
    ///
    /// **Ok means that every bucket has completed on this rank**, on GPUs too, where a collective's own wait only orders streams. After
    /// an error the gradients are worth nothing.
    pub(crate) fn backward(&self, loss: &Tensor) -> Result<Duration> {
        // SAFETY: `self` keeps the reducer alive.
        check(unsafe { c10d_reducer_prepare(self.raw) }).map_err(Error::of_collective)?;
        loss.f_backward().map_err(|e| Error::of_collective(e.to_string()))?;
        let mut ago = 0;
        self.completion.poll(|| self.ready(&mut ago))?;
        let began = Instant::now();
        self.completion.wait()?;
        Ok(Duration::from_nanos(ago.max(0) as u64) + began.elapsed())
    }

    fn ready(&self, ago: &mut i64) -> Result<bool> {
        let mut reached = 0;
        // SAFETY: `self` keeps the reducer alive, and both numbers outlive the call.
        check(unsafe { c10d_reducer_ready(self.raw, &raw mut reached, ago) }).map_err(Error::of_collective)?;
        Ok(reached != 0)
    }

    /// How many all-reduces one backward makes.
    #[cfg(test)]
    fn buckets(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: `self` keeps the reducer alive, and `count` outlives the call.
        check(unsafe { c10d_reducer_buckets(self.raw, &raw mut count) }).map_err(Error::Other)?;
        Ok(count)
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim and is freed once.
        unsafe { c10d_reducer_free(self.raw) }
    }
}

/// Waits until all that was put on a device's stream has been done. On the CPU nothing is ever left to wait for.
#[derive(Debug)]
struct Completion {
    device: Device,
    timeout: Duration,
    aborted: Arc<AtomicBool>,
}

/// In tests: what a device answers when it is asked whether it has finished, to ranks on this thread.
#[cfg(test)]
pub(crate) type Fake = Box<dyn FnMut() -> Result<bool> + Send>;

#[cfg(test)]
thread_local! {
    pub(crate) static FAKE: std::cell::RefCell<Option<Fake>> = const { std::cell::RefCell::new(None) };
}

impl Completion {
    fn wait(&self) -> Result<()> {
        #[cfg(test)]
        if let Some(result) = FAKE.with_borrow_mut(|fake| fake.as_mut().map(|fake| self.poll(fake))) {
            return result;
        }
        match self.device {
            Device::Cuda(index) => {
                let event = Event::record(index)?;
                self.poll(|| event.reached())
            }
            _ => Ok(()),
        }
    }

    /// Asks again and again: a stream that waits for a dead peer never says so by itself.
    fn poll(&self, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !done()? {
            if self.aborted.load(Ordering::Relaxed) {
                return Err(Error::Collective("aborted".to_owned()));
            }
            if start.elapsed() > self.timeout {
                return Err(Error::Timeout(format!("the device has not finished after {:?}", self.timeout)));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        // An aborted collective ends too, with half a result.
        if self.aborted.load(Ordering::Relaxed) {
            return Err(Error::Collective("aborted".to_owned()));
        }
        Ok(())
    }
}

struct Event(*mut c_void);

impl Event {
    fn record(cuda: usize) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call.
        check(unsafe { c10d_event_record(cuda as c_int, &raw mut raw) }).map_err(Error::Other)?;
        Ok(Self(raw))
    }

    fn reached(&self) -> Result<bool> {
        let mut reached = 0;
        // SAFETY: `self` keeps the event alive, and `reached` outlives the call.
        check(unsafe { c10d_event_reached(self.0, &raw mut reached) }).map_err(Error::of_collective)?;
        Ok(reached != 0)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the shim and is freed once.
        unsafe { c10d_event_free(self.0) }
    }
}

/// Numbers of 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// IEEE's: 11 significant bits, up to 65504.
    Fp16 = 1,
    /// 8 significant bits, the range of f32.
    Bf16 = 2,
}

fn code(half: Option<Half>) -> c_int {
    half.map_or(0, |half| half as c_int)
}

/// What `work` computes on this thread is computed in smaller numbers where that does little harm (convolutions, matrix products), as
/// PyTorch's autocast has it.
pub(crate) fn autocast<T>(device: Device, kind: Half, work: impl FnOnce() -> T) -> Result<T> {
    struct Off(c_int);
    impl Drop for Off {
        fn drop(&mut self) {
            // SAFETY: takes no pointers. It cannot fail for a device for which it was just turned on.
            let _ = check(unsafe { c10d_autocast(self.0, 0) });
        }
    }
    let cuda = c_int::from(device.is_cuda());
    // SAFETY: takes no pointers.
    check(unsafe { c10d_autocast(cuda, kind as c_int) }).map_err(Error::Other)?;
    let _off = Off(cuda);
    Ok(work())
}

/// One step of SGD with momentum on all parameters in one kernel, as `torch.optim.SGD` counts:
/// m = `momentum` m + (g + `weight_decay` p), p = p - `learning_rate` m. The three lists must be of the same length.
pub(crate) fn fused_sgd(
    parameters: &[Tensor],
    gradients: &[Tensor],
    momenta: &[Tensor],
    learning_rate: f64,
    momentum: f64,
    weight_decay: f64,
) -> Result<()> {
    assert!(parameters.len() == gradients.len() && parameters.len() == momenta.len(), "lists of unequal length");
    let (p, g, m) = (pointers(parameters), pointers(gradients), pointers(momenta));
    // SAFETY: tensors and lists outlive the call, and the lists are of the length that is given.
    check(unsafe { c10d_fused_sgd(p.as_ptr(), g.as_ptr(), m.as_ptr(), p.len(), learning_rate, momentum, weight_decay) })
        .map_err(Error::Other)
}

fn pointer(tensor: &Tensor) -> *const c_void {
    tensor.as_ptr().cast()
}

fn pointers(tensors: &[Tensor]) -> Vec<*const c_void> {
    tensors.iter().map(pointer).collect()
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Other(format!("{text:?} has a zero byte")))
}

/// At least one: c10d takes 0 for no limit.
fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX).max(1)
}

fn check(message: *mut c_char) -> std::result::Result<(), String> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim gives a string that ends in zero, and it is freed once, after it was copied.
    unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        c10d_free_message(message);
        Err(text)
    }
}

// c10d/shim.h says what each does.
unsafe extern "C" {
    fn c10d_free_message(message: *mut c_char);
    fn c10d_store_serve(host: *const c_char, port: u16, listener: c_int, out: *mut *mut c_void) -> *mut c_char;
    fn c10d_store_connect(host: *const c_char, port: u16, timeout: i64, out: *mut *mut c_void) -> *mut c_char;
    fn c10d_store_free(store: *mut c_void);
    fn c10d_group_new(
        store: *mut c_void,
        rank: c_int,
        world: c_int,
        timeout: i64,
        address: *const c_char,
        cuda: c_int,
        out: *mut *mut c_void,
    ) -> *mut c_char;
    fn c10d_group_abort(group: *mut c_void) -> *mut c_char;
    fn c10d_group_free(group: *mut c_void);
    fn c10d_all_reduce(group: *mut c_void, tensor: *const c_void, op: c_int, out: *mut *mut c_void) -> *mut c_char;
    fn c10d_broadcast(group: *mut c_void, tensors: *const *const c_void, count: usize, root: c_int) -> *mut c_char;
    fn c10d_work_wait(work: *mut c_void, timeout: i64) -> *mut c_char;
    fn c10d_work_free(work: *mut c_void);
    fn c10d_reducer_new(
        group: *mut c_void,
        parameters: *const *const c_void,
        count: usize,
        first_bucket_bytes: i64,
        bucket_bytes: i64,
        compress: c_int,
        out: *mut *mut c_void,
    ) -> *mut c_char;
    fn c10d_reducer_begin(reducer: *mut c_void) -> *mut c_char;
    fn c10d_reducer_prepare(reducer: *mut c_void) -> *mut c_char;
    fn c10d_reducer_ready(reducer: *mut c_void, reached: *mut c_int, ago_ns: *mut i64) -> *mut c_char;
    fn c10d_autocast(cuda: c_int, kind: c_int) -> *mut c_char;
    #[cfg(test)]
    fn c10d_reducer_buckets(reducer: *mut c_void, out: *mut usize) -> *mut c_char;
    fn c10d_reducer_free(reducer: *mut c_void);
    fn c10d_event_record(cuda: c_int, out: *mut *mut c_void) -> *mut c_char;
    fn c10d_event_reached(event: *mut c_void, out: *mut c_int) -> *mut c_char;
    fn c10d_event_free(event: *mut c_void);
    fn c10d_fused_sgd(
        parameters: *const *const c_void,
        gradients: *const *const c_void,
        momenta: *const *const c_void,
        count: usize,
        learning_rate: f64,
        momentum: f64,
        weight_decay: f64,
    ) -> *mut c_char;
}

#[cfg(test)]
mod tests;
