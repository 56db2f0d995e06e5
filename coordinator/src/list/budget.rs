//! Ends the reading of what has no end.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

/// How many bytes may still be read, which is set anew for each thing that is read.
#[derive(Debug)]
pub(super) struct Budget(Rc<Cell<u64>>);

impl Budget {
    pub(super) fn new(bytes: u64) -> Self {
        Self(Rc::new(Cell::new(bytes)))
    }

    pub(super) fn set(&self, bytes: u64) {
        self.0.set(bytes);
    }

    /// The source, which fails with this error once the budget is used up.
    pub(super) fn of<R>(&self, source: R, error: String) -> Budgeted<R> {
        Budgeted { source, left: Rc::clone(&self.0), error }
    }
}

pub(super) struct Budgeted<R> {
    source: R,
    left: Rc<Cell<u64>>,
    error: String,
}

impl<R: Read> Read for Budgeted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        match self.left.get().checked_sub(read as u64) {
            Some(left) => self.left.set(left),
            None => return Err(io::Error::new(io::ErrorKind::InvalidData, self.error.clone())),
        }
        Ok(read)
    }
}
