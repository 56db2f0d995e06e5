//! The bodies of responses, and the budget of memory that large ones share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proto::Limits;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::retry::{FetchError, Retry};
use crate::format::{MAGIC_BYTES, format_of, unsupported};

/// What each body may hold before it draws on the budget: most photos of the web are smaller and wait for nothing.
pub(super) const FREE_BYTES: usize = 256 << 10;
/// The budget is counted in units of so many bytes, because a semaphore hands out 32-bit numbers.
const UNIT: usize = 1 << 10;
/// While others wait for the budget, a body that holds a part of it must bring at least so many bytes in each window.
const MIN_BYTES_PER_WINDOW: usize = 64 << 10;
pub(super) const RATE_WINDOW: Duration = Duration::from_secs(1);

/// A body. It gives its part of the budget back when it is dropped.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) bytes: Vec<u8>,
    /// How many bytes it may hold.
    pub(super) capacity: usize,
    format_checked: bool,
    from_budget: Option<OwnedSemaphorePermit>,
    beyond_budget: Option<OwnedSemaphorePermit>,
    pub(super) window_start: Instant,
    bytes_at_window_start: usize,
}

impl Body {
    pub(super) fn new() -> Self {
        Self {
            bytes: Vec::new(),
            capacity: FREE_BYTES,
            format_checked: false,
            from_budget: None,
            beyond_budget: None,
            window_start: Instant::now(),
            bytes_at_window_start: 0,
        }
    }

    #[cfg(test)]
    pub(crate) fn holding(bytes: Vec<u8>) -> Self {
        Self { bytes, ..Self::new() }
    }

    /// Whether it is large and no picture: films and archives need not be read to their end. Says so once.
    pub(super) fn is_large_non_image(&mut self) -> bool {
        let check = !self.format_checked && self.capacity > FREE_BYTES && self.bytes.len() >= MAGIC_BYTES;
        self.format_checked |= check;
        check && format_of(&self.bytes).is_none() && unsupported(&self.bytes).is_none()
    }

    /// Whether it holds a part of the budget and brought too few bytes in the window that has just ended.
    pub(super) fn is_too_slow(&mut self) -> bool {
        if self.window_start.elapsed() < RATE_WINDOW {
            return false;
        }
        let received = self.bytes.len() - self.bytes_at_window_start;
        self.begin_window();
        (self.from_budget.is_some() || self.beyond_budget.is_some()) && received < MIN_BYTES_PER_WINDOW
    }

    fn begin_window(&mut self) {
        (self.window_start, self.bytes_at_window_start) = (Instant::now(), self.bytes.len());
    }
}

