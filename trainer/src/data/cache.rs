//! A cache of decoded images, so that a later epoch need not decode them again: in memory up to a hard limit, then in a
//! file up to another.
//!
//! The plan says when each image is needed next, so the cache evicts the image whose next use is the latest (Belády, "A
//! study of replacement algorithms for a virtual-storage computer", 1966). An epoch needs each image once, so the hit
//! rate of any cache is at most the share of images that it has room for. This one reaches that; least-recently-used
//! with room for half of the images hits a seventh. Images without a next use are not kept.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use input::image::Image;
use proto::Split;
use tracing::warn;

use super::plan::{SampleId, UseTimes};

/// Images in the file take whole pages of this many bytes.
const PAGE: usize = 64 << 10;

/// An image of the dataset.
pub(crate) type ImageId = (Split, SampleId);

/// When an image is used, as a place in the plan: the epoch (from 0) in the upper 32 bits, the fraction of the epoch in
/// the lower ones.
pub(crate) type PlanTime = u64;

/// The next use of a reserved image, which comes before all others.
const RESERVED: PlanTime = 0;

/// When the images of a batch are used next.
#[derive(Debug, Clone)]
pub(crate) enum NextUse {
    /// Never.
    Never,
    /// All at the same time.
    At(PlanTime),
    /// In an epoch, each at its time in the plan.
    InEpoch(u32, Arc<UseTimes>),
}

impl NextUse {
    /// At the end of epoch `epoch`.
    pub(crate) fn at_the_end_of(epoch: u32) -> Self {
        Self::At((PlanTime::from(epoch) + 1) << 32)
    }

    /// The time of this image's next use.
    pub(crate) fn of(&self, sample_id: SampleId) -> Option<PlanTime> {
        match self {
            NextUse::Never => None,
            NextUse::At(time) => Some(*time),
            // From 1 on, so that nothing is due before a reserved image.
            NextUse::InEpoch(epoch, use_times) => use_times
                .of(sample_id)
                .map(|time| ((PlanTime::from(*epoch) << 32) | PlanTime::from(time)).max(RESERVED + 1)),
        }
    }
}

/// The cache of one process.
#[derive(Debug)]
pub(crate) struct Cache {
    state: Mutex<State>,
    file: Option<File>,
    free: Arc<FreePages>,
}

/// Numbers of pages of the file that hold nothing. Locked after the state, never before it.
type FreePages = Mutex<Vec<u32>>;

/// Pages of the file that belong to one image. **They are free only when the last reader has dropped them**: an image
/// may be evicted while another thread still reads it.
#[derive(Debug)]
struct Pages {
    numbers: Vec<u32>,
    free: Arc<FreePages>,
}

