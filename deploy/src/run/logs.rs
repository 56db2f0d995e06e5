//! `gleaner run logs`

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Result;
use proto::pb::{GetLogsRequest, LogLine};
use tonic::Status;

use super::NameArgs;
use crate::client::{Cluster, answer, insist, wait_for};
use crate::exit::is_outage;
use crate::output::{Format, say};

/// Arguments of `gleaner run logs`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    of: NameArgs,
    /// Go on until the run has ended
    #[arg(short, long)]
    follow: bool,
}

/// Runs the command.
pub(super) async fn run(args: &Args) -> Result<()> {
    let Args { of, follow } = args;
    let client = Cluster::new(&of.cluster)?.runs;
    let json = of.cluster.output == Format::Json;
    let request = GetLogsRequest { run: of.run.clone(), follow: *follow };
    let show = |line: &LogLine| -> Result<()> {
        if json {
            say(serde_json::to_string(line)?);
        } else {
            say(format!("{}/{}  {}", line.generation, line.rank, line.line));
        }
        Ok(())
    };
    if !follow {
        let mut stream = answer(client.clone().get_logs(request)).await?;
        loop {
            let next = tokio::time::timeout(Duration::from_secs(30), stream.message()).await;
            match next.map_err(|_| Status::deadline_exceeded("the logs stopped half way"))?? {
                Some(line) => show(&line)?,
                None => return Ok(()),
            }
        }
    }
    // A stream that is opened again begins at the beginning: each rank's lines come in order, so those shown are counted off.
    let mut shown: HashMap<(u64, u32), u64> = HashMap::new();
    let work = async {
        loop {
            let mut again: HashMap<(u64, u32), u64> = HashMap::new();
            let opened =
                insist(async || client.clone().get_logs(request.clone()).await.map(tonic::Response::into_inner)).await;
            let mut stream = opened?;
            let broken = loop {
                match stream.message().await {
                    Ok(Some(line)) => {
                        let rank = (line.generation, line.rank);
                        let n = again.entry(rank).or_default();
                        *n += 1;
                        let shown = shown.entry(rank).or_default();
                        if *n > *shown {
                            *shown = *n;
                            show(&line)?;
                        }
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => break status,
                }
            };
            if !is_outage(&broken) {
                return Err(broken.into());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    wait_for(work, None, &format!("gleaner run logs -f {}", of.run)).await
}
