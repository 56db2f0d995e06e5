//! `gleaner dataset outcomes`: the URLs of a dataset, each with what became of it.

use std::ops::ControlFlow;

use anyhow::Result;
use proto::Rejection;
use proto::findings::Finding;
use proto::manifest::Skip;
use proto::outcomes::OutcomeRow;
use proto::rejection::KEPT;
use serde_json::json;

use super::reader::{DatasetArgs, Found, Reader};
use crate::output::{Format, say};

/// What a sample is called that counts although it looks like another one.
const NEAR: &str = "near_duplicate";

/// Arguments of `gleaner dataset outcomes`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    from: DatasetArgs,
    /// Only URLs with this outcome: kept, a rejection (timeout, not_found ...), why a kept image does not count
    /// (duplicate, near_training ...), or near_duplicate; may be repeated
    #[arg(long, value_parser = outcome, value_name = "OUTCOME")]
    outcome: Vec<String>,
    /// Only URLs of this class; may be repeated
    #[arg(long)]
    synset: Vec<String>,
    /// Not more than so many
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// As of this version of the manifest; the latest if left out
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    version: u32,
}

fn outcome(name: &str) -> Result<String, String> {
    let names = || {
        let rejections = Rejection::ALL.iter().map(|rejection| rejection.name());
        std::iter::once(KEPT).chain(rejections).chain(Skip::ALL.map(Skip::name)).chain([NEAR])
    };
    match names().any(|known| known == name) {
        true => Ok(name.to_owned()),
        false => Err(format!("must be one of {}", names().collect::<Vec<_>>().join(", "))),
    }
}

/// Prints them as they are read.
pub(super) async fn run(args: Args) -> Result<()> {
    let reader = Reader::open(&args.from).await?;
    let manifest = reader.manifest(args.version).await?;
    let as_json = args.from.cluster.output == Format::Json;
    let mut left = args.limit.unwrap_or(u64::MAX);
    reader
        .each_url(&manifest, async |Found { row, finding, .. }| {
            if left == 0 {
                return Ok(ControlFlow::Break(()));
            }
            if wanted(&args, &row, finding.as_ref()) {
                left -= 1;
                match as_json {
                    true => say(object(&row, finding.as_ref())),
                    false => say(line(&row, finding.as_ref())),
                }
            }
            Ok(ControlFlow::Continue(()))
        })
        .await
}

fn wanted(args: &Args, row: &OutcomeRow, finding: Option<&Finding>) -> bool {
    let found = finding.map(|finding| finding.skipped.as_deref().unwrap_or(NEAR));
    let is = |name: &String| *name == row.outcome || Some(name.as_str()) == found;
    (args.outcome.is_empty() || args.outcome.iter().any(is))
        && (args.synset.is_empty() || args.synset.contains(&row.synset))
}

/// For people; the columns are as wide as names commonly are, because lines are printed as they come.
fn line(row: &OutcomeRow, finding: Option<&Finding>) -> String {
    let outcome = match (finding, row.http_status) {
        (Some(finding), _) => {
            let what = finding.skipped.as_deref().unwrap_or(NEAR);
            let like = finding.like.map(|key| format!(" of {key}")).unwrap_or_default();
            format!("{}, {what}{like}", row.outcome)
        }
        (None, Some(status)) if row.outcome == Rejection::HttpStatus.name() => format!("{} {status}", row.outcome),
        _ => match &row.detail {
            Some(detail) => format!("{} {detail}", row.outcome),
            None => row.outcome.clone(),
        },
    };
    format!("{:>9}  {outcome:<16}  {:<10}  {}", row.key, row.synset, row.url)
}

fn object(row: &OutcomeRow, finding: Option<&Finding>) -> serde_json::Value {
    json!({
        "key": row.key,
        "synset": row.synset,
        "url": row.url,
        "final_url": row.final_url,
        "outcome": row.outcome,
        "http_status": row.http_status,
        "detail": row.detail,
        "bytes": row.bytes,
        "width": row.width,
        "height": row.height,
        "sha256": row.sha256,
        "phash": row.phash,
        "split": row.split,
        "skipped": finding.and_then(|finding| finding.skipped.clone()),
        "like": finding.and_then(|finding| finding.like),
        "bits": finding.and_then(|finding| finding.bits),
        "fetched_at": row.fetched_at,
        "millis": row.millis,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_nothing_has_are_refused_with_those_that_there_are() {
        assert!(outcome("timeout").is_ok() && outcome("near_training").is_ok() && outcome(NEAR).is_ok());
        let refusal = outcome("tiemout").expect_err("a typing mistake");
        assert!(refusal.contains("timeout") && refusal.contains("class_full"), "{refusal}");
    }

    #[test]
    fn a_line_says_why_a_kept_image_does_not_count() {
        let row =
            OutcomeRow { key: 7, outcome: KEPT.into(), synset: "n1".into(), url: "u".into(), ..OutcomeRow::default() };
        let finding = Finding { key: 7, skipped: Some("duplicate".into()), like: Some(3), ..Finding::default() };
        assert!(line(&row, Some(&finding)).contains("kept, duplicate of 3"));
        let near = Finding { skipped: None, ..finding };
        assert_eq!(object(&row, Some(&near))["like"], 3);
        assert!(line(&row, Some(&near)).contains("kept, near_duplicate of 3"));
        let refused = OutcomeRow { outcome: "http_status".into(), http_status: Some(503), ..row.clone() };
        assert!(line(&refused, None).contains("http_status 503"));
        let foreign = OutcomeRow { outcome: "unsupported_format".into(), detail: Some("heic".into()), ..row };
        assert!(line(&foreign, None).contains("unsupported_format heic"));
    }
}
