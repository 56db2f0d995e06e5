//! `gleaner run compare`: what was changed from one run to the other, what came of it, and whether both were trained on
//! the same samples; it ends as `run verify` does.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use proto::pb::{GetMetricsRequest, GetRunRequest, Metric, Run};
use proto::run_spec::Plan;
use serde_json::{Value, json};

use super::verify::{self, Args};
use super::{plot, view};
use crate::client::{Cluster, answer};
use crate::output::{Format, Table, say, say_json, state_name};
use crate::time::{now_millis, span};

/// A setting of the one run's spec and of the other's.
pub(crate) type Differing = (String, [Option<String>; 2]);

/// Runs the command.
pub(super) async fn run(args: &Args) -> Result<()> {
    let cluster = Cluster::new(&args.cluster)?;
    let (client, found) = (cluster.runs.clone(), verify::ask(&cluster, args).await?);
    let (mut runs, mut points) = (Vec::new(), Vec::new());
    for run in [&args.a, &args.b] {
        runs.push(answer(client.clone().get_run(GetRunRequest { run: run.clone() })).await?);
        let request = GetMetricsRequest { run: run.clone(), kinds: vec!["train".to_owned(), "validation".to_owned()] };
        points.push(answer(client.clone().get_metrics(request)).await?.metrics);
    }
    let (differing, results) = (differing(&runs[0], &runs[1]), results(&runs, &points));
    let names = [runs[0].run.as_str(), runs[1].run.as_str()];
    if args.cluster.output == Format::Json {
        let by_run = |values: &[Option<String>; 2]| json!({ names[0]: values[0], names[1]: values[1] });
        let object = |rows: &[Differing]| -> Value {
            rows.iter().map(|(name, values)| (name.clone(), by_run(values))).collect::<serde_json::Map<_, _>>().into()
        };
        say_json(&json!({ "settings": object(&differing), "results": object(&results), "samples": found }))?;
        return verify::ended(args, &found);
    }
    let table = |heading: &str, rows: &[Differing]| {
        let mut table = Table::new(&[heading, names[0], names[1]]);
        for (name, values) in rows {
            let [a, b] = values.clone().map(|value| value.unwrap_or_else(|| "-".to_owned()));
            table.row(vec![name.clone(), a, b]);
        }
        table.say();
    };
    match differing.is_empty() {
        true => say("their settings are the same"),
        false => table("setting", &differing),
    }
    say("");
    table("", &results);
    let of_validation = |points: &[Metric]| -> Vec<(f64, f64)> {
        let validation = points.iter().filter(|point| point.kind == "validation");
        validation.map(|point| (point.step as f64, point.top1)).collect()
    };
    let curves = [('a', of_validation(&points[0])), ('b', of_validation(&points[1]))];
    let chart = plot::chart("validation top-1, by step", &curves, plot::SIZE);
    if !chart.is_empty() {
        say("");
        chart.iter().for_each(say);
        say(format!("a {}, b {}; * both", names[0], names[1]));
    }
    say("");
    verify::lines(args, &found).iter().for_each(say);
    verify::ended(args, &found)
}

/// The settings in which two runs differ, each by its path.
pub(crate) fn differing(a: &Run, b: &Run) -> Vec<Differing> {
    let (of_a, of_b) = (settings(a), settings(b));
    let keys: BTreeSet<&String> = of_a.keys().chain(of_b.keys()).collect();
    let pair = |key: &String| (key.clone(), [of_a.get(key).cloned(), of_b.get(key).cloned()]);
    keys.into_iter().map(pair).filter(|(_, [a, b])| a != b).collect()
}

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
    // Runs that were submitted before there was a second plan do not name theirs.
    settings.entry("plan".to_owned()).or_insert_with(|| u32::from(Plan::Spread).to_string());
    settings
}

/// What came of both.
fn results(runs: &[Run], points: &[Vec<Metric>]) -> Vec<Differing> {
    let of = |name: &str, value: &dyn Fn(&Run, &[Metric]) -> Option<String>| {
        (name.to_owned(), [value(&runs[0], &points[0]), value(&runs[1], &points[1])])
    };
    let share = |value: f64| format!("{value:.4}");
    let last = |points: &[Metric], kind: &str| points.iter().rev().find(|point| point.kind == kind).cloned();
    vec![
        of("state", &|run, _| Some(state_name(run.state().as_str_name(), "RUN_STATE_"))),
        of("steps", &|run, _| Some(run.step.to_string())),
        of("took", &|run, _| view::duration(run, now_millis()).map(span)),
        of("last training loss", &|_, points| last(points, "train").map(|point| share(point.loss))),
        of("best validation top-1", &|_, points| {
            let scores = points.iter().filter(|point| point.kind == "validation").map(|point| point.top1);
            scores.reduce(f64::max).map(share)
        }),
        of("test top-1", &|run, _| run.test.as_ref().map(|test| share(test.top1))),
        of("test top-5", &|run, _| run.test.as_ref().map(|test| share(test.top5))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_differ_are_named_by_their_path() {
        let run = |spec_json: &str| Run { spec_json: spec_json.to_owned(), ..Run::default() };
        let a = run(r#"{"seed": 1, "train": {"batch": 64, "decay": [1, 2]}}"#);
        let b = run(r#"{"seed": 1, "train": {"batch": 32}}"#);
        let texts = |a: &str, b: Option<&str>| [Some(a.to_owned()), b.map(str::to_owned)];
        let expected =
            [("train.batch".to_owned(), texts("64", Some("32"))), ("train.decay".to_owned(), texts("[1,2]", None))];
        assert_eq!(differing(&a, &b), expected);
        assert!(differing(&a, &a).is_empty());
        let newer = run(r#"{"seed": 1, "plan": 2, "train": {"batch": 32}}"#);
        assert_eq!(differing(&b, &newer), [("plan".to_owned(), texts("1", Some("2")))]);
    }
}
