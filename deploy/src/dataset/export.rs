//! `gleaner dataset export`: the samples that count, for other tools.

mod parquet;

use std::collections::{BTreeMap, HashSet};
use std::ops::{AddAssign, ControlFlow};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::manifest::{ManifestShard, ManifestTar, Skip};
use proto::outcomes::OutcomeRow;
use proto::shard::{RawSample, split_block};
use proto::{Manifest, Split};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use super::reader::{DatasetArgs, Reader};
use crate::exit::Ended;
use crate::output::{Format, Progress, say, say_json};
use crate::store;

/// Blocks that are read ahead.
const AHEAD: usize = 4;

/// Files of a tree that are written at the same time.
const WRITES: usize = 16;

/// Arguments of `gleaner dataset export`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    from: DatasetArgs,
    /// Where to: a folder, or s3://, gs:// or az:// BUCKET/PREFIX; must be empty
    #[arg(long, value_name = "FOLDER|STORE")]
    to: String,
    /// As what
    #[arg(long = "as", value_enum)]
    form: Form,
    /// Only this split; may be repeated
    #[arg(long, value_parser = |name: &str| name.parse::<Split>().map_err(|error| error.to_string()))]
    split: Vec<Split>,
    /// This version of the manifest; the latest if left out
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    version: u32,
}

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Form {
    /// SPLIT/SYNSET/KEY.jpg, as torchvision's ImageFolder reads it
    Tree,
    /// list.csv: one line per sample, with its URL and its place in the dataset's tars
    List,
    /// SPLIT/NUMBER.tar in WebDataset's layout, without the samples that the dataset's own tars hold but skip
    Webdataset,
    /// SPLIT-NUMBER-of-NUMBER.parquet, as Hugging Face's `datasets` loads it
    Parquet,
}

/// Writes everything; what was written last is the list of classes, so that a folder with it is complete.
pub(super) async fn run(args: Args) -> Result<()> {
    let reader = Reader::open(&args.from).await?;
    let manifest = reader.manifest(args.version).await?;
    let target = Target::open(&args.to).await?;
    let splits = if args.split.is_empty() { Split::ALL.to_vec() } else { args.split.clone() };
    let total = splits.iter().map(|&split| manifest.samples(split)).sum();
    let mut progress = Progress::new("images");
    // Pictures of several classes count as samples of none, but other tools can use them.
    let several = manifest.skipped.contains_key(&Skip::SeveralClasses);
    let written = match args.form {
        Form::List => list(&reader, &manifest, &splits, &target).await?.into(),
        Form::Parquet => {
            let told = |written| progress.update(written, total, &args.from.name, "exported");
            parquet::write(&reader, &manifest, &splits, several, &target, told).await?
        }
        form => {
            let mut written = Written::default();
            let folders = folders(manifest.classes.iter().map(|class| class.synset.as_str()));
            for shard in &manifest.shards {
                for (split, tar) in shard.tars.iter().filter(|(split, _)| splits.contains(split)) {
                    written += match form {
                        Form::Tree => tree(&reader, &folders, (shard, *split, tar), &target).await?.into(),
                        _ => webdataset(&reader, (shard, *split, tar), several, &target).await?,
                    };
                    progress.update(written.of_one, total, &args.from.name, "exported");
                }
            }
            written
        }
    };
    let Written { of_one: written, of_several } = written;
    drop(progress);
    ensure!(written == total, "{written} samples were written, but the manifest counts {total}");
    let mut classes = csv::Writer::from_writer(Vec::new());
    classes.write_record(["label", "synset", "name"])?;
    for (label, class) in manifest.classes.iter().enumerate() {
        classes.write_record([&label.to_string(), &class.synset, &class.name])?;
    }
    target.put("classes.csv", classes.into_inner()?.into()).await?;
    let version = manifest.version;
    match args.from.cluster.output {
        Format::Json => {
            let (dataset, to) = (&manifest.dataset, &args.to);
            say_json(&json!({
                "dataset": dataset, "version": version, "samples": written, "samples_of_several_classes": of_several, "to": to,
            }))
        }
        Format::Table => {
            let (name, to) = (&args.from.name, &args.to);
            let and = if of_several > 0 { format!(", and {of_several} of several classes,") } else { String::new() };
            say(format!("{name}: {written} images{and} of manifest version {version} are in {to}"));
            Ok(())
        }
    }
}

/// How many samples were written.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Written {
    /// Those that count.
    of_one: u64,
    /// Those that have several classes.
    of_several: u64,
}

impl Written {
    fn count(&mut self, of_several: bool) {
        *(if of_several { &mut self.of_several } else { &mut self.of_one }) += 1;
    }
}

