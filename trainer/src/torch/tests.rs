use std::net::TcpListener;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::*;

const LONG: Duration = Duration::from_secs(60);

/// Runs each rank of a generation on a thread of its own and gives what they returned, by rank.
fn generation<T: Send>(world: usize, timeout: Duration, rank: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let served = Store::serve("127.0.0.1").expect("a free port");
    std::thread::scope(|scope| {
        let (served, rank) = (&served, &rank);
        let threads: Vec<_> = (0..world)
            .map(|number| scope.spawn(move || rank(join(served, number, world, timeout).expect("all ranks come"))))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

fn join(served: &Store, rank: usize, world: usize, timeout: Duration) -> Result<Group> {
    let address = "127.0.0.1".to_owned();
    Group::join("127.0.0.1", served.port(), Member { rank, world, address, device: Device::Cpu, timeout }, || false)
}

fn reduced(group: &Group, value: f64, op: Op, timeout: Duration) -> Result<f64> {
    let tensor = Tensor::full([1000], value, (Kind::Double, Device::Cpu));
    group.all_reduce(&tensor, op)?.wait(timeout)?;
    Ok(tensor.double_value(&[999]))
}

#[test]
fn one_two_and_three_ranks_reduce_and_broadcast() {
    for world in 1..=3 {
        let results = generation(world, LONG, |group| {
            let rank = group.member.rank as f64;
            let tensors = [Tensor::from_slice(&[rank]), Tensor::from_slice(&[rank as f32, 5.0])];
            group.broadcast(&tensors, world - 1).expect("all are here");
            let sum = reduced(&group, rank + 1.0, Op::Sum, LONG).expect("all are here");
            let max = reduced(&group, rank + 1.0, Op::Max, LONG).expect("all are here");
            (sum, max, tensors[0].double_value(&[0]), tensors[1].double_value(&[1]))
        });
        let world = world as f64;
        assert_eq!(results, vec![(world * (world + 1.0) / 2.0, world, world - 1.0, 5.0); results.len()]);
    }
}

#[test]
fn the_device_of_a_rank_alone_that_hangs_waits_for_no_peer_and_has_failed() {
    let settled = generation(1, Duration::from_secs(3), |group| {
        FAKE.set(Some(Box::new(|| Ok(false))));
        group.settle()
    });
    assert!(matches!(settled[..], [Err(Error::Device(_))]), "{settled:?}");
}

#[test]
fn survivors_of_a_peer_that_goes_away_hear_it_at_once_and_form_the_next_generation() {
    let served = Store::serve("127.0.0.1").expect("a free port");
    let next = Store::serve("127.0.0.1").expect("a free port");
    std::thread::scope(|scope| {
        for rank in 0..3 {
            let (served, next) = (&served, &next);
            scope.spawn(move || {
                let group = join(served, rank, 3, LONG).expect("all ranks come");
                assert_eq!(reduced(&group, 1.0, Op::Sum, LONG).expect("all are here"), 3.0);
                if rank == 2 {
                    return;
                }
                let start = Instant::now();
                let error = reduced(&group, 1.0, Op::Sum, LONG).expect_err("one is gone");
                assert!(matches!(error, Error::Collective(_)), "{error}");
                group.aborter().abort().expect("gloo can");
                drop(group);
                assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
                let group = join(next, rank, 2, LONG).expect("both survivors come");
                assert_eq!(reduced(&group, 1.0, Op::Sum, LONG).expect("both are here"), 2.0);
            });
        }
    });
}

#[test]
fn what_waits_for_a_hung_peer_ends_at_its_timeout_or_at_once_when_another_thread_aborts() {
    let short = Duration::from_secs(1);
    // Rank 1 hangs until rank 0 has seen what it was to see, or has panicked.
    let hang = |seen: &Mutex<Option<Receiver<()>>>| {
        let seen = seen.lock().expect("nobody panics").take();
        assert!(seen.expect("one rank hangs").recv().is_err(), "nothing is sent");
    };
    let (seen, wait) = channel();
    let (seen, wait) = (Mutex::new(Some(seen)), Mutex::new(Some(wait)));
    generation(2, short, |group| {
        if group.member.rank == 1 {
            return hang(&wait);
        }
        let _seen: Option<Sender<()>> = seen.lock().expect("nobody panics").take();
        let error = reduced(&group, 1.0, Op::Sum, short).expect_err("nobody answers");
        assert!(matches!(error, Error::Timeout(_)), "{error}");
    });
    let (seen, wait) = channel();
    let (seen, wait) = (Mutex::new(Some(seen)), Mutex::new(Some(wait)));
    generation(2, LONG, |group| {
        if group.member.rank == 1 {
            return hang(&wait);
        }
        let _seen: Option<Sender<()>> = seen.lock().expect("nobody panics").take();
        let aborter = group.aborter();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(short / 10);
                aborter.abort().expect("gloo can");
            });
            let start = Instant::now();
            let error = reduced(&group, 1.0, Op::Sum, LONG).expect_err("aborted");
            assert!(matches!(error, Error::Collective(_)), "{error}");
            assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
        });
    });
}

