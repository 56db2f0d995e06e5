//! Decoded images, so that a later epoch need not decode them again: in memory up to a hard limit, then in a file up to another.
//!
//! The plan says when each image is needed next, so what gives way is what is needed last (Belády, "A study of replacement algorithms for
//! a virtual-storage computer", 1966). Since an epoch needs each image once, no cache finds more of them than it has room for; this one finds
//! as many, where least-recently-used with room for half finds a seventh. What will not be needed again is not kept at all.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::Split;
use tracing::warn;

use super::image::Image;
use super::plan::{Place, Turns};

/// Images in the file take whole pages of so many bytes.
const PAGE: usize = 64 << 10;

/// An image of the dataset.
pub(crate) type Id = (Split, Place);

/// When an image is needed: epochs (from 0) in the upper half, the part of the epoch in the lower. A moment in the plan, not on a clock.
pub(crate) type Moment = u64;

/// It has been promised to somebody who comes for it, before all others.
const NOW: Moment = 0;

/// When the images of a batch are needed again.
#[derive(Debug, Clone)]
pub(crate) enum Again {
    /// Not at all.
    Never,
    /// All at this time.
    At(Moment),
    /// In an epoch, when the plan says so.
    In(u32, Arc<Turns>),
}

impl Again {
    /// At the end of epoch `epoch`.
    pub(crate) fn at_the_end_of(epoch: u32) -> Self {
        Self::At((Moment::from(epoch) + 1) << 32)
    }

    /// When that is for this image.
    pub(crate) fn of(&self, place: Place) -> Option<Moment> {
        match self {
            Again::Never => None,
            Again::At(moment) => Some(*moment),
            // Counted from 1, so that nothing is due before what is promised.
            Again::In(epoch, turns) => {
                turns.of(place).map(|turn| ((Moment::from(*epoch) << 32) | Moment::from(turn)).max(NOW + 1))
            }
        }
    }
}

/// The cache of one process.
#[derive(Debug)]
pub(crate) struct Cache {
    state: Mutex<State>,
    file: Option<File>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<Id, (Moment, Held)>,
    memory: Tier,
    disk: Tier,
    free: Vec<u32>,
}

#[derive(Debug, Clone)]
enum Held {
    Memory(Arc<Image>),
    /// Key, label, size, and where its pixels are.
    Disk(u64, u32, (usize, usize), Arc<[u32]>),
}

/// What a kind of storage holds, in the order in which it is needed.
#[derive(Debug, Default)]
struct Tier {
    limit: u64,
    used: u64,
    order: BTreeSet<(Moment, Id)>,
}

