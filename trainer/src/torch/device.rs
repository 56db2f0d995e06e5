//! What a rank computes on, and when it has done what it was given.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tch::Device;

use super::error::{Error, Result};
use super::ffi::{self, check};

/// libtorch's name of `cpu` or `cuda:N`.
pub(crate) fn parse(device: &str) -> Result<Device> {
    let number = device.strip_prefix("cuda:").and_then(|number| number.parse().ok());
    match (device, number) {
        ("cpu", _) => Ok(Device::Cpu),
        (_, Some(number)) => Ok(Device::Cuda(number)),
        _ => Err(Error::Other(format!("device {device:?}: must be cpu or cuda:N"))),
    }
}

/// Sets how a device computes from now on, for this process: whether a GPU's matrix products may be of TF32. Sums of
/// products of bf16 are of 32 bits, also where parts of a product are summed apart (split-K). cuDNN tries
/// its ways to convolve for each new shape and takes the fastest, since shapes repeat: all lanes have the same share in
/// a step. A CPU needs nothing.
pub(crate) fn prepare(device: Device, tf32: bool) -> Result<()> {
    if device.is_cuda() {
        tch::Cuda::cudnn_set_benchmark(true);
        allow_tf32(tf32)?;
        allow_bf16_sums(false)?;
    }
    Ok(())
}

fn allow_bf16_sums(allow: bool) -> Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { ffi::c10d_allow_bf16_sums(c_int::from(allow)) })
}

fn allow_tf32(allow: bool) -> Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { ffi::c10d_allow_tf32(c_int::from(allow)) })
}

/// Whether convolutions of GPUs may be of TF32 in this process, as libtorch lets them.
#[cfg(test)]
pub(crate) fn allow_tf32_convolutions(allow: bool) -> Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { ffi::c10d_allow_tf32_convolutions(c_int::from(allow)) })
}

/// Whether matrix products of GPUs may be of TF32 in this process.
pub(crate) fn allows_tf32() -> Result<bool> {
    let mut allowed = 0;
    // SAFETY: `allowed` outlives the call.
    check(unsafe { ffi::c10d_allows_tf32(&raw mut allowed) })?;
    Ok(allowed != 0)
}

thread_local! {
    /// How often the device had had no memory left when this thread's step began.
    static BEFORE: Cell<i64> = const { Cell::new(0) };
}

/// A step begins on this thread. What the device had no memory for until now was done without: cuDNN, say, tries ways to
/// convolve that need too much.
pub(crate) fn begin_step(device: Device) -> Result<()> {
    BEFORE.set(out_of_memory(device)?);
    Ok(())
}

/// Whether a device is what failed in this thread's step where libtorch says `said` without a class: it had no memory
/// left, or its context is lost.
pub(crate) fn failure(device: Device, said: &str) -> Option<Error> {
    match out_of_memory(device) {
        Ok(times) if times > BEFORE.get() => Some(Error::OutOfMemory(said.to_owned())),
        _ => lost(device),
    }
}

/// Whether a device's context is lost: once it is, every call says so. This one does not wait, since a stream may hang
/// in a collective.
pub(crate) fn lost(device: Device) -> Option<Error> {
    let Device::Cuda(index) = device else { return None };
    let error = Event::record(index, false).and_then(|event| event.reached()).err();
    error.filter(|error| matches!(error, Error::Device(_)))
}

/// How often a device had no memory left for a tensor.
fn out_of_memory(device: Device) -> Result<i64> {
    #[cfg(test)]
    if device == Device::Cpu {
        return Ok(FAKE_OOMS.get());
    }
    let Device::Cuda(index) = device else { return Ok(0) };
    let mut times = 0;
    // SAFETY: `times` outlives the call.
    check(unsafe { ffi::c10d_out_of_memory(index as c_int, &raw mut times) })?;
    Ok(times)
}

/// A place in what a device was given to do.
#[derive(Debug)]
pub(crate) struct Mark(Option<Event>);

impl Mark {
    /// Whether the device has come so far. A CPU has done what it was given when it is asked.
    pub(crate) fn reached(&self) -> Result<bool> {
        #[cfg(test)]
        if let Some(answer) = FAKE.with_borrow_mut(|fake| fake.as_mut().map(|fake| fake())) {
            return answer;
        }
        self.0.as_ref().map_or(Ok(true), Event::reached)
    }
}

/// Waits until all that was put on a device's stream has been done. On the CPU nothing is ever left to wait for.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) device: Device,
    pub(super) timeout: Duration,
    /// Whether the device waits for nobody else's.
    pub(super) alone: bool,
    pub(super) aborted: Arc<AtomicBool>,
}

/// In tests: what a device answers when it is asked whether it has finished, to ranks on this thread.
#[cfg(test)]
pub(crate) type Fake = Box<dyn FnMut() -> Result<bool> + Send>;

#[cfg(test)]
thread_local! {
    /// In tests: how often the CPU has had no memory left, to ranks on this thread.
    pub(crate) static FAKE_OOMS: Cell<i64> = const { Cell::new(0) };
    pub(crate) static FAKE: std::cell::RefCell<Option<Fake>> = const { std::cell::RefCell::new(None) };
}

