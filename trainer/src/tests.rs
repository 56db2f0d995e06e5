//! Whole runs of one to seven ranks on a small dataset in a folder, without a coordinator. Ranks are threads here;
//! processes of their own they are in the tests of the binary.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::index::StoredFile;
use proto::pb::{self, left::Cause, rank_message::Message};
use proto::run_ledger::{Line, Lines};
use proto::{Attempt, DatasetId, Split, keys};

use crate::learn::checkpoint;
use crate::learn::context::{RankContext, Setup};
use crate::learn::control::{ControlFlags, Heartbeat};
use crate::rank::serve;
use crate::torch::{self, tensor::Named};

mod ahead;
mod device_pixels;
mod devices;
mod ends;
mod graphs;
mod late;
mod layout;

const SIZE: usize = 72;
const DEADLINE: Duration = Duration::from_secs(120);

fn dataset() -> DatasetId {
    "d-1".parse().expect("an id")
}

/// A store with a dataset of three classes, which differ in colour: 150 samples to train on, 12 each to validate and to
/// test.
pub(crate) struct World {
    folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    store: Arc<dyn ObjectStore>,
    manifest: StoredFile,
    /// As in the setup of ranks that are started from now on.
    device_cache_bytes: u64,
}

impl World {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let splits = [(Split::Train, 31), (Split::Validation, 4), (Split::Test, 4)];
        let (_, manifest) = support::dataset::write(
            folder.path(),
            &support::dataset::Dataset {
                dataset: &dataset(),
                classes: 3,
                size: SIZE as u32,
                shards: &[&splits, &splits, &splits, &splits[..1], &[splits[0], splits[2]]],
                skipped: &|split, place| split == Split::Train && place == 7,
                picture: &picture,
                moments: ([0.5; 3], [0.25; 3]),
            },
        );
        let store = object_store::local::LocalFileSystem::new_with_prefix(folder.path()).expect("the folder is there");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        Self { folder, runtime, store: Arc::new(store), manifest, device_cache_bytes: 0 }
    }

    fn rank(&self) -> Rank {
        self.rank_on(None)
    }

    /// What a rank process on the CPU has.
    pub(crate) fn context(&self) -> RankContext {
        let setup = Setup {
            device: "cpu".to_owned(),
            advertise_address: "127.0.0.1".to_owned(),
            // Holds about half of the images, so that samples come from it and from the store.
            cache_bytes: (80 * 3 * SIZE * SIZE) as u64,
            cache_dir: None,
            cache_disk_bytes: 0,
            device_cache_bytes: self.device_cache_bytes,
        };
        RankContext { store: self.store.clone(), runtime: self.runtime.handle().clone(), setup }
    }

    /// The coordinator's message that makes a rank join a generation whose store is served at `port`.
    pub(crate) fn join(
        &self,
        run: &str,
        spec: &str,
        generation: u64,
        (rank, world): (usize, usize),
        port: u16,
    ) -> pb::Join {
        pb::Join {
            run: run.to_owned(),
            generation,
            device: rank as u32,
            rank: rank as u32,
            world_size: world as u32,
            store: format!("127.0.0.1:{port}"),
            spec_json: spec.to_owned(),
            manifest_key: self.manifest.key.clone(),
            manifest_sha256: self.manifest.sha256.clone(),
            elapsed_seconds: 1.0,
            cores: 1,
            ..pb::Join::default()
        }
    }

    /// A rank whose device answers as `fake` says, which is given the rank's heartbeat.
    fn rank_on(&self, fake: Option<Box<dyn FnOnce(Arc<Heartbeat>) -> torch::Fake>>) -> Rank {
        self.rank_with(fake, None)
    }

    /// ... and which may have a clock.
    fn rank_with(
        &self,
        fake: Option<Box<dyn FnOnce(Arc<Heartbeat>) -> torch::Fake>>,
        clock: Option<torch::FakeClock>,
    ) -> Rank {
        let (orders, to_rank) = channel();
        let (reports, said) = channel();
        let context = self.context();
        let heartbeat = Arc::new(Heartbeat::new());
        // These tests have no coordinator.
        heartbeat.assume_contact_for(DEADLINE);
        let beating = heartbeat.clone();
        let fake = fake.map(|fake| fake(heartbeat.clone()));
        std::thread::spawn(move || {
            torch::FAKE.set(fake);
            torch::FAKE_CLOCK.set(clock);
            serve(&context, &to_rank, &reports, &beating, &|| {});
        });
        Rank { orders, said, heard: Mutex::default(), heartbeat }
    }

    /// Has the ranks join a new generation.
    fn generation(
        &self,
        run: &str,
        spec: &str,
        n: u64,
        ranks: &[&Rank],
        checkpoints: &[pb::Checkpointed],
    ) -> Generation {
        let store = torch::Store::serve("127.0.0.1").expect("loopback");
        let flags = ranks.iter().enumerate().map(|(rank, to)| {
            let join = self.join(run, spec, n, (rank, ranks.len()), store.port());
            let join = pb::Join { checkpoints: checkpoints.to_vec(), ..join };
            let flags = Arc::new(ControlFlags::new(&join, to.heartbeat.clone()));
            to.orders.send((join, flags.clone())).expect("the rank lives");
            flags
        });
        Generation { flags: flags.collect(), _store: store }
    }

    /// Runs from the beginning to the end, undisturbed.
    fn whole(&self, run: &str, spec: &str, world: usize) -> Outcome {
        let ranks: Vec<Rank> = (0..world).map(|_| self.rank()).collect();
        let _generation = self.generation(run, spec, 1, &ranks.iter().collect::<Vec<_>>(), &[]);
        for rank in &ranks {
            rank.left(Cause::Finished);
        }
        self.outcome(run, &ranks)
    }

    fn outcome(&self, run: &str, ranks: &[Rank]) -> Outcome {
        let prefix = Path::from(keys::ledgers(run));
        let mut files: Vec<_> =
            self.runtime.block_on(self.store.list(Some(&prefix)).try_collect()).expect("a folder lists");
        files.sort_by(|a: &object_store::ObjectMeta, b| a.location.cmp(&b.location));
        let mut ledger = BTreeMap::new();
        for file in files {
            let bytes = self.runtime.block_on(async { self.store.get(&file.location).await?.bytes().await });
            let read: Lines = serde_json::from_slice(&bytes.expect("it was listed")).expect("a ledger");
            ledger.extend(read.lines.into_iter().map(|line| (line.step, line)));
        }
        let said: Vec<Message> = ranks.iter().flat_map(Rank::all).collect();
        let metrics = said.iter().filter_map(|message| match message {
            Message::Stepped(stepped) => Some(stepped.metrics.clone()),
            _ => None,
        });
        let end = last_checkpoint(&said).expect("one is written at the end");
        let (progress, tensors) = self.read(&end);
        assert_eq!(progress.step, 20);
        assert!(said.iter().any(|message| matches!(message, Message::Finished(_))), "a model is exported");
        Outcome { ledger, tensors, metrics: metrics.flatten().collect() }
    }

    fn read(&self, checkpoint: &pb::Checkpointed) -> (checkpoint::Progress, Named) {
        let read = checkpoint::read(&self.store, &checkpoint.key, &checkpoint.digests);
        let (position, tensors) = self.runtime.block_on(read).expect("a whole checkpoint");
        (position.progress(&checkpoint.key, 5).expect("5 steps an epoch"), tensors)
    }
}

