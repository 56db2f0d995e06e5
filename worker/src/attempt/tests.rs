mod origin;

use std::collections::HashSet;
use std::sync::Mutex;

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStoreExt, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};
use proto::index::ClassCounts;
use proto::shard::read_block;
use proto::{Class, DatasetId, Limits, OutcomeCounts, Rejection, Resize, Stored};
use tokio::net::TcpListener;
use tonic::async_trait;

pub(crate) use self::origin::origin;
use super::*;
use crate::fetch::{AddressRules, FetchConfig, Fetcher, Roots};
use crate::lease::Coordinator;
use crate::tests::CoordinatorDouble;

pub(crate) fn spec() -> DatasetSpec {
    let class = |synset: &str| Class { synset: synset.into(), name: synset.into() };
    DatasetSpec {
        classes: vec![class("n1"), class("n2")],
        resize: Resize { size: 64, quality: 90, ..Resize::default() },
        limits: Limits { max_bytes: 2 << 20, timeout_seconds: 4.0, connect_timeout_seconds: 1.0, ..Limits::default() },
        ..DatasetSpec::default()
    }
}

pub(crate) async fn put_slice(store: &dyn ObjectStore, shard: u32, urls: &[String]) {
    let lines: String = urls.iter().enumerate().map(|(i, url)| format!("{}\tn{}\t{url}\n", i * 3, i % 2 + 1)).collect();
    let packed = zstd::encode_all(lines.as_bytes(), 1).expect("memory");
    store.put(&keys::slice(&birds(shard)).into(), packed.into()).await.expect("a writable store");
}

pub(crate) async fn tools(store: Arc<dyn ObjectStore>) -> Arc<Tools> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let fetcher = Fetcher::new(FetchConfig {
        rules: AddressRules { allowed: vec!["127.0.0.0/8".parse().expect("a net")] },
        roots: Roots::default(),
        name_servers: Vec::new(),
        user_agent: "Gleaner/test".into(),
        agent: "Gleaner".into(),
        proxy: None,
        any_certificate: false,
        authorities: Vec::new(),
        body_budget: 4 << 20,
    });
    let way_out = Arc::new(WayOut::new(Vec::new()));
    let dispatcher = Arc::new(Dispatcher::new(fetcher.expect("a client"), 16, Arc::clone(&way_out)));
    tokio::spawn(Arc::clone(&dispatcher).dispatch());
    let coordinator = coordinator(&way_out).await;
    tokio::spawn(Arc::clone(&dispatcher).keep_shares(Arc::clone(&coordinator)));
    let telling = Arc::clone(&dispatcher);
    tokio::spawn(async move { telling.keep_rules(coordinator).await });
    tokio::spawn(Arc::clone(&dispatcher).watch_way_out());
    let pool = DecodePool::start(2, 1 << 30).expect("threads");
    Arc::new(Tools { store, dispatcher, way_out, pool, worker: "worker-test".into() })
}

/// A double of the coordinator that grants every wish for sites.
async fn coordinator(way_out: &Arc<WayOut>) -> Arc<Coordinator> {
    let address = CoordinatorDouble::default().serve().await;
    let store = Arc::new(object_store::memory::InMemory::new());
    let dial = proto::dial::Dial::new(&address).expect("an address");
    let coordinator = Coordinator::new(dial, "worker-test".into(), store, Arc::clone(way_out));
    Arc::new(coordinator)
}

pub(crate) fn birds(shard: u32) -> ShardId {
    "birds-1".parse::<DatasetId>().expect("an id").shard(shard)
}

fn assignment(n: u64) -> Assignment {
    Assignment { shard: birds(7), attempt: Attempt { term: 9, n }, spec: spec(), once: false, large: false }
}

async fn get(store: &dyn ObjectStore, key: &str) -> Bytes {
    store.get(&key.into()).await.expect(key).bytes().await.expect(key)
}

async fn keys_in(store: &dyn ObjectStore, folder: &str) -> Vec<String> {
    use futures::TryStreamExt;
    let found = store.list(Some(&folder.into())).map_ok(|meta| meta.location.to_string()).try_collect().await;
    found.expect("a readable store")
}

