//! `gleaner run describe`

use anyhow::Result;
use proto::RunSpec;
use proto::pb::{GetRunRequest, Run};
use proto::run_event::EventRecord;

use super::{NameArgs, view};
use crate::client::{Cluster, answer};
use crate::output::{Format, say, say_json};

/// Runs the command.
pub(super) async fn run(of: &NameArgs) -> Result<()> {
    let mut client = Cluster::new(&of.cluster)?.runs;
    let run = answer(client.get_run(GetRunRequest { run: of.run.clone() })).await?;
    match of.cluster.output {
        Format::Json => say_json(&view::to_json(&run)?),
        Format::Table => {
            description(&run).iter().for_each(say);
            Ok(())
        }
    }
}

/// `describe` for people.
fn description(run: &Run) -> Vec<String> {
    let mut lines = vec![view::phase(run)];
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
        Ok(record) => format!("{:>4}  {}", record.n, view::happened(&record.event)),
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
        let text = description(&run).join("\n");
        assert!(text.starts_with("birds-1 done") && text.contains("   1  cancelled"), "{text}");
    }
}
