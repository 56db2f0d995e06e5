use std::collections::BTreeSet;
use std::time::Instant;

use fastrand::Rng;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use proto::gist::{self, GistList, GistWriter};
use proto::index::{ClassCounts, Tar};
use proto::outcomes::OutcomeRow;
use proto::rejection::outcome_name;
use proto::round::{Cause, Slice};
use proto::shard::Block;
use proto::slice::SliceWriter;
use proto::{Attempt, Class, Duplicates, Outcome, Rejection, Splits};

use self::counted::Counted;
use super::*;
use crate::catalog::{Catalog, RoundStart};
use crate::datasets::rounds::{Retry, gather};

mod bounded;
mod counted;

/// A dataset that grows round by round, of random pictures, some of which are the same, or look alike.
struct World {
    rng: Rng,
    runtime: tokio::runtime::Runtime,
    objects: Arc<Counted>,
    id: DatasetId,
    spec: DatasetSpec,
    rounds: Vec<Round>,
    /// Labels of the URLs so far.
    urls: Vec<u32>,
    /// What was damaged, with what it was before.
    harmed: Vec<(String, Bytes)>,
    /// Of so many slices one is closed.
    closed: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let classes = (0..4).map(|n| Class { synset: format!("n{n}"), name: format!("class {n}") }).collect();
        let spec = DatasetSpec {
            classes,
            per_class: [0, 0, 9][rng.usize(..3)],
            duplicates: Duplicates { many_urls: rng.u32(3..8), near_bits: rng.u32(0..5) },
            splits: Splits { column: ["", "", "split"][rng.usize(..3)].to_owned(), ..Splits::default() },
            ..DatasetSpec::default()
        };
        Self {
            rng,
            runtime: tokio::runtime::Runtime::new().expect("threads"),
            objects: Arc::default(),
            id: "birds-1".parse().expect("an id"),
            spec,
            rounds: Vec::new(),
            urls: Vec::new(),
            harmed: Vec::new(),
            closed: 12,
        }
    }

    fn put(&self, key: &str, bytes: impl Into<Bytes>) {
        self.runtime.block_on(self.objects.store.put(&Path::from(key), bytes.into().into())).expect(key);
    }

    fn get(&self, key: &str) -> Option<Bytes> {
        self.runtime.block_on(async { self.objects.store.get(&Path::from(key)).await.ok()?.bytes().await.ok() })
    }

    fn delete(&self, key: &str) {
        self.runtime.block_on(self.objects.store.delete(&Path::from(key))).expect(key);
    }

    fn keys(&self, folder: &str) -> Vec<String> {
        let listed = self.objects.store.list(Some(&Path::from(folder)));
        let listed: Vec<ObjectMeta> = self.runtime.block_on(listed.try_collect()).expect("lists");
        let mut keys: Vec<String> = listed.into_iter().map(|object| object.location.to_string()).collect();
        keys.sort();
        keys
    }

    /// Another round: new URLs, and some that are fetched again.
    fn grow(&mut self, shards: u32, urls: u32) {
        let first_key = self.urls.len() as u64;
        let new = self.rng.u32(urls / 2..=urls) * shards;
        let mut all: Vec<u64> = (0..first_key).filter(|_| self.rng.u32(..10) == 0).collect();
        let retried = all.len() as u64;
        all.extend(first_key..first_key + u64::from(new));
        self.urls.extend((0..new).map(|_| self.rng.u32(..4)));
        self.rng.shuffle(&mut all);
        let first_slice = self.rounds.last().map_or(0, |round| round.shards().end) + self.rng.u32(..2);
        let mut slices = Vec::new();
        for (shard, keys) in (first_slice..).zip(all.chunks(all.len().div_ceil(shards as usize).max(1))) {
            let mut writer = SliceWriter::new().expect("memory");
            for &key in keys {
                let synset = format!("n{}", self.urls[key as usize]);
                writer.push(key, synset.as_bytes(), format!("http://h/{key}").as_bytes()).expect("memory");
            }
            let bytes = writer.finish().expect("memory");
            slices.push(Slice { urls: keys.len() as u32, sha256: sha256_hex(&bytes), once: false });
            self.put(&keys::slice(&self.id.shard(shard)), bytes);
            self.put_shard(shard, keys);
        }
        let mut urls_per_class = BTreeMap::new();
        for label in &self.urls[first_key as usize..] {
            *urls_per_class.entry(format!("n{label}")).or_default() += 1;
        }
        self.rounds.push(Round {
            format: 1,
            nonce: "n".to_owned(),
            request_id: "r".to_owned(),
            traceparent: String::new(),
            cause: Cause::Request,
            accepts_damage: false,
            round: self.rounds.len() as u32 + 1,
            first_slice,
            slices,
            large_sites: None,
            first_key,
            new_urls: u64::from(new),
            keys: u64::from(new),
            urls_per_class,
            retried: [(Err(Rejection::Timeout), retried)].into_iter().collect(),
            not_chosen: 0,
            known: 0,
            repeated: 0,
            several: 0,
            bad_lines: 0,
            bad_line_examples: Vec::new(),
        });
    }

    fn row(&mut self, key: u64) -> OutcomeRow {
        let rejections = [
            Rejection::NotFound,
            Rejection::Timeout,
            Rejection::ClassFull,
            Rejection::Unfetched,
            Rejection::HttpStatus,
        ];
        let outcome: Outcome = if self.rng.u32(..3) > 0 { Ok(()) } else { Err(rejections[self.rng.usize(..5)]) };
        let mut row = OutcomeRow {
            key: key as i64,
            synset: format!("n{}", self.urls[key as usize]),
            url: format!("http://h/{key}"),
            outcome: outcome_name(outcome).to_owned(),
            http_status: [None, Some(404), Some(503)][self.rng.usize(..3)],
            ..OutcomeRow::default()
        };
        if outcome.is_err() {
            return row;
        }
        // A few contents come often, others once.
        let content = if self.rng.u32(..3) == 0 { self.rng.u64(..12) } else { 1000 + self.rng.u64(..) };
        let drawn = if self.spec.splits.column.is_empty() { content } else { self.rng.u64(..) };
        let split = Split::ALL[[0, 0, 0, 1, 2][(drawn % 5) as usize]];
        row.sha256 = Some(sha256_hex(&content.to_le_bytes()));
        // What looks alike differs in few bits.
        let look = (content % 7).wrapping_mul(0xd1b5_4a32_d192_ed03) ^ (1 << self.rng.u32(..64));
        let look = if content % 2 == 0 { look } else { content.wrapping_mul(0xff51_afd7_ed55_8ccd) };
        row.phash = (self.rng.u32(..8) > 0).then(|| format!("{look:016x}"));
        row.split = Some(split.name().to_owned());
        let sum = || 1 + content % 250;
        row.set_moments(&Moments { pixels: 1, sum: [sum(), key % 7, 3], sum_of_squares: [sum().pow(2), key, 9] });
        if self.rng.u32(..20) == 0 {
            row.columns = Some(proto::columns::with_classes("{}", ["n0", "n1"].into_iter()));
        }
        row
    }

    /// What a worker leaves; tars are as long as they must be, and nothing is in them.
    fn put_shard(&mut self, shard: u32, keys: &[u64]) {
        let (of, attempt) = (self.id.shard(shard), Attempt { term: 1, n: u64::from(shard) });
        let mut index = ShardIndex {
            version: 1,
            nonce: "n".to_owned(),
            writer: "w".to_owned(),
            shard,
            attempt,
            outcomes: OutcomeCounts::default(),
            tars: BTreeMap::new(),
            outcomes_file: None,
        };
        if self.rng.u32(..self.closed) == 0 {
            index.outcomes.add(Err(Rejection::SliceFailed), keys.len() as u64);
            return self.put(&keys::index(&of), index.to_json());
        }
        let mut rows: Vec<OutcomeRow> = keys.iter().map(|&key| self.row(key)).collect();
        for row in &mut rows {
            index.outcomes.add(row.outcome().expect("a name"), 1);
            let Some(split) = row.split() else { continue };
            let tar = index.tars.entry(split).or_insert_with(|| Tar {
                key: keys::tar(&of, split, attempt),
                bytes: 0,
                sha256: format!("{shard}-{split}"),
                samples: 0,
                per_class: ClassCounts::default(),
                blocks: Vec::new(),
                moments: Moments::default(),
            });
            row.offset = Some(tar.bytes as i64 + 100);
            if tar.samples.is_multiple_of(3) {
                tar.blocks.push(Block { offset: tar.bytes, length: 0, samples: 0 });
            }
            let block = tar.blocks.last_mut().expect("just pushed");
            (block.length, block.samples) = (block.length + 512, block.samples + 1);
            (tar.bytes, tar.samples) = (tar.bytes + 512, tar.samples + 1);
            tar.per_class.add(self.urls[row.key as usize]);
            tar.moments.add(&row.moments());
        }
        for tar in index.tars.values() {
            self.put(&tar.key, vec![0; tar.bytes as usize]);
        }
        let (bytes, key) = (table::write(&rows).expect("encodes"), keys::outcomes(&of, attempt));
        index.outcomes_file =
            Some(StoredFile { key: key.clone(), bytes: bytes.len() as u64, sha256: sha256_hex(&bytes) });
        self.put(&key, bytes);
        self.put(&keys::index(&of), index.to_json());
    }

    /// Objects of a kind, of committed shards.
    fn harm(&mut self, folder: &str) {
        let keys = self.keys(folder);
        if keys.is_empty() {
            return;
        }
        let key = keys[self.rng.usize(..keys.len())].clone();
        let before = self.get(&key).expect("it is listed");
        match self.rng.u32(..3) {
            0 => self.delete(&key),
            1 => self.put(&key, before.slice(..before.len() / 2)),
            _ => {
                let mut other = before.to_vec();
                let at = self.rng.usize(..other.len().max(1));
                other[at] ^= 1 << self.rng.u32(..8);
                self.put(&key, other);
            }
        }
        if !self.harmed.iter().any(|(harmed, _)| *harmed == key) {
            self.harmed.push((key, before));
        }
    }

    fn mend(&mut self) {
        if !self.harmed.is_empty() {
            let (key, bytes) = self.harmed.swap_remove(self.rng.usize(..self.harmed.len()));
            self.put(&key, bytes);
        }
    }

    fn seal(&self, version: u32, base: Option<&Manifest>, objects: &Arc<Counted>) -> Result<Manifest, SealError> {
        let sealing = Sealing {
            dataset: self.id.clone(),
            spec: self.spec.clone(),
            version,
            rounds: self.rounds.clone(),
            folder: None,
            tolerance: Tolerance { any: true, ..Tolerance::default() },
            base: base.cloned().map(Arc::new),
        };
        let store = Store::new(Arc::clone(objects) as Arc<dyn ObjectStore>);
        seal(self.runtime.handle(), &store, &sealing)
    }

    /// A copy of the store without any gists.
    fn without_gists(&self) -> Arc<Counted> {
        let copy = Arc::new(Counted::default());
        for key in self.keys("").into_iter().filter(|key| !key.contains("/gists")) {
            let bytes = self.get(&key).expect("it is listed");
            self.runtime.block_on(copy.store.put(&Path::from(key), bytes.into())).expect("memory");
        }
        copy
    }

    fn seal_fully(&self, version: u32) -> Manifest {
        self.seal(version, None, &self.without_gists()).expect("seals fully")
    }

    /// Another round of what is to be fetched again, and its lines, each with whether it is tried just once. Which of
    /// the slices of a large site has a line depends on the order in which shards were read.
    fn gather(&self, retry: &Retry, base: Option<&Manifest>, objects: &Arc<Counted>) -> (Round, Vec<(bool, String)>) {
        let store = Store::new(Arc::clone(objects) as Arc<dyn ObjectStore>);
        let tolerance = Tolerance { any: true, ..Tolerance::default() };
        let of = (&self.id, &self.spec);
        let history = History::new(self.runtime.handle(), &store, of, &self.rounds, &tolerance);
        let start = RoundStart { round: 99, first_slice: 9000, first_key: 9000, ..RoundStart::first("r") };
        let mut catalog = Catalog::new(&self.spec, start, None, Arc::default());
        gather(&history, base, &self.spec, retry, false, &mut catalog).expect("reads");
        let (sender, mut slices) = tokio::sync::mpsc::channel(1000);
        let mut round = catalog.cut(&mut self.spec.clone(), &sender).expect("cuts");
        drop(sender);
        let mut lines = Vec::new();
        while let Some((number, bytes)) = slices.blocking_recv() {
            let slice = &mut round.slices[(number - round.first_slice) as usize];
            slice.sha256.clear();
            let text = proto::slice::unpack(&bytes).expect("a slice");
            lines.extend(text.lines().map(|line| (slice.once, line.to_owned())));
        }
        lines.sort();
        (Round { nonce: String::new(), ..round }, lines)
    }

    /// A manifest, but for what is random in it: names, of which only what they name counts.
    fn meaning(&self, manifest: &Manifest) -> Manifest {
        let mut manifest = Manifest { nonce: String::new(), ..manifest.clone() };
        let unnamed = |file: &mut StoredFile| file.key.clear();
        for shard in &mut manifest.shards {
            shard.skips.as_mut().into_iter().chain(&mut shard.findings).for_each(unnamed);
        }
        manifest
    }

    fn retries(&self) -> [Retry; 3] {
        let some = || HashSet::from(["n1".to_owned(), "n3".to_owned()]);
        [
            Retry::Once { full: HashSet::new() },
            Retry::Transient { full: some(), all: false },
            Retry::Left { short: some() },
        ]
    }

    fn assert_whole(&self, manifest: &Manifest) {
        for file in manifest.shards.iter().flat_map(|shard| shard.skips.iter().chain(&shard.findings)) {
            let bytes = self.get(&file.key).expect("what a manifest names is there");
            assert_eq!((bytes.len() as u64, sha256_hex(&bytes)), (file.bytes, file.sha256.clone()), "{}", file.key);
        }
    }

    fn gist_list(&self, manifest: &Manifest) -> GistList {
        let key = keys::gist_list(&self.id, manifest.version, &manifest.nonce);
        GistList::from_json(&self.get(&key).expect("it is beside the manifest")).expect("a list")
    }
}

