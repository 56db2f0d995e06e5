//! A store over another one that is only read: what is written lies in memory, and is gone with the process.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyMode, CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// The store below, and what was changed above it.
#[derive(Debug, Clone)]
pub(crate) struct Overlay {
    below: Arc<dyn ObjectStore>,
    written: Arc<InMemory>,
    /// Objects below that were deleted.
    deleted: Arc<RwLock<HashSet<Path>>>,
}

impl Overlay {
    /// Nothing has been changed yet.
    pub(crate) fn new(below: Arc<dyn ObjectStore>) -> Self {
        Self { below, written: Arc::default(), deleted: Arc::default() }
    }

    fn is_deleted(&self, location: &Path) -> bool {
        self.deleted.read().unwrap_or_else(PoisonError::into_inner).contains(location)
    }

    async fn is_below(&self, location: &Path) -> Result<bool> {
        if self.is_deleted(location) {
            return Ok(false);
        }
        match self.below.head(location).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Display for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, only read", self.below)
    }
}

#[tonic::async_trait]
impl ObjectStore for Overlay {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        match options.mode {
            PutMode::Create if self.is_below(location).await? => {
                Err(Error::AlreadyExists { path: location.to_string(), source: "it is in the store below".into() })
            }
            _ => self.written.put_opts(location, payload, options).await,
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.written.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.written.get_opts(location, options.clone()).await {
            Err(Error::NotFound { .. }) if !self.is_deleted(location) => self.below.get_opts(location, options).await,
            answer => answer,
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let overlay = self.clone();
        let delete = move |location: Path| {
            let overlay = overlay.clone();
            async move {
                match overlay.written.delete(&location).await {
                    Ok(()) | Err(Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
                overlay.deleted.write().unwrap_or_else(PoisonError::into_inner).insert(location.clone());
                Ok(location)
            }
        };
        locations.and_then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (overlay, written) = (self.clone(), self.written.list(prefix));
        let below = self.below.list(prefix);
        let merged = async move {
            // What lies in memory is little.
            let written: BTreeMap<Path, ObjectMeta> =
                written.map_ok(|meta| (meta.location.clone(), meta)).try_collect().await?;
            let hidden: BTreeSet<Path> = written.keys().cloned().collect();
            let below = below.try_filter(move |meta| {
                std::future::ready(!hidden.contains(&meta.location) && !overlay.is_deleted(&meta.location))
            });
            Ok::<_, Error>(below.chain(stream::iter(written.into_values().map(Ok))))
        };
        stream::once(merged).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let below = self.below.list_with_delimiter(prefix).await?;
        let written = self.written.list_with_delimiter(prefix).await?;
        let is_hidden = |meta: &ObjectMeta| {
            self.is_deleted(&meta.location) || written.objects.iter().any(|own| own.location == meta.location)
        };
        let mut objects: Vec<ObjectMeta> = below.objects.into_iter().filter(|meta| !is_hidden(meta)).collect();
        objects.extend(written.objects);
        let prefixes: BTreeSet<Path> = below.common_prefixes.into_iter().chain(written.common_prefixes).collect();
        Ok(ListResult { objects, common_prefixes: prefixes.into_iter().collect(), extensions: below.extensions })
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let bytes = self.get(from).await?.bytes().await?;
        let mode = match options.mode {
            CopyMode::Overwrite => PutMode::Overwrite,
            CopyMode::Create => PutMode::Create,
        };
        self.put_opts(to, bytes.into(), mode.into()).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_deleted_and_listed_above_leaves_the_store_below_as_it_was() {
        let below: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let (old, new, gone) = (Path::from("a/old"), Path::from("a/new"), Path::from("b/gone"));
        for key in [&old, &gone] {
            below.put(key, "below".into()).await.expect("put");
        }
        let overlay = Overlay::new(Arc::clone(&below));
        let create = |key: Path| {
            let overlay = overlay.clone();
            async move { overlay.put_opts(&key, "above".into(), PutMode::Create.into()).await }
        };
        assert!(matches!(create(old.clone()).await, Err(Error::AlreadyExists { .. })));
        create(new.clone()).await.expect("nobody has it");
        assert!(matches!(create(new.clone()).await, Err(Error::AlreadyExists { .. })));
        overlay.delete(&gone).await.expect("deleted");
        assert!(matches!(overlay.get(&gone).await, Err(Error::NotFound { .. })));
        let listed = |store: Arc<dyn ObjectStore>| async move {
            let mut keys: Vec<String> =
                store.list(None).map_ok(|meta| meta.location.to_string()).try_collect().await.expect("listed");
            keys.sort();
            let top = store.list_with_delimiter(None).await.expect("listed").common_prefixes;
            (keys, top.iter().map(Path::to_string).collect::<Vec<_>>())
        };
        let (keys, top) = listed(Arc::new(overlay.clone())).await;
        assert_eq!((keys, top[0].as_str()), (vec!["a/new".to_owned(), "a/old".to_owned()], "a"));
        create(gone.clone()).await.expect("it was deleted");
        overlay.put(&old, "changed".into()).await.expect("put");
        for (store, text) in [(Arc::new(overlay) as Arc<dyn ObjectStore>, "changed"), (Arc::clone(&below), "below")] {
            assert_eq!(store.get(&old).await.expect("got").bytes().await.expect("bytes"), text);
        }
        assert_eq!(listed(below).await.0, ["a/old", "b/gone"]);
    }
}