#[test]
fn a_group_whose_other_rank_never_comes_is_refused_at_the_timeout() {
    let served = Store::serve("127.0.0.1").expect("a free port");
    let start = Instant::now();
    let error = join(&served, 0, 2, Duration::from_secs(1)).expect_err("rank 1 is missing");
    assert!(matches!(error, Error::Timeout(_)), "{error}");
    assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
}

#[test]
fn a_join_that_hangs_is_cancelled_at_once() {
    // The kernel takes the connection; nobody answers, as when the machine that serves the store is stopped.
    let hung = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = hung.local_addr().expect("it is bound").port();
    let member = Member { rank: 0, world: 2, address: "127.0.0.1".to_owned(), device: Device::Cpu, timeout: LONG };
    let start = Instant::now();
    let cancelled = || start.elapsed() > Duration::from_millis(200);
    let error = Group::join("127.0.0.1", port, member, cancelled).expect_err("given up");
    assert!(matches!(error, Error::Collective(_)), "{error}");
    assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
}

#[test]
fn a_build_without_nccl_says_what_to_do_about_it() {
    let served = Store::serve("127.0.0.1").expect("a free port");
    let address = "127.0.0.1".to_owned();
    let member = Member { rank: 0, world: 1, address, device: Device::Cuda(0), timeout: LONG };
    let error = Group::join("127.0.0.1", served.port(), member, || false)
        .expect_err("no GPU, or no NCCL, or not its environment")
        .to_string();
    let said = if cfg!(feature = "nccl") { NCCL_ENVIRONMENT[0].0 } else { "make libtorch CUDA=1" };
    assert!(error.contains(said), "{error}");
}

/// Inputs and outputs of each layer: 1.28 MB of weights, so that each layer is a bucket of its own.
const UNITS: i64 = 400;

fn small_network() -> Vec<Tensor> {
    (0..3)
        .map(|layer| (numbers([99, layer], UNITS) - 0.5) / 10.0)
        .map(|weight| weight.set_requires_grad(true))
        .collect()
}

/// The network's loss on samples that depend on step and rank.
fn sample_loss(parameters: &[Tensor], step: u64, rank: u64) -> Tensor {
    let samples = numbers([step, rank], 4);
    parameters.iter().fold(samples, |x, weight| x.matmul(weight).tanh()).sum(Kind::Double)
}

/// Numbers within 0 and 1 that look random, others for each `key`.
fn numbers(key: [u64; 2], rows: i64) -> Tensor {
    let start = (1000 * key[0] + key[1]) as f64;
    let angles = Tensor::arange(rows * UNITS, (Kind::Double, Device::Cpu)) + 1e6 * start;
    (angles.sin() * 43_758.545_3).frac().abs().view([rows, UNITS])
}