#[tokio::test]
async fn every_url_gets_its_one_outcome_and_index_outcomes_and_tars_agree() {
    let folder = tempfile::tempdir().expect("a folder");
    let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(folder.path()).expect("a folder"));
    let at = origin().await;
    let refusing = TcpListener::bind("127.0.0.1:0").await.expect("loopback").local_addr().expect("bound");
    let base = format!("http://{at}");
    let mut wanted: Vec<(String, Result<(), Rejection>)> = vec![
        (format!("{base}/moved/90"), Ok(())),
        (format!("{base}/others"), Ok(())),
        (format!("{base}/loop"), Err(Rejection::RedirectLimit)),
        (format!("{base}/hops/1"), Err(Rejection::RedirectLimit)),
        (format!("{base}/private"), Err(Rejection::BlockedAddress)),
        (format!("{base}/metadata"), Err(Rejection::BlockedAddress)),
        (format!("{base}/file"), Err(Rejection::BadUrl)),
        (format!("{base}/long"), Err(Rejection::Protocol)),
        (format!("{base}/gone"), Err(Rejection::NotFound)),
        (format!("{base}/missing"), Err(Rejection::NotFound)),
        (format!("{base}/broken"), Err(Rejection::HttpStatus)),
        (format!("{base}/html"), Err(Rejection::NotAnImage)),
        (format!("{base}/noai"), Err(Rejection::OptedOut)),
        (format!("{base}/denied/x"), Err(Rejection::OptedOut)),
        (format!("{base}/small"), Err(Rejection::TooSmall)),
        (format!("{base}/cut"), Err(Rejection::Truncated)),
        (format!("{base}/short"), Ok(())),
        (format!("{base}/shorter"), Err(Rejection::Protocol)),
        (format!("{base}/huge"), Err(Rejection::TooLarge)),
        (format!("{base}/endless"), Err(Rejection::TooLarge)),
        (format!("{base}/bomb"), Err(Rejection::TooLarge)),
        (format!("{base}/drip"), Err(Rejection::Timeout)),
        (format!("{base}/silent"), Err(Rejection::Timeout)),
        (format!("{base}/garbage"), Err(Rejection::Protocol)),
        (format!("{base}/closed"), Err(Rejection::Protocol)),
        (format!("http://{refusing}/x.jpg"), Err(Rejection::Connect)),
        (format!("https://{at}/x.jpg"), Err(Rejection::Tls)),
        ("http://name.invalid/x.jpg".into(), Err(Rejection::Dns)),
        ("http://[::1]/x.jpg".into(), Err(Rejection::BlockedAddress)),
        ("http://0x0a000001/x.jpg".into(), Err(Rejection::BlockedAddress)),
        ("file:///etc/passwd".into(), Err(Rejection::BadUrl)),
        ("no url at all".into(), Err(Rejection::BadUrl)),
        ("http://".into(), Err(Rejection::BadUrl)),
        (format!("{base}/heads"), Err(Rejection::Protocol)),
        (format!("{base}/many"), Err(Rejection::Protocol)),
        (format!("{base}/once/86"), Ok(())),
        (format!("{base}/folded/85"), Ok(())),
        (format!("{base}/lines"), Ok(())),
        (format!("{base}/headers"), Ok(())),
        (format!("{base}/latin1"), Ok(())),
        (format!("{base}/part/whole"), Ok(())),
        (format!("{base}/part/first"), Err(Rejection::HttpStatus)),
        (format!("{base}/packed"), Err(Rejection::NotAnImage)),
        (format!("{base}/film"), Err(Rejection::NotAnImage)),
    ];
    wanted.extend((0..60).map(|seed| (format!("{base}/good/{}", seed + 10), Ok(()))));
    let urls: Vec<String> = wanted.iter().map(|(url, _)| url.clone()).collect();
    put_slice(&*store, 7, &urls).await;

    let (tools, progress) = (tools(Arc::clone(&store)).await, Progress::default());
    let never = Signals::default();
    let result = make_shard(&tools, &assignment(1), &progress, (), &never).await.expect("a good store");
    assert_eq!(result, AttemptResult::Committed);

    let index = ShardIndex::from_json(&get(&*store, &keys::index(&birds(7))).await).expect("own output");
    let file = index.outcomes_file.as_ref().expect("an attempt has outcomes");
    let parquet = get(&*store, &file.key).await;
    assert_eq!((file.bytes, &file.sha256), (parquet.len() as u64, &proto::shard::sha256_hex(&parquet)));
    let rows: Vec<OutcomeRow> = table::read(parquet).expect("own output");
    for ((i, (url, outcome)), row) in wanted.iter().enumerate().zip(&rows) {
        assert_eq!((row.key, &row.url), (i as i64 * 3, url));
        assert_eq!(row.outcome().expect("a known name"), *outcome, "{url}");
    }
    assert_eq!(rows.len(), wanted.len());
    assert_eq!(rows[0].final_url, Some(format!("{base}/good/90")));
    assert_eq!((rows[10].http_status, rows[23].http_status), (Some(503), None));
    let counted: OutcomeCounts = rows.iter().map(|row| (row.outcome().expect("own output"), 1)).collect();
    assert_eq!(index.outcomes, counted);

    let mut samples = 0;
    for (split, tar) in &index.tars {
        let bytes = get(&*store, &tar.key).await;
        assert_eq!((tar.bytes, &tar.sha256), (bytes.len() as u64, &proto::shard::sha256_hex(&bytes)));
        let mut moments = proto::shard::Moments::default();
        let mut per_class = ClassCounts::default();
        for block in &tar.blocks {
            let block = bytes.slice(block.offset as usize..(block.offset + block.length) as usize);
            for sample in read_block(&block).expect("own output") {
                let row = &rows[sample.key as usize / 3];
                assert_eq!((row.split(), row.tar.as_ref()), (Some(*split), Some(&tar.key)));
                let (from, length) = (row.offset.expect("kept") as usize, row.length.expect("kept") as usize);
                assert_eq!(bytes[from..from + length], sample.image);
                assert_eq!(u32::from(row.synset == "n2"), sample.label);
                let header = turbojpeg::read_header(&sample.image).expect("a JPEG");
                assert_eq!((header.width, header.height), (64, 64));
                moments.add(&row.moments());
                per_class.add(sample.label);
                samples += 1;
            }
        }
        assert_eq!((moments, per_class), (tar.moments, tar.per_class.clone()));
    }
    assert_eq!(samples, 69);
}

