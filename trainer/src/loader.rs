//! Batches, always ahead of the step: from a plan's places to tensors of bytes.
//!
//! ```text
//! scout      walks the plan far ahead; has the blocks read that are not in the cache, at most AHEAD_BYTES before they are needed
//! feeder     takes the samples out of the blocks as they arrive
//! decoders   own threads: decode what the cache does not hold, cut the views
//! assembler  one thread: puts the parts of a batch in order
//! ```
//!
//! All channels are bounded, so the training thread's pace holds back the rest. Dropping a [`Batches`] ends all of it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use proto::{RunSpec, Sample, Split};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;

use crate::batch::{Decoder, Image, Pixels, Views};
use crate::plan::{EpochPlan, Lane, Place, steps_per_epoch};
use crate::stream::Blocks;

/// Blocks may be read, or on their way, that come to so many bytes before the first of their samples is needed.
const AHEAD_BYTES: u64 = 64 << 20;
/// The scout is at most so many samples ahead of the decoders.
const AHEAD_SAMPLES: usize = 1 << 14;
/// Finished batches that wait for the training thread.
const READY_BATCHES: usize = 2;
/// Samples that one thread decodes at a time.
const PART: usize = 8;

/// Decoded images of one dataset, kept up to a hard limit of bytes. What is in stays in.
#[derive(Debug)]
pub(crate) struct Cache {
    limit: u64,
    bytes: AtomicU64,
    images: RwLock<HashMap<(Split, Place), Arc<Image>>>,
}

impl Cache {
    /// An empty cache that holds at most `limit` bytes of pixels.
    pub(crate) fn new(limit: u64) -> Self {
        Self { limit, bytes: AtomicU64::new(0), images: RwLock::default() }
    }

    fn get(&self, split: Split, place: Place) -> Option<Arc<Image>> {
        self.images.read().unwrap_or_else(PoisonError::into_inner).get(&(split, place)).cloned()
    }

    fn insert(&self, split: Split, place: Place, image: &Arc<Image>) {
        let bytes = image.pixels.len() as u64;
        let fits = |held: u64| (held + bytes <= self.limit).then_some(held + bytes);
        if self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok() {
            let mut images = self.images.write().unwrap_or_else(PoisonError::into_inner);
            if images.insert((split, place), image.clone()).is_some() {
                self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
        }
    }
}

/// Where a rank's batches come from.
#[derive(Debug, Clone)]
pub(crate) struct Loader {
    /// The split that is read.
    pub split: Split,
    /// Its blocks.
    pub blocks: Arc<Blocks>,
    /// Width and height of stored images.
    pub size: u32,
    /// Shared by all loaders of a dataset in this process.
    pub cache: Arc<Cache>,
    /// Threads that decode.
    pub threads: usize,
    /// What the reads run on.
    pub runtime: tokio::runtime::Handle,
}

/// One batch of one rank, as planned.
#[derive(Debug)]
pub(crate) struct Request {
    /// The step that it is for, counted over the whole run from 0.
    pub step: u64,
    /// With the first request of a plan: how many samples of each block the plan asks for in all, so that a block is let go after the last.
    pub uses: Option<HashMap<u32, u32>>,
    /// Samples of the step on all ranks.
    pub samples: u64,
    /// How many of `places` each lane has, lane after lane.
    pub shares: Vec<i64>,
    /// Its samples; at least one.
    pub places: Vec<Place>,
    /// What is done to them.
    pub views: Views,
}

/// A batch that is ready for the device.
#[derive(Debug)]
pub(crate) struct Batch {
    /// As in the request.
    pub step: u64,
    /// As in the request.
    pub samples: u64,
    /// As in the request.
    pub shares: Vec<i64>,
    /// Its samples, in the order of the request.
    pub pixels: Pixels,
}

impl Loader {
    /// Has the requests made into batches, one after the other.
    pub(crate) fn batches(&self, requests: impl Iterator<Item = Request> + Send + 'static) -> Result<Batches> {
        let (found, to_feed) = mpsc::channel(AHEAD_SAMPLES);
        let (parts, to_decode) = mpsc::channel(2 * self.threads);
        let (decoded, to_assemble) = sync_channel(2 * self.threads);
        let (ready, batches) = sync_channel(READY_BATCHES);
        let scout =
            Scout { loader: self.clone(), ahead: Arc::new(Semaphore::new(AHEAD_BYTES as usize)), open: HashMap::new() };
        let tasks = [
            AbortOnDropHandle::new(self.runtime.spawn(scout.run(requests, found))),
            AbortOnDropHandle::new(self.runtime.spawn(feed(to_feed, parts, decoded.clone()))),
        ];
        let to_decode = Arc::new(Mutex::new(to_decode));
        for i in 0..self.threads {
            let (loader, jobs, decoded) = (self.clone(), to_decode.clone(), decoded.clone());
            thread(&format!("decode-{i}"), move || loader.decode(&jobs, &decoded))?;
        }
        thread("assemble", move || assemble(&to_assemble, &ready))?;
        Ok(Batches { batches, _tasks: tasks })
    }

