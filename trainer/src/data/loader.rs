//! Batches, always ahead of the step: from a plan's places to tensors of bytes.
//!
//! ```text
//! scout      walks the plan far ahead; has the blocks read that are not in the cache, at most AHEAD_BYTES before they are needed
//! feeder     takes the samples out of the blocks as they arrive, and makes the tensors
//! decoders   own threads: decode what the cache does not hold, and write each its part of the tensor
//! assembler  one thread: puts the batches in order
//! ```
//!
//! All channels are bounded, so the training thread's pace holds back the rest. Dropping a [`Batches`] ends all of it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use proto::{RunSpec, Sample, Split};
use tch::{Device, Tensor};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::augment::{Cutter, Views};
use super::batch::{Batch, Light, Pixels};
use super::blocks::Blocks;
use super::cache::{Again, Cache};
use super::plan::Place;
use super::ready::Ready;
use super::requests::{Request, needed, training};
use crate::torch::tensor::{Chunk, Slab};

/// Blocks may be read, or on their way, that come to so many bytes before the first of their samples is needed.
const AHEAD_BYTES: u64 = 64 << 20;
/// The scout is at most so many samples ahead of the decoders.
const AHEAD_SAMPLES: usize = 1 << 14;
/// Samples that one thread decodes at a time.
const PART: usize = 8;

/// Where a rank's batches come from.
#[derive(Debug, Clone)]
pub(crate) struct Loader {
    /// The split that is read.
    pub split: Split,
    /// Its blocks.
    pub blocks: Arc<Blocks>,
    /// Shared by all loaders of a dataset in this process.
    pub cache: Arc<Cache>,
    /// Threads that decode.
    pub threads: usize,
    /// For which the batches are.
    pub device: Device,
    /// What the reads run on.
    pub runtime: tokio::runtime::Handle,
}

impl Loader {
    /// The batches of a rank that trains from step `from` (over the whole run, from 0) to the end of the last epoch.
    pub(crate) fn train(&self, spec: &RunSpec, mine: Range<u32>, from: u64) -> Result<Batches> {
        let kept = self.blocks.kept();
        self.cache.replan(needed(&kept, spec, mine.clone(), from));
        self.batches(training(kept, spec, mine, from))
    }

    /// Has the requests made into batches, one after the other.
    pub(crate) fn batches(&self, requests: impl Iterator<Item = Request> + Send + 'static) -> Result<Batches> {
        // Not so far that an epoch's samples are looked for before they have been decoded in the one before.
        let ahead = (self.blocks.samples() as usize / 16).clamp(512, AHEAD_SAMPLES);
        let (found, to_feed) = mpsc::channel(ahead);
        let (parts, to_decode) = mpsc::channel(2 * self.threads);
        let (decoded, to_assemble) = sync_channel(2 * self.threads);
        let ready = Arc::new(Ready::default());
        let scout =
            Scout { loader: self.clone(), ahead: Arc::new(Semaphore::new(AHEAD_BYTES as usize)), open: HashMap::new() };
        let tasks = [
            AbortOnDropHandle::new(self.runtime.spawn(scout.run(requests, found))),
            AbortOnDropHandle::new(self.runtime.spawn(feed(to_feed, parts, decoded.clone(), self.device))),
        ];
        let to_decode = Arc::new(Mutex::new(to_decode));
        for i in 0..self.threads {
            let (loader, jobs, decoded) = (self.clone(), to_decode.clone(), decoded.clone());
            thread(&format!("decode-{i}"), move || loader.decode(&jobs, &decoded))?;
        }
        let batches = Batches { ready: ready.clone(), _tasks: tasks };
        thread("assemble", move || {
            assemble(&to_assemble, &ready);
            ready.end();
        })?;
        Ok(batches)
    }

    fn decode(&self, jobs: &Mutex<mpsc::Receiver<Part>>, decoded: &SyncSender<Decoded>) {
        let mut cutter = None;
        loop {
            let Some(job) = jobs.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv() else { return };
            let Part { batch, part, items, mut chunk } = job;
            let side = 3 * batch.views.crop() * batch.views.crop();
            let known = items.into_iter().zip(chunk.chunks_exact_mut(side)).map(|((place, source), into)| {
                let cutter = match &mut cutter {
                    Some(cutter) => cutter,
                    none => none.insert(Cutter::new()?),
                };
                self.write(cutter, &batch, place, source, into)
            });
            let done = known.collect::<Result<Vec<Known>>>().map(|samples| Written { samples, chunk });
            if decoded.send(Decoded { batch, part, done }).is_err() {
                return;
            }
        }
    }

    /// Writes what is looked at of one sample.
    fn write(&self, cutter: &mut Cutter, batch: &Head, place: Place, source: Source, into: &mut [u8]) -> Result<Known> {
        let (id, again) = ((self.split, place), batch.again.of(place));
        // Also what was not there when it was looked for may have come.
        if let Some(image) = self.cache.take(id, again) {
            let light = cutter.cut(&image, &batch.views, into)?;
            return Ok(Known { key: image.key, label: image.label, light });
        }
        let sample = match source {
            Source::Encoded(sample) => sample,
            // It was promised, so its file cannot be read.
            Source::Cached => self.runtime.block_on(self.blocks.read(place.block))?.swap_remove(place.sample as usize),
        };
        let Sample { key, label, .. } = sample;
        // The size that it will have is not known yet; that of its input is near enough to ask whether it would be kept.
        let light = if self.cache.wants(into.len(), again) {
            let image = cutter.decode(&sample)?;
            self.cache.keep(id, &image, again);
            cutter.cut(&image, &batch.views, into)?
        } else {
            cutter.decode_and_cut(&sample, &batch.views, into)?
        };
        Ok(Known { key, label, light })
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).context("failed to start a thread")?;
    Ok(())
}

