//! The queue of finished batches. It is short as long as the training thread never waits, and grows after it had to. The
//! first ones in it are begun with: a GPU copies them to its memory.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The length at first, and the least ...
const MIN_LENGTH: usize = 2;
/// ... and the greatest one, if all items together have ...
const MAX_LENGTH: usize = 16;
/// ... at most this many bytes.
const MAX_BYTES: usize = 64 << 20;
/// The length shrinks by one after this many items that were there when they were asked for.
const SHRINK_AFTER: u32 = 100;

/// So many items are begun with while they wait: one is ready when the one before it has been used up, and one more for
/// a thread that is late.
const BEGUN: usize = 2;

/// What is done with an item of a queue before it is taken.
pub(crate) trait Begin<T> {
    /// Does it, once, and waits for nothing.
    fn begin(&self, item: &mut T);
}

/// A queue between two threads whose length adapts.
#[derive(Debug)]
pub(crate) struct PrefetchQueue<T, B> {
    /// **The first items in it, [`BEGUN`] of them, are begun with, and no others.**
    state: Mutex<State<T>>,
    changed: Condvar,
    begin: B,
}

#[derive(Debug)]
struct State<T> {
    waiting: VecDeque<T>,
    limit: usize,
    /// How many items in a row were there when they were asked for.
    in_time: u32,
    started: bool,
    finished: bool,
    closed: bool,
}

impl<T, B: Begin<T>> PrefetchQueue<T, B> {
    /// An empty one.
    pub(crate) fn new(begin: B) -> Self {
        let waiting = VecDeque::new();
        let state = State { waiting, limit: MIN_LENGTH, in_time: 0, started: false, finished: false, closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), begin }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an item of that many bytes as soon as there is room; returns false if the queue was closed. One thread does.
    pub(crate) fn push(&self, mut item: T, bytes: usize) -> bool {
        let most = MAX_LENGTH.min(MAX_BYTES / bytes.max(1)).max(MIN_LENGTH);
        let mut state = self.state();
        while !state.closed && state.waiting.len() >= state.limit.min(most) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return false;
        }
        if state.waiting.len() < BEGUN {
            // Meanwhile items only leave. Who closes the queue or asks for one of them does not wait for the device.
            drop(state);
            self.begin.begin(&mut item);
            state = self.state();
        }
        state.waiting.push_back(item);
        self.changed.notify_all();
        !state.closed
    }

    /// The producer has no more items.
    pub(crate) fn finish(&self) {
        self.state().finished = true;
        self.changed.notify_all();
    }

    /// The consumer takes no more items.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// The next item; None after the last one, or if `cancelled` returns true while there is none yet.
    pub(crate) fn pop(&self, cancelled: impl Fn() -> bool) -> Option<T> {
        let mut state = self.state();
        // Everybody waits for the first item, so that one does not count.
        let waited = state.waiting.is_empty() && !state.finished && state.started;
        loop {
            if let Some(item) = state.waiting.pop_front() {
                if let Some(next) = state.waiting.get_mut(BEGUN - 1) {
                    self.begin.begin(next);
                }
                state.adapt(waited);
                self.changed.notify_all();
                return Some(item);
            }
            if state.finished || cancelled() {
                return None;
            }
            let wait = self.changed.wait_timeout(state, Duration::from_millis(50));
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<T> State<T> {
    fn adapt(&mut self, waited: bool) {
        self.started = true;
        if waited {
            self.in_time = 0;
            self.limit = (2 * self.limit).min(MAX_LENGTH);
        } else {
            self.in_time += 1;
            if self.in_time == SHRINK_AFTER {
                self.in_time = 0;
                self.limit = (self.limit - 1).max(MIN_LENGTH);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Begins with items by writing them down.
    #[derive(Default)]
    struct Begun(Mutex<Vec<u32>>);

    impl Begin<u32> for Begun {
        fn begin(&self, item: &mut u32) {
            self.0.lock().expect("no panic").push(*item);
        }
    }

    fn queue() -> PrefetchQueue<u32, Begun> {
        PrefetchQueue::new(Begun::default())
    }

    #[test]
    fn the_first_two_items_are_begun_with_each_once_and_in_their_order() {
        let queue = queue();
        queue.state().limit = MAX_LENGTH;
        let begun = || queue.begin.0.lock().expect("no panic").clone();
        for i in 0..5 {
            queue.push(i, 1);
            assert_eq!(begun(), [0, 1][..2.min(i as usize + 1)]);
        }
        for i in 0..5 {
            assert_eq!(queue.pop(|| false), Some(i));
            assert_eq!(begun(), [0, 1, 2, 3, 4][..5.min(i as usize + 3)]);
        }
        queue.push(5, 1);
        assert_eq!(begun(), [0, 1, 2, 3, 4, 5], "nothing was before it");
        queue.close();
        queue.push(6, 1);
        assert_eq!(begun().len(), 6, "nobody will take it");
    }

    #[test]
    fn the_queue_grows_after_a_wait_and_shrinks_without_one() {
        let queue = queue();
        let limit = || queue.state().limit;
        for i in 0..2 {
            assert!(queue.push(i, 1));
        }
        assert_eq!((queue.pop(|| false), queue.pop(|| false)), (Some(0), Some(1)));
        assert_eq!(limit(), MIN_LENGTH);
        std::thread::scope(|scope| {
            let (asked, waits) = std::sync::mpsc::channel();
            let next = scope.spawn({
                let queue = &queue;
                // Asked for each time that there is nothing yet.
                move || queue.pop(|| asked.send(()).is_err())
            });
            waits.recv().expect("it found nothing");
            queue.push(2, 1);
            assert_eq!(next.join().expect("no panic"), Some(2));
        });
        assert_eq!(limit(), 2 * MIN_LENGTH);
        for i in 0..2 * SHRINK_AFTER {
            queue.push(i, 1);
            assert_eq!(queue.pop(|| false), Some(i));
        }
        assert_eq!(limit(), MIN_LENGTH);
    }

    #[test]
    fn a_finished_queue_ends_after_its_last_item_and_a_closed_one_takes_no_more() {
        let queue = queue();
        queue.push(1, 1);
        queue.finish();
        assert_eq!((queue.pop(|| false), queue.pop(|| false)), (Some(1), None));
        let full = self::queue();
        full.push(1, MAX_BYTES);
        full.push(2, MAX_BYTES);
        std::thread::scope(|scope| {
            let put = scope.spawn(|| full.push(3, MAX_BYTES));
            full.close();
            assert!(!put.join().expect("no panic"));
        });
        assert_eq!(self::queue().pop(|| true), None);
    }
}