impl AddAssign for Written {
    fn add_assign(&mut self, more: Self) {
        self.of_one += more.of_one;
        self.of_several += more.of_several;
    }
}

impl From<u64> for Written {
    fn from(of_one: u64) -> Self {
        Self { of_one, of_several: 0 }
    }
}

/// Where it is written.
struct Target {
    store: Arc<dyn ObjectStore>,
    location: String,
}

impl Target {
    async fn open(location: &str) -> Result<Self> {
        let store = store::open_scratch(location)?;
        let first = store.list(None).next().await.transpose().with_context(|| format!("cannot list {location}"))?;
        match first {
            None => Ok(Self { store, location: location.to_owned() }),
            Some(there) => Err(Ended::usage(format!(
                "--to {location}: is not empty ({} is there); an export stands alone",
                there.location
            ))),
        }
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<()> {
        let put = async { self.store.put(&Path::parse(key)?, bytes.into()).await };
        put.await.map(drop).with_context(|| format!("cannot write {key} to {}", self.location))
    }

    /// An object that is there once it is shut down.
    fn writer(&self, key: &str) -> BufWriter {
        BufWriter::new(Arc::clone(&self.store), Path::from(key))
    }
}

/// The samples of a tar that count, block by block, and, if `several` are wanted, those that have several classes.
pub(crate) async fn blocks<'a>(
    reader: &'a Reader,
    shard: &ManifestShard,
    tar: &'a ManifestTar,
    several: bool,
) -> Result<impl stream::Stream<Item = Result<Vec<RawSample>>> + use<'a>> {
    let skips = reader.skips(shard).await?;
    let mut first = tar.first;
    let placed = tar.blocks.iter().map(|block| {
        first += block.samples;
        (first - block.samples, *block)
    });
    let wanted: Vec<_> = placed.filter(|(_, block)| block.kept > 0 || several).collect();
    let read = stream::iter(wanted).map(async move |(place, block)| {
        let bytes = reader.read(&tar.key, block.offset..block.offset + block.length).await?;
        let samples = split_block(&bytes).with_context(|| tar.key.clone())?;
        let whole = samples.len() == block.samples as usize;
        ensure!(whole, "{}: a block has {} samples, not {}", tar.key, samples.len(), block.samples);
        Ok((place, samples))
    });
    Ok(read.buffered(AHEAD).map_ok(move |(place, samples): (u32, Vec<RawSample>)| {
        let counts = |(at, sample): &(u32, RawSample)| !skips.contains(*at) || several && has_no_label(sample);
        (place..).zip(samples).filter(counts).map(|(_, sample)| sample).collect()
    }))
}

async fn tree(
    reader: &Reader,
    folders: &[String],
    (shard, split, tar): (&ManifestShard, Split, &ManifestTar),
    target: &Target,
) -> Result<u64> {
    let mut written = 0;
    let mut blocks = std::pin::pin!(blocks(reader, shard, tar, false).await?);
    while let Some(samples) = blocks.try_next().await? {
        written += samples.len() as u64;
        let files = samples.into_iter().map(|sample| {
            // Without classes all pictures have the same label, which none of them says.
            let label = if folders.len() == 1 { 0 } else { sample.label as usize };
            let folder = folders.get(label).with_context(|| format!("{}: label {label} is no class's", tar.key))?;
            anyhow::Ok((format!("{split}/{folder}/{:012}.{}", sample.key, sample.ending), sample.image))
        });
        let puts = stream::iter(files)
            .try_for_each_concurrent(WRITES, |(key, image)| async move { target.put(&key, image).await });
        puts.await?;
    }
    Ok(written)
}

/// Names of folders for the classes, each another, whatever is in their names: Open Images' `/m/011k07` has slashes.
/// They differ also where upper and lower case are the same.
fn folders<'a>(synsets: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut taken = HashSet::new();
    let unsafe_in_names = |c: char| c.is_control() || matches!(c, '/' | '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|');
    let name = |(label, synset): (usize, &str)| {
        let plain = synset.trim_matches('/').replace(unsafe_in_names, "_");
        // No file system takes `..`, and some no dot or blank at the end.
        let plain = plain.trim_matches(['.', ' ']);
        let plain = if plain.is_empty() { "_" } else { plain };
        let numbered = (0..).map(|n| match n {
            0 => plain.to_owned(),
            1 => format!("{plain}-{label}"),
            n => format!("{plain}-{label}-{n}"),
        });
        let free = numbered.into_iter().find(|name| taken.insert(name.to_lowercase()));
        free.unwrap_or_else(|| label.to_string())
    };
    synsets.enumerate().map(name).collect()
}

fn has_no_label(sample: &RawSample) -> bool {
    sample.label == u32::MAX
}

