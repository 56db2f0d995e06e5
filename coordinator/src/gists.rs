//! What became of all URLs, as far as sealing and the search for what may come back need it: read from the
//! [gists](proto::gist) that the version before has left, and from indexes and outcomes for shards that are new,
//! damaged, closed, or not as they were.
//!
//! A gist holds as long as its shard's index and outcomes are listed as they were when they were read, and its tars are
//! there. Gists of a version that was never finished hold as well: so a sealing that was broken off is taken up again.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proto::gist::{self, Gist, GistList, GistObject, GistWriter, Mark};
use proto::index::StoredFile;
use proto::outcomes::OutcomeRow;
use proto::round::Round;
use proto::shard::sha256_hex;
use proto::{DatasetId, Manifest, ShardIndex, Stored, keys};
use tracing::{info, warn};

use crate::damage;
use crate::history::{History, HistoryError, Seen, corrupt};
use crate::puts::Puts;
use crate::store::{Store, StoreError};

/// Objects of gists that are read at the same time.
const AHEAD: usize = 4;
/// Indexes that are held together: with what they count of each class, thousands of them are gigabytes.
pub(crate) const INDEXES: usize = if cfg!(test) { 3 } else { 256 };
/// An object is full with so many bytes, which zstd makes about half as many.
const FULL: usize = 16 << 20;

/// The gists of the shards of one version.
pub(crate) struct Gists<'a> {
    history: &'a History<'a>,
    /// Of the manifest that is made, if one is, as is the nonce.
    version: u32,
    nonce: &'a str,
    /// Objects that are there, by round.
    known: BTreeMap<u32, Vec<StoredFile>>,
    /// When the latest file of the version before was written, if it has left a list.
    written_micros: Option<i64>,
    listed: Listed,
    /// What holds the gists of the shards that have been handed out.
    objects: Vec<GistObject>,
}

/// A dataset's committed objects, as they are listed.
struct Listed {
    indexes: HashMap<u32, Mark>,
    outcomes: HashMap<String, Mark>,
    tars: HashMap<String, u64>,
}

impl<'a> Gists<'a> {
    /// Looks for those that `base`, the version before, has left.
    pub(crate) fn find(
        history: &'a History<'a>,
        version: u32,
        nonce: &'a str,
        base: Option<&Manifest>,
    ) -> Result<Self, StoreError> {
        let listed = Listed {
            indexes: history.handle.block_on(list(history.store, &keys::indexes(history.dataset), |key| {
                keys::number(&key).ok().and_then(|number| u32::try_from(number).ok())
            }))?,
            outcomes: history.handle.block_on(list(history.store, &keys::outcomes_of(history.dataset), Some))?,
            tars: history.tars()?,
        };
        let left = base.map(|base| history.handle.block_on(left(history.store, base))).transpose()?.flatten();
        let written_micros = left.as_ref().map(|list| list.written_micros);
        let mut known: BTreeMap<u32, Vec<StoredFile>> = BTreeMap::new();
        for object in left.into_iter().flat_map(|list| list.objects) {
            known.entry(object.round).or_default().push(object.file);
        }
        let after = base.map_or(0, |base| base.version);
        for (round, file) in history.handle.block_on(unfinished(history.store, history.dataset, after))? {
            known.entry(round).or_default().push(file);
        }
        Ok(Self { history, version, nonce, known, written_micros, listed, objects: Vec::new() })
    }

    /// When the latest file of the version before was written, by the store's clock, if that is known.
    pub(crate) fn written_before(&self) -> Option<i64> {
        self.written_micros
    }