impl Cache {
    /// An empty cache for at most `limit` bytes of pixels in memory, and `disk_limit` in a file in the folder `disk`. The file has no name,
    /// so nothing is left of it when the process ends, however it ends.
    ///
    /// # Errors
    /// If there can be no file in that folder.
    pub(crate) fn new(limit: u64, disk: Option<(&Path, u64)>) -> io::Result<Self> {
        let file = disk.map(|(folder, _)| tempfile::tempfile_in(folder)).transpose()?;
        let pages = disk.map_or(0, |(_, limit)| u32::try_from(limit / PAGE as u64).unwrap_or(u32::MAX));
        let state = State {
            memory: Tier { limit, ..Tier::default() },
            disk: Tier { limit: u64::from(pages) * PAGE as u64, ..Tier::default() },
            free: (0..pages).rev().collect(),
            entries: HashMap::new(),
        };
        Ok(Self { state: Mutex::new(state), file })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the image is here. If so, it stays until it is taken.
    pub(crate) fn promise(&self, id: Id) -> bool {
        self.state().retime(id, Some(NOW))
    }

    /// The image, if it is here. It is kept for the time when it is needed `again`, and let go if that is never.
    pub(crate) fn take(&self, id: Id, again: Option<Moment>) -> Option<Arc<Image>> {
        let held = {
            let mut state = self.state();
            let (_, held) = state.entries.get(&id)?.clone();
            // The pages of what is never needed again must not be given to others while they are read.
            if again.is_some() || matches!(held, Held::Memory(_)) {
                state.retime(id, again);
            }
            held
        };
        match held {
            Held::Memory(image) => Some(image),
            Held::Disk(key, label, size, pages) => {
                let read = self.read(&pages, 3 * size.0 * size.1);
                if again.is_none() || read.is_err() {
                    self.state().retime(id, None);
                }
                let pixels = read.map_err(|error| warn!(%error, "the cache's file cannot be read")).ok()?;
                Some(Arc::new(Image::new(key, label, size, pixels)))
            }
        }
    }

    /// Whether an image of so many bytes would be kept if it came now.
    pub(crate) fn wants(&self, bytes: usize, again: Option<Moment>) -> bool {
        let state = self.state();
        again.is_some_and(|again| {
            state.memory.has_room(bytes as u64, again) || state.disk.has_room(in_pages(bytes) as u64, again)
        })
    }

    /// Keeps the image for the time when it is needed `again`, if it is worth it.
    pub(crate) fn keep(&self, id: Id, image: &Arc<Image>, again: Option<Moment>) {
        let Some(again) = again else { return };
        let mut to_disk = Vec::new();
        {
            let mut state = self.state();
            if state.entries.contains_key(&id) {
                return;
            }
            let bytes = image.pixels.len() as u64;
            if state.memory.has_room(bytes, again) {
                while state.memory.used + bytes > state.memory.limit
                    && let Some((moment, last)) = state.memory.last_after(again)
                {
                    if let Some((_, Held::Memory(image))) = state.remove(last) {
                        to_disk.push((last, image, moment));
                    }
                }
            }
            match state.memory.used + bytes <= state.memory.limit {
                true => state.insert(id, again, Held::Memory(image.clone())),
                false => to_disk.push((id, image.clone(), again)),
            }
        }
        for (id, image, again) in to_disk {
            self.keep_on_disk(id, &image, again);
        }
    }

    fn keep_on_disk(&self, id: Id, image: &Image, again: Moment) {
        let Some(file) = &self.file else { return };
        let bytes = in_pages(image.pixels.len());
        let pages: Arc<[u32]> = {
            let mut state = self.state();
            if !state.disk.has_room(bytes as u64, again) {
                return;
            }
            while state.free.len() < bytes / PAGE {
                let Some((_, last)) = state.disk.last_after(again) else { return };
                state.remove(last);
            }
            let left = state.free.len() - bytes / PAGE;
            state.free.split_off(left).into()
        };
        let written =
            image.pixels.chunks(PAGE).zip(pages.iter()).try_for_each(|(part, &page)| file.write_all_at(part, at(page)));
        let mut state = self.state();
        match written {
            Ok(()) if !state.entries.contains_key(&id) => {
                state.insert(id, again, Held::Disk(image.key, image.label, (image.width, image.height), pages));
            }
            Ok(()) => state.free.extend(pages.iter()),
            Err(error) => {
                // Such as a full disk. What it holds it goes on holding.
                warn!(%error, "the cache's file cannot be written; it does not grow any more");
                state.disk.limit = state.disk.used;
            }
        }
    }

    fn read(&self, pages: &[u32], bytes: usize) -> io::Result<Vec<u8>> {
        let mut pixels = vec![0; bytes];
        let file = self.file.as_ref().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        pixels.chunks_mut(PAGE).zip(pages).try_for_each(|(part, &page)| file.read_exact_at(part, at(page)))?;
        Ok(pixels)
    }

    /// Other images are needed from now on, or at other times, as after a change of ranks.
    pub(crate) fn replan(&self, again: impl Fn(Id) -> Option<Moment>) {
        let mut state = self.state();
        let ids: Vec<Id> = state.entries.keys().copied().collect();
        for id in ids {
            state.retime(id, again(id));
        }
    }
}

fn in_pages(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE)
}

fn at(page: u32) -> u64 {
    u64::from(page) * PAGE as u64
}

impl Held {
    fn bytes(&self) -> u64 {
        match self {
            Held::Memory(image) => image.pixels.len() as u64,
            Held::Disk(.., pages) => (pages.len() * PAGE) as u64,
        }
    }
}