#[tokio::test]
async fn the_second_of_two_attempts_loses_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(folder.path()).expect("a folder"));
    let at = origin().await;
    let urls: Vec<String> = (0..20).map(|seed| format!("http://{at}/good/{seed}")).collect();
    put_slice(&*store, 7, &urls).await;
    let tools = tools(Arc::clone(&store)).await;
    let never = Signals::default();
    let first = make_shard(&tools, &assignment(1), &Progress::default(), (), &never).await;
    assert_eq!(first.expect("a good store"), AttemptResult::Committed);
    let before = keys_in(&*store, "datasets").await;
    let second = make_shard(&tools, &assignment(2), &Progress::default(), (), &never).await;
    assert_eq!(second.expect("a good store"), AttemptResult::LostTo(Attempt { term: 9, n: 1 }));
    assert_eq!(keys_in(&*store, "datasets").await, before);
}

#[tokio::test]
async fn a_cancelled_attempt_and_one_whose_slice_is_no_slice_leave_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(folder.path()).expect("a folder"));
    let at = origin().await;
    let mut urls: Vec<String> = (0..20).map(|seed| format!("http://{at}/good/{seed}")).collect();
    urls.push(format!("http://{at}/silent"));
    put_slice(&*store, 7, &urls).await;
    let before = keys_in(&*store, "datasets").await;
    let tools = tools(Arc::clone(&store)).await;
    let signals = Signals::default();
    let progress = Progress::default();
    let assignment = assignment(1);
    let attempt = make_shard(&tools, &assignment, &progress, (), &signals);
    let cancelling = async {
        while progress.outcomes().of(Ok(())) != 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        signals.cancel.cancel();
    };
    let (result, ()) = tokio::join!(attempt, cancelling);
    assert_eq!(result.expect("a good store"), AttemptResult::Cancelled);
    assert_eq!(keys_in(&*store, "datasets").await, before);

    let packed = zstd::encode_all(&b"1\tn1\thttp://a/\nnonsense\n"[..], 1).expect("memory");
    store.put(&keys::slice(&birds(7)).into(), packed.into()).await.expect("a writable store");
    let never = Signals::default();
    let failure = make_shard(&tools, &assignment, &Progress::default(), (), &never).await.expect_err("no slice");
    assert_eq!(failure.kind, FailureKind::Slice);
    assert!(format!("{:#}", failure.error).contains("line 2"), "{failure:?}");
    assert_eq!(keys_in(&*store, "datasets").await, before);
}

