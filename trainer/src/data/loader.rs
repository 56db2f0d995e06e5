//! Loads batches ahead of the step: from the samples that a plan names to tensors of bytes.
//!
//! ```text
//! readahead  walks the plan ahead of the rest and reads the blocks of samples that are not cached, at most AHEAD_BYTES of them at a time
//! feeder     takes the samples out of the blocks as they arrive, and allocates the tensors
//! decoders   threads of their own: decode what is not cached, augment, and write their part of the tensor
//! assembler  one thread: puts the batches in order, and has a GPU begin to copy the next ones
//! ```
//!
//! All channels are bounded, so that nothing runs further ahead of the training thread than that. Dropping [`Batches`]
//! ends all stages.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use input::augment::{Augmentation, Augmenter};
use input::color::ColorJitter;
use proto::{RunSpec, Sample, Split};
use tch::{Device, Kind, Tensor};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::batch::{Batch, OnDevice, Pixels};
use super::blocks::BlockReader;
use super::cache::{Cache, NextUse};
use super::device_pixels::{DeviceImage, DevicePixels};
use super::gather::DeviceCrop;
use super::plan::SampleId;
use super::prefetch::{Begin, PrefetchQueue};
use super::requests::{BatchRequest, needed, training};
use crate::torch::Copies;
use crate::torch::tensor::{Chunk, Slab};

/// Blocks of which no sample has been taken yet may have this many bytes together.
const AHEAD_BYTES: u64 = 64 << 20;
/// The readahead is at most this many samples ahead of the decoders.
const AHEAD_SAMPLES: usize = 1 << 14;
/// How many samples one thread decodes at a time.
const PART: usize = 8;

/// Where a rank's batches come from.
#[derive(Debug, Clone)]
pub(crate) struct Loader {
    /// The split that is read.
    pub split: Split,
    /// Its blocks.
    pub blocks: Arc<BlockReader>,
    /// Shared by all loaders of a dataset in this process.
    pub cache: Arc<Cache>,
    /// Where the device keeps images, if it does; shared in the same way.
    pub device_pixels: Option<Arc<DevicePixels>>,
    /// Threads that decode.
    pub threads: usize,
    /// The way to the device that the batches are for.
    pub copies: Copies,
    /// The runtime of the reads.
    pub runtime: tokio::runtime::Handle,
}

impl Loader {
    /// The batches of a rank that trains from step `from` (over the whole run, from 0) to the end of the last epoch.
    pub(crate) fn train(&self, spec: &RunSpec, own_lanes: Range<u32>, from: u64) -> Result<Batches> {
        let kept = self.blocks.kept();
        self.cache.reschedule_all(needed(&kept, spec, own_lanes.clone(), from));
        self.batches(training(kept, spec, own_lanes, from))
    }

    /// Starts to make these batches, in their order.
    pub(crate) fn batches(&self, requests: impl Iterator<Item = BatchRequest> + Send + 'static) -> Result<Batches> {
        // Less than an epoch, so that a sample is not looked up in the cache before its last use has put it there.
        let ahead = (self.blocks.samples() as usize / 16).clamp(512, AHEAD_SAMPLES);
        let (found, to_feed) = mpsc::channel(ahead);
        let (parts, to_decode) = mpsc::channel(2 * self.threads);
        let (decoded, to_assemble) = sync_channel(2 * self.threads);
        let queue = Arc::new(PrefetchQueue::new(self.copies.clone()));
        let readahead = Readahead {
            loader: self.clone(),
            ahead: Arc::new(Semaphore::new(AHEAD_BYTES as usize)),
            open: HashMap::new(),
        };
        let tasks = [
            AbortOnDropHandle::new(self.runtime.spawn(readahead.run(requests, found))),
            AbortOnDropHandle::new(self.runtime.spawn(feed(to_feed, parts, decoded.clone(), self.copies.device()))),
        ];
        let to_decode = Arc::new(Mutex::new(to_decode));
        for i in 0..self.threads {
            let (loader, jobs, decoded) = (self.clone(), to_decode.clone(), decoded.clone());
            thread(&format!("decode-{i}"), move || loader.decode(&jobs, &decoded))?;
        }
        let batches = Batches { queue: queue.clone(), _tasks: tasks };
        let device_pixels = self.device_pixels.clone();
        thread("assemble", move || {
            assemble(&to_assemble, device_pixels.as_ref(), &queue);
            queue.finish();
        })?;
        Ok(batches)
    }

