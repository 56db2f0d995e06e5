//! Small pictures of what is rejected, a few for each reason in each shard: so that somebody can see whether the reason
//! holds.

use std::sync::atomic::{AtomicU8, Ordering};

use proto::Rejection;

/// So many for each reason in each shard.
const EACH: u8 = 4;

/// The reasons at which there is a picture to be seen. One whose owner opted out is not kept in any size.
const SEEN: [Rejection; 5] =
    [Rejection::TooSmall, Rejection::Placeholder, Rejection::TooFewPixels, Rejection::Aspect, Rejection::Flat];

/// How many are still to be made, by reason.
#[derive(Debug)]
pub(crate) struct Thumbnails([AtomicU8; SEEN.len()]);

impl Thumbnails {
    /// Those of one shard.
    pub(crate) fn of_shard() -> Self {
        Self([EACH; SEEN.len()].map(AtomicU8::new))
    }

    /// None at all.
    pub(crate) fn none() -> Self {
        Self([0; SEEN.len()].map(AtomicU8::new))
    }

    /// Whether one is to be made of a picture that was rejected for this reason; it counts as made then.
    pub(crate) fn take(&self, why: Rejection) -> bool {
        let left = SEEN.iter().position(|&seen| seen == why).map(|n| &self.0[n]);
        let one_less = |left: u8| left.checked_sub(1);
        left.is_some_and(|left| left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok())
    }
}
