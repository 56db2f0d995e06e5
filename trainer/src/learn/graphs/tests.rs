use input::color::ColorJitter;
use tch::Kind;

use super::*;
use crate::data::batch::Pixels;
use crate::data::random;
use crate::learn::averaging::Averaging;
use crate::learn::step::optimizer;
use crate::torch::{Member, Store};

const CLASSES: i64 = 10;
/// Of each lane, step after step: two shapes, the first of which is recorded in the fifth step and replayed in the last.
const SHARES: [i64; 6] = [3, 3, 2, 3, 3, 3];

fn run_spec(network: &str, train: &str, ranks: &str) -> RunSpec {
    let toml = format!(
        "dataset = \"d\"
        model = {{ arch = \"{network}\", width = 0.1 }}
        input = {{ crop = 64 }}
        train = {{ batch = 12, label_smoothing = 0.1, {train} }}
        ranks = {{ max = 2, lanes = 4, {ranks} }}"
    );
    RunSpec::from_toml(&toml).expect("a sound spec")
}

/// Each rank of a group on a thread of its own; what they returned, by rank.
fn ranks<T: Send>(world: usize, rank: impl Fn(&Group, usize) -> T + Sync) -> Vec<T> {
    let store = Store::serve("127.0.0.1").expect("a free port");
    std::thread::scope(|scope| {
        let (rank, port) = (&rank, store.port());
        let one = move |number: usize| {
            tch::set_num_threads(1);
            let (address, timeout) = ("127.0.0.1".to_owned(), Duration::from_secs(60));
            let member = Member { rank: number, world, address, device: Device::Cpu, timeout };
            rank(&Group::join("127.0.0.1", port, member, || false).expect("all ranks come"), number)
        };
        let threads: Vec<_> = (0..world).map(|number| scope.spawn(move || one(number))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// One rank's network, and what it does to it.
struct Rank<'a> {
    spec: &'a RunSpec,
    group: &'a Group,
    model: AlexNet,
    normalise: Normalise,
}

impl<'a> Rank<'a> {
    fn new(spec: &'a RunSpec, group: &'a Group) -> Self {
        let model = step::network(spec, CLASSES, Device::Cpu);
        model.freeze(|name| spec.train.is_frozen(name));
        let normalise = Normalise::new([0.5; 3], [0.2; 3], Device::Cpu, step::kind(spec.ranks.precision));
        let normalise = normalise.expect("there is memory").in_nhwc(step::is_nhwc(&spec.ranks, Device::Cpu));
        Self { spec, group, model, normalise }
    }

    /// A step's batch of the rank of that number, with `share` samples in each lane.
    fn batch(&self, step: u64, number: usize, share: i64) -> Batch {
        let lanes = 4 / self.group.world();
        let samples = lanes as i64 * share;
        let bytes: Vec<u8> =
            (0..samples as u64 * 64 * 64 * 3).map(|i| random::bits(step * 2 + number as u64, i) as u8).collect();
        let keys: Vec<u64> = (0..samples as u64).map(|sample| 1000 * number as u64 + sample).collect();
        let pixels = Pixels {
            on_device: None,
            pixels: Tensor::from_slice(&bytes).view([samples, 64, 64, 3]),
            jitters: vec![ColorJitter::default(); samples as usize],
            labels: Tensor::arange(samples, (Kind::Int64, Device::Cpu)).remainder(CLASSES),
            keys,
            ahead: None,
        };
        Batch { step, samples: 4 * share as u64, shares: vec![share; lanes], pixels }
    }

    fn compute(&self, averaging: &mut Averaging, batch: &Batch) -> std::result::Result<Computed, Failure> {
        averaging.compute(self.spec, self.group, &self.model, &self.normalise, batch, &|_| {})
    }
}

/// Loss, hits, statistics and gradients of some steps of each rank, and the weights after them.
fn steps(spec: &RunSpec, world: usize) -> Vec<Vec<Tensor>> {
    ranks(world, |group, number| {
        let rank = Rank::new(spec, group);
        let mut averaging = Averaging::new(spec, group, &rank.model).map_err(|e| e.to_string()).expect("all are here");
        let mut sgd = optimizer(&rank.model, &spec.train);
        let mut found = Vec::new();
        for (step, share) in (0..).zip(SHARES) {
            let batch = rank.batch(step, number, share);
            let computed = rank.compute(&mut averaging, &batch).map_err(|e| e.to_string()).expect("all are here");
            let sums = computed.measured.sums(step, batch.samples).map_err(|e| e.to_string()).expect("it is finite");
            found.push(Tensor::from_slice(&[sums.loss, sums.top1, sums.top5]));
            found.push(computed.statistics.copy());
            found.extend(rank.model.trained().iter().map(|(_, parameter)| parameter.grad().copy()));
            sgd.step(0.01).expect("sound gradients");
            rank.model.update_running(&(computed.statistics / 4.0));
        }
        if let Averaging::Graphs(graphs) = averaging {
            let mut recorded: Vec<bool> = graphs.shapes.values().map(|seen| seen.recorded.is_some()).collect();
            recorded.sort_unstable();
            let in_parts = spec.train.micro_batch > 0;
            assert_eq!(recorded, if in_parts { vec![] } else { vec![false, true] });
        }
        found.extend(rank.model.weights().into_iter().map(|(_, tensor)| tensor));
        found
    })
}

#[test]
fn steps_of_a_rank_alone_have_the_same_gradients_as_without_bit_by_bit() {
    are_the_same(1);
}

#[test]
fn steps_of_two_ranks_have_the_same_gradients_as_without_bit_by_bit() {
    are_the_same(2);
}

fn are_the_same(world: usize) {
    for (network, train, keys) in [
        ("alexnet", "", "precision = \"f64\""),
        ("alexnet-bn", "", "precision = \"f64\""),
        ("alexnet-2012", "", "precision = \"f32\""),
        ("alexnet-slim", "", "precision = \"f32\""),
        ("alexnet-bn", "", "precision = \"bf16\""),
        ("alexnet-2012", "", "precision = \"bf16\", layout = \"nhwc\""),
        ("alexnet-bn", "", "layout = \"nhwc\", compress = \"fp16\""),
        ("alexnet-slim", "", "layout = \"nhwc\", precision = \"f64\""),
        ("alexnet-bn", "micro_batch = 3", "precision = \"f64\""),
        ("alexnet", "micro_batch = 3, clip_norm = 1.0", "compress = \"bf16\""),
        ("alexnet-slim", "", "precision = \"bf16\", compress = \"bf16\""),
        ("alexnet-bn", "freeze = [\"features\"]", "precision = \"f32\""),
        ("alexnet-2012", "freeze = [\"classifier\", \"features.0\"]", "precision = \"f32\""),
    ] {
        let without = steps(&run_spec(network, train, keys), world);
        let with = steps(&run_spec(network, train, &format!("graphs = true, {keys}")), world);
        for (one, other) in without.iter().zip(&with) {
            assert_eq!(one.len(), other.len());
            let differ = one.iter().zip(other).filter(|(one, other)| one != other).count();
            assert_eq!(differ, 0, "{network}, {train}, {keys}, {world} ranks, of {} tensors", one.len());
        }
    }
}

#[test]
fn no_more_shapes_are_recorded_than_there_is_room_for() {
    ranks(1, |group, _| {
        let spec = run_spec("alexnet-slim", "", "graphs = true");
        let rank = Rank::new(&spec, group);
        let mut averaging = Averaging::new(&spec, group, &rank.model).map_err(|e| e.to_string()).expect("alone");
        for share in 2..=7 {
            for step in 0..=u64::from(BEFORE) {
                rank.compute(&mut averaging, &rank.batch(step, 0, share)).map_err(|e| e.to_string()).expect("sound");
            }
        }
        let Averaging::Graphs(graphs) = averaging else { panic!("they were chosen") };
        let recorded = graphs.shapes.values().filter(|seen| seen.recorded.is_some()).count();
        assert_eq!((graphs.shapes.len(), recorded), (6, MOST));
    });
}

#[test]
fn a_step_that_cannot_be_recorded_is_a_failure_of_the_device_that_says_what_to_do() {
    ranks(1, |group, _| {
        let spec = run_spec("alexnet-slim", "", "graphs = true");
        let rank = Rank::new(&spec, group);
        let mut averaging = Averaging::new(&spec, group, &rank.model).map_err(|e| e.to_string()).expect("alone");
        for step in 0..u64::from(BEFORE) {
            rank.compute(&mut averaging, &rank.batch(step, 0, 2)).map_err(|e| e.to_string()).expect("sound");
        }
        let mut batch = rank.batch(3, 0, 2);
        batch.pixels.labels += CLASSES;
        let failure = rank.compute(&mut averaging, &batch).expect_err("there is no such class");
        assert!(matches!(&failure, Failure::Device(said) if said.contains("ranks.graphs")), "{failure}");
        // Here the device is asked whether it had no memory.
        crate::torch::device::FAKE_OOMS.set(1);
        let unclassed = Error::Other("2 GiB".to_owned());
        for error in [unclassed, Error::OutOfMemory("2 GiB".to_owned())] {
            let failure = Failure::from(not_recorded(error, Device::Cpu));
            let Failure::OutOfMemory(said) = &failure else { panic!("{failure}") };
            assert!(["ranks.graphs", "2 GiB", "micro_batch"].iter().all(|word| said.contains(word)), "{said}");
        }
        crate::torch::device::FAKE_OOMS.set(0);
    });
}

#[test]
fn what_comes_from_the_host_is_not_recorded() {
    let recorder = Recorder::new(Device::Cpu).expect("a CPU needs none");
    let model = step::network(&run_spec("alexnet", "", "graphs = true"), CLASSES, Device::Cpu);
    let images = Tensor::ones([4, 3, 64, 64], (Kind::Float, Device::Cpu));
    let keys = model.dropout_keys(&[1, 2, 3, 4], Device::Cpu).expect("there is memory");
    let logits =
        recorder.record(|| Ok(model.train_cut(&images, &[4], &keys, &mut |x| x).logits)).expect("it has all").1;
    assert_eq!(logits, model.train(&images, &[4], &[1, 2, 3, 4]).logits);
    let said =
        recorder.record(|| Ok(model.train(&images, &[4], &[1, 2, 3, 4]))).expect_err("keys of the host").to_string();
    assert!(said.contains("nothing of the host"), "{said}");
}