#[test]
fn the_reducer_gives_the_mean_of_the_ranks_gradients_step_after_step() {
    generation(2, LONG, |group| {
        let parameters = small_network();
        let reducer = Reducer::new(&group, &parameters, 1000, None).expect("all are here");
        for step in 0..3 {
            reducer.begin().expect("alive");
            reducer.backward(&sample_loss(&parameters, step, group.member.rank as u64)).expect("all are here");
            let alone = small_network();
            ((sample_loss(&alone, step, 0) + sample_loss(&alone, step, 1)) / 2.0).backward();
            for (averaged, alone) in parameters.iter().zip(&alone) {
                let difference = (averaged.grad() - alone.grad()).abs().max().double_value(&[]);
                assert!(difference < 1e-14, "step {step}: {difference}");
            }
        }
        assert_eq!(reducer.buckets().expect("alive"), 3);
    });
}

#[test]
fn a_rank_alone_has_its_own_gradients_without_a_bucket() {
    generation(1, LONG, |group| {
        let (parameters, alone) = (small_network(), small_network());
        let reducer = Reducer::new(&group, &parameters, 1000, None).expect("nobody is missing");
        for step in 0..2 {
            reducer.begin().expect("alive");
            reducer.accumulate(&sample_loss(&parameters, step, 0)).expect("no communication");
            reducer.backward(&sample_loss(&parameters, step, 1)).expect("nobody is missing");
        }
        (sample_loss(&alone, 1, 0) + sample_loss(&alone, 1, 1)).backward();
        for (own, alone) in parameters.iter().zip(&alone) {
            let difference = (own.grad() - alone.grad()).abs().max().double_value(&[]);
            assert!(difference < 1e-14, "{difference}");
        }
        assert_eq!(reducer.buckets().expect("alive"), 0);
    });
}

#[test]
fn gradients_of_parts_are_added_up_and_reduced_with_the_last_and_may_travel_in_half_the_bytes() {
    generation(2, LONG, |group| {
        for (compress, tolerance) in [(None, 1e-14), (Some(Half::Fp16), 2e-3), (Some(Half::Bf16), 2e-2)] {
            let parameters = small_network();
            let reducer = Reducer::new(&group, &parameters, 1000, compress).expect("all are here");
            let mine = |step| sample_loss(&parameters, step, group.member.rank as u64);
            for step in 0..3 {
                reducer.begin().expect("alive");
                reducer.accumulate(&mine(step)).expect("no communication");
                reducer.backward(&mine(step + 10)).expect("all are here");
                let alone = small_network();
                let all = [(step, 0), (step, 1), (step + 10, 0), (step + 10, 1)];
                let sum: Tensor = all.iter().map(|&(step, rank)| sample_loss(&alone, step, rank)).sum();
                (sum / 2.0).backward();
                for (averaged, alone) in parameters.iter().zip(&alone) {
                    let difference = (averaged.grad() - alone.grad()).abs().max() / alone.grad().abs().max();
                    let difference = difference.double_value(&[]);
                    assert!(difference < tolerance, "{compress:?}, step {step}: {difference}");
                }
            }
        }
    });
}

#[test]
fn backward_fails_when_a_peer_goes_away_in_it() {
    generation(2, LONG, |group| {
        let parameters = small_network();
        let reducer = Reducer::new(&group, &parameters, 1000, None).expect("all are here");
        reducer.backward(&sample_loss(&parameters, 0, 0)).expect("all are here");
        if group.member.rank == 1 {
            return;
        }
        let start = Instant::now();
        reducer.begin().expect("alive");
        let error = reducer.backward(&sample_loss(&parameters, 1, 0)).expect_err("one is gone");
        assert!(matches!(error, Error::Collective(_)), "{error}");
        assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
    });
}
