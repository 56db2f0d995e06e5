//! A store whose uploads in parts outlive its failures.
//!
//! What a store's own client cannot send of an upload leaves a hole in it: the next part has the next number, or the
//! next place in the file, so whoever uploads has to begin anew. Here each part is tried again in its own place, as a
//! worker's other operations are.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};
use worker::with_retries;

/// See the module.
#[derive(Debug)]
pub(crate) struct Steady {
    store: Arc<dyn ObjectStore>,
    uploads: Uploads,
}

enum Uploads {
    /// Into a bucket, under this prefix.
    Bucket(Arc<dyn MultipartStore>, Path),
    /// Into a folder, with fsync or without.
    Folder(LocalFileSystem, bool),
}

impl fmt::Debug for Uploads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bucket(_, prefix) => f.debug_tuple("Bucket").field(prefix).finish_non_exhaustive(),
            Self::Folder(folder, _) => f.debug_tuple("Folder").field(folder).finish_non_exhaustive(),
        }
    }
}

impl Steady {
    /// Of what lies under `prefix` in a bucket.
    pub(crate) fn bucket<S: ObjectStore + MultipartStore>(store: S, prefix: Path) -> Self {
        let store = Arc::new(store);
        let uploads = Uploads::Bucket(Arc::<S>::clone(&store), prefix.clone());
        let store: Arc<dyn ObjectStore> = store;
        let is_whole = prefix.as_ref().is_empty();
        Self { store: if is_whole { store } else { Arc::new(PrefixStore::new(store, prefix)) }, uploads }
    }

    /// Of a folder, written with fsync or without.
    pub(crate) fn folder(store: LocalFileSystem, fsync: bool) -> Self {
        let store = store.with_fsync(fsync);
        Self { store: Arc::new(store.clone()), uploads: Uploads::Folder(store, fsync) }
    }
}

impl fmt::Display for Steady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

#[tonic::async_trait]
impl ObjectStore for Steady {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.store.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        match &self.uploads {
            Uploads::Bucket(store, prefix) => {
                let path: Path = prefix.parts().chain(location.parts()).collect();
                let id = store.create_multipart_opts(&path, options).await?;
                let (store, parts) = (Arc::clone(store), Mutex::default());
                let upload = Arc::new(BucketUpload { store, path, id, parts });
                let (reader, location) = (Arc::clone(&self.store), location.clone());
                Ok(Box::new(PartsOfBucket { upload, begun: 0, bytes: 0, reader, location }))
            }
            Uploads::Folder(folder, fsync) => {
                let (key, to, fsync) = (location.to_string(), folder.path_to_filesystem(location)?, *fsync);
                Ok(Box::new(blocking(move || FileUpload::begin(key, to, fsync)).await?))
            }
        }
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.store.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.store.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.store.rename_opts(from, to, options).await
    }
}

/// What the parts of an upload into a bucket share.
struct BucketUpload {
    store: Arc<dyn MultipartStore>,
    path: Path,
    id: MultipartId,
    /// Those that are there, by number.
    parts: Mutex<Vec<(usize, PartId)>>,
}

struct PartsOfBucket {
    upload: Arc<BucketUpload>,
    begun: usize,
    /// Of all parts.
    bytes: u64,
    /// Where the object can be looked for once it is there.
    reader: Arc<dyn ObjectStore>,
    location: Path,
}

impl fmt::Debug for PartsOfBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PartsOfBucket").field("path", &self.upload.path).finish_non_exhaustive()
    }
}

