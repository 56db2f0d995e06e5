//! Memory for pictures that are being decoded, over all threads together: how much of it a picture takes is known from
//! its header, before anything is decoded, whatever its author packed into few bytes.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The part of it that ordinary threads share; the rest is for the one picture that is larger.
const SHARED: u64 = 4;
/// The part of what they share that one picture may have there.
const LARGEST: u64 = 4;

/// The memory.
#[derive(Debug)]
pub(crate) struct DecodeMemory {
    all: u64,
    free: Mutex<u64>,
    given_back: Condvar,
}

/// Where a picture has its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// Here, and now.
    Here,
    /// On the thread for those that are so large that they are decoded one at a time.
    Alone,
    /// Nowhere: it would take more than there is.
    Nowhere,
}

impl DecodeMemory {
    /// So many bytes in all.
    pub(crate) fn new(all: u64) -> Arc<Self> {
        Arc::new(Self { all, free: Mutex::new(all / SHARED), given_back: Condvar::new() })
    }

    /// The places of one thread; `alone`: it is the one for large pictures.
    pub(crate) fn places(self: &Arc<Self>, alone: bool) -> Places {
        Places { memory: Arc::clone(self), alone, held: 0 }
    }
}

/// What one thread has of the memory, for one picture at a time.
#[derive(Debug)]
pub(crate) struct Places {
    memory: Arc<DecodeMemory>,
    alone: bool,
    held: u64,
}

impl Places {
    /// Takes so many bytes, in the place of those that are held; waits for others to give theirs back, and calls
    /// `waiting` each second meanwhile.
    pub(crate) fn take(&mut self, bytes: u64, waiting: impl Fn()) -> Room {
        let shared = self.memory.all / SHARED;
        if bytes > self.memory.all - shared {
            return Room::Nowhere;
        }
        if self.alone {
            return Room::Here;
        }
        if bytes > shared / LARGEST {
            return Room::Alone;
        }
        // Whoever waited with something in hand might wait for whoever waits for that.
        self.release();
        let mut free = self.memory.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free < bytes {
            let waited = self.memory.given_back.wait_timeout(free, Duration::from_secs(1));
            free = waited.unwrap_or_else(PoisonError::into_inner).0;
            waiting();
        }
        *free -= bytes;
        self.held = bytes;
        Room::Here
    }

    /// Gives back what is held.
    pub(crate) fn release(&mut self) {
        let held = std::mem::take(&mut self.held);
        if held > 0 {
            *self.memory.free.lock().unwrap_or_else(PoisonError::into_inner) += held;
            self.memory.given_back.notify_all();
        }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_share_a_part_of_the_memory_and_wait_for_it_and_larger_ones_have_the_rest() {
        let memory = DecodeMemory::new(1600);
        let (mut one, mut alone) = (memory.places(false), memory.places(true));
        let never = || panic!("nobody waits");
        assert_eq!(one.take(100, never), Room::Here);
        assert_eq!(one.take(101, never), Room::Alone);
        assert_eq!(alone.take(1200, never), Room::Here);
        assert_eq!([one.take(1201, never), alone.take(1201, never)], [Room::Nowhere; 2]);

        let mut others: Vec<Places> = (0..3).map(|_| memory.places(false)).collect();
        for other in &mut others {
            assert_eq!(other.take(100, never), Room::Here);
        }
        assert_eq!(one.take(90, never), Room::Here, "in the place of what it held");
        let mut late = memory.places(false);
        let (waits, waited) = std::sync::mpsc::channel();
        let late = std::thread::spawn(move || {
            let room = late.take(20, || waits.send(()).expect("the test waits"));
            (room, late)
        });
        waited.recv_timeout(Duration::from_secs(10)).expect("it waits");
        assert!(!late.is_finished());
        others.pop();
        let (room, late) = late.join().expect("no panic");
        assert_eq!((room, late.held), (Room::Here, 20));
        drop((one, late, others));
        assert_eq!(*memory.free.lock().expect("nobody panicked"), 400);
    }
}