#[tokio::test]
async fn urls_of_a_class_that_is_full_are_left_unfetched_and_are_told_of() {
    let store: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
    let at = origin().await;
    let urls: Vec<String> = (0..40).map(|seed| format!("http://{at}/good/{seed}")).collect();
    put_slice(&*store, 7, &urls).await;
    let (tools, progress) = (tools(Arc::clone(&store)).await, Progress::default());
    progress.set_wanted(HashMap::from([(0, 0)]), &HashMap::new());
    assert!(progress.is_full(0) && !progress.is_full(1));
    make_shard(&tools, &assignment(1), &progress, (), &Signals::default()).await.expect("a good store");
    let index = ShardIndex::from_json(&get(&*store, &keys::index(&birds(7))).await).expect("own output");
    let file = index.outcomes_file.expect("an attempt has outcomes");
    let rows: Vec<OutcomeRow> = table::read(get(&*store, &file.key).await).expect("own output");
    assert_eq!(rows.len(), 40);
    let (mut full, mut kept) = (0, 0);
    for row in &rows {
        let expected = if row.synset == "n2" { Ok(()) } else { Err(Rejection::ClassFull) };
        assert_eq!(row.outcome().expect("a known name"), expected, "{}", row.url);
        match expected {
            Ok(()) => kept += 1,
            Err(_) => full += 1,
        }
    }
    assert!(full > 0 && kept > 0);
    assert_eq!(progress.kept(), HashMap::from([(1, kept)]));
    assert_eq!(index.outcomes, [(Err(Rejection::ClassFull), full), (Ok(()), kept)].into_iter().collect());
    progress.set_wanted(HashMap::from([(1, 3)]), &progress.kept());
    assert!(!progress.is_full(1), "three more are wanted");
}

/// A store whose first read and first write of each object fails.
#[derive(Debug, Default)]
struct FailsOnce {
    store: object_store::memory::InMemory,
    failed: Mutex<HashSet<(&'static str, String)>>,
}

impl std::fmt::Display for FailsOnce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FailsOnce")
    }
}