impl Drop for Pages {
    fn drop(&mut self) {
        lock(&self.free).append(&mut self.numbers);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<ImageId, (PlanTime, Stored)>,
    memory: Tier,
    disk: Tier,
}

#[derive(Debug, Clone)]
enum Stored {
    Memory(Arc<Image>),
    /// Key, label, size, and where its pixels are.
    Disk(u64, u32, (usize, usize), Arc<Pages>),
}

/// The images in one kind of storage, in the order of their next use.
#[derive(Debug, Default)]
struct Tier {
    limit: u64,
    used: u64,
    order: BTreeSet<(PlanTime, ImageId)>,
}

impl Cache {
    /// An empty cache for at most `limit` bytes of pixels in memory, and `disk_limit` in a file in the folder `disk`.
    /// The file has no name, so nothing is left of it when the process ends, however it ends.
    ///
    /// # Errors
    /// If no file can be created in that folder.
    pub(crate) fn new(limit: u64, disk: Option<(&Path, u64)>) -> io::Result<Self> {
        let file = disk.map(|(folder, _)| tempfile::tempfile_in(folder)).transpose()?;
        let pages = disk.map_or(0, |(_, limit)| u32::try_from(limit / PAGE as u64).unwrap_or(u32::MAX));
        let state = State {
            memory: Tier { limit, ..Tier::default() },
            disk: Tier { limit: u64::from(pages) * PAGE as u64, ..Tier::default() },
            entries: HashMap::new(),
        };
        Ok(Self { state: Mutex::new(state), file, free: Arc::new(Mutex::new((0..pages).rev().collect())) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Whether the image is cached. If so, it is not evicted before the next `get`.
    pub(crate) fn reserve(&self, id: ImageId) -> bool {
        self.state().reschedule(id, Some(RESERVED))
    }

    /// The image, if it is cached. It stays in the cache until its next use; without one it is removed.
    pub(crate) fn get(&self, id: ImageId, next_use: Option<PlanTime>) -> Option<Arc<Image>> {
        let stored = {
            let mut state = self.state();
            let (_, stored) = state.entries.get(&id)?.clone();
            state.reschedule(id, next_use);
            stored
        };
        match stored {
            Stored::Memory(image) => Some(image),
            Stored::Disk(key, label, size, pages) => match self.read(&pages, 3 * size.0 * size.1) {
                Ok(pixels) => Some(Arc::new(Image::new(key, label, size, pixels))),
                Err(error) => {
                    warn!(%error, "the cache's file cannot be read");
                    self.state().remove(id);
                    None
                }
            },
        }
    }

    /// Whether [`Cache::keep`] would keep an image of this many bytes.
    pub(crate) fn would_keep(&self, bytes: usize, next_use: Option<PlanTime>) -> bool {
        let state = self.state();
        next_use.is_some_and(|next_use| {
            state.memory.has_room(bytes as u64, next_use) || state.disk.has_room(in_pages(bytes) as u64, next_use)
        })
    }

    /// Keeps the image for its next use, if there is room or images that are used later can be evicted for it.
    pub(crate) fn keep(&self, id: ImageId, image: &Arc<Image>, next_use: Option<PlanTime>) {
        let Some(next_use) = next_use else { return };
        let mut to_disk = Vec::new();
        {
            let mut state = self.state();
            if state.entries.contains_key(&id) {
                return;
            }
            let bytes = image.pixels.len() as u64;
            if state.memory.has_room(bytes, next_use) {
                while state.memory.used + bytes > state.memory.limit
                    && let Some((time, last)) = state.memory.last_after(next_use)
                {
                    if let Some((_, Stored::Memory(image))) = state.remove(last) {
                        to_disk.push((last, image, time));
                    }
                }
            }
            match state.memory.used + bytes <= state.memory.limit {
                true => state.insert(id, next_use, Stored::Memory(image.clone())),
                false => to_disk.push((id, image.clone(), next_use)),
            }
        }
        for (id, image, next_use) in to_disk {
            self.keep_on_disk(id, &image, next_use);
        }
    }

    fn keep_on_disk(&self, id: ImageId, image: &Image, next_use: PlanTime) {
        let Some(file) = &self.file else { return };
        let bytes = in_pages(image.pixels.len());
        let mut pages = {
            let mut state = self.state();
            if !state.disk.has_room(bytes as u64, next_use) {
                return;
            }
            loop {
                if let Some(pages) = self.allocate(bytes / PAGE) {
                    break pages;
                }
                // The pages of an evicted image that is being read come free later.
                let Some((_, last)) = state.disk.last_after(next_use) else { return };
                state.remove(last);
            }
        };
        let parts = image.pixels.chunks(PAGE).zip(&pages.numbers);
        let written = parts.into_iter().try_for_each(|(part, &page)| file.write_all_at(part, at(page)));
        let mut state = self.state();
        match written {
            Ok(()) if !state.entries.contains_key(&id) => {
                let size = (image.width, image.height);
                state.insert(id, next_use, Stored::Disk(image.key, image.label, size, Arc::new(pages)));
            }
            Ok(()) => {}
            Err(error) => {
                // For example because the disk is full. Images that are in the file stay there, and these pages are not
                // used again.
                warn!(%error, "the cache's file cannot be written; it does not grow any more");
                state.disk.limit = state.disk.used;
                pages.numbers.clear();
            }
        }
    }

    /// Takes that many free pages.
    fn allocate(&self, count: usize) -> Option<Pages> {
        let mut free = lock(&self.free);
        let left = free.len().checked_sub(count)?;
        Some(Pages { numbers: free.split_off(left), free: self.free.clone() })
    }

    fn read(&self, pages: &Pages, bytes: usize) -> io::Result<Vec<u8>> {
        let mut pixels = vec![0; bytes];
        let file = self.file.as_ref().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        pixels.chunks_mut(PAGE).zip(&pages.numbers).try_for_each(|(part, &page)| file.read_exact_at(part, at(page)))?;
        Ok(pixels)
    }

    /// Gives all images their next use anew, as after a change of ranks. Images without one are removed.
    pub(crate) fn reschedule_all(&self, next_use: impl Fn(ImageId) -> Option<PlanTime>) {
        let mut state = self.state();
        let ids: Vec<ImageId> = state.entries.keys().copied().collect();
        for id in ids {
            state.reschedule(id, next_use(id));
        }
    }
}

fn in_pages(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE)
}

fn at(page: u32) -> u64 {
    u64::from(page) * PAGE as u64
}

impl Stored {
    fn bytes(&self) -> u64 {
        match self {
            Stored::Memory(image) => image.pixels.len() as u64,
            Stored::Disk(.., pages) => (pages.numbers.len() * PAGE) as u64,
        }
    }
}

impl Tier {
    /// Whether there is room, or would be after evicting images that are used later.
    fn has_room(&self, bytes: u64, next_use: PlanTime) -> bool {
        let mut free = self.limit.saturating_sub(self.used);
        // An image is seldom larger than a few of the others, so this loop is short.
        let mut later = self.order.iter().rev().take_while(|(time, _)| *time > next_use);
        while free < bytes {
            if later.next().is_none() {
                return false;
            }
            free += self.used / self.order.len().max(1) as u64;
        }
        bytes <= self.limit
    }

    /// The image whose use is the latest, if that is after `next_use`.
    fn last_after(&self, next_use: PlanTime) -> Option<(PlanTime, ImageId)> {
        self.order.last().copied().filter(|(time, _)| *time > next_use)
    }
}

impl State {
    fn tier(&mut self, stored: &Stored) -> &mut Tier {
        match stored {
            Stored::Memory(_) => &mut self.memory,
            Stored::Disk(..) => &mut self.disk,
        }
    }

    fn insert(&mut self, id: ImageId, next_use: PlanTime, stored: Stored) {
        let bytes = stored.bytes();
        let tier = self.tier(&stored);
        tier.used += bytes;
        tier.order.insert((next_use, id));
        self.entries.insert(id, (next_use, stored));
    }

    fn remove(&mut self, id: ImageId) -> Option<(PlanTime, Stored)> {
        let (time, stored) = self.entries.remove(&id)?;
        let bytes = stored.bytes();
        let tier = self.tier(&stored);
        tier.used -= bytes;
        tier.order.remove(&(time, id));
        Some((time, stored))
    }

    /// Changes the next use of an image, or removes the image if there is none. Returns whether it is cached.
    fn reschedule(&mut self, id: ImageId, next_use: Option<PlanTime>) -> bool {
        let Some(next_use) = next_use else { return self.remove(id).is_some() };
        let Some((time, stored)) = self.entries.get_mut(&id) else { return false };
        let before = std::mem::replace(time, next_use);
        let stored = stored.clone();
        let tier = self.tier(&stored);
        tier.order.remove(&(before, id));
        tier.order.insert((next_use, id));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::random;

    fn image(n: u32) -> Arc<Image> {
        Arc::new(Image::new(u64::from(n), n, (100, 10), vec![n as u8; 3000]))
    }

    fn id(n: u32) -> ImageId {
        (Split::Train, SampleId { block: 0, sample: n })
    }

    /// Reads `n` images in a new random order in each epoch; the share of reads that found their image.
    fn hits(cache: &Cache, n: u32, epochs: u64) -> f64 {
        let order = |epoch: u64| {
            let mut order: Vec<u32> = (0..n).collect();
            random::shuffle(&mut order, epoch);
            order
        };
        let mut hits = 0;
        for epoch in 0..epochs {
            let mut use_times = vec![0; n as usize];
            for (time, i) in order(epoch + 1).into_iter().enumerate() {
                use_times[i as usize] = ((epoch + 1) << 32) + time as u64 * (u64::from(u32::MAX) / u64::from(n));
            }
            for i in order(epoch) {
                let next_use = (epoch + 1 < epochs).then_some(use_times[i as usize]);
                match cache.reserve(id(i)) {
                    true => {
                        let found = cache.get(id(i), next_use).expect("it was reserved");
                        assert_eq!((found.key, found.label, found.pixels[2999]), (u64::from(i), i, i as u8));
                        hits += u32::from(epoch > 0);
                    }
                    false => cache.keep(id(i), &image(i), next_use),
                }
                let state = cache.state();
                assert!(state.memory.used <= state.memory.limit && state.disk.used <= state.disk.limit);
            }
        }
        f64::from(hits) / (f64::from(n) * (epochs - 1) as f64)
    }

    #[test]
    fn with_room_for_half_of_the_images_half_are_found_and_nothing_is_kept_at_the_end() {
        let cache = Cache::new(100 * 3000, None).expect("no file");
        assert_eq!(hits(&cache, 200, 6), 0.5);
        let state = cache.state();
        assert!(state.entries.is_empty() && state.memory.used == 0);
    }

    #[test]
    fn what_memory_has_no_room_for_is_found_in_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache::new(50 * 3000, Some((folder.path(), 150 * PAGE as u64))).expect("a file");
        assert_eq!(hits(&cache, 200, 4), 1.0);
        assert_eq!(lock(&cache.free).len(), 150);
        assert_eq!(std::fs::read_dir(folder.path()).expect("it is there").count(), 0, "the file has no name");
        let small = Cache::new(50 * 3000, Some((folder.path(), 50 * PAGE as u64))).expect("a file");
        assert_eq!(hits(&small, 200, 4), 0.5);
    }

    #[test]
    fn threads_that_read_while_others_evict_get_the_pixels_of_their_own_image() {
        const IMAGES: u32 = 60;
        let folder = tempfile::tempdir().expect("a folder");
        // No memory, and a file with room for half of the images, each of four pages.
        let cache = Cache::new(0, Some((folder.path(), u64::from(IMAGES) / 2 * 4 * PAGE as u64))).expect("a file");
        let large = |n: u32| Arc::new(Image::new(u64::from(n), n, (256, 256), vec![n as u8; 3 * 256 * 256]));
        let hits = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (cache, hits) = (&cache, &hits);
                scope.spawn(move || {
                    for round in 0..600 {
                        let draw = |i, below| random::below(random::key(&[thread, round]), i, below);
                        let (n, next_use) = (draw(0, IMAGES.into()) as u32, Some(1 + draw(1, 1000)));
                        let Some(found) = cache.get(id(n), next_use) else {
                            cache.keep(id(n), &large(n), next_use);
                            continue;
                        };
                        hits.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        let foreign = found.pixels.iter().filter(|&&value| value != n as u8).count();
                        assert_eq!((found.key, foreign), (u64::from(n), 0), "foreign bytes in image {n}");
                    }
                });
            }
        });
        assert!(hits.into_inner() > 500, "most reads would be misses");
        cache.reschedule_all(|_| None);
        assert_eq!(lock(&cache.free).len(), IMAGES as usize / 2 * 4, "all pages are free again");
    }

    #[test]
    fn reserved_images_stay_and_images_that_are_used_sooner_evict_those_that_are_used_later() {
        let cache = Cache::new(2 * 3000, None).expect("no file");
        cache.keep(id(1), &image(1), Some(100));
        cache.keep(id(2), &image(2), Some(200));
        assert!(
            cache.would_keep(3000, Some(150)) && !cache.would_keep(3000, Some(300)) && !cache.would_keep(3000, None)
        );
        assert!(cache.reserve(id(2)));
        assert!(!cache.would_keep(3000, Some(150)), "what is left is needed sooner");
        cache.keep(id(3), &image(3), Some(50));
        assert!(!cache.reserve(id(1)) && cache.reserve(id(3)) && cache.reserve(id(2)));
        cache.reschedule_all(|id| (id.1.sample == 3).then_some(7));
        assert!(!cache.reserve(id(2)) && cache.reserve(id(3)));
    }

    #[test]
    fn an_image_that_is_larger_than_the_limit_is_not_kept() {
        let cache = Cache::new(2999, None).expect("no file");
        assert!(!cache.would_keep(3000, Some(1)));
        cache.keep(id(1), &image(1), Some(1));
        assert!(!cache.reserve(id(1)));
    }
}
