//! Bodies, and the budget of bytes that large ones share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proto::Limits;
use tokio::sync::{AcquireError, OwnedSemaphorePermit};
use tokio::time::{Instant, timeout};

use super::client::Fetcher;
use super::retry::{Again, Failure};
use crate::format::{TELLING_BYTES, format_of};

/// What each body may hold before it draws on the budget: most photos of the web are smaller, and wait for nothing.
pub(super) const ALLOWANCE: usize = 256 << 10;
/// The budget is counted in these, because a semaphore hands out 32-bit numbers.
pub(super) const UNIT: usize = 1 << 10;

/// While others wait for the budget, a body that holds a part of it must come at this pace: bytes in so long.
pub(super) const PACE: (usize, Duration) = (64 << 10, Duration::from_secs(1));
/// A body. Its share of the budget is given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) bytes: Vec<u8>,
    /// How many bytes it may hold.
    pub(super) room: usize,
    /// Whether its first bytes were looked at.
    known: bool,
    pub(super) share: Option<OwnedSemaphorePermit>,
    pub(super) overflow: Option<OwnedSemaphorePermit>,
    /// When its pace was last looked at, and how many bytes had come by then.
    pub(super) paced: (Instant, usize),
}

impl Body {
    pub(super) fn new() -> Self {
        let paced = (Instant::now(), 0);
        Self { bytes: Vec::new(), room: ALLOWANCE, known: false, share: None, overflow: None, paced }
    }

    #[cfg(test)]
    pub(crate) fn holding(bytes: Vec<u8>) -> Self {
        Self { bytes, ..Self::new() }
    }

    /// Whether it is large and no picture: films and archives need not be read to their end.
    pub(super) fn is_in_vain(&mut self) -> bool {
        let look = !self.known && self.room > ALLOWANCE && self.bytes.len() >= TELLING_BYTES;
        self.known |= look;
        look && format_of(&self.bytes).is_none()
    }

    /// Whether it came below [`PACE`] since that was last looked at, if that is long enough ago.
    pub(super) fn dawdles(&mut self) -> bool {
        let (since, before) = self.paced;
        if since.elapsed() < PACE.1 {
            return false;
        }
        self.paced = (Instant::now(), self.bytes.len());
        let holds = self.share.is_some() || self.overflow.is_some();
        holds && self.bytes.len() - before < PACE.0
    }
}

