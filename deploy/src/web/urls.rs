//! A dataset's URLs, those with one outcome or with a text in them: what the pictures look like, when they were asked,
//! from where, how large they are, how long it took.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use axum::extract::{Path, RawQuery, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use maud::{Markup, html};
use proto::manifest::ManifestShard;
use proto::pb::Dataset;
use proto::rejection::KEPT;
use proto::{Manifest, Rejection};

use super::chart::{Line, bar, lines};
use super::page::{Failure, Page, missing, number, query};
use super::source::Source;
use crate::dataset::reader::{Found, Reader};
use crate::output::percent;
use crate::time::{moment, span};

/// URLs that are listed.
const LISTED: usize = 200;
/// Pictures that are shown.
const SHOWN: usize = 48;
/// Hosts that are listed.
const HOSTS: usize = 25;
/// Outcomes that have a line of their own.
const LINES: usize = 6;
/// A search may take so long; then it says how far it came.
const SEARCH: Duration = Duration::from_secs(8);
/// What was asked within so many milliseconds is one point of a line.
const MOMENT: i64 = 5_000;

/// URLs with one outcome, or with a text in them, or all.
pub(super) async fn page(
    State(source): State<Source>,
    Path(name): Path<String>,
    RawQuery(raw): RawQuery,
) -> Result<Response, Failure> {
    let query = query(raw);
    let (outcome, text) = (query.get("outcome").cloned(), query.get("url").cloned());
    let dataset = source.dataset(&name).await?;
    if dataset.manifest_version == 0 {
        return Ok(missing(&format!(
            "dataset {name} has no version yet: its URLs are listed once the first one is made"
        )));
    }
    let manifest = source.manifest(&dataset, dataset.manifest_version).await?;
    // The reader's futures stay on one thread.
    let (reader, runtime) = (source.reader(&name), tokio::runtime::Handle::current());
    let (wanted, of) = ((outcome.clone(), text.clone()), manifest.clone());
    let search = tokio::task::spawn_blocking(move || runtime.block_on(search(&reader, &of, wanted)));
    let search = search.await??;
    let what = match (&outcome, &text) {
        (Some(outcome), _) => format!("with outcome {outcome}"),
        (None, Some(text)) => format!("with {text:?} in them"),
        (None, None) => "of the dataset".to_owned(),
    };
    let sections = html! {
        section #verdict {
            h1 { a href={ "/datasets/" (name) } { (name) } ": URLs " (what) }
            p .verdict { (verdict(&search, &dataset)) }
        }
        (pictures(&search, &name, &manifest))
        (over_time(&search))
        (hosts(&search))
        (histogram("sizes", "Bytes of what was sent", &search.sizes, &bytes))
        (histogram("times", "From the first request to the outcome", &search.times, &|least| format!("{} ms", least)))
        section #urls {
            h2 { "URLs" }
            div .scroll { table {
                thead { tr { th .n { "key" } th { "class" } th { "outcome" } th { "URL" } th { "size" } th .n { "ms" } } }
                tbody { @for found in &search.found { (url_row(found)) } }
            } }
        }
    };
    let flag = outcome.map(|outcome| format!(" --outcome {outcome}")).unwrap_or_default();
    let command = format!("gleaner dataset outcomes {name}{flag}");
    Ok(Page { title: &name, live: false, command: &command, sections }.into_response())
}

/// What a search has come to.
#[derive(Default)]
struct Search {
    looked: u64,
    matching: u64,
    /// The first ones.
    found: Vec<Found>,
    /// The first ones of which there is a picture, and those that they look like.
    seen: Vec<Found>,
    like: HashMap<i64, Found>,
    hosts: BTreeMap<String, Host>,
    /// By the power of two that the value reaches.
    sizes: BTreeMap<u32, u64>,
    times: BTreeMap<u32, u64>,
    /// By moment and outcome.
    ended: BTreeMap<i64, BTreeMap<String, u64>>,
}

#[derive(Default)]
struct Host {
    urls: u64,
    kept: u64,
    /// Answers by which it asked for less.
    too_many: u64,
    millis: u64,
}

