//! Times by a GPU's own clock.

use tch::Device;

use super::device::Event;
use super::error::Result;

/// When a GPU comes to a place in what it was given to do.
#[derive(Debug)]
pub(crate) enum Moment {
    /// Of a GPU.
    Of(Event),
    /// In tests.
    #[cfg(test)]
    Double(Double),
}

impl Moment {
    /// Marks what the device was given up to now. A CPU has no clock of its own.
    pub(crate) fn mark(device: Device) -> Result<Option<Self>> {
        #[cfg(test)]
        if let Some(double) = FAKE_CLOCK.with_borrow_mut(|clock| clock.as_mut().map(|clock| clock())) {
            return Ok(Some(Self::Double(double)));
        }
        let Device::Cuda(index) = device else { return Ok(None) };
        Ok(Some(Self::Of(Event::record(index, true)?)))
    }

    /// Whether the device has come so far.
    pub(crate) fn is_past(&self) -> Result<bool> {
        match self {
            Self::Of(event) => event.reached(),
            #[cfg(test)]
            Self::Double(double) => Ok(double.asked.replace(double.asked.get() + 1) >= double.late),
        }
    }

    /// Seconds from this one to a later one; the device has come to both.
    pub(crate) fn seconds_to(&self, later: &Self) -> Result<f64> {
        match (self, later) {
            (Self::Of(event), Self::Of(later)) => Ok(event.elapsed(later)? / 1e3),
            #[cfg(test)]
            (Self::Double(double), Self::Double(later)) => Ok(later.at - double.at),
            #[cfg(test)]
            _ => panic!("of one clock each"),
        }
    }
}

/// In tests: a moment.
#[cfg(test)]
#[derive(Debug, Clone, Default)]
pub(crate) struct Double {
    /// In seconds.
    pub(crate) at: f64,
    /// So often it is asked for before it is past.
    pub(crate) late: u32,
    pub(crate) asked: std::cell::Cell<u32>,
}

/// In tests: the clock of a device that tells the moments that are marked, to ranks on this thread.
#[cfg(test)]
pub(crate) type FakeClock = Box<dyn FnMut() -> Double + Send>;

#[cfg(test)]
thread_local! {
    pub(crate) static FAKE_CLOCK: std::cell::RefCell<Option<FakeClock>> = const { std::cell::RefCell::new(None) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_tells_its_time_a_cpu_has_none_and_a_gpu_that_is_not_there_is_refused() {
        assert!(Moment::mark(Device::Cpu).expect("nothing to do").is_none());
        if tch::Cuda::device_count() == 0 {
            assert!(Moment::mark(Device::Cuda(0)).is_err());
            return;
        }
        let mark = || Moment::mark(Device::Cuda(0)).expect("there is one").expect("it has a clock");
        let x = tch::Tensor::ones([2048, 2048], (tch::Kind::Float, Device::Cuda(0)));
        let before = mark();
        let product = x.matmul(&x);
        let after = mark();
        assert_eq!(product.double_value(&[0, 0]), 2048.0);
        while !after.is_past().expect("it works") {
            std::thread::yield_now();
        }
        let seconds = before.seconds_to(&after).expect("both are past");
        assert!(seconds > 0.0 && seconds < 60.0, "{seconds} s");
    }
}
