//! `gleaner dataset sample`: some of the stored pictures on one sheet, a row for each class.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use proto::manifest::Skips;
use proto::shard::{RawSample, split_block};
use proto::{ImageFormat, Manifest, Resize, ResizeMode, Split};
use serde_json::json;
use worker::Preparer;

use super::reader::{DatasetArgs, Reader};
use crate::exit::Ended;
use crate::output::{Format, Table, note, say_json};

/// Pixels of a picture's side on the sheet, and between two of them.
const SIDE: usize = 128;
const GAP: usize = 4;
/// Blocks that are read at the most; a block is some hundred kilobytes.
const MOST_BLOCKS: usize = 400;

/// Arguments of `gleaner dataset sample`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    from: DatasetArgs,
    /// The sheet's file, a PNG
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// Only this class; may be repeated [default: all, the first 100 of them]
    #[arg(long)]
    synset: Vec<String>,
    /// Pictures of each class
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=100))]
    each: u16,
    /// From this split alone
    #[arg(long)]
    split: Option<Split>,
    /// As of this version of the manifest; the latest if left out
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    version: u32,
}

/// One row of the sheet.
struct Row {
    label: u32,
    samples: Vec<RawSample>,
}

/// Writes the sheet and says which row is what.
pub(super) async fn run(args: Args) -> Result<()> {
    const MOST_ROWS: usize = 100;
    let reader = Reader::open(&args.from).await?;
    let manifest = reader.manifest(args.version).await?;
    for synset in &args.synset {
        let known = manifest.classes.iter().any(|class| class.synset == *synset);
        ensure!(known, Ended::usage(format!("--synset {synset}: {} has no such class", args.from.name)));
    }
    let labels = (0u32..).zip(&manifest.classes);
    let wanted = labels.filter(|(_, class)| args.synset.is_empty() || args.synset.contains(&class.synset));
    let mut rows: Vec<Row> = wanted.take(MOST_ROWS).map(|(label, _)| Row { label, samples: Vec::new() }).collect();
    if rows.is_empty() {
        // Pictures without a class are all of one kind.
        rows.push(Row { label: 0, samples: Vec::new() });
    }
    gather(&reader, &manifest, args.split, usize::from(args.each), &mut rows).await?;
    let found: usize = rows.iter().map(|row| row.samples.len()).sum();
    ensure!(found > 0, "{} has no picture of what is asked for", args.from.name);
    let (columns, described) = (usize::from(args.each), describe(&manifest, &rows));
    let png = tokio::task::spawn_blocking(move || sheet(&rows, columns)).await??;
    tokio::fs::write(&args.to, png).await.with_context(|| format!("cannot write {}", args.to.display()))?;
    match args.from.cluster.output {
        Format::Json => say_json(&described)?,
        Format::Table => {
            let mut table = Table::new(&["row", "synset", "name", "pictures"]);
            for row in &described {
                let cell = |column: &str| row[column].as_str().map_or_else(|| row[column].to_string(), str::to_owned);
                table.row(["row", "synset", "name", "pictures"].map(cell).into());
            }
            table.say();
        }
    }
    note(format!("{found} pictures in {}", args.to.display()));
    Ok(())
}

fn describe(manifest: &Manifest, rows: &[Row]) -> Vec<serde_json::Value> {
    let row = |(n, row): (usize, &Row)| {
        let class = manifest.classes.get(row.label as usize);
        json!({
            "row": n + 1,
            "synset": class.map_or("", |class| &class.synset),
            "name": class.map_or("", |class| &class.name),
            "pictures": row.samples.len(),
        })
    };
    rows.iter().enumerate().map(row).collect()
}