/// Looks through a dataset's URLs for those with an outcome and with a text in them, for a moment.
async fn search(
    reader: &Reader,
    manifest: &Manifest,
    (outcome, text): (Option<String>, Option<String>),
) -> anyhow::Result<Search> {
    let (begun, mut search) = (Instant::now(), Search::default());
    let go_on = || if begun.elapsed() > SEARCH { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let each = async |found: Found| {
        search.looked += 1;
        let is = |outcome: &String| found.row.outcome == *outcome || found.skipped() == Some(outcome);
        if outcome.as_ref().is_none_or(is) && text.as_ref().is_none_or(|text| found.row.url.contains(text.as_str())) {
            search.count(found);
        }
        Ok(go_on())
    };
    reader.each_url(manifest, each).await?;
    // Where the pictures are that they look like was not known before.
    let mut wanted: Vec<i64> = search.seen.iter().filter_map(Found::like).collect();
    if !wanted.is_empty() {
        let each = async |found: Found| {
            if let Some(place) = wanted.iter().position(|&key| key == found.row.key) {
                let key = wanted.swap_remove(place);
                wanted.retain(|&other| other != key);
                search.like.insert(key, found);
            }
            Ok(if wanted.is_empty() { ControlFlow::Break(()) } else { go_on() })
        };
        reader.each_url(manifest, each).await?;
    }
    Ok(search)
}

impl Search {
    fn count(&mut self, found: Found) {
        let row = &found.row;
        self.matching += 1;
        if let Some(name) = url::Url::parse(&row.url).ok().and_then(|url| url.host_str().map(str::to_owned)) {
            let host = self.hosts.entry(name).or_default();
            host.urls += 1;
            host.kept += u64::from(row.outcome == KEPT);
            host.too_many += u64::from(matches!(row.http_status, Some(429 | 503)));
            host.millis += row.millis.max(0) as u64;
        }
        if let Some(bytes) = row.bytes {
            *self.sizes.entry((bytes.max(1) as u64).ilog2()).or_default() += 1;
        }
        if row.millis > 0 {
            *self.times.entry((row.millis as u64).ilog2()).or_default() += 1;
        }
        if row.fetched_at > 0 {
            let at = self.ended.entry(row.fetched_at / MOMENT).or_default();
            *at.entry(row.outcome.clone()).or_default() += 1;
        }
        if self.seen.len() < SHOWN && (row.thumbnail.is_some() || row.split.is_some()) {
            self.seen.push(found.clone());
        }
        if self.found.len() < LISTED {
            self.found.push(found);
        }
    }
}

fn verdict(search: &Search, dataset: &Dataset) -> Markup {
    html! {
        (number(search.matching)) " of " (number(search.looked)) " URLs"
        @if search.looked < dataset.urls { " (looked at in " (SEARCH.as_secs()) " s, of " (number(dataset.urls)) ")" }
        @if search.matching as usize > search.found.len() { "; the first " (search.found.len()) " are listed" }
        "."
    }
}

/// Where the picture of a URL is served: the stored one, or a thumbnail of one that was rejected.
fn address(name: &str, manifest: &Manifest, found: &Found) -> Option<String> {
    let (version, shard, key) = (manifest.version, found.shard, found.row.key);
    let Some(split) = found.row.split() else {
        return found.row.thumbnail.as_ref().map(|_| format!("/datasets/{name}/rejected/{version}/{shard}/{key}.jpg"));
    };
    let offset = u64::try_from(found.row.offset?).ok()?;
    let tar = manifest.shards.iter().find(|of| of.shard == shard)?.tars.get(&split)?;
    let block = tar.blocks.iter().position(|block| (block.offset..block.offset + block.length).contains(&offset))?;
    Some(format!("/datasets/{name}/pictures/{version}/{shard}/{}/{block}/k{key}.jpg", split.name()))
}

fn pictures(search: &Search, name: &str, manifest: &Manifest) -> Markup {
    let picture = |found: &Found| {
        let (row, address) = (&found.row, address(name, manifest, found));
        html! {
            @if let Some(address) = address {
                img src=(address) loading="lazy" alt={ (row.outcome) ", URL " (row.key) } width="128" height="128";
            }
        }
    };
    html! {
        @if !search.seen.is_empty() { section #pictures {
            h2 { "Some of the pictures" }
            ul .sheet .told { @for found in &search.seen {
                @let like = found.like().and_then(|key| search.like.get(&key));
                li .pair[like.is_some()] { figure {
                    div { (picture(found)) @if let Some(like) = like { (picture(like)) } }
                    figcaption {
                        (found.row.key) br;
                        small {
                            (found.skipped().map_or(found.row.outcome.as_str(), String::as_str))
                            @if let Some(like) = found.like() { ", like " (like) }
                        }
                    }
                } }
            } }
        } }
    }
}