/// The shards of which something was read.
fn shards_of(read: &[(String, u64)]) -> BTreeSet<u64> {
    let is_part = |key: &str| ["/index/", "/outcomes/", "/slices/"].iter().any(|folder| key.contains(folder));
    read.iter().filter(|(key, _)| is_part(key)).filter_map(|(key, _)| keys::number(key).ok()).collect()
}

#[test]
fn a_version_that_is_sealed_upon_the_one_before_says_what_one_says_for_which_all_is_read() {
    let (mut skipped, mut damaged, mut shared, mut again) = (BTreeSet::new(), 0, 0, 0);
    let seeds = std::env::var("SEEDS").map_or(6, |text| text.parse().expect("a number"));
    for seed in 0..seeds {
        let mut world = World::new(seed);
        let mut base: Option<Manifest> = None;
        for version in 1..=5 {
            for _ in 0..world.rng.u32(1..=2) {
                let (shards, urls) = (world.rng.u32(1..=5), world.rng.u32(6..=24));
                world.grow(shards, urls);
            }
            let folder = keys::dataset(&world.id);
            if seed % 2 == 1 {
                let parts = ["index", "outcomes", "shards", "slices", "manifests"];
                for _ in 0..world.rng.u32(..3) {
                    let part = parts[world.rng.usize(..parts.len())];
                    world.harm(&format!("{folder}/{part}"));
                }
                if world.rng.bool() {
                    world.mend();
                }
            }
            let full = world.seal_fully(version);
            for retry in world.retries() {
                let gathered = world.gather(&retry, base.as_ref(), &world.objects);
                assert_eq!(gathered, world.gather(&retry, None, &world.without_gists()), "seed {seed}: {retry:?}");
                again += gathered.0.urls();
            }
            // One that is broken off leaves gists, but no manifest.
            if world.rng.u32(..4) == 0 {
                world.seal(version, base.as_ref(), &world.objects).expect("seals");
                let key = keys::manifest(&world.id, version);
                world.delete(&key);
            }
            let next = world.seal(version, base.as_ref(), &world.objects).expect("seals upon the one before");
            assert_eq!(world.meaning(&next), world.meaning(&full), "seed {seed}, version {version}");
            world.assert_whole(&next);
            skipped.extend(next.skipped.keys().copied());
            damaged += next.damaged.len();
            let folder = format!("{version:06}-{}", next.nonce);
            let files = next.shards.iter().flat_map(|shard| shard.skips.iter().chain(&shard.findings));
            shared += files.filter(|file| !file.key.contains(&folder)).count();
            base = Some(next);
        }
    }
    assert!(skipped.len() >= 6, "all of that is compared: {skipped:?}");
    assert!(damaged > 5 && shared > 50 && again > 500, "{damaged} damaged, {shared} shared, {again} again");
}

