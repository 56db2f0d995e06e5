//! Finished batches that wait for the training thread: few as long as it never waits for them, more after it had to.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// So many may wait at first, and at the least ...
const LEAST: usize = 2;
/// ... and at the most, if all of them together have ...
const MOST: usize = 16;
/// ... at most so many bytes.
const MOST_BYTES: usize = 64 << 20;
/// After so many that were there when they were asked for, one less may wait.
const EASY: u32 = 100;

/// A queue between two threads whose length adapts.
#[derive(Debug)]
pub(crate) struct Ready<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    waiting: VecDeque<T>,
    limit: usize,
    /// So many in a row were there when they were asked for.
    easy: u32,
    given: bool,
    ended: bool,
    unwanted: bool,
}

impl<T> Default for Ready<T> {
    fn default() -> Self {
        let waiting = VecDeque::new();
        let state = State { waiting, limit: LEAST, easy: 0, given: false, ended: false, unwanted: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl<T> Ready<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one of so many bytes, once there is room; false if nobody wants it any more.
    pub(crate) fn put(&self, one: T, bytes: usize) -> bool {
        let most = MOST.min(MOST_BYTES / bytes.max(1)).max(LEAST);
        let mut state = self.state();
        while !state.unwanted && state.waiting.len() >= state.limit.min(most) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting.push_back(one);
        self.changed.notify_all();
        !state.unwanted
    }

    /// No more will come.
    pub(crate) fn end(&self) {
        self.state().ended = true;
        self.changed.notify_all();
    }

    /// No more are wanted.
    pub(crate) fn refuse(&self) {
        self.state().unwanted = true;
        self.changed.notify_all();
    }

    /// The next one; None after the last, and when `given_up` says so while there is none yet.
    pub(crate) fn next(&self, given_up: impl Fn() -> bool) -> Option<T> {
        let mut state = self.state();
        // The first one is always waited for.
        let waited = state.waiting.is_empty() && !state.ended && state.given;
        loop {
            if let Some(one) = state.waiting.pop_front() {
                state.adapt(waited);
                self.changed.notify_all();
                return Some(one);
            }
            if state.ended || given_up() {
                return None;
            }
            let wait = self.changed.wait_timeout(state, Duration::from_millis(50));
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<T> State<T> {
    fn adapt(&mut self, waited: bool) {
        self.given = true;
        if waited {
            self.easy = 0;
            self.limit = (2 * self.limit).min(MOST);
        } else {
            self.easy += 1;
            if self.easy == EASY {
                self.easy = 0;
                self.limit = (self.limit - 1).max(LEAST);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_may_wait_after_one_was_waited_for_and_fewer_when_none_is() {
        let ready = Ready::default();
        let limit = || ready.state().limit;
        for i in 0..2 {
            assert!(ready.put(i, 1));
        }
        assert_eq!((ready.next(|| false), ready.next(|| false)), (Some(0), Some(1)));
        assert_eq!(limit(), LEAST);
        std::thread::scope(|scope| {
            let next = scope.spawn(|| ready.next(|| false));
            while ready.state.try_lock().is_err() {}
            std::thread::sleep(Duration::from_millis(20));
            ready.put(2, 1);
            assert_eq!(next.join().expect("no panic"), Some(2));
        });
        assert_eq!(limit(), 2 * LEAST);
        for i in 0..2 * EASY {
            ready.put(i, 1);
            assert_eq!(ready.next(|| false), Some(i));
        }
        assert_eq!(limit(), LEAST);
    }

    #[test]
    fn the_end_is_told_after_the_last_and_to_who_puts_in_vain() {
        let ready = Ready::default();
        ready.put(1, 1);
        ready.end();
        assert_eq!((ready.next(|| false), ready.next(|| false)), (Some(1), None));
        let full = Ready::default();
        full.put(1, MOST_BYTES);
        full.put(2, MOST_BYTES);
        std::thread::scope(|scope| {
            let put = scope.spawn(|| full.put(3, MOST_BYTES));
            full.refuse();
            assert!(!put.join().expect("no panic"));
        });
        assert_eq!(Ready::<u32>::default().next(|| true), None);
    }
}
