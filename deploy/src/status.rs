//! `gleaner status`: what the cluster consists of now.

use anyhow::Result;
use proto::pb::{GetStatusRequest, Status};

use crate::client::{Cluster, ClusterArgs, answer};
use crate::output::{Format, Table, say, say_json};

/// Asks the coordinator and prints its answer.
pub(crate) async fn run(args: &ClusterArgs) -> Result<()> {
    let status = answer(Cluster::new(args)?.runs.get_status(GetStatusRequest {})).await?;
    match args.output {
        Format::Json => say_json(&status),
        Format::Table => {
            description(args, &status).iter().for_each(say);
            Ok(())
        }
    }
}

fn description(args: &ClusterArgs, status: &Status) -> Vec<String> {
    let Status { term, version, store, shards_waiting, shards_leased, runs_waiting, runs_running, .. } = status;
    let mut lines = vec![
        format!("coordinator {} version {version}, term {term}, store {store}", args.coordinator),
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
    lines
}
