//! `gleaner status`: what the cluster consists of now.

use anyhow::Result;
use proto::dial::Dial;
use proto::pb::{GetStatusRequest, Status, Trouble};

use crate::client::{Cluster, ClusterArgs, answer};
use crate::output::{Format, Table, say, say_json, state_name};

/// Asks the coordinator and prints its answer.
pub(crate) async fn run(args: &ClusterArgs) -> Result<()> {
    let dial = args.dial.dial()?;
    let status = answer(Cluster::over(&dial).runs.get_status(GetStatusRequest {})).await?;
    match args.output {
        Format::Json => say_json(&status),
        Format::Table => {
            description(&dial, &status).iter().for_each(say);
            Ok(())
        }
    }
}

fn description(dial: &Dial, status: &Status) -> Vec<String> {
    let Status { term, version, store, shards_waiting, shards_leased, runs_waiting, runs_running, .. } = status;
    let mut lines = vec![
        format!("coordinator {dial} version {version}, term {term}, store {store}"),
        format!("shards: {shards_waiting} waiting, {shards_leased} leased"),
        format!("runs: {runs_waiting} waiting, {runs_running} running"),
        String::new(),
    ];
    let mut workers = Table::new(&["worker", "leases", "seen"]);
    for worker in &status.workers {
        let seen = format!("{:.1} s ago", worker.seen_millis_ago as f64 / 1000.0);
        workers.row(vec![worker.worker.clone(), worker.leases.to_string(), seen]);
    }
    lines.extend(workers.lines());
    lines.push(String::new());
    let mut agents = Table::new(&["agent", "address", "device", "rank"]);
    for agent in &status.agents {
        for device in &agent.devices {
            let occupant = if device.occupant.is_empty() { "free" } else { &device.occupant };
            agents.row(vec![agent.agent.clone(), agent.address.clone(), device.device.clone(), occupant.to_owned()]);
        }
    }
    lines.extend(agents.lines());
    lines.extend(troubles(&status.troubles));
    lines
}

/// What goes wrong and since when; nothing if all is well.
pub(crate) fn troubles(troubles: &[Trouble]) -> Vec<String> {
    if troubles.is_empty() {
        return Vec::new();
    }
    let mut table = Table::new(&["trouble", "worker", "dataset", "times", "since", "last"]);
    let ago = |millis: u64| format!("{:.0} s ago", millis as f64 / 1000.0);
    for trouble in troubles {
        let worker = if trouble.worker.is_empty() { "coordinator" } else { &trouble.worker };
        table.row(vec![
            state_name(trouble.kind().as_str_name(), "FAILURE_KIND_"),
            worker.to_owned(),
            trouble.dataset.clone(),
            trouble.count.to_string(),
            ago(trouble.since_millis_ago),
            ago(trouble.last_millis_ago),
        ]);
    }
    let mut lines = vec![String::new()];
    lines.extend(table.lines());
    let mut texts: Vec<&str> = troubles.iter().map(|trouble| trouble.text.as_str()).collect();
    texts.dedup();
    lines.extend(texts.into_iter().map(|text| format!("  {text}")));
    lines
}
