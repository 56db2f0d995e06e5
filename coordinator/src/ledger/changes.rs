//! What has become of single shards since somebody last looked, so that whoever counts them need not count all anew.

use proto::ShardId;

/// Changes that are remembered; after more of them it is no more work to count anew.
const MOST: usize = 1024;

/// A shard was leased or is no longer, or is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) id: ShardId,
    /// Whether its dataset is paused.
    pub(crate) is_paused: bool,
    pub(crate) was_leased: bool,
    /// None: it is committed.
    pub(crate) is_leased: Option<bool>,
}

/// All changes, in order.
#[derive(Debug)]
pub(super) struct Changes {
    /// They are not all here.
    all: bool,
    known: Vec<Change>,
}

impl Changes {
    /// Nobody has looked yet.
    pub(super) fn new() -> Self {
        Self { all: true, known: Vec::new() }
    }

    /// Many shards may have come, gone, or changed.
    pub(super) fn note_all(&mut self) {
        self.all = true;
        self.known.clear();
    }

    pub(super) fn note(&mut self, change: Change) {
        match self.known.len() {
            _ if self.all => {}
            MOST.. => self.note_all(),
            _ => self.known.push(change),
        }
    }

    /// Those since the last call; None: all has to be counted.
    pub(super) fn take(&mut self) -> Option<Vec<Change>> {
        let known = std::mem::take(&mut self.known);
        (!std::mem::take(&mut self.all)).then_some(known)
    }
}