impl FailsOnce {
    fn fail(&self, operation: &'static str, at: &ObjectPath) -> object_store::Result<()> {
        match self.failed.lock().expect("no panic").insert((operation, at.to_string())) {
            true => Err(object_store::Error::Generic { store: "FailsOnce", source: "out of order".into() }),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl ObjectStore for FailsOnce {
    async fn put_opts(
        &self,
        at: &ObjectPath,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.fail("put", at)?;
        self.store.put_opts(at, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        at: &ObjectPath,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.fail("put", at)?;
        self.store.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &ObjectPath, options: GetOptions) -> object_store::Result<GetResult> {
        self.fail("get", at)?;
        self.store.get_opts(at, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<ObjectPath>>,
    ) -> BoxStream<'static, object_store::Result<ObjectPath>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> object_store::Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &ObjectPath, to: &ObjectPath, options: CopyOptions) -> object_store::Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn an_attempt_outlives_failures_of_the_store() {
    let store = Arc::new(FailsOnce::default());
    let at = origin().await;
    put_slice(&store.store, 7, &[format!("http://{at}/good/1"), format!("http://{at}/good/2")]).await;
    let tools = tools(Arc::<FailsOnce>::clone(&store)).await;
    let result = make_shard(&tools, &assignment(1), &Progress::default(), (), &Signals::default()).await;
    assert_eq!(result.expect("failures that pass"), AttemptResult::Committed);
    let failed = store.failed.lock().expect("no panic").clone();
    for (operation, part) in [
        ("get", crate::placeholder::PLACEHOLDERS_KEY),
        ("get", "slices/"),
        ("put", "shards/"),
        ("put", "outcomes/"),
        ("put", "index/"),
    ] {
        assert!(
            failed.iter().any(|(of, key)| *of == operation && key.contains(part)),
            "{operation} {part}: {failed:?}"
        );
    }
}

#[tokio::test]
async fn an_attempt_that_is_told_to_leave_commits_what_it_has_and_asks_for_nothing_more() {
    let store: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
    let at = origin().await;
    let good = (0..200).map(|seed| format!("http://{at}/good/{seed}"));
    let urls: Vec<String> = [format!("http://{at}/silent/1")].into_iter().chain(good).collect();
    put_slice(&*store, 7, &urls).await;
    let (tools, progress, signals) = (tools(Arc::clone(&store)).await, Progress::default(), Signals::default());
    let assignment = assignment(1);
    let attempt = make_shard(&tools, &assignment, &progress, (), &signals);
    let leaving = async {
        while progress.outcomes().of(Ok(())) < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        signals.leave.cancel();
    };
    let begun = Instant::now();
    let (result, ()) = tokio::join!(attempt, leaving);
    assert_eq!(result.expect("a good store"), AttemptResult::Committed);
    assert!(begun.elapsed() < LAST_REQUESTS_TIMEOUT + Duration::from_secs(5), "{:?}", begun.elapsed());
    let index = ShardIndex::from_json(&get(&*store, &keys::index(&birds(7))).await).expect("own output");
    let (kept, unfetched) = (index.outcomes.of(Ok(())), index.outcomes.of(Err(Rejection::Unfetched)));
    assert!(kept >= 3 && unfetched > 20, "{:?}", index.outcomes);
    // What never answers was in flight, and is cut or late.
    assert!(kept + unfetched >= 200 && index.outcomes.total() == 201, "{:?}", index.outcomes);

    put_slice(&*store, 8, &urls).await;
    let assignment = Assignment { shard: birds(8), ..assignment };
    let nothing = make_shard(&tools, &assignment, &progress, (), &signals).await;
    assert_eq!(nothing.expect("a good store"), AttemptResult::Left, "it has left before it began");
    assert!(store.head(&keys::index(&birds(8)).into()).await.is_err());
}

#[tokio::test]
async fn an_attempt_without_a_way_out_commits_what_it_had_from_before_and_gives_back_the_rest() {
    let store: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
    let at = origin().await;
    let url = |path: &str, n: u32| format!("http://127.0.0.{}:{}/{path}/{n}", n % 200 + 2, at.port());
    let tools = tools(Arc::clone(&store)).await;
    // A probe of its own: gone for ever.
    tools.way_out.hear(&[format!("http://{at}/gone/1")]);
    // Nothing listens at these.
    put_slice(&*store, 7, &(0..40).map(|n| url("good", n)).collect::<Vec<_>>()).await;
    let failure = make_shard(&tools, &assignment(1), &Progress::default(), (), &Signals::default()).await;
    assert_eq!(failure.expect_err("nothing is left").kind, FailureKind::WayOut);
    assert!(keys_in(&*store, "datasets").await.iter().all(|key| !key.contains("index")));

    tools.way_out.hear(&[format!("http://{at}/good/1")]);
    tokio::time::timeout(Duration::from_secs(20), tools.way_out.online()).await.expect("the probe answers");
    let result = make_shard(&tools, &assignment(2), &Progress::default(), (), &Signals::default()).await;
    assert_eq!(result.expect("a good store"), AttemptResult::Committed, "so it is the hosts that are dead");
    let index = ShardIndex::from_json(&get(&*store, &keys::index(&birds(7))).await).expect("own output");
    assert_eq!(index.outcomes.of(Err(Rejection::Connect)), 40, "{index:?}");
}

#[tokio::test]
async fn what_a_host_wants_to_be_asked_for_later_is_unfetched_also_if_there_is_nothing_else() {
    let store: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
    let (at, throttling) = (origin().await, [origin().await, origin().await]);
    let later = |of: usize| (0..20).map(move |n| format!("http://{}/later/{n}", throttling[of]));
    let good = (0..5).map(|n| format!("http://{at}/good/{n}"));
    let tools = tools(Arc::clone(&store)).await;
    for (shard, urls, kept) in [(7, good.chain(later(0)).collect::<Vec<_>>(), 5), (8, later(1).collect(), 0)] {
        put_slice(&*store, shard, &urls).await;
        let assignment = Assignment { shard: birds(shard), ..assignment(1) };
        let result = make_shard(&tools, &assignment, &Progress::default(), (), &Signals::default()).await;
        assert_eq!(result.expect("a good store"), AttemptResult::Committed);
        let index = ShardIndex::from_json(&get(&*store, &keys::index(&birds(shard))).await).expect("own output");
        let unfetched = index.outcomes.of(Err(Rejection::Unfetched));
        assert_eq!((index.outcomes.of(Ok(())), unfetched), (kept, 20), "{:?}", index.outcomes);
        let file = index.outcomes_file.expect("an attempt has outcomes");
        let rows: Vec<OutcomeRow> = table::read(get(&*store, &file.key).await).expect("own output");
        assert!(rows.iter().any(|row| row.http_status == Some(429)), "it is said why");
    }
}