impl Tier {
    /// Whether there is room, or enough that is needed later.
    fn has_room(&self, bytes: u64, again: Moment) -> bool {
        let mut free = self.limit.saturating_sub(self.used);
        // The largest image is seldom larger than a few of the others, so this looks at a few.
        let mut later = self.order.iter().rev().take_while(|(moment, _)| *moment > again);
        while free < bytes {
            if later.next().is_none() {
                return false;
            }
            free += self.used / self.order.len().max(1) as u64;
        }
        bytes <= self.limit
    }

    /// What is needed last, if that is after `again`.
    fn last_after(&self, again: Moment) -> Option<(Moment, Id)> {
        self.order.last().copied().filter(|(moment, _)| *moment > again)
    }
}

impl State {
    fn tier(&mut self, held: &Held) -> &mut Tier {
        match held {
            Held::Memory(_) => &mut self.memory,
            Held::Disk(..) => &mut self.disk,
        }
    }

    fn insert(&mut self, id: Id, again: Moment, held: Held) {
        let bytes = held.bytes();
        let tier = self.tier(&held);
        tier.used += bytes;
        tier.order.insert((again, id));
        self.entries.insert(id, (again, held));
    }

    fn remove(&mut self, id: Id) -> Option<(Moment, Held)> {
        let (moment, held) = self.entries.remove(&id)?;
        let bytes = held.bytes();
        let tier = self.tier(&held);
        tier.used -= bytes;
        tier.order.remove(&(moment, id));
        if let Held::Disk(.., pages) = &held {
            self.free.extend(pages.iter());
        }
        Some((moment, held))
    }

    /// Whether it is here; if it is, it is needed at another time from now on.
    fn retime(&mut self, id: Id, again: Option<Moment>) -> bool {
        let Some(again) = again else { return self.remove(id).is_some() };
        let Some((moment, held)) = self.entries.get_mut(&id) else { return false };
        let before = std::mem::replace(moment, again);
        let held = held.clone();
        let tier = self.tier(&held);
        tier.order.remove(&(before, id));
        tier.order.insert((again, id));
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

    fn id(n: u32) -> Id {
        (Split::Train, Place { block: 0, sample: n })
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
            let mut turns = vec![0; n as usize];
            for (turn, i) in order(epoch + 1).into_iter().enumerate() {
                turns[i as usize] = ((epoch + 1) << 32) + turn as u64 * (u64::from(u32::MAX) / u64::from(n));
            }
            for i in order(epoch) {
                let again = (epoch + 1 < epochs).then_some(turns[i as usize]);
                match cache.promise(id(i)) {
                    true => {
                        let found = cache.take(id(i), again).expect("it was promised");
                        assert_eq!((found.key, found.label, found.pixels[2999]), (u64::from(i), i, i as u8));
                        hits += u32::from(epoch > 0);
                    }
                    false => cache.keep(id(i), &image(i), again),
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
        assert_eq!(cache.state().free.len(), 150);
        assert_eq!(std::fs::read_dir(folder.path()).expect("it is there").count(), 0, "the file has no name");
        let small = Cache::new(50 * 3000, Some((folder.path(), 50 * PAGE as u64))).expect("a file");
        assert_eq!(hits(&small, 200, 4), 0.5);
    }

    #[test]
    fn what_is_promised_stays_and_what_is_needed_sooner_takes_the_place_of_what_is_needed_later() {
        let cache = Cache::new(2 * 3000, None).expect("no file");
        cache.keep(id(1), &image(1), Some(100));
        cache.keep(id(2), &image(2), Some(200));
        assert!(cache.wants(3000, Some(150)) && !cache.wants(3000, Some(300)) && !cache.wants(3000, None));
        assert!(cache.promise(id(2)));
        assert!(!cache.wants(3000, Some(150)), "what is left is needed sooner");
        cache.keep(id(3), &image(3), Some(50));
        assert!(!cache.promise(id(1)) && cache.promise(id(3)) && cache.promise(id(2)));
        cache.replan(|id| (id.1.sample == 3).then_some(7));
        assert!(!cache.promise(id(2)) && cache.promise(id(3)));
    }

    #[test]
    fn an_image_that_is_larger_than_the_limit_is_not_kept() {
        let cache = Cache::new(2999, None).expect("no file");
        assert!(!cache.wants(3000, Some(1)));
        cache.keep(id(1), &image(1), Some(1));
        assert!(!cache.promise(id(1)));
    }
}
