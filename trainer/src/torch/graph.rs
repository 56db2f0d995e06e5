//! CUDA graphs: what a GPU is given once is recorded, and given to it as one from then on.
//!
//! A graph knows addresses, not tensors: it reads and writes the same memory each time. What it was recorded from (its
//! inputs, parameters, results) has to stay where it is as long as the graph is replayed.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Device;

use super::error::{Error, Result};
use super::ffi::{self, check};

/// Where a device's work is recorded. A CPU does by itself what it is given, and records nothing.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// A stream of its own, and the memory of all its graphs; null on a CPU.
    raw: *mut c_void,
    one_thread: PhantomData<*const ()>,
}

/// What was recorded. On a CPU nothing.
#[derive(Debug)]
pub(crate) struct Graph {
    raw: *mut c_void,
    one_thread: PhantomData<*const ()>,
}

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(false) };
}

/// Whether what this thread computes is being recorded: nothing may come from the host then, or it would be the same
/// each time.
pub(crate) fn is_recording() -> bool {
    RECORDING.get()
}

impl Recorder {
    /// One for this device.
    pub(crate) fn new(device: Device) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        if let Device::Cuda(index) = device {
            // SAFETY: `raw` outlives the call.
            check(unsafe { ffi::c10d_recorder_new(index as c_int, &raw mut raw) })?;
        }
        Ok(Self { raw, one_thread: PhantomData })
    }

    /// Has a GPU do `work` on the recorder's stream, after what it was given before and before what it is given later:
    /// libtorch has to have done there what it is to record, since the first time it allocates and measures.
    pub(crate) fn aside<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.raw.is_null() {
            return work();
        }
        struct Back<'a>(Option<&'a Recorder>);
        impl Back<'_> {
            fn go(&mut self) -> Result<()> {
                // SAFETY: the recorder is alive, and this thread is there.
                self.0.take().map_or(Ok(()), |recorder| check(unsafe { ffi::c10d_recorder_leave(recorder.raw) }))
            }
        }
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                // The work has failed, which says more.
                let _ = self.go();
            }
        }
        // SAFETY: `self` keeps the recorder alive.
        check(unsafe { ffi::c10d_recorder_enter(self.raw) })?;
        let mut back = Back(Some(self));
        let done = work()?;
        back.go()?;
        Ok(done)
    }

    /// Records what `work` gives a GPU, which does nothing of it yet: what `work` returns has its values after
    /// [`Graph::replay`]. On a CPU `work` is done, and the graph is empty. A panic of `work` is an error like others.
    pub(crate) fn record<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
        self.aside(|| {
            let mut graph = Graph { raw: std::ptr::null_mut(), one_thread: PhantomData };
            if !self.raw.is_null() {
                // SAFETY: `self` keeps the recorder alive, this thread is there, and `graph` outlives the call.
                check(unsafe { ffi::c10d_graph_begin(self.raw, &raw mut graph.raw) })?;
            }
            RECORDING.set(true);
            let result = catch_unwind(AssertUnwindSafe(work));
            RECORDING.set(false);
            let ended = match graph.raw.is_null() {
                true => Ok(()),
                // SAFETY: `graph` keeps it alive, and what was begun is ended once.
                false => check(unsafe { ffi::c10d_graph_end(graph.raw) }),
            };
            let done = result.unwrap_or_else(|panic| {
                let message = panic.downcast_ref::<String>().map(String::as_str);
                let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
                Err(Error::Other(format!("panicked: {message}")))
            })?;
            ended?;
            Ok((graph, done))
        })
    }
}

impl Graph {
    /// Has the GPU do what was recorded, after what it was given before. Gives whether there is anything: a CPU has to
    /// compute once more.
    pub(crate) fn replay(&self) -> Result<bool> {
        if self.raw.is_null() {
            return Ok(false);
        }
        // SAFETY: `self` keeps the graph alive; its memory is its recorder's pool, which it holds.
        check(unsafe { ffi::c10d_graph_replay(self.raw) })?;
        Ok(true)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim or is null, and is freed once.
        unsafe { ffi::c10d_graph_free(self.raw) }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // SAFETY: `raw` came from the shim or is null, and is freed once; graphs hold the pool by themselves.
        unsafe { ffi::c10d_recorder_free(self.raw) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_does_what_a_gpu_records_and_a_failure_in_it_is_told_whatever_it_was() {
        let recorder = Recorder::new(Device::Cpu).expect("there is nothing to make");
        let (graph, is_seen) = recorder.record(|| Ok(is_recording())).expect("sound work");
        assert!(is_seen && !is_recording());
        assert!(!graph.replay().expect("nothing is done"), "it has to be computed");
        let said = |error: Error| error.to_string();
        let failed = recorder.record(|| Err::<(), _>(Error::OutOfMemory("2 GiB".to_owned()))).expect_err("it failed");
        assert!(matches!(failed, Error::OutOfMemory(_)));
        let panicked = recorder.record(|| -> Result<()> { panic!("no {}", "way") }).expect_err("it panicked");
        assert_eq!(said(panicked), "panicked: no way");
        assert!(!is_recording());
    }
}
