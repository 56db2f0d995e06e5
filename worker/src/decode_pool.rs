//! Threads that validate bodies, so that no decoding ever runs on a thread that serves connections.
//!
//! A decoder that never comes back from a picture cannot be stopped. It costs that picture, which is rejected after
//! [`DEADLINE`], and a thread, in whose place another one starts; too many of them end the process.
//!
//! Pictures that take much memory are decoded one at a time, on a thread of their own, so that they do not hold up the
//! others.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use crate::decode_memory::{DecodeMemory, Places};
use crate::fetch::Body;
use crate::metrics;
use crate::validate::{FindRoom, Rules, Validation, Validator};

/// No picture within the limits takes a decoder nearly as long, even on a slow and busy machine.
const DEADLINE: Duration = Duration::from_secs(180);
/// The deadline is counted in so many looks at the threads: a process that was stopped for a while has not used it up.
const CHECKS: u32 = 60;

/// Validates a body where there is room for it; none if that is on the thread for huge ones.
type Work = Box<dyn FnMut(FindRoom<'_>, [u8; 32], &[u8], &Rules) -> Option<Validation> + Send>;

/// A handle on the threads. They end when it and its clones are dropped.
#[derive(Debug, Clone)]
pub(crate) struct DecodePool {
    jobs: mpsc::Sender<Job>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Job {
    body: Body,
    rules: Arc<Rules>,
    reply: oneshot::Sender<Validation>,
}

#[derive(Debug)]
struct Shared {
    work: fn() -> anyhow::Result<Work>,
    memory: Arc<DecodeMemory>,
    queue: Mutex<mpsc::Receiver<Job>>,
    /// Of huge pictures, no more than there are connections. Each thread that may find one holds the sender.
    huge_queue: Mutex<mpsc::UnboundedReceiver<Job>>,
    huge_jobs: mpsc::WeakUnboundedSender<Job>,
    threads: Mutex<Vec<Thread>>,
    /// Threads that were given up and have not come back.
    stuck: AtomicUsize,
}

/// What a thread is for, and what it works on.
#[derive(Debug, Clone)]
struct Thread {
    huge: bool,
    running: Arc<Mutex<Option<Running>>>,
}

#[derive(Debug)]
struct Running {
    sha256: [u8; 32],
    reply: oneshot::Sender<Validation>,
    checks: u32,
}

impl DecodePool {
    /// Starts `threads` threads, and one for huge pictures, which hold so many bytes of `memory` together.
    pub(crate) fn start(threads: usize, memory: u64) -> anyhow::Result<Self> {
        Self::start_with(threads, memory, || {
            let mut validator = Validator::new()?;
            Ok(Box::new(move |room, sha256, bytes, rules| validator.validate_within(room, sha256, bytes, rules)))
        })
    }

    fn start_with(threads: usize, memory: u64, work: fn() -> anyhow::Result<Work>) -> anyhow::Result<Self> {
        let (jobs, queue) = mpsc::channel(threads * 2);
        let (huge_jobs, huge_queue) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            work,
            memory: DecodeMemory::new(memory),
            queue: Mutex::new(queue),
            huge_queue: Mutex::new(huge_queue),
            huge_jobs: huge_jobs.downgrade(),
            threads: Mutex::default(),
            stuck: AtomicUsize::new(0),
        });
        for n in 0..=threads {
            let thread = shared.spawn(n == threads)?;
            lock(&shared.threads).push(thread);
        }
        Ok(Self { jobs, shared })
    }

    /// Waits for a free thread and for its validation.
    pub(crate) async fn validate(&self, body: Body, rules: Arc<Rules>) -> anyhow::Result<Validation> {
        let (reply, validation) = oneshot::channel();
        self.jobs.send(Job { body, rules, reply }).await.ok().context("the decoding threads have ended")?;
        validation.await.context("a decoding thread has ended")
    }

    /// Rejects pictures from which decoders do not come back, and starts other threads in their place. Returns when
    /// more threads are stuck than there should be in all.
    pub(crate) async fn watch(self) -> anyhow::Error {
        self.watch_with(DEADLINE / CHECKS).await
    }

    async fn watch_with(self, pause: Duration) -> anyhow::Error {
        let mut ticks = tokio::time::interval(pause);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.shared.replace_stuck() {
                return error;
            }
        }
    }
}

impl Shared {
    fn spawn(self: &Arc<Self>, huge: bool) -> anyhow::Result<Thread> {
        let mut work = (self.work)()?;
        let thread = Thread { huge, running: Arc::default() };
        let (shared, own) = (Arc::clone(self), thread.clone());
        let huge_jobs = if huge { None } else { self.huge_jobs.upgrade() };
        let mut places = self.memory.places(huge);
        std::thread::Builder::new()
            .name(if huge { "decode-huge" } else { "decode" }.to_owned())
            .spawn(move || {
                while let Some(job) = shared.next(huge) {
                    if !own.run(job, &mut work, &mut places, huge_jobs.as_ref()) {
                        shared.stuck.fetch_sub(1, Ordering::Relaxed);
                        return;
                    }
                }
            })
            .context("no thread for decoding")?;
        Ok(thread)
    }

    fn next(&self, huge: bool) -> Option<Job> {
        if huge { lock(&self.huge_queue).blocking_recv() } else { lock(&self.queue).blocking_recv() }
    }

