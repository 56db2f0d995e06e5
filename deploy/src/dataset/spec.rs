//! What a new dataset is, as flags and files say it.

use std::path::PathBuf;

use anyhow::Result;
use bytesize::ByteSize;
use clap::ValueEnum;
use proto::Class;

use crate::exit::Ended;
use crate::lists::parse_synsets;
use crate::settings;

/// How pictures become samples, whatever list they come from.
#[derive(Debug, clap::Args)]
pub(super) struct SpecArgs {
    /// In pixels; which side has it, --resize says [default: 256]
    #[arg(long)]
    size: Option<u32>,
    /// How images are brought to SIZE [default: cover]
    #[arg(long, value_enum)]
    resize: Option<ResizeForm>,
    /// Leave images that are smaller as they are
    #[arg(long)]
    no_upscale: bool,
    /// What stored images are: jpg or png [default: jpg]
    #[arg(long, value_name = "FORMAT")]
    encode_format: Option<String>,
    /// Which images are encoded again: always, or only as needed, when they are not as they would be stored [default:
    /// always]
    #[arg(long, value_name = "WHEN")]
    reencode: Option<String>,
    /// JPEG quality of stored images, 1 to 100 [default: 95]
    #[arg(long)]
    quality: Option<u8>,
    /// Share of the images that validate [default: 0.05]
    #[arg(long, value_name = "SHARE")]
    validation: Option<f64>,
    /// Share of the images that test [default: 0.05]
    #[arg(long, value_name = "SHARE")]
    test: Option<f64>,
    /// Seed of the shuffle that deals URLs to slices [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// URLs in one slice; a slice is fetched by one worker and becomes one shard [default: 10000]
    #[arg(long, value_name = "N")]
    slice_urls: Option<u32>,
    /// Stop fetching a class that has so many images; the dataset keeps the first N of it [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    per_class: Option<u32>,
    /// Smaller files are no photos: 5000, 5kB, 8KiB [default: 5000]
    #[arg(long, value_name = "SIZE")]
    min_bytes: Option<ByteSize>,
    /// A dataset spec in TOML; the flags here are put over it
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
    /// Any value of the spec: --set limits.timeout_seconds=10
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// How images are brought to their size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ResizeForm {
    /// The shorter side to SIZE, the centre cut out: a square (img2dataset: center_crop)
    Cover,
    /// The longer side to SIZE (img2dataset: keep_ratio_largest)
    Fit,
    /// As fit, on a white square (img2dataset: border)
    Pad,
    /// The shorter side to SIZE (img2dataset: keep_ratio)
    KeepRatio,
    /// Not at all (img2dataset: no)
    None,
}

impl SpecArgs {
    /// The spec's file with `--set` and the flags over it.
    pub(super) fn table(&self) -> Result<toml::Table> {
        let mut table = match &self.spec {
            Some(path) => settings::read(path)?,
            None => toml::Table::new(),
        };
        let flags = [
            ("resize.size", self.size.map(|v| v.to_string())),
            ("resize.mode", self.resize.and_then(|form| Some(form.to_possible_value()?.get_name().to_owned()))),
            ("resize.upscale", self.no_upscale.then(|| false.to_string())),
            ("resize.format", self.encode_format.clone()),
            ("resize.reencode", self.reencode.clone()),
            ("resize.quality", self.quality.map(|v| v.to_string())),
            // {:?} writes whole numbers with their point, as TOML wants floats.
            ("splits.validation", self.validation.map(|v| format!("{v:?}"))),
            ("splits.test", self.test.map(|v| format!("{v:?}"))),
            ("seed", self.seed.map(|v| v.to_string())),
            ("slice_urls", self.slice_urls.map(|v| v.to_string())),
            ("per_class", self.per_class.map(|v| v.to_string())),
            ("limits.min_bytes", self.min_bytes.map(|v| v.as_u64().to_string())),
        ];
        for assignment in &self.set {
            settings::set(&mut table, assignment)?;
        }
        for (key, value) in flags {
            if let Some(value) = value {
                settings::set(&mut table, &format!("{key}={value}"))?;
            }
        }
        Ok(table)
    }
}

/// The classes of a file that `flag` names; none if it was not given.
pub(super) fn classes(flag: &str, path: Option<&PathBuf>) -> Result<Vec<Class>> {
    let Some(path) = path else { return Ok(Vec::new()) };
    let text = std::fs::read_to_string(path);
    parse_synsets(flag, &text.map_err(|e| Ended::usage(format!("{flag} {}: {e}", path.display())))?)
}
