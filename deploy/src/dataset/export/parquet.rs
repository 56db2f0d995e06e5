//! Parquet as Hugging Face's `datasets` has it: pictures as bytes in their rows, and what the columns are in the file's
//! `huggingface` metadata. Row groups are written as they fill, so that memory does not depend on a file's length.

use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::TryStreamExt;
use parquet::basic::{Compression, ZstdLevel};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::ColumnPath;
use proto::manifest::{ManifestShard, ManifestTar};
use proto::shard::RawSample;
use proto::{Manifest, Split};
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;

use super::{Target, Written, blocks, has_no_label};
use crate::dataset::reader::Reader;

/// A row group is written once its pictures have so many bytes.
const GROUP_BYTES: usize = 8 << 20;
/// Rows after which it is looked whether a page is full. A picture is large, and a page is read as a whole.
const PAGE_ROWS: usize = 8;

/// The columns, in the order in which [`Group::write`] fills them.
const SCHEMA: &str = "message schema {
    optional group image { optional binary bytes; optional binary path (UTF8); }
    optional int64 label;
    optional int64 key;
    optional binary url (UTF8);
    optional binary sha256 (UTF8);
    optional int64 width;
    optional int64 height;
    optional binary text (UTF8);
    optional binary columns (UTF8);
}";

/// Members of a sample's JSON that have columns of their own, or that a label says.
const OWN: [&str; 5] = ["synset", "url", "sha256", "width", "height"];

/// Writes the files of all shards' tars of some splits, named as `datasets` looks for them.
pub(super) async fn write(
    reader: &Reader,
    manifest: &Manifest,
    splits: &[Split],
    several: bool,
    target: &Target,
    mut told: impl FnMut(u64),
) -> Result<Written> {
    let mut written = Written::default();
    for &split in splits {
        let wanted = |tar: &ManifestTar| several || tar.blocks.iter().any(|block| block.kept > 0);
        let tars = manifest.shards.iter().filter_map(|shard| Some((shard, shard.tars.get(&split)?)));
        let tars: Vec<(&ManifestShard, &ManifestTar)> = tars.filter(|(_, tar)| wanted(tar)).collect();
        for (n, (shard, tar)) in tars.iter().enumerate() {
            let key = format!("{split}-{n:05}-of-{:05}.parquet", tars.len());
            written += file(reader, manifest, (shard, tar), several, target, &key).await?;
            told(written.of_one);
        }
    }
    Ok(written)
}

async fn file(
    reader: &Reader,
    manifest: &Manifest,
    (shard, tar): (&ManifestShard, &ManifestTar),
    several: bool,
    target: &Target,
    key: &str,
) -> Result<Written> {
    let failed = || format!("cannot write {key} to {}", target.location);
    let mut to = target.writer(key);
    let mut writer = writer(manifest).with_context(failed)?;
    let (mut group, mut written) = (Group::default(), Written::default());
    let mut blocks = std::pin::pin!(blocks(reader, shard, tar, several).await?);
    while let Some(samples) = blocks.try_next().await? {
        for sample in samples {
            written.count(several && has_no_label(&sample));
            group.push(&sample, manifest.classes.len()).with_context(|| tar.key.clone())?;
        }
        if group.bytes >= GROUP_BYTES {
            std::mem::take(&mut group).write(&mut writer).with_context(failed)?;
            to.put(std::mem::take(writer.inner_mut()).into()).await.with_context(failed)?;
        }
    }
    if !group.pictures.is_empty() {
        group.write(&mut writer).with_context(failed)?;
    }
    to.put(writer.into_inner().with_context(failed)?.into()).await.with_context(failed)?;
    to.shutdown().await.with_context(failed)?;
    Ok(written)
}

fn writer(manifest: &Manifest) -> Result<SerializedFileWriter<Vec<u8>>, ParquetError> {
    let value = |of: &str| json!({"dtype": of, "_type": "Value"});
    let names: Vec<&str> = manifest.classes.iter().map(|class| class.synset.as_str()).collect();
    let features = json!({"info": {"features": {
        "image": {"_type": "Image"},
        "label": {"names": names, "_type": "ClassLabel"},
        "key": value("int64"),
        "url": value("string"),
        "sha256": value("string"),
        "width": value("int64"),
        "height": value("int64"),
        "text": value("string"),
        "columns": value("string"),
    }}});
    let picture = || ColumnPath::from(vec!["image".to_owned(), "bytes".to_owned()]);
    let properties = WriterProperties::builder()
        .set_key_value_metadata(Some(vec![KeyValue::new("huggingface".to_owned(), features.to_string())]))
        .set_write_batch_size(PAGE_ROWS)
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
        // Pictures are compressed by themselves, and none is less than another.
        .set_column_compression(picture(), Compression::UNCOMPRESSED)
        .set_column_dictionary_enabled(picture(), false)
        .set_column_statistics_enabled(picture(), EnabledStatistics::None)
        .build();
    SerializedFileWriter::new(Vec::new(), Arc::new(parse_message_type(SCHEMA)?), Arc::new(properties))
}

