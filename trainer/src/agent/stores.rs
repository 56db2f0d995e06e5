//! The stores of generations that the agent serves.

use std::collections::HashMap;

use crate::torch::Store;

/// One of each run: the newest generation's.
#[derive(Default)]
pub(super) struct Stores(HashMap<String, (u64, Store)>);

impl Stores {
    /// Serves a generation's store in the place of an older one's, unless there is a newer one's.
    pub(super) fn keep(&mut self, run: String, generation: u64, store: Store) {
        if self.0.get(&run).is_none_or(|(newest, _)| *newest < generation) {
            close(self.0.insert(run, (generation, store)));
        }
    }

    /// Ends the run's store if it is of such a generation: ranks that still wait for each other there fail at once.
    pub(super) fn close_if(&mut self, run: &str, generation: impl Fn(u64) -> bool) {
        if self.0.get(run).is_some_and(|(of, _)| generation(*of)) {
            close(self.0.remove(run));
        }
    }
}

/// Drops a store on a blocking thread, because that joins the server's thread.
fn close(store: Option<(u64, Store)>) {
    if let Some(store) = store {
        tokio::task::spawn_blocking(move || drop(store));
    }
}
