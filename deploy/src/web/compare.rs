//! Runs beside each other: what was changed, which learned better, and whether both saw the same samples.

use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use maud::html;
use proto::pb::{CompareRunsRequest, Run};

use super::page::{Failure, Page, number, query};
use super::run::{curves, get};
use super::source::Source;
use crate::client::answer;
use crate::exit::Ended;
use crate::run::compare::differing;

pub(super) async fn page(State(source): State<Source>, RawQuery(raw): RawQuery) -> Result<Response, Failure> {
    let query = query(raw);
    let name =
        |key: &str| query.get(key).cloned().ok_or_else(|| Ended::usage("which two runs? /compare?a=ONE&b=OTHER"));
    let (a, b) = (get(&source, &name("a")?).await?, get(&source, &name("b")?).await?);
    let (points_a, points_b) = (source.points(&a).await?, source.points(&b).await?);
    let request = CompareRunsRequest { a: a.run.clone(), b: b.run.clone() };
    let same = answer(source.cluster.runs.clone().compare_runs(request)).await?;
    let differing = differing(&a, &b);
    let score = |run: &Run| {
        run.test.as_ref().map_or("not tested".to_owned(), |test| format!("test top-1 {:.1} %", 100.0 * test.top1))
    };
    let sections = html! {
        section #verdict {
            h1 { a href={ "/runs/" (a.run) } { (a.run) } " and " a href={ "/runs/" (b.run) } { (b.run) } }
            p .verdict {
                (a.run) ": " (score(&a)) "; " (b.run) ": " (score(&b)) ". "
                @if same.equal { "Both saw the same samples in each step." } @else {
                    (number(same.steps_equal)) " of " (number(same.steps_a)) " and " (number(same.steps_b)) " steps saw the same samples."
                }
            }
        }
        section #settings {
            h2 { "What was changed" }
            @if differing.is_empty() { p { "Nothing: their specs are the same." } } @else { div .scroll { table {
                thead { tr { th { "setting" } th { (a.run) } th { (b.run) } } }
                tbody { @for (key, values) in &differing {
                    tr { td { (key) } @for value in values { td { (value.as_deref().unwrap_or("-")) } } }
                } }
            } } }
        }
        (curves(&[(&a.run, &points_a), (&b.run, &points_b)], &[]))
    };
    let command = format!("gleaner run compare {} {}", a.run, b.run);
    Ok(Page { title: "Compare", live: false, command: &command, sections }.into_response())
}
