//! `gleaner gc`: removes what nobody needs any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bytesize::ByteSize;
use coordinator::audit::{self, Garbage};
use serde_json::json;

use crate::fsck::unreadable;
use crate::output::{Format, Table, say, say_json};
use crate::store::{self, StoreArgs};

/// Arguments of `gleaner gc`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Show what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Leave what was written within this time: longer than any list takes to be uploaded, or a checkpoint to be
    /// written
    #[arg(long, value_parser = humantime::parse_duration, default_value = "24h", value_name = "TIME")]
    grace: Duration,
    /// How to answer
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// Finds garbage and removes it.
pub(crate) async fn run(args: Args) -> Result<()> {
    let store = store::open_existing(&args.store.store)?;
    let garbage = audit::garbage(Arc::clone(&store), args.grace).await.map_err(unreadable)?;
    let found = garbage.clone();
    let removed = match args.dry_run {
        true => 0,
        false => audit::remove(store, garbage).await.map_err(unreadable)?,
    };
    match args.output {
        Format::Json => say_json(&json!({ "garbage": found, "removed": removed })),
        Format::Table => {
            if args.dry_run {
                found.iter().for_each(|garbage| say(format!("{}: {}", garbage.key, garbage.why)));
            }
            if !found.is_empty() {
                summary(&found).say();
            }
            let bytes = ByteSize(found.iter().map(|garbage| garbage.bytes).sum());
            let objects = found.len();
            say(match args.dry_run {
                true => format!("{objects} objects of {bytes} would be removed"),
                false => format!("{removed} of {objects} objects of {bytes} were removed"),
            });
            Ok(())
        }
    }
}

fn summary(garbage: &[Garbage]) -> Table {
    let mut by_reason: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for garbage in garbage {
        let (objects, bytes) = by_reason.entry(garbage.why).or_default();
        *objects += 1;
        *bytes += garbage.bytes;
    }
    let mut table = Table::new(&["garbage", "objects", "bytes"]);
    for (why, (objects, bytes)) in by_reason {
        table.row(vec![why.to_owned(), objects.to_string(), ByteSize(bytes).to_string()]);
    }
    table
}
