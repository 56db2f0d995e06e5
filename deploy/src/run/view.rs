//! A run as people and programs see it.

use anyhow::Result;
use proto::pb::{Metric, Run, RunState};
use proto::run_event::RunEvent;
use serde_json::Value;

use super::NameArgs;
use crate::output::{Format, say, say_json, state_name, unfold_spec};

/// Says what a command has made of a run.
pub(super) fn changed(of: &NameArgs, run: &Run, what: &str) -> Result<()> {
    match of.cluster.output {
        Format::Json => say_json(&to_json(run)?),
        Format::Table => {
            say(format!("{}: {what}", run.run));
            Ok(())
        }
    }
}

/// The epoch that a run is in, counted from 1; of one that is done, its last.
pub(crate) fn epoch(run: &Run) -> u64 {
    let begun = run.step / run.steps_per_epoch.max(1) + u64::from(run.step < run.epochs * run.steps_per_epoch);
    begun.min(run.epochs)
}

/// One event of a run's history for people.
pub(crate) fn happened(event: &RunEvent) -> String {
    match event {
        RunEvent::Submitted { start: None, .. } => "submitted".to_owned(),
        RunEvent::Submitted { start: Some(start), .. } => format!("submitted; begins with {start}"),
        RunEvent::Generation { generation, members } => format!("generation {generation} of {} ranks", members.len()),
        RunEvent::Checkpoint { step, top1, .. } => {
            let top1 = top1.map_or(String::new(), |top1| format!(", validation top-1 {top1:.3}"));
            format!("checkpoint at step {step}{top1}")
        }
        RunEvent::Damaged { key, reason } => format!("checkpoint {key} is lost: {reason}"),
        RunEvent::Failure { generation, step, reason, culprit } => {
            let since = culprit.as_ref().map_or(0.0, |culprit| culprit.silent_millis as f64 / 1000.0);
            let since = if since < 0.1 { String::new() } else { format!(", last heard {since:.1} s before") };
            format!("generation {generation} failed after step {step}: {reason}{since}")
        }
        RunEvent::Cancelling => "cancelling".to_owned(),
        RunEvent::Cancelled => "cancelled".to_owned(),
        RunEvent::Failed { reason } => format!("failed: {reason}"),
        RunEvent::Resumed { step, epochs, .. } => {
            let at = step.map_or(String::new(), |step| format!(" at step {step}"));
            let to = epochs.map_or(String::new(), |epochs| format!(", for {epochs} epochs in all"));
            format!("resumed{at}{to}")
        }
        RunEvent::Done { model, .. } => format!("done; the model is in {model}"),
    }
}

/// For how many milliseconds a run has been running, or ran until its end; None if it has not begun.
pub(crate) fn duration(run: &Run, now_millis: u64) -> Option<u64> {
    let end = if run.ended_millis > 0 { run.ended_millis } else { now_millis };
    (run.began_millis > 0).then(|| end.saturating_sub(run.began_millis))
}

/// For how many milliseconds more a run will train, at the pace of its newest step; None if that is not known.
pub(crate) fn remaining(run: &Run) -> Option<u64> {
    let pace = run.last_step.as_ref().filter(|step| step.images_per_second > 0.0 && step.samples > 0)?;
    let steps = (run.epochs * run.steps_per_epoch).saturating_sub(run.step);
    let of_a_step = pace.samples as f64 / pace.images_per_second;
    (run.state() == RunState::Running).then_some((steps as f64 * of_a_step * 1000.0) as u64)
}

/// The message as JSON: the state by its name, spec and events as objects.
pub(super) fn to_json(run: &Run) -> Result<Value> {
    let mut value = serde_json::to_value(run)?;
    value["state"] = state(run).into();
    value["events"] =
        run.events.iter().map(|json| serde_json::from_str(json)).collect::<Result<Vec<Value>, _>>()?.into();
    unfold_spec(&mut value);
    Ok(value)
}

/// The state by its name.
pub(super) fn state(run: &Run) -> String {
    state_name(run.state().as_str_name(), "RUN_STATE_")
}

/// Its state, with the reason if there is one.
pub(super) fn phase(run: &Run) -> String {
    let reason = if run.reason.is_empty() { String::new() } else { format!(": {}", run.reason) };
    format!("{} {}{reason}", run.run, state(run))
}

/// One point of the learning curve for people.
pub(super) fn point(metric: &Metric, epochs: u64) -> String {
    let Metric { kind, epoch, loss, top1, top5, images_per_second, seconds, .. } = metric;
    format!(
        "epoch {epoch:>3}/{epochs}  {kind:<10}  loss {loss:>7.4}  top-1 {top1:.3}  top-5 {top5:.3}  \
         {images_per_second:>6.0} images/s  {seconds:>5.0} s"
    )
}
