//! Copies from the host's memory to a device on a stream of their own: the device makes them while it computes, and
//! what needs a copy waits for it there.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use tch::{Device, Tensor};

use super::error::Result;
use super::ffi::{self, check, pointers};

/// The way of tensors to one device.
#[derive(Debug, Clone)]
pub(crate) struct Copies {
    device: Device,
    way: Way,
}

#[derive(Debug, Clone)]
enum Way {
    /// A CPU has them.
    None,
    /// libtorch's number of the GPU's stream that copies.
    Stream(i64),
    #[cfg(test)]
    Double(Double),
}

/// That copies were given to a device to make.
#[derive(Debug, Clone)]
pub(crate) enum Arrival {
    /// There was nothing to copy.
    Past,
    /// They are made some time.
    Of(Arc<Copied>),
    /// In tests.
    #[cfg(test)]
    Double(Double),
}

impl Copies {
    /// To this device. A GPU has a stream for them from now on.
    pub(crate) fn new(device: Device) -> Result<Self> {
        let Device::Cuda(index) = device else { return Ok(Self { device, way: Way::None }) };
        let mut stream = 0;
        // SAFETY: `stream` outlives the call.
        check(unsafe { ffi::c10d_copy_stream(index as c_int, &raw mut stream) })?;
        Ok(Self { device, way: Way::Stream(stream) })
    }

    /// The device.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// Whether a copy takes time for which nobody need wait.
    pub(crate) fn run_beside(&self) -> bool {
        !matches!(self.way, Way::None)
    }

    /// The same on the device, in memory that has the numbers after the [`Arrival`], and not before. `host` is in memory
    /// from which the device copies by itself: libtorch keeps that until it has.
    pub(crate) fn send<const N: usize>(&self, host: [Tensor; N]) -> Result<([Tensor; N], Arrival)> {
        let (Device::Cuda(index), &Way::Stream(stream)) = (self.device, &self.way) else { return self.handed(host) };
        let (mut raw, mut copied) = ([std::ptr::null_mut(); N], std::ptr::null_mut());
        let from = pointers(&host);
        // SAFETY: the stream is of this device, there are N tensors on either side, and all outlive the call.
        check(unsafe { ffi::c10d_copy(index as c_int, stream, from.as_ptr(), N, raw.as_mut_ptr(), &raw mut copied) })?;
        // SAFETY: new tensors, which are this one's alone.
        let tensors = raw.map(|raw| unsafe { Tensor::from_ptr(raw.cast()) });
        Ok((tensors, Arrival::Of(Arc::new(Copied(copied)))))
    }

    fn handed<const N: usize>(&self, host: [Tensor; N]) -> Result<([Tensor; N], Arrival)> {
        #[cfg(test)]
        if let Way::Double(double) = &self.way {
            double.send()?;
            return Ok((host, Arrival::Double(double.clone())));
        }
        Ok((host, Arrival::Past))
    }
}

impl Arrival {
    /// What this thread gives the device from now on is done after the copies, and may use them: their memory is not
    /// given to others before it. Nobody else waits.
    pub(crate) fn wait(&self) -> Result<()> {
        match self {
            Self::Past => Ok(()),
            // SAFETY: `copied` keeps what the pointer points to.
            Self::Of(copied) => check(unsafe { ffi::c10d_copied_wait(copied.0) }),
            #[cfg(test)]
            Self::Double(double) => {
                double.waited.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

/// Tensors of a GPU, and the place in its stream of copies behind which they are filled.
#[derive(Debug)]
pub(crate) struct Copied(*mut c_void);

// SAFETY: neither the event nor the list of tensors is changed once it is made; libtorch counts references to tensors
// atomically, and CUDA lets any thread wait for an event and free it.
unsafe impl Send for Copied {}
// SAFETY: as above.
unsafe impl Sync for Copied {}

impl Drop for Copied {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the shim and is freed once.
        unsafe { ffi::c10d_copied_free(self.0) }
    }
}

/// In tests: a device that has memory for so many copies, and what it heard.
#[cfg(test)]
#[derive(Debug, Clone, Default)]
pub(crate) struct Double {
    pub(crate) room: usize,
    pub(crate) sent: Arc<std::sync::atomic::AtomicUsize>,
    pub(crate) waited: Arc<std::sync::atomic::AtomicUsize>,
}

#[cfg(test)]
impl Double {
    /// Copies to a CPU that is taken for such a device.
    pub(crate) fn copies(&self) -> Copies {
        Copies { device: Device::Cpu, way: Way::Double(self.clone()) }
    }

    fn send(&self) -> Result<()> {
        match self.sent.fetch_add(1, std::sync::atomic::Ordering::SeqCst) < self.room {
            true => Ok(()),
            false => Err(super::Error::OutOfMemory("tried to allocate 38 MiB".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::tensor;

    #[test]
    fn a_gpu_has_what_was_sent_to_it_after_its_arrival_and_one_that_is_not_there_is_refused() {
        let host = Tensor::arange(1 << 20, (tch::Kind::Int64, Device::Cpu)).view([-1, 4]);
        if tch::Cuda::device_count() == 0 {
            assert!(Copies::new(Device::Cuda(0)).is_err());
            let nowhere = Copies { device: Device::Cuda(0), way: Way::Stream(0) };
            assert!(nowhere.send([host]).is_err());
            return;
        }
        let copies = Copies::new(Device::Cuda(0)).expect("there is one");
        for _ in 0..10 {
            let staged = tensor::staged(&host, copies.device()).expect("memory");
            let none = host.narrow(0, 0, 0);
            let ([there, none], arrival) = copies.send([staged, none]).expect("memory");
            arrival.wait().expect("the device waits");
            assert_eq!((there.to_device(Device::Cpu), none.size()), (host.shallow_clone(), vec![0, 4]));
        }
    }
}
