//! How many samples the classes of a dataset with `per_class` still want. Pure.

use std::collections::{BTreeMap, HashMap};

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
}

impl Wanted {
    pub(super) fn new(per_class: u32, classes: usize) -> Self {
        Self {
            per_class: per_class.into(),
            counted: vec![0; classes],
            committed: vec![0; classes],
            leased: vec![0; classes],
            by_shard: BTreeMap::new(),
        }
    }

    pub(super) fn progressed(&mut self, shard: u32, kept: &HashMap<u32, u64>) {
        self.dropped(shard);
        for (&label, samples) in kept {
            if let Some(class) = self.leased.get_mut(label as usize) {
                *class += samples;
            }
        }
        self.by_shard.insert(shard, kept.clone());
    }

    pub(super) fn dropped(&mut self, shard: u32) {
        for (label, samples) in self.by_shard.remove(&shard).unwrap_or_default() {
            if let Some(class) = self.leased.get_mut(label as usize) {
                *class -= samples;
            }
        }
    }

    pub(super) fn committed(&mut self, index: &ShardIndex) {
        self.dropped(index.shard);
        for tar in index.tars.values() {
            for (label, samples) in tar.per_class.iter() {
                if let Some(class) = self.committed.get_mut(label as usize) {
                    *class += u64::from(samples);
                }
            }
        }
    }

    /// A manifest names all shards that are committed.
    pub(super) fn sealed(&mut self, manifest: &Manifest) {
        self.committed.fill(0);
        for (counted, class) in self.counted.iter_mut().zip(&manifest.classes) {
            *counted = class.total();
        }
    }

    /// What each class still wants beyond all that is known of; 0: it is full.
    pub(super) fn by_label(&self) -> HashMap<u32, u64> {
        let wanted = |(label, counted): (u32, &u64)| {
            let lacking = self.per_class.saturating_sub(*counted);
            let goal = lacking + lacking.div_ceil(SPARE);
            (label, goal.saturating_sub(self.committed[label as usize] + self.leased[label as usize]))
        };
        (0..).zip(&self.counted).map(wanted).collect()
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
        assert_eq!(wanted.by_label(), [(0, 105), (1, 105)].into());
        wanted.progressed(3, &[(0, 5)].into());
        wanted.progressed(3, &[(0, 25), (1, 1), (9, 9)].into());
        wanted.progressed(4, &[(0, 10)].into());
        assert_eq!(wanted.by_label(), [(0, 70), (1, 104)].into());
        wanted.dropped(4);
        wanted.committed(&index(3, [(0, 60)].into_iter().collect()));
        assert_eq!(wanted.by_label(), [(0, 0), (1, 105)].into(), "a class that has more than enough is full");

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
        assert_eq!(wanted.by_label(), [(0, 3), (1, 0)].into(), "two were duplicates");
    }
}