impl Completion {
    /// Marks what the device was given up to now.
    pub(super) fn mark(&self) -> Result<Mark> {
        let event = match self.device {
            Device::Cuda(index) => Some(Event::record(index, false)?),
            _ => None,
        };
        Ok(Mark(event))
    }

    pub(super) fn wait(&self) -> Result<()> {
        self.until(&self.mark()?)
    }

    pub(super) fn until(&self, mark: &Mark) -> Result<()> {
        self.poll(|| mark.reached())
    }

    /// Asks again and again: a stream that waits for a dead peer never says so by itself.
    pub(super) fn poll(&self, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !done()? {
            if self.aborted.load(Ordering::Relaxed) {
                return Err(Error::Collective("aborted".to_owned()));
            }
            if start.elapsed() > self.timeout {
                let late = format!("it has not finished after {:?}", self.timeout);
                return Err(if self.alone {
                    Error::Device(late)
                } else {
                    Error::Timeout(format!("the device: {late}"))
                });
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

#[derive(Debug)]
pub(crate) struct Event(*mut c_void);

impl Event {
    /// If it is timed, the device notes when it comes there.
    pub(super) fn record(cuda: usize, timed: bool) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: `raw` outlives the call.
        check(unsafe { ffi::c10d_event_record(cuda as c_int, c_int::from(timed), &raw mut raw) })?;
        Ok(Self(raw))
    }

    /// Milliseconds up to a later one; both are timed, and reached.
    pub(super) fn elapsed(&self, later: &Self) -> Result<f64> {
        let mut milliseconds = 0.0;
        // SAFETY: both events live, and `milliseconds` outlives the call.
        check(unsafe { ffi::c10d_event_elapsed(self.0, later.0, &raw mut milliseconds) })?;
        Ok(milliseconds)
    }

    pub(super) fn reached(&self) -> Result<bool> {
        let mut reached = 0;
        // SAFETY: `self` keeps the event alive, and `reached` outlives the call.
        check(unsafe { ffi::c10d_event_reached(self.0, &raw mut reached) })?;
        Ok(reached != 0)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the shim and is freed once.
        unsafe { ffi::c10d_event_free(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_gpus_are_of_tf32_if_that_is_chosen_and_a_cpu_leaves_it_alone() {
        assert!(!allows_tf32().expect("libtorch tells"), "it is not by itself");
        allow_tf32(true).expect("libtorch has it");
        assert!(allows_tf32().expect("libtorch tells"));
        prepare(Device::Cpu, false).expect("nothing to do");
        assert!(allows_tf32().expect("libtorch tells"));
        allow_tf32(false).expect("libtorch has it");
        assert!(!allows_tf32().expect("libtorch tells"));
    }

    #[test]
    fn sums_of_bf16_products_are_of_bf16_only_if_that_is_allowed() {
        let allows = || {
            let mut allowed = 0;
            // SAFETY: `allowed` outlives the call.
            check(unsafe { ffi::c10d_allows_bf16_sums(&raw mut allowed) }).expect("libtorch tells");
            allowed != 0
        };
        assert!(allows(), "libtorch does by itself");
        allow_bf16_sums(false).expect("libtorch has it");
        assert!(!allows());
        allow_bf16_sums(true).expect("libtorch has it");
    }

    #[test]
    fn memory_that_was_lacking_before_a_step_is_not_why_the_step_fails() {
        FAKE_OOMS.set(3);
        assert!(matches!(failure(Device::Cpu, "said"), Some(Error::OutOfMemory(_))));
        begin_step(Device::Cpu).expect("it tells");
        assert!(failure(Device::Cpu, "said").is_none());
        FAKE_OOMS.set(4);
        assert!(matches!(failure(Device::Cpu, "said"), Some(Error::OutOfMemory(_))));
    }

    #[test]
    fn a_device_that_is_slow_is_waited_for_and_one_that_hangs_fails_or_is_aborted_is_not_believed() {
        let completion = Completion {
            device: Device::Cpu,
            timeout: Duration::from_millis(50),
            alone: false,
            aborted: Arc::new(AtomicBool::new(false)),
        };
        let mut asked = 0;
        completion
            .poll(|| {
                asked += 1;
                Ok(asked == 5)
            })
            .expect("done at the fifth time");
        assert!(matches!(completion.poll(|| Ok(false)), Err(Error::Timeout(_))));
        let failed = completion.poll(|| Err(Error::Other("launch failure".to_owned())));
        assert!(matches!(failed, Err(Error::Other(_))));
        let alone = Completion { alone: true, aborted: completion.aborted.clone(), ..completion };
        assert!(matches!(alone.poll(|| Ok(false)), Err(Error::Device(_))), "it waits for no peer");
        alone.aborted.store(true, Ordering::Relaxed);
        assert!(matches!(alone.poll(|| Ok(true)), Err(Error::Collective(_))));
    }
}