impl World {
    /// The same checkpoint in another folder, with another position.
    fn with_position(&self, made: &pb::Checkpointed, change: impl Fn(&mut serde_json::Value)) -> pb::Checkpointed {
        let root = self.folder.path();
        let (old, new) = (root.join(&made.key), root.join("changed"));
        std::fs::create_dir(&new).expect("a new folder");
        let mut digests = std::collections::HashMap::new();
        for name in made.digests.keys() {
            let mut bytes = std::fs::read(old.join(name)).expect("it is there");
            if name == "state.json" {
                let mut position = serde_json::from_slice(&bytes).expect("JSON");
                change(&mut position);
                bytes = position.to_string().into();
            }
            std::fs::write(new.join(name), &bytes).expect("a folder takes it");
            digests.insert(name.clone(), proto::shard::sha256_hex(&bytes));
        }
        pb::Checkpointed { key: "changed".to_owned(), digests, ..made.clone() }
    }
}

struct Generation {
    flags: Vec<Arc<ControlFlags>>,
    _store: torch::Store,
}

struct Rank {
    orders: Sender<(pb::Join, Arc<ControlFlags>)>,
    said: Receiver<pb::RankMessage>,
    heard: Mutex<Vec<Message>>,
    heartbeat: Arc<Heartbeat>,
}

