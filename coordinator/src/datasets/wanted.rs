//! How many samples the classes of a dataset with `per_class` still want. Pure.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use proto::ShardIndex;
use proto::manifest::Manifest;

/// One in so many samples more than are wanted is fetched at once, because some turn out to be duplicates.
const SPARE: u64 = 20;

/// The samples of each class, by label.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    per_class: u64,
    /// That count in the latest manifest.
    counted: Vec<u64>,
    /// Of committed shards that it does not name.
    committed: Vec<u64>,
    /// Of leased shards, as far as workers have told.
    leased: Vec<u64>,
    /// The same by shard: what is taken away again.
    by_shard: BTreeMap<u32, HashMap<u32, u64>>,
    /// What each class still wants, as all that comes to. Every renewal of a lease is answered with it.
    wanted: Arc<HashMap<u32, u64>>,
}

impl Wanted {
    pub(super) fn new(per_class: u32, classes: usize) -> Self {
        let mut new = Self {
            per_class: per_class.into(),
            counted: vec![0; classes],
            committed: vec![0; classes],
            leased: vec![0; classes],
            by_shard: BTreeMap::new(),
            wanted: Arc::default(),
        };
        new.want(0..classes as u32);
        new
    }

    pub(super) fn progressed(&mut self, shard: u32, kept: &HashMap<u32, u64>) {
        let before = self.take(shard);
        for (&label, samples) in kept {
            if let Some(class) = self.leased.get_mut(label as usize) {
                *class += samples;
            }
        }
        self.by_shard.insert(shard, kept.clone());
        self.want(before.into_keys().chain(kept.keys().copied()));
    }

    pub(super) fn dropped(&mut self, shard: u32) {
        let before = self.take(shard);
        self.want(before.into_keys());
    }

    /// Takes away what was told of a leased shard.
    fn take(&mut self, shard: u32) -> HashMap<u32, u64> {
        let kept = self.by_shard.remove(&shard).unwrap_or_default();
        for (&label, samples) in &kept {
            if let Some(class) = self.leased.get_mut(label as usize) {
                *class -= samples;
            }
        }
        kept
    }

    pub(super) fn committed(&mut self, index: &ShardIndex) {
        self.dropped(index.shard);
        for tar in index.tars.values() {
            for (label, samples) in tar.per_class.iter() {
                if let Some(class) = self.committed.get_mut(label as usize) {
                    *class += u64::from(samples);
                }
            }
            self.want(tar.per_class.iter().map(|(label, _)| label));
        }
    }

    /// A manifest names all shards that are committed.
    pub(super) fn sealed(&mut self, manifest: &Manifest) {
        self.committed.fill(0);
        for (counted, class) in self.counted.iter_mut().zip(&manifest.classes) {
            *counted = class.total();
        }
        self.want(0..self.counted.len() as u32);
    }

    /// What each class still wants beyond all that is known of; 0: it is full.
    pub(super) fn by_label(&self) -> Arc<HashMap<u32, u64>> {
        Arc::clone(&self.wanted)
    }

    /// Reckons anew what these classes want.
    fn want(&mut self, labels: impl IntoIterator<Item = u32>) {
        for label in labels {
            let Some(counted) = self.counted.get(label as usize) else { continue };
            let lacking = self.per_class.saturating_sub(*counted);
            let goal = lacking + lacking.div_ceil(SPARE);
            let wanted = goal.saturating_sub(self.committed[label as usize] + self.leased[label as usize]);
            if self.wanted.get(&label) != Some(&wanted) {
                Arc::make_mut(&mut self.wanted).insert(label, wanted);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::index::{ClassCounts, Tar};
    use proto::manifest::ManifestClass;
    use proto::{Attempt, OutcomeCounts, Split};

    fn index(shard: u32, per_class: ClassCounts) -> ShardIndex {
        let tar = Tar {
            key: String::new(),
            bytes: 0,
            sha256: String::new(),
            samples: per_class.total(),
            per_class,
            blocks: Vec::new(),
            moments: Default::default(),
        };
        ShardIndex {
            version: 1,
            nonce: String::new(),
            writer: String::new(),
            shard,
            attempt: Attempt { term: 1, n: 1 },
            outcomes: OutcomeCounts::default(),
            tars: BTreeMap::from([(Split::Train, tar.clone()), (Split::Test, tar)]),
            outcomes_file: None,
        }
    }

    #[test]
    fn a_class_wants_what_neither_manifest_nor_shards_nor_workers_have_and_some_to_spare() {
        let mut wanted = Wanted::new(100, 2);
        assert_eq!(*wanted.by_label(), [(0, 105), (1, 105)].into());
        wanted.progressed(3, &[(0, 5)].into());
        let told = wanted.by_label();
        wanted.progressed(3, &[(0, 5)].into());
        assert!(Arc::ptr_eq(&told, &wanted.by_label()), "nothing has changed");
        wanted.progressed(3, &[(0, 25), (1, 1), (9, 9)].into());
        wanted.progressed(4, &[(0, 10)].into());
        assert_eq!(*wanted.by_label(), [(0, 70), (1, 104)].into());
        assert_eq!(*told, [(0, 100), (1, 105)].into(), "what was told stays as it was");
        wanted.dropped(4);
        wanted.committed(&index(3, [(0, 60)].into_iter().collect()));
        assert_eq!(*wanted.by_label(), [(0, 0), (1, 105)].into(), "a class that has more than enough is full");

        let class = |samples| ManifestClass {
            synset: String::new(),
            name: String::new(),
            urls: 0,
            outcomes: OutcomeCounts::default(),
            samples: [(Split::Train, samples)].into(),
        };
        let manifest = Manifest {
            format: 1,
            nonce: String::new(),
            dataset: "birds-1".parse().expect("an id"),
            version: 1,
            rounds: 1,
            resize: Default::default(),
            smallest_side: 0,
            classes: vec![class(98), class(100)],
            outcomes: OutcomeCounts::default(),
            skipped: BTreeMap::new(),
            near_duplicates: 0,
            damaged: Vec::new(),
            mean: [0.0; 3],
            std: [1.0; 3],
            shards: Vec::new(),
        };
        wanted.sealed(&manifest);
        assert_eq!(*wanted.by_label(), [(0, 3), (1, 0)].into(), "two were duplicates");
    }
}