    /// Hands out the gist of each shard, rounds from the last to the first; of each of its rows, whether it is its
    /// URL's latest; and the rows themselves, if they were read. That of a shard that is damaged comes from an index
    /// that stands in for its own. Without `puts`, new gists are not kept.
    pub(crate) fn latest_first<E: From<HistoryError>>(
        &mut self,
        mut puts: Option<&mut Puts<'_>>,
        mut each: impl FnMut(Gist, &[bool], Option<&[OutcomeRow]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let history = self.history;
        self.objects.clear();
        let mut seen = Seen::new(history.rounds);
        let mut each = |gist: Gist, rows: Option<&[OutcomeRow]>| {
            // A round has a URL once.
            let latest: Vec<bool> = gist.rows.iter().map(|row| seen.insert(row.key)).collect();
            each(gist, &latest, rows)
        };
        let mut read_anew = 0;
        for round in history.rounds.iter().rev() {
            let mut left: BTreeSet<u32> = round.shards().collect();
            for files in self.known.get(&round.round).cloned().unwrap_or_default().chunks(AHEAD) {
                let reads = futures::future::join_all(files.iter().map(|file| read(history, file, round.round)));
                for (file, gists) in files.iter().zip(history.handle.block_on(reads)) {
                    let gists = gists.map_err(HistoryError::from)?.unwrap_or_else(|what| {
                        warn!(key = file.key, what, "gists are damaged; their shards are read again");
                        Vec::new()
                    });
                    let mut shards = Vec::new();
                    for gist in gists {
                        let shard = gist.index.shard;
                        if self.holds(&gist) && left.remove(&shard) {
                            shards.push(shard);
                            each(gist, None)?;
                        }
                    }
                    if !shards.is_empty() {
                        self.objects.push(GistObject { file: file.clone(), round: round.round, shards });
                    }
                }
            }
            read_anew += left.len();
            let left: Vec<u32> = left.into_iter().collect();
            let mut writer = GistWriter::default();
            for shards in left.chunks(INDEXES) {
                let indexes = history.indexes_of(shards.iter().copied(), &self.listed.tars)?;
                history.each(indexes.values(), |index, mut rows| -> Result<(), E> {
                    let gist = Gist::new(index.clone(), &mut rows, |synset| history.label(synset));
                    let mut gist = gist.map_err(|what| corrupt(&name(history.dataset, index), what))?;
                    gist.marks = self.listed.marks(index);
                    // Those of shards that are damaged or closed are not kept.
                    if let Some(puts) = puts.as_deref_mut().filter(|_| index.outcomes_file.is_some()) {
                        writer.push(&gist);
                        if writer.len() >= FULL {
                            let object = self.write(std::mem::take(&mut writer), round, puts)?;
                            self.objects.push(object);
                        }
                    }
                    each(gist, Some(&rows))
                })?;
            }
            if let Some(puts) = puts.as_deref_mut().filter(|_| !writer.is_empty()) {
                let object = self.write(writer, round, puts)?;
                self.objects.push(object);
            }
        }
        let shards: usize = history.rounds.iter().map(|round| round.slices.len()).sum();
        info!(dataset = &**history.dataset, shards, read_anew, "read what became of all URLs");
        Ok(())
    }

    /// Hands out the gists of some of the shards once more. All must be written.
    pub(crate) fn again<E: From<HistoryError>>(
        &self,
        wanted: impl Fn(u32) -> bool,
        mut each: impl FnMut(Gist) -> Result<(), E>,
    ) -> Result<(), E> {
        let is_wanted = |object: &&GistObject| object.shards.iter().any(|&shard| wanted(shard));
        let objects: Vec<&GistObject> = self.objects.iter().filter(is_wanted).collect();
        for objects in objects.chunks(AHEAD) {
            let reads = objects.iter().map(|object| read(self.history, &object.file, object.round));
            for (object, gists) in objects.iter().zip(self.history.handle.block_on(futures::future::join_all(reads))) {
                let gists = gists.map_err(HistoryError::from)?.map_err(|what| corrupt(&object.file.key, what))?;
                for gist in gists {
                    let shard = gist.index.shard;
                    if object.shards.binary_search(&shard).is_ok() && wanted(shard) {
                        each(gist)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// What is put beside the manifest once all that it names is written.
    pub(crate) fn list(self) -> Result<GistList, StoreError> {
        let Self { history: History { handle, store, dataset, .. }, version, mut objects, .. } = self;
        objects.sort_by_key(|object| object.shards.first().copied());
        let written = handle.block_on(store.objects(&keys::beside_manifest(dataset, version, self.nonce)))?;
        let written = written.iter().map(|object| object.last_modified.timestamp_micros());
        let written_micros = written.chain(self.written_micros).max().unwrap_or(0);
        Ok(GistList { format: 1, dataset: DatasetId::clone(dataset), version, written_micros, objects })
    }

    /// Whether what a gist says is what reading its shard would.
    fn holds(&self, gist: &Gist) -> bool {
        gist.marks.is_some()
            && gist.marks == self.listed.marks(&gist.index)
            && gist.rows.iter().all(|row| self.history.has_label(row.label))
            && self.history.check_index(&gist.index, &self.listed.tars).is_ok()
    }

    fn write(&self, writer: GistWriter, round: &Round, puts: &mut Puts<'_>) -> Result<GistObject, HistoryError> {
        let packed = writer.finish(self.history.dataset, round.round);
        let (shards, bytes) = packed.map_err(|error| corrupt("gists", error))?;
        let key = keys::gists(self.history.dataset, self.version, self.nonce, round.round, &sha256_hex(&bytes));
        let file = puts.put(key, bytes.into())?;
        Ok(GistObject { file, round: round.round, shards })
    }
}

impl Listed {
    fn marks(&self, index: &ShardIndex) -> Option<[Mark; 2]> {
        let outcomes = index.outcomes_file.as_ref()?;
        Some([*self.indexes.get(&index.shard)?, *self.outcomes.get(&outcomes.key)?])
    }
}

/// For errors about a shard's rows.
pub(crate) fn name(dataset: &DatasetId, index: &ShardIndex) -> String {
    index.outcomes_file.as_ref().map_or_else(|| keys::slice(&dataset.shard(index.shard)), |file| file.key.clone())
}

/// What is wrong with an object of gists, or the gists.
pub(crate) fn unpack(dataset: &DatasetId, round: u32, file: &StoredFile, bytes: &[u8]) -> Result<Vec<Gist>, String> {
    match (bytes.len() as u64, sha256_hex(bytes)) == (file.bytes, file.sha256.clone()) {
        true => gist::read(dataset, round, bytes).map_err(|error| error.to_string()),
        false => Err("its bytes are not those that it was named with".to_owned()),
    }
}

/// The list of a version's gists, or what is wrong with it.
pub(crate) fn parse_list(manifest: &Manifest, json: &[u8]) -> Result<GistList, String> {
    let list = GistList::from_json(json).map_err(|error| error.to_string())?;
    match (&list.dataset, list.version) == (&manifest.dataset, manifest.version) {
        true => Ok(list),
        false => Err(format!("it is that of {}, version {}", list.dataset, list.version)),
    }
}

async fn read(history: &History<'_>, file: &StoredFile, round: u32) -> Result<Result<Vec<Gist>, String>, StoreError> {
    damage::read(history.store, &file.key, |bytes| unpack(history.dataset, round, file, &bytes)).await
}

async fn list<K: Eq + std::hash::Hash>(
    store: &Store,
    folder: &str,
    name: impl Fn(String) -> Option<K>,
) -> Result<HashMap<K, Mark>, StoreError> {
    let marked = store.objects(folder).await?.into_iter().filter_map(|object| {
        let modified_micros = object.last_modified.timestamp_micros();
        Some((name(object.location.to_string())?, Mark { bytes: object.size, modified_micros }))
    });
    Ok(marked.collect())
}

/// The list that a version has left; none if an older program made it, or the list is damaged.
async fn left(store: &Store, manifest: &Manifest) -> Result<Option<GistList>, StoreError> {
    let key = keys::gist_list(&manifest.dataset, manifest.version, &manifest.nonce);
    let Some(json) = store.get(&key).await? else { return Ok(None) };
    let list = parse_list(manifest, &json);
    Ok(list.inspect_err(|what| warn!(key, what, "list of gists is damaged; all shards are read again")).ok())
}

/// Objects of gists, with their rounds, of versions after this one: such as were never finished, or are damaged.
async fn unfinished(store: &Store, dataset: &DatasetId, after: u32) -> Result<Vec<(u32, StoredFile)>, StoreError> {
    let (manifests, mut found) = (keys::manifests(dataset), Vec::new());
    for folder in store.folders(&manifests).await? {
        if keys::number(&folder).is_ok_and(|version| version > after.into()) {
            for object in store.objects(&format!("{manifests}/{folder}/gists")).await? {
                let key = object.location.to_string();
                let Ok((round, sha256)) = keys::gists_named(&key) else { continue };
                let file = StoredFile { bytes: object.size, sha256: sha256.to_owned(), key: key.clone() };
                found.push((round, file));
            }
        }
    }
    Ok(found)
}