/// Batches in the order of their requests.
#[derive(Debug)]
pub(crate) struct Batches {
    ready: Arc<Ready<Result<Batch>>>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Batches {
    /// The next batch; None after the last, and when `given_up` says so while there is none yet.
    pub(crate) fn next(&mut self, given_up: impl Fn() -> bool) -> Option<Result<Batch>> {
        self.ready.next(given_up)
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.ready.refuse();
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
    again: Again,
}

/// A sample on its way from the scout to the feeder.
struct Item {
    batch: Arc<Head>,
    place: Place,
    source: Found,
}

enum Found {
    Cached,
    InBlock(Arc<Open>),
}

struct Part {
    batch: Arc<Head>,
    part: usize,
    items: Vec<(Place, Source)>,
    chunk: Chunk,
}

enum Source {
    Cached,
    Encoded(Sample),
}

struct Decoded {
    batch: Arc<Head>,
    part: usize,
    done: Result<Written>,
}

/// A part of a batch whose pixels are in their place.
struct Written {
    samples: Vec<Known>,
    chunk: Chunk,
}

struct Known {
    key: u64,
    label: u32,
    light: Light,
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
        for (number, Request { step, uses, samples, shares, places, views, again }) in (0..).zip(requests) {
            if let Some(uses) = uses {
                plan = uses;
                self.open.clear();
            }
            let batch = Arc::new(Head { number, step, samples, shares, own: places.len(), views, again });
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
        let cached = self.loader.cache.promise((self.loader.split, place));
        let (left, block) = self.open.remove(&place.block).unwrap_or((uses, None));
        let (block, source) = match (cached, block) {
            (true, block) => (block, Found::Cached),
            (false, Some(block)) => (Some(block.clone()), Found::InBlock(block)),
            (false, None) => {
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
async fn feed(
    mut found: mpsc::Receiver<Item>,
    parts: mpsc::Sender<Part>,
    decoded: SyncSender<Decoded>,
    device: Device,
) {
    let (mut part, mut items, mut seen, mut slab) = (0, Vec::with_capacity(PART), 0, None);
    while let Some(Item { batch, place, source }) = found.recv().await {
        let source = match source {
            Found::Cached => Source::Cached,
            Found::InBlock(block) => match block.sample(place).await {
                Ok(sample) => Source::Encoded(sample),
                Err(error) => {
                    // The channel to the assembler may be full, and this must not block the runtime.
                    let failed = Decoded { batch, part, done: Err(error) };
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
            let crop = batch.views.crop();
            let shape = [batch.own as i64, crop as i64, crop as i64, 3];
            let chunk = slab.get_or_insert_with(|| Slab::new(&shape, device)).chunk(3 * crop * crop * items.len());
            if parts.send(Part { batch, part, items, chunk }).await.is_err() {
                return;
            }
            part += 1;
        }
        if last {
            (part, seen, slab) = (0, 0, None);
        }
    }
}

/// A batch, its parts, and how many of them are missing.
type Unfinished = (Arc<Head>, Vec<Option<Written>>, usize);

/// Puts parts in the order of batches and parts, until they end, nobody wants them, or one is an error.
fn assemble(decoded: &Receiver<Decoded>, ready: &Ready<Result<Batch>>) {
    let mut waiting: HashMap<u64, Unfinished> = HashMap::new();
    let mut next = 0;
    for Decoded { batch, part, done } in decoded {
        let written = match done {
            Ok(written) => written,
            Err(error) => {
                ready.put(Err(error), 0);
                return;
            }
        };
        let parts = batch.own.div_ceil(PART);
        let (_, slots, missing) =
            waiting.entry(batch.number).or_insert_with(|| (batch.clone(), (0..parts).map(|_| None).collect(), parts));
        slots[part] = Some(written);
        *missing -= 1;
        while let Some((_, _, 0)) = waiting.get(&next) {
            let Some((head, slots, _)) = waiting.remove(&next) else { return };
            let Some(pixels) = join(slots) else { return };
            let Head { step, samples, ref shares, .. } = *head;
            let bytes = pixels.pixels.numel();
            if !ready.put(Ok(Batch { step, samples, shares: shares.clone(), pixels }), bytes) {
                return;
            }
            next += 1;
        }
    }
}

fn join(parts: Vec<Option<Written>>) -> Option<Pixels> {
    let (samples, chunks): (Vec<_>, Vec<_>) =
        parts.into_iter().flatten().map(|Written { samples, chunk }| (samples, chunk)).unzip();
    let known: Vec<Known> = samples.into_iter().flatten().collect();
    let labels: Vec<i64> = known.iter().map(|sample| i64::from(sample.label)).collect();
    Some(Pixels {
        pixels: Chunk::join(chunks)?,
        lights: known.iter().map(|sample| sample.light).collect(),
        labels: Tensor::from_slice(&labels),
        keys: known.iter().map(|sample| sample.key).collect(),
    })
}