    fn replace_stuck(self: &Arc<Self>) -> anyhow::Result<()> {
        let mut threads = lock(&self.threads);
        let most = threads.len();
        for thread in threads.iter_mut() {
            let Some(Running { sha256, reply, .. }) = thread.take_if_stuck() else { continue };
            let stuck = self.stuck.fetch_add(1, Ordering::Relaxed) + 1;
            let sha256_hex = hex::encode(sha256);
            tracing::error!(
                sha256 = sha256_hex,
                stuck,
                "a decoder does not come back from this picture; it is rejected"
            );
            let _ = reply.send(Validation::undecodable(sha256));
            anyhow::ensure!(stuck <= most, "{stuck} decoders have not come back from their pictures in {DEADLINE:?}");
            *thread = self.spawn(thread.huge)?;
        }
        Ok(())
    }
}

impl Thread {
    /// Does a job, or hands it on if its picture is huge. False if the thread was given up meanwhile.
    fn run(
        &self,
        job: Job,
        work: &mut Work,
        places: &mut Places,
        huge_jobs: Option<&mpsc::UnboundedSender<Job>>,
    ) -> bool {
        let Job { body, rules, reply } = job;
        // Nobody waits any more if the attempt was dropped.
        if reply.is_closed() {
            return true;
        }
        let start = Instant::now();
        let sha256 = Sha256::digest(&body.bytes).into();
        *lock(&self.running) = Some(Running { sha256, reply, checks: 0 });
        // Who waits for memory is not stuck.
        let room = &mut |bytes| places.take(bytes, || self.is_well());
        let validation = work(room, sha256, &body.bytes, &rules);
        places.release();
        let Some(Running { reply, .. }) = lock(&self.running).take() else { return false };
        match (validation, huge_jobs) {
            (Some(validation), _) => {
                metrics::validated(start.elapsed().as_secs_f64());
                drop(body);
                let _ = reply.send(validation);
            }
            (None, Some(huge_jobs)) => {
                let _ = huge_jobs.send(Job { body, rules, reply });
            }
            (None, None) => {}
        }
        true
    }

    /// Its deadline begins anew.
    fn is_well(&self) {
        if let Some(running) = lock(&self.running).as_mut() {
            running.checks = 0;
        }
    }

    /// What it has worked on for too long.
    fn take_if_stuck(&self) -> Option<Running> {
        let mut running = lock(&self.running);
        running.as_mut()?.checks += 1;
        running.take_if(|running| running.checks > CHECKS)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can leave them half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use image::{GrayImage, ImageFormat};
    use proto::{Limits, Rejection};

    use super::*;
    use crate::validate::tests::{encoded, jpeg, photo, rules};

    static RELEASED: AtomicBool = AtomicBool::new(false);

    /// Does not come back from the body "endless" before it is released.
    fn work() -> anyhow::Result<Work> {
        Ok(Box::new(|_, sha256, bytes, _| {
            while bytes == b"endless" && !RELEASED.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Some(Validation::undecodable(sha256))
        }))
    }

    #[tokio::test]
    async fn a_decoder_that_does_not_come_back_costs_its_picture_and_too_many_of_them_end_the_process() {
        let pool = DecodePool::start_with(1, 1 << 30, work).expect("threads");
        let watch = tokio::spawn(pool.clone().watch_with(Duration::from_millis(2)));
        let validate = async |bytes: &[u8]| {
            let validation =
                pool.validate(Body::holding(bytes.to_vec()), Arc::new(rules())).await.expect("a validation");
            validation.outcome.expect_err("nothing is decoded here")
        };
        for _ in 0..2 {
            assert_eq!(validate(b"endless").await, Rejection::Undecodable);
            validate(b"good").await;
            assert!(!watch.is_finished());
        }
        assert_eq!(validate(b"endless").await, Rejection::Undecodable);
        let error = watch.await.expect("no panic").to_string();
        assert!(error.contains("3 decoders"), "{error}");

        RELEASED.store(true, Ordering::Relaxed);
        let released = async {
            while pool.shared.stuck.load(Ordering::Relaxed) > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), released).await.expect("they end when they come back");
    }

    #[tokio::test]
    async fn huge_pictures_take_their_turns_without_holding_up_others() {
        let pool = DecodePool::start(1, 1 << 30).expect("a thread");
        let rules = Arc::new(Rules { limits: Limits { max_pixels: 1 << 30, ..rules().limits }, ..rules() });
        let validated = |bytes: &[u8]| pool.validate(Body::holding(bytes.to_vec()), Arc::clone(&rules));
        let huge = encoded(GrayImage::new(4200, 4200), ImageFormat::Png);
        let (first, second) = (validated(&huge), validated(&huge));
        let small = async {
            // Behind both of them in the queue.
            tokio::task::yield_now().await;
            for seed in 0..20 {
                let validation = validated(&jpeg(&photo(100 + seed, 100))).await.expect("a validation");
                assert!(validation.outcome.is_ok());
            }
            Instant::now()
        };
        let huge = async {
            let validations = tokio::try_join!(first, second).expect("validations");
            (validations, Instant::now())
        };
        let (small_done, ((first, second), huge_done)) = tokio::join!(small, huge);
        assert!(small_done < huge_done);
        for validation in [first, second] {
            assert_eq!(
                (validation.size, validation.outcome.expect_err("it is black")),
                (Some((4200, 4200)), Rejection::Flat)
            );
        }
    }
}
