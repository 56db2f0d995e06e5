//! `gleaner run describe`

use anyhow::Result;
use proto::RunSpec;
use proto::pb::{GetRunRequest, Run};
use proto::run_event::EventRecord;

use super::{NameArgs, view};
use crate::client::{Cluster, answer};
use crate::output::{Format, say, say_json};
use crate::time::{moment, now_millis, span};

/// Runs the command.
pub(super) async fn run(of: &NameArgs) -> Result<()> {
    let mut client = Cluster::new(&of.cluster)?.runs;
    let run = answer(client.get_run(GetRunRequest { run: of.run.clone() })).await?;
    match of.cluster.output {
        Format::Json => say_json(&view::to_json(&run)?),
        Format::Table => {
            description(&run, now_millis()).iter().for_each(say);
            Ok(())
        }
    }
}

/// `describe` for people.
fn description(run: &Run, now_millis: u64) -> Vec<String> {
    let mut lines = vec![view::phase(run)];
    let ran = view::duration(run, now_millis).map_or(String::new(), |millis| {
        format!(", {} {}", if run.ended_millis > 0 { "ran for" } else { "running for" }, span(millis))
    });
    let to_go = view::remaining(run).map_or(String::new(), |millis| format!(", about {} to go", span(millis)));
    let age = span(now_millis.saturating_sub(run.submitted_millis));
    lines.push(format!("submitted {} ({age} ago){ran}{to_go}", moment(run.submitted_millis)));
    lines.push(format!("dataset {}, manifest version {}", run.dataset, run.manifest_version));
    lines.push(format!(
        "step {} of {} ({} epochs); generation {} with {} ranks; checkpoint at step {}",
        run.step,
        run.epochs * run.steps_per_epoch,
        run.epochs,
        run.generation,
        run.world_size,
        run.checkpoint_step
    ));
    if run.best_checkpoint_step > 0 {
        lines.push(format!("best validation in the checkpoint at step {}", run.best_checkpoint_step));
    }
    let newest = [&run.last_step, &run.last_validation, &run.test];
    lines.extend(newest.into_iter().flatten().map(|metric| view::point(metric, run.epochs)));
    lines.push(String::new());
    lines.extend(run.events.iter().map(|json| match serde_json::from_str::<EventRecord>(json) {
        Ok(record) => format!("{:>4}  {}  {}", record.n, moment(record.at_millis), view::happened(&record.event)),
        Err(_) => json.clone(),
    }));
    if let Ok(spec) = RunSpec::from_json(&run.spec_json)
        && let Ok(toml) = toml::to_string(&spec)
    {
        lines.push(String::new());
        lines.extend(toml.lines().filter(|line| !line.is_empty()).map(str::to_owned));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::pb::{Metric, RunState};

    #[test]
    fn json_has_spec_and_events_as_objects() {
        let run = Run {
            run: "birds-1".into(),
            state: RunState::Done.into(),
            spec_json: RunSpec::from_toml("dataset = \"birds\"").expect("good").to_json(),
            events: vec![r#"{"n":1,"term":1,"nonce":"a","at_millis":0,"event":{"kind":"cancelled"}}"#.into()],
            test: Some(Metric { top1: 0.5, ..Metric::default() }),
            ..Run::default()
        };
        let value = view::to_json(&run).expect("serializable");
        assert_eq!(value["state"], "done");
        assert_eq!(value["spec"]["dataset"], "birds");
        assert_eq!(value["events"][0]["event"]["kind"], "cancelled");
        assert_eq!(value["test"]["top1"], 0.5);
        let run = Run { submitted_millis: 60_000, began_millis: 90_000, ended_millis: 150_000, ..run };
        let text = description(&run, 240_000).join("\n");
        let expected = "birds-1 done\nsubmitted 1970-01-01T00:01:00Z (3m0s ago), ran for 1m0s\n";
        assert!(text.starts_with(expected), "{text}");
        let step = Metric { samples: 32, images_per_second: 16.0, ..Metric::default() };
        let running = Run {
            state: RunState::Running.into(),
            ended_millis: 0,
            last_step: Some(step),
            epochs: 10,
            steps_per_epoch: 6,
            step: 30,
            ..run
        };
        let text = description(&running, 240_000).join("\n");
        assert!(text.contains("running for 2m30s, about 1m0s to go"), "{text}");
        assert!(text.contains("   1  1970-01-01T00:00:00Z  cancelled"), "{text}");
    }
}