    fn decode(&self, jobs: &Mutex<mpsc::Receiver<DecodeJob>>, decoded: &SyncSender<DecodedPart>) {
        let mut augmenter = None;
        loop {
            let Some(job) = jobs.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv() else { return };
            let DecodeJob { batch, part, items, mut chunk } = job;
            let side = 3 * batch.augmentation.crop() * batch.augmentation.crop();
            let mut rows = chunk.as_deref_mut().unwrap_or_default().chunks_exact_mut(side);
            let known = items.into_iter().map(|(sample_id, source)| {
                if let Input::OnDevice(image) = source {
                    let (crop, jitter) = image.crop(&batch.augmentation)?;
                    return Ok(SampleInfo { key: image.key, label: image.label, jitter, crop: Some(crop) });
                }
                let augmenter = match &mut augmenter {
                    Some(augmenter) => augmenter,
                    none => none.insert(Augmenter::new()?),
                };
                let into = rows.next().context("a part of a batch has no memory for one of its samples")?;
                self.write(augmenter, &batch, sample_id, source, into)
            });
            let done = known.collect::<Result<Vec<SampleInfo>>>().map(|samples| FilledPart { samples, chunk });
            if decoded.send(DecodedPart { batch, part, done }).is_err() {
                return;
            }
        }
    }

    /// Writes the augmented pixels of one sample, and keeps the whole image if it is needed again and there is room.
    fn write(
        &self,
        augmenter: &mut Augmenter,
        batch: &BatchPlan,
        sample_id: SampleId,
        source: Input,
        into: &mut [u8],
    ) -> Result<SampleInfo> {
        let (id, next_use) = ((self.split, sample_id), batch.next_use.of(sample_id));
        // It may have been cached since the readahead looked.
        if let Some(image) = self.cache.get(id, next_use) {
            let jitter = augmenter.apply(&image, &batch.augmentation, into)?;
            return Ok(SampleInfo { key: image.key, label: image.label, jitter, crop: None });
        }
        let sample = match source {
            Input::Encoded(sample) => sample,
            // It was reserved, so it is missing only if the cache's file cannot be read.
            Input::Cached | Input::OnDevice(_) => {
                self.runtime.block_on(self.blocks.read(sample_id.block))?.swap_remove(sample_id.sample as usize)
            }
        };
        let Sample { key, label, .. } = sample;
        // The decoded size is not known yet. The size of the input is near enough to decide whether the device or the
        // cache would keep the image.
        let needed_again = self.device_pixels.as_ref().filter(|_| next_use.is_some());
        let on_device = needed_again.filter(|pixels| pixels.has_room(into.len()));
        let jitter = if on_device.is_some() || self.cache.would_keep(into.len(), next_use) {
            let image = augmenter.decode(&sample)?;
            if !on_device.map_or(Ok(false), |pixels| pixels.keep(id, &image))? {
                self.cache.keep(id, &image, next_use);
            }
            augmenter.apply(&image, &batch.augmentation, into)?
        } else {
            augmenter.decode_and_apply(&sample, &batch.augmentation, into)?
        };
        Ok(SampleInfo { key, label, jitter, crop: None })
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).context("failed to start a thread")?;
    Ok(())
}

type Queue = PrefetchQueue<Result<Batch>, Copies>;

/// The device begins to copy a batch while it still waits in the queue. The error of one that it has no memory for
/// comes in its place.
impl Begin<Result<Batch>> for Copies {
    fn begin(&self, batch: &mut Result<Batch>) {
        if let Ok(Batch { pixels, .. }) = batch
            && let Err(error) = pixels.send_ahead(self)
        {
            *batch = Err(error.into());
        }
    }
}