impl Rank {
    /// Waits until it has left its generation, which must be for this reason.
    fn left(&self, cause: Cause) -> pb::Left {
        let end = Instant::now() + DEADLINE;
        loop {
            let message = self.said.recv_timeout(end - Instant::now()).expect("a rank says why it left");
            let message = message.message.expect("reports have content");
            self.heard.lock().expect("no panic").push(message.clone());
            if let Message::Left(left) = message {
                assert_eq!(left.cause(), cause, "{}", left.detail);
                return left;
            }
        }
    }

    fn all(&self) -> Vec<Message> {
        self.heard.lock().expect("no panic").clone()
    }

    fn wait_for_step(&self, step: u64) {
        let begun = Instant::now();
        while self.heartbeat.step() < step {
            assert!(begun.elapsed() < DEADLINE, "step {step} never came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What must not depend on who computed it.
struct Outcome {
    ledger: BTreeMap<u64, Line>,
    tensors: Named,
    metrics: Vec<pb::Metric>,
}

impl Outcome {
    fn assert_equals(&self, other: &Self) {
        assert_eq!(self.ledger, other.ledger);
        assert_eq!(self.ledger.len(), 20);
        assert_eq!(self.tensors.len(), other.tensors.len());
        for ((name, mine), (other_name, others)) in self.tensors.iter().zip(&other.tensors) {
            assert_eq!(name, other_name);
            let (difference, size) = ((mine - others).norm().double_value(&[]), mine.norm().double_value(&[]));
            assert!(difference <= 1e-9 * size, "{name}: {difference:e} of {size:e}");
        }
        for kind in ["train", "validation", "test"] {
            let points = |outcome: &Self| {
                let newest: BTreeMap<u64, (u64, u64, f64)> = outcome
                    .metrics
                    .iter()
                    .filter(|point| point.kind == kind)
                    .map(|point| {
                        (point.step, (point.samples, (point.top1 * 1000.0) as u64, (point.loss * 1e6).round()))
                    })
                    .collect();
                newest
            };
            let (own, theirs) = (points(self), points(other));
            assert!(own == theirs && !own.is_empty(), "{kind}: {own:?}, {theirs:?}");
        }
    }
}

fn last_checkpoint(said: &[Message]) -> Option<pb::Checkpointed> {
    said.iter().rev().find_map(|message| match message {
        Message::Checkpointed(checkpointed) => Some(checkpointed.clone()),
        _ => None,
    })
}

fn spec(precision: &str) -> String {
    format!(
        r#"{{"dataset": "d", "manifest": 1, "plan": 2, "seed": 5, "model": {{"arch": "alexnet-bn", "width": 0.1}}, "input": {{"crop": 64}},
            "train": {{"epochs": 4, "batch": 30, "learning_rate": 0.01, "label_smoothing": 0.1}},
            "ranks": {{"lanes": 6, "max": 6, "precision": "{precision}"}}, "checkpoint": {{"every_epochs": 2.0}}}}"#
    )
}

fn picture(key: u64, label: u32) -> Bytes {
    let value = |i: usize| {
        let noise = crate::data::random::below(crate::data::random::key(&[key]), i as u64, 120) as u8;
        if i % 3 == label as usize { noise + 130 } else { noise }
    };
    let pixels: Vec<u8> = (0..3 * SIZE * SIZE).map(value).collect();
    let format = turbojpeg::PixelFormat::RGB;
    let image = turbojpeg::Image { pixels: &pixels[..], width: SIZE, pitch: 3 * SIZE, height: SIZE, format };
    let jpeg = turbojpeg::compress(image, 90, turbojpeg::Subsamp::None).expect("an image");
    Bytes::copy_from_slice(&jpeg)
}

#[test]
fn any_number_of_ranks_sees_the_same_samples_and_learns_the_same() {
    let world = World::new();
    // The fewer samples a lane normalises, the more each step magnifies a rounding error; smaller steps make up for it.
    let spec = spec("f64").replace(r#""lanes": 6, "max": 6"#, r#""lanes": 7, "max": 7"#);
    let spec = spec.replace(r#""learning_rate": 0.01"#, r#""learning_rate": 0.001"#);
    let one = world.whole("one", &spec, 1);
    for ranks in [2, 3, 4, 7] {
        one.assert_equals(&world.whole(&format!("of-{ranks}"), &spec, ranks));
    }
    let in_parts = spec.replace("\"epochs\"", "\"micro_batch\": 9, \"epochs\"");
    one.assert_equals(&world.whole("parts", &in_parts, 2));
    // A run of before there was a choice goes on by the plan that it had.
    let old = spec.replace("\"plan\": 2, ", "");
    let of_before = world.whole("of-before", &old, 1);
    of_before.assert_equals(&world.whole("of-before-on-3", &old, 3));
    let samples = |outcome: &Outcome| -> Vec<u64> {
        outcome.ledger.values().filter(|line| line.epoch == 3).map(|line| line.samples).collect()
    };
    // 150 samples in 7 lanes: three have 22, the others 21.
    assert_eq!(samples(&one), [35, 28, 28, 28, 31]);
    assert_eq!(samples(&of_before), [28, 28, 31, 28, 35]);
}

#[test]
fn one_two_and_three_ranks_have_the_same_gradients_in_single_precision() {
    let world = World::new();
    // After one step without weight decay the momenta are the gradients.
    let spec = spec("f32").replace(r#""epochs": 4, "batch": 30"#, r#""epochs": 1, "batch": 150, "weight_decay": 0.0"#);
    let gradients = |run: &str, ranks: usize| -> Named {
        let ranks: Vec<Rank> = (0..ranks).map(|_| world.rank()).collect();
        let _generation = world.generation(run, &spec, 1, &ranks.iter().collect::<Vec<_>>(), &[]);
        for rank in &ranks {
            rank.left(Cause::Finished);
        }
        let end = last_checkpoint(&ranks[0].all()).expect("one is written at the end");
        let read = checkpoint::read(&world.store, &end.key, &end.digests);
        let (position, tensors) = world.runtime.block_on(read).expect("a whole checkpoint");
        assert_eq!(position.progress(&end.key, 1).expect("one step an epoch").step, 1);
        tensors.into_iter().filter(|(name, _)| name.starts_with("momentum.")).collect()
    };
    let one = gradients("one", 1);
    assert!(one.len() > 20, "{} parameters", one.len());
    for others in [gradients("two", 2), gradients("three", 3)] {
        assert_eq!(one.len(), others.len());
        for ((name, mine), (_, others)) in one.iter().zip(&others) {
            let (difference, size) = ((mine - others).norm().double_value(&[]), mine.norm().double_value(&[]));
            assert!(size > 0.0 && difference <= 1e-5 * size, "{name}: {difference:e} of {size:e}");
        }
    }
}

#[test]
fn survivors_of_a_lost_rank_go_on_and_end_as_an_undisturbed_run() {
    let world = World::new();
    let undisturbed = world.whole("undisturbed", &spec("f64"), 1);
    let test = undisturbed.metrics.iter().find(|point| point.kind == "test").expect("a test at the end");
    assert!(test.samples == 16 && test.top1 > 0.9, "colours are easily learned: {test:?}");
    let (a, b, lost) = (world.rank(), world.rank(), world.rank());
    let first = world.generation("run", &spec("f64"), 1, &[&lost, &a, &b], &[]);
    lost.wait_for_step(7);
    first.flags[0].abort();
    lost.left(Cause::Collective);
    let steps = [a.left(Cause::Collective).step, b.left(Cause::Collective).step];
    assert!(steps.iter().all(|&step| (6..20).contains(&step)), "{steps:?}");
    // A rank that knows nothing takes the lowest place: the state comes from the survivors, not from rank 0.
    let new = world.rank();
    let _second = world.generation("run", &spec("f64"), 2, &[&new, &a, &b], &[]);
    for rank in [&new, &a, &b] {
        rank.left(Cause::Finished);
    }
    undisturbed.assert_equals(&world.outcome("run", &[lost, a, b, new]));
}

#[test]
fn a_run_that_left_with_a_checkpoint_resumes_in_the_middle_of_an_epoch_as_if_nothing_had_been() {
    let world = World::new();
    let undisturbed = world.whole("undisturbed", &spec("f64"), 1);
    // A crowded machine may let them leave late, at the end of an epoch: then once more.
    let left = (1..).find_map(|attempt| {
        let run = format!("run-{attempt}");
        let (a, b) = (world.rank(), world.rank());
        let first = world.generation(&run, &spec("f64"), 1, &[&a, &b], &[]);
        a.wait_for_step(6);
        // One rank is told; both leave after the same step.
        first.flags[1].obey(&pb::Leave { run: run.clone(), generation: 1, checkpoint: true, abort: false });
        let steps = [a.left(Cause::Asked).step, b.left(Cause::Asked).step];
        assert_eq!(steps[0], steps[1]);
        let checkpoint = last_checkpoint(&a.all()).expect("a checkpoint was asked for");
        assert_eq!(checkpoint.step, steps[0]);
        (steps[0] % 5 != 0).then_some((run, a, b, checkpoint))
    });
    let (run, a, b, checkpoint) = left.expect("in the middle of an epoch");
    let fresh: Vec<Rank> = (0..3).map(|_| world.rank()).collect();
    let _second = world.generation(&run, &spec("f64"), 2, &fresh.iter().collect::<Vec<_>>(), &[checkpoint]);
    for rank in &fresh {
        rank.left(Cause::Finished);
    }
    let ranks: Vec<Rank> = [a, b].into_iter().chain(fresh).collect();
    undisturbed.assert_equals(&world.outcome(&run, &ranks));
}

#[test]
fn what_cannot_be_trained_is_refused_in_words() {
    let world = World::new();
    let refused = |spec: &str| {
        let rank = world.rank();
        let _generation = world.generation("run", spec, 1, &[&rank], &[]);
        rank.left(Cause::Error).detail
    };
    let said = refused(&spec("f32").replace("\"crop\": 64", "\"crop\": 80"));
    assert!(said.contains("input.crop = 80") && said.contains("72"), "{said}");
    let said = refused(&spec("f32").replace("\"batch\": 30", "\"batch\": 12"));
    assert!(said.contains("train.batch"), "{said}");
    // A block of the right length with other bytes in it.
    let tar = world.folder.path().join(keys::tar(&dataset().shard(2), Split::Train, Attempt { term: 1, n: 1 }));
    let length = std::fs::metadata(&tar).expect("it is there").len();
    std::fs::write(&tar, vec![b'x'; length as usize]).expect("a folder takes it");
    let said = refused(&spec("f32"));
    assert!(said.contains("shards/train/000002-1.1.tar"), "{said}");
}

#[test]
fn a_state_that_is_not_finite_is_no_checkpoint_and_a_loss_that_is_not_ends_the_generation() {
    let world = World::new();
    let diverged = |every_epochs: &str, learning_rate: &str| {
        let rank = world.rank();
        let spec = spec("f32").replace("\"learning_rate\": 0.01", &format!("\"learning_rate\": {learning_rate}"));
        let spec = spec.replace("\"every_epochs\": 2.0", &format!("\"every_epochs\": {every_epochs}"));
        let _generation = world.generation("run", &spec, 1, &[&rank], &[]);
        let left = rank.left(Cause::Diverged);
        assert_eq!(last_checkpoint(&rank.all()).map(|made| made.step), None);
        left
    };
    let left = diverged("2.0", "1e60");
    assert!(left.step == 1 && left.detail.contains("the loss of step 1"), "{left:?}");
    let left = diverged("0.2", "1e60");
    assert!(left.step == 1 && left.detail.contains("not finite after step 1"), "{left:?}");
}