/// The memory that all bodies of the process may hold beyond [`FREE_BYTES`] each.
#[derive(Debug)]
pub(super) struct BodyBudget {
    units: Arc<Semaphore>,
    total_units: u32,
    /// Its one permit lets one body grow past a budget that is used up.
    beyond: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl BodyBudget {
    pub(super) fn new(bytes: usize) -> Self {
        let total_units = units(bytes).clamp(1, u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX));
        Self {
            units: Arc::new(Semaphore::new(total_units as usize)),
            total_units,
            beyond: Arc::new(Semaphore::new(1)),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Whether any body waits for a part of it.
    pub(super) fn is_contended(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Makes room for a body of known length. The body waits for all of its part before it holds any, so that bodies
    /// cannot block each other for good.
    pub(super) async fn reserve(
        &self,
        body: &mut Body,
        length: usize,
        limits: &Limits,
        deadline: &mut Instant,
    ) -> Result<(), FetchError> {
        if length > body.capacity {
            let units = units(length - body.capacity).min(self.total_units);
            let permits = Arc::clone(&self.units).acquire_many_owned(units);
            body.from_budget = Some(self.wait_for(permits, limits, deadline).await?);
            body.capacity = length;
            body.begin_window();
        }
        Ok(())
    }

    /// Doubles the capacity of a body of unknown length, up to `max`. The body holds a part of the budget already, so
    /// it does not wait for more of it: if there is no more, it waits to be the one body that may go beyond, and then
    /// never again.
    pub(super) async fn grow(
        &self,
        body: &mut Body,
        max: usize,
        limits: &Limits,
        deadline: &mut Instant,
    ) -> Result<(), FetchError> {
        let capacity = (body.capacity * 2).min(max);
        match Arc::clone(&self.units).try_acquire_many_owned(units(capacity - body.capacity)) {
            Ok(more) => {
                match &mut body.from_budget {
                    Some(permits) => permits.merge(more),
                    none => *none = Some(more),
                }
                body.capacity = capacity;
            }
            Err(_) => {
                self.go_beyond(body, limits, deadline).await?;
                body.capacity = max;
                body.begin_window();
            }
        }
        Ok(())
    }

    /// Waits until this body is the one that may hold more than the budget.
    pub(super) async fn go_beyond(
        &self,
        body: &mut Body,
        limits: &Limits,
        deadline: &mut Instant,
    ) -> Result<(), FetchError> {
        if body.beyond_budget.is_none() {
            let permit = Arc::clone(&self.beyond).acquire_owned();
            body.beyond_budget = Some(self.wait_for(permit, limits, deadline).await?);
        }
        Ok(())
    }

    /// Waits for permits. The server is not to blame for the wait, so `deadline` moves by as much; but the wait ends,
    /// too.
    async fn wait_for(
        &self,
        permits: impl Future<Output = Result<OwnedSemaphorePermit, AcquireError>>,
        limits: &Limits,
        deadline: &mut Instant,
    ) -> Result<OwnedSemaphorePermit, FetchError> {
        let (start, _waiter) = (Instant::now(), Waiter::new(&self.waiting));
        let acquired = timeout(limits.timeout(), permits).await;
        *deadline += start.elapsed();
        let timed_out = FetchError { retry: Retry::After(Duration::ZERO), ..FetchError::out_of_time() };
        acquired.ok().and_then(Result::ok).ok_or(timed_out)
    }
}

/// Counts itself among the bodies that wait.
struct Waiter<'a>(&'a AtomicUsize);

impl<'a> Waiter<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::HostSignal;
    use proto::Rejection;

    #[tokio::test]
    async fn large_bodies_wait_for_their_share_of_the_budget_and_gain_the_time() {
        let (budget, limits) = (BodyBudget::new(1 << 20), Limits::default());
        let start = Instant::now();
        let mut deadline = start;
        let mut small = Body::new();
        budget.reserve(&mut small, FREE_BYTES, &limits, &mut deadline).await.expect("no wait");
        assert!(small.from_budget.is_none() && deadline == start);

        // More than there is: it gets all of it, rather than nothing for ever.
        let mut large = Body::new();
        budget.reserve(&mut large, 8 << 20, &limits, &mut deadline).await.expect("all of it");
        assert_eq!(budget.units.available_permits(), 0);

        let mut other = Body::new();
        let mut deadline = start;
        let waits = budget.reserve(&mut other, 1 << 20, &limits, &mut deadline);
        let ends = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(large);
        };
        tokio::join!(waits, ends).0.expect("its turn");
        assert!(deadline >= start + Duration::from_millis(50) && other.capacity == 1 << 20);
    }

    #[tokio::test]
    async fn bodies_of_unknown_length_grow_together_and_one_at_a_time_past_the_budget() {
        const MAX: usize = 8 << 20;
        let (budget, limits) = (BodyBudget::new(1 << 20), Limits::default());
        let start = Instant::now();
        let mut deadline = start;
        let (mut one, mut two) = (Body::new(), Body::new());
        for body in [&mut one, &mut two] {
            budget.grow(body, MAX, &limits, &mut deadline).await.expect("room");
        }
        assert_eq!((one.capacity, two.capacity, budget.units.available_permits()), (512 << 10, 512 << 10, 512));
        budget.grow(&mut one, MAX, &limits, &mut deadline).await.expect("room");
        assert_eq!((one.capacity, budget.units.available_permits()), (1 << 20, 0));
        budget.grow(&mut one, MAX, &limits, &mut deadline).await.expect("room");
        assert!(one.capacity == MAX && deadline - start < Duration::from_millis(50));

        let mut deadline = start;
        let waits = budget.grow(&mut two, MAX, &limits, &mut deadline);
        let ends = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(one);
        };
        tokio::join!(waits, ends).0.expect("its turn");
        assert!(two.capacity == MAX && deadline >= start + Duration::from_millis(50));
        drop(two);
        assert_eq!(budget.units.available_permits(), 1024);
    }

    #[tokio::test]
    async fn who_waits_for_the_budget_waits_no_longer_than_a_url_may_take() {
        let (budget, limits) = (BodyBudget::new(1 << 20), Limits { timeout_seconds: 0.2, ..Limits::default() });
        let mut deadline = Instant::now();
        let mut bodies = [Body::new(), Body::new()];
        budget.reserve(&mut bodies[0], 8 << 20, &limits, &mut deadline).await.expect("all of it");
        let error = budget.reserve(&mut bodies[1], 1 << 20, &limits, &mut deadline).await.expect_err("nothing is left");
        assert_eq!((error.rejection, error.signal), (Rejection::Timeout, HostSignal::Unknown));
        assert_eq!(budget.waiting.load(Ordering::Relaxed), 0);
    }
}
