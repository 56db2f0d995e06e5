//! `gleaner run logs`

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Result;
use proto::pb::{GetLogsRequest, LogLine};
use tonic::Status;

use super::NameArgs;
use crate::client::{Cluster, answer, duration, insist, wait_for};
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
    /// Only what this rank wrote
    #[arg(long, value_name = "N")]
    rank: Option<u32>,
    /// Only the last N lines of each rank, and with --follow those that come
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    tail: Option<u64>,
    /// Only what was stored since so long ago (10m, 2h), within some seconds
    #[arg(long, value_name = "TIME", value_parser = duration)]
    since: Option<Duration>,
}

/// Runs the command.
pub(super) async fn run(args: &Args) -> Result<()> {
    let Args { of, follow, rank, tail, since } = args;
    let client = Cluster::new(&of.cluster)?.runs;
    let json = of.cluster.output == Format::Json;
    let request = GetLogsRequest {
        run: of.run.clone(),
        follow: *follow,
        rank: *rank,
        tail: tail.unwrap_or(0),
        since_seconds: since.map_or(0, |since| since.as_secs().max(1)),
    };
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
    // A stream that is opened again may say again what was shown: each rank's lines come in order.
    let mut shown: HashMap<(u64, u32), u64> = HashMap::new();
    let work = async {
        loop {
            let opened =
                insist(async || client.clone().get_logs(request.clone()).await.map(tonic::Response::into_inner)).await;
            let mut stream = opened?;
            let broken = loop {
                match stream.message().await {
                    Ok(Some(line)) => {
                        let last = shown.entry((line.generation, line.rank)).or_default();
                        if line.number > *last {
                            *last = line.number;
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
