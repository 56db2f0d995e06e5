//! A run's page: is it learning, what bounds it, what happened to it. And what its ranks wrote.

use std::collections::VecDeque;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use maud::{Markup, html};
use proto::pb::{GetLogsRequest, GetRunRequest, LogLine, Metric, Run, RunState};
use proto::run_event::{EventRecord, RunEvent};

use super::chart::{Line, Mark, bar, lines};
use super::page::{Failure, Page, number};
use super::source::Source;
use crate::client::answer;
use crate::output::state_name;
use crate::run::{explain, view};
use crate::time::{moment, now_millis, span};

/// The newest lines of the log, so many.
const LINES: usize = 500;
/// The log may take so long.
const READING: Duration = Duration::from_secs(15);
/// The newest events, so many.
const EVENTS: usize = 200;

pub(super) async fn page(State(source): State<Source>, Path(name): Path<String>) -> Result<Response, Failure> {
    let run = get(&source, &name).await?;
    let points = source.points(&run).await?;
    let events = events(&run)?;
    let ended = matches!(run.state(), RunState::Done | RunState::Failed | RunState::Cancelled);
    let sections = html! {
        (verdict(&run, &points))
        (curves(&[(&run.run, &points)], &marks(&events)))
        (time_section(&run, &points))
        (generations(&events))
        section #events {
            h2 { "What happened" }
            ol .events { @for record in events.iter().rev().take(EVENTS) {
                li { time { (moment(record.at_millis)) } " " (view::happened(&record.event)) }
            } }
        }
        section #more {
            h2 { "More" }
            @if run.state() == RunState::Done { p { a href={ "/runs/" (run.run) "/mistakes" } { "What it gets wrong" } " · " a href={ "/runs/" (run.run) "/try" } { "Try it on a picture" } } }
            p { a href={ "/runs/" (run.run) "/logs" } { "What its ranks wrote" } " · " a href={ "/datasets/" (run.dataset) } { "Its dataset, " (run.dataset) } " (version " (run.manifest_version) ")" }
            details #spec { summary { "Its spec" } pre tabindex="0" { (spec(&run)) } }
        }
    };
    let command = format!("gleaner run describe {name}; gleaner run explain {name}");
    Ok(Page { title: &run.run, live: !ended, command: &command, sections }.into_response())
}

/// A run by its name.
pub(super) async fn get(source: &Source, name: &str) -> Result<Run, tonic::Status> {
    answer(source.cluster.runs.clone().get_run(GetRunRequest { run: name.to_owned() })).await
}

fn events(run: &Run) -> Result<Vec<EventRecord>, serde_json::Error> {
    run.events.iter().map(|json| serde_json::from_str(json)).collect()
}

fn spec(run: &Run) -> String {
    let parsed = serde_json::from_str::<serde_json::Value>(&run.spec_json);
    parsed.and_then(|spec| serde_json::to_string_pretty(&spec)).unwrap_or_else(|_| run.spec_json.clone())
}

fn verdict(run: &Run, points: &[Metric]) -> Markup {
    let steps = run.epochs * run.steps_per_epoch;
    let best = points
        .iter()
        .filter(|point| point.kind == "validation")
        .map(|point| point.top1)
        .fold(None, |best, top1| Some(best.map_or(top1, |best: f64| best.max(top1))));
    let left = || {
        let last = run.last_step.as_ref().filter(|last| last.images_per_second > 0.0 && last.samples > 0)?;
        let step = last.samples as f64 / last.images_per_second;
        Some(span((steps.saturating_sub(run.step) as f64 * step * 1000.0) as u64))
    };
    html! {
        section #verdict {
            h1 { (run.run) }
            p .verdict {
                (state_name(run.state().as_str_name(), "RUN_STATE_"))
                @if !run.reason.is_empty() { ": " (run.reason) }
                ". Step " (number(run.step)) " of " (number(steps)) ", epoch " (view::epoch(run)) " of " (run.epochs)
                @if let Some(best) = best { "; best validation top-1 " (format!("{:.1} %", 100.0 * best)) }
                @if let Some(test) = &run.test { "; test top-1 " (format!("{:.1} %", 100.0 * test.top1)) ", top-5 " (format!("{:.1} %", 100.0 * test.top5)) }
                @if run.state() == RunState::Running { @if let Some(left) = left() { "; about " (left) " left" } }
                @if let Some(took) = view::duration(run, now_millis()).filter(|_| run.ended_millis > 0) { "; took " (span(took)) }
                "."
            }
            (bar("steps done", &[("kept", run.step as f64), ("wait", steps.saturating_sub(run.step) as f64)]))
        }
    }
}

/// What a chart marks: where a generation failed.
fn marks(events: &[EventRecord]) -> Vec<Mark> {
    let failure = |record: &EventRecord| match &record.event {
        RunEvent::Failure { step, .. } => Some(Mark { at: *step as f64, text: view::happened(&record.event) }),
        _ => None,
    };
    events.iter().filter_map(failure).collect()
}

