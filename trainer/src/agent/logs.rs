//! Writes what ranks print on stderr to the store.

use std::collections::HashMap;
use std::sync::Arc;

use object_store::ObjectStore;
use proto::keys;
use tokio::task::JoinSet;
use tracing::warn;

use crate::data::store::put;

/// Lines beyond this are dropped while the store does not take them.
const MOST_BYTES: usize = 4 << 20;

/// Lines that are not in the store yet, by rank.
pub(crate) struct Logs {
    store: Arc<dyn ObjectStore>,
    open: HashMap<(String, u64, u32), Open>,
    writes: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Open {
    text: String,
    files: u64,
}

impl Logs {
    /// No lines yet.
    pub(crate) fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self { store, open: HashMap::new(), writes: JoinSet::new() }
    }

    /// Adds a line of a rank.
    pub(crate) fn line(&mut self, run: &str, generation: u64, rank: u32, line: &str) {
        let open = self.open.entry((run.to_owned(), generation, rank)).or_default();
        if open.text.len() < MOST_BYTES {
            open.text.push_str(line);
            open.text.push('\n');
        }
    }

    /// Starts to write all new lines, unless a write is still in flight.
    pub(crate) fn flush(&mut self) {
        while self.writes.try_join_next().is_some() {}
        if !self.writes.is_empty() {
            return;
        }
        for ((run, generation, rank), open) in &mut self.open {
            if open.text.is_empty() {
                continue;
            }
            open.files += 1;
            let key = keys::logs(run, *generation, *rank, open.files);
            let (store, text) = (self.store.clone(), std::mem::take(&mut open.text));
            self.writes.spawn(async move {
                if let Err(error) = put(&store, &key, text.into()).await {
                    warn!(key, error = format!("{error:#}"), "log not written");
                }
            });
        }
    }

    /// Forgets a run's file counts after its last rank here has ended.
    pub(crate) fn close(&mut self, run: &str) {
        self.flush();
        self.open.retain(|(of, ..), open| of != run || !open.text.is_empty());
    }

    /// Writes all remaining lines and waits for it.
    pub(crate) async fn finish(&mut self) {
        while self.writes.join_next().await.is_some() {}
        self.flush();
        while self.writes.join_next().await.is_some() {}
    }
}
