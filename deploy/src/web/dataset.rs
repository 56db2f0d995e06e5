//! A dataset's page: what did I get, why is the rest missing, is it good enough to train on.

use std::collections::BTreeMap;

use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use maud::{Markup, html};
use proto::manifest::Skip;
use proto::pb::{Dataset, DatasetState};
use proto::rejection::KEPT;
use proto::{DatasetSpec, Rejection, Split};

use super::chart::bar;
use super::page::{Failure, Page, number, query, troubles};
use super::pictures::sheet;
use super::progress::{YIELD, comes_back, progress, shares};
use super::source::Source;
use crate::dataset::site_yield;
use crate::output::percent;

/// Pictures of one sheet.
const SHEET: usize = 48;

pub(super) async fn page(
    State(source): State<Source>,
    Path(name): Path<String>,
    RawQuery(raw): RawQuery,
) -> Result<Response, Failure> {
    let dataset = source.dataset(&name).await?;
    let query = query(raw);
    let live = matches!(dataset.state(), DatasetState::Fetching | DatasetState::Sealing);
    let pictures = match dataset.manifest_version {
        0 => {
            html! { section #pictures { h2 { "Pictures" } p { "They can be looked at once the first version is made." } } }
        }
        version => sheet_section(&source, &dataset, version, &query).await?,
    };
    let sections = html! {
        section #verdict {
            h1 { (dataset.name) }
            p .verdict { (verdict(&source, &dataset)) }
            (bar("kept, may come back, gone, waiting", &YIELD.into_iter().zip(shares(&dataset)).collect::<Vec<_>>()))
            p .keys { span .kept { "■ kept" } span .back { "◪ may come back" } span .gone { "□ gone" } span .wait { "· waiting" } }
            (troubles(&dataset.troubles))
            @for damaged in dataset.damaged.iter().take(5) {
                div .card .trouble { strong { "⚠ damaged" } ": shard " (damaged.shard) ", " (damaged.key) ": " (damaged.what) ". Its URLs can be fetched again: " code { "gleaner dataset refresh " (dataset.name) } }
            }
            @if dataset.damaged.len() > 5 { p { "and " (dataset.damaged.len() - 5) " more damaged shards" } }
        }
        (pictures)
        (outcomes_section(&dataset))
        (sites_section(&dataset))
        (classes_section(&dataset))
        (versions_section(&dataset))
    };
    let command = format!("gleaner dataset describe {name}");
    Ok(Page { title: &dataset.name, live, command: &command, sections }.into_response())
}

fn verdict(source: &Source, dataset: &Dataset) -> Markup {
    let kept = dataset.outcomes.get(KEPT).copied().unwrap_or(0);
    let skipped: u64 = dataset.skipped.values().sum();
    html! {
        @match dataset.state() {
            DatasetState::Failed => { "Failed: " (dataset.error) }
            DatasetState::Ready => {
                (number(kept)) " of " (number(dataset.urls)) " URLs gave a picture (" (percent(kept, dataset.urls)) ")"
                @if skipped > 0 { "; " (number(skipped)) " of them do not count, being copies and the like" }
                ". Version " (dataset.manifest_version) ", " (dataset.rounds) " rounds."
            }
            _ => { (progress(source, dataset)) ". " (dataset.shards_committed) " of " (dataset.shards) " shards are committed." }
        }
    }
}

fn outcomes_section(dataset: &Dataset) -> Markup {
    let mut outcomes: Vec<(&String, &u64)> = dataset.outcomes.iter().filter(|(_, urls)| **urls > 0).collect();
    outcomes.sort_by_key(|(name, urls)| (std::cmp::Reverse(**urls), *name));
    let link = |name: &str| {
        html! {
            @if dataset.manifest_version > 0 { a href={ "/datasets/" (dataset.name) "/urls?outcome=" (name) } { (name) } } @else { (name) }
        }
    };
    html! {
        section #outcomes {
            h2 { "What became of the URLs" }
            div .scroll { table {
                thead { tr { th { "outcome" } th .n { "URLs" } th .n { "share" } th { "a later round" } } }
                tbody {
                    @for (name, &urls) in outcomes {
                        tr {
                            td { (link(name)) }
                            td .n { (number(urls)) }
                            td .n { (percent(urls, dataset.urls)) }
                            td { @if name == KEPT {} @else if comes_back(name) { "asks again" } @else if name == Rejection::HttpStatus.name() { "asks those again that were the server's fault" } @else { "does not ask" } }
                        }
                    }
                }
            } }
            @if dataset.skipped.values().any(|&images| images > 0) {
                h3 { "Kept, but not counted" }
                div .scroll { table {
                    thead { tr { th { "reason" } th .n { "pictures" } } }
                    tbody { @for reason in Skip::ALL { @if let Some(&images) = dataset.skipped.get(reason.name()).filter(|images| **images > 0) {
                        tr { td { (link(reason.name())) } td .n { (number(images)) } }
                    } } }
                } }
            }
            @if dataset.manifest_version > 0 {
                form action={ "/datasets/" (dataset.name) "/urls" } {
                    label { "What became of a URL? " input name="url" type="search" placeholder="a part of it"; }
                    button { "Search" }
                }
                p { a href={ "/datasets/" (dataset.name) "/urls" } { "All URLs" } ": when they were asked, by host, by size and by time." }
            }
        }
    }
}