#[tonic::async_trait]
impl MultipartUpload for PartsOfBucket {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (upload, number) = (Arc::clone(&self.upload), self.begun);
        self.begun += 1;
        self.bytes += data.content_length() as u64;
        Box::pin(async move {
            let BucketUpload { store, path, id, parts } = &*upload;
            // Under a key of its own: others go on while this one fails.
            let part =
                with_retries(&format!("{path}#{number}"), || store.put_part(path, id, number, data.clone())).await?;
            parts.lock().unwrap_or_else(PoisonError::into_inner).push((number, part));
            Ok(())
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let BucketUpload { store, path, id, parts } = &*self.upload;
        let mut parts = parts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if parts.len() != self.begun {
            return Err(Error::Generic { store: "bucket", source: "a part of the upload is missing".into() });
        }
        parts.sort_unstable_by_key(|(number, _)| *number);
        let parts: Vec<PartId> = parts.into_iter().map(|(_, part)| part).collect();
        let complete = || async {
            match store.complete_multipart(path, id, parts.clone()).await {
                // Perhaps an earlier try has ended the upload, and its answer was lost.
                Err(unknown @ Error::NotFound { .. }) => match self.reader.head(&self.location).await {
                    Ok(there) if there.size == self.bytes => {
                        Ok(PutResult { e_tag: there.e_tag, version: there.version, extensions: Default::default() })
                    }
                    _ => Err(unknown),
                },
                completed => completed,
            }
        };
        with_retries(path.as_ref(), complete).await
    }

    async fn abort(&mut self) -> Result<()> {
        let BucketUpload { store, path, id, .. } = &*self.upload;
        store.abort_multipart(path, id).await
    }
}

/// A file that grows beside its place, under a name that listings leave out (see [`LocalFileSystem`]).
#[derive(Debug)]
struct FileUpload {
    key: String,
    file: Arc<Mutex<File>>,
    staged: PathBuf,
    to: PathBuf,
    begun: u64,
    fsync: bool,
    is_over: bool,
}

impl FileUpload {
    fn begin(key: String, to: PathBuf, fsync: bool) -> io::Result<Self> {
        let folder = to.parent().unwrap_or(&to);
        let missing = folder.ancestors().take_while(|folder| !folder.exists()).count();
        std::fs::create_dir_all(folder)?;
        for folder in folder.ancestors().skip(1).take(if fsync { missing } else { 0 }) {
            File::open(folder)?.sync_all()?;
        }
        let mut number = 1u32;
        let (file, staged) = loop {
            let mut staged = to.as_os_str().to_owned();
            staged.push(format!("#{number}"));
            match OpenOptions::new().write(true).create_new(true).open(&staged) {
                Ok(file) => break (file, PathBuf::from(staged)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error),
            }
        };
        Ok(Self { key, file: Arc::new(Mutex::new(file)), staged, to, begun: 0, fsync, is_over: false })
    }
}

#[tonic::async_trait]
impl MultipartUpload for FileUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (file, at, key) = (Arc::clone(&self.file), self.begun, self.key.clone());
        self.begun += data.content_length() as u64;
        Box::pin(async move {
            let write = || {
                let (file, data) = (Arc::clone(&file), data.clone());
                blocking(move || {
                    let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                    file.seek(SeekFrom::Start(at))?;
                    data.iter().try_for_each(|bytes| file.write_all(bytes))
                })
            };
            with_retries(&key, write).await
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let (file, staged, to, fsync) = (Arc::clone(&self.file), self.staged.clone(), self.to.clone(), self.fsync);
        // A failed fsync may have dropped what it was for: it is not tried again.
        blocking(move || {
            if fsync {
                file.lock().unwrap_or_else(PoisonError::into_inner).sync_all()?;
            }
            std::fs::rename(&staged, &to)?;
            match to.parent() {
                Some(folder) if fsync => File::open(folder)?.sync_all(),
                _ => Ok(()),
            }
        })
        .await?;
        self.is_over = true;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn abort(&mut self) -> Result<()> {
        self.is_over = true;
        let staged = self.staged.clone();
        blocking(move || std::fs::remove_file(staged)).await
    }
}

impl Drop for FileUpload {
    fn drop(&mut self) {
        if !self.is_over {
            // Nobody hears of it.
            let _ = std::fs::remove_file(&self.staged);
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
    done.map_err(|error| Error::Generic { store: "folder", source: Box::new(error) })
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    /// A bucket of which each part is refused at first, the earlier ones more often, and the end of the upload as well,
    /// whose next answer is lost.
    #[derive(Debug, Default)]
    struct Refusing {
        bucket: Arc<InMemory>,
        tries: Mutex<[usize; 4]>,
    }

    impl Refusing {
        fn try_of(&self, n: usize, refused: usize) -> Result<()> {
            let mut tries = self.tries.lock().expect("no panic");
            tries[n] += 1;
            match tries[n] > refused {
                true => Ok(()),
                false => Err(Error::Generic { store: "Refusing", source: "full".into() }),
            }
        }
    }

    #[tonic::async_trait]
    impl MultipartStore for Refusing {
        async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
            self.bucket.create_multipart(path).await
        }

        async fn put_part(&self, path: &Path, id: &MultipartId, n: usize, data: PutPayload) -> Result<PartId> {
            self.try_of(n, 3 - n)?;
            self.bucket.put_part(path, id, n, data).await
        }

        async fn complete_multipart(&self, path: &Path, id: &MultipartId, parts: Vec<PartId>) -> Result<PutResult> {
            let is_there = self.bucket.head(path).await.is_ok();
            match is_there {
                true => return Err(Error::NotFound { path: path.to_string(), source: "no such upload".into() }),
                false => self.try_of(3, 1)?,
            }
            self.bucket.complete_multipart(path, id, parts).await?;
            Err(Error::Generic { store: "Refusing", source: "the answer is lost".into() })
        }

        async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
            self.bucket.abort_multipart(path, id).await
        }
    }

    #[tokio::test]
    async fn parts_that_a_bucket_refuses_at_first_stand_in_their_places_under_its_prefix() {
        let bucket = Arc::new(Refusing::default());
        let uploads = Uploads::Bucket(Arc::<Refusing>::clone(&bucket), Path::from("a/b"));
        let store = Arc::new(PrefixStore::new(Arc::clone(&bucket.bucket), "a/b"));
        let steady = Steady { store, uploads };
        let mut upload = steady.put_multipart(&Path::from("c.tar")).await.expect("memory");
        let parts = ["first,", "second,", "third"].map(|part| upload.put_part(part.into()));
        futures::future::try_join_all(parts).await.expect("in the end");
        upload.complete().await.expect("in the end");
        let stored = bucket.bucket.get(&Path::from("a/b/c.tar")).await.expect("it is there");
        assert_eq!(stored.bytes().await.expect("memory"), "first,second,third");
        assert_eq!(*bucket.tries.lock().expect("no panic"), [4, 3, 2, 2]);
    }

    #[tokio::test]
    async fn parts_that_a_folder_refuses_at_first_stand_in_their_places_and_what_is_unfinished_is_not_seen() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = LocalFileSystem::new_with_prefix(folder.path()).expect("a folder");
        let mut upload =
            FileUpload::begin("a/c.tar".to_owned(), folder.path().join("a/c.tar"), true).expect("a folder");
        // A handle that cannot be written to stands for a full disk.
        let good = std::mem::replace(&mut *upload.file.lock().expect("no panic"), {
            File::open(&upload.staged).expect("it has begun")
        });
        let parts = ["first,", "second"].map(|part| upload.put_part(part.into()));
        let file = Arc::clone(&upload.file);
        let room = async {
            tokio::time::sleep(std::time::Duration::from_millis(400)).await;
            *file.lock().expect("no panic") = good;
            Ok(vec![()])
        };
        futures::future::try_join(futures::future::try_join_all(parts), room).await.expect("in the end");
        assert!(store.get(&Path::from("a/c.tar")).await.is_err());
        upload.complete().await.expect("there is room");
        let stored = store.get(&Path::from("a/c.tar")).await.expect("it is there");
        assert_eq!(stored.bytes().await.expect("a file"), "first,second");

        let steady = Steady::folder(store, false);
        for aborts in [true, false] {
            let mut upload = steady.put_multipart(&Path::from("a/c.tar")).await.expect("a folder");
            upload.put_part("other".into()).await.expect("there is room");
            if aborts {
                upload.abort().await.expect("it has begun");
            }
            drop(upload);
            let files = std::fs::read_dir(folder.path().join("a")).expect("a folder").count();
            assert_eq!(files, 1, "nothing is left of it");
        }
        let stored = steady.get(&Path::from("a/c.tar")).await.expect("it is there");
        assert_eq!(stored.bytes().await.expect("a file"), "first,second");
    }
}
