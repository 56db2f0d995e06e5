//! Batches that are sent to a device before a step asks for them. Here the CPU is taken for a device that copies while
//! it computes; how a GPU does, shim.cc says.

use std::sync::atomic::{AtomicUsize, Ordering};

use tch::Tensor;

use super::*;
use crate::data::batch::{Batch, Pixels};
use crate::data::loader::Loader;
use crate::learn::failure::Failure;
use crate::learn::job::Job;
use crate::torch::Double;

fn job(world: &World) -> Job {
    Job::open(&world.context(), &world.join("run", &spec("f64"), 1, (0, 1), 0)).expect("a sound spec")
}

fn batches(job: &Job, loader: &Loader) -> Vec<Batch> {
    let mut batches = loader.train(&job.spec, 0..6, 0).expect("threads start");
    (0..job.steps()).map(|_| batches.next(|| false).expect("all of them").expect("a sound dataset")).collect()
}

fn heard(counter: &AtomicUsize) -> usize {
    counter.load(Ordering::SeqCst)
}

#[test]
fn at_most_two_batches_are_sent_before_a_step_asks_for_them_and_they_are_those_of_any_loader() {
    let world = World::new();
    let job = job(&world);
    let expected = batches(&job, &job.loader(Split::Train));
    let device = Double { room: usize::MAX, ..Double::default() };
    let loader = Loader { copies: device.copies(), ..job.loader(Split::Train) };
    let mut batches = loader.train(&job.spec, 0..6, 0).expect("threads start");
    let mut waited = 0;
    for (taken, one) in (1..).zip(&expected) {
        let other = batches.next(|| false).expect("all of them").expect("a sound dataset");
        let sent = (taken + 2).min(expected.len());
        let deadline = Instant::now() + DEADLINE;
        while heard(&device.sent) < sent {
            assert!(Instant::now() < deadline, "{} of {sent} were sent", heard(&device.sent));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(heard(&device.sent), sent, "with {taken} taken");

        assert_eq!(heard(&device.waited), waited, "nobody waits before it is used");
        let half = other.pixels.part(3, 9);
        for (one, other) in [(&one.pixels, &other.pixels), (&one.pixels.part(3, 9), &half)] {
            let ([images, labels], [of_ahead, labels_of_ahead]) = (applied(&job, one), applied(&job, other));
            assert_eq!((images, labels), (of_ahead, labels_of_ahead));
            waited += 1;
            assert_eq!(heard(&device.waited), waited, "a part of a batch waits for the whole, too");
        }
    }
}

fn applied(job: &Job, pixels: &Pixels) -> [Tensor; 2] {
    job.normalise.apply(pixels).expect("shapes agree").into()
}

#[test]
fn a_device_without_memory_for_a_batch_ahead_says_so_with_what_to_do_when_that_batch_is_asked_for() {
    let world = World::new();
    let job = job(&world);
    let device = Double { room: 3, ..Double::default() };
    let loader = Loader { copies: device.copies(), ..job.loader(Split::Train) };
    let mut batches = loader.train(&job.spec, 0..6, 0).expect("threads start");
    for _ in 0..3 {
        batches.next(|| false).expect("all of them").expect("there was memory");
    }
    let error = batches.next(|| false).expect("in the place of the fourth").expect_err("there was none");
    let Failure::OutOfMemory(said) = Failure::from(error) else { panic!("its own class") };
    assert!(said.contains("out of memory: tried") && said.contains("train.micro_batch"), "{said}");
}

#[test]
fn batches_that_nobody_takes_end_with_their_loader() {
    let world = World::new();
    let job = job(&world);
    let device = Double { room: usize::MAX, ..Double::default() };
    let loader = Loader { copies: device.copies(), ..job.loader(Split::Train) };
    for times in 1..=3 {
        let batches = loader.train(&job.spec, 0..6, 0).expect("threads start");
        let deadline = Instant::now() + DEADLINE;
        while heard(&device.sent) < 2 * times {
            assert!(Instant::now() < deadline, "two are sent unasked");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(batches);
    }
    assert_eq!((heard(&device.sent), heard(&device.waited)), (6, 0));
}
