//! Gradients, averaged over ranks while backward still runs.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use tch::Tensor;

use super::autocast::{Half, code};
use super::device::{Completion, Mark};
use super::error::Result;
use super::ffi::{self, check, pointer, pointers};
use super::group::Group;

/// The first bucket is small, so that the first all-reduce starts early (PyTorch's default).
const FIRST_BUCKET_BYTES: i64 = 1 << 20;

/// Averages the gradients of all ranks, bucket by bucket, while backward still computes the next ones
/// (Li et al., "PyTorch Distributed", VLDB 2020).
#[derive(Debug)]
pub(crate) struct Reducer {
    raw: *mut c_void,
    completion: Completion,
    one_thread: PhantomData<*const ()>,
}

impl Reducer {
    /// For these parameters, which must be the same ones in the same order on all ranks; `bucket_bytes` of gradients
    /// travel together (PyTorch: 25 MiB), as smaller numbers if `compress` says so.
    ///
    /// The buckets take their final form, in the order in which gradients become ready, before the second backward. A
    /// rank alone has none.
    pub(crate) fn new(
        group: &Group,
        parameters: &[Tensor],
        bucket_bytes: usize,
        compress: Option<Half>,
    ) -> Result<Self> {
        let pointers = pointers(parameters);
        let mut raw = std::ptr::null_mut();
        // SAFETY: group, parameters and the list outlive the call; the reducer keeps its own counts of group and
        // parameters.
        check(unsafe {
            ffi::c10d_reducer_new(
                group.raw.0,
                pointers.as_ptr(),
                pointers.len(),
                FIRST_BUCKET_BYTES,
                bucket_bytes as i64,
                code(compress),
                &raw mut raw,
            )
        })?;
        Ok(Self { raw, completion: group.completion(), one_thread: PhantomData })
    }

    /// Begins a step: its gradients are added up from nothing.
    pub(crate) fn begin(&self) -> Result<()> {
        // SAFETY: `self` keeps the reducer alive.
        check(unsafe { ffi::c10d_reducer_begin(self.raw) })
    }

    /// Adds the gradients of a part of the step's loss to those of this rank, without communication.
    pub(crate) fn accumulate(&self, loss: &Tensor) -> Result<()> {
        // SAFETY: `loss` outlives the call.
        check(unsafe { ffi::c10d_backward(pointer(loss)) })
    }

    /// Adds the gradients of `loss`, the last of a step, and replaces those of the parameters by their average over all
    /// ranks. A CPU has done so when this returns; a GPU was given it to do. After an error the gradients are worth
    /// nothing.
    pub(crate) fn backward(&self, loss: &Tensor) -> Result<()> {
        // SAFETY: `self` keeps the reducer alive.
        check(unsafe { ffi::c10d_reducer_prepare(self.raw) })?;
        let backward = Instant::now();
        self.accumulate(loss).map_err(|error| error.timed(backward, self.completion.timeout))
    }

    /// Waits until the device has come to a mark that was made after [`Self::backward`]. Gives the time that passed
    /// after this rank's last gradient was computed: communication that nothing hid.
    ///
    /// **Ok means that every bucket has completed on this rank**, on GPUs too, where a collective's own wait only
    /// orders streams. After an error the gradients are worth nothing.
    pub(crate) fn complete(&self, mark: &Mark) -> Result<Duration> {
        let mut ago = 0;
        self.completion.poll(|| self.ready(&mut ago))?;
        let began = Instant::now();
        self.completion.until(mark)?;
        Ok(Duration::from_nanos(ago.max(0) as u64) + began.elapsed())
    }

    fn ready(&self, ago: &mut i64) -> Result<bool> {
        let mut reached = 0;
        // SAFETY: `self` keeps the reducer alive, and both numbers outlive the call.
        check(unsafe { ffi::c10d_reducer_ready(self.raw, &raw mut reached, ago) })?;
        Ok(reached != 0)
    }

    /// How many all-reduces one backward makes.
    #[cfg(test)]
    pub(super) fn buckets(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: `self` keeps the reducer alive, and `count` outlives the call.
        check(unsafe { ffi::c10d_reducer_buckets(self.raw, &raw mut count) })?;
        Ok(count)
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim and is freed once.
        unsafe { ffi::c10d_reducer_free(self.raw) }
    }
}