    fn decode(&self, jobs: &Mutex<mpsc::Receiver<Part>>, decoded: &SyncSender<Decoded>) {
        let mut decoder = None;
        loop {
            let Some(job) = jobs.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv() else { return };
            let Part { batch, part, items } = job;
            let mut image = |(place, source)| match source {
                Source::Cached(image) => Ok(image),
                Source::Encoded(sample) => {
                    let decoder = match &mut decoder {
                        Some(decoder) => decoder,
                        none => none.insert(Decoder::new(self.size)?),
                    };
                    let image = Arc::new(decoder.decode(&sample)?);
                    self.cache.insert(self.split, place, &image);
                    Ok(image)
                }
            };
            let images: Result<Vec<Arc<Image>>> = items.into_iter().map(&mut image).collect();
            let pixels = images.map(|images| Pixels::cut(&images, self.size, &batch.views));
            if decoded.send(Decoded { batch, part, pixels }).is_err() {
                return;
            }
        }
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).context("failed to start a thread")?;
    Ok(())
}

/// Batches in the order of their requests.
#[derive(Debug)]
pub(crate) struct Batches {
    batches: Receiver<Result<Batch>>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Batches {
    /// The next batch; None after the last, and when `given_up` says so while there is none yet.
    pub(crate) fn next(&mut self, given_up: impl Fn() -> bool) -> Option<Result<Batch>> {
        loop {
            match self.batches.recv_timeout(Duration::from_millis(50)) {
                Ok(batch) => return Some(batch),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) if given_up() => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// What is known of a batch before its samples are there.
#[derive(Debug)]
struct Head {
    number: u64,
    step: u64,
    samples: u64,
    shares: Vec<i64>,
    /// How many of the samples are this rank's.
    own: usize,
    views: Views,
}

/// A sample on its way from the scout to the feeder.
struct Item {
    batch: Arc<Head>,
    place: Place,
    source: Found,
}

enum Found {
    Cached(Arc<Image>),
    InBlock(Arc<Open>),
}

struct Part {
    batch: Arc<Head>,
    part: usize,
    items: Vec<(Place, Source)>,
}

enum Source {
    Cached(Arc<Image>),
    Encoded(Sample),
}

struct Decoded {
    batch: Arc<Head>,
    part: usize,
    pixels: Result<Pixels>,
}

/// A block that is read, or on its way.
struct Open {
    /// An error is passed to each that waits, as its text.
    samples: Shared<BoxFuture<'static, Result<Arc<Vec<Sample>>, String>>>,
    /// Held until the first sample is taken.
    ahead: Mutex<Option<OwnedSemaphorePermit>>,
    _read: AbortOnDropHandle<()>,
}

impl Open {
    async fn sample(&self, place: Place) -> Result<Sample> {
        drop(self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take());
        let samples = self.samples.clone().await.map_err(|error| anyhow!(error))?;
        samples.get(place.sample as usize).cloned().context("a plan names a sample that its block does not have")
    }
}

struct Scout {
    loader: Loader,
    ahead: Arc<Semaphore>,
    /// Blocks whose samples are not all found yet: how many are left, and the block if one of them was not in the cache.
    open: HashMap<u32, (u32, Option<Arc<Open>>)>,
}

impl Scout {
    async fn run(mut self, requests: impl Iterator<Item = Request> + Send + 'static, found: mpsc::Sender<Item>) {
        let mut plan = HashMap::new();
        for (number, Request { step, uses, samples, shares, places, views }) in (0..).zip(requests) {
            if let Some(uses) = uses {
                plan = uses;
                self.open.clear();
            }
            let batch = Arc::new(Head { number, step, samples, shares, own: places.len(), views });
            for place in places {
                let uses = plan.get(&place.block).copied().unwrap_or(1);
                let source = self.find(uses, place).await;
                // An item at a time, not a batch: all blocks before this one must be able to be used, or the scout could wait for ever
                // for the bytes that they are ahead.
                if found.send(Item { batch: batch.clone(), place, source }).await.is_err() {
                    return;
                }
            }
        }
    }

    async fn find(&mut self, uses: u32, place: Place) -> Found {
        let cached = self.loader.cache.get(self.loader.split, place);
        let (left, block) = self.open.remove(&place.block).unwrap_or((uses, None));
        let (block, source) = match (cached, block) {
            (Some(image), block) => (block, Found::Cached(image)),
            (None, Some(block)) => (Some(block.clone()), Found::InBlock(block)),
            (None, None) => {
                let block = self.read(place.block).await;
                (Some(block.clone()), Found::InBlock(block))
            }
        };
        if left > 1 {
            self.open.insert(place.block, (left - 1, block));
        }
        source
    }

    async fn read(&self, block: u32) -> Arc<Open> {
        let bytes = self.loader.blocks.bytes(block).min(AHEAD_BYTES) as u32;
        let ahead = self.ahead.clone().acquire_many_owned(bytes).await.ok();
        let (done, wait) = tokio::sync::oneshot::channel();
        let blocks = self.loader.blocks.clone();
        let read = tokio::spawn(async move {
            let read = blocks.read(block).await.map(Arc::new).map_err(|error| format!("{error:#}"));
            let _ = done.send(read);
        });
        let samples = wait.map(|read| read.unwrap_or_else(|_| Err("the read was ended".to_owned()))).boxed().shared();
        Arc::new(Open { samples, ahead: Mutex::new(ahead), _read: AbortOnDropHandle::new(read) })
    }
}

/// Gathers samples into parts of batches. An error goes to the assembler in the place of its part.
async fn feed(mut found: mpsc::Receiver<Item>, parts: mpsc::Sender<Part>, decoded: SyncSender<Decoded>) {
    let (mut part, mut items, mut seen) = (0, Vec::with_capacity(PART), 0);
    while let Some(Item { batch, place, source }) = found.recv().await {
        let source = match source {
            Found::Cached(image) => Source::Cached(image),
            Found::InBlock(block) => match block.sample(place).await {
                Ok(sample) => Source::Encoded(sample),
                Err(error) => {
                    // The channel to the assembler may be full, and this must not block the runtime.
                    let failed = Decoded { batch, part, pixels: Err(error) };
                    let _ = tokio::task::spawn_blocking(move || decoded.send(failed)).await;
                    return;
                }
            },
        };
        items.push((place, source));
        seen += 1;
        let last = seen == batch.own;
        if last || items.len() == PART {
            let items = std::mem::replace(&mut items, Vec::with_capacity(PART));
            if parts.send(Part { batch, part, items }).await.is_err() {
                return;
            }
            part += 1;
        }
        if last {
            (part, seen) = (0, 0);
        }
    }
}

/// A batch, its parts, and how many of them are missing.
type Unfinished = (Arc<Head>, Vec<Option<Pixels>>, usize);

/// Puts parts in the order of batches and parts, until they end, nobody wants them, or one is an error.
fn assemble(decoded: &Receiver<Decoded>, ready: &SyncSender<Result<Batch>>) {
    let mut waiting: HashMap<u64, Unfinished> = HashMap::new();
    let mut next = 0;
    for Decoded { batch, part, pixels } in decoded {
        let pixels = match pixels {
            Ok(pixels) => pixels,
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        };
        let parts = batch.own.div_ceil(PART);
        let (_, slots, missing) =
            waiting.entry(batch.number).or_insert_with(|| (batch.clone(), (0..parts).map(|_| None).collect(), parts));
        slots[part] = Some(pixels);
        *missing -= 1;
        while let Some((_, _, 0)) = waiting.get(&next) {
            let Some((head, slots, _)) = waiting.remove(&next) else { return };
            let Some(pixels) = Pixels::join(slots.into_iter().flatten().collect()) else { return };
            let Head { step, samples, ref shares, .. } = *head;
            if ready.send(Ok(Batch { step, samples, shares: shares.clone(), pixels })).is_err() {
                return;
            }
            next += 1;
        }
    }
}

/// A rank's training from step `from` (over the whole run, from 0) to the end of the last epoch.
pub(crate) fn training(
    kept: Vec<u32>,
    spec: &RunSpec,
    mine: Range<u32>,
    from: u64,
) -> impl Iterator<Item = Request> + Send + 'static {
    let (seed, train, lanes, input) = (spec.seed, spec.train.clone(), spec.ranks.lanes, spec.input.clone());
    let steps = steps_per_epoch(kept.iter().map(|&n| u64::from(n)).sum(), train.batch);
    (from / steps..u64::from(train.epochs))
        .map_while(move |epoch| {
            // Whoever asks has made such a plan before, and whether one is possible is the same for all epochs.
            let plan = Arc::new(EpochPlan::new(&kept, lanes, train.batch, seed, epoch).ok()?);
            let first = from.saturating_sub(epoch * steps);
            let mut uses = Some(plan.uses(&mine).collect());
            let mut own: Vec<Lane> = mine.clone().map(|lane| plan.lane(lane, first)).collect();
            let views = Views::Training { input: input.clone(), seed, epoch };
            Some((first..steps).map(move |step| {
                let shares: Vec<Vec<Place>> = own.iter_mut().filter_map(Lane::next).collect();
                Request {
                    step: epoch * steps + step,
                    uses: uses.take(),
                    samples: plan.samples(step),
                    shares: shares.iter().map(|share| share.len() as i64).collect(),
                    places: shares.concat(),
                    views: views.clone(),
                }
            }))
        })
        .flatten()
}

/// A rank's part of an evaluation, in batches of `batch` samples.
pub(crate) fn evaluation(
    places: Vec<Place>,
    batch: usize,
    crop: u32,
) -> impl Iterator<Item = Request> + Send + 'static {
    let mut counts = HashMap::new();
    for place in &places {
        *counts.entry(place.block).or_insert(0) += 1;
    }
    let mut uses = Some(counts);
    (0..places.len()).step_by(batch).zip(0..).map(move |(start, step)| {
        let places = places[start..(start + batch).min(places.len())].to_vec();
        let own = places.len();
        let views = Views::Evaluation { crop };
        Request { step, uses: uses.take(), samples: own as u64, shares: vec![own as i64], places, views }
    })
}