async fn webdataset(
    reader: &Reader,
    (shard, split, tar): (&ManifestShard, Split, &ManifestTar),
    several: bool,
    target: &Target,
) -> Result<Written> {
    if !several && tar.blocks.iter().all(|block| block.kept == 0) {
        return Ok(Written::default());
    }
    let key = format!("{split}/{:06}.tar", shard.shard);
    let failed = || format!("cannot write {key} to {}", target.location);
    let mut writer = target.writer(&key);
    let mut written = Written::default();
    let mut blocks = std::pin::pin!(blocks(reader, shard, tar, several).await?);
    while let Some(samples) = blocks.try_next().await? {
        for sample in samples {
            written.count(several && has_no_label(&sample));
            writer.put(sample.members).await.with_context(failed)?;
        }
    }
    if written == Written::default() {
        return Ok(Written::default());
    }
    // Two empty records end a tar (POSIX.1-1988).
    writer.put(Bytes::from_static(&[0; 1024])).await.with_context(failed)?;
    writer.shutdown().await.with_context(failed)?;
    Ok(written)
}

async fn list(reader: &Reader, manifest: &Manifest, splits: &[Split], target: &Target) -> Result<u64> {
    let labels: BTreeMap<&str, u32> =
        manifest.classes.iter().zip(0..).map(|(class, label)| (class.synset.as_str(), label)).collect();
    let mut writer = target.writer("list.csv");
    let head = "key,split,synset,label,url,final_url,width,height,sha256,tar,offset,length,columns\n";
    writer.put(Bytes::from_static(head.as_bytes())).await?;
    let mut written = 0;
    let write = reader.each_url(manifest, async |found| {
        let row = &found.row;
        if row.split().is_some_and(|split| splits.contains(&split)) && found.skipped().is_none() {
            let label = labels.get(row.synset.as_str()).copied();
            writer.put(entry(row, label)?).await?;
            written += 1;
        }
        Ok(ControlFlow::Continue(()))
    });
    write.await?;
    writer.shutdown().await.with_context(|| format!("cannot write list.csv to {}", target.location))?;
    Ok(written)
}

/// The line of one sample.
fn entry(row: &OutcomeRow, label: Option<u32>) -> Result<Bytes> {
    fn number<T: ToString>(value: Option<T>) -> String {
        value.map_or_else(String::new, |value| value.to_string())
    }
    fn text(value: &Option<String>) -> String {
        value.clone().unwrap_or_default()
    }
    let fields = [
        row.key.to_string(),
        text(&row.split),
        row.synset.clone(),
        number(label),
        row.url.clone(),
        text(&row.final_url),
        number(row.width),
        number(row.height),
        text(&row.sha256),
        text(&row.tar),
        number(row.offset),
        number(row.length),
        text(&row.columns),
    ];
    let mut line = csv::WriterBuilder::new().buffer_capacity(512).from_writer(Vec::new());
    line.write_record(fields)?;
    Ok(line.into_inner()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_commas_and_quotes_are_quoted() {
        let row = OutcomeRow { key: 3, synset: "n1".into(), url: "http://a/,\"x\"".into(), ..OutcomeRow::default() };
        assert_eq!(entry(&row, Some(2)).expect("text"), "3,,n1,2,\"http://a/,\"\"x\"\"\",,,,,,,,\n");
    }

    #[tokio::test]
    async fn a_file_stands_in_a_folder_with_its_classs_own_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = Target::open(&folder.path().display().to_string()).await.expect("it is empty");
        let long = "é".repeat(64);
        let names = folders(["кошка", "50%", "[x]", "c#", "what~", &long].into_iter());
        for name in &names {
            target.put(&format!("train/{name}/1.jpg"), Bytes::from_static(b"picture")).await.expect("a folder");
            let file = folder.path().join("train").join(name).join("1.jpg");
            assert!(file.exists(), "{name}");
        }
        assert_eq!(names[..2], ["кошка", "50%"]);
    }

    #[test]
    fn every_class_has_a_folder_of_its_own_within_its_split() {
        let synsets = [
            "/m/011k07",
            "n02084071",
            "golden retriever",
            "金毛犬",
            "a/b",
            "a_b",
            "A_B",
            "../..",
            "..",
            "a:b. ",
            "a_b-5",
        ];
        let names = folders(synsets.into_iter());
        assert_eq!(names[..5], ["m_011k07", "n02084071", "golden retriever", "金毛犬", "a_b"]);
        let lower: HashSet<String> = names.iter().map(|name| name.to_lowercase()).collect();
        assert_eq!(lower.len(), synsets.len(), "{names:?}");
        assert!(names.iter().all(|name| !name.contains(['/', '\\', ':']) && !name.starts_with('.')), "{names:?}");
    }
}
