//! What a run's network gets wrong: it looks at pictures that it has never seen, here, the first time that somebody
//! asks.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use axum::Extension;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use maud::{Markup, html};
use proto::manifest::ManifestClass;
use proto::pb::{Run, RunState};
use proto::shard::RawSample;
use proto::{Class, Split};
use tokio::sync::Semaphore;
use worker::Preparer;

use super::page::{Failure, Page, missing, number, query};
use super::pictures::{Found, places, read};
use super::source::Source;
use crate::output::percent;
use crate::run::evaluate::Evaluation;
use crate::run::model_files;
use crate::run::network::{Network, softmax};

/// Pictures that are looked at, from all over the split.
const MOST: u64 = 2000;
/// Mistakes that are remembered, those of which the network is surest; and shown.
const REMEMBERED: usize = 2000;
const SHOWN: usize = 48;
/// A matrix of more classes can be read by nobody.
const MATRIX: usize = 50;
/// Runs that are remembered.
const RUNS: usize = 8;

/// A run's name and end.
type RunKey = (String, u64);
type Shared = Arc<Mutex<Look>>;

/// What was seen of each run.
#[derive(Clone)]
pub(super) struct Looks {
    of: Arc<Mutex<HashMap<RunKey, Shared>>>,
    /// A network takes what the processor has: one at a time.
    turn: Arc<Semaphore>,
}

impl Default for Looks {
    fn default() -> Self {
        Self { of: Arc::default(), turn: Arc::new(Semaphore::new(1)) }
    }
}

/// How far a run's network has come.
#[derive(Default)]
struct Look {
    evaluation: Evaluation,
    wrong: Vec<Wrong>,
    split: Option<Split>,
    total: u64,
    ended: bool,
    error: Option<String>,
}

/// A picture of the class `is` that the network takes for another.
#[derive(Clone)]
struct Wrong {
    found: Found,
    is: usize,
    taken_for: usize,
    sure: f32,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Looks {
    /// What is known of a run's network; asks it if nobody has.
    fn of(&self, source: &Source, run: &Run) -> Shared {
        let key = (run.run.clone(), run.ended_millis);
        let mut known = lock(&self.of);
        if let Some(look) = known.get(&key) {
            return Arc::clone(look);
        }
        if known.len() >= RUNS {
            known.retain(|_, look| !lock(look).ended);
        }
        let look = Arc::new(Mutex::new(Look::default()));
        known.insert(key, Arc::clone(&look));
        let (source, run, seen, turn) = (source.clone(), run.clone(), Arc::clone(&look), Arc::clone(&self.turn));
        tokio::spawn(async move {
            let _turn = turn.acquire().await;
            let error = run_over(&source, &run, &seen).await.err().map(|error| format!("{error:#}"));
            let mut seen = lock(&seen);
            (seen.error, seen.ended) = (error, true);
        });
        look
    }
}

/// Looks at pictures of the run's test split, or of its validation split if it has no other.
async fn run_over(source: &Source, run: &Run, seen: &Mutex<Look>) -> Result<()> {
    let network = Arc::new(Network::new(model_files::fetch(&source.cluster, &run.run, "model.onnx").await?)?);
    let dataset = source.dataset(&run.dataset).await.with_context(|| format!("dataset {}", run.dataset))?;
    let manifest = source.manifest(&dataset, run.manifest_version).await?;
    let split = if manifest.samples(Split::Test) > 0 { Split::Test } else { Split::Validation };
    let pictures = manifest.samples(split);
    {
        let mut seen = lock(seen);
        seen.evaluation = Evaluation::new(network.classes.clone());
        (seen.split, seen.total) = (Some(split), pictures.min(MOST));
    }
    // By the model's classes: a dataset of that name may have been made anew since.
    let place_of = |class: &ManifestClass| network.classes.iter().position(|known| known.synset == class.synset);
    let labels: Vec<Option<usize>> = manifest.classes.iter().map(place_of).collect();
    let places: Vec<_> = places(&manifest).into_iter().filter(|place| place.split == split).collect();
    for place in places.iter().step_by(usize::try_from(pictures.div_ceil(MOST).max(1))?) {
        let of_known = |(found, sample): (Found, RawSample)| Some((*labels.get(found.label)?.as_ref()?, found, sample));
        let samples = read(source, &run.dataset, &manifest, place).await?.into_iter().filter_map(of_known).collect();
        let network = Arc::clone(&network);
        let guesses = tokio::task::spawn_blocking(move || guesses(&network, samples)).await??;
        let mut seen = lock(seen);
        for (is, found, logits) in guesses {
            let taken_for = best(&logits);
            let sure = softmax(&logits)[taken_for];
            seen.evaluation.count(is, &logits);
            if taken_for != is {
                seen.wrong.push(Wrong { found, is, taken_for, sure });
            }
        }
        seen.wrong.sort_by(|a, b| b.sure.total_cmp(&a.sure));
        seen.wrong.truncate(REMEMBERED);
    }
    Ok(())
}

fn guesses(network: &Network, samples: Vec<(usize, Found, RawSample)>) -> Result<Vec<(usize, Found, Vec<f32>)>> {
    let mut preparer = Preparer::new(network.resize)?;
    let look = |(is, found, sample): (usize, Found, RawSample)| {
        let pixels = preparer.prepare(&sample.image);
        let pixels = pixels.map_err(|rejection| anyhow::anyhow!("picture {}: {rejection}", found.key))?;
        Ok((is, found, network.look(&pixels)?))
    };
    samples.into_iter().map(look).collect()
}

fn best(logits: &[f32]) -> usize {
    (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0)
}

pub(super) async fn page(
    State(source): State<Source>,
    Extension(looks): Extension<Looks>,
    Path(name): Path<String>,
    RawQuery(raw): RawQuery,
) -> Result<Response, Failure> {
    let run = super::run::get(&source, &name).await?;
    if run.state() != RunState::Done {
        return Ok(missing(&format!("run {name} is not done: a model is written at its end")));
    }
    let look = looks.of(&source, &run);
    let look = lock(&look);
    let query = query(raw);
    let class = |key: &str| query.get(key).and_then(|class| class.parse::<usize>().ok());
    let sections = html! {
        section #verdict {
            h1 { "What " a href={ "/runs/" (run.run) } { (run.run) } " gets wrong" }
            p .verdict { (verdict(&look)) }
            @if let Some(error) = &look.error { div .card .trouble { strong { "⚠ " } (error) } }
        }
        @if look.evaluation.pictures > 0 {
            (matrix(&look))
            (pictures(&look, class("is"), class("taken")))
            (classes(&look))
        }
    };
    let command = format!("gleaner run evaluate {name}");
    Ok(Page { title: &format!("{name}: mistakes"), live: !look.ended, command: &command, sections }.into_response())
}

