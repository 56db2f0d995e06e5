//! The functions of shim.cc and graphs.cc.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::time::Duration;

use tch::Tensor;

use super::error::{Error, Result};

pub(super) fn pointer(tensor: &Tensor) -> *const c_void {
    tensor.as_ptr().cast()
}

pub(super) fn pointers(tensors: &[Tensor]) -> Vec<*const c_void> {
    tensors.iter().map(pointer).collect()
}

pub(super) fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Other(format!("{text:?} has a zero byte")))
}

/// At least one: c10d takes 0 for no limit.
pub(super) fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX).max(1)
}

/// What became of a call, as shim.h has it.
#[repr(C)]
pub(super) struct Answer {
    of: c_int,
    message: *mut c_char,
}

pub(super) fn check(Answer { of, message }: Answer) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim gives a string that ends in zero, and it is freed once, after it was copied.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        c10d_free_message(message);
        text
    };
    Err(match of {
        2 => Error::Collective(text),
        3 => Error::Timeout(text),
        4 => Error::Device(text),
        5 => Error::OutOfMemory(text),
        _ => Error::Other(text),
    })
}

// shim.h says what each does.
unsafe extern "C" {
    pub(super) fn c10d_free_message(message: *mut c_char);
    pub(super) fn c10d_store_serve(host: *const c_char, port: u16, listener: c_int, out: *mut *mut c_void) -> Answer;
    pub(super) fn c10d_store_connect(host: *const c_char, port: u16, timeout: i64, out: *mut *mut c_void) -> Answer;
    pub(super) fn c10d_store_free(store: *mut c_void);
    pub(super) fn c10d_group_new(
        store: *mut c_void,
        rank: c_int,
        world: c_int,
        timeout: i64,
        address: *const c_char,
        cuda: c_int,
        out: *mut *mut c_void,
    ) -> Answer;
    pub(super) fn c10d_group_abort(group: *mut c_void) -> Answer;
    pub(super) fn c10d_group_free(group: *mut c_void);
    pub(super) fn c10d_all_reduce(
        group: *mut c_void,
        tensor: *const c_void,
        op: c_int,
        out: *mut *mut c_void,
    ) -> Answer;
    pub(super) fn c10d_broadcast(
        group: *mut c_void,
        tensors: *const *const c_void,
        count: usize,
        root: c_int,
    ) -> Answer;
    pub(super) fn c10d_work_wait(work: *mut c_void, timeout: i64) -> Answer;
    pub(super) fn c10d_work_free(work: *mut c_void);
    pub(super) fn c10d_reducer_new(
        group: *mut c_void,
        parameters: *const *const c_void,
        count: usize,
        first_bucket_bytes: i64,
        bucket_bytes: i64,
        compress: c_int,
        out: *mut *mut c_void,
    ) -> Answer;
    pub(super) fn c10d_reducer_begin(reducer: *mut c_void) -> Answer;
    pub(super) fn c10d_reducer_prepare(reducer: *mut c_void) -> Answer;
    pub(super) fn c10d_backward(loss: *const c_void) -> Answer;
    pub(super) fn c10d_out_of_memory(cuda: c_int, out: *mut i64) -> Answer;
    pub(super) fn c10d_empty_pinned(shape: *const i64, dimensions: usize, out: *mut *mut c_void) -> Answer;
    pub(super) fn c10d_empty_cuda(cuda: c_int, bytes: i64, spare: i64, out: *mut *mut c_void) -> Answer;
    pub(super) fn c10d_reducer_ready(reducer: *mut c_void, reached: *mut c_int, ago_ns: *mut i64) -> Answer;
    pub(super) fn c10d_allow_tf32(allow: c_int) -> Answer;
    pub(super) fn c10d_allows_tf32(out: *mut c_int) -> Answer;
    #[cfg(test)]
    pub(super) fn c10d_allow_tf32_convolutions(allow: c_int) -> Answer;
    pub(super) fn c10d_allow_bf16_sums(allow: c_int) -> Answer;
    #[cfg(test)]
    pub(super) fn c10d_allows_bf16_sums(out: *mut c_int) -> Answer;
    pub(super) fn c10d_autocast(cuda: c_int, kind: c_int) -> Answer;
    #[cfg(test)]
    pub(super) fn c10d_reducer_buckets(reducer: *mut c_void, out: *mut usize) -> Answer;
    pub(super) fn c10d_reducer_free(reducer: *mut c_void);
    pub(super) fn c10d_gradients(
        output: *const c_void,
        by: *const c_void,
        leaves: *const *const c_void,
        count: usize,
        out: *mut *mut c_void,
    ) -> Answer;
    pub(super) fn c10d_set_gradients(
        parameters: *const *const c_void,
        gradients: *const *const c_void,
        count: usize,
    ) -> Answer;
    pub(super) fn c10d_recorder_new(cuda: c_int, out: *mut *mut c_void) -> Answer;
    pub(super) fn c10d_recorder_free(recorder: *mut c_void);
    pub(super) fn c10d_recorder_enter(recorder: *mut c_void) -> Answer;
    pub(super) fn c10d_recorder_leave(recorder: *mut c_void) -> Answer;
    pub(super) fn c10d_graph_begin(recorder: *mut c_void, out: *mut *mut c_void) -> Answer;
    pub(super) fn c10d_graph_end(graph: *mut c_void) -> Answer;
    pub(super) fn c10d_graph_replay(graph: *mut c_void) -> Answer;
    pub(super) fn c10d_graph_free(graph: *mut c_void);
    pub(super) fn c10d_event_record(cuda: c_int, timed: c_int, out: *mut *mut c_void) -> Answer;
    pub(super) fn c10d_event_reached(event: *mut c_void, out: *mut c_int) -> Answer;
    pub(super) fn c10d_event_elapsed(event: *mut c_void, later: *mut c_void, out: *mut f64) -> Answer;
    pub(super) fn c10d_event_free(event: *mut c_void);
    pub(super) fn c10d_copy_stream(cuda: c_int, out: *mut i64) -> Answer;
    pub(super) fn c10d_copy(
        cuda: c_int,
        stream: i64,
        host: *const *const c_void,
        count: usize,
        tensors: *mut *mut c_void,
        out: *mut *mut c_void,
    ) -> Answer;
    pub(super) fn c10d_copied_wait(copied: *mut c_void) -> Answer;
    pub(super) fn c10d_copied_free(copied: *mut c_void);
    pub(super) fn c10d_fused_sgd(
        parameters: *const *const c_void,
        gradients: *const *const c_void,
        momenta: *const *const c_void,
        count: usize,
        learning_rate: f64,
        momentum: f64,
        weight_decay: f64,
    ) -> Answer;
}