/// Sites that have so many URLs that the cluster has to pace itself.
fn sites_section(dataset: &Dataset) -> Markup {
    html! {
        @if !dataset.large_sites.is_empty() { section #sites {
            h2 { "Large sites that are not done" }
            div .scroll { table {
                thead { tr { th { "site" } th .n { "URLs" } th .n { "waiting" } th .n { "kept" } th .n { "a second" } th .n { "at once" } } }
                tbody { @for site in &dataset.large_sites { tr {
                    td { (site.site) }
                    td .n { (number(site.urls)) } td .n { (number(site.left)) } td .n { (site_yield(site)) }
                    td .n { @if site.requests_per_second > 0.0 { (format!("{:.1}", site.requests_per_second)) } @else { "no limit" } @if site.known { small { " it bears no more" } } }
                    td .n { (site.slots_lent) " of " (site.slots) }
                } } }
            } }
        } }
    }
}

/// The ways to what changed from one version to the next, the newest first.
fn versions_section(dataset: &Dataset) -> Markup {
    const MOST: u32 = 20;
    let newest = dataset.manifest_version;
    html! {
        @if newest > 1 { section #versions {
            h2 { "Versions" }
            ul { @for version in (2..=newest).rev().take(MOST as usize) {
                li { a href={ "/datasets/" (dataset.name) "/changes/" (version - 1) "/" (version) } { "From version " (version - 1) " to " (version) } }
            } }
        } }
    }
}

fn classes_section(dataset: &Dataset) -> Markup {
    if dataset.classes.is_empty() {
        return html! {};
    }
    let mut classes: Vec<_> = dataset.classes.iter().collect();
    classes.sort_by_key(|class| (std::cmp::Reverse(class.short), class.train + class.validation + class.test));
    let most = classes.iter().map(|class| class.train + class.validation + class.test).max().unwrap_or(1);
    let short = classes.iter().any(|class| class.short > 0);
    html! {
        section #classes {
            h2 { "Classes, the poorest first" }
            div .scroll { table {
                thead { tr { th { "class" } th { "samples" } th .n { "train" } th .n { "validation" } th .n { "test" } th .n { "URLs" } @if short { th .n { "short" } } } }
                tbody {
                    @for class in classes.iter().take(1000) {
                        @let total = class.train + class.validation + class.test;
                        tr {
                            td { a href={ "?class=" (class.synset) "#pictures" } { (if class.name.is_empty() { &class.synset } else { &class.name }) } }
                            td { (bar(&format!("{total} samples"), &[("kept", total as f64), ("none", (most - total) as f64)])) }
                            td .n { (number(class.train)) } td .n { (number(class.validation)) } td .n { (number(class.test)) }
                            td .n { (number(class.urls)) }
                            @if short { td .n { (number(class.short)) } }
                        }
                    }
                }
            } }
            @if classes.len() > 1000 { p { "and " (number(classes.len() as u64 - 1000)) " more" } }
        }
    }
}

async fn sheet_section(
    source: &Source,
    dataset: &Dataset,
    version: u32,
    query: &BTreeMap<String, String>,
) -> Result<Markup, Failure> {
    let manifest = source.manifest(dataset, version).await?;
    let chosen = query.get("class").and_then(|class| manifest.classes.iter().position(|of| of.synset == *class));
    let page: usize = query.get("page").and_then(|page| page.parse().ok()).unwrap_or(0).min(100_000);
    let spec = DatasetSpec::from_json(&dataset.spec_json)?;
    let found = sheet(source, &dataset.name, &manifest, chosen, (SHEET, page)).await?;
    let name = |label: usize| {
        manifest.classes.get(label).map_or("?", |class| if class.name.is_empty() { &class.synset } else { &class.name })
    };
    let class = chosen.map(|class| manifest.classes[class].synset.as_str());
    Ok(html! {
        section #pictures {
            h2 { "Pictures" @if let Some(class) = chosen { " of " (name(class)) } }
            p {
                @if chosen.is_some() { a href={ "/datasets/" (dataset.name) "#pictures" } { "all classes" } " · " }
                a href={ "?" @if let Some(class) = class { "class=" (class) "&" } "page=" (page + 1) "#pictures" } { "others" }
                @if found.is_empty() { " None were found in the parts of the dataset that were looked into." }
            }
            ul .sheet {
                @for picture in &found {
                    li { figure {
                        img src=(picture.address) loading="lazy" alt={ (name(picture.label)) ", sample " (picture.key) } width="128" height="128";
                        figcaption { (name(picture.label)) @if picture.split != Split::Train { small { " " (picture.split.name()) } } }
                    } }
                }
            }
            p { small { "The shorter side has " (spec.resize.size) " pixels. Means of red, green, blue: " (numbers(&dataset.mean)) "; deviations " (numbers(&dataset.std)) "." } }
        }
    })
}

fn numbers(values: &[f64]) -> String {
    values.iter().map(|value| format!("{value:.3}")).collect::<Vec<_>>().join(" ")
}
