//! The cluster's page: is all well, what is going on, what needs somebody.

use axum::extract::State;
use maud::{Markup, html};
use proto::pb::{Dataset, DatasetState, GetStatusRequest, ListDatasetsRequest, ListRunsRequest, Run, RunState, Status};
use proto::rejection::KEPT;

use super::chart::bar;
use super::page::{Failure, Page, number, troubles};
use super::progress::{YIELD, progress, shares};
use super::source::Source;
use crate::client::answer;
use crate::output::state_name;
use crate::run::view;
use crate::time::span;

/// The newest runs are shown, so many.
const RUNS: u32 = 50;

pub(super) async fn page(State(source): State<Source>) -> Result<Page<'static>, Failure> {
    let (mut runs, mut datasets) = (source.cluster.runs.clone(), source.cluster.datasets.clone());
    let status = answer(runs.get_status(GetStatusRequest {})).await?;
    let runs = answer(runs.list_runs(ListRunsRequest { limit: RUNS })).await?.runs;
    let mut datasets = answer(datasets.list_datasets(ListDatasetsRequest {})).await?.datasets;
    datasets.sort_by_key(|dataset| (!is_active(dataset), dataset.name.clone()));
    let sections = html! {
        section #verdict { h1 { "The cluster" } p .verdict { (verdict(&source, &status, &datasets, &runs)) } (troubles(&status.troubles)) }
        @if datasets.is_empty() && runs.is_empty() { (first_steps()) }
        @if !datasets.is_empty() { (datasets_section(&source, &datasets)) }
        @if !runs.is_empty() { (runs_section(&runs)) }
        (machines(&status))
    };
    Ok(Page { title: "Cluster", live: true, command: "gleaner status", sections })
}

fn is_active(dataset: &Dataset) -> bool {
    matches!(dataset.state(), DatasetState::Fetching | DatasetState::Sealing)
}

/// One sentence for each thing that goes on.
fn verdict(source: &Source, status: &Status, datasets: &[Dataset], runs: &[Run]) -> Markup {
    let active: Vec<&Dataset> = datasets.iter().filter(|dataset| is_active(dataset)).collect();
    let running = |run: &&Run| matches!(run.state(), RunState::Running | RunState::Waiting | RunState::Cancelling);
    let running: Vec<&Run> = runs.iter().filter(running).collect();
    html! {
        @match status.troubles.len() {
            0 => {}
            1 => { "Something is wrong. " }
            n => { (n) " things are wrong. " }
        }
        @if active.is_empty() && running.is_empty() && status.troubles.is_empty() { "All is quiet. " }
        @for dataset in active {
            (dataset.name) ": " (progress(source, dataset)) ". "
        }
        @for run in running {
            (run.run) ": "
            @match run.state() {
                RunState::Waiting => { "waits: " (run.reason) }
                _ => {
                    "epoch " (view::epoch(run)) " of " (run.epochs)
                    @if let Some(top1) = best(run) { ", validation top-1 " (format!("{:.1} %", 100.0 * top1)) }
                }
            }
            ". "
        }
    }
}

/// The best validation so far, as the page knows it.
fn best(run: &Run) -> Option<f64> {
    run.last_validation.as_ref().map(|point| point.top1)
}

fn first_steps() -> Markup {
    html! {
        section #first {
            h2 { "Nothing here yet" }
            p { "A dataset begins with a list of URLs, a run with a dataset:" }
            pre tabindex="0" { "gleaner dataset create birds --urls birds.txt --wait\ngleaner run submit --dataset birds --name birds-1 --follow" }
        }
    }
}

fn datasets_section(source: &Source, datasets: &[Dataset]) -> Markup {
    html! {
        section #datasets {
            h2 { "Datasets" }
            div .scroll { table {
                thead { tr { th { "name" } th { "state" } th { "yield" } th .n { "kept" } th .n { "URLs" } th { "shards" } } }
                tbody {
                    @for dataset in datasets {
                        tr {
                            td { a href={ "/datasets/" (dataset.name) } { (dataset.name) } }
                            td { (state_name(dataset.state().as_str_name(), "DATASET_STATE_")) @if is_active(dataset) { small { " " (progress(source, dataset)) } } }
                            td { (bar("kept, may come back, gone", &YIELD.into_iter().zip(shares(dataset)).collect::<Vec<_>>())) }
                            td .n { (number(dataset.outcomes.get(KEPT).copied().unwrap_or(0))) }
                            td .n { (number(dataset.urls)) }
                            td { (dataset.shards_committed) "/" (dataset.shards) }
                        }
                    }
                }
            } }
        }
    }
}

fn runs_section(runs: &[Run]) -> Markup {
    html! {
        section #runs {
            h2 { "Runs" }
            div .scroll { table {
                thead { tr { th { "name" } th { "state" } th { "epoch" } th .n { "loss" } th .n { "top-1" } th .n { "test top-1" } th .n { "ranks" } th { "dataset" } } }
                tbody {
                    @for run in runs {
                        @let point = run.last_step.as_ref();
                        tr {
                            td { a href={ "/runs/" (run.run) } { (run.run) } }
                            td { (state_name(run.state().as_str_name(), "RUN_STATE_")) }
                            td { (view::epoch(run)) "/" (run.epochs) (bar("done", &[("kept", run.step as f64), ("wait", (run.epochs * run.steps_per_epoch).saturating_sub(run.step) as f64)])) }
                            td .n { @if let Some(point) = point { (format!("{:.3}", point.loss)) } }
                            td .n { @if let Some(top1) = best(run) { (format!("{top1:.3}")) } }
                            td .n { @if let Some(test) = &run.test { (format!("{:.3}", test.top1)) } }
                            td .n { (run.world_size) }
                            td { (run.dataset) }
                        }
                    }
                }
            } }
            @if let [one, other, ..] = runs { p { a href={ "/compare?a=" (one.run) "&b=" (other.run) } { "Compare the newest two" } } }
        }
    }
}

fn machines(status: &Status) -> Markup {
    html! {
        section #machines {
            h2 { "Workers and devices" }
            p {
                (status.workers.len()) (if status.workers.len() == 1 { " worker, " } else { " workers, " }) (status.shards_leased) " shards being fetched, " (status.shards_waiting) " waiting. Term " (status.term)
                ", version " (status.version) ", store " (status.store) "."
            }
            ul .squares {
                @for worker in &status.workers {
                    li class=(if worker.leases > 0 { "busy" } else { "idle" }) title={ (worker.worker) ", seen " (span(worker.seen_millis_ago)) " ago" } { (worker.leases) }
                }
            }
            @if !status.agents.is_empty() { div .scroll { table {
                thead { tr { th { "agent" } th { "device" } th { "rank" } } }
                tbody {
                    @for agent in &status.agents { @for device in &agent.devices {
                        tr { td { (agent.agent) } td { (device.device) } td { @if device.occupant.is_empty() { "free" } @else { (device.occupant) } } }
                    } }
                }
            } } }
        }
    }
}