#[test]
fn of_what_the_version_before_covers_no_index_and_no_outcomes_are_read() {
    let mut world = World::new(2);
    world.grow(30, 20);
    let first = world.seal(1, None, &world.objects).expect("seals");
    let closed: BTreeSet<u64> =
        first.shards.iter().filter(|shard| shard.outcomes.is_none()).map(|shard| shard.shard.into()).collect();
    world.grow(3, 20);
    world.objects.take();
    let second = world.seal(2, Some(&first), &world.objects).expect("seals");
    let read = shards_of(&world.objects.take());
    let new: BTreeSet<u64> = world.rounds[1].shards().map(u64::from).collect();
    assert_eq!(read, &new | &closed, "what is new, and what was closed");
    // What looks otherwise than it did is read again, and nothing else.
    let of = world.id.shard(world.rounds[0].shards().find(|&shard| !closed.contains(&shard.into())).expect("one"));
    let json = world.get(&keys::index(&of)).expect("it is there");
    world.put(&keys::index(&of), json);
    world.seal(3, Some(&second), &world.objects).expect("seals");
    let closed_now = second.shards.iter().filter(|shard| shard.outcomes.is_none()).map(|shard| shard.shard.into());
    let expected: BTreeSet<u64> = closed_now.chain([u64::from(of.shard)]).collect();
    assert_eq!(shards_of(&world.objects.take()), expected);
}