/// One of those that wait.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn begin(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Fetcher {
    /// Waits for a part of the budget. The wait is ours, so the server is given that much longer; but it ends, too.
    pub(super) async fn wait_for(
        &self,
        permit: impl Future<Output = Result<OwnedSemaphorePermit, AcquireError>>,
        limits: &Limits,
        deadline: &mut Instant,
    ) -> Result<OwnedSemaphorePermit, Failure> {
        let (start, _waits) = (Instant::now(), Waits::begin(&self.waiting));
        let got = timeout(limits.timeout(), permit).await;
        *deadline += start.elapsed();
        got.ok().and_then(Result::ok).ok_or(Failure { again: Again::After(Duration::ZERO), ..Failure::of_haste() })
    }

    /// Makes room for a body of known length, which waits for its whole share before it holds any: so bodies cannot block
    /// each other for good.
    pub(super) async fn reserve(
        &self,
        body: &mut Body,
        length: usize,
        limits: &Limits,
        deadline: &mut Instant,
    ) -> Result<(), Failure> {
        if length > body.room {
            let units = units(length - body.room).min(u32::try_from(self.budget_units).unwrap_or(u32::MAX));
            let permits = Arc::clone(&self.budget).acquire_many_owned(units);
            body.share = Some(self.wait_for(permits, limits, deadline).await?);
            body.room = length;
            body.paced = (Instant::now(), body.bytes.len());
        }
        Ok(())
    }

    /// Doubles the room of a body of unknown length, up to `max`. It holds a share already, so it does not wait for more of
    /// the budget: if there is no more, it waits for its turn as the one body that goes over it, and waits no more then.
    pub(super) async fn grow(
        &self,
        body: &mut Body,
        max: usize,
        limits: &Limits,
        deadline: &mut Instant,
    ) -> Result<(), Failure> {
        let room = (body.room * 2).min(max);
        match Arc::clone(&self.budget).try_acquire_many_owned(units(room - body.room)) {
            Ok(more) => {
                match &mut body.share {
                    Some(share) => share.merge(more),
                    none => *none = Some(more),
                }
                body.room = room;
            }
            Err(_) => {
                let permit = Arc::clone(&self.overflow).acquire_owned();
                body.overflow = Some(self.wait_for(permit, limits, deadline).await?);
                body.room = max;
                body.paced = (Instant::now(), body.bytes.len());
            }
        }
        Ok(())
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::tests::fetcher;
    use super::*;
    use crate::hosts::Ending;
    use proto::Rejection;

    #[tokio::test]
    async fn large_bodies_wait_for_their_share_of_the_budget_and_gain_the_time() {
        let (fetcher, limits) = (fetcher(), Limits::default());
        let start = Instant::now();
        let mut deadline = start;
        let mut small = Body::new();
        fetcher.reserve(&mut small, ALLOWANCE, &limits, &mut deadline).await.expect("no wait");
        assert!(small.share.is_none() && deadline == start);

        // More than there is: it gets all of it, rather than nothing for ever.
        let mut large = Body::new();
        fetcher.reserve(&mut large, 8 << 20, &limits, &mut deadline).await.expect("all of it");
        assert_eq!(fetcher.budget.available_permits(), 0);

        let mut other = Body::new();
        let mut deadline = start;
        let waits = fetcher.reserve(&mut other, 1 << 20, &limits, &mut deadline);
        let ends = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(large);
        };
        tokio::join!(waits, ends).0.expect("its turn");
        assert!(deadline >= start + Duration::from_millis(50) && other.room == 1 << 20);
    }

    #[tokio::test]
    async fn bodies_of_unknown_length_grow_together_and_one_at_a_time_past_the_budget() {
        const MAX: usize = 8 << 20;
        let (fetcher, limits) = (fetcher(), Limits::default());
        let start = Instant::now();
        let mut deadline = start;
        let (mut one, mut two) = (Body::new(), Body::new());
        for body in [&mut one, &mut two] {
            fetcher.grow(body, MAX, &limits, &mut deadline).await.expect("room");
        }
        assert_eq!((one.room, two.room, fetcher.budget.available_permits()), (512 << 10, 512 << 10, 512));
        fetcher.grow(&mut one, MAX, &limits, &mut deadline).await.expect("room");
        assert_eq!((one.room, fetcher.budget.available_permits()), (1 << 20, 0));
        fetcher.grow(&mut one, MAX, &limits, &mut deadline).await.expect("room");
        assert!(one.room == MAX && deadline - start < Duration::from_millis(50));

        let mut deadline = start;
        let waits = fetcher.grow(&mut two, MAX, &limits, &mut deadline);
        let ends = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(one);
        };
        tokio::join!(waits, ends).0.expect("its turn");
        assert!(two.room == MAX && deadline >= start + Duration::from_millis(50));
        drop(two);
        assert_eq!(fetcher.budget.available_permits(), 1024);
    }

    #[tokio::test]
    async fn who_waits_for_the_budget_waits_no_longer_than_a_url_may_take() {
        let (fetcher, limits) = (fetcher(), Limits { timeout_seconds: 0.2, ..Limits::default() });
        let mut deadline = Instant::now();
        let mut bodies = [Body::new(), Body::new()];
        fetcher.reserve(&mut bodies[0], 8 << 20, &limits, &mut deadline).await.expect("all of it");
        let failure =
            fetcher.reserve(&mut bodies[1], 1 << 20, &limits, &mut deadline).await.expect_err("nothing is left");
        assert_eq!((failure.rejection, failure.ending), (Rejection::Timeout, Ending::Unknown));
        assert_eq!(fetcher.waiting.load(Ordering::Relaxed), 0);
    }
}