/// Rows that are gathered for one row group.
#[derive(Default)]
struct Group {
    bytes: usize,
    pictures: Vec<Option<Bytes>>,
    paths: Vec<Option<Bytes>>,
    labels: Vec<Option<i64>>,
    keys: Vec<Option<i64>>,
    urls: Vec<Option<Bytes>>,
    sha256: Vec<Option<Bytes>>,
    widths: Vec<Option<i64>>,
    heights: Vec<Option<i64>>,
    texts: Vec<Option<Bytes>>,
    columns: Vec<Option<Bytes>>,
}

impl Group {
    fn push(&mut self, sample: &RawSample, classes: usize) -> Result<()> {
        let mut about: Map<String, Value> = match sample.member("json") {
            Some(json) => serde_json::from_slice(&json).with_context(|| format!("sample {}", sample.key))?,
            None => Map::new(),
        };
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(|text| Bytes::from(text.to_owned()));
        self.bytes += sample.image.len();
        self.pictures.push(Some(sample.image.clone()));
        self.paths.push(Some(format!("{:012}.{}", sample.key, sample.ending).into()));
        // Without classes all pictures have the same label, which none of them says.
        let alone = if classes == 1 { Some(0) } else { None };
        self.labels.push(if has_no_label(sample) { alone } else { Some(sample.label.into()) });
        self.keys.push(Some(sample.key as i64));
        self.urls.push(text(about.get("url")));
        self.sha256.push(text(about.get("sha256")));
        self.widths.push(about.get("width").and_then(Value::as_i64));
        self.heights.push(about.get("height").and_then(Value::as_i64));
        self.texts.push(sample.member("txt"));
        about.retain(|name, _| !OWN.contains(&name.as_str()));
        self.columns.push(if about.is_empty() { None } else { Some(Value::from(about).to_string().into()) });
        Ok(())
    }

    fn write(self, writer: &mut SerializedFileWriter<Vec<u8>>) -> Result<(), ParquetError> {
        let texts = [self.urls, self.sha256];
        let mut rows = writer.next_row_group()?;
        let mut write = |values: Values| -> Result<(), ParquetError> {
            let Some(mut column) = rows.next_column()? else { return Ok(()) };
            match (column.untyped(), values) {
                (ColumnWriter::ByteArrayColumnWriter(typed), Values::Bytes(depth, values)) => {
                    let levels: Vec<i16> = values.iter().map(|value| if value.is_some() { depth } else { 0 }).collect();
                    let values: Vec<ByteArray> = values.into_iter().flatten().map(ByteArray::from).collect();
                    typed.write_batch(&values, Some(&levels), None)?;
                }
                (ColumnWriter::Int64ColumnWriter(typed), Values::Longs(values)) => {
                    let levels: Vec<i16> = values.iter().map(|value| value.is_some().into()).collect();
                    let values: Vec<i64> = values.into_iter().flatten().collect();
                    typed.write_batch(&values, Some(&levels), None)?;
                }
                _ => return Err(ParquetError::General("a column has another type than its values".to_owned())),
            }
            column.close()
        };
        write(Values::Bytes(2, self.pictures))?;
        write(Values::Bytes(2, self.paths))?;
        write(Values::Longs(self.labels))?;
        write(Values::Longs(self.keys))?;
        texts.into_iter().try_for_each(|text| write(Values::Bytes(1, text)))?;
        write(Values::Longs(self.widths))?;
        write(Values::Longs(self.heights))?;
        write(Values::Bytes(1, self.texts))?;
        write(Values::Bytes(1, self.columns))?;
        rows.close().map(drop)
    }
}

/// One column of a row group; bytes with how deep in the schema they are.
enum Values {
    Bytes(i16, Vec<Option<Bytes>>),
    Longs(Vec<Option<i64>>),
}