#[test]
fn a_sealing_that_was_broken_off_is_taken_up_where_it_was() {
    let mut world = World::new(4);
    world.grow(12, 20);
    world.seal(1, None, &world.objects).expect("seals");
    world.delete(&keys::manifest(&world.id, 1));
    world.objects.take();
    let again = world.seal(1, None, &world.objects).expect("seals");
    let read = shards_of(&world.objects.take());
    let closed = again.shards.iter().filter(|shard| shard.outcomes.is_none()).map(|shard| shard.shard.into());
    assert_eq!(read, closed.collect());
}

#[test]
fn a_gist_that_says_something_else_would_be_told_by_the_comparison() {
    let mut world = World::new(6);
    world.grow(6, 24);
    let first = world.seal(1, None, &world.objects).expect("seals");
    world.grow(1, 10);
    let full = world.meaning(&world.seal_fully(2));
    let list = world.gist_list(&first);
    let object = &list.objects[0];
    let gists = gist::read(&world.id, object.round, &world.get(&object.file.key).expect("named")).expect("gists");
    let plants: [fn(&mut gist::Gist); 5] = [
        |gist| gist.rows.iter_mut().for_each(|row| row.label = (row.label + 1) % 4),
        |gist| gist.rows.iter_mut().for_each(|row| row.outcome = Err(Rejection::Dns)),
        |gist| gist.samples.iter_mut().for_each(|sample| sample.sha256 = Some([7; 32])),
        |gist| gist.samples.iter_mut().for_each(|sample| sample.several_classes = true),
        |gist| gist.index.tars.values_mut().for_each(|tar| tar.moments.sum[0] += 1000),
    ];
    for (n, plant) in plants.into_iter().enumerate() {
        let mut gists = gists.clone();
        gists.iter_mut().for_each(plant);
        let mut writer = GistWriter::default();
        gists.iter().for_each(|gist| writer.push(gist));
        let (_, bytes) = writer.finish(&world.id, object.round).expect("memory");
        let key = keys::gists(&world.id, 1, &first.nonce, object.round, &sha256_hex(&bytes));
        let mut list = list.clone();
        list.objects[0].file = StoredFile { key: key.clone(), bytes: bytes.len() as u64, sha256: sha256_hex(&bytes) };
        world.put(&key, bytes);
        world.put(&keys::gist_list(&world.id, 1, &first.nonce), list.to_json());
        let version = 10 + n as u32;
        let next = world.seal(version, Some(&first), &world.objects).expect("seals");
        assert_ne!(Manifest { version: 2, ..world.meaning(&next) }, full, "plant {n}");
    }
    world.put(&keys::gist_list(&world.id, 1, &first.nonce), list.to_json());
    let next = world.seal(20, Some(&first), &world.objects).expect("seals");
    assert_eq!(Manifest { version: 2, ..world.meaning(&next) }, full, "and nothing else would");
}