fn verdict(look: &Look) -> Markup {
    let Evaluation { pictures, top1, .. } = look.evaluation;
    html! {
        @match (look.split, pictures) {
            (None, _) => { "The model is loaded." }
            (Some(split), 0) if look.ended => { "There is no picture in the " (split.name()) " split." }
            (Some(split), _) => {
                "Right at once in " (number(top1)) " of " (number(pictures)) " pictures of the " (split.name()) " split (" (percent(top1, pictures)) ")."
                @if !look.ended { " Looking at " (number(look.total)) " in all." }
            }
        }
    }
}

fn name(class: &Class) -> &str {
    if class.name.is_empty() { &class.synset } else { &class.name }
}

fn matrix(look: &Look) -> Markup {
    let Evaluation { classes, taken_for, .. } = &look.evaluation;
    // How dark a cell is: none, up to 5 %, 20 %, 50 %, more of its row.
    let shade = |n: u64, all: u64| match 100 * n / all.max(1) {
        _ if n == 0 => "h0",
        0..5 => "h1",
        5..20 => "h2",
        20..50 => "h3",
        _ => "h4",
    };
    html! {
        @if classes.len() <= MATRIX { section #matrix {
            h2 { "What was taken for what" }
            p { "A row for what it is, a column for what it was taken for; a number leads to the pictures." }
            div .scroll { table .matrix {
                thead { tr { th { "is" } @for n in 1..=classes.len() { th .n { (n) } } } }
                tbody { @for (is, row) in taken_for.iter().enumerate() {
                    @let all: u64 = row.iter().sum();
                    tr {
                        th scope="row" { (is + 1) " " (name(&classes[is])) }
                        @for (taken, &n) in row.iter().enumerate() {
                            td class={ "n " (shade(n, all)) @if is == taken { " right" } } title={ (name(&classes[is])) ", taken for " (name(&classes[taken])) } {
                                @if n > 0 && is != taken { a href={ "?is=" (is) "&taken=" (taken) "#pictures" } { (n) } } @else if n > 0 { (n) }
                            }
                        }
                    }
                } }
            } }
        } }
    }
}

fn pictures(look: &Look, is: Option<usize>, taken: Option<usize>) -> Markup {
    let classes = &look.evaluation.classes;
    let wanted =
        |wrong: &&Wrong| is.is_none_or(|is| is == wrong.is) && taken.is_none_or(|taken| taken == wrong.taken_for);
    let found: Vec<&Wrong> = look.wrong.iter().filter(wanted).take(SHOWN).collect();
    let of = |class: Option<usize>| class.and_then(|class| classes.get(class)).map(name);
    html! {
        section #pictures {
            h2 { "The mistakes of which it is surest" @if let Some(is) = of(is) { ": " (is) } @if let Some(taken) = of(taken) { ", taken for " (taken) } }
            @if is.is_some() || taken.is_some() { p { a href="?#pictures" { "all classes" } } }
            @if found.is_empty() { p { "None." } }
            ul .sheet .told {
                @for Wrong { found, is, taken_for, sure } in found {
                    li { figure {
                        img src=(found.address) loading="lazy" alt={ (name(&classes[*is])) ", sample " (found.key) } width="128" height="128";
                        figcaption { (name(&classes[*is])) br; small { "taken for " (name(&classes[*taken_for])) ", " (format!("{:.0} %", 100.0 * sure)) } }
                    } }
                }
            }
        }
    }
}

fn classes(look: &Look) -> Markup {
    let evaluation = &look.evaluation;
    let counted: BTreeMap<usize, _> = (0..evaluation.classes.len())
        .map(|class| (class, evaluation.of(class)))
        .filter(|(_, (all, ..))| *all > 0)
        .collect();
    let mut order: Vec<usize> = counted.keys().copied().collect();
    order.sort_by(|a, b| {
        let share = |class: &usize| counted[class].1 as f64 / counted[class].0 as f64;
        share(a).total_cmp(&share(b))
    });
    html! {
        section #classes {
            h2 { "Classes, the worst known first" }
            div .scroll { table {
                thead { tr { th { "class" } th .n { "pictures" } th .n { "right" } th { "most often taken for" } } }
                tbody { @for class in order.into_iter().take(1000) {
                    @let (all, right, taken) = counted[&class];
                    tr {
                        td { a href={ "?is=" (class) "#pictures" } { (name(&evaluation.classes[class])) } }
                        td .n { (number(all)) } td .n { (percent(right, all)) }
                        td { @if let Some((other, n)) = taken { (name(&evaluation.classes[other])) " (" (n) ")" } }
                    }
                } }
            } }
        }
    }
}
