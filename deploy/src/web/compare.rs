//! Runs beside each other: what was changed, which learned better, and whether both saw the same samples.

use std::collections::BTreeMap;

use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use maud::html;
use proto::pb::{CompareRunsRequest, Run};
use serde_json::Value;

use super::page::{Failure, Page, number, query};
use super::run::{curves, get};
use super::source::Source;
use crate::client::answer;
use crate::exit::Ended;

pub(super) async fn page(State(source): State<Source>, RawQuery(raw): RawQuery) -> Result<Response, Failure> {
    let query = query(raw);
    let name =
        |key: &str| query.get(key).cloned().ok_or_else(|| Ended::usage("which two runs? /compare?a=ONE&b=OTHER"));
    let (a, b) = (get(&source, &name("a")?).await?, get(&source, &name("b")?).await?);
    let (points_a, points_b) = (source.points(&a).await?, source.points(&b).await?);
    let request = CompareRunsRequest { a: a.run.clone(), b: b.run.clone() };
    let same = answer(source.cluster.runs.clone().compare_runs(request)).await?;
    let (of_a, of_b) = (settings(&a), settings(&b));
    let keys: std::collections::BTreeSet<&String> = of_a.keys().chain(of_b.keys()).collect();
    let differing: Vec<&String> = keys.into_iter().filter(|key| of_a.get(*key) != of_b.get(*key)).collect();
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
                tbody { @for key in differing {
                    tr { td { (key) } td { (of_a.get(key).map_or("-", String::as_str)) } td { (of_b.get(key).map_or("-", String::as_str)) } }
                } }
            } } }
        }
        (curves(&[(&a.run, &points_a), (&b.run, &points_b)], &[]))
    };
    let command = format!("gleaner run compare {} {}", a.run, b.run);
    Ok(Page { title: "Compare", live: false, command: &command, sections }.into_response())
}

/// The settings of a run's spec, each by its path.
fn settings(run: &Run) -> BTreeMap<String, String> {
    fn walk(path: &str, value: &Value, into: &mut BTreeMap<String, String>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    walk(&path, value, into);
                }
            }
            value => {
                into.insert(path.to_owned(), value.to_string());
            }
        }
    }
    let mut settings = BTreeMap::new();
    walk("", &serde_json::from_str(&run.spec_json).unwrap_or(Value::Null), &mut settings);
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_named_by_their_path() {
        let spec_json = r#"{"seed": 1, "train": {"batch": 64, "decay": [1, 2]}}"#.to_owned();
        let settings = settings(&Run { spec_json, ..Run::default() });
        let expected = [("seed", "1"), ("train.batch", "64"), ("train.decay", "[1,2]")];
        assert_eq!(settings, expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
    }
}