/// How many had which outcome at which moment.
fn over_time(search: &Search) -> Markup {
    let mut totals = BTreeMap::<&str, u64>::new();
    for (outcome, urls) in search.ended.values().flatten() {
        *totals.entry(outcome).or_default() += urls;
    }
    let mut outcomes: Vec<(&str, u64)> = totals.into_iter().collect();
    outcomes.sort_by_key(|(name, urls)| (*name != KEPT, std::cmp::Reverse(*urls)));
    let (Some(first), Some(last)) = (search.ended.keys().next(), search.ended.keys().last()) else { return html! {} };
    let of = |(look, (outcome, _)): (usize, &(&str, u64))| {
        let mut sum = 0;
        let points = search.ended.iter().map(|(at, urls)| {
            sum += urls.get(*outcome).copied().unwrap_or(0);
            (((at - first) * MOMENT) as f64 / 60_000.0, sum as f64)
        });
        Line { name: (*outcome).to_owned(), look, points: points.collect() }
    };
    let drawn: Vec<Line> = outcomes.iter().take(LINES).enumerate().map(of).collect();
    html! {
        section #ended {
            h2 { "When it was known" }
            p { "From " (moment((first * MOMENT) as u64)) ", for " (span(((last - first + 1) * MOMENT) as u64)) ". Each line counts the URLs so far." }
            @if first < last { (lines("URLs", "minute", &drawn, &[])) }
        }
    }
}

fn hosts(search: &Search) -> Markup {
    let mut hosts: Vec<(&String, &Host)> = search.hosts.iter().collect();
    hosts.sort_by_key(|(name, host)| (std::cmp::Reverse(host.urls), *name));
    html! {
        @if hosts.len() > 1 { section #hosts {
            h2 { "Hosts" }
            div .scroll { table {
                thead { tr { th { "host" } th .n { "URLs" } th .n { "kept" } th .n { "429 or 503" } th .n { "ms, mean" } } }
                tbody { @for (name, host) in hosts.iter().take(HOSTS) { tr {
                    td .url { (name) } td .n { (number(host.urls)) } td .n { (percent(host.kept, host.urls)) }
                    td .n { (number(host.too_many)) } td .n { (number(host.millis / host.urls)) }
                } } }
            } }
            @if hosts.len() > HOSTS { p { "and " (number((hosts.len() - HOSTS) as u64)) " more" } }
        } }
    }
}

/// How many values there are from each power of two to the next.
fn histogram(id: &str, title: &str, counts: &BTreeMap<u32, u64>, name: &dyn Fn(u64) -> String) -> Markup {
    let most = counts.values().copied().max().unwrap_or(1) as f64;
    html! {
        @if let (Some((&first, _)), Some((&last, _))) = (counts.first_key_value(), counts.last_key_value()) { section id=(id) {
            h2 { (title) }
            div .scroll { table {
                thead { tr { th .n { "from" } th { "" } th .n { "URLs" } } }
                tbody { @for power in first..=last {
                    @let urls = counts.get(&power).copied().unwrap_or(0);
                    tr {
                        td .n { (name(1 << power.min(62))) }
                        td { (bar(&format!("{urls} URLs"), &[("kept", urls as f64), ("none", most - urls as f64)])) }
                        td .n { (number(urls)) }
                    }
                } }
            } }
        } }
    }
}

fn bytes(least: u64) -> String {
    bytesize::ByteSize(least).display().iec().to_string()
}

fn url_row(found: &Found) -> Markup {
    let row = &found.row;
    html! {
        tr {
            td .n { (row.key) }
            td { (row.synset) }
            td {
                (row.outcome)
                @if let Some(status) = row.http_status.filter(|_| row.outcome == Rejection::HttpStatus.name()) { " " (status) }
                @if let Some(detail) = &row.detail { " " (detail) }
                @if let Some(skipped) = found.skipped() { ", " (skipped) }
            }
            // No link: these pages send nobody to the pages of strangers.
            td .url { (row.url) @if let Some(to) = row.final_url.as_ref().filter(|to| **to != row.url) { br; small { "→ " (to) } } }
            td { @if let (Some(width), Some(height)) = (row.width, row.height) { (width) "×" (height) } }
            td .n { (row.millis) }
        }
    }
}

/// A small picture of what was rejected.
pub(super) async fn rejected(
    State(source): State<Source>,
    Path((name, version, shard, file)): Path<(String, u32, u32, String)>,
) -> Result<Response, Failure> {
    let dataset = source.dataset(&name).await?;
    let manifest = source.manifest(&dataset, version).await?;
    let outcomes = |of: &&ManifestShard| of.shard == shard && of.outcomes.is_some();
    let outcomes = manifest.shards.iter().find(outcomes).and_then(|shard| shard.outcomes.as_ref());
    let key = file.split_once('.').and_then(|(key, _)| key.parse::<i64>().ok());
    let (Some(outcomes), Some(key)) = (outcomes, key) else { return Ok(missing("there is no such picture")) };
    match source.thumbnails(&name, &outcomes.key).await?.get(&key) {
        Some(jpeg) => {
            let headers = [(CONTENT_TYPE, "image/jpeg"), (CACHE_CONTROL, "private, max-age=86400, immutable")];
            Ok((headers, jpeg.clone()).into_response())
        }
        None => Ok(missing("there is no such picture")),
    }
}