/// Batches in the order of their requests.
#[derive(Debug)]
pub(crate) struct Batches {
    queue: Arc<Queue>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Batches {
    /// The next batch; None after the last one, or if `cancelled` returns true while there is none yet.
    pub(crate) fn next(&mut self, cancelled: impl Fn() -> bool) -> Option<Result<Batch>> {
        self.queue.pop(cancelled)
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// A batch before its samples have been read.
#[derive(Debug)]
struct BatchPlan {
    number: u64,
    step: u64,
    samples: u64,
    shares: Vec<i64>,
    /// How many of the samples this rank has.
    own: usize,
    augmentation: Augmentation,
    next_use: NextUse,
}

/// A sample on its way from the readahead to the feeder.
struct PlannedSample {
    batch: Arc<BatchPlan>,
    sample_id: SampleId,
    source: Location,
}

enum Location {
    OnDevice(DeviceImage),
    Cached,
    InBlock(Arc<OpenBlock>),
}

struct DecodeJob {
    batch: Arc<BatchPlan>,
    part: usize,
    items: Vec<(SampleId, Input)>,
    /// For all but those that are on the device.
    chunk: Option<Chunk>,
}

enum Input {
    OnDevice(DeviceImage),
    Cached,
    Encoded(Sample),
}

struct DecodedPart {
    batch: Arc<BatchPlan>,
    part: usize,
    done: Result<FilledPart>,
}

/// A part of a batch whose pixels have been written.
struct FilledPart {
    samples: Vec<SampleInfo>,
    chunk: Option<Chunk>,
}

struct SampleInfo {
    key: u64,
    label: u32,
    jitter: ColorJitter,
    /// If the device has its pixels.
    crop: Option<DeviceCrop>,
}

/// A block that is being read or has been.
struct OpenBlock {
    /// An error is passed as text, because several may wait for it.
    samples: Shared<BoxFuture<'static, Result<Arc<Vec<Sample>>, String>>>,
    /// The block's share of AHEAD_BYTES, until its first sample is taken.
    ahead: Mutex<Option<OwnedSemaphorePermit>>,
    _read: AbortOnDropHandle<()>,
}

impl OpenBlock {
    async fn sample(&self, sample_id: SampleId) -> Result<Sample> {
        drop(self.ahead.lock().unwrap_or_else(PoisonError::into_inner).take());
        let samples = self.samples.clone().await.map_err(|error| anyhow!(error))?;
        samples.get(sample_id.sample as usize).cloned().context("a plan names a sample that its block does not have")
    }
}

struct Readahead {
    loader: Loader,
    ahead: Arc<Semaphore>,
    /// Blocks of which samples are still to come in the plan: how many, and the block if one of its samples was not
    /// cached.
    open: HashMap<u32, (u32, Option<Arc<OpenBlock>>)>,
}

impl Readahead {
    async fn run(
        mut self,
        requests: impl Iterator<Item = BatchRequest> + Send + 'static,
        found: mpsc::Sender<PlannedSample>,
    ) {
        let mut plan = HashMap::new();
        for (number, BatchRequest { step, uses, samples, shares, sample_ids, augmentation, next_use }) in
            (0..).zip(requests)
        {
            if let Some(uses) = uses {
                plan = uses;
                self.open.clear();
            }
            let batch =
                Arc::new(BatchPlan { number, step, samples, shares, own: sample_ids.len(), augmentation, next_use });
            for sample_id in sample_ids {
                let uses = plan.get(&sample_id.block).copied().unwrap_or(1);
                let source = self.find(uses, sample_id).await;
                // Samples are sent one at a time, not a batch at a time: otherwise the readahead could wait for ever
                // for bytes of blocks whose samples it has not sent yet.
                if found.send(PlannedSample { batch: batch.clone(), sample_id, source }).await.is_err() {
                    return;
                }
            }
        }
    }

    async fn find(&mut self, uses: u32, sample_id: SampleId) -> Location {
        let id = (self.loader.split, sample_id);
        let on_device = self.loader.device_pixels.as_ref().and_then(|pixels| pixels.find(id));
        let cached = on_device.is_some() || self.loader.cache.reserve(id);
        let (left, block) = self.open.remove(&sample_id.block).unwrap_or((uses, None));
        let (block, source) = match (cached, block) {
            (true, block) => (block, Location::Cached),
            (false, Some(block)) => (Some(block.clone()), Location::InBlock(block)),
            (false, None) => {
                let block = self.read(sample_id.block).await;
                (Some(block.clone()), Location::InBlock(block))
            }
        };
        if left > 1 {
            self.open.insert(sample_id.block, (left - 1, block));
        }
        on_device.map_or(source, Location::OnDevice)
    }

    async fn read(&self, block: u32) -> Arc<OpenBlock> {
        let bytes = self.loader.blocks.bytes(block).min(AHEAD_BYTES) as u32;
        let ahead = self.ahead.clone().acquire_many_owned(bytes).await.ok();
        let (done, wait) = tokio::sync::oneshot::channel();
        let blocks = self.loader.blocks.clone();
        let read = tokio::spawn(async move {
            let read = blocks.read(block).await.map(Arc::new).map_err(|error| format!("{error:#}"));
            let _ = done.send(read);
        });
        let samples = wait.map(|read| read.unwrap_or_else(|_| Err("the read was ended".to_owned()))).boxed().shared();
        Arc::new(OpenBlock { samples, ahead: Mutex::new(ahead), _read: AbortOnDropHandle::new(read) })
    }
}

/// Gathers samples into parts of batches. An error goes to the assembler in place of the part.
async fn feed(
    mut found: mpsc::Receiver<PlannedSample>,
    parts: mpsc::Sender<DecodeJob>,
    decoded: SyncSender<DecodedPart>,
    device: Device,
) {
    let (mut part, mut items, mut seen, mut slab) = (0, Vec::with_capacity(PART), 0, None::<Slab>);
    while let Some(PlannedSample { batch, sample_id, source }) = found.recv().await {
        let source = match source {
            Location::OnDevice(image) => Input::OnDevice(image),
            Location::Cached => Input::Cached,
            Location::InBlock(block) => match block.sample(sample_id).await {
                Ok(sample) => Input::Encoded(sample),
                Err(error) => return fail(decoded, batch, part, error).await,
            },
        };
        items.push((sample_id, source));
        seen += 1;
        let last = seen == batch.own;
        if last || items.len() == PART {
            let items = std::mem::replace(&mut items, Vec::with_capacity(PART));
            let crop = batch.augmentation.crop();
            let from_host = items.iter().filter(|(_, source)| !matches!(source, Input::OnDevice(_))).count();
            if from_host > 0 && slab.is_none() {
                // For all of them: whether the device has the others is not known yet.
                match allocate([batch.own as i64, crop as i64, crop as i64, 3], device).await {
                    Ok(new) => slab = Some(new),
                    Err(error) => return fail(decoded, batch, part, error).await,
                }
            }
            let chunk = slab.as_mut().filter(|_| from_host > 0).map(|slab| slab.chunk(3 * crop * crop * from_host));
            if parts.send(DecodeJob { batch, part, items, chunk }).await.is_err() {
                return;
            }
            part += 1;
        }
        if last {
            (part, seen, slab) = (0, 0, None);
        }
    }
}

/// Memory that a device reads takes long to get when libtorch keeps none of that size.
async fn allocate(shape: [i64; 4], device: Device) -> Result<Slab> {
    match device.is_cuda() {
        true => Ok(tokio::task::spawn_blocking(move || Slab::new(&shape, device)).await??),
        false => Ok(Slab::new(&shape, device)?),
    }
}

/// Sends an error in place of a part. The channel to the assembler may be full, and sending blocks: not on a thread of
/// the runtime.
async fn fail(decoded: SyncSender<DecodedPart>, batch: Arc<BatchPlan>, part: usize, error: anyhow::Error) {
    let failed = DecodedPart { batch, part, done: Err(error) };
    let _ = tokio::task::spawn_blocking(move || decoded.send(failed)).await;
}

/// A batch, its parts, and how many of them are missing.
type Unfinished = (Arc<BatchPlan>, Vec<Option<FilledPart>>, usize);

/// Puts finished batches into the queue in their order, until there are no more parts, the queue is closed, or a part
/// is an error.
fn assemble(decoded: &Receiver<DecodedPart>, device_pixels: Option<&Arc<DevicePixels>>, queue: &Queue) {
    let mut waiting: HashMap<u64, Unfinished> = HashMap::new();
    let mut next = 0;
    for DecodedPart { batch, part, done } in decoded {
        let written = match done {
            Ok(written) => written,
            Err(error) => {
                queue.push(Err(error), 0);
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
            let Some(pixels) = join(slots, head.augmentation.crop() as i64, device_pixels) else { return };
            let BatchPlan { step, samples, ref shares, .. } = *head;
            let bytes = pixels.pixels.numel();
            if !queue.push(Ok(Batch { step, samples, shares: shares.clone(), pixels }), bytes) {
                return;
            }
            next += 1;
        }
    }
}

fn join(parts: Vec<Option<FilledPart>>, crop: i64, device_pixels: Option<&Arc<DevicePixels>>) -> Option<Pixels> {
    let (samples, chunks): (Vec<_>, Vec<_>) =
        parts.into_iter().flatten().map(|FilledPart { samples, chunk }| (samples, chunk)).unzip();
    let known: Vec<SampleInfo> = samples.into_iter().flatten().collect();
    let chunks: Vec<Chunk> = chunks.into_iter().flatten().collect();
    let is_on_device = known.iter().any(|sample| sample.crop.is_some());
    let on_device = device_pixels
        .filter(|_| is_on_device)
        .map(|store| OnDevice { store: store.clone(), crops: known.iter().map(|sample| sample.crop).collect() });
    let labels: Vec<i64> = known.iter().map(|sample| i64::from(sample.label)).collect();
    Some(Pixels {
        pixels: match chunks.is_empty() {
            true => Tensor::empty([0, crop, crop, 3], (Kind::Uint8, Device::Cpu)),
            false => Chunk::join(chunks)?,
        },
        on_device,
        jitters: known.iter().map(|sample| sample.jitter).collect(),
        labels: Tensor::from_slice(&labels),
        keys: known.iter().map(|sample| sample.key).collect(),
        ahead: None,
    })
}