/// Finds pictures that count for each row, in blocks all over the dataset.
async fn gather(
    reader: &Reader,
    manifest: &Manifest,
    split: Option<Split>,
    each: usize,
    rows: &mut [Row],
) -> Result<()> {
    let tars = manifest.shards.iter().flat_map(|shard| shard.tars.iter().map(move |(&of, tar)| (shard, of, tar)));
    let tars = tars.filter(|(_, of, _)| split.is_none_or(|split| split == *of));
    let blocks: Vec<_> = tars
        .flat_map(|(shard, _, tar)| (0..tar.blocks.len()).map(move |n| (shard, tar, n)))
        .filter(|(_, tar, n)| tar.blocks[*n].kept > 0)
        .collect();
    let mut looks = spread(blocks.len()).take(MOST_BLOCKS);
    while rows.iter().any(|row| row.samples.len() < each) {
        let Some((shard, tar, n)) = looks.next().map(|look| blocks[look]) else { break };
        let block = tar.blocks[n];
        let bytes = reader.read(&tar.key, block.offset..block.offset + block.length).await?;
        let skips: Skips = reader.skips(shard).await?;
        let before: u32 = tar.blocks[..n].iter().map(|block| block.samples).sum();
        for (ordinal, sample) in (tar.first + before..).zip(split_block(&bytes)?) {
            // Without classes all pictures have the same label, which none of them says.
            let is_of = |label| label == sample.label || manifest.classes.len() <= 1 && sample.label == u32::MAX;
            let row = rows.iter_mut().find(|row| is_of(row.label));
            if let Some(row) = row.filter(|row| row.samples.len() < each && !skips.contains(ordinal)) {
                row.samples.push(sample);
            }
        }
    }
    Ok(())
}

/// Each of `n` once, the next one always far from the last ones.
fn spread(n: usize) -> impl Iterator<Item = usize> {
    // No divisor in common with n: steps of about 0.618 n come by all of them.
    fn divisor(a: usize, b: usize) -> usize {
        if b == 0 { a } else { divisor(b, a % b) }
    }
    let step = ((n as f64 * 0.618) as usize..n).chain(1..2).find(|&step| divisor(step.max(1), n) == 1).unwrap_or(1);
    (0..n).map(move |look| look * step % n)
}

/// The sheet as a PNG, white where there is nothing.
fn sheet(rows: &[Row], columns: usize) -> Result<Vec<u8>> {
    let (width, height) = (columns * (SIDE + GAP) + GAP, rows.len() * (SIDE + GAP) + GAP);
    let mut pixels = vec![255; 3 * width * height];
    let resize = Resize {
        size: SIDE as u32,
        mode: ResizeMode::Cover,
        upscale: true,
        format: ImageFormat::Png,
        ..Resize::default()
    };
    let mut preparer = Preparer::new(resize)?;
    for (down, row) in rows.iter().enumerate() {
        for (across, sample) in row.samples.iter().enumerate() {
            let prepared = preparer.prepare(&sample.image);
            let picture = prepared.map_err(|rejection| anyhow::anyhow!("picture {}: {rejection}", sample.key))?;
            let (left, top) = (GAP + across * (SIDE + GAP), GAP + down * (SIDE + GAP));
            for (y, line) in picture.values.chunks_exact(3 * picture.width).enumerate() {
                let at = 3 * ((top + y) * width + left);
                pixels[at..at + line.len()].copy_from_slice(line);
            }
        }
    }
    let mut png = Vec::new();
    let encoder = PngEncoder::new(&mut png);
    encoder.write_image(&pixels, width as u32, height as u32, ExtendedColorType::Rgb8)?;
    Ok(png)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_looked_at_once_and_the_first_ones_are_far_apart() {
        for n in [0, 1, 2, 7, 100, 1024] {
            let mut looks: Vec<usize> = spread(n).collect();
            if n == 100 {
                assert!(looks[0].abs_diff(looks[1]) > 20 && looks[1].abs_diff(looks[2]) > 20, "{looks:?}");
            }
            looks.sort_unstable();
            assert_eq!(looks, (0..n).collect::<Vec<_>>());
        }
    }
}
