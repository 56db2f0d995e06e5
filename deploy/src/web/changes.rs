//! What one version of a dataset has that another has not.

use std::time::Duration;

use anyhow::Context;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use maud::{Markup, html};

use super::page::{Failure, Page, number};
use super::source::Source;
use crate::dataset::diff::{Change, Diff, diff, moved};

/// Versions that have little in common may take longer to compare than anybody waits for a page.
const PATIENCE: Duration = Duration::from_secs(20);
/// Classes that are listed.
const CLASSES: usize = 500;

pub(super) async fn page(
    State(source): State<Source>,
    Path((name, from, to)): Path<(String, u32, u32)>,
) -> Result<Response, Failure> {
    let dataset = source.dataset(&name).await?;
    let (one, other) = (source.manifest(&dataset, from).await?, source.manifest(&dataset, to).await?);
    let (reader, runtime) = (source.reader(&name), tokio::runtime::Handle::current());
    let compare = tokio::task::spawn_blocking(move || {
        let compare = async { anyhow::Ok(diff(&one, &other, &moved(&reader, &one, &other).await?)) };
        runtime.block_on(tokio::time::timeout(PATIENCE, compare))
    });
    let command = format!("gleaner dataset diff {name} {from} {to}");
    let diff =
        compare.await?.with_context(|| format!("this takes too long for a page; in a terminal: {command}"))??;
    let title = format!("{name}: version {from} to {to}");
    Ok(Page { title: &title, live: false, command: &command, sections: sections(&name, &diff) }.into_response())
}

fn sections(name: &str, diff: &Diff) -> Markup {
    let (from, to) = (format!("v{}", diff.from), format!("v{}", diff.to));
    let change = |Change { from, to }: &Change| html! { td .n { (number(*from)) } td .n { (number(*to)) } };
    html! {
        section #verdict {
            h1 { a href={ "/datasets/" (name) } { (name) } ": version " (diff.from) " to " (diff.to) }
            p .verdict { (number(diff.added)) " samples added, " (number(diff.removed)) " removed." }
        }
        @if !diff.outcomes.is_empty() { section #outcomes {
            h2 { "Outcomes" }
            div .scroll { table {
                thead { tr { th { "outcome" } th .n { (from) } th .n { (to) } } }
                tbody { @for (outcome, changed) in &diff.outcomes { tr { td { (outcome) } (change(changed)) } } }
            } }
        } }
        @if !diff.classes.is_empty() { section #classes {
            h2 { "Classes that changed" }
            div .scroll { table {
                thead { tr { th { "class" } th .n { "added" } th .n { "removed" } th .n { (from) } th .n { (to) } } }
                tbody { @for class in diff.classes.iter().take(CLASSES) { tr {
                    td { (if class.name.is_empty() { &class.synset } else { &class.name }) }
                    td .n { (number(class.added)) } td .n { (number(class.removed)) } (change(&class.samples))
                } } }
            } }
            @if diff.classes.len() > CLASSES { p { "and " (number((diff.classes.len() - CLASSES) as u64)) " more" } }
        } }
    }
}