/// Prints what a version costs that adds 10 slices to `SLICES` of `URLS` URLs, read fully and upon the one before.
#[test]
#[ignore = "takes minutes; it measures"]
#[allow(clippy::print_stdout, clippy::disallowed_methods, reason = "it measures")]
fn what_the_next_version_costs() {
    let of = |name: &str, otherwise| std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"));
    let (slices, urls) = (of("SLICES", 10_000), of("URLS", 100));
    let mut world = World::new(1);
    world.closed = u32::MAX;
    world.grow(slices, urls);
    let first = world.seal(1, None, &world.objects).expect("seals");
    world.grow(10, urls);
    let mut results = Vec::new();
    for (what, objects, base) in
        [("full", world.without_gists(), None), ("upon the version before", Arc::clone(&world.objects), Some(&first))]
    {
        let told = |doing: &str, time: Instant| {
            let (took, read) = (time.elapsed(), objects.take());
            let (bytes, shards) = (read.iter().map(|(_, bytes)| bytes).sum::<u64>(), shards_of(&read).len());
            println!("{what}: {doing} {took:.2?}: {bytes} bytes in {} objects, {shards} shards", read.len());
        };
        objects.take();
        let time = Instant::now();
        let gathered = world.gather(&world.retries()[0], base, &objects);
        told("looking for what may come back", time);
        let time = Instant::now();
        let manifest = world.seal(2, base, &objects).expect("seals");
        told("sealing", time);
        results.push((gathered, world.meaning(&manifest)));
    }
    assert_eq!(results[0], results[1]);
}