/// The curves of one run or of several, laid over each other.
pub(super) fn curves(runs: &[(&str, &[Metric])], marks: &[Mark]) -> Markup {
    // A kind looks the same in all charts of one run, and a run in all charts of several.
    let kinds = ["step", "train", "validation", "test"];
    let line = |shown: &[usize], value: fn(&Metric) -> f64| -> Vec<Line> {
        let of = |(n, &(run, points)): (usize, &(&str, &[Metric])), kind: usize| Line {
            name: match (runs.len(), kinds[kind]) {
                (1, "step") => "train, step by step".to_owned(),
                (1, name) => name.to_owned(),
                (_, name) => format!("{run} {name}"),
            },
            look: if runs.len() == 1 { kind } else { 2 * n + kind % 2 },
            points: points
                .iter()
                .filter(|point| point.kind == kinds[kind])
                .map(|point| (point.step as f64, value(point)))
                .collect(),
        };
        runs.iter().enumerate().flat_map(|run| shown.iter().map(move |&kind| of(run, kind))).collect()
    };
    let loss: &[usize] = if runs.len() == 1 { &[0, 1, 2, 3] } else { &[1, 2] };
    html! {
        section #curves {
            h2 { "Curves" }
            @if runs.iter().all(|(_, points)| points.is_empty()) { p { "No step has been measured yet." } }
            div .charts {
            (lines("Loss", "step", &line(loss, |point| point.loss), marks))
            (lines("Top-1", "step", &line(&[1, 2, 3][..if runs.len() == 1 { 3 } else { 2 }], |point| point.top1), marks))
            (lines("Images a second", "step", &line(&[0], |point| point.images_per_second), marks))
            (lines("Learning rate", "step", &line(&[0], |point| point.learning_rate), &[]))
            }
        }
    }
}

fn time_section(run: &Run, points: &[Metric]) -> Markup {
    let steps: Vec<Metric> = points.iter().filter(|point| point.kind == "step").cloned().collect();
    let explanation = explain::measured(&run.run, &steps);
    let parts = explanation.parts();
    html! {
        section #time {
            h2 { "What bounds it" }
            p .verdict { (explain::words(run, &explanation).last().map_or("", String::as_str)) }
            @if explanation.steps > 0 {
                (bar("where the time of a step goes", &parts.iter().zip(["p0", "p1", "p2", "p3", "p4"]).map(|((_, seconds), class)| (class, *seconds)).collect::<Vec<_>>()))
                div .scroll { table {
                    thead { tr { th { "of a step" } th .n { "seconds" } th .n { "share" } } }
                    tbody { @for ((what, seconds), class) in parts.iter().zip(["p0", "p1", "p2", "p3", "p4"]) {
                        tr { td { span class={ "key " (class) } { "■" } " " (what) } td .n { (format!("{seconds:.4}")) } td .n { (format!("{:.0} %", 100.0 * seconds / explanation.step_seconds.max(1e-9))) } }
                    } }
                } }
            }
        }
    }
}

fn generations(events: &[EventRecord]) -> Markup {
    let mut rows: VecDeque<(u64, usize, String, Option<String>)> = VecDeque::new();
    for record in events {
        match &record.event {
            RunEvent::Generation { generation, members } => {
                rows.push_back((*generation, members.len(), moment(record.at_millis), None));
            }
            RunEvent::Failure { generation, .. } => {
                if let Some(row) = rows.iter_mut().rev().find(|row| row.0 == *generation) {
                    row.3 = Some(view::happened(&record.event));
                }
            }
            _ => {}
        }
    }
    let most = rows.iter().map(|row| row.1).max().unwrap_or(1);
    html! {
        @if rows.len() > 1 { section #generations {
            h2 { "Generations of ranks" }
            div .scroll { table {
                thead { tr { th .n { "generation" } th { "ranks" } th { "began" } th { "ended by" } } }
                tbody { @for (generation, ranks, began, failure) in rows.iter().rev().take(EVENTS) {
                    tr {
                        td .n { (generation) }
                        td { (ranks) " " (bar(&format!("{ranks} ranks"), &[("kept", *ranks as f64), ("none", (most - ranks) as f64)])) }
                        td { (began) }
                        td { @if let Some(failure) = failure { "✕ " (failure) } }
                    }
                } }
            } }
        } }
    }
}

/// What the run's ranks wrote, the newest lines.
pub(super) async fn logs(State(source): State<Source>, Path(name): Path<String>) -> Result<Response, Failure> {
    let run = get(&source, &name).await?;
    let request = GetLogsRequest { run: name.clone(), ..GetLogsRequest::default() };
    let mut stream = answer(source.cluster.runs.clone().get_logs(request)).await?;
    let mut newest: VecDeque<LogLine> = VecDeque::new();
    let read = async {
        while let Some(line) = stream.message().await? {
            if newest.len() == LINES {
                newest.pop_front();
            }
            newest.push_back(line);
        }
        Ok::<_, tonic::Status>(())
    };
    let whole = match tokio::time::timeout(READING, read).await {
        Ok(read) => read.map(|()| true)?,
        Err(_) => false,
    };
    let sections = html! {
        section #verdict {
            h1 { a href={ "/runs/" (name) } { (name) } ": what its ranks wrote" }
            p .verdict {
                "The newest " (newest.len()) " lines."
                @if !whole { " The log is too long to be read to its end here." }
            }
        }
        section #lines { pre .log tabindex="0" { @for line in &newest { (line.generation) "/" (line.rank) "  " (line.line) "\n" } } }
    };
    let live = matches!(run.state(), RunState::Running | RunState::Cancelling) && whole;
    let command = format!("gleaner run logs {name}");
    Ok(Page { title: &name, live, command: &command, sections }.into_response())
}
