//! How much of the time a GPU had a step's work to do, by its own clock.

use std::collections::VecDeque;

use tch::Device;
use tracing::warn;

use crate::torch::{Moment, Result};

/// Seconds of a device in steps that it has done.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct DeviceTime {
    /// From the first to the last operation of what it was given at once; also between two of these operations, and in
    /// collectives.
    pub busy: f64,
    /// Until it was given the next.
    pub idle: f64,
}

impl DeviceTime {
    /// Adds another one's.
    pub(crate) fn add(&mut self, other: &Self) {
        self.busy += other.busy;
        self.idle += other.idle;
    }

    /// The share of its time in which it was busy, if it has a clock.
    pub(crate) fn share(&self) -> Option<f64> {
        let whole = self.busy + self.idle;
        (whole > 0.0).then(|| self.busy / whole)
    }
}

/// Times the parts of steps on a device, without waiting for it.
#[derive(Debug)]
pub(crate) struct DeviceClock {
    /// None: nobody wants to know.
    device: Option<Device>,
    begun: Option<Moment>,
    /// What the device has not been seen to have done.
    parts: VecDeque<Part>,
    /// Where the part ends that is read last.
    end: Option<Moment>,
    /// Whether nothing but a step comes between the part before and the next one.
    goes_on: bool,
}

#[derive(Debug)]
struct Part {
    begin: Moment,
    end: Moment,
    follows: bool,
}

impl DeviceClock {
    pub(crate) fn new(device: Option<Device>) -> Self {
        Self { device, begun: None, parts: VecDeque::new(), end: None, goes_on: false }
    }

    /// What the device is given from now on is a part of a step ...
    pub(crate) fn begin(&mut self) {
        self.begun = self.mark();
    }

    /// ... up to here.
    pub(crate) fn end(&mut self) {
        if let (Some(begin), Some(end)) = (self.begun.take(), self.mark()) {
            self.parts.push_back(Part { begin, end, follows: std::mem::replace(&mut self.goes_on, true) });
        }
    }

    fn mark(&mut self) -> Option<Moment> {
        let marked = self.device.map_or(Ok(None), Moment::mark);
        self.told(marked)
    }

    /// That a clock fails is no failure of the step: a device that is lost is heard of where it computes.
    fn told<T: Default>(&mut self, said: Result<T>) -> T {
        said.unwrap_or_else(|error| {
            warn!(%error, "how busy the device is cannot be told any more");
            *self = Self::new(None);
            T::default()
        })
    }

    /// The time until the next part is no step's: it counts neither as busy nor as idle.
    pub(crate) fn pause(&mut self) {
        self.goes_on = false;
    }

    /// The time in those parts that the device has done since this was last asked, and before each.
    pub(crate) fn read(&mut self) -> DeviceTime {
        let done = self.done();
        self.told(done)
    }

    fn done(&mut self) -> Result<DeviceTime> {
        let mut time = DeviceTime::default();
        while let Some(part) = self.parts.front() {
            if !part.end.is_past()? {
                break;
            }
            if let (Some(before), true) = (&self.end, part.follows) {
                time.idle += before.seconds_to(&part.begin)?;
            }
            time.busy += part.begin.seconds_to(&part.end)?;
            self.end = self.parts.pop_front().map(|part| part.end);
        }
        Ok(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::{FAKE_CLOCK, MomentDouble};

    /// A device that comes to marked places at these seconds, the second part's end only when it is asked twice.
    fn clock(times: &'static [f64], late: usize) -> DeviceClock {
        let mut marked = times.iter().enumerate();
        let clock = move || {
            let (i, &at) = marked.next().expect("no more is marked");
            MomentDouble { at, late: u32::from(i == late), ..MomentDouble::default() }
        };
        FAKE_CLOCK.set(Some(Box::new(clock)));
        DeviceClock::new(Some(Device::Cpu))
    }

    fn part(clock: &mut DeviceClock) {
        clock.begin();
        clock.end();
    }

    fn is_near(one: DeviceTime, busy: f64, idle: f64) -> bool {
        (one.busy - busy).abs() < 1e-9 && (one.idle - idle).abs() < 1e-9
    }

    #[test]
    fn a_device_is_busy_in_parts_of_steps_and_idle_between_them_and_not_waited_for() {
        let mut clock = clock(&[1.0, 1.3, 1.4, 1.5, 2.0, 2.6], 3);
        part(&mut clock);
        part(&mut clock);
        // The second part is not done yet.
        let first = clock.read();
        assert!(is_near(first, 0.3, 0.0), "{first:?}");
        part(&mut clock);
        let mut sum = clock.read();
        assert!(is_near(sum, 0.1 + 0.6, 0.1 + 0.5), "{sum:?}");
        assert_eq!(clock.read(), DeviceTime::default());
        sum.add(&first);
        assert!(is_near(sum, 1.0, 0.6) && (sum.share().expect("a clock") - 1.0 / 1.6).abs() < 1e-9, "{sum:?}");
        assert_eq!(DeviceTime::default().share(), None);
    }

    #[test]
    fn what_comes_between_steps_is_neither_busy_nor_idle() {
        let mut clock = clock(&[1.0, 1.5, 9.0, 9.5, 9.6, 9.7], usize::MAX);
        part(&mut clock);
        clock.pause();
        part(&mut clock);
        part(&mut clock);
        let time = clock.read();
        assert!(is_near(time, 1.1, 0.1), "{time:?}");
    }

    #[test]
    fn a_cpu_tells_nothing_and_a_clock_that_fails_no_more() {
        let mut clock = DeviceClock::new(Some(Device::Cpu));
        part(&mut clock);
        assert_eq!(clock.read().share(), None);
        if tch::Cuda::device_count() == 0 {
            let mut clock = DeviceClock::new(Some(Device::Cuda(0)));
            part(&mut clock);
            assert_eq!((clock.read().share(), clock.device), (None, None));
        }
    }
}
